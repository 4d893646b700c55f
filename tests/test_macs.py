"""Counts of multiply-accumulates against counts by hand."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retroexit.core.modules import count_macs
from retroexit.evaluation.measure import cross_check

X = torch.rand(2, 6, 8, 10)


@pytest.mark.parametrize(
    ("layer", "by_hand"),
    [
        (nn.Conv2d(6, 4, 3, padding=1), 2 * 8 * 10 * 4 * 6 * 9),
        (nn.Conv2d(6, 4, 3), 2 * 6 * 8 * 4 * 6 * 9),
        (nn.Conv2d(6, 4, 1, stride=2, bias=False), 2 * 4 * 5 * 4 * 6),
        (nn.Conv2d(6, 12, 3, padding=1, groups=3), 2 * 8 * 10 * 12 * 2 * 9),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), 2 * 8 * 10 * 6 * 9),
        (nn.Conv2d(6, 4, 3, padding=2, dilation=2), 2 * 8 * 10 * 4 * 6 * 9),
        (nn.ConvTranspose2d(6, 4, 4, 2, 1), 2 * 8 * 10 * 6 * 4 * 16),  # every input pixel is spread over 4x4
        (nn.ConvTranspose2d(6, 4, 2, 2, groups=2), 2 * 8 * 10 * 6 * 2 * 4),
        (nn.Linear(10, 7), 2 * 6 * 8 * 10 * 7),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6).eval(), nn.Upsample(scale_factor=2)), 0),
    ],
)
def test_layers_count_what_they_count_by_hand(layer, by_hand):
    assert count_macs(layer, X) == by_hand


@pytest.mark.parametrize(
    ("function", "by_hand"),
    [
        (lambda x: F.conv2d(x, torch.rand(5, 6, 3, 3)), 2 * 6 * 8 * 5 * 6 * 9),
        (lambda x: F.conv2d(x.reshape(1, 12, 8, 10), torch.rand(10, 6, 1, 1), groups=2), 8 * 10 * 10 * 6),
        (lambda x: x.flatten(2) @ x.flatten(2).mT, 2 * 6 * 80 * 6),
        (lambda x: torch.einsum("nchw,ncij->nhwij", x, x[..., :2, :3]), 2 * 80 * 6 * 6),
        (lambda x: F.scaled_dot_product_attention(*[x.flatten(2)[:, None]] * 3), 2 * 2 * 6 * 6 * 80),
        (lambda x: x * 2 + x, 0),
        (lambda x: F.conv1d(x[:, :, 0], torch.rand(5, 6, 3), padding=1), 2 * 10 * 5 * 6 * 3),
        (lambda x: F.conv3d(x[:, :, None], torch.rand(5, 6, 1, 3, 3)), 2 * 6 * 8 * 5 * 6 * 9),
    ],
)
def test_functions_count_what_they_count_by_hand(function, by_hand):
    assert count_macs(function, X) == by_hand


def test_keyword_arguments_are_passed_on_and_nothing_is_tracked_or_left_behind():
    layer, calls = nn.Linear(3, 4), []

    def function(x, *, twice):
        calls.append((twice, torch.is_grad_enabled()))
        return layer(layer.weight @ x if twice else x)

    with pytest.raises(ZeroDivisionError):
        count_macs(lambda: 1 / 0)
    assert count_macs(function, torch.rand(3, 3), twice=True) == 4 * 3 * 3 + 4 * 3 * 4
    assert calls == [(True, False)] and torch.is_grad_enabled()


def test_thop_agrees_on_plain_layers_and_the_text_explains_differences(toys, untouched, monkeypatch):
    pytest.importorskip("thop")
    module = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 2, 1)).eval()
    macs = 2 * 80 * (4 * 6 * 9 + 8)
    with untouched(module):
        assert cross_check(module, macs, (X,)) == "35.840 kMACs for the backbone, 1.000 of ours"
    toy = toys.TOYS["modulated_convolution_with_skip_image"]()
    text = cross_check(toy.generator, count_macs(toy.generator, *toy.args), toy.args)
    assert "thop counts by layer type; it misses functional convolutions and attention" in text
    assert float(text.split(" of ours")[0].split()[-1]) < 0.2
    assert cross_check(module, 1, (), {"x": 1}) == "not counted: thop takes positional tensors only"
    monkeypatch.setitem(sys.modules, "thop", None)
    assert "not counted: thop raised" in cross_check(module, macs, (X,))
