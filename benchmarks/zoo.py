"""Wrap generators that other people wrote, without an adapter, and print what works.

    python benchmarks/zoo.py [--only NAME...] [--checkouts FOLDER] [--json FILE] [--markdown]

Random weights, up to three exits each, width factors 1/4 and 1/15 with a floor of 8 for these small
instances. Every generator runs in a process of its own. ``--checkouts`` names a folder with checkouts of
public repositories by their own names (OASIS, SPADE, stylegan2-ada-pytorch, ...); they are imported from
there, and nothing of them is part of this project.

What counts: *backbone*, the final exit, whole or in pieces, equals the generator bit for bit and the
generator is unchanged; *self-test*, branches of full width equal it bit for bit; *accepted*, the stages are a
person's by the rule of ``generators/acceptance.py``; *shrinks*, a branch has at most two thirds of its tail's
parameters and of its MACs; *copies* and *reload*, with an exit after every stage, a deep and a pickled copy,
and the model saved and loaded in another process, have equal features at every cut and equal images; *size* and
*bfloat16*, the pieces equal the generator bit for bit there too; *near*, exit 1 costs at most 1.3 times the share of
its attach point plus 5 %; *batch*, largest relative difference between two samples at once and each alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from generators import ENTRIES
from generators.entry import Entry
from generators.measure import is_near, measure_kinds

_LIMIT = 600  # seconds for one generator
_KINDS = ("copy", "subpixel")


def main() -> int:
    """Run the command line; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="generators to run; a beginning will do")
    parser.add_argument("--checkouts", type=Path, help="folder with checkouts of public repositories")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument("--kinds", action="store_true", help="measure only exit 1 as a copy and as a sub-pixel branch")
    parser.add_argument("--list", action="store_true", help="list the names and stop")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [entry for entry in ENTRIES if _is_chosen(entry, options)]
    if options.list:
        print("\n".join(entry.name for entry in chosen))
        return 0
    if options.child:
        return _child(chosen[0], options)
    rows = []
    for entry in chosen:
        missing = _missing(entry, options.checkouts)
        if missing:
            print(f"{entry.name}: left out, {missing} is not installed", file=sys.stderr)
            continue
        if options.kinds:
            rows.append(_kinds(entry, options.checkouts))
        else:
            rows.append(_in_own_process(entry, options.checkouts))
            print(_one_line(rows[-1], options.markdown), flush=True)
    print(*(_near_totals if options.kinds else _totals)(rows), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


def _is_chosen(entry: Entry, options: argparse.Namespace) -> bool:
    if options.child:
        return entry.name == options.only[0]
    if options.only:
        return any(entry.name.startswith(name) for name in options.only)
    return not entry.is_large


def _missing(entry: Entry, checkouts: Path | None) -> str:
    if entry.checkout and (checkouts is None or not (checkouts / entry.checkout).is_dir()):
        return entry.checkout
    return next((name for name in entry.needs if find_spec(name) is None), "")


def _child(entry: Entry, options: argparse.Namespace) -> int:
    from generators.measure import make, measure_entry
    from generators.reload import check

    checkout = options.checkouts / entry.checkout if entry.checkout else None
    if options.reload:
        (options.child / "reload.txt").write_text(check(make(entry, checkout), options.child))
    else:
        row = measure_entry(entry, checkout, save_to=options.child)
        (options.child / "row.json").write_text(json.dumps(row.as_json()))
    return 0


def _in_own_process(entry: Entry, checkouts: Path | None) -> dict[str, Any]:
    """Measure a generator in one process, and load what it saved in a second one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reason = _run_child(entry, checkouts, folder)
        if not (folder / "row.json").is_file():
            return {"name": entry.name, "errors": {"process": reason}, "branches": [], "objection": reason}
        row: dict[str, Any] = json.loads((folder / "row.json").read_text())
        if (folder / "renders.pt").is_file():
            reason = _run_child(entry, checkouts, folder, "--reload")
            result = folder / "reload.txt"
            row["reload"] = result.read_text() if result.is_file() else reason
        return row


def _run_child(entry: Entry, checkouts: Path | None, folder: Path, *more: str) -> str:
    """Run this program for one generator; returns the last line of its errors."""
    command = [sys.executable, "-W", "ignore", __file__, "--only", entry.name, "--child", str(folder), *more]
    if checkouts is not None:
        command += ["--checkouts", str(checkouts.resolve())]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, env=environment)
    except subprocess.TimeoutExpired:
        return f"took more than {_LIMIT} s"
    return (done.stderr.strip() or "no message").splitlines()[-1]


def _one_line(row: dict[str, Any], markdown: bool) -> str:
    line = " | ".join([row["name"], *_cells(row)])
    if markdown:
        return f"| {line} |"
    notes = [f"{step}: {text}" for step, text in row["errors"].items()]
    notes.append(f"detected {' '.join(row.get('stages', ())) or 'nothing'}")
    notes.append(f"a person {row.get('expected', '')}")
    notes += [f"{step}: {row[step]}" for step in ("copies", "reload") if row.get(step)]
    if row["objection"]:
        notes.append(f"objection: {row['objection']}")
    for branch in row["branches"]:
        name = f"after {branch['after']} at {branch['scale']:.3g}"
        if branch["error"]:
            notes.append(f"{name}: {branch['error']}")
        elif not branch["shrinks"]:
            sizes = f"parameters {_pair(branch['parameters'])}, MACs {_pair(branch['macs'])}"
            notes.append(f"{name} does not shrink: {sizes}")
        if branch["unreached"]:
            notes.append(f"{name}: no gradient for {' '.join(branch['unreached'])}")
    pins = dict.fromkeys(pin for branch in row["branches"] for pin in branch["pins"])
    notes += [f"pinned: {pin}" for pin in pins]
    return "\n".join([line, *(f"    {note}" for note in notes)])


def _cells(row: dict[str, Any]) -> list[str]:
    branches = row["branches"]
    if not branches:
        return ["failed"]
    shares = [
        " ".join(f"{b['parameters'][0] / b['parameters'][1]:.2f}/{b['macs'][0] / max(1, b['macs'][1]):.2f}"
                 if not b["error"] else "error" for b in branches if b["scale"] == scale)
        for scale in sorted({b["scale"] for b in branches}, reverse=True)
    ]  # fmt: skip
    live = " ".join(str(len(values)) for values in row["live"]) or "-"
    batch = "draws" if row["batch"] is None and "batch" not in row["errors"] else row["batch"]
    return [
        f"{len(row['stages'])} stages {'accepted' if not row['objection'] else 'NOT ACCEPTED'}",
        f"live {live}",
        "backbone equal" if row["backbone"] else "BACKBONE DIFFERS",
        "self-test equal" if row["self_test"] else "SELF-TEST FAILS",
        *(f"{share}" for share in shares),
        f"pins {sum(len(b['pins']) for b in branches)}",
        "gradients" if not any(b["unreached"] for b in branches) else "NO GRADIENT",
        "copies equal" if row["copies"] == "" else "COPIES DIFFER",
        "reload equal" if row.get("reload") == "" else "RELOAD DIFFERS",
        *(f"{step} {_WORDS[row.get(step)]}" for step in ("size", "half")),
        " ".join(f"exit 1 {b['shares'][0]:.0%} at {b['shares'][1]:.0%}" for b in _first_exits(row)),
        *(f"sub-pixel {pair[0]:.0%} at {pair[1]:.0%}" for pair in [row.get("subpixel")] if pair),
        f"batch {batch:.0e}" if isinstance(batch, float) else f"batch {batch}",
        f"{row['seconds']:.1f} s",
        f"{row['memory'][0]:.0f} MiB for {row['memory'][1]:.0f}",
    ]


_WORDS = {None: "-", True: "equal", False: "DIFFERS"}


def _first_exits(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The first exit at the thinnest scale."""
    thinnest = min((b["scale"] for b in row["branches"]), default=0)
    return [b for b in row["branches"] if b["scale"] == thinnest][:1]


def _kinds(entry: Entry, checkouts: Path | None) -> dict[str, Any]:
    """Measure exit 1 by kind of branch, and print it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = measure_kinds(entry, checkouts / entry.checkout if checkouts and entry.checkout else None)
    cells = []
    for kind in _KINDS:
        if isinstance(row[kind], str):
            cells.append(f"{kind} {row[kind]}")
        else:
            cells.append(f"{kind} {row[kind][0]:.1%} at {row[kind][1]:.1%}{'' if is_near(*row[kind]) else ' NOT NEAR'}")
    print(" | ".join([row["name"], *cells]), flush=True)
    return row


def _near_totals(rows: list[dict[str, Any]]) -> list[str]:
    """How often exit 1 costs little more than its attach point."""
    near = {kind: [not isinstance(row[kind], str) and is_near(*row[kind]) for row in rows] for kind in _KINDS}
    near["either kind"] = [any(pair) for pair in zip(*near.values(), strict=True)]
    return [f"exit 1 near its attach point, {kind}: {_count(good)}" for kind, good in near.items()]


def _both_kinds(row: dict[str, Any]) -> dict[str, Any]:
    """Shares of exit 1 by kind, from a row with everything."""
    copies = [b["shares"] for b in _first_exits(row) if not b["error"]]
    return {"copy": copies[0] if copies else "none", "subpixel": row.get("subpixel") or "none"}


def _count(good: list[bool]) -> str:
    return f"{sum(good)} of {len(good)} ({sum(good) / max(1, len(good)):.1%})"


def _pair(values: list[int]) -> str:
    return f"{values[0]:,} of {values[1]:,}"


def _totals(rows: list[dict[str, Any]]) -> list[str]:
    branches = [branch for row in rows for branch in row["branches"]]
    counts = [
        ("backbone bit-equal", [bool(row.get("backbone")) for row in rows]),
        ("stages accepted", [not row["objection"] for row in rows]),
        ("self-test equal", [bool(row.get("self_test")) for row in rows]),
        ("branches that shrink", [branch["shrinks"] for branch in branches]),
        ("deep and pickled copies equal", [row.get("copies") == "" for row in rows]),
        ("equal when loaded in another process", [row.get("reload") == "" for row in rows]),
        ("gradients everywhere", [not branch["unreached"] and not branch["error"] for branch in branches]),
        ("equal at another size", [row["size"] for row in rows if row.get("size") is not None]),
        ("equal in bfloat16", [row["half"] for row in rows if row.get("half") is not None]),
        ("batch of two alike", [row["batch"] < 1e-3 for row in rows if row.get("batch") is not None]),
    ]
    near = _near_totals([_both_kinds(row) for row in rows if row["branches"]])
    return [*(f"{what}: {_count(good)}" for what, good in counts), *near]


if __name__ == "__main__":
    sys.exit(main())
