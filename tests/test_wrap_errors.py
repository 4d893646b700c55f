"""Errors of `wrap` and of calls: each message shows the value, and the generator stays as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retroexit
from retroexit import errors

X = torch.linspace(0, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8)


@pytest.fixture
def toy(toys):
    return toys.TOYS["group_norm"]()


def chain(toys, forward=None):
    """Three residual blocks, with another forward if one is given."""
    kind = type("Custom", (toys.Chain,), {"forward": forward or toys.Chain.forward})
    return kind([toys.Block(32, 32), toys.Block(32, 24, True), toys.Block(24, 24)]).eval()


def wrap(generator, *inputs, **options):
    settings = {"attach_at": [1], "scale": 1 / 4, "min_channels": 8, **options}
    return retroexit.wrap(generator, example_inputs=inputs or (X,), **settings)


@pytest.mark.parametrize(
    ("attach_at", "message"),
    [
        ([7], r"attach_at must be stages 1 to 3, got 7. Closest: .*3 \(blocks\.2\)"),
        ([0], r"attach_at must be stages 1 to 3, got 0. Closest: 1 \(blocks\.0\)"),
        (["blocks.9"], r"no module 'blocks\.9' in Chain.*'blocks\.\d'"),
        (["blocks"], "'blocks' is never called"),
        ([], r"attach_at must name at least one stage, got \[\]"),
        ([2, 2], r"attach_at must name each place once, got \[2, 2\]"),
        ([1, "blocks.0"], "each place once, got"),
        ([True], "must hold stage numbers and module paths, got True"),
        ([3], r"got the last one, 3 \(blocks\.2\). Attach at 1 to 2"),
        (["blocks.2"], r"got the last one, 3 \(blocks\.2\). Attach at 1 to 2"),
        (["rgb"], "'rgb'"),
    ],
    ids=str,
)
def test_invalid_attach_points_are_refused(toy, refused, attach_at, message):
    with refused(toy.generator, errors.AttachPointError, message):
        wrap(toy.generator, attach_at=attach_at)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, r"scale must be in \(0, 1\], got 0\."),
        ({"scale": 1.5}, r"scale must be in \(0, 1\], got 1\.5"),
        ({"scale": "half"}, "'half'"),
        ({"scale": float("nan")}, "got nan"),
        ({"attach_at": None, "scale": None, "macs": [0.5, None]}, "macs must be shares where attach_at is left out"),
        ({"scale": [0.5, 0.5]}, r"scale must be one value or one per exit \(1\), got 2"),
        ({"min_channels": 0}, "min_channels must be an integer >= 1, got 0"),
        ({"tap": "beside"}, "tap must be 'after' or 'before', got 'beside'"),
        ({"init": "zeros"}, "init must be 'inherit' or 'scratch', got 'zeros'"),
        ({"guidance": "magic"}, "guidance must be None, True, .* got 'magic'"),
        ({"image": "picture"}, "no image at 'picture' in the output; maps are at"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(toy, refused, options, message):
    with refused(toy.generator, errors.OptionError, message):
        wrap(toy.generator, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (nn.Module.train, errors.ModeError, "must be in eval mode.*generator.eval"),
        (nn.Module.half, errors.DeviceError, r"parameters .*torch\.float16 and an input .*torch\.float32"),
        (lambda g: g.rgb.bias.data.fill_(torch.nan), errors.NonFiniteError, r"NaN .* of shape \(2, 3, 16, 16\)"),
    ],
)
def test_a_generator_in_a_wrong_state_is_refused(toy, refused, change, error, message):
    change(toy.generator)
    with refused(toy.generator, error, message):
        wrap(toy.generator)


def test_something_that_is_no_module_is_refused():
    with pytest.raises(errors.GeneratorError, match="generator must be a torch.nn.Module, got a function"):
        wrap(lambda x: x)


def test_inputs_that_the_generator_rejects_show_its_error(toy, refused):
    with refused(toy.generator, errors.GeneratorError, r"\(2, 9, 8, 8\).*RuntimeError.*9 channels") as caught:
        wrap(toy.generator, torch.ones(2, 9, 8, 8))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_generator_whose_mode_changed_after_wrapping_is_refused(toy, refused):
    model = wrap(toy.generator)
    toy.generator.blocks[1].train()
    with refused(toy.generator, errors.ModeError, "Block must be in eval mode .*got train mode"):
        model(X, exit=1)


def test_a_generator_on_another_device_than_its_inputs_is_refused(toy):
    with pytest.raises(errors.DeviceError, match="got parameters on meta .* and an input .* on cpu"):
        wrap(toy.generator.to("meta"))


def test_with_several_images_one_must_be_named(toys, refused):
    def forward(self, x):
        image = toys.Chain.forward(self, x)
        return {"rgb": image, "mask": image[:, :1]}

    generator = chain(toys, forward)
    with refused(generator, errors.OutputError, r"one image, got 2 at 'rgb' \(2, 3, 16, 16\), 'mask'.*image='rgb'"):
        wrap(generator)
    model = wrap(generator, image="rgb")
    assert model.image(model(X, exit=1)).shape == (2, 3, 16, 16)


def test_an_output_without_an_image_and_a_stage_that_runs_twice_are_refused(toys, refused):
    generator = chain(toys, lambda self, x: toys.Chain.forward(self, x).mean((2, 3)))
    with refused(generator, errors.OutputError, "no image among the generator's outputs"):
        wrap(generator)
    generator = chain(toys)
    generator.blocks.insert(0, generator.blocks[0])
    with refused(generator, errors.RepeatedStageError, r"'blocks\.0' runs 2 times"):
        wrap(generator, attach_at=["blocks.0"])


def test_a_python_argument_that_changes_is_named(toys, refused):
    model = wrap(chain(toys, lambda self, x, gain=1.0: toys.Chain.forward(self, x) * gain), X, 2.0)
    with refused(model.generator, errors.InputMismatchError, r"1 must be 2\.0 .*got 3\.0.*frozen"):
        model(X, 3.0, exit=1)


def test_an_input_size_that_the_forward_fixes_is_named(toys, refused):
    model = wrap(chain(toys, lambda self, x: toys.Chain.forward(self, x + torch.ones(int(x.shape[2]), 1))))
    assert model(torch.rand(2, 4, 8, 12), exit=1).shape == (2, 3, 16, 24)  # the width is free
    tall = torch.rand(2, 4, 12, 8)
    with refused(model.generator, errors.InputMismatchError, r"fixes sizes.*\(2, 4, 12, 8\).*Wrap again"):
        model(tall, exit=1)
    assert model(tall).shape == (2, 3, 24, 16)  # the generator itself takes it


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (X.double(), {"exit": 1}, errors.InputMismatchError, r"must be torch\.float32 .*got torch\.float64"),
        ((X, X), {"exit": 1}, errors.InputMismatchError, "tensors must be at"),
        *((X, {"exit": k}, errors.OptionError, f"from 1 to 2, .* got {k!r}") for k in (0, 3, -1, True, "last")),
        (X, {"exit": 1, "threshold": 0.1}, errors.OptionError, r"exit=1 and threshold=0\.1"),
        *((X, {"threshold": tau}, errors.OptionError, "threshold") for tau in (-0.1, float("nan"), "low")),
        (X, {"threshold": 0.1}, errors.TrainingError, "needs a predictor, but the .* Run retroexit.fit"),
    ],
)
def test_invalid_calls_are_refused(toy, refused, inputs, options, error, message):
    model = wrap(toy.generator)
    with refused(toy.generator, error, message):
        model(inputs, **options)


def test_a_guided_branch_without_a_bank_is_refused(toy, refused):
    model = wrap(toy.generator, guidance=True)
    with refused(toy.generator, errors.BankError, "there is no guidance bank"):
        model(X, exit=1)


@pytest.mark.parametrize("use", [lambda m: m.exits, lambda m: m.split, lambda m: m.save("none"), lambda m: m.image(X)])
def test_what_needs_a_recording_is_refused_before_it(toy, use):
    model = retroexit.wrap(toy.generator, attach_at=[1], scale=1 / 4)
    message = "not been recorded yet, so there are no exits. Call the model once, or pass example_inputs"
    with pytest.raises(errors.NotRecordedError, match=message):
        use(model)
    assert "not recorded yet" in repr(model)


def test_a_model_whose_first_call_failed_can_be_called_again(toy, refused):
    model = retroexit.wrap(toy.generator, attach_at=[1], scale=1 / 4, min_channels=8)
    with refused(toy.generator, errors.GeneratorError, "9 channels"):
        model(torch.ones(2, 9, 8, 8), exit=1)
    assert not model.is_recorded
    assert model(X, exit=1).shape == (2, 3, 16, 16)


def test_a_self_test_that_fails_can_be_switched_off(toys, refused):
    class Counts(nn.Module):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            return x + 1e-6 * type(self).calls

    generator = chain(toys)
    generator.blocks[1].norm = Counts()
    with refused(generator, errors.RecordingError, "does not reproduce its output.*self_test=False"):
        wrap(generator)
    assert wrap(generator, self_test=False).is_recorded


class _OneStage(nn.Module):
    def __init__(self, stage):
        super().__init__()
        self.stage, self.rgb = stage, nn.Conv2d(16, 3, 1)

    def forward(self, x):
        return self.rgb(F.interpolate(self.stage(x), scale_factor=2.0))


class _TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.one(x) + self.two(x)


@pytest.mark.parametrize(
    ("stage", "message", "advice"),
    [
        (_TwoLayers, r"only stage: name .* attach_at=\['stage.one'\]", {"attach_at": ["stage.one"]}),
        (lambda: nn.Conv2d(16, 16, 3, padding=1), "one layer: take its input .*'before'", {"tap": "before"}),
    ],
)
def test_the_advice_for_a_decoder_of_one_stage_works(stage, message, advice):
    generator, x = _OneStage(stage()).eval(), torch.randn(1, 16, 4, 4)
    assert [stage.path for stage in retroexit.find_stages(generator, (x,))] == ["stage"]
    with pytest.raises(errors.AttachPointError, match=message):
        wrap(generator, x)
    assert wrap(generator, x, **advice)(x, exit=1).shape == (1, 3, 8, 8)
