"""What a linear layer reads and gives at some places: rows for least squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

__all__ = [
    "as_weight",
    "can_read",
    "design",
    "every_row",
    "exact",
    "is_linear",
    "least_squares",
    "out_channels",
    "owns_weight",
    "rows",
    "some_places",
]

_RIDGE = 1e-3
_CHUNK = 2048

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a convolution or linear layer of PyTorch's own, with its own forward."""
    return type(module) in (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)


def can_read(module: nn.Module, args: tuple[Any, ...], output: Any) -> bool:
    """Tell whether `design` and `rows` fit a call of a layer: one batch, given by place."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return False
    dims = args[0].dim()
    return dims >= 2 if isinstance(module, nn.Linear) else dims == 2 + len(module.kernel_size)  # type: ignore[arg-type]


def owns_weight(module: nn.Module) -> bool:
    """Tell whether a layer uses its weight as it is, rather than something computed from others."""
    return (
        isinstance(module._parameters.get("weight"), nn.Parameter)
        and not parametrize.is_parametrized(module)
        and not module._forward_pre_hooks
    )


def out_channels(module: nn.Module) -> int:
    """Channels that a layer gives."""
    weight = module.get_parameter("weight")
    is_transposed = isinstance(module, _TRANSPOSED)
    return int(weight.shape[1] * module.groups if is_transposed else weight.shape[0])  # type: ignore[operator]


def _channel_axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def some_places(module: nn.Module, output: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw at most ``count`` places of a layer's output, numbered over samples and positions, ascending."""
    total = output.numel() // output.shape[_channel_axis(module)]
    return torch.randperm(total, generator=generator)[:count].sort().values.to(output.device)


def rows(module: nn.Module, output: Tensor, places: Tensor) -> Tensor:
    """Pick a layer's output at some places, ``(P, C)``."""
    return every_row(module, output)[places]


def every_row(module: nn.Module, output: Tensor) -> Tensor:
    """Lay out a layer's output by places, ``(samples * positions, C)``."""
    axis = _channel_axis(module)
    return output.movedim(axis, -1).reshape(-1, output.shape[axis])


def design(module: nn.Module, x: Tensor, places: Tensor, *, centre: bool = False) -> Tensor:
    """Pick what a layer reads for its output at some places, ``(P, C * kernel)``, channel by channel.

    ``design @ weight.flatten(1).T`` is the output without its bias, for a single group. Of a transposed
    convolution the kernel is the flipped one.

    Args:
        module: A layer, see `is_linear`.
        x: Its input.
        places: Places of the output, see `some_places`.
        centre: Whether to leave all of the kernel's window out but its middle, ``(P, C)``.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])[places]
    conv: Any = module
    dims = len(conv.kernel_size)
    if conv.transposed:
        x, strides = _spread(conv, x), (1,) * dims
    else:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, strides = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode), conv.stride
    for axis in range(dims):
        span = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, span, strides[axis])
    taps: list[Any] = [..., *(slice(None, None, step) for step in conv.dilation)]
    x = x[tuple(taps)]
    if centre:
        taps = [..., *(slice(size // 2, size // 2 + 1) for size in conv.kernel_size)]
        x = x[tuple(taps)]
    where = torch.unravel_index(places, (x.shape[0], *x.shape[2 : 2 + dims]))
    return x.movedim(1, 1 + dims)[where].flatten(1)  # (N, C, ..., kernel) -> (P, C * kernel)


def least_squares(read: Tensor, wanted: Tensor, groups: int = 1) -> Tensor:
    """Solve for the weights that make the most of what a layer reads, with a little ridge.

    Args:
        read: What it reads, ``(P, I)``, see `design`.
        wanted: What it should give, ``(P, O)``.
        groups: Both are divided into so many parts, each on its own.

    Returns:
        Weights ``(groups, I / groups, O / groups)``, float64.
    """
    x = read.view(len(read), groups, -1).transpose(0, 1)
    y = wanted.view(len(wanted), groups, -1).transpose(0, 1)
    gram = exact(x.new_zeros(groups, x.shape[2], x.shape[2]))
    cross = exact(x.new_zeros(groups, x.shape[2], y.shape[2]))
    for part, goal in zip(x.split(_CHUNK, 1), y.split(_CHUNK, 1), strict=True):
        gram += exact(part).mT @ exact(part)
        cross += exact(part).mT @ exact(goal)
    level = gram.diagonal(dim1=1, dim2=2).mean(1)
    # What is never anything but zero gets no weight.
    gram.diagonal(dim1=1, dim2=2).add_((_RIDGE * level).clamp_min(torch.finfo(gram.dtype).tiny)[:, None])
    return torch.linalg.solve(gram, cross)


def exact(value: Tensor) -> Tensor:
    """Give a tensor in float64, on the CPU where its device has none."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def as_weight(module: nn.Module, step: Tensor) -> Tensor:
    """Lay out what `least_squares` found as the weight of a layer."""
    weight = module.get_parameter("weight")
    if not isinstance(module, _TRANSPOSED):
        return step.mT.reshape(weight.shape).to(weight)
    kernel = weight.shape[2:]
    parts = step.view(len(step), -1, *kernel, step.shape[2]).movedim(-1, 2)  # (groups, in, out, kernel)
    return parts.flatten(0, 1).flip(tuple(range(2, weight.dim()))).to(weight)


def _spread(conv: Any, x: Tensor) -> Tensor:
    """Put zeros between and around a map so that a convolution of stride 1 does the transposed one."""
    dims = len(conv.kernel_size)
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], conv.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    where: list[Any] = [..., *(slice(None, None, stride) for stride in conv.stride)]
    spread[tuple(where)] = x
    around: list[int] = []
    for axis in reversed(range(dims)):
        margin = conv.dilation[axis] * (conv.kernel_size[axis] - 1) - conv.padding[axis]
        around += [margin, margin + conv.output_padding[axis]]
    return functional.pad(spread, around)
