"""Measured time of every stage, beside its MACs."""

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from retroexit.core.modules import device_of, wait_for
from retroexit.core.nested import cloned
from retroexit.stages.stage import Stage

_RUNS = 5


def time_stages(generator: nn.Module, stages: Sequence[Stage], args: Any, kwargs: Any) -> list[Stage]:
    """Run a generator a few times and give every stage its ``time`` and ``elapsed``, medians after one warm-up."""
    device, moments = device_of(generator), dict[tuple[str, str], float]()

    def note(edge: str, path: str) -> None:
        wait_for(device)
        moments[edge, path] = time.perf_counter()

    hooks, rows = [], []
    try:
        for stage in stages:
            enter = lambda *_, path=stage.path: note("begin", path)  # noqa: E731
            leave = lambda *_, path=stage.path: note("end", path)  # noqa: E731
            hooks.append(generator.get_submodule(stage.path).register_forward_pre_hook(enter))
            hooks.append(generator.get_submodule(stage.end or stage.path).register_forward_hook(leave))
        for _ in range(_RUNS + 1):
            inputs, keywords = cloned((args, kwargs))
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                note("begin", "")
                generator(*inputs, **keywords)
                note("end", "")
            start = moments["begin", ""]
            whole = moments["end", ""] - start
            rows.append([[(moments[k, s.path] - start) / whole for k in ("begin", "end")] for s in stages])
    finally:
        for hook in hooks:
            hook.remove()
    timed = []
    for stage, *runs in zip(stages, *rows[1:], strict=True):
        elapsed = median(end for _, end in runs)
        timed.append(replace(stage, time=median(end - begin for begin, end in runs), elapsed=elapsed))
    return timed
