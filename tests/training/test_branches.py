"""Ways of training branches that change no weight, and those that do; what stops a training."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.core.files import read_tensors
from retroexit.core.samples import Samples
from retroexit.training.cache import IMAGE, FeatureCache, LiveFeatures
from retroexit.training.settings import FitSettings
from retroexit.training.steps import Cropper
from retroexit.training.trainer import BranchTrainer, averaged, learning_rate

# Ways that change no weight.


@pytest.mark.parametrize("kind", ["Decoder", "Noisy"])
def test_side_by_side_or_one_by_one_branches_get_the_same_weights(
    decoders: ModuleType, tmp_path: Path, kind: str
) -> None:
    made = [
        decoders.fit(
            decoders.wrap(decoders.make(getattr(decoders, kind)), guidance=True),
            tmp_path / str(together),
            crop=8 if kind == "Decoder" else None,
            together=together,
        )
        for together in (True, False)
    ]
    decoders.same(*map(decoders.trained, made))


def test_side_by_side_the_backbone_runs_once_per_step(decoders: ModuleType, tmp_path: Path) -> None:
    passes: dict[bool, int] = {}
    for together in (True, False):
        generator, counted = decoders.make(), []
        model = decoders.wrap(generator)
        generator.stages[2].register_forward_hook(lambda *_, counted=counted: counted.append(1))
        decoders.fit(model, tmp_path / str(together), together=together, cache=False, steps=20)
        passes[together] = len(counted)
    assert passes[False] - passes[True] == 20


def test_without_a_cache_the_weights_are_those_of_cached_features(
    decoders: ModuleType, tmp_path: Path
) -> None:
    cached, live = (
        decoders.trained(
            decoders.fit(decoders.wrap(guidance=True), tmp_path / str(cache), crop=8, cache=cache)
        )
        for cache in (True, False)
    )
    assert not (tmp_path / "False" / "cache").exists()
    assert cached.keys() == live.keys()
    for name, value in cached.items():
        assert torch.allclose(value, live[name], rtol=1e-3, atol=1e-3), name


def test_without_a_cache_a_fit_resumes_to_the_same_weights(decoders: ModuleType, tmp_path: Path) -> None:
    make = lambda: decoders.wrap(decoders.make(decoders.Noisy))  # noqa: E731
    whole = decoders.fit(make(), tmp_path / "whole", cache=False)
    with decoders.interrupted(BranchTrainer, "advance", 7):
        decoders.fit(make(), tmp_path / "parts", cache=False)
    parts = decoders.fit(make(), tmp_path / "parts", cache=False)
    decoders.same(decoders.trained(whole), decoders.trained(parts))


def test_without_a_cache_noise_is_fresh_in_every_epoch(decoders: ModuleType) -> None:
    model = decoders.wrap(decoders.make(decoders.Noisy))
    live = LiveFeatures(model, Samples(decoders.latents(6)))
    one, other = live.read(IMAGE, [0, 1, 2]), live.read(IMAGE, [0, 1, 3])
    assert not torch.allclose(one[:2], other[:2], atol=1e-3)
    assert torch.equal(one, live.read(IMAGE, [0, 1, 2]))
    live.read(IMAGE, [0, 1, 2]).zero_()
    assert torch.equal(one, live.read(IMAGE, [0, 1, 2]))  # what is handed out is a copy


def test_windows_read_from_disk_are_those_cut_in_memory(decoders: ModuleType, tmp_path: Path) -> None:
    model, samples = decoders.wrap(), Samples(decoders.latents(6))
    cache = FeatureCache.build(model, samples, tmp_path, progress=False)
    live = LiveFeatures(model, samples)
    cropper, rows = Cropper.for_maps(8, (16, 16), [(8, 8)]), [4, 1, 5]
    offsets = cropper.offsets(3, np.random.default_rng(0))
    for name in (IMAGE, model.split.cuts[0].feature.name):
        read = cache.read(name, rows, crop=lambda size: cropper.windows(offsets, size))
        assert torch.equal(read, cropper(cache.read(name, rows), offsets))
        fresh = live.read(name, rows, crop=lambda size: cropper.windows(offsets, size))
        assert torch.allclose(read, fresh, atol=1e-5)


@pytest.mark.parametrize("setting", [{"together": False}, {"checkpoint_every": 2}])
def test_a_fit_may_go_on_in_another_way(
    decoders: ModuleType, tmp_path: Path, setting: dict[str, Any]
) -> None:
    whole = decoders.fit(decoders.wrap(), tmp_path / "whole")
    with decoders.interrupted(BranchTrainer, "advance", 7):
        decoders.fit(decoders.wrap(), tmp_path / "parts")
    decoders.same(
        decoders.trained(whole),
        decoders.trained(decoders.fit(decoders.wrap(), tmp_path / "parts", **setting)),
    )


# The average.


def test_the_average_is_that_of_a_loop(decoders: ModuleType) -> None:
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


def test_what_is_saved_is_the_average_and_what_goes_on_are_the_weights(
    decoders: ModuleType, tmp_path: Path
) -> None:
    model = decoders.fit(decoders.wrap(), tmp_path, steps=8, ema=0.9)
    last = decoders.fit(decoders.wrap(), tmp_path / "last", steps=8, ema=0.0)
    tensors, about = read_tensors(tmp_path / "branches/exit1.safetensors")
    assert about["step"] == 8
    names = [name for name, p in model.branches[0].named_parameters() if p.requires_grad]
    for number, name in enumerate(names):
        own, saved = model.branches[0].get_parameter(name), tensors[f"ema.{number}"]
        assert torch.equal(own, saved)
        assert torch.equal(tensors[f"branch.{name}"], last.branches[0].get_parameter(name))
    assert any(not torch.equal(tensors[f"ema.{i}"], tensors[f"branch.{n}"]) for i, n in enumerate(names))
    loaded = retroexit.load(tmp_path, decoders.make(), example_inputs=(decoders.latents(2),), adapter=False)
    decoders.same(dict(loaded.branches.state_dict()), dict(model.branches.state_dict()))


# Settings of the optimiser.


def test_gradients_are_clipped_to_the_norm_asked(
    decoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    real = torch.optim.Adam.step

    def step(optimizer: torch.optim.Adam, *args: Any) -> Any:
        if len(optimizer.param_groups[0]["params"]) > 5 and optimizer.defaults["betas"] == (0.9, 0.99):
            gradients = [p.grad.flatten() for p in optimizer.param_groups[0]["params"] if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))
        return real(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    decoders.fit(decoders.wrap(), tmp_path / "free", clip=None)
    free, norms[:] = list(norms), []
    decoders.fit(decoders.wrap(), tmp_path / "tight", clip=1e-3)
    assert min(free) > 1e-2 and len(free) == len(norms) == 8
    assert norms == [pytest.approx(1e-3, rel=1e-2)] * 8


def test_a_constant_schedule_stays_after_the_warm_up() -> None:
    rates = [learning_rate(step, FitSettings(steps=100, lr=2.0, schedule="constant")) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and set(rates[10:]) == {2.0}


# The layout of weights.


class Viewing(nn.Module):
    """Views a map as rows, as code does that counts on channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.relu(x.view(len(x), -1)).view_as(x)


