"""Banks of another backbone, of other taps or patches: refused before anything changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import BankError, RetroExitError
from retroexit.guidance import GuidanceBank, build_bank
from retroexit.retrieval import ExactRetriever
from retroexit.training.stream_bank import stream_bank

INPUTS = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
POSES = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
SAMPLES = Samples(list(zip(INPUTS, POSES, strict=True)))


def pose_key(x: Tensor, pose: Tensor) -> Tensor:
    return pose


def wrap(generator: nn.Module, guidance: Any, recorded: bool = True) -> Any:
    example = {"example_inputs": (INPUTS[:2], POSES[:2])} if recorded else {}
    stages = tuple(f"stages.{i}" for i in range(4))
    return retroexit.wrap(
        generator, [2], 1 / 3, guidance=guidance, stages=stages, adapter=False, min_channels=4, **example
    )


def bank_of(generator: nn.Module, **guidance: Any) -> GuidanceBank:
    model = wrap(generator, retroexit.Guidance(size=20, **guidance))
    return stream_bank(model, SAMPLES, ExactRetriever(), progress=False)


OTHERS = {
    "key_after": ({"key_after": 1}, r"the source of keys must be '.+', got '.+'"),
    "value_after": ({"value_after": 2}, r"the source of values must be '.+', got '.+'"),
    "patch": ({"patch": (2, 2)}, r"patch of a key must be \(1, 1\), got \(2, 2\)"),
    "frames": ({"key": pose_key}, r"the source of keys must be '.+', got '.*pose_key'"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_bank_of_other_taps_or_patches_cannot_be_set(posed: nn.Module, other: str, recorded: bool) -> None:
    options, message = OTHERS[other]
    foreign = bank_of(posed, **({"value_after": 3} | options))
    model = wrap(posed, retroexit.Guidance(value_after=3), recorded)
    if recorded:
        model.bank = own = bank_of(posed, value_after=3)
        with pytest.raises(BankError, match=message):
            model.bank = foreign
        assert model.bank is own
    else:  # checked in the first call, before there are branches
        model.bank = foreign
        with pytest.raises(BankError, match=message):
            model(INPUTS[:2], POSES[:2], exit=1)
        assert not model.is_recorded and len(model.branches) == 0
        model.bank = bank_of(posed, value_after=3)
        assert model(INPUTS[:2], POSES[:2], exit=1).shape == (2, 3, 16, 16)


def test_a_bank_of_another_backbone_cannot_be_set(posed: nn.Module) -> None:
    model = wrap(posed, retroexit.Guidance())
    with torch.no_grad():
        posed.rgb.weight[0, 0, 0, 0] += 1
    foreign = bank_of(posed)
    with torch.no_grad():
        posed.rgb.weight[0, 0, 0, 0] -= 1
    with pytest.raises(
        BankError, match=r"the backbone of the bank must be '[0-9a-f]{64}', got '[0-9a-f]{64}'"
    ):
        model.bank = foreign
    assert model.bank is None


def test_a_bank_made_by_hand_is_compared_by_its_shapes(posed: nn.Module) -> None:
    model = wrap(posed, retroexit.Guidance(value_after=3))

    def by_hand(keys: Tensor, values: Tensor) -> GuidanceBank:
        return build_bank([(keys, range(len(keys)))], lambda ids: values[ids], retriever=ExactRetriever())

    keys, values = torch.randn(3, 12, 8, 8), torch.rand(3, 12, 16, 16)
    model.bank = fits = by_hand(keys, values)
    for wrong, message in (
        (by_hand(keys[:, :5], values), r"numbers per key must be 12, got 5"),
        (by_hand(keys, values[:, :, ::2, ::2]), r"the patch of a value must be \(2, 2\), got \(1, 1\)"),
        (by_hand(keys, values[:, :3]), r"channels per value must be 12, got 3"),
    ):
        with pytest.raises(BankError, match=message):
            model.bank = wrong
    assert model.bank is fits


def test_a_saved_model_with_the_bank_of_another_is_refused(posed: nn.Module, tmp_path: Path) -> None:
    model = wrap(posed, retroexit.Guidance(value_after=3))
    model.bank = bank_of(posed, value_after=3)
    model.save(tmp_path)
    bank_of(posed, value_after=2).save(tmp_path / "bank")
    with pytest.raises(RetroExitError, match="another guidance bank than the one it was saved with"):
        retroexit.load(tmp_path, posed, adapter=False)
