"""``retroexit inspect`` on a toy."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest


def test_inspect_lists_the_stages(run: Any) -> None:
    for arguments in (("toy.py:with_inputs",), ("toy:decoder", "--shape", "1,4,4,4")):
        shown = run("inspect", *arguments)
        assert shown.status == 0, shown.err
        assert shown.out.startswith("Decoder, ")
        for row, size in (("stages.0", "8x8"), ("stages.1", "16x16"), ("stages.2", "16x16")):
            assert re.search(rf"^ *\d  {row} +Stage +{size} +12 ", shown.out, re.MULTILINE), row


def test_a_file_is_not_mistaken_for_a_module_of_its_name(run: Any, tmp_path: Path) -> None:
    toy = (tmp_path / "toy.py").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/toy.py").write_text("from beside import decoder, samples\n")
    (tmp_path / "other/beside.py").write_text(
        toy.replace("nn.Conv2d(4, 12, 1)", "nn.Conv2d(4, 12, 1, bias=False)")
    )
    (tmp_path / "json.py").write_text(toy)
    counts = []
    for target in ("toy.py:decoder", "other/toy.py:decoder", "json.py:decoder"):
        shown = run("inspect", target, "--shape", "1,4,4,4")
        assert shown.status == 0, shown.err
        (count,) = re.findall(r"Decoder, ([\d,]+) parameters", shown.out)
        counts.append(int(count.replace(",", "")))
    sys.modules.pop("beside", None)
    assert counts[0] - counts[1] == 12
    assert counts[2] == counts[0]
    assert importlib.import_module("json") is json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "toy"), "asked for 'toy'; found no ':'"),
        (("inspect", "nowhere:decoder"), "asked for 'nowhere:decoder'; found ModuleNotFoundError"),
        (("inspect", "nowhere.py:decoder"), "found FileNotFoundError: no file "),
        (("inspect", "toy.py:decoda"), "found AttributeError: .*'decoda'"),
        (
            ("inspect", "toy.py:broken"),
            "asked to call 'toy.py:broken'; found that it raised RuntimeError: no weights here",
        ),
        (("inspect", "toy.py:number"), "asked for the generator of 'toy.py:number'; found a int"),
        (("inspect", "toy.py:decoder"), "found no adapter that can make its inputs"),
        (
            ("inspect", "toy.py:decoder", "--shape", "1,x"),
            r"asked for --shape \['1,x'\]; found invalid literal",
        ),
        (("inspect", "toy.py:decoder", "--shape", "1,-4,4,4"), r"asked for --shape \['1,-4,4,4'\]"),
    ],
)
def test_mistakes_end_with_one_line_and_status_1(run: Any, arguments: tuple[str, ...], message: str) -> None:
    run(*arguments).fails_with(message)
