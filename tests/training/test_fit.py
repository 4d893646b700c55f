"""Fitting from generator inputs alone, and what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import CheckpointError, OptionError, TrainingError
from retroexit.training import fit as fitting
from retroexit.training.cache import FeatureCache
from retroexit.training.steps import Step, Steps
from retroexit.training.trainer import BranchTrainer

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


def test_bank_branches_and_predictor_are_made_in_this_order(
    decoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noting(owner: Any, name: str, label: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            done.append(label(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    noting(fitting, "build_bank", lambda *_: "bank")
    noting(fitting, "train_branches", lambda trainers, *_: f"{len(trainers)} branches")
    noting(fitting, "fit_predictor", lambda *_: "predictor")
    model = decoders.fit(decoders.wrap(guidance=True), tmp_path)
    assert done == ["bank", "2 branches", "predictor"]
    assert model.bank is not None and model.predictor is not None
    assert model(decoders.latents(3), threshold=0.5).shape == (3, 3, 16, 16)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_fitting_leaves_no_trace_on_the_generator(
    decoders: ModuleType, tmp_path: Path, untouched: Untouched, is_frozen: bool
) -> None:
    generator = decoders.make()
    generator.requires_grad_(not is_frozen)
    model = decoders.wrap(generator)
    before = {name: value.clone() for name, value in model.branches.state_dict().items()}
    with untouched(generator):
        decoders.fit(model, tmp_path)
    changed = [
        name for name, value in model.branches.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert any("rgb" in name for name in changed)
    assert all(not module.training for part in (generator, *model.branches) for module in part.modules())


def test_fitting_works_where_gradients_are_switched_off(decoders: ModuleType, tmp_path: Path) -> None:
    with torch.no_grad():
        model = decoders.fit(decoders.wrap(), tmp_path / "off")
    usual = decoders.fit(decoders.wrap(), tmp_path / "on")
    assert _equal(decoders.trained(model), decoders.trained(usual))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_loss_goes_down(
    decoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bfloat16: bool
) -> None:
    history: dict[int, list[dict[str, float]]] = {}
    real = BranchTrainer.advance

    def advance(trainer: BranchTrainer, step: Step) -> dict[str, float]:
        parts = real(trainer, step)
        history.setdefault(trainer.index, []).append(parts)
        return parts

    monkeypatch.setattr(BranchTrainer, "advance", advance)
    model = decoders.fit(
        decoders.wrap(), tmp_path, inputs=decoders.latents(24), steps=40, batch=8, bfloat16=bfloat16
    )
    assert sorted(history) == [0, 1]
    for parts in history.values():
        assert len(parts) == 40
        for name in ("l1", "quality"):
            values = [part[name] for part in parts]
            assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])
    losses = np.load(tmp_path / "losses.npy")
    assert losses.shape == (24, 2)
    assert model.about["metric"]["name"] == "distance"
    assert model.about["image_size"] == [16, 16]


def test_saved_losses_are_those_of_the_trained_exits(decoders: ModuleType, tmp_path: Path) -> None:
    model = decoders.fit(decoders.wrap(), tmp_path)
    losses, metric = np.load(tmp_path / "losses.npy"), decoders.Distance()
    for row, z in enumerate(decoders.latents(10)):
        for k in (1, 2):
            with torch.no_grad():
                loss = metric(model(z[None], exit=k), model(z[None]))
            assert losses[row, k - 1] == pytest.approx(float(loss), rel=1e-4)


def test_held_out_samples_are_not_trained_on(
    decoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    held: list[int] = []
    real_at, real_predictor = Steps.at, fitting.fit_predictor

    def at(steps: Steps, number: int) -> Step:
        step = real_at(steps, number)
        seen.update(step.rows)
        return step

    def predictor(*args: Any, **kwargs: Any) -> float | None:
        held.extend(args[4])
        return real_predictor(*args, **kwargs)

    monkeypatch.setattr(Steps, "at", at)
    monkeypatch.setattr(fitting, "fit_predictor", predictor)
    decoders.fit(decoders.wrap(), tmp_path, held_out=0.3)
    assert len(held) == 3
    assert sorted({*seen, *held}) == list(range(10)) and not seen & set(held)


def test_without_held_out_samples_there_is_no_predictor_error(decoders: ModuleType, tmp_path: Path) -> None:
    model = decoders.fit(decoders.wrap(), tmp_path, held_out=0.0)
    assert model.about["predictor_error"] is None
    assert json.loads((tmp_path / "model.json").read_text())["about"]["predictor_error"] is None


class _Constants(nn.Module):
    """Maps of one number per sample: who a guide comes from can be read off it."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(1, 1, 1, bias=False) for _ in range(3)])
        self.rgb = nn.Conv2d(1, 3, 1, bias=False)
        for conv in (*self.stages, self.rgb):
            nn.init.ones_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.rgb(x)