@pytest.mark.parametrize("views", [False, True])
def test_weights_are_channels_last_in_training_where_the_code_allows_it(
    decoders: ModuleType, tmp_path: Path, views: bool
) -> None:
    generator = decoders.make(decoders.Plain)
    if views:
        generator.stages[1] = Viewing()
    model = decoders.wrap(generator, stages=("stages.0", "stages.1", "stages.2"))
    layouts: list[bool] = []

    def look(branch: nn.Module, _: Any) -> None:
        if branch.training:
            maps = [p for p in branch.parameters() if p.dim() == 4]
            layouts.append(all(p.is_contiguous(memory_format=torch.channels_last) for p in maps))

    model.branches[0].register_forward_pre_hook(look)
    decoders.fit(model, tmp_path)
    assert layouts == [True] + [not views] * 4  # the first call tries it
    assert all(p.is_contiguous() for p in model.branches.parameters())


def test_the_layout_changes_no_result(
    decoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = lambda: decoders.wrap(decoders.make(decoders.Plain))  # noqa: E731
    quick = decoders.trained(decoders.fit(make(), tmp_path / "quick", steps=8))
    monkeypatch.setattr(BranchTrainer, "begin", lambda trainer, step: trainer.branch.train())
    plain = decoders.trained(decoders.fit(make(), tmp_path / "plain", steps=8))
    for name, value in plain.items():
        assert torch.allclose(value, quick[name], rtol=1e-3, atol=1e-4), name


def test_trying_a_layout_leaves_no_trace_in_the_statistics(decoders: ModuleType, tmp_path: Path) -> None:
    model = decoders.wrap()
    seen: list[Tensor] = []
    norm = next(m for m in model.branches[0].modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda m, _: seen.append(m.running_mean.clone()) if m.training else None)
    decoders.fit(model, tmp_path, steps=2)
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
