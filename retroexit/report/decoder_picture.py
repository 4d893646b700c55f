"""A picture of a decoder: its stages as a chain, their costs, and the live values between them.

All positions are inches from the lower left corner of one sheet. Equal stages give an equal file.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from retroexit.errors import MissingExtraError, OptionError
from retroexit.report.stage_table import ranges, shorten
from retroexit.stages.stage import LiveSpan, Stage, live_spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_picture", "draw_decoder"]

_FORMATS: Final = (".svg", ".png", ".pdf")
_INK, _GREY, _PALE = "#222222", "#767676", "#E4E4E4"
_STAGE, _SPENT, _ELSE, _LIVE, _EXIT = "#0072B2", "#D5E5F0", "#B8B8B8", "#00795A", "#C64F00"
_STYLE: Final[dict[Any, Any]] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "svg.fonttype": "none",
    "svg.hashsalt": "decoder",
}
_COVER: Final = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # keeps lines out of a text
_LEFT, _RIGHT, _TALLEST = 0.62, 0.2, 1.5
_LOWEST: Final = 0.32  # height of the lowest box
_COSTS: Final = 1.45  # height of the diagram of costs
_ROW, _MOST_ROWS = 0.22, 12
_EXPLAINED: Final = (
    "Box: the higher the finer the resolution, the wider the more channels. Lines under the boxes: live "
    "values, which a branch needs besides the feature. Grey: what runs between stages. Orange: suggested "
    "exits, and what each saves at best."
)


def check_picture(file: str | Path) -> Path:
    """Check that a picture can be written to a file.

    Raises:
        OptionError: If it is neither SVG nor PNG nor PDF, or its folder does not exist.
        MissingExtraError: If matplotlib is not installed.
    """
    path = Path(file)
    if path.suffix.lower() not in _FORMATS:
        raise OptionError(f"the picture must end in one of {', '.join(_FORMATS)}, got {str(file)!r}", file)
    if not path.parent.is_dir():
        raise OptionError(
            f"no folder {str(path.parent)!r} for the picture {path.name!r}. Make it first.", file
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib: pip install 'retroexit[report]'", file) from error
    return path


def draw_decoder(stages: Sequence[Stage], file: str | Path, title: str = "") -> None:
    """Draw the stages of a decoder.

    A chain of boxes (height: resolution, width: channels), under it the live values from where each is made to
    its last use, below the share of the MACs spent up to each stage. Suggested exits show their largest saving.

    Args:
        stages: What `retroexit.find_stages` returns.
        file: Path that ends in ``.svg``, ``.png`` or ``.pdf``.
        title: Heading.

    Raises:
        OptionError, MissingExtraError: See `check_picture`.
    """
    path = check_picture(file)
    import matplotlib
    from matplotlib.figure import Figure

    sheet = _Sheet.of(stages, title)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(sheet.width, sheet.height), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, sheet.width), ylim=(0, sheet.height))
        axes.axis("off")
        drawing = _Drawing(axes, sheet)
        drawing.heading()
        drawing.exits()
        drawing.chain()
        drawing.live_values()
        drawing.costs()
        drawing.paths()
        kind = path.suffix.lower()[1:]
        # Dates would make equal pictures differ.
        stamp = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        figure.savefig(path, format=kind, dpi=160, metadata=stamp)


class _Drawing:
    """Draws a sheet on axes in inches."""

    def __init__(self, axes: Axes, sheet: _Sheet) -> None:
        self.axes, self.sheet = axes, sheet

    def text(self, x: float, y: float, text: str, size: float = 8, **options: Any) -> None:
        """Write text, centred by default."""
        how: dict[str, Any] = {"ha": "center", "va": "center", "color": _INK, "zorder": 4, **options}
        # A dollar sign would start a formula.
        self.axes.text(x, y, text, fontsize=size, parse_math=False, **how)

    def line(
        self, points: Sequence[tuple[float, float]], color: str, width: float = 1, **options: Any
    ) -> None:
        """Draw a line with round corners."""
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=color, linewidth=width, solid_joinstyle="round", **options)

    def bar(self, x: float, y: float, width: float, height: float, color: str, zorder: int = 2) -> None:
        """Fill a rectangle with its middle at a place on the x axis."""
        from matplotlib.patches import Rectangle

        if height > 0:
            corner = (x - width / 2, y)
            self.axes.add_patch(Rectangle(corner, width, height, facecolor=color, linewidth=0, zorder=zorder))

    def heading(self) -> None:
        top = self.sheet.height - 0.2
        title, *lines = self.sheet.head
        self.text(0.2, top, title, 11, ha="left", weight="bold")
        for i, line in enumerate(lines):
            self.text(0.2, top - 0.22 - 0.15 * i, line, ha="left", color=_GREY)

    def exits(self) -> None:
        """Dashed lines behind suggested stages, with the largest saving of an exit there."""
        sheet = self.sheet
        for stage, row in sheet.flag_rows:
            x, y = sheet.x(stage.index + 0.5), sheet.flags + 0.17 * row
            self.line([(x, sheet.costs), (x, y)], _EXIT, linestyle=(0, (3, 2)), zorder=1)
            self.text(x, y + 0.09, _flag_text(stage), color=_EXIT, weight="bold", bbox=_COVER)

    def chain(self) -> None:
        """The boxes, their sizes, and the line through them."""
        sheet, last = self.sheet, len(self.sheet.stages) + 1
        y = sheet.base + _LOWEST / 2
        self.line([(sheet.x(0.3), y), (sheet.x(last - 0.3), y)], _GREY, 1.2, zorder=2)
        for slot in range(1, last):
            wide, high = sheet.box(slot)
            self.bar(sheet.x(slot), sheet.base, wide, high, _STAGE, zorder=3)
            size = min(8.5, 0.75 * wide / _length("0" * max(2, len(str(slot))), 1))
            self.text(sheet.x(slot), y, str(slot), size, color="white", weight="bold")
        if sheet.slot >= 0.5:
            self.text(sheet.x(0), y, "in", color=_GREY)
            self.text(sheet.x(last), y, "out", color=_GREY)
        for run in _runs(sheet.stages):
            x = (sheet.x(run[0].index) + sheet.x(run[-1].index)) / 2
            top = sheet.base + sheet.box(run[0].index)[1] + 0.05
            if _length(_shape_text(run[0]), 8) <= sheet.slot * len(run):
                self.text(x, top, _shape_text(run[0]), va="bottom", linespacing=1.1, bbox=_COVER)
            else:
                self.text(x, top, _shape_text(run[0], " "), va="bottom", rotation=90)

    def live_values(self) -> None:
        """A line under the chain for every value that crosses cuts, up into the stage that uses it last."""
        sheet = self.sheet
        largest = max((lane.size for lane in sheet.lanes), default=1)
        for lane in sheet.lanes:
            y, (begin, end) = sheet.lane_y(lane), sheet.lane_ends(lane)
            heavy = (math.log(lane.size + 1) / math.log(largest + 1)) ** 3
            width = 0.8 + min(1.6, 3 * sheet.slot) * heavy
            top = sheet.base - 0.05
            self.line([(begin, top + 0.02), (begin, y), (end, y), (end, top)], _LIVE, width, zorder=2)
            self.line([(end, top)], _LIVE, 0, marker="^", markersize=4, zorder=2)
            left, right = sheet.lane_room(lane)
            text = next((t for t in lane.texts() if _length(t, 7) <= right - left - 0.08), "")
            if text:
                where = {"ha": "left", "va": "bottom"}
                self.text(left + 0.05, y + 0.04, text, 7, color=_LIVE, bbox=_COVER, **where)
        if sheet.hidden:
            y = sheet.costs + _COSTS + 0.35
            self.text(sheet.x(0), y, f"and {sheet.hidden} more live values", 7, ha="left", color=_LIVE)

    def costs(self) -> None:
        """The share of the MACs that is spent when each stage is done."""
        sheet, low = self.sheet, self.sheet.costs
        last = len(sheet.stages) + 1
        for share in (0, 0.5, 1):
            y = low + share * _COSTS
            self.line([(_LEFT, y), (sheet.x(last + 0.5), y)], _PALE if share else _GREY, 0.8, zorder=0)
            self.text(_LEFT - 0.06, y, f"{share:.0%}", color=_GREY, ha="right")
        self.text(0.13, low + _COSTS / 2, "MACs spent", color=_GREY, rotation=90)
        spent = [0.0, max(0.0, sheet.stages[0].cumulative - sheet.stages[0].share)]
        spent += [*(stage.cumulative for stage in sheet.stages), 1.0]
        shares = [0.0, *(stage.share for stage in sheet.stages), 0.0]
        wide = 0.8 * sheet.slot
        for slot, (before, after) in enumerate(itertools.pairwise(spent)):
            x, mine = sheet.x(slot), max(0.0, min(shares[slot], after - before))
            self.bar(x, low, wide, before * _COSTS, _SPENT)
            self.bar(x, low + before * _COSTS, wide, (after - mine - before) * _COSTS, _ELSE)
            self.bar(x, low + (after - mine) * _COSTS, wide, mine * _COSTS, _STAGE)
            if _length("100%", 7.5) <= sheet.slot:
                self.text(x, low + after * _COSTS + 0.09, f"{100 * after:.0f}%", 7.5, bbox=_COVER)

    def paths(self) -> None:
        """Numbers and paths of the stages."""
        sheet = self.sheet
        how: dict[str, Any] = {"va": "top", "rotation": sheet.turn}
        if sheet.turn == 40:
            how |= {"ha": "right", "rotation_mode": "anchor"}
        for stage in sheet.stages:
            x, colour = sheet.x(stage.index), _EXIT if stage.is_suggested else _INK
            size = min(8.0, sheet.slot / _length("00", 1))
            self.text(x, sheet.costs - 0.11, str(stage.index), size, color=colour, weight="bold")
            self.text(x, sheet.costs - 0.22, _path_text(stage), color=colour, **how)
        for slot, name in ((0, "before"), (len(sheet.stages) + 1, "after")):
            if _length(name, 7.5) <= sheet.slot:
                self.text(sheet.x(slot), sheet.costs - 0.11, name, 7.5, color=_GREY)


@dataclass(frozen=True)
class _Lane:
    """Live values with the same first and last use, drawn as one line."""

    spans: tuple[tuple[int, LiveSpan], ...]  # with their numbers
    row: int  # below the boxes, from 0
    begin: int  # slot in which they are made
    end: int  # slot of their last use

    @property
    def size(self) -> int:
        """Number of elements in all values."""
        return sum(math.prod(span.shape) for _, span in self.spans)

    def texts(self) -> Iterator[str]:
        """Texts for the line, longest first."""
        span, count = self.spans[0][1], len(self.spans)
        ids = ranges([number for number, _ in self.spans])
        shape = "×".join(map(str, span.shape[1:] or span.shape))
        if count == 1:
            yield f"{ids}  {span.name}  {shape}"
            yield f"{ids}  {shorten(span.name, 16)}  {shape}"
            yield f"{ids}  {shape}"
        elif len({span.shape for _, span in self.spans}) == 1:
            yield f"{ids}  {count} of {shape}"
        yield ids


@dataclass(frozen=True)
class _Sheet:
    """The layout: slot 0 lies before the decoder, 1..N are the stages, N + 1 follows it."""

    stages: tuple[Stage, ...]
    head: tuple[str, ...]  # title, then the lines that explain
    slot: float  # width of a slot
    width: float
    height: float
    costs: float  # lower end of the diagram of costs
    base: float  # lower end of the boxes
    flags: float  # lower end of the savings of the exits
    flag_rows: tuple[tuple[Stage, int], ...]  # suggested stages with the row of their text
    lanes: tuple[_Lane, ...]
    hidden: int  # number of live values without a line
    turn: int  # angle of the paths in degrees

    @classmethod
    def of(cls, stages: Sequence[Stage], title: str) -> _Sheet:
        """Lay out a decoder."""
        slots = len(stages) + 2
        width = max(_LEFT + slots * min(max(11 / slots, 0.21), 0.95) + _RIGHT, 6.4)
        slot = (width - _LEFT - _RIGHT) / slots
        head = (
            shorten(title, int((width - 0.4) / _length("m", 11))),
            *textwrap.wrap(_EXPLAINED, int((width - 0.4) / _length("m", 7))),
        )
        longest = max(_length(_path_text(stage), 8) for stage in stages)
        turn = 0 if longest <= slot - 0.08 else 40 if slot >= 0.42 else 90
        costs = 0.3 + {0: 0.2, 40: 0.64 * longest + 0.15, 90: longest + 0.08}[turn]

        lanes, hidden = _lanes(stages)
        rows = max((lane.row + 1 for lane in lanes), default=0)
        base = costs + _COSTS + 0.3 + rows * _ROW + 0.12 * (rows > 0) + 0.18 * (hidden > 0)
        is_flat = all(_length(_shape_text(run[0]), 8) <= slot * len(run) for run in _runs(stages))
        label = 0.34 if is_flat else 0.1 + max(_length(_shape_text(run[0], " "), 8) for run in _runs(stages))
        flags = base + _TALLEST + label + 0.08
        flag_rows = tuple(_flag_rows(stages, slot))
        height = flags + 0.17 * max((row + 1 for _, row in flag_rows), default=0) + 0.16 * len(head) + 0.3
        return cls(
            tuple(stages), head, slot, width, height, costs, base, flags, flag_rows, lanes, hidden, turn
        )

    def x(self, slot: float) -> float:
        """Middle of a slot."""
        return _LEFT + (slot + 0.5) * self.slot

    def box(self, slot: int) -> tuple[float, float]:
        """Width and height of a stage's box; of the other slots, of the room there."""
        if not 1 <= slot <= len(self.stages):
            return 0.5 * self.slot, _LOWEST
        stage, sides = self.stages[slot - 1], [_side(stage) for stage in self.stages]
        low, high = min(sides), max(sides)
        rise = 0.5 if high == low else (_side(stage) - low) / (high - low)
        wide = math.sqrt(stage.shape[1] / max(stage.shape[1] for stage in self.stages))
        return self.slot * (0.4 + 0.45 * wide), _LOWEST + rise * (_TALLEST - _LOWEST)

    def lane_y(self, lane: _Lane) -> float:
        """Height of a line."""
        return self.base - 0.2 - _ROW * lane.row

    def lane_ends(self, lane: _Lane) -> tuple[float, float]:
        """Where a line leaves a box and where it enters one; lower lines pass around those above."""
        begins = sorted((o for o in self.lanes if o.begin == lane.begin), key=lambda o: -o.row)
        ends = sorted((o for o in self.lanes if o.end == lane.end), key=lambda o: o.row)
        starts = begins.index(lane) / max(len(begins), 2)
        stops = ends.index(lane) / max(len(ends), 2)
        right, left = (0.42 * self.box(slot)[0] for slot in (lane.begin, lane.end))
        return self.x(lane.begin) + right * (0.25 + 0.75 * starts), self.x(lane.end) - left * (
            1 - 0.75 * stops
        )

    def lane_room(self, lane: _Lane) -> tuple[float, float]:
        """The widest part of a line above which no other line passes."""
        begin, end = self.lane_ends(lane)
        lower = [x for other in self.lanes if other.row > lane.row for x in self.lane_ends(other)]
        stops = [begin, *sorted(x for x in lower if begin < x < end), end]
        return max(itertools.pairwise(stops), key=lambda gap: (round(gap[1] - gap[0], 6), -gap[0]))


