"""The table of a decoder in 100 columns: its module tree with the stages numbered, what they cost, what is live."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

from retroexit.core.modules import unit_of
from retroexit.report.text_tables import table
from retroexit.stages.decoder import Decoder, input_names
from retroexit.stages.module_tree import Part, module_tree
from retroexit.stages.stage import LiveSpan, live_spans

_WIDTH: Final = 100
_RUN: Final = 4  # a longer run of equal stages shows its ends only
_MODULE, _CLASS, _PARAMETERS, _TIME, _ELAPSED, _LIVE = 1, 2, 5, 9, 10, 12  # columns
_LEAST: Final = 12
_NAME: Final = 16  # letters of a class to keep
_LIVE_WIDTH: Final = 8
_MOST_LIVE: Final = 16


def decoder_table(decoder: Decoder) -> str:
    """Show a generator, its stages, costs and live values as lines of at most 100 characters."""
    recording, parts = decoder.recording, module_tree(decoder)
    unit, scale = unit_of(recording.macs)
    head = f"{parts[0].kind}, {sum(part.parameters for part in parts):,} parameters"
    inputs = [f"{name} {times(node.meta['shape'])}" for node, name in input_names(recording).items()]
    lines = [*_wrapped(f"{head}, {recording.macs / scale:.3f} {unit} for {', '.join(inputs) or 'no inputs'}")]
    if decoder.replayed:
        lines += _wrapped(
            f"Replayed, not cut: {decoder.replayed}. An exit reruns the generator's own forward with what "
            "lies before it filled in."
        )
    return "\n".join([*lines, "", _table_of(parts, live_spans(decoder.stages), recording.macs)])


def brief_count(number: int) -> str:
    """Write a number with three digits: ``317``, ``57.1k``, ``1.34M``."""
    for name, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * scale:
            value = number / scale
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{name}"
    return str(number)


def times(shape: Iterable[int]) -> str:
    """Write a shape as ``1x64x8x8``."""
    return "x".join(map(str, shape))


def shorten(text: str, width: int) -> str:
    """Cut the middle out of a text that is wider than a number of characters; of a run, out of both ends."""
    if len(text) <= width:
        return text
    first, between, last = text.partition(" .. ")
    if between and width >= 16:
        room = width - len(between)
        for_last = min(len(last), max(room // 2, room - len(first)))
        return shorten(first, room - for_last) + between + shorten(last, for_last)
    end = (width - 2 + 1) // 2
    return f"{text[: width - 2 - end]}..{text[len(text) - end :]}"


def _table_of(parts: Sequence[Part], spans: Sequence[LiveSpan], total: int) -> str:
    unit, scale = unit_of(total)
    numbers = {span.name: i for i, span in enumerate(spans, 1)}
    head = ["l", "module", "class", "size", "ch", "params", unit, "share", "up to", "time", "up to", "saves", "live"]
    rows = [_row(part, total, scale, numbers) for part in _folded(parts)]
    empty = {i for i in (_PARAMETERS, _TIME, _ELAPSED, _LIVE) if not any(row[i] for row in rows)}
    head, *rows = [[cell for i, cell in enumerate(row) if i not in empty] for row in (head, *rows)]
    _fit(head, rows)
    lines = [table(head, rows)]
    if any(part.stage is not None and part.stage.is_suggested for part in parts):
        lines.append("*      a good place for an exit")
    lines.append("up to  share of the MACs that is spent when the stage is done")
    if _TIME not in empty:
        lines.append("time   share of the measured time, and the share that has passed when the stage is done")
    lines.append("saves  what an exit there saves at best, its branch not yet counted")
    if spans:
        lines += ["live   what a branch there needs besides the feature:", *legend_of(spans)]
    return "\n".join(lines)


def _row(part: Part, total: int, scale: float, numbers: dict[str, int]) -> list[str]:
    stage, is_root = part.stage, part.path == "" and part.stage is None
    name = [part.kind, ""] if is_root else ["  " * part.depth + part.name, part.kind]
    held = brief_count(part.parameters) if part.parameters else ""
    spent = [f"{part.macs / scale:.3f}", f"{100 * part.macs / max(total, 1):.1f}%"]
    if stage is None:
        shown = part.macs > 0 and not (part.is_opened and part.macs < 0.001 * total)
        return ["", *name, "", "", held, *(spent if shown else ["", ""]), "", "", "", "", ""]
    return [
        f"{stage.index}{'*' if stage.is_suggested else ' '}",
        *name,
        times(stage.shape[2:]),
        str(stage.shape[1]),
        held,
        *spent,
        f"{100 * stage.cumulative:.1f}%",
        *("" if share is None else f"{100 * share:.1f}%" for share in (stage.time, stage.elapsed)),
        f"{int(100 * stage.saves)}%",
        ranges([numbers[value] for value, _ in stage.live]),
    ]


def _folded(parts: Sequence[Part]) -> list[Part]:
    """Leave out the middle of long runs of equal stages."""

    def likeness(part: Part) -> object:
        s = part.stage
        if s is None or s.is_suggested:
            return id(part)
        return part.depth, s.kind, s.shape, s.macs, s.live, part.parameters

    shown: list[Part] = []
    for _, group in groupby(parts, likeness):
        run = list(group)
        if len(run) > _RUN:
            hidden = f"{len(run) - 2} more alike"
            run = [run[0], Part(run[0].depth, "..", "..", hidden, 0, 0), run[-1]]
        shown += run
    return shown


def _fit(head: Sequence[str], rows: Sequence[list[str]]) -> None:
    """Shorten classes, then modules and classes, whichever take more room, until a line fits."""
    widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > _WIDTH and max(widths[_MODULE : _CLASS + 1]) > _LEAST:
        wider = _CLASS if widths[_CLASS] > min(_NAME, widths[_MODULE] - 1) else _MODULE
        widths[wider] -= 1
    for row in rows:
        for column in (_MODULE, _CLASS):
            text = row[column].lstrip(" ")
            room = widths[column]
            indent = min(len(row[column]) - len(text), max(room - len(text), room // 2))
            row[column] = " " * indent + shorten(text, room - indent)


def ranges(numbers: Sequence[int]) -> str:
    """Write 1, 2, 3, 5 as ``v1-v3 v5``."""
    keyed = groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in keyed]
    text = " ".join(f"v{run[0]}" if len(run) == 1 else f"v{run[0]}-v{run[-1]}" for run in runs)
    return text if len(text) <= _LIVE_WIDTH else f"{len(numbers)} values"


def legend_of(spans: Sequence[LiveSpan]) -> list[str]:
    """Describe live values, one line for neighbours of one shape."""
    if not spans:
        return []
    keyed = groupby(enumerate(spans, 1), lambda pair: (pair[1].shape, pair[1].first, pair[1].last))
    groups, rows = [list(group) for _, group in keyed], []
    for group in groups[:_MOST_LIVE]:
        span, count = group[0][1], len(group)
        name = span.name if count == 1 else f"{span.name} .. {group[-1][1].name}"
        shape = times(span.shape) if count == 1 else f"{count} of {times(span.shape)}"
        numbers = brief_count(count * math.prod(span.shape))
        stages = f"l_{span.first}" if span.first == span.last else f"l_{span.first}..l_{span.last}"
        rows.append([ranges([n for n, _ in group]), shorten(name, 44), shape, numbers, f"after {stages}"])
    columns = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    cells = [[cell.ljust(width) for cell, width in zip(row, columns, strict=True)] for row in rows]
    lines = ["       " + "  ".join(row).rstrip() for row in cells]
    more = len(groups) - _MOST_LIVE
    return [*lines, f"       and {more} more"] if more > 0 else lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
