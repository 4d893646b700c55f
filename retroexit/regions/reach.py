"""How far a step sees: change one line of a map, look which lines of the step's output change.

No layer is known by name. Convolutions of any kind, upsampling, pixel shuffles and padding show a small reach
that moves along; norms over space, attention and pooling show that one line changes all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import torch
from torch import Tensor

from retroexit.decoder.structure import rebuild, tensors
from retroexit.errors import RegionError
from retroexit.regions.blame import blame
from retroexit.regions.steps import Key, Step, copied
from retroexit.regions.trial import Axes, Trials

__all__ = ["Reach", "reaches_of"]

_SEEN = 1e-5  # of the largest change; what changes less is rounding of kernels that mix lines
_MOST_PHASES = 64


@dataclass(frozen=True)
class Reach:
    """What one line of a map changes along one axis: lines ``floor(ratio * i) + low .. + high``.

    Attributes:
        ratio: Output lines per input line.
        low: First changed line, seen from the line itself.
        high: Last one.
    """

    ratio: Fraction
    low: int
    high: int

    def needs(self, first: int, end: int) -> tuple[int, int]:
        """Input lines ``[first, end)`` that output lines ``[first, end)`` depend on."""
        return ceil((first - self.high) / self.ratio), ceil((end - self.low) / self.ratio)


@torch.no_grad()
def reaches_of(
    step: Step, key: Key, trials: Trials, live: Mapping[Key, Any], grain: int = 1
) -> list[Reach | None]:
    """Find the reach of a step into one of the maps that it takes, along every axis of the image.

    Args:
        step: The step.
        key: The map.
        trials: Runs at several sizes.
        live: Values for the step, at the basic size.
        grain: Lines after which its pattern repeats, where it has strides inside.

    Raises:
        RegionError: If it sees the whole map (at this size), or its output has no space any more.
    """
    found: list[Reach | None] = []
    if not trials.axes[step.key]:
        raise RegionError(
            f"asked for regions; found that {step.where} writes into a part of a map. Attach behind it.", step
        )
    insides, outsides = (trials.sizes(k, trials.base) for k in (key, step.key))
    plain = step.run(lambda k: copied(live[k]))
    if not _same(plain, step.run(lambda k: copied(live[k]))):
        raise RegionError(
            f"asked for regions; found that {step.where} draws random numbers, which fall otherwise on a "
            "part of a map. Attach behind it.",
            step,
        )
    for k, (inside, outside) in enumerate(zip(insides, outsides, strict=True)):
        if not inside:
            found.append(None)
            continue

        def moved(line: int, k: int = k) -> Any:
            other = _with_line(live[key], trials.axes[key], k, line)
            return step.run(lambda name: other if name == key else copied(live[name]))

        def changed(line: int, k: int = k) -> tuple[int, int] | None:
            return _extent(plain, moved(line), trials.axes[step.key], k)

        def who(k: int = k) -> str:
            return blame(step, lambda: step.run(lambda name: copied(live[name])), lambda: moved(0))

        if not outside:
            raise RegionError(
                f"asked for regions; found that {who()} takes all of its map together, as pooling over space "
                "does, so that no part of it can be run alone. Attach behind it.",
                step,
            )
        shorter = trials.less[k]
        ratio = Fraction(outside - trials.sizes(step.key, shorter)[k], inside - trials.sizes(key, shorter)[k])
        found.append(_measure(step, ratio, (inside, outside), changed, who, grain))
    return found


def _measure(
    step: Step,
    ratio: Fraction,
    sizes: tuple[int, int],
    changed: Callable[[int], tuple[int, int] | None],
    who: Callable[[], str],
    grain: int,
) -> Reach:
    """Probe the first line, the last one, and every phase in the middle."""
    inside, outside = sizes
    if ratio <= 0 or ratio.denominator > _MOST_PHASES:
        raise RegionError(
            f"asked for regions; found that {step.where} turns {inside} lines into {outside}, in no fixed "
            "ratio that regions can follow. Attach behind it.",
            step,
        )
    first, last = changed(0), changed(inside - 1)
    if first and last and first[1] >= outside - 1 and last[0] <= 0:
        raise RegionError(
            f"asked for regions; found that {who()} sees the whole map at once, as norms over space and "
            "attention do, so that no part of it can be run alone. Attach behind it.",
            step,
        )
    low: list[int] = []
    high: list[int] = []
    phases = ratio.denominator * grain
    middle = inside // 2 // phases * phases
    for line in range(middle, min(middle + phases, inside)):
        seen = changed(line)
        if seen is None:
            continue
        if (seen[0] <= 0 and line > 0) or (seen[1] >= outside - 1 and line < inside - 1):
            raise RegionError(
                f"asked for regions; found that {step.where} sees from the middle of a map of {inside} lines "
                "to its border, so that no part of it can be run alone. Attach behind it, or use larger "
                "inputs.",
                step,
            )
        low.append(seen[0] - int(line * ratio // 1))
        high.append(seen[1] - int(line * ratio // 1))
    return Reach(ratio, min(low, default=0), max(high, default=0))


def _with_line(value: Any, axes: Sequence[Axes], k: int, line: int) -> Any:
    """Put other numbers into one line of a map."""
    own = iter(axes)

    def leaf(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        axis, tensor = next(own)[k], tensor.clone()
        if axis is not None:
            part = tensor.narrow(axis, line, 1)
            part.copy_(_others(part))
        return tensor

    return rebuild(value, leaf)


def _others(part: Tensor) -> Tensor:
    if part.dtype == torch.bool:
        return ~part
    if not part.is_floating_point():
        return part.max() + part.min() - part + (part.max() == part.min()).to(part.dtype)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(part.shape, generator=generator).to(part)
    return part.flip(1) + noise * (part.abs().amax() + 1) if part.dim() > 1 else part + noise


def _extent(plain: Any, other: Any, axes: Sequence[Axes], k: int) -> tuple[int, int] | None:
    """First and last line along an axis of the image that differ."""
    seen: list[int] = []
    for a, b, own in zip(tensors(plain), tensors(other), axes, strict=True):
        axis = own[k]
        if axis is None or a.dtype == torch.bool:
            difference = (a != b).float()
        else:
            difference = (a.double() - b.double()).abs().nan_to_num(posinf=1e30)
        if axis is None:
            continue
        lines = difference.transpose(0, axis).flatten(1).amax(1)
        seen += (lines > _SEEN * lines.max()).nonzero()[:, 0].tolist() if float(lines.max()) > 0 else []
    return (min(seen), max(seen)) if seen else None


def _same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
