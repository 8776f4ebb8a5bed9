"""The server's addresses, and what happens behind them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from qadapter.errors import QAdapterError
from qadapter.serving.answers import Shape, failure, write_all
from qadapter.serving.engine import Busy, Engine, EngineFailed
from qadapter.serving.guard import Guard
from qadapter.serving.models import ServedModel, ServedModels
from qadapter.serving.page import page
from qadapter.serving.preferences import PreferenceFile
from qadapter.serving.requests import (
    Asked,
    Fields,
    RequestError,
    messages_field,
    read_chat,
    read_completion,
    text_field,
)
from qadapter.serving.rewards import read_rewards, rewards
from qadapter.system.documents import parse_json

_BODY_SECONDS = 60.0
"""A body has to be here by then."""
_SEND_SECONDS = 60.0
"""A client that takes nothing for so long has left."""
_GONE = Response(status_code=499)
"""Nobody reads it."""


@dataclasses.dataclass
class Service:
    """What all requests share."""

    engine: Engine
    models: ServedModels
    host: str
    key: str | None
    preferences: PreferenceFile | None
    max_body_bytes: int
    draining: bool = False

    def __post_init__(self) -> None:
        # One thread: a tokenizer is no thing for several at once.
        self._tokenizing = concurrent.futures.ThreadPoolExecutor(1, "tokenizing")

    async def read(self, work: Callable[..., Any], *args: Any) -> Any:
        """Runs what tokenizes, or waits for a disk, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work, *args)

    def close(self) -> None:
        self._tokenizing.shutdown(wait=False, cancel_futures=True)


def build(service: Service) -> Guard:
    """The application, with its guard."""
    app = FastAPI(title="qadapter", openapi_url=None, docs_url=None, redoc_url=None)
    models = service.models
    html, headers = page()

    @app.get("/")
    async def show_page() -> Response:
        return HTMLResponse(html, headers=headers)

    @app.get("/health")
    async def health() -> Response:
        if service.draining:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def list_models() -> Response:
        found = [_described(served, service) for served in models.by_name.values()]
        return JSONResponse({"object": "list", "data": found})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        if name not in models.by_name:
            raise RequestError(
                f"there is no model {name!r} here", "model", status=404, code="model_not_found"
            )
        return JSONResponse(_described(models.by_name[name], service))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, read_chat, chat=True)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _answer(service, request, read_completion, chat=False)

    @app.post("/v1/qadapter/rewards")
    async def score(request: Request) -> Response:
        body = await _body(request, service.max_body_bytes)
        length = service.engine.max_length
        asked = await service.read(read_rewards, body, models, length)
        with _reserved(service.engine, 1):
            work = service.engine.alone(rewards, models, asked)
            found = await _unless_gone(request.receive, work)
        return _GONE if found is None else JSONResponse(found)

    @app.post("/v1/qadapter/preferences")
    async def save(request: Request) -> Response:
        if service.preferences is None:
            raise RequestError(
                "this server keeps no preferences: start it with --preferences_file", status=404
            )
        body = await _body(request, service.max_body_bytes)
        return JSONResponse(await service.read(_save, service.preferences, body))

    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _no_such_address)
    app.add_exception_handler(Exception, _failed)
    return Guard(app, service.host, service.key, lambda: service.draining)


def _described(served: ServedModel, service: Service) -> dict[str, Any]:
    return {
        "id": served.name, "object": "model", "created": 0, "owned_by": "qadapter",
        "max_model_len": service.engine.max_length,
        "qadapter": {
            "kind": "base" if served.policy is None else "adapter", "strength": served.strength,
            "saves_preferences": service.preferences is not None,
        },
    }


def _save(preferences: PreferenceFile, body: Any) -> dict[str, Any]:
    fields = Fields(body, {"prompt", "chosen", "rejected"})
    prompt = messages_field(fields, "prompt")
    try:
        return preferences.append(
            prompt, text_field(fields, "chosen"), text_field(fields, "rejected")
        )
    except QAdapterError as error:
        raise RequestError(str(error)) from error
    except OSError as error:
        raise RequestError(
            f"the pair was not saved: {error.strerror}", status=500, kind="server_error"
        ) from error


