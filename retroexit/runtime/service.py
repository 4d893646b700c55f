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
from retroexit.errors import BankError, InputMismatchError, OptionError, QueueFull, TrainingError, cause_of, closest
from retroexit.model import EarlyExitGenerator
from retroexit.routing.policy import QUALITIES, RoutingRequest, Time, check_number, named_threshold
from retroexit.runtime.bundle import Bundle, BundleError
from retroexit.runtime.engines import ModelEngine
from retroexit.runtime.payload import Payload, npy
from retroexit.runtime.scheduler import Rendered, Scheduler

__all__ = ["EXTRA", "OUT_OF_DISTRIBUTION", "Reply", "Service", "refusal"]

EXTRA: Final = "a server needs Ray Serve, got no {}. Run: pip install 'retroexit[serve]'"
_OPTIONS = ("threshold", "quality", "budget", "budget_ms", "deadline_ms", "exit")
_REFUSED = (OptionError, InputMismatchError, TrainingError, BankError, BundleError)  # the caller can do something
_NPY = "application/x-npy"
OUT_OF_DISTRIBUTION: Final = "out of distribution"
"""Reason where nothing finite was predicted."""


@dataclass(frozen=True)
class Reply:
    """An answer to a request."""

    status: int
    content: bytes
    media: str
    headers: dict[str, str] = field(default_factory=dict)


class _Asked(NamedTuple):
    """How the exit of a request is chosen; the backbone without any option."""

    threshold: float | None = None
    exit: int | None = None
    budget: float | None = None
    budget_ms: float | None = None
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
            self._routed_shares, macs = router["shares"] if router else self.shares, exits[-1]["macs"]
            limits = router and router["limits"]
            self._promised = tuple(limits["thresholds"] or ()) if limits else None
        else:
            self._like = tensors(model.split.example_now())
            self.shares = [exit.share for exit in model.exits]
            self._routed_shares = self.shares if model.predictor is None else model.router.shares().tolist()
            macs, self._promised = model.exits[-1].macs, model.router.promised
        self._description = {"exits": self.shares, "macs": macs, "inputs": list(map(str, self.payload.inputs))}

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
            return refusal(error, self.timeout_s)

    async def draft_and_refine(
        self, query: Mapping[str, str], headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[Reply]:
        """Answer ``POST /draft-and-refine``: an early exit's PNG, unless it is not finite, and then the backbone's."""
        begin = time.perf_counter()
        self._drafting += 1
        try:
            asked, sample = self._options(query, headers), self._sample(body)
            if isinstance(self.model, Bundle):
                raise OptionError("drafts need a folder that fit wrote, got an export. Post to /render instead.")
            if self._drafting > self.scheduler.queue_limit:
                raise QueueFull(f"drafts must be at most {self.scheduler.queue_limit}, got {self._drafting}.")
            asked, last = asked if asked != _Asked() else _Asked(exit=1), self.scheduler.exits
            exit, losses, reason = await asyncio.wait_for(self._choose(sample, asked), self.timeout_s)
            args, kwargs = self._batch(sample)
            with await asyncio.to_thread(self.model.draft, *args, exit=exit, **kwargs) as draft:
                image = _array(self.model.image(draft.image)[0])
                if exit < last and np.isfinite(image).all():
                    facts = self._facts(Rendered(None, exit, losses), reason, asked.is_routed, begin)
                    yield Reply(200, self.payload.png(image), "image/png", facts)
                refined = _array(self.model.image(await asyncio.to_thread(draft.finish))[0])
            _check_finite(refined)
            facts = self._facts(Rendered(None, last), reason, False, begin)
            yield Reply(200, self.payload.png(refined), "image/png", facts)
        except Exception as error:
            yield refusal(error, self.timeout_s)
        finally:
            self._drafting -= 1

    async def health(self) -> Reply:
        """Answer ``GET /healthz``."""
        is_alive = self.scheduler.is_alive
        facts = {"status": "ok" if is_alive else "stopped", "waiting": self.scheduler.waiting}
        return Reply(200 if is_alive else 503, _json(facts), "application/json")

    async def describe(self) -> dict[str, Any]:
        """Shares of MACs by exit, the backbone's MACs, and the inputs."""
        return self._description

    def close(self) -> None:
        """Render what waits, and take no more."""
        self.scheduler.close()

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
        if name not in ("exit", "budget_ms"):
            check_number(name, number)
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
        if any(goal is not None for goal in (asked.budget, asked.budget_ms, asked.deadline_ms)):
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
            begun = self.model.begin(args, kwargs, budget=asked.budget, budget_ms=asked.budget_ms)
            return int(begun.exits[0]), None if begun.losses is None else tuple(begun.losses[0].tolist()), ""
        if asked.threshold is not None:
            started = ModelEngine(self.model, strict=True).begin([sample], [(asked.threshold, None)])[0]
            return started.exit, started.losses, "" if started.losses else "void promise"
        budget = asked.budget if asked.budget_ms is None else Time(ms=asked.budget_ms)
        request = RoutingRequest(budget=budget, deadline_ms=asked.deadline_ms)
        with torch.no_grad():
            choice = self.model.router.choose(self.model.split.begin(args, kwargs), request)
        return int(choice.exits), None if choice.losses is None else tuple(choice.losses[0].tolist()), ""

    # Answers.

    def _facts(self, rendered: Rendered, reason: str, is_routed: bool, begin: float) -> dict[str, str]:
        """Headers of an answer."""
        seconds, exit = time.perf_counter() - begin, rendered.exit
        share = (self._routed_shares if is_routed else self.shares)[exit - 1]
        facts = {"X-Exit": str(exit), "X-Macs-Share": f"{share:.4f}", "X-Milliseconds": f"{1000 * seconds:.1f}"}
        if rendered.losses is not None:
            loss = 0.0 if exit == self.scheduler.exits else rendered.losses[exit - 1]
            facts["X-Predicted-Loss"] = f"{loss:.6g}"
        if not reason and rendered.losses is not None and all(map(math.isinf, rendered.losses)):
            reason = OUT_OF_DISTRIBUTION
        return facts | ({"X-Fallback": reason} if reason else {})


def refusal(error: Exception, timeout_s: float = math.inf, status: int | None = None) -> Reply:
    """Answer with an error, as JSON."""
    text, headers = cause_of(error), {}
    if status is None and isinstance(error, _REFUSED):
        status, text = 400, " ".join(str(error).split())
    elif isinstance(error, QueueFull):
        status, headers = 503, {"Retry-After": "1"}
    elif isinstance(error, TimeoutError):
        status, text = 504, f"the request must be done within {timeout_s:g} s, got no image. Try again later."
    return Reply(status or 500, _json({"error": text}), "application/json", headers)


def _array(image: Any) -> Any:
    return image.detach().float().cpu().numpy() if isinstance(image, torch.Tensor) else image


def _check_finite(image: Any) -> None:
    if not np.isfinite(image).all():
        raise FloatingPointError("the generator's image must be finite, got NaN or infinity")


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
