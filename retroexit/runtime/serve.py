"""Serve a model over HTTP: one process under uvicorn, or replicas under Ray Serve."""

from __future__ import annotations

import importlib.resources
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from retroexit.errors import MissingExtraError, OptionError
from retroexit.model import EarlyExitGenerator
from retroexit.runtime.bundle import Bundle
from retroexit.runtime.service import EXTRA, Reply, Service

__all__ = ["application", "run_ray", "run_uvicorn", "start_ray"]

Load = Callable[[], EarlyExitGenerator | Bundle]
"""Loads the model, in the process that serves it."""

_EXAMPLES = (".png", ".npy", ".npz")


class _TooLarge(Exception):
    """The body is larger than allowed."""


class _Request(Protocol):
    """What is read of a request of Starlette."""

    headers: Mapping[str, str]
    query_params: Mapping[str, str]
    path_params: Mapping[str, str]

    def stream(self) -> AsyncIterator[bytes]: ...


def application(service: Service, *, max_megabytes: float = 16.0, examples: str | Path | None = None) -> Any:
    """Make the ASGI application of a service, for any server or a test client.

    Args:
        service: The service, which ends with the application.
        max_megabytes: Largest body.
        examples: Folder with inputs (.png, .npy, .npz) for the page at ``/``.

    Raises:
        OptionError: If an option is out of range, or the folder does not exist.
        MissingExtraError: If Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import Response, StreamingResponse
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtraError(EXTRA.format(error.name)) from error
    _check(max_megabytes, examples)
    handlers = _Handlers(service, int(max_megabytes * 1e6), _read_examples(examples))

    def endpoint(handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
        async def answer(request: Any) -> Any:
            reply: Reply = await handler(request)
            kind: Any = Response if isinstance(reply.content, bytes) else StreamingResponse
            return kind(reply.content, reply.status, reply.headers, reply.media)

        return answer

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        yield
        service.scheduler.close()

    posts: dict[str, Callable[[Any], Any]]
    gets: dict[str, Callable[[Any], Any]]
    posts = {"/render": handlers.render, "/draft-and-refine": handlers.draft_and_refine}
    gets = {"/": handlers.page, "/healthz": handlers.health, "/metrics": handlers.metrics, "/info": handlers.info}
    gets["/examples/{name}"] = handlers.example
    routes = [Route(path, endpoint(handler), methods=["POST"]) for path, handler in posts.items()]
    routes += [Route(path, endpoint(handler), methods=["GET"]) for path, handler in gets.items()]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.service = service
    return app


class _Handlers:
    """One coroutine per route."""

    def __init__(self, service: Service, max_bytes: int, examples: dict[str, Path]) -> None:
        self.service, self.max_bytes, self.examples = service, max_bytes, examples

    async def render(self, request: _Request) -> Reply:
        return await self._answer(request, self.service.render)

    async def draft_and_refine(self, request: _Request) -> Reply:
        return await self._answer(request, self.service.draft_and_refine)

    async def _answer(self, request: _Request, answer: Callable[..., Any]) -> Reply:
        try:
            body = await self._body(request)
        except _TooLarge as error:
            return self.service.refusal(error, 413)
        reply: Reply = await answer(request.query_params, request.headers, body)
        return reply

    async def _body(self, request: _Request) -> bytes:
        chunks, size = [], 0
        declared = request.headers.get("content-length", "0")
        async for chunk in request.stream():
            size += len(chunk)
            if max(size, int(declared)) > self.max_bytes:
                raise _TooLarge(
                    f"the body must have at most {self.max_bytes / 1e6:g} MB, got {max(size, int(declared)) / 1e6:.1f}."
                    " Send a smaller one, or start with --max-megabytes."
                )
            chunks.append(chunk)
        return b"".join(chunks)

    async def page(self, _request: _Request) -> Reply:
        html = importlib.resources.files("retroexit.runtime").joinpath("serve.html").read_bytes()
        return Reply(200, html, "text/html; charset=utf-8")

    async def health(self, _request: _Request) -> Reply:
        return self.service.health()

    async def metrics(self, _request: _Request) -> Reply:
        return self.service.metrics.reply()

    async def info(self, _request: _Request) -> Reply:
        service = self.service
        facts = {"exits": service.shares, "inputs": list(map(str, service.payload.inputs))}
        return Reply(200, json.dumps({**facts, "examples": list(self.examples)}).encode(), "application/json")

    async def example(self, request: _Request) -> Reply:
        path = self.examples.get(request.path_params["name"])
        if path is None:
            error = OptionError(f"no example {request.path_params['name']!r}. Take a name of /info.")
            return self.service.refusal(error, 404)
        media = "image/png" if path.suffix.lower() == ".png" else "application/octet-stream"
        return Reply(200, path.read_bytes(), media)


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
    _check(**app)
    uvicorn.run(application(Service(load(), **options), **app), host=host, port=port, log_level="warning")


def start_ray(load: Load, *, host: str, port: int, replicas: int, options: Mapping[str, Any], **app: Any) -> None:
    """Serve with some processes under Ray Serve, in a new local cluster unless Ray is connected to one; returns.

    Takes the arguments of `run_uvicorn`, and the number of ``replicas``. A replica that dies is replaced, and Ray sends
    the requests after it to the others; those that it was rendering fail, and their callers have to repeat them.

    Raises:
        MissingExtraError: If Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError(EXTRA.format(error.name)) from error
    _check(**app)

    def build() -> Any:
        return application(Service(load(), **options), **app)

    class Replica:
        pass

    queue = int(options.get("queue_limit", 256))
    deployment: Any = serve.deployment(name="retroexit", num_replicas=replicas, max_ongoing_requests=2 * queue)
    serve.start(http_options={"host": host, "port": port})
    serve.run(deployment(serve.ingress(build)(Replica)).bind(), name="retroexit")


def run_ray(load: Load, **settings: Any) -> None:
    """Serve as `start_ray` does, until it is interrupted."""
    start_ray(load, **settings)
    from ray import serve

    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        serve.shutdown()


def _check(max_megabytes: float = 16.0, examples: str | Path | None = None) -> None:
    if not 0 < max_megabytes < float("inf"):
        raise OptionError(f"max_megabytes must be a finite number > 0, got {max_megabytes}. Pass 16.")
    if examples is not None and not _read_examples(examples):
        raise OptionError(f"examples must be a folder with .png, .npy or .npz files, got {examples}. Check the path.")


def _read_examples(folder: str | Path | None) -> dict[str, Path]:
    if folder is None or not Path(folder).is_dir():
        return {}
    return {path.name: path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in _EXAMPLES}
