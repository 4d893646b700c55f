"""``retroexit export``."""

import torch

import retroexit


def test_a_fitted_model_is_exported(run):
    target = "toy.py:decoder"
    run("inspect", target, "--shape", "1,4,4,4").succeeds()
    from toy import Decoder  # the file beside which commands run

    example = (torch.rand(1, 4, 4, 4),)
    retroexit.wrap(Decoder().eval(), [1], 1 / 2, min_channels=4, example_inputs=example).save("model")
    run("export", target, "model", "out").fails_with("an example input is needed, got none. Pass --inputs, or --shape")
    words = ("export", target, "model", "out", "--shape", "1,4,4,4", "--format", "torch")
    assert run(*words).succeeds().startswith("2 exits, 0.")
    assert retroexit.load_bundle("out").run(torch.rand(2, 4, 4, 4).numpy(), exit=1)[0].shape == (2, 3, 16, 16)
