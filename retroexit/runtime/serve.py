"""Serve a model over HTTP: one process under uvicorn, or replicas under Ray Serve."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from retroexit.errors import MissingExtraError, OptionError
from retroexit.model import EarlyExitGenerator
from retroexit.runtime.application import application, check_page
from retroexit.runtime.bundle import Bundle
from retroexit.runtime.service import EXTRA, Reply, Service, refusal

__all__ = ["Replicas", "run_ray", "run_uvicorn", "start_ray"]

TRIES: Final = 3
"""Replicas that a request may see die."""

Load = Callable[[], EarlyExitGenerator | Bundle]
"""Loads the model, in the process that serves it."""


def run_uvicorn(load: Load, *, host: str, port: int, options: Mapping[str, Any], **app: Any) -> None:
    """Serve with one process until it is interrupted.

    Args:
        load: Loads the model.
        host: Address to listen at.
        port: Port, 0 for any that is free.
        options: Options of `Service`.
        **app: Options of `application`.

    Raises:
        MissingExtraError: If uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError(EXTRA.format(error.name)) from error
    check_page(**app)
    uvicorn.run(application(Service(load(), **options), **app), host=host, port=port, log_level="warning")


class Replicas:
    """Calls a `Service` of some replica under Ray Serve. What a replica that dies leaves undone, another one does.

    Rendering has no side effects, so that a request may be begun again; after `TRIES` deaths it is refused: it may
    be what kills.
    """

    def __init__(self, handle: Any, timeout_s: float) -> None:
        self.handle, self.timeout_s = handle, timeout_s

    async def render(self, query: Any, headers: Any, body: bytes) -> Reply:
        """See `Service.render`."""
        return await self._retried(lambda: self.handle.render.remote(query, headers, body))

    async def health(self) -> Reply:
        """See `Service.health`."""
        return await self._retried(lambda: self.handle.health.remote())

    async def describe(self) -> dict[str, Any]:
        """See `Service.describe`."""
        described: dict[str, Any] = await self.handle.describe.remote()
        return described

    async def draft_and_refine(self, query: Any, headers: Any, body: bytes) -> AsyncIterator[Reply]:
        """See `Service.draft_and_refine`; if the replica dies after the draft, another one renders the image."""
        from ray.exceptions import RayError

        parts: Any = None

        def draft() -> Any:
            nonlocal parts
            parts = self.handle.options(stream=True).draft_and_refine.remote(query, headers, body)
            return anext(parts)

        yield await self._retried(draft)
        try:
            async for part in parts:
                yield part
        except RayError:
            yield await self.render({}, {}, body)

    async def _retried(self, call: Callable[[], Any]) -> Reply:
        from ray.exceptions import RayError

        attempt, failure = 1, Exception()
        try:
            async with asyncio.timeout(self.timeout_s):
                for attempt in range(1, TRIES + 1):
                    try:
                        reply: Reply = await call()
                        return replace(reply, headers={**reply.headers, "X-Attempts": str(attempt)})
                    except RayError as error:
                        failure = error
        except TimeoutError as error:
            failure = error
        return refusal(failure, self.timeout_s)

    def close(self) -> None:
        """Nothing to do: Ray closes the replicas."""


class _Replica(Service):
    """A service in a process of Ray's."""

    def __init__(self, load: Load, options: Mapping[str, Any]) -> None:
        super().__init__(load(), **options)

    def check_health(self) -> None:
        """Let Ray replace the replica if nothing serves requests any more."""
        if not self.scheduler.is_alive:
            raise RuntimeError("the scheduler's thread must be alive, got a dead one")


def start_ray(
    load: Load,
    *,
    host: str,
    port: int,
    replicas: int,
    options: Mapping[str, Any],
    max_replicas: int | None = None,
    **app: Any,
) -> None:
    """Serve with some processes under Ray Serve, in a new local cluster unless Ray is connected to one; returns.

    Takes the arguments of `run_uvicorn`, and the number of ``replicas``; with ``max_replicas``, Ray runs as many of
    them as the load needs. Requests come in at a process in front of the replicas, which counts them, and lets another
    replica render what one that died has left.

    Raises:
        OptionError: If an option is out of range.
        MissingExtraError: If Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError(EXTRA.format(error.name)) from error
    check_page(**app)
    if max_replicas is not None and max_replicas < replicas:
        raise OptionError(f"max_replicas must be >= replicas={replicas}, got {max_replicas}. Leave it out.")
    queue, timeout_s = int(options.get("queue_limit", 256)), float(options.get("timeout_s", 30.0))

    def build() -> Any:
        return application(Replicas(serve.get_deployment_handle("replica", "retroexit"), timeout_s), **app)

    class Front:
        def __init__(self, replica: Any) -> None:
            pass

    count: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas is not None:
        count = {"autoscaling_config": {"min_replicas": replicas, "max_replicas": max_replicas}}
    quiet: dict[str, Any] = {"logging_config": {"enable_access_log": False}}
    replica: Any = serve.deployment(_Replica, name="replica", max_ongoing_requests=2 * queue, **count, **quiet)
    thin: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 10_000, **quiet}
    front: Any = serve.deployment(serve.ingress(build)(Front), name="front", **thin)
    serve.start(http_options={"host": host, "port": port})
    serve.run(front.bind(replica.bind(load, dict(options))), name="retroexit")


def run_ray(load: Load, **settings: Any) -> None:
    """Serve as `start_ray` does, until it is interrupted."""
    start_ray(load, **settings)
    from ray import serve

    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        serve.shutdown()
