"""A picture of a decoder: its stages as a chain, what each costs, what is live between them.

Everything is drawn in inches on one sheet, so that what fits is decided here and not by a layout engine. The
same stages give the same file; text stays text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from retroexit.errors import MissingExtraError, OptionError
from retroexit.report.decoder_layout import (
    COSTS,
    LEFT,
    LOWEST,
    Sheet,
    flag_text,
    length,
    path_text,
    runs,
    shape_text,
)
from retroexit.stages.stage import Stage

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


def check_picture(file: str | Path) -> Path:
    """Make sure that a picture can be written there, before time is spent on what it shows.

    Raises:
        OptionError: If it is neither SVG nor PNG nor PDF, or its folder does not exist.
        MissingExtraError: If matplotlib is not installed.
    """
    path = Path(file)
    if path.suffix.lower() not in _FORMATS:
        ending = f"the ending {path.suffix!r}" if path.suffix else "no ending"
        raise OptionError(
            f"asked for the picture {str(file)!r}; found {ending}. End it with one of {', '.join(_FORMATS)}.",
            file,
        )
    if not path.parent.is_dir():
        raise OptionError(
            f"asked for the picture {str(file)!r}; found no folder {str(path.parent)!r}. Make it first.", file
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"asked for the picture {str(file)!r}; found that matplotlib is not installed. Run: "
            "pip install 'retroexit[report]'",
            file,
        ) from error
    return path


def draw_decoder(stages: Sequence[Stage], file: str | Path, title: str = "") -> None:
    """Draw the stages of a decoder.

    Above, the stages as a chain of boxes: the higher the finer the resolution, the wider the more channels.
    Under them, the live values, from where each is made to where it is used last. Below, the share of the
    MACs spent up to each stage. Suggested exits are marked with what they save at best.

    Args:
        stages: What `retroexit.find_stages` returns.
        file: Where to; the ending says what: ``.svg``, ``.png`` or ``.pdf``.
        title: Heading.

    Raises:
        OptionError, MissingExtraError: See `check_picture`.
    """
    path = check_picture(file)
    import matplotlib
    from matplotlib.figure import Figure

    sheet = Sheet.of(stages, title)
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
    """Puts a sheet on axes that count in inches."""

    def __init__(self, axes: Axes, sheet: Sheet) -> None:
        self.axes, self.sheet = axes, sheet

    def text(self, x: float, y: float, text: str, size: float = 8, **options: Any) -> None:
        """Write something; in the middle of the place unless told otherwise."""
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
        """Title, and how to read the picture."""
        top = self.sheet.height - 0.2
        title, *lines = self.sheet.head
        self.text(0.2, top, title, 11, ha="left", weight="bold")
        for i, line in enumerate(lines):
            self.text(0.2, top - 0.22 - 0.15 * i, line, ha="left", color=_GREY)

    def exits(self) -> None:
        """Dashed lines behind suggested stages, and what an exit there saves at best."""
        sheet = self.sheet
        for stage, row in sheet.flag_rows:
            x, y = sheet.x(stage.index + 0.5), sheet.flags + 0.17 * row
            self.line([(x, sheet.costs), (x, y)], _EXIT, linestyle=(0, (3, 2)), zorder=1)
            self.text(x, y + 0.09, flag_text(stage), color=_EXIT, weight="bold", bbox=_COVER)

    def chain(self) -> None:
        """The boxes, their sizes, and what connects them."""
        sheet, last = self.sheet, len(self.sheet.stages) + 1
        y = sheet.base + LOWEST / 2
        self.line([(sheet.x(0.3), y), (sheet.x(last - 0.3), y)], _GREY, 1.2, zorder=2)
        for slot in range(1, last):
            wide, high = sheet.box(slot)
            self.bar(sheet.x(slot), sheet.base, wide, high, _STAGE, zorder=3)
            size = min(8.5, 0.75 * wide / length("0" * max(2, len(str(slot))), 1))
            self.text(sheet.x(slot), y, str(slot), size, color="white", weight="bold")
        if sheet.slot >= 0.5:
            self.text(sheet.x(0), y, "in", color=_GREY)
            self.text(sheet.x(last), y, "out", color=_GREY)
        for run in runs(sheet.stages):
            x = (sheet.x(run[0].index) + sheet.x(run[-1].index)) / 2
            top = sheet.base + sheet.box(run[0].index)[1] + 0.05
            if length(shape_text(run[0]), 8) <= sheet.slot * len(run):
                self.text(x, top, shape_text(run[0]), va="bottom", linespacing=1.1, bbox=_COVER)
            else:
                self.text(x, top, shape_text(run[0], " "), va="bottom", rotation=90)

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
            text = next((t for t in lane.texts() if length(t, 7) <= right - left - 0.08), "")
            if text:
                where = {"ha": "left", "va": "bottom"}
                self.text(left + 0.05, y + 0.04, text, 7, color=_LIVE, bbox=_COVER, **where)
        if sheet.hidden:
            y = sheet.costs + COSTS + 0.35
            self.text(sheet.x(0), y, f"and {sheet.hidden} more live values", 7, ha="left", color=_LIVE)

    def costs(self) -> None:
        """The share of the MACs that is spent when each stage is done."""
        sheet, low = self.sheet, self.sheet.costs
        last = len(sheet.stages) + 1
        for share in (0, 0.5, 1):
            y = low + share * COSTS
            self.line([(LEFT, y), (sheet.x(last + 0.5), y)], _PALE if share else _GREY, 0.8, zorder=0)
            self.text(LEFT - 0.06, y, f"{share:.0%}", color=_GREY, ha="right")
        self.text(0.13, low + COSTS / 2, "MACs spent", color=_GREY, rotation=90)
        spent = [0.0, max(0.0, sheet.stages[0].cumulative - sheet.stages[0].share)]
        spent += [*(stage.cumulative for stage in sheet.stages), 1.0]
        own = [0.0, *(stage.share for stage in sheet.stages), 0.0]
        wide = 0.8 * sheet.slot
        for slot, (before, after) in enumerate(itertools.pairwise(spent)):
            x, mine = sheet.x(slot), max(0.0, min(own[slot], after - before))
            self.bar(x, low, wide, before * COSTS, _SPENT)
            self.bar(x, low + before * COSTS, wide, (after - mine - before) * COSTS, _ELSE)
            self.bar(x, low + (after - mine) * COSTS, wide, mine * COSTS, _STAGE)
            if length("100%", 7.5) <= sheet.slot:
                self.text(x, low + after * COSTS + 0.09, f"{100 * after:.0f}%", 7.5, bbox=_COVER)

    def paths(self) -> None:
        """Numbers and paths of the stages."""
        sheet = self.sheet
        how: dict[str, Any] = {"va": "top", "rotation": sheet.turn}
        if sheet.turn == 40:
            how |= {"ha": "right", "rotation_mode": "anchor"}
        for stage in sheet.stages:
            x, colour = sheet.x(stage.index), _EXIT if stage.is_suggested else _INK
            size = min(8.0, sheet.slot / length("00", 1))
            self.text(x, sheet.costs - 0.11, str(stage.index), size, color=colour, weight="bold")
            self.text(x, sheet.costs - 0.22, path_text(stage), color=colour, **how)
        for slot, name in ((0, "before"), (len(sheet.stages) + 1, "after")):
            if length(name, 7.5) <= sheet.slot:
                self.text(sheet.x(slot), sheet.costs - 0.11, name, 7.5, color=_GREY)