async def _refused(request: Request, error: RequestError) -> Response:
    headers = {"retry-after": "1"} if error.status == 429 else {}
    return JSONResponse(error.body, error.status, headers)


async def _no_such_address(request: Request, error: HTTPException) -> Response:
    said = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RequestError(said).body, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    said = RequestError("the server failed: its log says how", kind="server_error")
    return JSONResponse(said.body, 500)


async def _body(request: Request, most: int) -> Any:
    """The JSON of a body.

    Raises:
        RequestError: too large, too slow, or no JSON.
    """
    too_large = RequestError(
        f"the body holds more than the {most:,} bytes that this server takes", status=413,
        code="body_too_large",
    )
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > most:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > most:
                    raise too_large
    except TimeoutError as error:
        raise RequestError("the body did not come in time", status=408) from error
    try:
        return parse_json(data.decode(), "the body")
    except (QAdapterError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is no JSON: {error}") from error


# --- answers ----------------------------------------------------------------------------------


async def _answer(
    service: Service, request: Request, read: Callable[..., Asked], *, chat: bool
) -> Response:
    body = await _body(request, service.max_body_bytes)
    engine = service.engine
    asked = await service.read(read, body, service.models, engine.max_length)
    shape = Shape(asked, chat)
    if asked.stream:
        return _Events(engine, asked, shape)

    async def collect() -> dict[str, Any]:
        pieces = []
        async with contextlib.aclosing(write_all(engine, asked)) as all_pieces:
            async for piece in all_pieces:
                shape.count(piece)
                pieces.append(piece)
        return shape.whole(pieces)

    with _reserved(engine, asked.answers):
        try:
            found = await _unless_gone(request.receive, collect())
        except EngineFailed as error:
            raise failure(error) from error
    return _GONE if found is None else JSONResponse(found)


@contextlib.contextmanager
def _reserved(engine: Engine, answers: int):
    if answers > engine.max_concurrency:
        raise RequestError(
            f"{answers} answers at once are more than the {engine.max_concurrency} that this "
            "server writes", "n",
        )
    try:
        engine.reserve(answers)
    except Busy:
        raise RequestError(
            f"this server writes {engine.max_concurrency} answers at once, and they are being "
            "written: ask again in a moment", status=429, kind="rate_limit_error",
            code="rate_limit_exceeded",
        ) from None
    try:
        yield
    finally:
        engine.release(answers)


async def _unless_gone(receive: Callable[[], Any], work: Coroutine[Any, Any, Any]) -> Any:
    """What work finds; None where the client left before, which ends it."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Events(Response):
    """Server-sent events, while there is somebody who takes them."""

    media_type = "text/event-stream"

    def __init__(self, engine: Engine, asked: Asked, shape: Shape):
        self.status_code, self.background, self.body = 200, None, b""
        self.engine, self.asked, self.shape = engine, asked, shape
        self._room = contextlib.ExitStack()
        self._room.enter_context(_reserved(engine, asked.answers))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._room:
            await _unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"),
        ]})
        for chunk in self.shape.opening():
            await self._send(send, chunk)
        try:
            async with contextlib.aclosing(write_all(self.engine, self.asked)) as pieces:
                async for piece in pieces:
                    self.shape.count(piece)
                    for chunk in self.shape.piece(piece):
                        await self._send(send, chunk)
            for chunk in self.shape.closing():
                await self._send(send, chunk)
            last = b"data: [DONE]\n\n"
        except EngineFailed as error:
            last = _event(failure(error).body)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send(self, send: Any, chunk: dict[str, Any]) -> None:
        async with asyncio.timeout(_SEND_SECONDS):
            await send({"type": "http.response.body", "body": _event(chunk), "more_body": True})


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
