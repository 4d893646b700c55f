"""Bring weights from the layout of rosinality's PyTorch port of StyleGAN2 to the official one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from retroexit.errors import CheckpointError
from retroexit_stylegan.layers import low_pass_filter

__all__ = ["convert_rosinality"]


def convert_rosinality(state: Mapping[str, Tensor], w_avg: Tensor | None = None) -> dict[str, Tensor]:
    """Rename and reshape the ``g_ema`` of a checkpoint.

    Both layouts hold the same numbers, so nothing is computed but the gain of the filters. Images agree up to
    rounding: the port adds the demodulation's 1e-8 to weights that it has scaled down before.

    Args:
        state: Entry ``"g_ema"`` of a checkpoint.
        w_avg: Entry ``"latent_avg"``, shape ``(w_dim,)``, which truncation needs; zeros without it.

    Returns:
        State dict for a `StyleGANGenerator` of the same resolution and widths; shares memory with ``state``.

    Raises:
        CheckpointError: If ``state`` lacks a tensor of that layout, or holds one that is foreign to it.
    """
    source = _Source(state)
    blocks = source.count("to_rgbs.{}.bias")
    if not blocks:
        raise CheckpointError(
            f"no tensor 'to_rgbs.0.bias' in the state, got {_some(state)}. Pass the checkpoint's 'g_ema'"
        )
    target: dict[str, Tensor] = {}
    for i in range(source.count("style.{}.weight", first=1)):
        for what in ("weight", "bias"):
            target[f"mapping.fc{i}.{what}"] = source.take(f"style.{i + 1}.{what}")
    kernel = low_pass_filter()
    target["synthesis.b4.const"] = source.take("input.input")[0]
    target["synthesis.b4.resample_filter"] = kernel
    target |= _layer(source, "conv1", 0, "synthesis.b4.conv1", kernel)
    target |= _to_rgb(source, "to_rgb1", "synthesis.b4.torgb")
    for i in range(blocks):
        block, up = f"synthesis.b{8 << i}", 2 * i
        # There, the filter's gain of 4 is part of the buffer.
        target[f"{block}.resample_filter"] = source.take(f"to_rgbs.{i}.upsample.kernel") / 4
        kernel = source.take(f"convs.{up}.conv.blur.kernel") / 4
        target |= _layer(source, f"convs.{up}", up + 1, f"{block}.conv0", kernel)
        target |= _layer(source, f"convs.{up + 1}", up + 2, f"{block}.conv1", kernel)
        target |= _to_rgb(source, f"to_rgbs.{i}", f"{block}.torgb")
    source.must_be_used_up()
    const = target["synthesis.b4.const"]
    width = target["synthesis.b4.torgb.affine.weight"].shape[1]
    target["mapping.w_avg"] = const.new_zeros(width) if w_avg is None else w_avg.reshape(width)
    return target


class _Source:
    """A state dict that remembers which tensors were taken."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.left = dict(state)

    def count(self, name: str, first: int = 0) -> int:
        """Count tensors whose names differ by a running number."""
        number = first
        while name.format(number) in self.left:
            number += 1
        return number - first

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise CheckpointError(
                f"no tensor {name!r} in the state; still unused: {_some(self.left)}. Is it a whole 'g_ema'?"
            )
        return self.left.pop(name)

    def must_be_used_up(self) -> None:
        if self.left:
            raise CheckpointError(
                f"tensors that are foreign to rosinality's layout: {_some(self.left)}. Remove them first"
            )


def _layer(source: _Source, name: str, noise: int, path: str, kernel: Tensor) -> dict[str, Tensor]:
    return {
        f"{path}.weight": source.take(f"{name}.conv.weight")[0],
        f"{path}.affine.weight": source.take(f"{name}.conv.modulation.weight"),
        f"{path}.affine.bias": source.take(f"{name}.conv.modulation.bias"),
        f"{path}.noise_strength": source.take(f"{name}.noise.weight")[0],
        f"{path}.noise_const": source.take(f"noises.noise_{noise}")[0, 0],
        f"{path}.bias": source.take(f"{name}.activate.bias"),
        f"{path}.resample_filter": kernel,
    }


def _to_rgb(source: _Source, name: str, path: str) -> dict[str, Tensor]:
    return {
        f"{path}.weight": source.take(f"{name}.conv.weight")[0],
        f"{path}.affine.weight": source.take(f"{name}.conv.modulation.weight"),
        f"{path}.affine.bias": source.take(f"{name}.conv.modulation.bias"),
        f"{path}.bias": torch.flatten(source.take(f"{name}.bias")),
    }


def _some(state: Mapping[str, Tensor]) -> str:
    names = sorted(state)
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
