"""The latent-decoder example: layers, weights, script."""

import functools
import json

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def example(imported):
    with imported("", "latent_decoder") as modules:
        yield modules.latent_decoder


def test_the_decoder_turns_latents_into_images_of_eight_times_their_size(example):
    with torch.no_grad():
        assert example.decoder_layers().eval()(torch.zeros(1, 32, 4, 6)).shape == (1, 3, 32, 48)
        assert example.encoder_layers().eval()(torch.zeros(1, 3, 32, 48)).shape == (1, 32, 4, 6)


def test_the_weights_decode_what_they_encode(example, shared):
    from PIL import Image

    street = shared / "data/street"
    name = (street / "test.txt").read_text().split()[0]
    photograph = np.array(Image.open(street / "256x128/image" / f"{name}.jpg").convert("RGB"))
    image = torch.from_numpy(photograph).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        again = example.load("decoder", shared)(example.load("encoder", shared)(image))
    assert float((again - image).abs().mean()) < 0.05


@pytest.mark.long
def test_its_export_has_each_weight_once(example, shared, tmp_path):
    pytest.importorskip("onnxruntime")
    generator, x = example.load("decoder", shared), torch.randn(3, 32, 8, 12)
    model = example.retroexit.wrap(generator, [4], 1 / 4, min_channels=16, example_inputs=(x[:1],))
    bundle = example.retroexit.load_bundle(example.retroexit.export(model, tmp_path / "bundle", verify=False))
    size = sum(path.stat().st_size for path in (tmp_path / "bundle").iterdir())
    weights, branches = (4 * sum(p.numel() for p in m.parameters()) for m in (generator, model.branches))
    assert size <= 1.1 * weights + branches
    for exit in (1, 2):
        expected = model(x, exit=exit).detach().numpy()
        np.testing.assert_allclose(bundle.run(x.numpy(), exit=exit)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.long
def test_the_script_runs(example, shared, tmp_path, monkeypatch, run_script):
    for split in ("train", "test"):  # so that no photographs need to be encoded
        np.save(tmp_path / f"latents-{split}.npy", torch.randn(6, 32, 4, 8).numpy())
    monkeypatch.setattr(example, "photographs", lambda *_: list(torch.rand(6, 3, 32, 64)))
    fit, evaluate = example.retroexit.fit, example.retroexit.evaluate
    monkeypatch.setattr(example.retroexit, "fit", functools.partial(fit, predictor_steps=5))
    monkeypatch.setattr(example.retroexit, "evaluate", functools.partial(evaluate, repeats=1))
    words = f"--shared {shared} --out {tmp_path} --steps 1 --batch 1 --crop 32 --test 3"
    printed = run_script(example, f"{words} --calibrate 0 --attach-at 6 8 --branch copy --widths 16 32")
    assert "Sequential with 2 early exits" in printed
    assert "threshold on the predicted loss of each sample" in printed
    assert "beside the photographs" in printed and "PSNR" in printed
    assert printed.endswith(f"report: {tmp_path / 'report/report.html'}\n")
    assert len(json.loads((tmp_path / "report/evaluation.json").read_text())["loss"]) == 3
    assert (tmp_path / "report/settings.json").exists()
