"""Where things go in the picture of a decoder: all in inches, from the lower left corner of one sheet."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from retroexit.report.stage_table import ranges, shorten
from retroexit.stages.stage import LiveSpan, Stage, live_spans

__all__ = [
    "COSTS",
    "LEFT",
    "LOWEST",
    "Lane",
    "Sheet",
    "flag_text",
    "length",
    "path_text",
    "runs",
    "shape_text",
]

LEFT: Final = 0.62
_RIGHT: Final = 0.2
_TALLEST: Final = 1.5
LOWEST: Final = 0.32
"""Height of the lowest box."""
COSTS: Final = 1.45
"""Height of the diagram of costs."""
_ROW: Final = 0.22
_MOST_ROWS: Final = 12
_EXPLAINED: Final = (
    "Box: the higher the finer the resolution, the wider the more channels. Lines under the boxes: live "
    "values, which a branch needs besides the feature. Grey: what runs between stages. Orange: suggested "
    "exits, and what each saves at best."
)


@dataclass(frozen=True)
class Lane:
    """Live values that are made in one place and last used in one place, drawn as one line.

    Attributes:
        spans: The values, with their numbers.
        row: How far below the boxes the line runs, from 0.
        begin: Slot in which they are made.
        end: Slot in which they are used up.
    """

    spans: tuple[tuple[int, LiveSpan], ...]
    row: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        """How many numbers the values hold."""
        return sum(math.prod(span.shape) for _, span in self.spans)

    def texts(self) -> Iterator[str]:
        """What to write on the line, the longest first."""
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
class Sheet:
    """The sheet: slots from left to right, 0 for what lies before the decoder, 1..N, N + 1 for what follows.

    Attributes:
        stages: l_1..l_N.
        head: Title, then the lines that explain.
        slot: Width of a slot.
        width, height: Of the sheet.
        costs: Lower end of the diagram of costs.
        base: Where the boxes stand.
        flags: Lower end of the room for what the exits save.
        flag_rows: Suggested stages, with the row in it for each.
        lanes: Live values as lines.
        hidden: How many have no line for want of room.
        turn: Angle of the paths, in degrees.
    """

    stages: tuple[Stage, ...]
    head: tuple[str, ...]
    slot: float
    width: float
    height: float
    costs: float
    base: float
    flags: float
    flag_rows: tuple[tuple[Stage, int], ...]
    lanes: tuple[Lane, ...]
    hidden: int
    turn: int

    @classmethod
    def of(cls, stages: Sequence[Stage], title: str) -> Sheet:
        """Find room for a decoder."""
        slots = len(stages) + 2
        width = max(LEFT + slots * min(max(11 / slots, 0.21), 0.95) + _RIGHT, 6.4)
        slot = (width - LEFT - _RIGHT) / slots
        head = (
            shorten(title, int((width - 0.4) / length("m", 11))),
            *textwrap.wrap(_EXPLAINED, int((width - 0.4) / length("m", 7))),
        )
        longest = max(length(path_text(stage), 8) for stage in stages)
        turn = 0 if longest <= slot - 0.08 else 40 if slot >= 0.42 else 90
        costs = 0.3 + {0: 0.2, 40: 0.64 * longest + 0.15, 90: longest + 0.08}[turn]

        lanes, hidden = _lanes(stages)
        rows = max((lane.row + 1 for lane in lanes), default=0)
        base = costs + COSTS + 0.3 + rows * _ROW + 0.12 * (rows > 0) + 0.18 * (hidden > 0)
        is_flat = all(length(shape_text(run[0]), 8) <= slot * len(run) for run in runs(stages))
        label = 0.34 if is_flat else 0.1 + max(length(shape_text(run[0], " "), 8) for run in runs(stages))
        flags = base + _TALLEST + label + 0.08
        flag_rows = tuple(_flag_rows(stages, slot))
        height = flags + 0.17 * max((row + 1 for _, row in flag_rows), default=0) + 0.16 * len(head) + 0.3
        return cls(
            tuple(stages), head, slot, width, height, costs, base, flags, flag_rows, lanes, hidden, turn
        )

    def x(self, slot: float) -> float:
        """Middle of a slot."""
        return LEFT + (slot + 0.5) * self.slot

    def box(self, slot: int) -> tuple[float, float]:
        """Width and height of a stage's box; of the other slots, of the room there."""
        if not 1 <= slot <= len(self.stages):
            return 0.5 * self.slot, LOWEST
        stage, sides = self.stages[slot - 1], [_side(stage) for stage in self.stages]
        low, high = min(sides), max(sides)
        rise = 0.5 if high == low else (_side(stage) - low) / (high - low)
        wide = math.sqrt(stage.shape[1] / max(stage.shape[1] for stage in self.stages))
        return self.slot * (0.4 + 0.45 * wide), LOWEST + rise * (_TALLEST - LOWEST)

    def lane_y(self, lane: Lane) -> float:
        """Where a line runs."""
        return self.base - 0.2 - _ROW * lane.row

    def lane_ends(self, lane: Lane) -> tuple[float, float]:
        """Where a line leaves a box, on the right, and where it enters one, on the left.

        Lines that meet at a box touch it beside one another; the lowest starts and ends outermost, so that it
        passes around those above it.
        """
        begins = sorted((o for o in self.lanes if o.begin == lane.begin), key=lambda o: -o.row)
        ends = sorted((o for o in self.lanes if o.end == lane.end), key=lambda o: o.row)
        starts = begins.index(lane) / max(len(begins), 2)
        stops = ends.index(lane) / max(len(ends), 2)
        right, left = (0.42 * self.box(slot)[0] for slot in (lane.begin, lane.end))
        return self.x(lane.begin) + right * (0.25 + 0.75 * starts), self.x(lane.end) - left * (
            1 - 0.75 * stops
        )

    def lane_room(self, lane: Lane) -> tuple[float, float]:
        """The widest part of a line above which no other line passes."""
        begin, end = self.lane_ends(lane)
        lower = [x for other in self.lanes if other.row > lane.row for x in self.lane_ends(other)]
        stops = [begin, *sorted(x for x in lower if begin < x < end), end]
        return max(itertools.pairwise(stops), key=lambda gap: (round(gap[1] - gap[0], 6), -gap[0]))


