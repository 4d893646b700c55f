"""A picture of a decoder: stages from top to bottom, costs, and live values between them. Lengths are in inches."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from retroexit.core.files import replacing
from retroexit.errors import MissingExtraError, OptionError
from retroexit.report.stage_table import legend_of, ranges, shorten
from retroexit.stages.stage import Stage, live_spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMATS: Final = (".svg", ".png", ".pdf")
_INK, _GREY, _PALE = "#222222", "#767676", "#E4E4E4"
_STAGE, _SPENT, _LIVE, _EXIT = "#0072B2", "#D5E5F0", "#00795A", "#C64F00"
_STYLE: Final[dict[Any, Any]] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "svg.fonttype": "none",
    "svg.hashsalt": "decoder",
}
_TOP, _ROW, _LINE = 1.1, 0.3, 0.15
_NUMBER, _PATH, _SIZE, _BOX, _COST, _SAVES, _LANES = 0.45, 0.55, 3.75, 4.4, 5.1, 7.05, 7.95  # columns
_COST_WIDTH, _LANE, _MOST_LANES = 1.5, 0.6, 12
_EXPLAINED: Final = (
    "Box: the higher the finer the resolution, the wider the more channels. MACs: pale is spent before the "
    "stage, dark in it. Green: live values, which a branch needs besides the feature. Orange: suggested exits, "
    "and what each saves at best."
)


def check_picture(file: str | Path) -> Path:
    """Raise an error if the picture's format, its folder, or matplotlib does not exist."""
    path = Path(file)
    if path.suffix.lower() not in _FORMATS:
        raise OptionError(f"the picture must end in one of {', '.join(_FORMATS)}, got {str(file)!r}")
    if not path.parent.is_dir():
        raise OptionError(f"no folder {str(path.parent)!r} for picture {path.name!r}. Make it first.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib: pip install 'retroexit[report]'") from error
    return path


def draw_decoder(stages: Sequence[Stage], file: str | Path, title: str = "") -> None:
    """Draw the stages of a decoder, one row each, to an ``.svg``, ``.png`` or ``.pdf`` file.

    A row shows path, size, share of the MACs spent and, for a suggested exit, its largest saving. Lines on the right
    show live values from where each is made to its last use.
    """
    path = check_picture(file)
    import matplotlib
    from matplotlib.figure import Figure

    spans = live_spans(stages)
    lanes = _lanes(stages)
    legend = [line.strip() for line in legend_of(spans)]
    columns = 1 + max((column for column, *_ in lanes), default=0)
    width = _LANES + _LANE * columns + 0.2
    bottom = _y(len(stages) + 2)
    hidden = len(spans) - sum(len(numbers) for *_, numbers in lanes)
    if hidden:
        legend.append(f"{hidden} more live values are not drawn")
    with matplotlib.rc_context(_STYLE):
        height = bottom + _LINE * len(legend) + 0.2
        figure = Figure(figsize=(width, height), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        _text(axes, 0.2, 0.25, shorten(title, int((width - 0.4) / 0.1)), 11, weight="bold")
        explained = "\n".join(textwrap.wrap(_EXPLAINED, int((width - 0.4) / 0.07)))
        _text(axes, 0.2, 0.42, explained, va="top", color=_GREY)
        _draw_stages(axes, stages)
        for column, begin, end, numbers in lanes:
            x = _LANES + _LANE * column
            axes.plot([x, x], [_y(begin), _y(end)], color=_LIVE, marker="_", zorder=2)
            _text(axes, x + 0.06, _y(begin + 0.5), ranges(numbers), 7, color=_LIVE)
        for i, line in enumerate(legend):
            _text(axes, 0.2, bottom + _LINE * i, line, 7, color=_LIVE, family="monospace")
        kind = path.suffix.lower()[1:]
        # Dates would make equal pictures differ.
        stamp = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        with replacing(path) as opened:
            figure.savefig(opened, format=kind, dpi=160, metadata=stamp)


def _draw_stages(axes: Axes, stages: Sequence[Stage]) -> None:
    for x, name in ((_PATH, "stage"), (_COST, "MACs spent"), (_SAVES, "exit"), (_LANES, "live values")):
        _text(axes, x, _y(-0.8), name, color=_GREY)
    last = len(stages) + 1
    axes.plot([_BOX, _BOX], [_y(0.3), _y(last - 0.3)], color=_GREY, linewidth=1.2, zorder=1)
    for row, name in ((0, "in"), (last, "out")):
        _text(axes, _BOX, _y(row), name, ha="center", color=_GREY)
    for share in (0, 0.5, 1):
        x = _COST + share * _COST_WIDTH
        axes.plot([x, x], [_y(0.4), _y(last - 0.4)], color=_PALE, linewidth=0.8, zorder=0)
    sides = [math.log2(max(1, math.prod(s.shape[2:]))) / len(s.shape[2:]) for s in stages]
    low, rise = min(sides), max(max(sides) - min(sides), 1e-9)
    most = max(stage.shape[1] for stage in stages)
    for stage, side in zip(stages, sides, strict=True):
        y, colour = _y(stage.index), _EXIT if stage.is_suggested else _INK
        size = f"{'×'.join(map(str, stage.shape[2:]))}, {stage.shape[1]} ch"
        _text(axes, _NUMBER, y, str(stage.index), ha="right", color=colour, weight="bold")
        _text(axes, _PATH, y, shorten(stage.path, 24), color=colour)
        _text(axes, _SIZE, y, shorten(size, 21), ha="right")
        high, wide = 0.1 + 0.14 * (side - low) / rise, 0.9 * math.sqrt(stage.shape[1] / most)
        _bar(axes, _BOX - wide / 2, y, wide, high, _STAGE)
        spent = _COST + _COST_WIDTH * stage.cumulative
        _bar(axes, _COST, y, spent - _COST, 0.2, _SPENT)
        _bar(axes, spent - _COST_WIDTH * stage.share, y, _COST_WIDTH * stage.share, 0.2, _STAGE)
        _text(axes, spent + 0.05, y, f"{100 * stage.cumulative:.0f}%", 7.5)
        if stage.is_suggested:
            _text(axes, _SAVES, y, f"saves {int(100 * stage.saves)}%", color=_EXIT, weight="bold")


def _y(row: float) -> float:
    """Middle of a row: 0 is before the decoder, then come the stages."""
    return _TOP + _ROW * (row + 0.5)


def _text(axes: Axes, x: float, y: float, text: str, size: float = 8, **options: Any) -> None:
    """Write text; a dollar sign does not start a formula."""
    style: dict[str, Any] = {"va": "center", "color": _INK, **options}
    axes.text(x, y, text, fontsize=size, parse_math=False, **style)


def _bar(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    """Fill a rectangle whose left edge has its middle at ``(x, y)``."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y - height / 2), width, height, facecolor=color, linewidth=0, zorder=2))


def _lanes(stages: Sequence[Stage]) -> list[tuple[int, int, int, list[int]]]:
    """Put live values in columns, short ones first: column, first row, last row, numbers of the values."""
    places: dict[tuple[int, int], list[int]] = {}
    for number, span in enumerate(live_spans(stages), 1):
        places.setdefault((span.made_by, span.last + 1), []).append(number)
    columns: list[list[tuple[int, int]]] = [[] for _ in range(_MOST_LANES)]
    lanes = []
    for begin, end in sorted(places, key=lambda place: (place[1] - place[0], place)):
        for column, taken in enumerate(columns):
            if all(end <= b or e <= begin for b, e in taken):
                taken.append((begin, end))
                lanes.append((column, begin, end, places[begin, end]))
                break
    return lanes
