"""Damaged files are refused, or the index is built again with a warning; no wrong result, no crash."""

from __future__ import annotations

import logging

import torch

from retroexit.errors import RetroExitError

TRIALS = 60


def test_damaged_files_are_never_used(any_backend, damage, tmp_path) -> None:
    keys, queries = torch.randn(120, 16), torch.randn(20, 16)
    retriever = any_backend().build(keys)
    retriever.save(tmp_path / "index")
    sound = retriever.search(queries, 2)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("retroexit")

    def load_all(report) -> None:
        damage.one_thread()
        log.addHandler(handler)
        for done in damage.damaged(tmp_path / "index", TRIALS):
            report([done, "began"])
            lines.clear()
            try:
                loaded = type(retriever).load(tmp_path / "index")
            except RetroExitError:
                report([done, "refused"])
                continue
            found = loaded.search(queries, 2)
            alike = torch.equal(found.ids, sound.ids) and torch.equal(found.distances, sound.distances)
            rebuilt = any("building the index again from the keys" in line for line in lines)
            report([done, "rebuilt" if alike and rebuilt else f"believed: {found.ids.tolist()}"])

    reports, end = damage.in_child(load_all)
    assert end == "", f"{end} at {reports[-1]}"
    outcomes = [report for report in reports if report[1] != "began"]
    assert len(outcomes) == TRIALS
    assert [report for report in outcomes if report[1] not in ("refused", "rebuilt")] == []
    rebuilt = {done.split()[0] for done, outcome in outcomes if outcome == "rebuilt"}
    assert rebuilt == ({"index.bin"} if (tmp_path / "index" / "index.bin").exists() else set())
