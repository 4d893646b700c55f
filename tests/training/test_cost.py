"""The estimated cost of a fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import retroexit
from retroexit.core.samples import ImageRange
from retroexit.training.fit import estimate_fit
from retroexit.training.losses import L1
from retroexit.training.losses.plan import LossPlan
from retroexit.training.settings import FitSettings


def test_the_macs_of_a_step_are_those_of_a_count_by_hand() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])
            self.rgb = nn.Conv2d(4, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for stage in self.stages:
                x = torch.relu(stage(x))
            return torch.tanh(self.rgb(x))

    inputs = torch.randn(8, 4, 8, 8)
    stages = ("stages.0", "stages.1", "stages.2")
    model = retroexit.wrap(
        Decoder().eval(), [1], 1, stages=stages, example_inputs=(inputs[:1],), image_range=(-1, 1)
    )
    before = {name: value.clone() for name, value in model.branches.state_dict().items()}
    settings = FitSettings(batch=2, losses={"l1": 1.0})
    cost = estimate_fit(model, inputs, settings, LossPlan({"l1": 1.0}, {"l1": L1()}), ImageRange(-1, 1))
    convolutions = 2 * 64 * (2 * 9 * 16 + 12)
    entering = 2 * 64 * 9 * 16  # no gradient goes into the feature
    assert cost.step_macs == 3 * convolutions - entering
    assert cost.backbone_macs == 2 * model.decomposition.backbone_macs
    weights = 4 * (2 * (9 * 16 + 4) + 12 + 3)
    kept = 4 * 2 * 64 * 4 * 3 + 4 * 2 * 64 * 3  # feature, two maps behind a relu, an image
    assert cost.memory == pytest.approx(5 * weights + kept, rel=0.35)
    assert all(torch.equal(value, before[name]) for name, value in model.branches.state_dict().items())
    assert not model.branches[0].training
