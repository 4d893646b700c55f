"""The ASGI application of a server: routes, bodies, the page, metrics."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from retroexit.errors import MissingExtraError, OptionError
from retroexit.runtime.service import EXTRA, Reply, refusal

__all__ = ["application", "check_page"]

_BOUNDARY: Final = "image"
_EXAMPLES = (".png", ".npy", ".npz")


class _TooLarge(Exception):
    """The body is larger than allowed."""


class _Request(Protocol):
    """What is read of a request of Starlette."""

    headers: Mapping[str, str]
    query_params: Mapping[str, str]
    path_params: Mapping[str, str]

    def stream(self) -> AsyncIterator[bytes]: ...


class Backend(Protocol):
    """What answers requests: a `Service`, or the `Replicas` of one."""

    async def render(self, query: Any, headers: Any, body: bytes) -> Reply: ...

    def draft_and_refine(self, query: Any, headers: Any, body: bytes) -> AsyncIterator[Reply]: ...

    async def health(self) -> Reply: ...

    async def describe(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


def application(backend: Backend, *, max_megabytes: float = 16.0, examples: str | Path | None = None) -> Any:
    """Make the ASGI application of a service, for any server or a test client.

    Args:
        backend: The service, which ends with the application.
        max_megabytes: Largest body.
        examples: Folder with inputs (.png, .npy, .npz) for the page at ``/``.

    Raises:
        OptionError: If an option is out of range, or the folder does not exist.
        MissingExtraError: If Starlette or prometheus_client is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import Response, StreamingResponse
        from starlette.routing import Route

        from retroexit.runtime.metrics import Metrics
    except ImportError as error:
        raise MissingExtraError(EXTRA.format(error.name)) from error
    check_page(max_megabytes, examples)
    handlers = _Handlers(backend, Metrics(), int(max_megabytes * 1e6), _read_examples(examples))

    def endpoint(handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
        async def answer(request: Any) -> Any:
            reply = await handler(request)
            if isinstance(reply, Reply):
                return Response(reply.content, reply.status, reply.headers, reply.media)
            return StreamingResponse(reply, media_type=f"multipart/x-mixed-replace; boundary={_BOUNDARY}")

        return answer

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        yield
        backend.close()

    posts: dict[str, Callable[[Any], Any]]
    gets: dict[str, Callable[[Any], Any]]
    posts = {"/render": handlers.render, "/draft-and-refine": handlers.draft_and_refine}
    gets = {"/": handlers.page, "/healthz": handlers.health, "/metrics": handlers.metrics, "/info": handlers.info}
    gets["/examples/{name}"] = handlers.example
    routes = [Route(path, endpoint(handler), methods=["POST"]) for path, handler in posts.items()]
    routes += [Route(path, endpoint(handler), methods=["GET"]) for path, handler in gets.items()]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.backend = backend
    return app


class _Handlers:
    """One coroutine per route."""

    def __init__(self, backend: Backend, counters: Any, max_bytes: int, examples: dict[str, Path]) -> None:
        self.backend, self.counters, self.max_bytes, self.examples = backend, counters, max_bytes, examples
        self._described: dict[str, Any] | None = None

    async def render(self, request: _Request) -> Reply:
        try:
            body = await self._body(request)
        except _TooLarge as error:
            return await self._counted(refusal(error, status=413))
        query, headers = dict(request.query_params), dict(request.headers)
        return await self._counted(await self.backend.render(query, headers, body))

    async def draft_and_refine(self, request: _Request) -> Reply | AsyncIterator[bytes]:
        try:
            body = await self._body(request)
        except _TooLarge as error:
            return await self._counted(refusal(error, status=413))
        parts = self.backend.draft_and_refine(dict(request.query_params), dict(request.headers), body)
        first = await self._counted(await anext(parts))
        return self._multipart(first, parts) if first.status == 200 else first

    async def _multipart(self, first: Reply, parts: AsyncIterator[Reply]) -> AsyncIterator[bytes]:
        yield _part(first)
        async for part in parts:
            yield _part(await self._counted(part))
        yield f"--{_BOUNDARY}--\r\n".encode()

    async def _counted(self, reply: Reply) -> Reply:
        macs = (await self._description())["macs"] if reply.status == 200 else 0
        self.counters.count(reply, macs)
        return reply

    async def _description(self) -> dict[str, Any]:
        if self._described is None:
            self._described = await self.backend.describe()
        return self._described

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
        return await self.backend.health()

    async def metrics(self, _request: _Request) -> Reply:
        return self.counters.reply()

    async def info(self, _request: _Request) -> Reply:
        facts = {**await self._description(), "examples": list(self.examples)}
        return Reply(200, json.dumps(facts).encode(), "application/json")

    async def example(self, request: _Request) -> Reply:
        path = self.examples.get(request.path_params["name"])
        if path is None:
            return refusal(
                OptionError(f"no example {request.path_params['name']!r}. Take a name of /info."), status=404
            )
        media = "image/png" if path.suffix.lower() == ".png" else "application/octet-stream"
        return Reply(200, path.read_bytes(), media)


def _part(reply: Reply) -> bytes:
    facts = {"Content-Type": reply.media, **reply.headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in facts.items())
    return f"--{_BOUNDARY}\r\n{lines}\r\n".encode() + reply.content + b"\r\n"


def check_page(max_megabytes: float = 16.0, examples: str | Path | None = None) -> None:
    """Raise `OptionError` unless the options of `application` can be met."""
    if not 0 < max_megabytes < float("inf"):
        raise OptionError(f"max_megabytes must be a finite number > 0, got {max_megabytes}. Pass 16.")
    if examples is not None and not _read_examples(examples):
        raise OptionError(f"examples must be a folder with .png, .npy or .npz files, got {examples}. Check the path.")


def _read_examples(folder: str | Path | None) -> dict[str, Path]:
    if folder is None or not Path(folder).is_dir():
        return {}
    return {path.name: path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in _EXAMPLES}
