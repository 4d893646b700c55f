"""What cannot be wrapped or called says why, and leaves the generator as it was."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retroexit
from retroexit import errors

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


@pytest.fixture
def toy(toys):
    return toys.TOYS["group_norm"]()


def chain(toys, forward=None):
    """Three residual blocks with a forward of one's own."""
    base = toys.Chain
    kind = type("Own", (base,), {"forward": forward or base.forward})
    made = kind([toys.Block(32, 32), toys.Block(32, 24, True), toys.Block(24, 24)])
    return made.eval()


X = torch.linspace(0, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8)


def wrap(generator, *inputs, **options):
    settings = {"attach_at": [1], "scale": 1 / 4, "min_channels": 8, **options}
    return retroexit.wrap(generator, example_inputs=inputs or (X,), **settings)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"attach_at": [7]},
            errors.AttachPointError,
            r"attach_at must be stages 1 to 3, got 7. Closest: .*3 \(blocks\.2\)",
        ),
        (
            {"attach_at": [0]},
            errors.AttachPointError,
            r"attach_at must be stages 1 to 3, got 0. Closest: 1 \(blocks\.0\)",
        ),
        (
            {"attach_at": ["blocks.9"]},
            errors.AttachPointError,
            r"no module 'blocks\.9' in Chain.*'blocks\.\d'",
        ),
        ({"attach_at": ["blocks"]}, errors.AttachPointError, "'blocks' is never called"),
        ({"attach_at": []}, errors.AttachPointError, r"attach_at must name at least one stage, got \[\]"),
        (
            {"attach_at": [2, 2]},
            errors.AttachPointError,
            r"attach_at must name each place once, got \[2, 2\]",
        ),
        ({"attach_at": [1, "blocks.0"]}, errors.AttachPointError, "each place once, got"),
        (
            {"attach_at": [True]},
            errors.AttachPointError,
            "must hold stage numbers and module paths, got True",
        ),
        ({"attach_at": [3]}, errors.AttachPointError, r"got the last one, 3 \(blocks\.2\). Attach at 1 to 2"),
        (
            {"attach_at": ["blocks.2"]},
            errors.AttachPointError,
            r"got the last one, 3 \(blocks\.2\). Attach at 1 to 2",
        ),
        ({"attach_at": ["rgb"]}, errors.AttachPointError, "'rgb'"),
        ({"scale": 0}, errors.OptionError, r"scale must be in \(0, 1\], got 0\."),
        ({"scale": 1.5}, errors.OptionError, r"scale must be in \(0, 1\], got 1\.5"),
        ({"scale": "half"}, errors.OptionError, "'half'"),
        ({"scale": float("nan")}, errors.OptionError, "got nan"),
        (
            {"scale": [0.5, 0.5]},
            errors.OptionError,
            r"scale must be one number or one per attach point \(1\), got 2",
        ),
        ({"min_channels": 0}, errors.OptionError, "min_channels must be an integer >= 1, got 0"),
        ({"tap": "beside"}, errors.OptionError, "tap must be 'after' or 'before', got 'beside'"),
        ({"init": "zeros"}, errors.OptionError, "init must be 'inherit' or 'scratch', got 'zeros'"),
        ({"guidance": "magic"}, errors.OptionError, "guidance must be None, True, .* got 'magic'"),
        ({"image": "picture"}, errors.OptionError, "no image at 'picture' in the output; maps are at"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense(toy, untouched, options, error, text):
    with untouched(toy.generator), pytest.raises(error, match=text):
        wrap(toy.generator, **options)


def test_something_that_is_no_module():
    with pytest.raises(errors.GeneratorError, match="generator must be a torch.nn.Module, got a function"):
        wrap(lambda x: x)


def test_inputs_that_the_generator_rejects_show_its_own_error(toy, untouched):
    x, text = torch.rand(2, 9, 8, 8), r"\(2, 9, 8, 8\).*RuntimeError.*9 channels"
    with untouched(toy.generator), pytest.raises(errors.GeneratorError, match=text) as caught:
        wrap(toy.generator, x)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_generator_in_train_mode(toy, untouched):
    toy.generator.train()
    with (
        untouched(toy.generator),
        pytest.raises(errors.ModeError, match="must be in eval mode.*generator.eval"),
    ):
        wrap(toy.generator)


def test_a_generator_whose_mode_changed_after_wrapping(toy, untouched):
    model = wrap(toy.generator)
    toy.generator.blocks[1].train()
    with (
        untouched(toy.generator),
        pytest.raises(errors.ModeError, match="Block must be in eval mode .*got train mode"),
    ):
        model(X, exit=1)


def test_half_precision_against_full_precision_inputs(toy, untouched):
    toy.generator.half()
    with (
        untouched(toy.generator),
        pytest.raises(
            errors.DeviceError, match=r"got parameters .*torch\.float16 and an input .*torch\.float32"
        ),
    ):
        wrap(toy.generator)


def test_a_generator_on_another_device_than_its_inputs(toy, untouched):
    generator = toy.generator.to("meta")
    with pytest.raises(errors.DeviceError, match="got parameters on meta .* and an input .* on cpu"):
        wrap(generator)


def test_a_generator_that_moved_after_wrapping(toy):
    model = wrap(toy.generator)
    toy.generator.to("meta")
    with pytest.raises(errors.DeviceError, match="must be on cpu .*got meta"):
        model(X, exit=1)


def test_an_output_that_is_not_a_number(toys, untouched):
    generator = chain(toys)
    with torch.no_grad():
        generator.rgb.bias[0] = float("nan")
    with (
        untouched_but_nan(generator),
        pytest.raises(errors.NonFiniteError, match=r"NaN or infinity in a tensor of shape \(2, 3, 16, 16\)"),
    ):
        wrap(generator)


def untouched_but_nan(generator):
    """NaN is not equal to itself, so weights are compared by their bytes here."""
    from contextlib import contextmanager

    @contextmanager
    def watch():
        before = {k: v.numpy().tobytes() for k, v in generator.state_dict().items()}
        yield
        assert before == {k: v.numpy().tobytes() for k, v in generator.state_dict().items()}

    return watch()


def test_several_images_ask_which_one(toys, untouched):
    def forward(self, x):
        image = toys.Chain.forward(self, x)
        return {"rgb": image, "mask": image[:, :1]}

    generator = chain(toys, forward)
    with (
        untouched(generator),
        pytest.raises(
            errors.OutputError, match=r"one image, got 2 at 'rgb' \(2, 3, 16, 16\), 'mask'.*image='rgb'"
        ),
    ):
        wrap(generator)
    model = wrap(generator, image="rgb")
    assert model.image(model(X, exit=1)).shape == (2, 3, 16, 16)


def test_no_image_at_all(toys, untouched):
    generator = chain(toys, lambda self, x: toys.Chain.forward(self, x).mean((2, 3)))
    with (
        untouched(generator),
        pytest.raises(errors.OutputError, match="no image among the generator's outputs"),
    ):
        wrap(generator)


def test_a_stage_that_runs_twice(toys, untouched):
    def forward(self, x):
        h = self.stem(x)
        for block in (self.blocks[0], self.blocks[0], self.blocks[1], self.blocks[2]):
            h = block(h)
        return self.rgb(h)

    generator = chain(toys, forward)
    with untouched(generator), pytest.raises(errors.RepeatedStageError, match=r"'blocks\.0' runs 2 times"):
        wrap(generator, attach_at=["blocks.0"])


def test_a_value_read_out_of_a_tensor_that_steers_the_forward_is_named(toys, untouched):
    def forward(self, x):
        return toys.Chain.forward(self, x) * x.mean().item()

    generator = chain(toys, forward)
    with untouched(generator):
        model = wrap(generator)
    assert re.search(r"test_wrap_errors\.py:\d+: return .*item\(\)", model.split.decoder.replayed)


def test_a_python_argument_that_changes_is_named(toys, untouched):
    def forward(self, x, gain=1.0):
        return toys.Chain.forward(self, x) * gain

    model = wrap(chain(toys, forward), X, 2.0)
    with (
        untouched(model.generator),
        pytest.raises(errors.InputMismatchError, match=r"1 must be 2\.0 .*got 3\.0.*frozen"),
    ):
        model(X, 3.0, exit=1)


def test_an_input_shape_that_the_forward_fixes(toys, untouched):
    def forward(self, x):
        h = self.stem(x) + torch.ones(int(x.shape[2]), 1)
        for block in self.blocks:
            h = block(h)
        return self.rgb(h)

    model = wrap(chain(toys, forward))
    wide = torch.rand(2, 4, 8, 12)
    assert model(wide, exit=1).shape == (2, 3, 16, 24)  # nothing depends on the width
    tall = torch.rand(2, 4, 12, 8)
    with (
        untouched(model.generator),
        pytest.raises(errors.InputMismatchError, match=r"fixes sizes.*\(2, 4, 12, 8\).*Wrap again"),
    ):
        model(tall, exit=1)
    assert model(tall).shape == (2, 3, 24, 16)  # the generator itself takes it


def test_an_input_of_another_type_or_structure(toy, untouched):
    model = wrap(toy.generator)
    with (
        untouched(toy.generator),
        pytest.raises(errors.InputMismatchError, match=r"must be torch\.float32 .*got torch\.float64"),
    ):
        model(X.double(), exit=1)
    with untouched(toy.generator), pytest.raises(errors.InputMismatchError, match="tensors must be at"):
        model((X, X), exit=1)


@pytest.mark.parametrize("exit", [0, 3, -1, True, "last"])
def test_an_exit_that_does_not_exist(toy, exit):
    with pytest.raises(
        errors.OptionError, match=f"exit must be an integer from 1 to 2, the backbone, got {exit!r}"
    ):
        wrap(toy.generator)(X, exit=exit)


def test_two_ways_to_choose_an_exit(toy):
    with pytest.raises(errors.OptionError, match=r"exit=1 and threshold=0\.1"):
        wrap(toy.generator)(X, exit=1, threshold=0.1)


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), "low"])
def test_a_threshold_out_of_range(toy, threshold):
    with pytest.raises(errors.OptionError, match="threshold"):
        wrap(toy.generator)(X, threshold=threshold)


