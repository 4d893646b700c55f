"""Run steps on small pieces of the values at a cut, to see which axes of a value are axes of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retroexit.decoder.structure import flatten, rebuild, tensors, twin
from retroexit.errors import RegionError
from retroexit.regions.steps import Key, Step

__all__ = ["Axes", "Trials", "grid_of", "resized", "try_sizes"]

Axes = tuple[int | None, ...]  # for every axis of the image the axis of the value, if it has one


def grid_of(crossing: Mapping[Key, Tensor], feature: Key) -> tuple[int, ...]:
    """Find the coarsest map among the values at a cut: its size is the unit in which all others are cut.

    Raises:
        RegionError: If the feature has no space, or another map's size is no multiple of the coarsest.
    """
    dims = crossing[feature].dim() - 2
    if dims < 1:
        raise RegionError(
            f"asked for regions; found a feature of shape {tuple(crossing[feature].shape)} at the attach "
            "point, which has no space. Attach behind a map.",
            feature,
        )
    maps = [v for v in crossing.values() if v.dim() == dims + 2]
    grid = tuple(min(s for v in maps if (s := v.shape[2 + k]) > 1) for k in range(dims))
    for value in maps:
        if any(s > 1 and s % g for s, g in zip(value.shape[2:], grid, strict=True)):
            raise RegionError(
                f"asked for regions; found maps of {grid} and {tuple(value.shape[2:])} at one attach point, "
                "which have no common grid. Attach elsewhere.",
                value,
            )
    return grid


def resized(
    crossing: Mapping[Key, Tensor], grid: Sequence[int], size: Sequence[int]
) -> tuple[dict[Key, Tensor], dict[Key, Axes]]:
    """Cut every map at a cut to ``size`` units of the grid, or repeat it up to there.

    Returns:
        The values, and the axes of those that are maps.
    """
    out, axes = dict[Key, Tensor](), dict[Key, Axes]()
    for key, value in crossing.items():
        own: list[int | None] = [None] * len(grid)
        if value.dim() == len(grid) + 2:
            for k, (unit, wanted) in enumerate(zip(grid, size, strict=True)):
                whole = value.shape[2 + k]
                if whole > 1:
                    own[k] = 2 + k
                    picked = torch.arange(wanted * (whole // unit), device=value.device) % whole
                    value = value.index_select(2 + k, picked)
        out[key], axes[key] = value, tuple(own)
    return out, axes


@dataclass
class Trials:
    """What runs at several sizes showed.

    Attributes:
        base: Values of the run at the basic size.
        less: Values of one run per axis of the image, each shorter along that axis.
        axes: For every key and every tensor of its value, which of its axes are the image's.
        fixed: Keys of tensors that do not come from the cut and yet have the image's axes, like stored noise.
    """

    base: dict[Key, Any]
    less: list[dict[Key, Any]]
    axes: dict[Key, list[Axes]] = field(default_factory=dict)
    fixed: set[Key] = field(default_factory=set)

    def has_space(self, key: Key) -> bool:
        """Tell whether a value is a map."""
        return any(axis is not None for axes in self.axes[key] for axis in axes)

    def sizes(self, key: Key, values: Mapping[Key, Any]) -> tuple[int, ...]:
        """Sizes of a map along the image's axes, 0 where it has none."""
        return map_sizes(values[key], self.axes[key])


def map_sizes(value: Any, axes: Sequence[Axes]) -> tuple[int, ...]:
    """Sizes of a map along the image's axes, 0 where it has none."""
    dims = len(axes[0]) if axes else 0
    found = [0] * dims
    for tensor, own in zip(tensors(value), axes, strict=True):
        for k, axis in enumerate(own):
            found[k] = found[k] if axis is None else tensor.shape[axis]
    return tuple(found)


