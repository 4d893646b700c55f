"""A branch that works on coarse grids and makes the image by pixel shuffle (ESPCN, CVPR 2016). Not in the paper.

A thin copy spends most of its time at full resolution on few channels, where a processor waits for memory. Here
no layer runs at full resolution, and nothing is taken from the tail but the shape of its image, so that this
branch exists wherever the generator can be cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from retroexit.branch.branch import Branch, GuideEntry, Reconstruction
from retroexit.branch.builder import BranchSpec
from retroexit.branch.output import Output, causal_frames, grown_pixels
from retroexit.branch.pixels import pixel_shuffle, pixel_unshuffle
from retroexit.branch.subpixel_sizes import Level, SubpixelPlan, choose_sizes
from retroexit.branch.subpixel_start import solve_subpixel
from retroexit.core.modules import MacCounter
from retroexit.split.segments import Tail
from retroexit.stages.decoder import Cut

_CONVOLUTION: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MOST_NUMBERS = 8192  # of a live vector; longer ones are averaged over their middle axes
_START = 0.1  # of the usual size, for weights of what starts near zero


class Convolution(nn.Module):
    """A convolution that keeps the size, and whose first axis looks only back if it is causal."""

    def __init__(self, channels: int, out_channels: int, axes: int, causal: bool, kernel: int = 3) -> None:
        super().__init__()
        padding = (0,) * causal + (kernel // 2,) * (axes - causal)
        self.conv = _CONVOLUTION[axes](channels, out_channels, kernel, padding=padding)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)
        self.pad = (0, 0) * (axes - 1) + (2, 0) if causal and kernel > 1 else ()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, ...)`` to ``(N, out_channels, ...)``."""
        out: Tensor = self.conv(self.padded(x))
        return out

    def padded(self, x: Tensor) -> Tensor:
        """Add the frames before the first one, if it is causal."""
        return functional.pad(x, self.pad) if self.pad else x


class _LiveValues(nn.Module):
    """Adds what all live maps say to the channels of a level; scales and shifts them by what all vectors say.

    Args:
        maps: Live maps: position -> channels, and factors by which they are made coarser.
        vectors: Live vectors: position -> how many numbers.
        width: Channels of the level.
        axes: Spatial axes.
    """

    def __init__(
        self, maps: Mapping[int, tuple[int, tuple[int, ...]]], vectors: Mapping[int, int], width: int, axes: int
    ) -> None:
        super().__init__()
        self.maps, self.vectors = {position: factors for position, (_, factors) in maps.items()}, list(vectors)
        channels = sum(count * math.prod(factors) for count, factors in maps.values())
        self.map = _CONVOLUTION[axes](channels, width, 1, bias=False) if maps else None
        self.vector = nn.Linear(sum(vectors.values()), 2 * width) if vectors else None
        for layer in filter(None, (self.map, self.vector)):
            layer.weight.data.mul_(_START)
        if self.vector is not None:
            self.vector.bias.data.zero_()

    def forward(self, x: Tensor, live: Sequence[Tensor]) -> Tensor:
        """Change ``x`` ``(N, C, ...)`` by live values of any shapes."""
        if self.map is not None:
            x = x + self.map(torch.cat([_on_grid(live[i], x, factors) for i, factors in self.maps.items()], 1))
        if self.vector is not None:
            changes = self.vector(torch.cat([_as_vector(live[i].to(x.dtype)) for i in self.vectors], 1))
            gain, shift = changes.view(*changes.shape, *(1,) * (x.dim() - 2)).chunk(2, 1)
            x = x * (1 + gain) + shift
        return x


