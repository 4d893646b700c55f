"""Training of branches: settings that change no weight, averages, layouts, failures, TensorBoard."""

import math
import sys

import numpy as np
import pytest
import torch
from decoders import Distance, Noisy, Plain, checkpoint, fit, interrupted, latents, make, same, trained, wrap
from torch import nn

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import MissingExtraError, TrainingError
from retroexit.training.cache import IMAGE, FeatureCache, LiveFeatures
from retroexit.training.steps import Cropper
from retroexit.training.trainer import BranchTrainer, averaged

# Ways that change no weight.


def close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=1e-3, atol=1e-3), name


def test_without_a_cache_the_weights_are_those_of_cached_features(tmp_path):
    close(*(trained(fit(wrap(guidance=True), tmp_path / str(cache), crop=8, cache=cache)) for cache in (True, False)))
    assert (tmp_path / "True/cache").exists() and not (tmp_path / "False/cache").exists()


def test_the_layout_changes_no_result(tmp_path, monkeypatch):
    quick = trained(fit(wrap(make(Plain)), tmp_path / "quick", steps=8))
    monkeypatch.setattr(BranchTrainer, "begin", lambda trainer, step: trainer.branch.train())
    close(quick, trained(fit(wrap(make(Plain)), tmp_path / "plain", steps=8)))


def test_without_a_cache_noise_is_fresh_in_every_epoch():
    model = wrap(make(Noisy))
    live = LiveFeatures(model, Samples(latents(6)))
    one, other = live.read(IMAGE, [0, 1, 2]), live.read(IMAGE, [0, 1, 3])
    assert not torch.allclose(one[:2], other[:2], atol=1e-3)
    assert torch.equal(one, live.read(IMAGE, [0, 1, 2]))
    live.read(IMAGE, [0, 1, 2]).zero_()
    assert torch.equal(one, live.read(IMAGE, [0, 1, 2]))  # what is handed out is a copy


def test_windows_read_from_disk_are_those_cut_in_memory(tmp_path):
    model, samples = wrap(), Samples(latents(6))
    cache = FeatureCache.build(model, samples, tmp_path, progress=False)
    live = LiveFeatures(model, samples)
    cropper, rows = Cropper.for_maps(8, (16, 16), [(8, 8)]), [4, 1, 5]
    offsets = cropper.offsets(3, np.random.default_rng(0))
    for name in (IMAGE, model.split.cuts[0].feature.name):
        read = cache.read(name, rows, crop=lambda size: cropper.windows(offsets, size))
        assert torch.equal(read, cropper(cache.read(name, rows), offsets))
        fresh = live.read(name, rows, crop=lambda size: cropper.windows(offsets, size))
        assert torch.allclose(read, fresh, atol=1e-5)


# The average.


def test_the_average_is_that_of_a_loop():
    parameter, mean = nn.Parameter(torch.zeros(3)), np.zeros(3)
    average = averaged([parameter], 0.9)
    for step in range(200):
        with torch.no_grad():
            parameter += torch.tensor([1.0, -step, 0.5])
        average.update_parameters(nn.ParameterList([parameter]))
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * parameter.detach().double().numpy()
    (value,) = average.module.parameters()
    assert np.allclose(value.detach().numpy(), mean, rtol=1e-4)


def test_the_average_is_saved_as_the_model_and_the_weights_in_the_checkpoint(tmp_path):
    model = fit(wrap(), tmp_path, steps=8, ema=0.9)
    last = fit(wrap(), tmp_path / "last", steps=8, ema=0.0)
    tensors, step = checkpoint(tmp_path, 1)
    assert step == 8
    names = [name for name, p in model.branches[0].named_parameters() if p.requires_grad]
    for number, name in enumerate(names):
        assert torch.equal(model.branches[0].get_parameter(name), tensors[f"ema.{number}"])
        assert torch.equal(tensors[f"branch.{name}"], last.branches[0].get_parameter(name))
    assert any(not torch.equal(tensors[f"ema.{i}"], tensors[f"branch.{n}"]) for i, n in enumerate(names))
    loaded = retroexit.load(tmp_path, make(), example_inputs=(latents(2),), adapter=False)
    same(dict(loaded.branches.state_dict()), dict(model.branches.state_dict()))


# Settings of the optimiser.


