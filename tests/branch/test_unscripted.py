"""Scripted modules are read as Python and narrow like others; what cannot be read keeps its widths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import retroexit
from retroexit.branch.widths.torchscript import Interpreted

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")


class Gate(nn.Module):
    """Squeeze and excitation with everything a script may have: branches, loops, lists, sizes, keywords."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GroupNorm(2, channels))
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))
        self.register_buffer("offset", torch.rand(channels, 1, 1))
        self.turns = 2

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        n, c, h, w = x.shape
        mean = x.view(n, c, h * w).mean(dim=2).view(n, c, 1, 1)
        parts = [x]
        for _ in range(self.turns):
            if h > 1 and len(parts) > 0:
                parts.append(torch.sigmoid(self.mix(mean)) * parts[-1])
        y = torch.cat([parts[-1], parts[0]], dim=1)[:, :c]
        return F.leaky_relu(y * self.scale + self.offset, 0.2) * gain


class Refusing(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.mix(x)


class Stage(nn.Module):
    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(channels, channels, 3, padding=1), torch.jit.script(gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(F.relu(self.conv(F.interpolate(x, scale_factor=2.0))))


def decoder(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(*(Stage(32, kind(32)) for _ in range(3)), nn.Conv2d(32, 3, 1)).eval()


@pytest.mark.parametrize("size", [(2, 8, 4, 6), (1, 8, 1, 3)])
def test_a_script_read_as_python_gives_what_it_gives(size: tuple[int, ...]) -> None:
    gate = Gate(8).eval()
    read, x = Interpreted(torch.jit.script(gate)), torch.randn(size)
    with torch.no_grad():
        torch.testing.assert_close(read(x), gate(x))
        torch.testing.assert_close(read(x, gain=0.5), gate(x, 0.5))
    assert [name for name, _ in read.named_parameters()] == [name for name, _ in gate.named_parameters()]


def test_scripted_modules_narrow_and_train_with_the_rest() -> None:
    generator, x = decoder(Gate), torch.randn(1, 32, 4, 4)
    model = retroexit.wrap(generator, [1], 1 / 4, min_channels=4, example_inputs=(x,))
    (branch,) = model.branches
    gate = branch.tail.get_submodule("1.gate")
    assert isinstance(gate, torch.jit.ScriptModule)
    assert gate.scale.shape == gate.offset.shape == (8, 1, 1)
    assert tuple(dict(gate.named_parameters())["mix.0.weight"].shape) == (8, 8, 1, 1)
    assert model.exits[0].pinned == ()
    model(x, exit=1).square().sum().backward()
    assert [name for name, p in branch.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in generator.parameters())


def test_a_script_that_cannot_be_read_keeps_its_widths_and_is_named() -> None:
    generator, x = decoder(Refusing), torch.randn(1, 32, 4, 4)
    model = retroexit.wrap(generator, [1], 1 / 4, min_channels=4, example_inputs=(x,))
    assert any("the scripted module 1.gate (Refusing)" in line for line in model.exits[0].pinned)
    assert model(x, exit=1).shape == model(x).shape
