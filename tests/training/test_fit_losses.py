"""A fit with adversaries and equalised weights: each branch its own, resumed to the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.core.files import read_tensors
from retroexit.errors import CheckpointError
from retroexit.metrics import QualityMetric
from retroexit.plugins.training_types import DiscriminatorOutput, TrainingBatch
from retroexit.training.trainer import BranchTrainer

oasis = pytest.importorskip("retroexit_oasis", reason="install the project to get its adapters")

LABELS = 6
QUICK: dict[str, Any] = {
    "steps": 4,
    "batch": 2,
    "predictor_steps": 2,
    "checkpoint_every": 2,
    "progress": False,
}


class Near(QualityMetric):
    """Stands in for LPIPS where there are no weights."""

    name = "lpips-near"

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))


class Judge(nn.Module):
    """A small discriminator of pixels by label."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.spectral_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.last = nn.Conv2d(8, LABELS + 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(image)))


def wrap() -> retroexit.EarlyExitGenerator:
    torch.manual_seed(0)
    generator = oasis.OASISGenerator(LABELS, 4, 2, (64, 128), 4).eval()
    return retroexit.wrap(generator, [3, 5], 1 / 2, min_channels=4, init="scratch")


def judge() -> Judge:
    torch.manual_seed(1)
    return Judge()


def samples() -> Tensor:
    source = torch.Generator().manual_seed(2)
    numbers = torch.randint(LABELS, (6, 2, 4), generator=source)
    return oasis.one_hot(numbers.repeat_interleave(32, 1).repeat_interleave(32, 2), LABELS)


def fit(model: retroexit.EarlyExitGenerator, folder: Path, **options: Any) -> retroexit.EarlyExitGenerator:
    given = {"losses": "oasis", "instead": {"vgg": "l1"}, "equalise": 3, "discriminator": judge(), **QUICK}
    return retroexit.fit(model, samples(), folder, metric=Near(), **(given | options))


def test_a_fit_on_equation_3_is_resumed_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(wrap(), tmp_path / "whole")
    advance, calls = BranchTrainer.advance, iter(range(99))

    def stop(self: BranchTrainer, step: Any) -> dict[str, float]:
        if next(calls) == 6:  # in the fourth step, after the checkpoint of the second
            raise KeyboardInterrupt
        return advance(self, step)

    monkeypatch.setattr(BranchTrainer, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(wrap(), tmp_path / "parts")
    monkeypatch.undo()
    again = fit(wrap(), tmp_path / "parts")
    for name, value in whole.branches.state_dict().items():
        assert torch.equal(again.branches.state_dict()[name], value), name
    opponents = []
    for index in (1, 2):
        one, _ = read_tensors(tmp_path / "whole" / "branches" / f"exit{index}.safetensors")
        other, _ = read_tensors(tmp_path / "parts" / "branches" / f"exit{index}.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert [int(value) for name, value in one.items() if name.endswith("equaliser.count")] == [3]
        (name,) = [name for name in one if name.endswith("adversary.module.last.weight")]
        opponents.append(one[name])
    assert not torch.equal(*opponents)
    assert not any(torch.equal(value, judge().last.weight) for value in opponents)
    assert whole.about["fit"]["losses"] == {"adversarial": 1, "l1": 1, "lpips": 1}
    written = json.loads((tmp_path / "whole" / "fit.json").read_text())["loss"]
    assert written["objective"] == "oasis"
    assert written["equalise"] == 3
    with pytest.raises(CheckpointError, match=r"other settings: loss\.discriminator was .*, is "):
        fit(wrap(), tmp_path / "whole", discriminator=Judge())


def test_a_fit_in_bfloat16_with_plain_adversaries_works(tmp_path: Path) -> None:
    losses = {"l1": 1.0, "adversarial": 0.1, "feature-matching": 0.5}
    model = fit(wrap(), tmp_path, losses=losses, instead=None, adversarial="hinge", bfloat16=True)
    assert model.about["fit"]["losses"] == losses


def test_an_objective_of_ones_own_sees_the_inputs(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    class Own:
        name, needs_inputs = "own", True

        def of_branch(self, verdict: DiscriminatorOutput, batch: TrainingBatch) -> Tensor:
            seen.append(tuple(batch.args[0].shape))
            return -verdict.scores[0].mean()

        def of_discriminator(self, judge: Any, batch: TrainingBatch) -> dict[str, Tensor]:
            return {"gap": (judge(batch.image).scores[0] - judge(batch.target).scores[0]).mean()}

    fit(wrap(), tmp_path, losses={"adversarial": 1.0}, instead=None, adversarial=Own(), crop=32)
    assert set(seen[1:]) == {(2, LABELS, 32, 32)}
