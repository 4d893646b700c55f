"""Start a sub-pixel branch in closed form: each layer is solved to give the backbone's map of the same size.

From coarse to fine, the layers of a grid get the maps that the backbone's stages return on this grid as targets, in
their order, or else finer ones, with the pixels of a cell as channels. Of a map's positive and negative parts the
channels are taken that explain most of the others. The last layer gets the image. Each is solved by least squares from
what the branch's own layers before it return. A grid on which no map fits keeps random layers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from retroexit.branch.branch import Reconstruction
from retroexit.branch.least_squares import design, draw_places, exact, least_squares, rows
from retroexit.branch.pixels import pixel_shuffle, pixel_unshuffle

__all__ = ["PLACES", "LayerSolver", "explaining_channels", "rectified", "solve_subpixel"]

logger = logging.getLogger(__name__)

PLACES = 4096


@torch.no_grad()
def solve_subpixel(
    branch: Any,
    full: nn.Module,
    stages: Sequence[str],
    values: Sequence[Tensor],
    guide: Tensor | None = None,
    *,
    places: int = PLACES,
    seed: int = 0,
) -> Reconstruction:
    """Solve the layers of a branch, in place.

    Args:
        branch: A `SubpixelBranch` with random layers; in eval mode.
        full: The full-width tail; it is not changed.
        stages: Paths of the tail's modules whose outputs are targets.
        values: Feature and live values of some samples. The last quarter of them only tests the result.
        guide: Their guide, where the branch takes one.
        places: Places (samples times positions) of each layer's output to solve for, at least.
        seed: Seed of the places, and of random operations in the tail.

    Returns:
        The result; where the image got worse, the branch has its previous weights.
    """
    count = int(values[0].shape[0])
    most = max(1, count - count // 4)
    parts = [slice(most), slice(most if most < count else 0, count)]
    samples, tests = ([v[p] if v.dim() and v.shape[0] == count else v for v in values] for p in parts)
    guides = [None if guide is None else guide[p] for p in parts]
    expected = _run_backbone(full, (), tests, branch, seed)[1]
    maps, image = _run_backbone(full, stages, samples, branch, seed)

    def error() -> float:
        missing = branch.image(tests, guides[1]) - expected
        return float(missing.float().square().mean() / (expected.float().var() + 1e-12))

    before, previous = error(), {name: value.clone() for name, value in branch.state_dict().items()}
    solver, solved = LayerSolver(places, torch.Generator().manual_seed(seed)), []
    x = branch.read(samples[0], guides[0])
    for number, level in enumerate(cast("Iterable[Any]", branch.levels)):
        size = tuple(s * factor for s, factor in zip(x.shape[2:], level.factors, strict=True))
        targets = [y for y in (_on_grid(m, size, branch.sizes.causal) for m in maps) if y is not None]
        targets = targets or [y for y in (_folded(m, size) for m in maps or [image]) if y is not None]
        targets = [rectified(y) for y in targets]
        solved += [f"levels.{number}"] * bool(targets)
        x = solver.solve_level(level, x, samples[1:], targets) if targets else level(x, samples[1:])
    size = tuple(s * factor for s, factor in zip(x.shape[2:], branch.sizes.last, strict=True))
    target = _on_grid(image, size, branch.sizes.causal)
    if target is None:
        target = functional.interpolate(image, size)
    solver.solve(branch.last, x, pixel_unshuffle(target, branch.sizes.last))
    result = Reconstruction((*solved, "last"), before, error())
    if not result.is_better:
        branch.load_state_dict(previous)
    logger.info("error of a branch, random %.4f, solved %.4f", before, result.after)
    return result


def _run_backbone(
    full: nn.Module, stages: Sequence[str], values: Sequence[Tensor], branch: Any, seed: int
) -> tuple[list[Tensor], Tensor]:
    """Run the tail; returns the maps that its stages return, and the image as ``(N, C, ...)``."""
    maps: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == values[0].dim() and len(output) == len(values[0]):
            maps.append(output.clone())  # later layers may write into it

    hooks = [full.get_submodule(path).register_forward_hook(keep) for path in stages]
    try:
        with torch.random.fork_rng(devices=[v.device for v in values[:1] if v.device.type == "cuda"]):
            torch.manual_seed(seed)
            output = full(*(value.clone() for value in values))
    finally:
        for hook in hooks:
            hook.remove()
    return maps, branch.output.image_of(output)


def _on_grid(x: Tensor, size: tuple[int, ...], is_causal: bool) -> Tensor | None:
    """Return a map if it has this size; one with fewer first frames, as of a causal decoder, with these repeated."""
    missing = [s - have for s, have in zip(size, x.shape[2:], strict=True)]
    if is_causal and 0 < missing[0] < size[0] and not any(missing[1:]):
        return functional.pad(x, (0, 0) * (len(size) - 1) + (missing[0], 0), mode="replicate")
    if all(0 <= m <= 1 for m in missing):  # an odd size
        return functional.pad(x, [p for m in reversed(missing) for p in (0, m)], mode="replicate")
    return None


def _folded(x: Tensor, size: tuple[int, ...]) -> Tensor | None:
    """Return a map that is finer by whole factors on the grid of this size, with more channels."""
    if any(have % s for have, s in zip(x.shape[2:], size, strict=True)):
        return None
    return pixel_unshuffle(x, tuple(have // s for have, s in zip(x.shape[2:], size, strict=True)))


def rectified(x: Tensor) -> Tensor:
    """Split a map with negative values into its positive and its negative part, since layers end in a ReLU."""
    return x if x.min() >= 0 else torch.cat([x.relu(), (-x).relu()], 1)


class LayerSolver:
    """Solves layers one after the other."""

    def __init__(self, places: int, generator: torch.Generator) -> None:
        self.places, self.generator = places, generator

    def solve_level(self, level: Any, x: Tensor, live: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
        """Solve the layers of a grid for maps in the order of the backbone, the last one last; return its output."""
        count, width = 1 + len(level.layers), level.layers[0].conv.out_channels
        chosen = [maps[-(-(i + 1) * len(maps) // count) - 1] for i in range(count)]
        targets = [m[:, explaining_channels(m, width)] for m in chosen]
        x = pixel_shuffle(self.solve(level.refine, x, pixel_unshuffle(targets[0], level.factors)), level.factors)
        x = functional.relu(level.add_live(x, live))
        for layer, target in zip(level.layers, targets[1:], strict=True):
            x = functional.relu(self.solve(layer, x, target))
        return x

    def solve(self, layer: Any, x: Tensor, target: Tensor) -> Tensor:
        """Solve a layer so that its first outputs are ``target`` ``(N, K, ...)``; return all outputs."""
        conv, x, size = layer.conv, layer.padded(x), target.shape[1]
        places = draw_places(conv, target, max(self.places, 2 * conv.weight[0].numel()), self.generator)
        read, outputs = design(conv, x, places).float(), rows(conv, target, places).float()
        mean, shift = read.mean(0), outputs.mean(0)
        solution = least_squares(read - mean, outputs - shift)[0]  # (I, K)
        conv.weight[:size] = solution.mT.reshape(conv.weight[:size].shape).to(conv.weight)
        conv.bias[:size] = (exact(shift) - exact(mean) @ solution).to(conv.bias)
        out: Tensor = conv(x)
        return out


def explaining_channels(x: Tensor, count: int) -> list[int]:
    """Choose channels of a map ``(N, C, ...)`` greedily, each the one that explains most of the variance left."""
    if count >= x.shape[1]:
        return list(range(x.shape[1]))
    values = exact(x.movedim(1, -1).reshape(-1, x.shape[1]).float())
    left, chosen = torch.cov(values.mT), list[int]()
    for _ in range(count):
        gain = left.square().sum(0) / left.diagonal().clamp_min(1e-12)
        gain[chosen] = -1.0
        best = int(gain.argmax())
        chosen.append(best)
        left = left - torch.outer(left[:, best], left[best]) / left[best, best].clamp_min(1e-12)
    return chosen