def test_a_threshold_without_a_predictor(toy, untouched):
    model = wrap(toy.generator)
    with (
        untouched(toy.generator),
        pytest.raises(
            errors.TrainingError, match="needs a predictor, but the model has none. Run retroexit.fit"
        ),
    ):
        model(X, threshold=0.1)


def test_a_guided_branch_without_a_bank(toy, untouched):
    model = wrap(toy.generator, guidance=True)
    with untouched(toy.generator), pytest.raises(errors.BankError, match="there is no guidance bank"):
        model(X, exit=1)


def test_a_tail_that_cannot_be_narrowed(toys, untouched):
    class Table(nn.Module):
        def forward(self, x):
            return x * {32: 1.0}[int(x.shape[1])]

    generator = chain(toys)
    generator.blocks[1].norm = Table()
    generator.blocks[1].a, generator.blocks[1].b = (
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 24, 3, padding=1),
    )
    with untouched(generator):
        model = wrap(generator)
    assert any("test_wrap_errors.py" in line and "int(x.shape[1])" in line for line in model.exits[0].pinned)


@pytest.mark.parametrize(
    "ask", [lambda m: m.exits, lambda m: m.split, lambda m: m.save("nowhere"), lambda m: m.image(X)]
)
def test_what_needs_a_recording_says_so(toy, ask):
    model = retroexit.wrap(toy.generator, attach_at=[1], scale=1 / 4)
    with pytest.raises(
        errors.NotRecordedError,
        match="has not been recorded yet, so there are no exits. Call the model once, or pass example_inputs",
    ):
        ask(model)
    assert "not recorded yet" in repr(model)


