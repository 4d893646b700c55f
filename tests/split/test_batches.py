"""Samples with several rows each: frames folded into the batch."""

import pytest
import torch
from torch import nn

import retroexit
from retroexit import errors
from retroexit.core.samples import Samples
from retroexit.errors import BranchError, InputMismatchError, TrainingError
from retroexit.split.rows import are_grouped, group, rows_per_sample
from retroexit.training.cache import FeatureCache

_FRAMES = 3


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.space = nn.Conv2d(16, 16, 3, padding=1)
        self.time = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x, batch, frames_first):
        h = torch.relu(self.space(x))
        rows = (-1, batch) if frames_first else (batch, -1)
        pooled = h.mean((2, 3)).unflatten(0, rows)
        pooled = pooled.transpose(0, 1) if frames_first else pooled
        mixed = self.time(pooled.transpose(1, 2)).transpose(1, 2)
        mixed = mixed.transpose(0, 1) if frames_first else mixed
        return h + mixed.flatten(0, 1)[:, :, None, None]


class _Video(nn.Module):
    """Renders ``(N, 4, T, H, W)`` frame by frame, and mixes the frames of a sample over time."""

    def __init__(self, frames_first, folded_output):
        super().__init__()
        self.stem, self.rgb = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 3, 1)
        self.blocks = nn.ModuleList(_Block() for _ in range(3))
        self.frames_first, self.folded_output = frames_first, folded_output

    def forward(self, z):
        order = (2, 0, 1, 3, 4) if self.frames_first else (0, 2, 1, 3, 4)
        x = self.stem(z.permute(order).flatten(0, 1))
        for block in self.blocks:
            x = block(x, z.shape[0], self.frames_first)
        image = self.rgb(x)
        if self.folded_output:
            return image
        rows = (-1, z.shape[0]) if self.frames_first else (z.shape[0], -1)
        frames = image.unflatten(0, rows)
        return frames.permute(1, 2, 0, 3, 4) if self.frames_first else frames.transpose(1, 2)


class _Difficulty(nn.Module):
    def forward(self, difficulty):
        return difficulty[:, None] - torch.arange(2.0)


def _model(frames_first=False, folded_output=False, batch=1):
    torch.manual_seed(0)
    generator = _Video(frames_first, folded_output).eval()
    examples = (torch.randn(batch, 4, _FRAMES, 4, 4),)
    model = retroexit.wrap(generator, [1, 2], 1 / 2, min_channels=4, example_inputs=examples, adapter=False)
    model.predictor = _Difficulty()
    model.router.predictor_inputs = lambda z: z[:, 0, 0, 0, 0]
    return model


def _latents():
    z = torch.randn(4, 4, _FRAMES, 4, 4)
    z[:, 0, 0, 0, 0] = torch.tensor([1.0, 0.0, 5.0, 0.2])
    return z, [2, 1, 3, 1]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("folded_output", [False, True])
def test_samples_with_several_rows_leave_at_different_exits_as_each_does_alone(folded_output, batch):
    model = _model(folded_output=folded_output, batch=batch)
    assert model.split.mixes
    assert [model.split.batched[cut.feature] for cut in model.split.cuts] == [_FRAMES, _FRAMES]
    z, exits = _latents()
    with torch.no_grad():
        batch, taken = model.routed(z, threshold=0.5)
        alone = torch.cat([model(one[None], exit=k) for one, k in zip(z, exits, strict=True)])
    assert taken.tolist() == exits
    assert batch.shape == alone.shape and torch.allclose(batch, alone, atol=1e-5)


@pytest.mark.parametrize("folded_output", [False, True])
def test_a_subpixel_branch_renders_frames_in_the_place_where_the_generator_has_them(folded_output):
    generator = _Video(False, folded_output).eval()
    model = retroexit.wrap(generator, [1], example_inputs=(torch.randn(2, 4, _FRAMES, 4, 4),), branch="subpixel")
    output = model.branches[0].output
    for z in (torch.randn(3, 4, _FRAMES, 6, 4), torch.randn(2, 4, 5, 4, 4)):
        with torch.no_grad():
            image = generator(z)
            assert torch.equal(output.place(output.image_of(image), [z]), image)
            assert model(z, exit=1).shape == image.shape


def test_a_subpixel_branch_is_refused_where_frames_come_first_and_have_an_axis():
    with pytest.raises(BranchError, match=r"axes of the feature, got \(1, 3, 3, 4, 4\) for \(3, 16, 4, 4\)"):
        retroexit.wrap(_Video(True, False).eval(), example_inputs=(torch.randn(1, 4, _FRAMES, 4, 4),))