def _lanes(stages: Sequence[Stage]) -> tuple[tuple[_Lane, ...], int]:
    """Put live values in rows, the short ones next to the boxes; count those for which there is no row."""
    places: dict[tuple[int, int], list[tuple[int, LiveSpan]]] = {}
    for number, span in enumerate(live_spans(stages), 1):
        places.setdefault((span.made_by, span.last + 1), []).append((number, span))
    rows: list[list[tuple[int, int]]] = []
    lanes, hidden = [], 0
    for begin, end in sorted(places, key=lambda place: (place[1] - place[0], place)):
        spans = places[begin, end]
        free = (i for i, taken in enumerate(rows) if all(end <= b or e <= begin for b, e in taken))
        row = next(free, len(rows))
        if row >= _MOST_ROWS:
            hidden += len(spans)
            continue
        if row == len(rows):
            rows.append([])
        rows[row].append((begin, end))
        lanes.append(_Lane(tuple(spans), row, begin, end))
    return tuple(lanes), hidden


def _flag_rows(stages: Sequence[Stage], slot: float) -> Iterator[tuple[Stage, int]]:
    """Give every suggested exit a row for its text, a higher one where it would touch another's."""
    ends: list[float] = []
    for stage in (stage for stage in stages if stage.is_suggested):
        x, half = slot * stage.index, _length(_flag_text(stage), 8) / 2 + 0.05
        row = next((i for i, end in enumerate(ends) if end <= x - half), len(ends))
        ends[row : row + 1] = [x + half]
        yield stage, row


def _runs(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages of one shape that follow one another."""
    return [list(group) for _, group in itertools.groupby(stages, key=lambda stage: stage.shape[1:])]


def _shape_text(stage: Stage, between: str = "\n") -> str:
    """Resolution and channels."""
    return "×".join(map(str, stage.shape[2:])) + f"{between}{stage.shape[1]} ch"


def _path_text(stage: Stage) -> str:
    """The path in at most 24 characters."""
    return shorten(stage.path, 24)


def _flag_text(stage: Stage) -> str:
    """Largest saving of an exit."""
    return f"saves {int(100 * stage.saves)}%"


def _length(text: str, points: float) -> float:
    """Upper bound of the width of a text in inches."""
    return 0.0087 * points * max(map(len, text.split("\n")))


def _side(stage: Stage) -> float:
    sizes = stage.shape[2:]
    return math.log2(max(1, math.prod(sizes))) / len(sizes)
