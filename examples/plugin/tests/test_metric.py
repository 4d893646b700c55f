"""The metric against its definition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from retroexit_example.metric import EdgeDistance

from retroexit.plugins import host


def test_it_is_found_by_name() -> None:
    assert isinstance(host().metric("edges"), EdgeDistance)


def test_equal_images_have_distance_zero_and_worse_ones_more() -> None:
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8) * 2 - 1, scale_factor=4.0)
    noise = torch.randn_like(image)
    losses = [EdgeDistance()(image, image + amount * noise) for amount in (0.0, 0.05, 0.2, 0.8)]
    assert losses[0].tolist() == [0.0, 0.0]
    assert all((worse > better).all() for better, worse in pairwise(losses))


def test_a_brighter_image_is_told_by_its_mean_alone() -> None:
    image = torch.rand(1, 3, 16, 16) - 0.5
    assert float(EdgeDistance()(image, image + 0.2)) == pytest.approx(0.1, abs=1e-5)


def test_one_edge_against_none_is_as_unlike_as_the_formula_says() -> None:
    flat, edge = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    edge[..., 1] = 0.5
    expected = 1 - (2e-4 * 0.5 + 0.01) / (0.25 + 0.01) + 0.25 / 2
    assert float(EdgeDistance()(flat, edge)) == pytest.approx(expected, abs=1e-5)


def test_gradients_are_finite_where_images_are_equal() -> None:
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    EdgeDistance()(image, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()