def test_gradients_are_clipped_to_the_given_norm(tmp_path, monkeypatch):
    norms = []
    real = torch.optim.Adam.step

    def step(optimizer, *args):
        if len(optimizer.param_groups[0]["params"]) > 5 and optimizer.defaults["betas"] == (0.9, 0.99):
            gradients = [p.grad.flatten() for p in optimizer.param_groups[0]["params"] if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))
        return real(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    fit(wrap(), tmp_path / "free", clip=None)
    free, norms[:] = list(norms), []
    fit(wrap(), tmp_path / "tight", clip=1e-3)
    assert min(free) > 1e-2 and len(free) == len(norms) == 8
    assert norms == [pytest.approx(1e-3, rel=1e-2)] * 8


# The layout of weights.


class Viewing(nn.Module):
    """Views a map as rows, as code does that counts on channels first."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        return torch.relu(x.view(len(x), -1)).view_as(x)


@pytest.mark.parametrize("views", [False, True])
def test_weights_are_channels_last_in_training_where_the_code_allows_it(tmp_path, views):
    generator = make(Plain)
    if views:
        generator.stages[1] = Viewing()
    model = wrap(generator, stages=("stages.0", "stages.1", "stages.2"))
    layouts = []

    def note_layout(branch, _):
        if branch.training:
            maps = [p for p in branch.parameters() if p.dim() == 4]
            layouts.append(all(p.is_contiguous(memory_format=torch.channels_last) for p in maps))

    model.branches[0].register_forward_pre_hook(note_layout)
    fit(model, tmp_path)
    assert layouts == [True] + [not views] * 4  # the first call is a trial
    assert all(p.is_contiguous() for p in model.branches.parameters())


def test_trying_a_layout_leaves_no_trace_in_the_statistics(tmp_path):
    model = wrap()
    seen = []
    norm = next(m for m in model.branches[0].modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda m, _: seen.append(m.running_mean.clone()) if m.training else None)
    fit(model, tmp_path, steps=2)
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


# Numbers that are not finite.


@pytest.mark.parametrize(
    ("kind", "given", "largest"), [("copy", {}, 0.004), ("subpixel", {}, 0.002), ("subpixel", {"lr": 0.01}, 0.01)]
)
def test_the_learning_rate_is_that_of_the_kind_unless_one_is_given(kind, given, largest, tmp_path, monkeypatch):
    real, rates = BranchTrainer.advance, []

    def advance(trainer, step):
        parts = real(trainer, step)
        rates.extend(group["lr"] for group in trainer.optimizer.param_groups)
        return parts

    monkeypatch.setattr(BranchTrainer, "advance", advance)
    options = {"branch": kind, "scale": None, "macs": 0.6} if kind == "subpixel" else {}
    fit(wrap(attach_at=[1], **options), tmp_path, steps=20, **given)
    assert max(rates) == pytest.approx(largest)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_training_with_the_last_good_checkpoint(tmp_path, broken):
    class Broken(Distance):
        calls = 0

        def compare(self, a, b):
            self.calls += 1
            distance = super().compare(a, b)
            if self.calls != 14:  # the first two calls are trials, then two calls in each step
                return distance
            return distance * float("inf") if broken == "loss" else distance + (0 * a.sum((1, 2, 3))).sqrt()

    model = wrap()
    problem = "loss of exit 2 became inf" if broken == "loss" else "gradient of the loss of exit 2 became nan"
    message = f"the {problem} at step 5: .*exit2.safetensors. Use another folder, and lr below 0.004"
    with pytest.raises(TrainingError, match=message):
        fit(model, tmp_path, metric=Broken(), steps=9)
    for number, branch in enumerate(model.branches, 1):
        tensors, step = checkpoint(tmp_path, number)
        assert step == 3 and not branch.training
        for place, (name, parameter) in enumerate(branch.named_parameters()):
            assert torch.equal(parameter, tensors[f"ema.{place}"]), name


def test_a_checkpoint_with_numbers_that_are_not_finite_is_never_written(tmp_path, monkeypatch):
    real = BranchTrainer.advance

    def advance(trainer, step):
        parts = real(trainer, step)
        trainer.trained[0].detach().mul_(math.nan if trainer.step == 3 else 1)
        return parts

    monkeypatch.setattr(BranchTrainer, "advance", advance)
    with pytest.raises(TrainingError, match="the tensor branch..* of exit 1 became nan at step 3"):
        fit(wrap(), tmp_path)
    assert checkpoint(tmp_path, 1)[1] == 0


# TensorBoard.


def test_tensorboard_shows_losses_and_images_once_after_an_interruption(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"steps": 44, "checkpoint_every": 10, "tensorboard": True}
    with interrupted(BranchTrainer, "advance", 60):
        fit(wrap(), tmp_path, **settings)
    fit(wrap(), tmp_path, **settings)
    shown = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert {"exit 1/l1", "exit 1/quality", "exit 2/l1", "exit 2/quality"} == set(shown.Tags()["scalars"])
    assert [event.step for event in shown.Scalars("exit 2/l1")] == [19, 39]
    images = shown.Images("exit 1, backbone below")
    assert (images[0].height, images[0].width) == (2 * 16, 3 * 16)


def test_without_tensorboard_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"tensorboard is missing. Run: pip install 'retroexit\[train\]'"):
        fit(wrap(), tmp_path, tensorboard=True)
    assert not (tmp_path / "fit.json").exists()
