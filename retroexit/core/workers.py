"""Run a function over many items: in this process, or in workers of a Ray cluster. Results come in the order of items.

Items are batches of samples, each with its own random seed, so that the results do not depend on where they are made.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, TypeVar

import torch

from retroexit.core.samples import moved
from retroexit.errors import MissingExtraError, OptionError, RetroExitError, WorkerError

__all__ = ["in_order", "ray_workers"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_count: ContextVar[int | None] = ContextVar("ray workers", default=None)
_SPANS = 4096  # messages from the workers, at most


@contextmanager
def ray_workers(count: int) -> Iterator[None]:
    """Inside the block, banks, features, labels, calibrations and evaluations are computed by workers of Ray Data.

    Training itself stays in this process; see ``devices`` of `retroexit.fit`. Ray is connected to the cluster that
    ``RAY_ADDRESS`` names, or started on this machine and stopped after the block. Every worker holds the model, reads
    the samples and takes one CPU, or one GPU if this process uses CUDA; workers of a fit must see its folder. Results
    are those of one process, since batches and their random numbers are: on equal processors with one thread, bit by
    bit.

    Args:
        count: Workers, ``>= 1``.

    Raises:
        OptionError: If ``count`` is below 1.
        MissingExtraError: If Ray Data is not installed.
        WorkerError: Inside the block, if a worker cannot load the model or the samples.
    """
    if count < 1:
        raise OptionError(f"ray workers must be >= 1, got {count}. Leave it out to compute in this process.")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("workers need Ray Data: pip install 'retroexit[ray]'") from error
    is_ours = not ray.is_initialized()
    if is_ours:
        local: dict[str, Any] = {"num_cpus": count, "include_dashboard": False}
        ray.init(**({} if os.environ.get("RAY_ADDRESS") else local), logging_level=logging.WARNING, log_to_driver=False)
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)
        if is_ours:
            ray.shutdown()


def in_order(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """Yield ``work(item)`` of every item, in order; inside `ray_workers` from its workers.

    ``work`` must then be something that pickle or cloudpickle can copy, must need no state that earlier items left, and
    its results are moved to the CPU. A worker that dies is replaced, and its items are done again.
    """
    count = _count.get()
    if count is None or len(items) < 2:
        yield from map(work, items)
        return
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    shared = ray.put((work, items))
    span = -(-len(items) // _SPANS)
    starts = list(range(0, len(items), span))
    data = ray.data.from_items(starts, override_num_blocks=min(len(starts), 16 * count))
    data.context.execution_options.preserve_order = True
    data.context.enable_progress_bars = False
    # Within a list a reference is passed on as it is.
    arguments: Any = ([shared], span, sys.path)
    if torch.cuda.is_initialized():  # Ray ends a process that used a GPU after every task
        pool: Any = {"compute": ray.data.ActorPoolStrategy(size=count), "num_gpus": 1}
        parts = data.map_batches(_Worker, fn_constructor_args=arguments, batch_size=1, **pool)
    else:
        pool = {"compute": ray.data.TaskPoolStrategy(size=count), "num_cpus": 1}
        task: Any = _run
        parts = data.map_batches(task, fn_args=arguments, batch_size=1, max_retries=3, **pool)
    for row in parts.iter_rows():
        for is_error, outcome in pickle.loads(row["results"]):
            if is_error:
                raise outcome
            yield outcome


def _run(batch: dict[str, Any], shared: list[Any], *arguments: Any) -> dict[str, Any]:
    """Do one task in a process that keeps the work of the last one."""
    if _Worker.last is None or _Worker.last.shared != shared:
        _Worker.last = _Worker(shared, *arguments)
    return _Worker.last(batch)


class _Worker:
    """The work in one of Ray's processes."""

    last: ClassVar[_Worker | None] = None

    def __init__(self, shared: list[Any], span: int, paths: list[str]) -> None:
        import ray

        torch.set_num_threads(1)
        sys.path.extend(path for path in paths if path not in sys.path)  # where the model's modules are
        self.shared, self._span, self._error = shared, span, ""
        try:
            self._work, self._items = ray.get(shared[0])
        except Exception as error:  # Ray would try again for ever
            self._error = str(error).strip().rpartition("\n")[2]

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self._error:
            error = WorkerError(
                f"a worker of Ray must be able to load the model and the samples, but: {self._error}. Install the "
                "packages of this process there, and put its modules and files where all machines see them."
            )
            return {"results": [pickle.dumps([(True, error)])]}
        start = int(batch["item"][0])
        return {"results": [pickle.dumps([self._outcome(item) for item in self._items[start : start + self._span]])]}

    def _outcome(self, item: Any) -> tuple[bool, Any]:
        try:
            return False, moved(self._work(item), "cpu")
        except RetroExitError as error:  # for the caller; others end the run with the worker's traceback
            return True, error
