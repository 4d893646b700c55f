"""A branch that works on coarse grids and makes the image by pixel shuffle (ESPCN, CVPR 2016). Not in the paper.

A thin copy spends most of its time at full resolution on few channels, where a processor waits for memory. Here
no layer runs at full resolution, and nothing is taken from the tail but the shape of its image, so that this
branch exists wherever the generator can be cut.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from retroexit.branch.branch import Branch, GuideEntry, Reconstruction
from retroexit.branch.builder import BranchSpec
from retroexit.branch.pixels import pixel_shuffle, pixel_unshuffle
from retroexit.branch.subpixel_start import solve_subpixel
from retroexit.core.modules import MacCounter
from retroexit.core.nested import flatten, rebuild
from retroexit.errors import BranchError
from retroexit.split.segments import Tail
from retroexit.stages.decoder import Cut

__all__ = [
    "Convolution",
    "Level",
    "Output",
    "SubpixelBranch",
    "SubpixelPlan",
    "build_subpixel",
    "causal_frames",
    "choose_sizes",
]

_CONVOLUTION: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MOST_NUMBERS = 8192  # of a live vector; longer ones are averaged over their middle axes
_WIDEST = 1024
_START = 0.1  # of the usual size, for weights of what starts near zero


@dataclass(frozen=True)
class Level:
    """A grid that a branch works on: ``factors`` finer than the one before, ``depth`` convolutions at it."""

    factors: tuple[int, ...]
    width: int
    depth: int


@dataclass(frozen=True)
class SubpixelPlan:
    """Sizes of a sub-pixel branch.

    Attributes:
        fold: Factors by which the feature's grid is made coarser first, where it is as fine as the image.
        levels: The grids, from coarse to fine.
        last: Factors of the last pixel shuffle, to the image.
        causal: Whether no frame may depend on later ones.
        kernel: Of the convolution that reads the feature.
    """

    fold: tuple[int, ...]
    levels: tuple[Level, ...]
    last: tuple[int, ...]
    causal: bool = False
    kernel: int = 3

    @property
    def ratios(self) -> tuple[int, ...]:
        """Pixels of the image per pixel of the feature, per axis."""
        factors = zip(*(level.factors for level in self.levels), self.last, strict=True)
        return tuple(math.prod(f) // fold for f, fold in zip(factors, self.fold, strict=True))

    @property
    def is_folded(self) -> bool:
        """Whether the feature's grid is made coarser first."""
        return max(self.fold) > 1

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> SubpixelPlan:
        """Read what `dataclasses.asdict` made."""
        levels = tuple(Level(tuple(v["factors"]), v["width"], v["depth"]) for v in saved["levels"])
        return cls(tuple(saved["fold"]), levels, tuple(saved["last"]), saved["causal"], saved["kernel"])