@torch.no_grad()
def try_sizes(
    steps: Sequence[Step], crossing: Mapping[Key, Tensor], grid: Sequence[int], size: Sequence[int]
) -> Trials:
    """Run steps at ``size`` units of the grid, and once per axis at half of it along that axis.

    Raises:
        RegionError: If a step does not take another size, flattens space or gives a size of its own.
    """
    values, axes = resized(crossing, grid, size)
    base = _run(steps, values, None, set())
    fixed: set[Key] = set()
    fixed_axes: dict[Key, list[int | None]] = {}
    less = []
    for k in range(len(grid)):
        shorter = [s - s // 2 if j == k else s for j, s in enumerate(size)]
        cut, _ = resized(crossing, grid, shorter)
        less.append(_run(steps, cut, base, fixed, fixed_axes, k))
    trials = Trials(base, less, fixed=fixed)
    for key in values:
        trials.axes[key] = [axes[key]]
    for step in steps:
        trials.axes[step.key] = _axes_of(step, base, less, fixed_axes)
    return trials


def _axes_of(
    step: Step, base: dict[Key, Any], less: list[dict[Key, Any]], fixed: dict[Key, list[int | None]]
) -> list[Axes]:
    if step.is_size:
        return []
    found = []
    for number, tensor in enumerate(tensors(base[step.key])):
        own: list[int | None] = [None] * len(less)
        for axis, whole in enumerate(tensor.shape):
            along = [k for k, run in enumerate(less) if tensors(run[step.key])[number].shape[axis] != whole]
            if len(along) > 1 or (along and own[along[0]] is not None):
                raise RegionError(
                    f"asked for regions; found that {step.where} lays the axes of the image into one "
                    "another, as attention does, so that no part of it can be run alone. Attach behind it.",
                    step,
                )
            if along:
                own[along[0]] = axis
        if step.key in fixed:
            own = [a if b is None else b for a, b in zip(own, fixed[step.key], strict=True)]
        found.append(tuple(own))
    whole_sizes: list[set[int]] = [set() for _ in less]
    for tensor, axes in zip(tensors(base[step.key]), found, strict=True):
        for sizes, own_axis in zip(whole_sizes, axes, strict=True):
            if own_axis is not None:
                sizes.add(tensor.shape[own_axis])
    if any(len(sizes) > 1 for sizes in whole_sizes):
        raise RegionError(
            f"asked for regions; found that {step.where} returns maps of several sizes at once. Attach "
            "behind it.",
            step,
        )
    return found


def _run(
    steps: Sequence[Step],
    crossing: Mapping[Key, Tensor],
    whole: dict[Key, Any] | None,
    fixed: set[Key],
    fixed_axes: dict[Key, list[int | None]] | None = None,
    k: int = 0,
) -> dict[Key, Any]:
    """Run all steps; kept are values as they were when they were made."""
    live: dict[Key, Any] = {key: twin(value) for key, value in crossing.items()}
    kept: dict[Key, Any] = {key: value.clone() for key, value in live.items()}
    foreign = set[Key]()
    for step in steps:
        if not step.is_size and not any(key in live and key not in foreign for key in step.reads):
            foreign.add(step.key)
        try:
            value = step.run(live.__getitem__)
        except Exception as error:
            cut = None if whole is None else _cut_foreign(step, live, whole, foreign)
            try:
                if cut is None or fixed_axes is None:
                    raise error
                value = step.run(lambda key, cut=cut: cut.get(key, live[key]))  # type: ignore[misc]
            except Exception:
                raise RegionError(
                    f"asked for regions; found that {step.where} does not take a part of a map "
                    f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Attach "
                    "behind it.",
                    step,
                ) from error
            for key, tensor in cut.items():
                fixed.add(key)
                own = fixed_axes.setdefault(key, [None] * (max(len(crossing), 1) and _dims(crossing)))
                for axis, (a, b) in enumerate(zip(tensor.shape, live[key].shape, strict=True)):
                    if a != b:
                        own[k] = axis
        live[step.key] = value
        kept[step.key] = rebuild(value, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
    return kept


def _dims(crossing: Mapping[Key, Tensor]) -> int:
    return max(value.dim() for value in crossing.values()) - 2


def _cut_foreign(
    step: Step, live: Mapping[Key, Any], whole: Mapping[Key, Any], foreign: set[Key]
) -> dict[Key, Tensor] | None:
    """Cut tensors that do not come from the cut, such as stored noise, like the map that they meet."""
    cut: dict[Key, Tensor] = {}
    maps = [key for key in step.reads if key not in foreign and isinstance(live[key], Tensor)]
    for key in step.reads:
        if key in foreign and isinstance(live[key], Tensor) and maps:
            now, before, tensor = live[maps[0]].shape, whole[maps[0]].shape, live[key]
            for back in range(1, min(len(now), tensor.dim()) + 1):
                if now[-back] < before[-back] == tensor.shape[-back]:
                    tensor = tensor.narrow(tensor.dim() - back, 0, now[-back])
            if tensor.shape != live[key].shape:
                cut[key] = tensor
    return cut or None


def size_rule(key: Key, step: Step, trials: Trials) -> Any:
    """Say how a size among a step's arguments follows the size of the map that the step returns.

    Returns:
        The size's structure, with a pair (axis of the image, share) for every number that follows it, and
        ``None`` for every number that is the same at all sizes.
    """
    runs = [trials.base, *trials.less]
    whole = [trials.sizes(step.key, run) for run in runs]
    rules: dict[tuple[Any, ...], tuple[int, float] | None] = {}
    for path, number in flatten(trials.base[key]):
        seen = [dict(flatten(run[key]))[path] for run in runs]
        if all(other == number for other in seen):
            rules[path] = None
            continue
        fits = [
            k
            for k in range(len(trials.less))
            if whole[0][k] and all(a * whole[0][k] == number * b[k] for a, b in zip(seen, whole, strict=True))
        ]
        if not fits:
            raise RegionError(
                f"asked for regions; found that {step.where} is handed a size that does not follow its map's:"
                f" {number} at {whole[0]}. Attach behind it.",
                step,
            )
        rules[path] = (fits[0], number / whole[0][fits[0]])
    return rules
