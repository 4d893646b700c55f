"""Render single samples for requests over HTTP, and never at a cheap exit that nothing has checked."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from retroexit.core.nested import tensors
from retroexit.errors import (
    BankError,
    InputMismatchError,
    MissingExtraError,
    OptionError,
    QueueFull,
    TrainingError,
    cause_of,
    closest,
)
from retroexit.model import EarlyExitGenerator
from retroexit.routing.policy import QUALITIES, named_threshold
from retroexit.runtime.bundle import Bundle, BundleError
from retroexit.runtime.engines import ModelEngine
from retroexit.runtime.payload import Payload, npy
from retroexit.runtime.scheduler import Rendered, Scheduler

__all__ = ["EXTRA", "Reply", "Service"]

EXTRA: Final = "a server needs Ray Serve, got no {}. Run: pip install 'retroexit[serve]'"
_OPTIONS = ("threshold", "quality", "budget", "deadline_ms", "exit")
_REFUSED = (OptionError, InputMismatchError, TrainingError, BankError, BundleError)  # the caller can do something
_NPY = "application/x-npy"
_BOUNDARY = "image"


@dataclass(frozen=True)
class Reply:
    """An answer to a request: its bytes, or its parts one by one."""

    status: int
    content: bytes | AsyncIterator[bytes]
    media: str
    headers: dict[str, str] = field(default_factory=dict)


class _Asked(NamedTuple):
    """How the exit of a request is chosen; the backbone without any option."""

    threshold: float | None = None
    exit: int | None = None
    budget: float | None = None
    deadline_ms: float | None = None

    @property
    def is_routed(self) -> bool:
        return self.exit is None and self != _Asked()


class Service:
    """Reads requests, renders them in batches and writes answers. Knows nothing of the server that it runs in.

    Routing fails closed: if the prediction raises or is not finite, if the promise does not hold for an input, or if an
    early exit's image is not finite, the answer is the backbone's image, with the reason in ``X-Fallback``.

    Args:
        model: What `retroexit.wrap`, `retroexit.load` or `retroexit.load_bundle` returns.
        timeout_s: Seconds after which a request fails.
        **options: Options of `Scheduler`: ``max_batch``, ``max_delay_ms``, ``queue_limit``.

    Raises:
        OptionError: If the model or an option does not fit.
        MissingExtraError: If prometheus_client is not installed.
    """

    def __init__(self, model: EarlyExitGenerator | Bundle, *, timeout_s: float = 30.0, **options: Any) -> None:
        if not 0 < timeout_s < math.inf:
            raise OptionError(f"timeout_s must be a finite number > 0, got {timeout_s}.")
        self.model, self.timeout_s = model, timeout_s
        self.payload = Payload(model)
        self.scheduler = Scheduler(model, strict=True, **options)
        self._drafting = 0
        if isinstance(model, Bundle):
            exits, router = model.manifest["exits"], model.manifest["router"]
            self.shares = [exit["share"] for exit in exits]
            self._routed_shares, self._macs = router["shares"] if router else self.shares, exits[-1]["macs"]
            limits = router and router["limits"]
            self._promised = tuple(limits["thresholds"] or ()) if limits else None
        else:
            self._like = tensors(model.split.example_now())
            self.shares = [exit.share for exit in model.exits]
            self._routed_shares = self.shares if model.predictor is None else model.router.shares().tolist()
            self._macs, self._promised = model.exits[-1].macs, model.router.promised
        self.metrics = _Metrics()

    async def render(self, query: Mapping[str, str], headers: Mapping[str, str], body: bytes) -> Reply:
        """Answer ``POST /render``."""
        begin = time.perf_counter()
        try:
            asked, sample = self._options(query, headers), self._sample(body)
            rendered, reason = await asyncio.wait_for(self._render(sample, asked), self.timeout_s)
            image, is_npy = _array(rendered.image), _NPY in headers.get("accept", "")
            content = npy(image) if is_npy else self.payload.png(image)
            facts = self._facts(rendered, reason, asked.is_routed, begin)
            return Reply(200, content, _NPY if is_npy else "image/png", facts)
        except Exception as error:
            return self.refusal(error)

    async def draft_and_refine(self, query: Mapping[str, str], headers: Mapping[str, str], body: bytes) -> Reply:
        """Answer ``POST /draft-and-refine``: an early exit's PNG and then the backbone's, on one connection."""
        begin = time.perf_counter()
        try:
            asked, sample = self._options(query, headers), self._sample(body)
            if isinstance(self.model, Bundle):
                raise OptionError("drafts need a folder that fit wrote, got an export. Post to /render instead.")
            if self._drafting >= self.scheduler.queue_limit:
                raise QueueFull(f"drafts must be fewer than {self.scheduler.queue_limit}, got {self._drafting}.")
            asked = asked if asked != _Asked() else _Asked(exit=1)
            exit, losses, reason = await asyncio.wait_for(self._choose(sample, asked), self.timeout_s)
        except Exception as error:
            return self.refusal(error)
        drafted = Rendered(None, exit, losses)
        parts = self._parts(self.model, sample, drafted, reason, asked.is_routed, begin)
        return Reply(200, parts, f"multipart/x-mixed-replace; boundary={_BOUNDARY}")

    def refusal(self, error: Exception, status: int | None = None) -> Reply:
        """Answer with an error, as JSON, and count it."""
        text, headers = cause_of(error), {}
        if status is None and isinstance(error, _REFUSED):
            status, text = 400, " ".join(str(error).split())
        elif isinstance(error, QueueFull):
            status, headers = 503, {"Retry-After": "1"}
        elif isinstance(error, TimeoutError):
            status, text = 504, f"the request must be done within {self.timeout_s:g} s, got no image. Try again later."
        self.metrics.errors.labels(str(status or 500)).inc()
        return Reply(status or 500, _json({"error": text}), "application/json", headers)

    def health(self) -> Reply:
        """Answer ``GET /healthz``."""
        is_alive = self.scheduler.is_alive
        facts = {"status": "ok" if is_alive else "stopped", "waiting": self.scheduler.waiting}
        return Reply(200 if is_alive else 503, _json(facts), "application/json")

    # Requests.

    def _options(self, query: Mapping[str, str], headers: Mapping[str, str]) -> _Asked:
        for name in query:
            if name not in _OPTIONS:
                raise OptionError(f"no option {name!r}; closest: {closest(name, _OPTIONS)}.")
        texts = {name: query.get(name, headers.get(f"x-{name.replace('_', '-')}")) for name in _OPTIONS}
        texts = {name: text for name, text in texts.items() if text is not None}
        if len(texts) > 1:
            raise OptionError(f"{' and '.join(texts)} exclude each other, got {texts}. Pass one.")
        if not texts:
            return _Asked()
        ((name, text),) = texts.items()
        if name == "quality":
            if text not in QUALITIES:
                raise OptionError(f"quality must be {', '.join(QUALITIES)}, got {text!r}. Pass one of them.")
            return _Asked(threshold=named_threshold(text, self._promised))
        try:
            number = int(text or "") if name == "exit" else float(text or "")
        except ValueError:
            number = math.nan
        last = self.scheduler.exits
        if name == "exit" and not 1 <= number <= last:
            raise OptionError(f"exit must be an integer from 1 to {last}, the backbone, got {text!r}. Pass one.")
        if not 0 <= number < math.inf or (number == 0 and name != "threshold"):
            bound = ">= 0, such as 0.1" if name == "threshold" else "> 0, such as 0.5"
            raise OptionError(f"{name} must be a finite number, got {text!r}. Pass one {bound}.")
        return _Asked(**{name: number})  # type: ignore[arg-type]

    def _sample(self, body: bytes) -> Any:
        arrays: dict[str, Any] = self.payload.read(body)
        sample = {entry.name: arrays[entry.name] for entry in self.payload.inputs}
        if not isinstance(self.model, Bundle):
            pairs = zip(sample.items(), self._like, strict=True)
            sample = {name: torch.from_numpy(array.copy()).to(like) for (name, array), like in pairs}
        return sample if self.payload.is_keyword else tuple(sample.values())

    def _batch(self, sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(sample, dict):
            return (), {name: value[None] for name, value in sample.items()}
        return tuple(value[None] for value in sample), {}

    async def _render(self, sample: Any, asked: _Asked) -> tuple[Rendered, str]:
        """Render a sample; returns the reason if the backbone had to do it."""
        reason, choice = "", {"threshold": asked.threshold, "exit": asked.exit}
        losses = None
        if asked.budget is not None or asked.deadline_ms is not None:
            exit, losses, reason = await self._choose(sample, asked)
            choice = {"exit": exit}
        try:
            rendered = await self._submit(sample, **choice)
            last = self.scheduler.exits
            if asked.threshold is not None and rendered.losses is None:
                reason = "void promise"
            elif rendered.exit < last and not np.isfinite(_array(rendered.image)).all():
                reason, rendered = "image not finite", await self._submit(sample)
        except (*_REFUSED, QueueFull, TimeoutError):
            raise
        except Exception:
            if not asked.is_routed:
                raise
            reason, rendered = "routing failed", await self._submit(sample)
        _check_finite(_array(rendered.image))
        return rendered if rendered.losses is not None else rendered._replace(losses=losses), reason

    async def _submit(self, sample: Any, **choice: Any) -> Rendered:
        return await asyncio.wrap_future(self.scheduler.submit(sample, timeout_s=self.timeout_s, **choice))

    async def _choose(self, sample: Any, asked: _Asked) -> tuple[int, tuple[float, ...] | None, str]:
        """Choose the exit of a sample; returns it, predicted losses, and the reason if it had to be the backbone."""
        if asked.exit is not None:
            return asked.exit, None, ""
        try:
            return await asyncio.to_thread(self._choose_now, sample, asked)
        except _REFUSED:
            raise
        except Exception:
            return self.scheduler.exits, None, "routing failed"

    def _choose_now(self, sample: Any, asked: _Asked) -> tuple[int, tuple[float, ...] | None, str]:
        args, kwargs = self._batch(sample)
        if isinstance(self.model, Bundle):
            if asked.deadline_ms is not None:
                raise OptionError("deadline_ms needs a folder that fit wrote, got an export. Pass exit or threshold.")
            begun = self.model.begin(args, kwargs, budget=asked.budget)
            return int(begun.exits[0]), None if begun.losses is None else tuple(begun.losses[0].tolist()), ""
        if asked.threshold is not None:
            started = ModelEngine(self.model, strict=True).begin([sample], [(asked.threshold, None)])[0]
            return started.exit, started.losses, "" if started.losses else "void promise"
        options: dict[str, Any] = {"budget": asked.budget, "deadline_ms": asked.deadline_ms}
        return int(self.model.choose_exits(*args, **kwargs, **options)), None, ""

    async def _parts(
        self, model: EarlyExitGenerator, sample: Any, drafted: Rendered, reason: str, is_routed: bool, begin: float
    ) -> AsyncIterator[bytes]:
        """Yield the draft's part, unless it is not finite, and the backbone's, which does not run what has run."""
        self._drafting += 1
        try:
            args, kwargs = self._batch(sample)
            with await asyncio.to_thread(model.draft, *args, exit=drafted.exit, **kwargs) as draft:
                image = _array(model.image(draft.image)[0])
                if drafted.exit < self.scheduler.exits and np.isfinite(image).all():
                    yield self._part(drafted._replace(image=image), reason, is_routed, begin)
                refined = _array(model.image(await asyncio.to_thread(draft.finish))[0])
            _check_finite(refined)
            yield self._part(Rendered(refined, self.scheduler.exits), reason, False, begin)
            yield f"--{_BOUNDARY}--\r\n".encode()
        finally:
            self._drafting -= 1

    # Answers.

    def _facts(self, rendered: Rendered, reason: str, is_routed: bool, begin: float) -> dict[str, str]:
        """Headers of an answer, which is counted."""
        seconds, exit = time.perf_counter() - begin, rendered.exit
        share = (self._routed_shares if is_routed else self.shares)[exit - 1]
        facts = {"X-Exit": str(exit), "X-Macs-Share": f"{share:.4f}", "X-Milliseconds": f"{1000 * seconds:.1f}"}
        if rendered.losses is not None:
            loss = 0.0 if exit == self.scheduler.exits else rendered.losses[exit - 1]
            facts["X-Predicted-Loss"] = f"{loss:.6g}"
        if reason:
            facts["X-Fallback"] = reason
            self.metrics.fallbacks.labels(reason).inc()
        self.metrics.images.labels(str(exit)).inc()
        self.metrics.seconds.labels(str(exit)).observe(seconds)
        self.metrics.macs.inc(self._macs * share)
        self.metrics.saved.inc(max(0.0, self._macs * (1 - share)))
        if rendered.losses is not None and all(map(math.isinf, rendered.losses)):
            self.metrics.ood.inc()
        return facts

    def _part(self, rendered: Rendered, reason: str, is_routed: bool, begin: float) -> bytes:
        facts = {"Content-Type": "image/png", **self._facts(rendered, reason, is_routed, begin)}
        lines = "".join(f"{name}: {value}\r\n" for name, value in facts.items())
        return f"--{_BOUNDARY}\r\n{lines}\r\n".encode() + self.payload.png(rendered.image) + b"\r\n"


class _Metrics:
    """Counters for Prometheus, of one process."""

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise MissingExtraError(EXTRA.format(error.name)) from error
        self.registry = prometheus.CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(f"retroexit_{name}", text, labels, registry=self.registry)

        self.images = counter("images", "Images by exit.", "exit")
        self.errors = counter("errors", "Requests without an image, by status.", "status")
        self.fallbacks = counter("fallbacks", "Requests that the backbone had to render.", "reason")
        self.ood = counter("out_of_distribution", "Inputs out of distribution.")
        self.macs = counter("macs", "MACs spent, predictor and retrieval included.")
        self.saved = counter("macs_saved", "MACs saved, against the backbone for all.")
        self.seconds = prometheus.Histogram(
            "retroexit_request_seconds", "Seconds from body to image, by exit.", ["exit"], registry=self.registry
        )
        self._latest = prometheus.generate_latest

    def reply(self) -> Reply:
        """Answer ``GET /metrics``."""
        return Reply(200, self._latest(self.registry), "text/plain; version=0.0.4; charset=utf-8")


def _array(image: Any) -> Any:
    return image.detach().float().cpu().numpy() if isinstance(image, torch.Tensor) else image


def _check_finite(image: Any) -> None:
    if not np.isfinite(image).all():
        raise FloatingPointError("the generator's image must be finite, got NaN or infinity")


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