def _lanes(stages: Sequence[Stage]) -> tuple[tuple[Lane, ...], int]:
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
        lanes.append(Lane(tuple(spans), row, begin, end))
    return tuple(lanes), hidden


def _flag_rows(stages: Sequence[Stage], slot: float) -> Iterator[tuple[Stage, int]]:
    """Give every suggested exit a row for its text, a higher one where it would touch another's."""
    ends: list[float] = []
    for stage in (stage for stage in stages if stage.is_suggested):
        x, half = slot * stage.index, length(flag_text(stage), 8) / 2 + 0.05
        row = next((i for i, end in enumerate(ends) if end <= x - half), len(ends))
        ends[row : row + 1] = [x + half]
        yield stage, row


def runs(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages of one shape that follow one another."""
    return [list(group) for _, group in itertools.groupby(stages, key=lambda stage: stage.shape[1:])]


def shape_text(stage: Stage, between: str = "\n") -> str:
    """Resolution and channels."""
    return "×".join(map(str, stage.shape[2:])) + f"{between}{stage.shape[1]} ch"


def path_text(stage: Stage) -> str:
    """The path, in not too many letters."""
    return shorten(stage.path, 24)


def flag_text(stage: Stage) -> str:
    """What an exit saves."""
    return f"saves {int(100 * stage.saves)}%"


def length(text: str, points: float) -> float:
    """Width of a text in inches, a little too much rather than too little, whatever the font."""
    return 0.0087 * points * max(map(len, text.split("\n")))


def _side(stage: Stage) -> float:
    sizes = stage.shape[2:]
    return math.log2(max(1, math.prod(sizes))) / len(sizes)