def _on_grid(value: Tensor, x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Bring a live map to the grid and the type of ``x``, pixels of a cell as channels."""
    value = value if value.dim() == x.dim() else value[:, None]
    value = pixel_unshuffle(value.to(x.dtype), factors)
    if value.shape[2:] != x.shape[2:]:
        value = functional.interpolate(value, size=x.shape[2:], mode="nearest")
    return value


def _as_vector(value: Tensor) -> Tensor:
    """Flatten a live value to ``(N, D)``."""
    if value[0].numel() <= _MOST_NUMBERS:
        return value.reshape(value.shape[0], -1)
    return value.flatten(1, -2).mean(1)


class _Level(nn.Module):
    """One grid of a branch: refine, add live values, convolve."""

    def __init__(self, channels: int, level: Level, live: _LiveValues | None, causal: bool, kernel: int = 3) -> None:
        super().__init__()
        axes, width = len(level.factors), level.width
        self.factors = level.factors
        self.refine = Convolution(channels, width * math.prod(level.factors), axes, causal, kernel)
        self.live = live
        self.layers = nn.ModuleList(Convolution(width, width, axes, causal) for _ in range(level.depth))

    def forward(self, x: Tensor, live: Sequence[Tensor]) -> Tensor:
        """Map ``(N, C, ...)`` to ``(N, width, ...)`` on the finer grid."""
        x = functional.relu(self.add_live(pixel_shuffle(self.refine(x), self.factors), live))
        for layer in self.layers:
            x = functional.relu(layer(x))
        return x

    def add_live(self, x: Tensor, live: Sequence[Tensor]) -> Tensor:
        """Change ``x`` by live values, where the level takes any."""
        return x if self.live is None else self.live(x, live)


class SubpixelBranch(Branch):
    """A branch of convolutions on coarse grids and pixel shuffles, in one, two or three spatial dimensions.

    Attributes:
        entry: Resizes the guide and concatenates it to the feature, where the branch takes one.
        levels: The grids from coarse to fine.
        last: The convolution in front of the last pixel shuffle; its bias starts as the mean colour.
        plan: The chosen sizes, as JSON types.
    """

    kind, lr = "subpixel", 2e-3

    def __init__(self, plan: SubpixelPlan, values: Sequence[Tensor], spec: BranchSpec, output: Output) -> None:
        super().__init__(asdict(plan))
        feature, guide, axes = values[0], spec.guide, len(plan.last)
        self.sizes, self.output, self.init = plan, output, spec.init
        channels, size = int(feature.shape[1]), tuple(feature.shape[2:])
        self.entry: GuideEntry | None = None
        if guide is not None:
            self.entry = GuideEntry(channels, None, size, guide, min(guide.channels, channels))
            channels += self.entry.guide_channels
        channels *= math.prod(plan.fold)
        grid = tuple(-(-s // fold) for s, fold in zip(size, plan.fold, strict=True))
        grids = []
        for level in plan.levels:
            grid = tuple(s * factor for s, factor in zip(grid, level.factors, strict=True))
            grids.append(grid)
        levels = []
        for number, level in enumerate(plan.levels):
            live = _live_values(values, number, grids, level.width, plan.causal)
            levels.append(_Level(channels, level, live, plan.causal, 3 if number else plan.kernel))
            channels = level.width
        self.levels = nn.ModuleList(levels)
        self.last = Convolution(channels, output.channels * math.prod(plan.last), axes, plan.causal)

    @property
    def widths(self) -> list[int]:
        """Channels of every grid, from coarse to fine."""
        return [level.width for level in self.sizes.levels]

    def forward(self, feature: Tensor, *live: Tensor, guide: Tensor | None = None) -> Any:
        """Render the image, in the structure of the generator's output with ``None`` for its other tensors.

        See `Branch.forward`.
        """
        return self.output.place(self.image((feature, *live), guide), live)

    def read(self, feature: Tensor, guide: Tensor | None) -> Tensor:
        """What the first level reads, on a CPU with channels last: its convolutions are up to twice as fast so."""
        x = feature if self.entry is None else self.entry(feature, guide)
        x = pixel_unshuffle(x, self.sizes.fold)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and x.device.type == "cpu" else x

    def image(self, values: Sequence[Tensor], guide: Tensor | None) -> Tensor:
        """Render the image ``(N, C, ...)``."""
        x = self.read(values[0], guide)
        for level in self.levels:
            x = level(x, values[1:])
        image = pixel_shuffle(self.last(x), self.sizes.last)
        return self.output.fitted(image, values[0], self.sizes).contiguous()

    def start(
        self, full: Tail, stages: Sequence[str], values: Sequence[Tensor], guide: Tensor | None, seed: int
    ) -> Reconstruction | None:
        """Solve the layers in closed form, see `retroexit.branch.subpixel_start`; not with ``init="scratch"``."""
        if self.init == "scratch":
            return None
        return solve_subpixel(self, full, stages, values, guide, seed=seed)

    @torch.no_grad()
    def start_at(self, colour: Tensor) -> None:
        """Start with images of one colour ``(C,)``, and a small last layer."""
        conv = self.last.conv
        conv.weight.mul_(_START)
        conv.bias.copy_(colour.repeat_interleave(math.prod(self.sizes.last)))


def _live_values(
    values: Sequence[Tensor], number: int, grids: Sequence[tuple[int, ...]], width: int, causal: bool
) -> _LiveValues | None:
    """Choose what level ``number`` takes: all vectors, and maps for which it is the first fine enough."""
    feature, maps, vectors = values[0], dict[int, tuple[int, tuple[int, ...]]](), dict[int, int]()
    for position, value in enumerate(values[1:]):
        if value.dim() == 0 or value.is_complex() or value.shape[0] != feature.shape[0] or not value.numel():
            continue  # a number or a constant
        size = tuple(value.shape[2:])
        if value.dim() == feature.dim() - 1 and tuple(value.shape[1:]) in {tuple(feature.shape[2:]), *grids}:
            value, size = value[:, None], tuple(value.shape[1:])  # labels without a channel axis
        if value.dim() != feature.dim() or max(size) == 1:
            vectors[position] = _as_vector(value).shape[1]
            continue
        fits = [i for i, grid in enumerate(grids) if all(s <= g for s, g in zip(size, grid, strict=True))]
        if number == (fits[0] if fits else len(grids) - 1):
            pairs = enumerate(zip(size, grids[number], strict=True))
            whole = [s // g if s % g == 0 and not (causal and axis == 0) else 1 for axis, (s, g) in pairs]
            maps[position] = int(value.shape[1]), tuple(whole)
    return _LiveValues(maps, vectors, width, feature.dim() - 2) if maps or vectors else None


def build_subpixel(
    tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec, plan: Mapping[str, Any] | None = None
) -> SubpixelBranch:
    """Make a sub-pixel branch for an attach point; arguments as for `retroexit.branch.builder.build_branch`.

    Without ``spec.macs`` it costs at most what a thin copy costs at the scale of ``spec.rule`` if all its widths
    follow the rule.

    Raises:
        BranchError: If the image has other axes than the feature, or the target is too small.
    """
    feature = values[0]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        returned = tail(*(value.clone() for value in values))
    output = Output.of(returned, feature, spec)
    output = replace(output, steps=grown_pixels(tail, values, spec, output))
    image = output.image_of(returned)
    meta = [value.to("meta") for value in values]

    def make(plan: SubpixelPlan) -> SubpixelBranch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            return SubpixelBranch(plan, values, spec, output)

    def count(plan: SubpixelPlan) -> int:
        with torch.device("meta"):
            branch = SubpixelBranch(plan, values, spec, output).to(feature.dtype)
        return _count(branch, meta, spec)

    if plan is None:
        target = spec.macs if spec.macs is not None else _scaled_macs(tail, values, spec)
        frames = causal_frames(tail, values, spec, image, output)
        ratios = output.ratios if frames is None else (frames, *output.ratios[1:])
        sizes = choose_sizes(target, ratios, count, causal=frames is not None)
    else:
        sizes = SubpixelPlan.from_json(plan)
    branch = make(sizes)
    branch.to(device=feature.device, dtype=feature.dtype)
    branch.start_at(image.flatten(2).mean((0, 2)))
    branch.macs, branch.is_fresh = _count(branch, values, spec), plan is None
    return branch.eval()


@torch.no_grad()
def _count(branch: SubpixelBranch, values: Sequence[Tensor], spec: BranchSpec) -> int:
    guide = spec.guide
    zeros = None if guide is None else values[0].new_zeros(values[0].shape[0], guide.channels, *guide.size)
    with MacCounter() as counter:
        branch(*values, guide=zeros)
    return counter.macs


@torch.no_grad()
def _scaled_macs(tail: Tail, values: Sequence[Tensor], spec: BranchSpec) -> float:
    """MACs of a tail whose layers all have the widths of the rule."""
    full, thin = 0.0, 0.0

    def hook(module: Any, _args: Any, output: Tensor) -> None:
        nonlocal full, thin
        sizes = module.weight.shape[:2]
        macs = output.numel() * module.weight[0].numel()
        full += macs
        thin += macs * math.prod(min(1.0, spec.rule(int(size)) / size) for size in sizes)

    layers = [m for m in tail.modules() if isinstance(m, (nn.Linear, *_CONVOLUTION.values()))]
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        with MacCounter() as counter:
            tail(*(value.clone() for value in values))
    finally:
        for handle in hooks:
            handle.remove()
    return counter.macs * (thin / full if full else spec.rule.scale**2)
