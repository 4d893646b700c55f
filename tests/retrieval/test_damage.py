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


def test_the_child_process_tells_a_crash_and_a_hang_from_a_failure(damage) -> None:
    import os
    import signal
    import time

    def crash(report) -> None:
        report(1)
        os.kill(os.getpid(), signal.SIGSEGV)

    assert damage.in_child(crash) == ([1], "SIGSEGV")
    assert damage.in_child(lambda report: time.sleep(60), seconds=1) == ([], "SIGALRM")
    reports, end = damage.in_child(lambda report: report(1 / 0))
    assert reports == [] and "ZeroDivisionError" in end


def test_damage_is_undone_reproducible_and_always_some(damage, tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"some bytes")
    (tmp_path / "b").write_bytes(bytes(500))
    once = []
    for done in damage.damaged(tmp_path, 40, seed=3):
        once.append(done)
        damaged = tmp_path / done.split()[0]
        assert damaged.read_bytes() != {"a": b"some bytes", "b": bytes(500)}[damaged.name]
    assert (tmp_path / "a").read_bytes() == b"some bytes" and (tmp_path / "b").read_bytes() == bytes(500)
    assert list(damage.damaged(tmp_path, 40, seed=3)) == once
    assert {done.split()[1] for done in once} == {"cut", "with"}
