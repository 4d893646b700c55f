"""Damage files at random, and observe in a child process what reading them does."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from retroexit.errors import RetroExitError


def damaged(folder: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Damage one file of a folder after another, ``count`` times in all; each is restored afterwards.

    Half are cut short, half get one to eight bits flipped, mostly near the beginning, where headers are.

    Yields:
        What was done to which file, while it is done.
    """
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(count):
        path = files[number % len(files)]
        content, name = path.read_bytes(), path.relative_to(folder)
        if draw.random() < 0.5:
            size = draw.randrange(len(content))
            path.write_bytes(content[:size])
            done = f"{name} cut to {size} of {len(content)} bytes"
        else:
            data, most = bytearray(content), draw.choice((64, 256, len(content)))
            bits = draw.sample(range(8 * min(most, len(content))), draw.randint(1, 8))
            for bit in bits:
                data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            done = f"{name} with bits {bits} flipped"
        try:
            yield done
        finally:
            path.write_bytes(content)


def in_child(work: Callable[[Callable[[Any], None]], None], seconds: int = 60) -> tuple[list[Any], str]:
    """Run ``work(report)`` in a forked process, which may crash or hang.

    Args:
        work: Passes values that JSON can hold to ``report``; those from before a crash are returned too.
        seconds: Time after which the process is killed.

    Returns:
        The reports; and how the process ended: ``""`` if well, else a signal's name or a traceback.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        log = Path(folder, "reports")

        def run() -> None:
            with log.open("w", buffering=1) as out:
                try:
                    work(lambda report: print(json.dumps(report), file=out))
                except BaseException:
                    print(json.dumps(traceback.format_exc()), file=out)
                    os._exit(1)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        reports = [json.loads(line) for line in log.read_text().splitlines()]
    if process.exitcode:
        end = signal.Signals(-process.exitcode).name if process.exitcode < 0 else reports.pop()
        return reports, end
    return reports, ""


def outcomes(folder: Path, count: int, read: Callable[[], str]) -> set[tuple[str, str]]:
    """Damage a folder ``count`` times and read it in a child process each time.

    Args:
        folder: See `damaged`.
        count: See `damaged`.
        read: Reads the folder and describes the result.

    Returns:
        Pairs of damaged file and result, which is ``"refused"`` where reading raised a `RetroExitError`.
    """

    def work(report: Callable[[Any], None]) -> None:
        torch.set_num_threads(1)  # the thread pool of the parent does not exist in a forked process
        for done in damaged(folder, count):
            report([done, "began"])
            try:
                report([done, read()])
            except RetroExitError:
                report([done, "refused"])

    reports, end = in_child(work)
    assert end == "", f"{end} at {reports[-1]}"
    results = [report for report in reports if report[1] != "began"]
    assert len(results) == count
    return {(done.split()[0], result) for done, result in results}
