"""``retroexit doctor`` and ``retroexit plugins``."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from retroexit.cli import diagnose as doctor


def test_plugins_lists_our_own(run: Any) -> None:
    shown = run("plugins")
    assert shown.status == 0
    assert re.search(
        r"^builtin +retroexit +\S+ .*retroexit_metrics.*retroexit_retrievers", shown.out, re.MULTILINE
    )


def test_doctor_reports_and_fails_where_something_is_broken(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    ok, bad = (
        doctor.Check("torch", "ok", "2.15"),
        doctor.Check("faiss", "fail", "gone", "pip install faiss-cpu"),
    )
    monkeypatch.setattr(doctor, "diagnose", lambda: [ok])
    shown = run("doctor")
    assert (shown.status, shown.out, shown.err) == (0, "ok    torch: 2.15\n", "")
    monkeypatch.setattr(doctor, "diagnose", lambda: [ok, bad])
    shown = run("doctor")
    assert shown.status == 1
    assert shown.out == "ok    torch: 2.15\nfail  faiss: gone\n      pip install faiss-cpu\n"


def test_doctor_runs_on_this_machine(run: Any) -> None:
    shown = run("doctor")
    assert f"torch: {torch.__version__}" in shown.out