@pytest.mark.parametrize("thin", ["fps", "none"])
def test_a_guide_in_training_never_comes_from_the_sample_itself(
    decoders: ModuleType, tmp_path: Path, thin: str
) -> None:
    inputs = torch.arange(8.0)[:, None, None, None].expand(8, 1, 4, 4) / 8
    guidance = retroexit.Guidance(thin=thin, size=8, patch=(2, 2))
    stages = ("stages.0", "stages.1", "stages.2")
    model = decoders.wrap(
        _Constants().eval(), attach_at=[1], stages=stages, guidance=guidance, example_inputs=(inputs[:2],)
    )
    pairs: list[tuple[float, float]] = []
    model.branches[0].register_forward_pre_hook(
        lambda branch, args, kwargs: pairs.extend(
            zip(args[0][:, 0, 0, 0].tolist(), kwargs["guide"][:, 0, 0, 0].tolist(), strict=True)
        ),
        with_kwargs=True,
    )
    decoders.fit(model, tmp_path, inputs=inputs, steps=6)
    assert {own for own, _ in pairs} == {i / 8 for i in range(8)}
    assert [own for own, guide in pairs if abs(own - guide) < 1e-3] == []
    guide = model.bank.guide(inputs[:1])  # a finished model may find anything, the sample itself included
    assert float(guide.mean()) == pytest.approx(0, abs=1e-3)


def test_features_keys_values_and_images_are_of_one_draw(decoders: ModuleType, tmp_path: Path) -> None:
    generator = decoders.make(decoders.Noisy)
    inputs, maps = decoders.latents(10), []
    generator.stages[1].register_forward_hook(lambda module, args, output: maps.append(output))
    model = decoders.wrap(generator, guidance=retroexit.Guidance(value_after=2))
    decoders.fit(model, tmp_path, seed=70)
    for first in (0, 4, 8):
        torch.manual_seed(70 + first)
        with torch.no_grad():
            images = generator(inputs[first : first + 4])
        rows = slice(first, first + 4)
        assert torch.equal(images, torch.from_numpy(np.load(tmp_path / "cache/backbone-image.npy")[rows]))
        assert torch.equal(maps[-1], torch.from_numpy(np.load(tmp_path / "cache/guidance-value.npy")[rows]))
    wanted = {maps[-1][1].half().float().flatten(1).T[i].numpy().tobytes() for i in range(256)}
    assert model.bank is not None
    own = np.asarray(model.bank.values)[model.bank.source.numpy() == 9].astype("float32")
    assert len(own) > 0
    assert {value.tobytes() for value in own.reshape(-1, own.shape[-1])} <= wanted


def test_noise_that_a_whole_batch_shares_is_refused(decoders: ModuleType, tmp_path: Path) -> None:
    model = decoders.wrap(decoders.make(decoders.SharedNoise))
    with pytest.raises(TrainingError, match="one value for all samples of a batch.*Draw noise per sample"):
        decoders.fit(model, tmp_path)


def test_what_a_branch_writes_into_is_a_copy(decoders: ModuleType, tmp_path: Path) -> None:
    model = decoders.wrap(decoders.make(decoders.SharedNoise))
    cache = FeatureCache.build(model, Samples(decoders.latents(4)), tmp_path, batch=4, progress=False)
    names = [node.name for node in model.split.cuts[0].crossing]
    assert [cache.is_per_sample(name) for name in names] == [True, False]
    for name in names:
        before = cache.read(name, [0, 1]).clone()
        cache.read(name, [0, 1]).zero_()
        assert torch.equal(cache.read(name, [0, 1]), before)
        assert before.any()


def test_a_module_called_image_is_not_mistaken_for_the_image(decoders: ModuleType, tmp_path: Path) -> None:
    class Skip(decoders.Decoder):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Conv2d(4, 3, 1)

        def forward(self, z: Tensor) -> Tensor:
            h, image = self.stem(z), self.image(z)
            for stage in self.stages:
                h = stage(h)
            return torch.tanh(self.rgb(h) + nn.functional.interpolate(image, scale_factor=4.0))

    generator = decoders.make(Skip)
    model = decoders.fit(decoders.wrap(generator), tmp_path)
    assert "image" in {node.name for node in model.split.cuts[0].crossing}
    stored = torch.from_numpy(np.load(tmp_path / "cache/backbone-image.npy"))
    with torch.no_grad():
        assert torch.allclose(stored, generator(decoders.latents(10)), atol=1e-6)


