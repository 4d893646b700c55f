"""Batch requests of many callers: predict them together, then render those of one exit together."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from retroexit.errors import OptionError, QueueFull
from retroexit.model import EarlyExitGenerator
from retroexit.runtime.bundle import Bundle
from retroexit.runtime.engines import BundleEngine, Engine, ModelEngine

_SETTLED = 0.05  # a smaller batch is as good if a sample takes at most this share longer
_WEIGHT = 0.3  # of a new measurement in the running mean


class Rendered(NamedTuple):
    """The result of a request."""

    image: Any  # (C, ...), a tensor or an array
    exit: int  # from 1
    losses: tuple[float, ...] | None = None  # predicted at the branch exits, infinite out of distribution


@dataclass(eq=False)
class _Request:
    sample: Any
    threshold: float | None
    exit: int | None
    due: float  # when it has waited long enough
    expires: float  # when its caller does not want it any more
    future: Future[Rendered] = field(default_factory=Future)
    state: Any = None  # of the engine, at the first cut
    losses: tuple[float, ...] | None = None


class Scheduler:
    """Serves single samples in batches. One thread runs the model.

    A request is predicted with others, then waits for others of its exit. It is rendered when its batch is full or when
    it has waited ``max_delay_ms``. How many make a full batch follows from measured times: the fewest for which a
    sample takes hardly longer than at best. If a batch raises, its requests run one by one.

    Example:
        >>> with Scheduler(model, max_batch=16, max_delay_ms=10) as scheduler:
        ...     futures = [scheduler.submit(sample, threshold=0.1) for sample in samples]
        ...     images = [future.result().image for future in futures]

    ``await asyncio.wrap_future(scheduler.submit(sample))`` waits in a coroutine.

    Args:
        model: What `retroexit.wrap` or `retroexit.load_bundle` returns.
        max_batch: Most samples per batch, ``>= 1``.
        max_delay_ms: Most milliseconds that a request waits for others while the model is idle.
        queue_limit: Most requests that wait.
        clock: Returns seconds; for tests.
        strict: Send samples to the backbone where a promise does not hold, instead of a warning.
        start: Whether to start the thread; else `step` has to be called.

    Attributes:
        seconds: For every exit, the running mean of the time of a batch by its size. It may be set, to start with what
            an earlier scheduler has measured.
        batches: Number of batches by exit and size.

    Raises:
        OptionError: If an option is out of range, or the model cannot tell the samples of a batch apart.
    """

    def __init__(
        self,
        model: EarlyExitGenerator | Bundle,
        *,
        max_batch: int = 16,
        max_delay_ms: float = 10.0,
        queue_limit: int = 256,
        clock: Callable[[], float] = time.monotonic,
        strict: bool = False,
        start: bool = True,
    ) -> None:
        for name, value, least in (("max_batch", max_batch, 1), ("queue_limit", queue_limit, 1)):
            if value < least:
                raise OptionError(f"{name} must be >= {least}, got {value}.")
        if max_delay_ms < 0:
            raise OptionError(f"max_delay_ms must be >= 0, got {max_delay_ms}.")
        self._engine: Engine
        self._engine = BundleEngine(model, strict) if isinstance(model, Bundle) else ModelEngine(model, strict)
        self.max_batch, self.max_delay, self.queue_limit = max_batch, max_delay_ms / 1000, queue_limit
        self._clock = clock
        self._entry: deque[_Request] = deque()
        self._queues: list[deque[_Request]] = [deque() for _ in range(self._engine.exits)]
        self.seconds: list[dict[int, float]] = [{} for _ in self._queues]
        self.batches: Counter[tuple[int, int]] = Counter()
        self._changed = threading.Condition()
        self._is_open, self._running = True, 0
        self._thread = threading.Thread(target=self._work, name="retroexit-scheduler", daemon=True)
        if start:
            self._thread.start()

    # Callers.

    def submit(
        self,
        sample: Any,
        *,
        threshold: float | None = None,
        exit: int | None = None,
        timeout_s: float | None = None,
        block_s: float = 0.0,
    ) -> Future[Rendered]:
        """Enter one sample without the batch axis: a tensor or array, a tuple of inputs, or a dict of keyword inputs.

        Args:
            sample: The sample.
            threshold: Largest quality loss to accept; see `RoutingOptions`.
            exit: Exit to leave at, from 1, instead; by default the backbone.
            timeout_s: Seconds after which the future raises `TimeoutError`, if the sample has not been begun.
            block_s: Seconds to wait for room in the queue.

        Raises:
            QueueFull: If there is no room.
            OptionError: If threshold and exit are both given or out of range, or the scheduler is closed.
        """
        if threshold is not None and exit is not None:
            raise OptionError(f"threshold and exit exclude each other, got {threshold} and {exit}. Pass one.")
        if threshold is not None and not 0 <= threshold < float("inf"):
            raise OptionError(f"threshold must be a finite number >= 0, got {threshold!r}.")
        if exit is not None and not 1 <= exit <= self._engine.exits:
            raise OptionError(f"exit must be from 1 to {self._engine.exits}, got {exit!r}.")
        if threshold is None and exit is None:
            exit = self._engine.exits
        with self._changed:
            self._changed.wait_for(lambda: not self._is_open or self.waiting < self.queue_limit, block_s)
            if not self._is_open:
                raise OptionError("the scheduler must be open, got a closed one. Make a new one.")
            if self.waiting >= self.queue_limit:
                raise QueueFull(
                    f"the queue must have fewer than queue_limit={self.queue_limit} requests, got {self.waiting}. Try "
                    "again later, or pass block_s."
                )
            now = self._clock()
            expires = float("inf") if timeout_s is None else now + timeout_s
            request = _Request(sample, threshold, exit, now + self.max_delay, expires)
            self._entry.append(request)
            self._changed.notify_all()
        return request.future

    @property
    def exits(self) -> int:
        """Number of exits, the backbone included."""
        return self._engine.exits

    @property
    def is_alive(self) -> bool:
        """Whether requests are being served."""
        return self._is_open and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._entry) + sum(map(len, self._queues))

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests; render those that wait, or cancel them."""
        with self._changed:
            self._is_open = False
            if cancel:
                for queue in (self._entry, *self._queues):
                    while queue:
                        future = queue.popleft().future
                        if future.cancel():
                            future.set_running_or_notify_cancel()  # wakes up those who wait for it
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        else:
            while self.step():
                pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.close(cancel=error is not None)

    # The worker.

    def _work(self) -> None:
        while True:
            with self._changed:
                pause = self._pause()
                while pause > 0 and (self._is_open or self.waiting):
                    self._changed.wait(None if pause == float("inf") else pause)
                    pause = self._pause()
                if pause > 0:
                    return
            self.step()

    def _pause(self) -> float:
        """Seconds until something has to run; 0 for now, infinity for nothing."""
        if self.waiting and not self._is_open:
            return 0.0
        now = self._clock()
        pauses = [float("inf")]
        for queue, full, share in self._plans():
            if queue:
                due = min(queue[0].due - share * self.max_delay, min(request.expires for request in queue))
                pauses.append(0.0 if len(queue) >= full[0] else max(0.0, due - now))
        return min(pauses)

    def _plans(self) -> list[tuple[deque[_Request], range, float]]:
        """Queues in the order of preference, the sizes of a full batch, and the share of the delay for what follows."""
        exits = [(queue, self._full(number), 0.0) for number, queue in enumerate(self._queues)]
        return [*exits, (self._entry, range(self.max_batch, self.max_batch + 1), 0.5)]

    def _full(self, number: int) -> range:
        """Sizes of a full batch at an exit: one not tried yet, or the smallest that is about the best, to the best."""
        times = self.seconds[number]
        sizes = [2**i for i in range(self.max_batch.bit_length()) if 2**i < self.max_batch] + [self.max_batch]
        untried = [size for size in sizes if size not in times]
        if untried:
            return range(max(untried), max(untried) + 1)
        best = min(sizes, key=lambda size: times[size] / size)
        limit = (1 + _SETTLED) * times[best] / best
        return range(next(size for size in sizes if times[size] / size <= limit), best + 1)

    def step(self) -> bool:
        """Run one batch that is due, or any if the scheduler is closed; returns whether there was one."""
        with self._changed:
            chosen = self._choose()
            if chosen is None:
                return False
            queue, size = chosen
            requests = [queue.popleft() for _ in range(size)]
            self._changed.notify_all()
        alive = [request for request in requests if self._is_wanted(request)]
        if queue is self._entry:
            self._attempt(alive, self._predict)
        elif alive:
            number = next(i for i, other in enumerate(self._queues) if other is queue)
            running = [request for request in alive if request.future.set_running_or_notify_cancel()]
            self._attempt(running, lambda batch: self._render(batch, number + 1))
        return True

    def _choose(self) -> tuple[deque[_Request], int] | None:
        now = self._clock()
        ready: list[tuple[float, int, deque[_Request], int]] = []
        for queue, full, share in self._plans():
            if not queue:
                continue
            due = queue[0].due - share * self.max_delay
            is_due = due <= now or any(request.expires <= now for request in queue) or not self._is_open
            if len(queue) >= full[0] or is_due:
                ready.append((due, len(ready), queue, full[-1]))
        if not ready:
            return None
        _, _, queue, most = min(ready, key=lambda entry: entry[:2])
        return queue, min(len(queue), most)

    def _is_wanted(self, request: _Request) -> bool:
        if request.future.cancelled():
            request.future.set_running_or_notify_cancel()  # wakes up those who wait for it
            return False
        if request.expires <= self._clock():
            _fail(request, TimeoutError("the request has not been begun within its timeout_s"))
            return False
        return True

    def _attempt(self, requests: Sequence[_Request], run: Callable[[Sequence[_Request]], None]) -> None:
        """Run a batch; if it raises, its requests one by one, so that only those that raise fail."""
        if not requests:
            return
        try:
            run(requests)
        except BaseException as error:  # the thread outlives whatever a generator raises
            if len(requests) == 1:
                _fail(requests[0], error)
                return
            for request in requests:
                self._attempt([request], run)

    def _predict(self, requests: Sequence[_Request]) -> None:
        choices = [(request.threshold, request.exit) for request in requests]
        begun = self._engine.begin([request.sample for request in requests], choices)
        with self._changed:
            for request, (exit, state, losses) in zip(requests, begun, strict=True):
                request.state, request.losses = state, losses
                self._queues[exit - 1].append(request)

    def _render(self, requests: Sequence[_Request], exit: int) -> None:
        begin = self._clock()
        images = self._engine.finish([request.state for request in requests], exit)
        taken, size = self._clock() - begin, len(requests)
        times = self.seconds[exit - 1]
        times[size] = taken if size not in times else (1 - _WEIGHT) * times[size] + _WEIGHT * taken
        self.batches[exit, size] += 1
        for request, image in zip(requests, images, strict=True):
            request.future.set_result(Rendered(image, exit, request.losses))


def _fail(request: _Request, error: BaseException) -> None:
    """Let a future raise, unless its caller has cancelled it."""
    if not isinstance(error, Exception):  # would end the caller's thread
        error = RuntimeError(f"the generator must return, got {type(error).__name__}")
    if request.future.running() or request.future.set_running_or_notify_cancel():
        request.future.set_exception(error)