class _Folded(nn.Module):
    """Takes the frames of all samples as rows, and how many belong to one, as the decoder of a video diffusion does."""

    def __init__(self):
        super().__init__()
        self.stem, self.rgb = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 3, 1)
        self.blocks = nn.ModuleList(_Block() for _ in range(3))

    def forward(self, x, is_image, num_frames):
        h = self.stem(x)
        for block in self.blocks:
            h = nn.functional.interpolate(block(h, len(x) // num_frames, False), scale_factor=2.0)
        return torch.tanh(self.rgb(h) + is_image.mean())


@pytest.mark.parametrize("settings", [{}, {"scale": 1 / 2, "min_channels": 4}])
def test_frames_that_are_rows_of_the_input_render_early_and_other_numbers_are_refused(settings, tmp_path):
    generator, named = _Folded().eval(), {"num_frames": _FRAMES}

    def inputs(samples, side=4, frames=_FRAMES):
        return torch.randn(samples * frames, 4, side, side), torch.zeros(samples, frames)

    model = retroexit.wrap(generator, [1], example_inputs=inputs(2), example_kwargs=named, **settings)
    with torch.no_grad():
        for side in (4, 6):
            args = inputs(2, side)
            assert torch.equal(model(*args, **named), generator(*args, **named))
            assert model(*args, exit=1, **named).shape == generator(*args, **named).shape
    for args, kwargs, message in (
        (inputs(3), named, "batch size must be 6, .*, got 9. Wrap again"),
        (inputs(2, frames=4), {"num_frames": 4}, "num_frames must be 3 as in the recording, got 4"),
    ):
        with pytest.raises(InputMismatchError, match=message):
            model(*args, exit=1, **kwargs)
    with pytest.raises(TrainingError, match="_Folded must take any batch size, but its forward holds for 6 only"):
        samples = [(torch.randn(4, 4, 4), torch.zeros(_FRAMES), _FRAMES)] * 4
        retroexit.fit(model, samples, tmp_path, metric="ms-ssim", steps=1, progress=False)


def test_samples_whose_frames_come_first_all_leave_at_the_deepest_exit():
    model = _model(frames_first=True)
    assert model.split.any_batch
    assert not model.split.mixes
    z, _ = _latents()
    with torch.no_grad():
        batch, taken = model.routed(z[[0, 1, 3]], threshold=0.5)
        alone = torch.cat([model(one[None], exit=2) for one in z[[0, 1, 3]]])
    assert taken.tolist() == [2, 2, 2]
    assert torch.allclose(batch, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("frames_first", "folded_output", "is_refused"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
)
def test_samples_of_several_rows_are_finished_by_number(frames_first, folded_output, is_refused):
    model, (z, exits) = _model(frames_first, folded_output), _latents()
    with torch.no_grad():
        expected, draft = model(z), model.draft(z, threshold=0.5)
        assert draft.exits.tolist() == ([max(exits)] * 4 if frames_first else exits)
        assert torch.allclose(draft.finish(), expected, atol=1e-5)
        if is_refused:
            with pytest.raises(errors.OptionError, match=r"rows must be None for this generator, .* got 2 of 4"):
                draft.finish([3, 0])
            return
        rows = group(torch.tensor([3, 0]), _FRAMES) if folded_output else [3, 0]
        assert torch.allclose(draft.finish([3, 0]), expected[rows], atol=1e-5)


def test_predictions_of_frames_are_combined_for_their_sample():
    model = _model()
    model.router.predictor_inputs = None
    model.predictor = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)).eval()
    z, _ = _latents()
    assert model.predict(z).shape == (4, 2)
    assert torch.allclose(model.predict(z)[1:2], model.predict(z[1:2]), atol=1e-5)


def test_samples_of_several_rows_are_refused_by_the_cache(tmp_path):
    model = _model()
    samples = Samples([(z[None],) for z in _latents()[0]])
    with pytest.raises(TrainingError, match=r"several rows per sample.*Wrap the module that renders one"):
        FeatureCache.build(model, samples, tmp_path)


def test_rows_follow_from_shapes_at_two_batch_sizes():
    small = {"plain": (2, 8), "folded": (6, 8), "shared": (5, 8), "second": (4, 2, 8), "odd": (3, 8)}
    large = {"plain": (3, 8), "folded": (9, 8), "shared": (5, 8), "second": (4, 3, 8), "odd": (5, 8)}
    assert rows_per_sample(small, large, 2) == {"plain": 1, "folded": 3, "second": 0, "odd": 0}


def test_rows_that_are_all_alike_are_not_taken_for_grouped():
    ordered = torch.arange(6.0)[:, None]
    assert are_grouped(ordered[:4], ordered)
    assert not are_grouped(ordered[:4].flip(0), ordered)
    assert not are_grouped(torch.ones(4, 1), torch.ones(6, 1))
    assert group(torch.tensor([2, 0]), 2).tolist() == [4, 5, 0, 1]
