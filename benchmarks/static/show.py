"""Tables and the plot of everything that is compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retroexit.report.text_tables import table
from static.measuring import Point

LIMIT = 0.1
OURS = ("ours by image", "ours by budget")
STATIC = ("thin student", "student, longer", "Torch-Pruning", "one exit")
_STYLES = {
    "thin student": ("#009E73", "s-"),
    "student, longer": ("#009E73", "*"),
    "Torch-Pruning": ("#CC79A7", "^-"),
    "one exit": ("#222222", "o--"),
    "oracle": ("#BBBBBB", "-"),
    "ours by image": ("#0072B2", "-"),
    "ours by budget": ("#56B4E9", "-"),
}
_MEASURES = ("mean", "p95", "above")


def value(point: Point, measure: str) -> float:
    """Read mean, 95th percentile, or the share above the limit."""
    return point.above(LIMIT) if measure == "above" else float(getattr(point, measure))


def points_table(points: Sequence[Point], macs: float, seconds: float | None) -> str:
    """Set what a few points of each way cost and give; of dense sweeps, those that were timed."""
    rows = []
    for point in points:
        if point.way in ("oracle", "ours by image", "ours by budget") and point.seconds is None:
            continue
        time = "" if point.seconds is None else f"{1000 * point.seconds:.1f}"
        share = "" if point.seconds is None or seconds is None else f"{100 * point.seconds / seconds:.0f} %"
        rows.append(
            [
                point.way,
                f"{point.setting:.3g}",
                f"{100 * point.macs / macs:.1f} %",
                f"{point.mean:.4f}",
                f"{point.p95:.4f}",
                f"{100 * point.above(LIMIT):.0f} %",
                time,
                share,
            ]
        )
    return table(["way", "setting", "MACs", "mean", "95 %", f"above {LIMIT:g}", "ms", "of backbone"], rows)


def verdicts(points: Sequence[Point], cost: str = "macs") -> list[dict[str, object]]:
    """Compare every static point with the best of ours at no higher cost.

    For the mean, two settings of one way of ours may be mixed over the images; for the others they may not.

    Args:
        points: All points.
        cost: ``"macs"`` or ``"seconds"``.

    Returns:
        For every static point, its cost and measures, and those of ours, ``None`` where ours costs more.
    """
    rows = []
    mine = [p for p in points if p.way in OURS and getattr(p, cost) is not None]
    for point in points:
        budget = getattr(point, cost)
        if point.way not in STATIC or budget is None:
            continue
        row: dict[str, object] = {"way": point.way, "setting": point.setting, cost: budget}
        for measure in _MEASURES:
            candidates = [(mixed(mine, way, cost, budget, measure), way) for way in OURS]
            best = min(((x, way) for x, way in candidates if x is not None), default=(None, None))
            row[measure] = value(point, measure)
            row[f"ours {measure}"], row[f"{measure} by"] = best
        rows.append(row)
    return rows


def mixed(points: Sequence[Point], way: str, cost: str, budget: float, measure: str) -> float | None:
    """Return the least loss of a way within a budget; ``None`` where it costs more.

    Args:
        points: Of any ways.
        way: Which one.
        cost: ``"macs"`` or ``"seconds"``.
        budget: In its unit; 0.2 % more is accepted, for the predictor's own compute.
        measure: What is read off; only for ``"mean"``, between two points as well.
    """
    pairs = sorted((getattr(p, cost), value(p, measure)) for p in points if p.way == way)
    affordable = [y for x, y in pairs if x <= budget * 1.002]
    if not affordable:
        return None
    least = min(affordable)
    if measure == "mean":
        for x, y in pairs:
            for dearer, better in pairs:
                if x <= budget < dearer and better < y:
                    least = min(least, y + (better - y) * (budget - x) / (dearer - x))
    return least


def verdicts_table(rows: Sequence[dict[str, object]], cost: str, unit: float, backbone: float) -> str:
    """Set the verdicts: theirs, ours at no more cost, and whether ours is at least as good."""

    def cell(row: dict[str, object], measure: str) -> str:
        theirs, ours = row[measure], row[f"ours {measure}"]
        assert isinstance(theirs, float)
        if not isinstance(ours, float):
            return f"{theirs:.4f} | -"
        sign = "<" if ours < theirs else "=" if ours == theirs else ">"
        return f"{theirs:.4f} {'>' if sign == '<' else '<' if sign == '>' else '='} {ours:.4f}"

    lines = []
    for row in rows:
        budget = row[cost]
        assert isinstance(budget, float | int) and isinstance(row["setting"], float | int)
        shown = f"{100 * budget / backbone:.1f} % ({budget / unit:.3g})"
        lines.append([str(row["way"]), f"{row['setting']:g}", shown, *(cell(row, m) for m in _MEASURES)])
    head = ["way", "setting", f"{cost}, of backbone", "mean, ours", "95 %, ours", f"above {LIMIT:g}, ours"]
    return table(head, lines)


def floors(points: Sequence[Point], limit: float, allowed: float = 0.05) -> dict[str, float]:
    """Find the least cost in MACs at which no more than a share of the images lose more than a limit.

    Settings are chosen knowing the losses, for every way alike. Ways that have no such setting are left out.
    """
    least: dict[str, float] = {}
    for point in points:
        if point.above(limit) <= allowed:
            least[point.way] = min(point.macs, least.get(point.way, point.macs))
    return least


def floors_table(points: Sequence[Point], macs: float, limits: Sequence[float]) -> str:
    """Set what every way must spend to keep nearly all images below a limit."""
    ways = [way for way in _STYLES if any(point.way == way for point in points)]
    rows = []
    for limit in limits:
        least = floors(points, limit)
        shares = [f"{100 * least[way] / macs:.1f} %" if way in least else "-" for way in ways]
        rows.append([f"{limit:g}", *shares])
    return table(["limit", *ways], rows)


def draw(points: Sequence[Point], macs: float, seconds: float | None, path: Path, title: str) -> None:
    """Plot mean, 95th percentile and violations against compute and against time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    costs = [("macs", macs, "mean MACs, % of the backbone's")]
    if seconds is not None:
        costs.append(("seconds", seconds, "measured time, % of the backbone's"))
    figure = Figure(figsize=(15, 4.6 * len(costs) + 0.6), layout="constrained")
    grid = figure.subplots(len(costs), len(_MEASURES), squeeze=False)
    labels = {"mean": "mean LPIPS", "p95": "95th percentile of LPIPS", "above": f"images above {LIMIT:g}, %"}
    handles = {}
    for line, (cost, whole, label) in zip(grid, costs, strict=True):
        for axes, measure in zip(line, _MEASURES, strict=True):
            for way, (colour, style) in _STYLES.items():
                mine = [p for p in points if p.way == way and getattr(p, cost) is not None]
                mine = sorted(mine, key=lambda p: getattr(p, cost))
                x = [100 * getattr(p, cost) / whole for p in mine]
                y = [value(p, measure) * (100 if measure == "above" else 1) for p in mine]
                width = 5 if way == "oracle" else 1.8
                front = 3 if way in OURS else 2 if way in STATIC else 1
                if mine:
                    handles[way] = axes.plot(x, y, style, color=colour, lw=width, ms=6, label=way, zorder=front)[0]
            axes.set(xlabel=label, ylabel=labels[measure], xlim=(0, 100))
            if measure != "above":
                axes.set_yscale("log")
                least = [value(p, measure) for p in points if p.way in STATIC]
                axes.set_ylim(0.7 * min(least), 1.3 * max(least))  # a backbone's 0 has no place here
                axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.3])
                axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.axhline(LIMIT, color="#888888", lw=1, ls=":")
            axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