def test_a_forward_that_fixes_the_batch_size_is_refused(decoders: ModuleType, tmp_path: Path) -> None:
    class Fixed(decoders.Decoder):  # type: ignore[name-defined, misc]
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z.reshape(2, 4, 4, 4))

    model = decoders.wrap(decoders.make(Fixed))
    with pytest.raises(TrainingError, match="must take any batch size, but its forward holds for 2 only"):
        decoders.fit(model, tmp_path, cache_batch=2)
    assert not (tmp_path / "fit.json").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\), got 1.0"),
        ({"held_out": 0.99}, "held_out=0.99 of 10 samples leaves none"),
        ({"crop": 0}, "crop must be >= 1, got 0"),
        ({"crop": 6}, "crop must be a multiple of 4, got 6"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"lr": float("nan")}, "lr must be finite and > 0, got nan"),
        ({"losses": {"l1": 0.0, "quality": 0.0}}, "one of them > 0, got {'l1': 0.0, 'quality': 0.0}"),
        ({"losses": {"l1": 1.0, "quality": -1.0}}, "losses must have weights >= 0 by name"),
        ({"losses": {}}, "one of them > 0, got {}"),
        ({"losses": ["l1"]}, r"one of them > 0, got \['l1'\]"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"clip": 0.0}, "clip must be finite and > 0, got 0.0"),
        ({"features": -1}, "features must be finite and >= 0, got -1"),
        ({"schedule": "cosin"}, "no schedule 'cosin'; closest: 'cosine'"),
        ({"stepz": 3}, "no setting 'stepz' of a fit; closest: 'steps'"),
    ],
)
def test_settings_out_of_range_are_refused_and_can_be_put_right(
    decoders: ModuleType, tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    model = decoders.wrap(attach_at=[1], tap="before")
    with pytest.raises(OptionError, match=message):
        decoders.fit(model, tmp_path, **setting)
    assert not (tmp_path / "fit.json").exists()


def test_a_window_too_small_for_the_metric_is_refused_before_training(
    decoders: ModuleType, tmp_path: Path
) -> None:
    model = decoders.wrap()
    with pytest.raises(OptionError, match="ms-ssim must have at least 11x11 pixels, got 8x8"):
        retroexit.fit(
            model,
            decoders.latents(10),
            tmp_path,
            metric="ms-ssim",
            progress=False,
            crop=8,
            **decoders.SETTINGS,
        )
    retroexit.fit(
        model, decoders.latents(10), tmp_path, metric="ms-ssim", progress=False, crop=12, **decoders.SETTINGS
    )
    assert json.loads((tmp_path / "fit.json").read_text())["crop"] == 12


def test_a_loss_that_is_not_finite_stops_training_with_its_step(decoders: ModuleType, tmp_path: Path) -> None:
    class Broken(decoders.Distance):  # type: ignore[name-defined, misc]
        calls = 0

        def compare(self, a: Tensor, b: Tensor) -> Tensor:
            self.calls += 1
            return super().compare(a, b) * (float("nan") if self.calls == 6 else 1)

    with pytest.raises(
        TrainingError, match="the loss of exit 1 became nan at step 2: .*Use another folder, and lr below"
    ):
        retroexit.fit(
            decoders.wrap(),
            decoders.latents(10),
            tmp_path,
            metric=Broken(),
            progress=False,
            **decoders.SETTINGS,
        )


@pytest.mark.parametrize("guidance", [None, True])
def test_a_fit_of_something_else_is_refused_by_name(
    decoders: ModuleType, tmp_path: Path, guidance: bool | None
) -> None:
    decoders.fit(decoders.wrap(guidance=guidance), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"other settings: lr was 0.004, is 0.1, steps was 4, is 5\. Use another folder"
    ):
        decoders.fit(decoders.wrap(guidance=guidance), tmp_path, steps=5, lr=0.1)
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        decoders.fit(decoders.wrap(guidance=guidance), tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="wrap.init was scratch, is inherit"):
        decoders.fit(decoders.wrap(guidance=guidance, init="inherit"), tmp_path)
    with pytest.raises(CheckpointError, match=r"attach_at was \['stages.0', 'stages.1'\], is \['stages.1'\]"):
        decoders.fit(decoders.wrap(guidance=guidance, attach_at=[2]), tmp_path)
    with pytest.raises(CheckpointError, match="wrap.guidance.*was"):
        decoders.fit(decoders.wrap(guidance=None if guidance else True), tmp_path)
    with pytest.raises(CheckpointError, match="features of another fit, with other inputs"):
        decoders.fit(decoders.wrap(guidance=guidance), tmp_path, inputs=decoders.latents(10) + 1)
    with pytest.raises(CheckpointError, match="with other inputs, count"):
        decoders.fit(decoders.wrap(guidance=guidance), tmp_path, inputs=decoders.latents(11))
    other = decoders.make()
    other.stem.bias.data += 1
    with pytest.raises(CheckpointError, match="features of another fit, with other fingerprint"):
        decoders.fit(decoders.wrap(other, guidance=guidance), tmp_path)


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
