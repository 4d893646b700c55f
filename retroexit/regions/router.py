"""Render images whose parts leave at different exits."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from retroexit.decoder.batches import merge
from retroexit.decoder.counting import MacCounter
from retroexit.decoder.structure import cloned, rebuild, tensors
from retroexit.errors import OptionError
from retroexit.regions.locality import Locality, find_locality
from retroexit.regions.planner import (
    Goal,
    Layout,
    Prices,
    choose_layout,
    intervals,
    rectangle_count,
)
from retroexit.regions.predictor import TilePredictor
from retroexit.regions.steps import Key
from retroexit.regions.tiles import areas, edges_of
from retroexit.regions.windows import Extents, Lines, Route, Span, measure_extents

if TYPE_CHECKING:
    from retroexit.decoder.split import Values
    from retroexit.model import EarlyExitGenerator

__all__ = ["Canvas", "RegionRouter", "check_goal"]

_MOST_RECTANGLES = 5_000


def check_goal(regions: bool | str) -> Goal:
    """Read the ``regions`` of a call.

    Raises:
        OptionError: If it is none of ``True``, ``"image"`` and ``"tiles"``.
    """
    if regions is True or regions == "image":
        return "image"
    if regions == "tiles":
        return "tiles"
    raise OptionError(
        f"asked for regions={regions!r}; found neither True (or 'image': the image's loss stays below the "
        "threshold) nor 'tiles' (the loss of every tile does).",
        regions,
    )


@dataclass
class Canvas:
    """What is known of images of one size.

    Attributes:
        edges: Where tiles begin and end, in pixels.
        area: Share of every tile in the image.
        prices: MACs of exits and rectangles, for one image.
        overhead: MACs of the tile predictor and of the drift guard, for one image.
        extents: Sizes and costs of all steps.
    """

    edges: list[list[int]]
    area: Tensor
    prices: Prices
    overhead: int
    extents: Extents
    spans: dict[Hashable, Span] = field(default_factory=dict)

    def span(self, key: tuple[int, int], route: Route, k: int, tiles: tuple[int, int]) -> Span:
        """Plan a run of tiles along an axis, once."""
        name = (key, k, tiles)
        if name not in self.spans:
            own = self.edges[k]
            self.spans[name] = route.span(k, (own[tiles[0]], own[tiles[1]]), self.extents)
        return self.spans[name]


@dataclass
class _Window:
    """A rectangle of one sample, ready to be made."""

    row: int
    pixels: tuple[Lines, ...]
    spans: list[Span]
    values: dict[Key, Tensor]


class RegionRouter(nn.Module):
    """Chooses exits per tile and renders them.

    Args:
        predictor: Expects the loss of every branch exit in every tile.

    Attributes:
        about: How well it expects, as measured when it was fitted.
    """

    def __init__(self, predictor: TilePredictor) -> None:
        super().__init__()
        self.predictor = predictor
        self.about: dict[str, Any] = {}
        self._locality: Locality | None = None
        self._canvases: dict[Hashable, Canvas] = {}
        self._lock = threading.RLock()
        self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionRouter:
        import copy

        duplicate = RegionRouter(copy.deepcopy(self.predictor, memo))
        duplicate.about = copy.deepcopy(self.about, memo)
        return duplicate

    def locality(self, model: EarlyExitGenerator) -> Locality:
        """Find out, once, what can be run on parts of an image.

        Raises:
            RegionError: If nothing can.
        """
        with self._lock:
            if self._locality is None:
                found = find_locality(model.split, list(model.branches))
                found.check()
                self._locality = found
            return self._locality

    # Choosing.

    @torch.no_grad()
    def expect(self, model: EarlyExitGenerator, *inputs: Any, **kwargs: Any) -> Tensor:
        """Expect the loss of every branch exit in every tile, ``(N, K, tiles...)``."""
        values, keyed = model.split.begin(inputs, kwargs)
        canvas = self.canvas(model, values, keyed, inputs, kwargs)
        found: Tensor = self.predictor(model.split.crossing(values, 0)[0], canvas.edges)
        return found

    def plan(
        self, model: EarlyExitGenerator, *inputs: Any, threshold: float, goal: Goal = "image", **kwargs: Any
    ) -> tuple[list[Layout], Canvas]:
        """Choose a layout for every sample, without rendering it."""
        with torch.no_grad():
            values, keyed = model.split.begin(inputs, kwargs)
            canvas = self.canvas(model, values, keyed, inputs, kwargs)
            layouts = self._layouts(model, values, canvas, threshold, goal)
            return self._guarded(model, layouts, canvas, values, keyed, inputs, kwargs)[0], canvas

    def _guarded(
        self,
        model: EarlyExitGenerator,
        layouts: Sequence[Layout],
        canvas: Canvas,
        values: Values,
        keyed: Tensor,
        args: Any,
        kwargs: dict[str, Any],
    ) -> tuple[list[Layout], Tensor]:
        """Give samples to the backbone that are unlike what predictor and bank have seen; tell which."""
        earliest = torch.tensor([min(e for e in (_base(x), _source(x)) if e >= 0) for x in layouts])
        far = model.unlike(values, keyed, args, kwargs, earliest + 1).cpu()
        count = len(model.branches)
        whole = Layout(count, count - 1, (), canvas.prices.fixed(count), 0.0)
        return [whole if strange else layout for layout, strange in zip(layouts, far, strict=True)], far

    def _layouts(
        self, model: EarlyExitGenerator, values: Values, canvas: Canvas, threshold: float, goal: Goal
    ) -> list[Layout]:
        losses = self.predictor(model.split.crossing(values, 0)[0], canvas.edges).double().cpu().numpy()
        area = canvas.area.double().numpy()
        return [choose_layout(own, area, canvas.prices, threshold, goal) for own in losses]

    # Rendering.

    @torch.no_grad()
    def route(
        self, model: EarlyExitGenerator, args: Any, kwargs: dict[str, Any], threshold: float, goal: Goal
    ) -> tuple[Any, Tensor]:
        """Render images; gives the output and the exit of every tile ``(N, tiles...)``, from 1.

        Raises:
            RegionError: If no part of this generator's images can be made alone.
        """
        values, keyed = model.split.begin(args, kwargs)
        canvas = self.canvas(model, values, keyed, args, kwargs)
        layouts = self._layouts(model, values, canvas, threshold, goal)
        layouts, far = self._guarded(model, layouts, canvas, values, keyed, args, kwargs)
        if model.drift.enabled:
            model.drift.note(far)
        return self.render(model, values, keyed, args, kwargs, layouts, canvas)

    @torch.no_grad()
    def render(
        self,
        model: EarlyExitGenerator,
        values: Values,
        keyed: Tensor,
        args: Any,
        kwargs: dict[str, Any],
        layouts: Sequence[Layout],
        canvas: Canvas,
    ) -> tuple[Any, Tensor]:
        """Render given layouts, from the values at the first cut."""
        count, split = len(model.branches), model.split
        depth = torch.tensor([max(_base(x), _source(x)) for x in layouts])
        base = torch.tensor([_base(layout) for layout in layouts])
        early = ((base >= 0) & (base < count)).nonzero()[:, 0]
        guide = model._guide(keyed, args, kwargs, early)
        rows = torch.arange(len(layouts))
        outputs: list[tuple[Tensor, Any]] = []
        windows: dict[Hashable, list[_Window]] = {}
        for index in range(count):
            if index:
                values = split.advance(values, index)
            here = (base[rows] == index).nonzero()[:, 0]
            if len(here):
                chosen = values if len(here) == len(rows) else split.select(values, here)
                own = None if guide is None else guide[torch.searchsorted(early, rows[here])]
                outputs.append((rows[here], model._leave(chosen, index, own)))
            for place, row in enumerate(rows.tolist()):
                if _source(layouts[row]) == index:
                    self._take(model, values, place, row, layouts[row], canvas, windows)
            stay = (depth[rows] > index).nonzero()[:, 0]
            if not len(stay):
                break
            if len(stay) < len(rows):
                values, rows = split.select(values, stay), rows[stay]
        else:
            outputs.append((rows, split.finish(values)))
        made = self._made(model, windows)
        empty = (base < 0).nonzero()[:, 0]
        if len(empty):  # the image is all of the output, see `_covers`
            blank = made[0][1].new_empty(len(empty), len(made[0][1]), *(own[-1] for own in canvas.edges))
            whole = split.decoder.recording.output
            outputs.append((empty, rebuild(whole, lambda x: blank if isinstance(x, Tensor) else x)))
        output = merge(outputs, len(layouts), split.output_rows)
        image = model.image(output)
        for window, pixels in made:
            image[window.row][(slice(None), *_slices(window.pixels))] = pixels
        return output, _exit_map(layouts, canvas)

    def _take(
        self,
        model: EarlyExitGenerator,
        values: Values,
        place: int,
        row: int,
        layout: Layout,
        canvas: Canvas,
        windows: dict[Hashable, list[_Window]],
    ) -> None:
        """Keep what a sample's rectangles need of the values at a cut."""
        own: dict[Key, Tensor] = {
            node: values[node][place : place + 1] if node in model.split.batched else values[node]
            for node in model.split.cuts[layout.source].crossing
        }
        for exit, rectangle in layout.parts:
            key = (layout.source, exit)
            route = self.locality(model).routes[key]
            spans = [canvas.span(key, route, k, tiles) for k, tiles in enumerate(rectangle)]
            pixels = tuple((canvas.edges[k][a], canvas.edges[k][b]) for k, (a, b) in enumerate(rectangle))
            window = _Window(row, pixels, spans, route.enter(spans, own))
            windows.setdefault((key, *(span.alike for span in spans)), []).append(window)

    def _made(
        self, model: EarlyExitGenerator, windows: Mapping[Hashable, list[_Window]]
    ) -> list[tuple[_Window, Tensor]]:
        """Make all rectangles, those that are alike together."""
        found: list[tuple[_Window, Tensor]] = []
        for name, alike in windows.items():
            route = self.locality(model).routes[name[0]]  # type: ignore[index]
            values = {}
            for key, first in alike[0].values.items():
                together = key in model.split.batched or any(a is not None for a in route.axes[key][0])
                values[key] = torch.cat([w.values[key] for w in alike]) if together else first.clone()
            found.extend(zip(alike, route.run(alike[0].spans, values), strict=True))
        return found

    # Sizes.

    def canvas(
        self, model: EarlyExitGenerator, values: Values, keyed: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Canvas:
        """Measure, once for every size, what exits and rectangles of an image cost."""
        shapes = tuple(tuple(value.shape[1:]) for value in model.split.crossing(values, 0))
        with self._lock:
            if shapes not in self._canvases:
                locality = self.locality(model)
                rows = torch.zeros(1, dtype=torch.long)
                one = model.split.select(values, rows)
                guide = model._guide(keyed, args, kwargs, rows)
                self._canvases[shapes] = self._measured(model, locality, cloned(one), guide)
            return self._canvases[shapes]

    def _measured(
        self, model: EarlyExitGenerator, locality: Locality, values: Values, guide: Tensor | None
    ) -> Canvas:
        split, count, extents = model.split, len(model.branches), Extents({}, {})
        feature = split.crossing(values, 0)[0]
        size: tuple[int, ...] = ()
        trunk, whole = [0], [0] * (count + 1)
        behind: dict[int, int] = {}
        for index in range(count):
            if index:
                with MacCounter() as counter:
                    values = split.advance(values, index)
                trunk.append(trunk[-1] + counter.macs)
            crossing: dict[Key, Tensor] = {node: values[node] for node in split.cuts[index].crossing}
            for target in {index, count}:
                if (index, target) in locality.routes and (target < count or not behind):
                    macs = measure_extents(locality.routes[index, target], crossing, extents)
                    behind |= {index: macs} if target == count else {}
            with MacCounter() as counter:
                size = tuple(model.image(model._leave(values, index, guide)).shape[2:])
            whole[index] = counter.macs
        with MacCounter() as counter:
            split.finish(values)
        whole[count] = counter.macs
        # What runs in front of the first cut is counted for the recorded size; it grows as the feature does.
        share = feature[0].numel() / prod(model.anatomy.feature_shape)
        trunk = [n + round(share * _before(model)) for n in trunk]
        tile = self.predictor.tile
        while rectangle_count([-(-n // tile) for n in size]) > _MOST_RECTANGLES:
            tile *= 2
        edges = edges_of(size, tile)
        with MacCounter() as counter:
            self.predictor(feature, edges)
        guard = 0 if model.predictor is None else model.anatomy.predictor_macs(model.predictor)
        rectangles = {key: _prices(route, edges, extents) for key, route in locality.routes.items()}
        prices = Prices(trunk, whole, rectangles, covers=_covers(model))
        return Canvas(edges, areas(edges), prices, counter.macs + guard, extents)


def _before(model: EarlyExitGenerator) -> int:
    """MACs in front of the first cut, for one sample of the recorded size."""
    nodes = model.split.decoder.recording.nodes[: model.split.cuts[0].position]
    return sum(int(node.meta.get("macs", 0)) for node in nodes) // model.split.batch


def _prices(route: Route, edges: Sequence[Sequence[int]], extents: Extents) -> Any:
    """MACs of every rectangle: what a step costs is a product over the axes."""
    steps = [(i, extents.macs[step.key]) for i, step in enumerate(route.steps) if not step.is_size]
    table = np.array([float(macs) for _, macs in steps])
    for k, own in enumerate(edges):
        rows = []
        for first, end in intervals(len(own) - 1):
            span = route.span(k, (own[first], own[end]), extents)
            rows.append([float(span.moves[i].share) for i, _ in steps])
        table = table[..., None, :] * np.array(rows)
    return np.maximum(table.sum(-1), 1.0)


def _covers(model: EarlyExitGenerator) -> bool:
    """Tell whether the image is all of an output, so that it can be put together of parts alone."""
    split = model.split
    output = split.decoder.recording.output
    leaves = tensors(output)
    return len(leaves) == 1 and leaves[0] is split.place_of(output) and split.output_rows == [1]


def _base(layout: Layout) -> int:
    return -1 if layout.base is None else layout.base


def _source(layout: Layout) -> int:
    return layout.source if layout.parts else -1


def _exit_map(layouts: Sequence[Layout], canvas: Canvas) -> Tensor:
    """Exit of every tile, from 1."""
    shape = canvas.area.shape
    return torch.stack([torch.from_numpy(layout.exits(shape)) for layout in layouts]) + 1


def _slices(rectangle: Sequence[Lines]) -> tuple[slice, ...]:
    return tuple(slice(first, end) for first, end in rectangle)
