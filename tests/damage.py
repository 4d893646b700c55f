"""Damage files at random, and see in a child process what reading them does."""

from __future__ import annotations

import json
import os
import random
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from retroexit.errors import RetroExitError

__all__ = ["damaged", "in_child", "one_thread", "outcomes"]


def damaged(folder: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Damage one file of a folder after another, ``count`` times in all; each is whole again afterwards.

    Half are cut short, half get one to eight bits flipped, mostly near the beginning, where headers are.

    Yields:
        What was done to which file, while it is done.
    """
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(count):
        path = files[number % len(files)]
        whole = path.read_bytes()
        if draw.random() < 0.5:
            size = draw.randrange(len(whole))
            path.write_bytes(whole[:size])
            done = f"{path.relative_to(folder)} cut to {size} of {len(whole)} bytes"
        else:
            data, most = bytearray(whole), draw.choice((64, 256, len(whole)))
            bits = draw.sample(range(8 * min(most, len(whole))), draw.randint(1, 8))
            for bit in bits:
                data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            done = f"{path.relative_to(folder)} with bits {bits} flipped"
        try:
            yield done
        finally:
            path.write_bytes(whole)


def in_child(work: Callable[[Callable[[Any], None]], None], seconds: int = 60) -> tuple[list[Any], str]:
    """Run something in a forked process, where a crash or a hang costs nothing but that process.

    Args:
        work: Called with a function that reports something JSON can hold; what it reported before it died is
            kept.
        seconds: After these the child is ended, and that counts as a signal.

    Returns:
        The reports; and how it ended: ``""`` if well, else a signal's name or a traceback.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(reading)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            with os.fdopen(writing, "w", buffering=1) as out:
                try:
                    work(lambda report: print(json.dumps(report), file=out))
                    code = 0
                except BaseException:
                    print(json.dumps({"failed": traceback.format_exc()}), file=out)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as lines:
        reports = [json.loads(line) for line in lines]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        return reports, signal.Signals(-status).name
    return (reports[:-1], reports[-1]["failed"]) if status else (reports, "")


def one_thread() -> None:
    """Keep a child's own tensors off the thread pool that its parent left behind."""
    torch.set_num_threads(1)


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
        one_thread()
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