def test_a_failed_first_call_leaves_no_half_made_model(toy, untouched):
    model = retroexit.wrap(toy.generator, attach_at=[1], scale=1 / 4, min_channels=8)
    x = torch.rand(2, 9, 8, 8)
    with untouched(toy.generator), pytest.raises(errors.GeneratorError):
        model(x, exit=1)
    assert not model.is_recorded
    assert model(X, exit=1).shape == (2, 3, 16, 16)


def test_a_self_test_that_fails_can_be_switched_off(toys, untouched):
    class Counts(nn.Module):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            return x + 1e-6 * type(self).calls

    generator = chain(toys)
    generator.blocks[1].norm = Counts()
    with (
        untouched(generator),
        pytest.raises(errors.RecordingError, match="does not reproduce its output.*self_test=False"),
    ):
        wrap(generator)
    assert wrap(generator, self_test=False).is_recorded


def test_tensors_hidden_in_an_object(toys, untouched):
    class Box:
        def __init__(self, x):
            self.x = x

    class Opens(nn.Module):
        def forward(self, box):
            return F.relu(box.x)

    def forward(self, x):
        h = self.blocks[1](self.blocks[0](self.stem(x)))
        return self.rgb(self.blocks[2](self.opens(Box(h))))

    generator = chain(toys, forward)
    generator.opens = Opens()
    with untouched(generator):
        model = wrap(generator)
    assert "a Box object with tensors" in model.split.decoder.replayed


class _OneStage(nn.Module):
    def __init__(self, stage):
        super().__init__()
        self.stage, self.rgb = stage, nn.Conv2d(16, 3, 1)

    def forward(self, x):
        return self.rgb(nn.functional.interpolate(self.stage(x), scale_factor=2.0))


class _TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.one(x) + self.two(x)


def test_a_decoder_of_one_block_is_told_to_name_a_layer_inside():
    generator = _OneStage(_TwoLayers()).eval()
    example = (torch.randn(1, 16, 4, 4),)
    assert [stage.path for stage in retroexit.find_stages(generator, example)] == ["stage"]
    with pytest.raises(errors.AttachPointError, match=r"only stage: name .* attach_at=\['stage.one'\]"):
        retroexit.wrap(generator, [1], 1 / 2, example_inputs=example)
    assert len(retroexit.wrap(generator, ["stage.one"], 1 / 2, example_inputs=example).exits) == 2


def test_a_decoder_of_one_layer_is_told_to_take_its_input():
    generator = _OneStage(nn.Conv2d(16, 16, 3, padding=1)).eval()
    example = (torch.randn(1, 16, 4, 4),)
    assert [stage.path for stage in retroexit.find_stages(generator, example)] == ["stage"]
    with pytest.raises(errors.AttachPointError, match=r"one layer: take its input with tap='before'"):
        retroexit.wrap(generator, [1], 1 / 2, example_inputs=example)
    model = retroexit.wrap(generator, [1], 1 / 2, min_channels=2, example_inputs=example, tap="before")
    assert model(*example, exit=1).shape == (1, 3, 8, 8)
