"""Widths that a forward computes with in its own ways: they shrink, or the line that keeps them is named."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import retroexit
from retroexit.model import EarlyExitGenerator


class Block(nn.Module):
    """A residual block; what it does in the middle is the subject."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.middle(self.a(x))))

    def middle(self, y: Tensor) -> Tensor:
        return y


class Decoder(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 32, 3, padding=1)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.rgb = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.interpolate(block(x), scale_factor=2)
        return self.rgb(x)


class NumpyRoot(Block):
    def middle(self, y: Tensor) -> Tensor:
        return y / np.sqrt(y.shape[1])


class Factors(Block):
    """Scales by numbers that it computes from its width."""

    def middle(self, y: Tensor) -> Tensor:
        return y / math.sqrt(y.shape[1]) * int(y.shape[1]) ** -0.5 / math.log2(y.shape[1])


class Configured(Block):
    """Keeps its width in an object that holds settings."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = types.SimpleNamespace(width=32, groups=4)

    def middle(self, y: Tensor) -> Tensor:
        groups = self.cfg.groups
        parts = y.view(-1, groups, self.cfg.width // groups, *y.shape[2:])
        return (parts - parts.mean((2, 3, 4), keepdim=True)).view(y.shape)


class InDictionary(Block):
    def __init__(self) -> None:
        super().__init__()
        self.cfg = {"width": 32}

    def middle(self, y: Tensor) -> Tensor:
        return y.reshape(y.shape[0], self.cfg["width"], -1).view(y.shape)


class Heads(Block):
    """Keeps both the number of its heads and their size."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 8
        self.qkv = nn.Linear(32, 96)

    def middle(self, y: Tensor) -> Tensor:
        n, c, *size = y.shape
        tokens = self.qkv(y.flatten(2).transpose(1, 2)).reshape(n, -1, 3, self.heads, self.size)
        q, k, v = tokens.permute(2, 0, 3, 1, 4)
        found = (q @ k.transpose(-1, -2) * self.size**-0.5).softmax(-1) @ v
        return found.transpose(1, 2).reshape(n, -1, self.heads * self.size).transpose(1, 2).view(n, c, *size)


class LookedUp(Block):
    """Reads a table of as many rows as it has channels at places that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 32)

    def middle(self, y: Tensor) -> Tensor:
        last = torch.full((y.shape[0],), 31)
        return y + self.table(last)[:, :, None, None]


def wrapped(block: Callable[[], nn.Module]) -> tuple[EarlyExitGenerator, Tensor]:
    torch.manual_seed(0)
    generator, x = Decoder(block).eval(), torch.randn(1, 4, 4, 4)
    model = retroexit.wrap(generator, ["blocks.0"], 1 / 4, min_channels=8, example_inputs=(x,))
    return model, x


@pytest.mark.parametrize("block", [Factors, Configured, InDictionary, Heads])
def test_widths_that_a_forward_computes_with_shrink(block: Any) -> None:
    model, x = wrapped(block)
    (branch,) = model.branches
    assert not branch.pins
    for name in ("a", "b"):
        assert branch.tail.get_parameter(f"blocks.1.{name}.weight").shape == (8, 8, 3, 3)
    assert model(x, exit=1).shape == (1, 3, 16, 16)


def test_a_configuration_is_the_branchs_own() -> None:
    model, x = wrapped(Configured)
    before = model.generator(x)
    thin, full = model.branches[0].tail.get_submodule("blocks.1"), model.generator.blocks[1]
    assert (thin.cfg.width, full.cfg.width) == (8, 32)
    assert thin.cfg.groups in (1, 2, 4)
    assert torch.equal(model(x), before)


def test_heads_stay_a_divisor_of_the_width() -> None:
    model, _ = wrapped(Heads)
    thin = model.branches[0].tail.get_submodule("blocks.1")
    assert thin.heads * thin.size * 3 == thin.qkv.weight.shape[0]
    assert thin.heads < 4 or thin.size < 8


def test_a_configuration_is_saved_and_loaded(tmp_path: Any) -> None:
    model, x = wrapped(Configured)
    model.save(tmp_path)
    again = retroexit.load(tmp_path, model.generator)
    assert torch.equal(again(x, exit=1), model(x, exit=1))


def test_a_table_that_is_looked_up_keeps_its_rows_and_names_the_line() -> None:
    model, x = wrapped(LookedUp)
    (branch,) = model.branches
    assert branch.tail.get_parameter("blocks.1.table.weight").shape == (32, 8)
    assert {pin.parameter for pin in branch.pins} == {"blocks.1.table.weight"}
    assert "test_forwards.py" in str(branch.pins[0])
    assert "self.table(last)" in str(branch.pins[0])
    assert model(x, exit=1).shape == (1, 3, 16, 16)


def test_a_width_that_numpy_computes_with_is_fixed_and_the_line_is_named() -> None:
    model, x = wrapped(NumpyRoot)
    (branch,) = model.branches
    assert any("y / np.sqrt(y.shape[1])" in pin.reason for pin in branch.pins)
    assert branch.tail.get_parameter("blocks.1.a.weight").shape == (32, 32, 3, 3)
    assert model(x, exit=1).shape == (1, 3, 16, 16)
