"""Layers of a branch may be held to the backbone's, beside its images."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from retroexit.training.trainer import BranchTrainer, FeatureDistance

HALVES = {"init": "inherit", "scale": 0.5, "min_channels": 8}


def test_the_distance_is_what_a_loop_over_the_layers_gives(decoders: ModuleType) -> None:
    model = decoders.wrap(**HALVES)
    branch, distance = model.branches[0], FeatureDistance(model, 0, 0.5)
    assert distance.paths == ["stages.1.conv", "stages.2.conv", "rgb"]
    values = model.split.crossing(model.split.begin((decoders.latents(4),), {}).values, 0)
    distance.run_backbone(values)
    with distance.capture_branch():
        branch(*values)

    full, thin = model.split.tail(0), branch.tail
    terms = []
    with torch.no_grad():
        wanted, found = values[0], branch.entry(values[0], None)
        for path in ("stages.1", "stages.2"):
            wide, narrow = full.get_submodule(path), thin.get_submodule(path)
            a, b = wide.conv(wide.up(wanted)), narrow.conv(narrow.up(found))
            kept = branch.inherited[f"{path}.conv"]
            a_kept = a if kept is None else a[:, kept]
            terms.append(float((b - a_kept).square().mean() / a_kept.var()))
            wanted, found = torch.relu(wide.norm(a)), torch.relu(narrow.norm(b))
        a, b = full.rgb(wanted), thin.rgb(found)
        terms.append(float((b - a).square().mean() / a.var()))
    assert float(distance().detach()) == pytest.approx(0.5 * sum(terms) / 3, rel=1e-4)


def test_the_distance_changes_what_is_learnt_and_leaves_no_hooks(
    decoders: ModuleType, tmp_path: Path
) -> None:
    generator = decoders.make()
    plain = decoders.fit(decoders.wrap(generator, **HALVES), tmp_path / "plain")
    held = decoders.fit(decoders.wrap(generator, **HALVES), tmp_path / "held", features=1.0)
    one, two = plain.branches.state_dict(), held.branches.state_dict()
    assert any(not torch.equal(value, two[name]) for name, value in one.items())
    assert not any(m._forward_hooks for m in (*generator.modules(), *held.branches.modules()))


def test_a_fit_on_features_that_goes_on_ends_alike(decoders: ModuleType, tmp_path: Path) -> None:
    whole = decoders.fit(decoders.wrap(**HALVES), tmp_path / "whole", features=1.0)
    with decoders.interrupted(BranchTrainer, "advance", 6):
        decoders.fit(decoders.wrap(**HALVES), tmp_path / "cut", features=1.0)
    again = decoders.fit(decoders.wrap(**HALVES), tmp_path / "cut", features=1.0)
    decoders.same(decoders.trained(whole), decoders.trained(again))


def test_fresh_branches_have_no_layers_to_compare(decoders: ModuleType, tmp_path: Path) -> None:
    model = decoders.wrap(init="scratch")
    assert FeatureDistance(model, 0, 1.0).paths == []
    decoders.fit(model, tmp_path, features=1.0)