def choose_sizes(
    macs: float, ratios: Sequence[int], count: Callable[[SubpixelPlan], int], *, causal: bool = False
) -> SubpixelPlan:
    """Choose the grids of a branch, and the largest widths that cost at most ``macs``.

    The grids halve (divide by the smallest prime factor) from the image down to the feature: 1/2, 1/4, ... Each has
    one convolution. The finest has a multiple of 16 channels, the blocks that processors work on; the coarser ones have
    up to three times as many, as is left for them. A single grid has a multiple of 8 channels, and up to five
    convolutions: at least three of more than 16 channels. Where that costs too much, the finest grid has 1 to 8
    channels. Where the feature is as fine as the image, its grid is halved first. Where even one channel costs too
    much, as with many channels in front of a cheap tail, the feature is read by a 1x1 convolution.

    Args:
        macs: Largest number of multiply-accumulates of the branch.
        ratios: Size of the image divided by the feature's, per axis, ``>= 1``.
        count: Counts the multiply-accumulates of the branch with some sizes.
        causal: Whether the first axis is time, and no frame may depend on later ones.

    Raises:
        BranchError: If the narrowest branch costs more.
    """
    axes = len(ratios)
    fold = (1,) * axes
    if max(ratios) == 1:
        fold = tuple(1 if causal and axis == 0 else 2 for axis in range(axes))
    primes = [_prime_factors(ratio * folded) for ratio, folded in zip(ratios, fold, strict=True)]
    shuffles = [tuple(p[i] if i < len(p) else 1 for p in primes) for i in range(max(1, *map(len, primes)))]
    last, *finer = shuffles
    finer = finer[::-1] or [(1,) * axes]  # from coarse to fine
    coarse = len(finer) - 1

    def plan(width: int, more: int = 0, kernel: int = 3) -> SubpixelPlan:
        """Sizes with this width, and so many steps of the coarser grids' width, or of the single one's depth."""
        widths = [*[width + 8 * more] * coarse, width]
        depths = [1] * (coarse + 1) if coarse else [(1 if width <= 16 else 3) + more]
        return SubpixelPlan(fold, tuple(map(Level, finer, widths, depths)), last, causal, kernel)

    kernel = 3 if count(plan(1)) <= macs else 1
    least = count(plan(1, kernel=kernel))
    if least > macs:
        raise BranchError(
            f"a sub-pixel branch here costs at least {least:,} MACs, got a limit of {max(0, round(macs)):,} behind "
            "the attach point. Pass a larger macs or scale, or attach elsewhere."
        )
    step = 16 if coarse else 8
    widths = [*range(1, 9), *range(16, _WIDEST + 1, step)]
    width = widths[bisect_right(widths, macs, key=lambda w: count(plan(w, kernel=kernel))) - 1]
    steps = range(width // 4 + 1 if coarse else 5 if width <= 16 else 3)
    more = bisect_right(steps, macs, key=lambda n: count(plan(width, n, kernel))) - 1
    return plan(width, more, kernel)


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


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


class _LiveMap(nn.Module):
    """Projects a live map to the channels and the grid of a level."""

    def __init__(self, channels: int, out_channels: int, factors: tuple[int, ...]) -> None:
        super().__init__()
        self.factors = factors
        self.project = _CONVOLUTION[len(factors)](channels * math.prod(factors), out_channels, 1, bias=False)
        self.project.weight.data.mul_(_START)

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """Add a projection of ``value`` ``(N, C, ...)`` to ``x``."""
        value = value if value.dim() == x.dim() else value[:, None]
        value = pixel_unshuffle(value.to(x.dtype), self.factors)
        if value.shape[2:] != x.shape[2:]:
            value = functional.interpolate(value, size=x.shape[2:], mode="nearest")
        return x + self.project(value)


class _LiveVector(nn.Module):
    """Scales and shifts the channels of a level by what a live vector says."""

    def __init__(self, numbers: int, out_channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(numbers, 2 * out_channels)
        self.project.weight.data.mul_(_START)
        self.project.bias.data.zero_()

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """Modulate ``x`` ``(N, C, ...)`` by ``value`` ``(N, ...)``."""
        changes = self.project(_as_vector(value.to(x.dtype)))
        gain, shift = changes.view(*changes.shape, *(1,) * (x.dim() - 2)).chunk(2, 1)
        return x * (1 + gain) + shift


def _as_vector(value: Tensor) -> Tensor:
    """Flatten a live value to ``(N, D)``."""
    if value[0].numel() <= _MOST_NUMBERS:
        return value.reshape(value.shape[0], -1)
    return value.flatten(1, -2).mean(1)


class _Level(nn.Module):
    """One grid of a branch: refine, add live values, convolve."""

    def __init__(
        self, channels: int, level: Level, live: Mapping[int, nn.Module], causal: bool, kernel: int = 3
    ) -> None:
        super().__init__()
        axes, width = len(level.factors), level.width
        self.factors = level.factors
        self.refine = Convolution(channels, width * math.prod(level.factors), axes, causal, kernel)
        self.live = nn.ModuleDict({str(position): entry for position, entry in live.items()})
        self.layers = nn.ModuleList(Convolution(width, width, axes, causal) for _ in range(level.depth))

    def forward(self, x: Tensor, live: Sequence[Tensor]) -> Tensor:
        """Map ``(N, C, ...)`` to ``(N, width, ...)`` on the finer grid."""
        x = functional.relu(self.add_live(pixel_shuffle(self.refine(x), self.factors), live))
        for layer in self.layers:
            x = functional.relu(layer(x))
        return x

    def add_live(self, x: Tensor, live: Sequence[Tensor]) -> Tensor:
        """Add what live values say to ``x``."""
        for position, entry in self.live.items():
            x = entry(x, live[int(position)])
        return x


class ImageSlot:
    """Marks the image in the structure of an output."""


@dataclass(frozen=True)
class Output:
    """What the generator returns: its structure, and the image's size, in one recorded call.

    Attributes:
        path: Where the image is in the output.
        template: The output with `ImageSlot` as its image and without other tensors.
        channels: Channels of the image.
        is_squeezed: Whether the image lacks the axis of channels.
        dtype: Type of the image.
        sizes: Size of the image and of the feature, per axis.
        frames: For a feature whose rows are the frames of samples, and an image that has them on an axis of its own:
            this axis, the number of frames, and the position of a live value with a row per sample, if any.
        steps: Pixels of the image that one more of the feature adds, per axis, where that is a whole number.
    """

    path: tuple[Any, ...]
    template: Any
    channels: int
    is_squeezed: bool
    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]
    frames: tuple[int, int, int | None] | None = None
    steps: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, output: Any, feature: Tensor, spec: BranchSpec) -> Output:
        """Read an output of the generator for a feature.

        Raises:
            BranchError: If the image has other axes or rows than the feature.
        """
        original: Tensor = dict(flatten(output))[spec.image]
        frames, image = _frames(original, feature, spec.rows), original
        if frames is not None:
            image = _side_by_side(original, frames[0])
        is_squeezed = image.dim() == feature.dim() - 1
        if image.shape[0] != feature.shape[0] or (image.dim() != feature.dim() and not is_squeezed):
            raise BranchError(
                f"a sub-pixel branch needs an image with the axes of the feature, got {tuple(original.shape)} for "
                f"{tuple(feature.shape)}. Pass branch='copy' here."
            )
        template = rebuild(output, lambda leaf: _slot(leaf, original))
        sizes = tuple(zip(image.shape[1 if is_squeezed else 2 :], feature.shape[2:], strict=True))
        channels = 1 if is_squeezed else int(image.shape[1])
        return cls(spec.image, template, channels, is_squeezed, image.dtype, sizes, frames, steps=(None,) * len(sizes))

    @property
    def ratios(self) -> tuple[int, ...]:
        """What one more pixel of the feature adds, else the image's size divided by the feature's, rounded up."""
        return tuple(step or -(-large // small) for step, (large, small) in zip(self.steps, self.sizes, strict=True))

    def image_of(self, output: Any) -> Tensor:
        """Find the image ``(N, C, ...)`` in an output of the generator."""
        image: Tensor = dict(flatten(output))[self.path]
        image = image if self.frames is None else _side_by_side(image, self.frames[0])
        return image.unsqueeze(1) if self.is_squeezed else image

    def fitted(self, image: Tensor, feature: Tensor, plan: SubpixelPlan) -> Tensor:
        """Give an image ``(N, C, ...)`` the size that the generator's image has for a feature.

        Per axis, what is less than one ``step`` too large is cut at the end, in front for causal frames; any other size
        is reached by interpolation.
        """
        size, is_resized = list(image.shape[2:]), False
        for axis, (ratio, step, (large, small)) in enumerate(zip(plan.ratios, self.steps, self.sizes, strict=True)):
            crop, length = ratio * small - large, feature.shape[2 + axis]
            is_cropped = step in (None, ratio) and 0 <= crop < ratio
            if is_cropped:
                size[axis] = ratio * length - crop
                if crop or plan.is_folded:  # a folded grid was rounded up
                    begin = crop if plan.causal and axis == 0 else 0
                    image = image.narrow(2 + axis, begin, size[axis])
            else:
                size[axis] = length * large // small if step is None else large + step * (length - small)
                is_resized = True
        if is_resized:
            mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
            image = functional.interpolate(image, size=size, mode=mode)
        return image

    def place(self, image: Tensor, live: Sequence[Tensor]) -> Any:
        """Put an image ``(N, C, ...)`` where the generator has it."""
        image = image.squeeze(1) if self.is_squeezed else image
        if self.frames is not None:
            axis, count, position = self.frames
            rows = (-1, count) if position is None else (live[position].shape[0], -1)
            image = image.unflatten(0, rows).movedim(1, axis)
        image = image.to(self.dtype) if self.dtype != image.dtype and not torch.is_autocast_enabled() else image
        return rebuild(self.template, lambda leaf: image if leaf is ImageSlot else leaf)


def _frames(image: Tensor, feature: Tensor, rows: Sequence[int]) -> tuple[int, int, int | None] | None:
    """See `Output.frames`; ``rows`` are those of one sample in the feature and the live values."""
    count = rows[0] if rows else 1
    axes = [axis for axis in (2, 1) if image.dim() == feature.dim() + 1 and image.shape[axis] == count]
    if count < 2 or not axes or image.shape[0] * count != feature.shape[0]:
        return None
    return axes[0], count, next((i for i, n in enumerate(rows[1:]) if n == 1), None)


def _side_by_side(image: Tensor, axis: int) -> Tensor:
    """Put the frames of samples, on an axis of their own, among the rows: ``(N T, C, ...)``."""
    return image.movedim(axis, 1).flatten(0, 1)


def _slot(leaf: Any, image: Tensor) -> Any:
    if leaf is image:
        return ImageSlot
    return None if isinstance(leaf, Tensor) else leaf


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
            live = _live_entries(values, number, grids, level.width, plan.causal)
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


def _live_entries(
    values: Sequence[Tensor], number: int, grids: Sequence[tuple[int, ...]], width: int, causal: bool
) -> dict[int, nn.Module]:
    """Make the entries of level ``number``: of all vectors, and of maps for which it is the first fine enough."""
    feature, entries = values[0], dict[int, nn.Module]()
    for position, value in enumerate(values[1:]):
        if value.dim() == 0 or value.is_complex() or value.shape[0] != feature.shape[0] or not value.numel():
            continue  # a number or a constant
        size = tuple(value.shape[2:])
        if value.dim() == feature.dim() - 1 and tuple(value.shape[1:]) in {tuple(feature.shape[2:]), *grids}:
            value, size = value[:, None], tuple(value.shape[1:])  # labels without a channel axis
        if value.dim() != feature.dim() or max(size) == 1:
            entries[position] = _LiveVector(_as_vector(value).shape[1], width)
            continue
        fits = [i for i, grid in enumerate(grids) if all(s <= g for s, g in zip(size, grid, strict=True))]
        if number == (fits[0] if fits else len(grids) - 1):
            pairs = enumerate(zip(size, grids[number], strict=True))
            whole = [s // g if s % g == 0 and not (causal and axis == 0) else 1 for axis, (s, g) in pairs]
            entries[position] = _LiveMap(int(value.shape[1]), width, tuple(whole))
    return entries


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
    output = replace(output, steps=_steps(tail, values, spec, output))
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


@torch.no_grad()
def _steps(tail: Tail, values: Sequence[Tensor], spec: BranchSpec, output: Output) -> tuple[int | None, ...]:
    """Pixels of the image that one more of the feature adds, per axis, from a run on half of its maps.

    ``None`` for a tail that runs on no other size, and where the image is not larger by a whole number.
    """
    old = tuple(values[0].shape[2:])
    new = tuple(-(-size // 2) if size > 1 else 2 for size in old)

    def resized(value: Tensor) -> Tensor:
        axes = value.dim() - len(old)  # a map without channels has one
        if axes not in (1, 2) or any(size % n for size, n in zip(value.shape[axes:], old, strict=True)):
            return value.clone()
        for axis, (size, n, m) in enumerate(zip(value.shape[axes:], old, new, strict=True), axes):
            value = value.index_select(axis, torch.arange(size // n * m, device=value.device) % size)
        return value

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            image = output.image_of(tail(*map(resized, values)))
    except Exception:
        return output.steps
    grown = [(a - large, m - n) for a, (large, _), n, m in zip(image.shape[2:], output.sizes, old, new, strict=True)]
    return tuple(None if pixels % steps else pixels // steps for pixels, steps in grown)


@torch.no_grad()
def causal_frames(tail: Tail, values: Sequence[Tensor], spec: BranchSpec, image: Tensor, output: Output) -> int | None:
    """Change the last frame of everything, and see which frames of the image change.

    The first axis of one- and three-dimensional maps is taken as time.

    Returns:
        Frames of the image per frame of the feature, where no frame depends on later ones, else ``None``.
    """
    large, small = output.sizes[0]
    if len(output.sizes) == 2 or small < 2:
        return None
    changed = [value.clone() for value in values]
    for value in changed:
        if value.dim() == values[0].dim() and value.shape[2] >= small and value.is_floating_point():
            last = value.shape[2] // small
            value[:, :, -last:] = value[:, :, -last:] * 0.5 + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        other = output.image_of(tail(*changed))
    distance = (other - image).abs().movedim(2, 0).flatten(1).amax(1) > 1e-5 * image.abs().max()
    frames = int(distance.flip(0).nonzero().max()) + 1 if bool(distance.any()) else 0
    # As many frames for each, or one for the first.
    return frames if frames and frames * small - large in (0, frames - 1) else None
