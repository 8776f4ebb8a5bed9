"""Who may ask: a server on this machine is open to this machine's programs, and to the pages that
it serves itself, not to other sites' pages that a browser here shows."""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from qadapter.errors import QAdapterError
from qadapter.serving.requests import RequestError
from qadapter.system.textfiles import read_text

_HERE = {"localhost", "127.0.0.1", "::1"}
_SHORTEST_KEY = 16
_OPEN = {"/", "/health"}
"""What needs no key: it tells nothing of the model."""


def is_loopback(host: str) -> bool:
    """Whether a host means this machine alone.

    Raises:
        QAdapterError: no such host.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise QAdapterError(f"host {host}: {error.strerror}") from error
    return all(ipaddress.ip_address(str(a[4][0]).partition("%")[0]).is_loopback for a in found)


def read_key(path: str | Path) -> str:
    """
    Raises:
        QAdapterError: can't be read, or holds no key.
    """
    key = read_text(path, most=4096).strip()
    if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise QAdapterError(
            f"{path} must hold one key of at least {_SHORTEST_KEY} characters, none of them a "
            "space: python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        )
    return key


@dataclasses.dataclass
class Guard:
    """Stands before the application.

    Args:
        app: an ASGI application.
        host: what the server listens on.
        key: what requests must carry; None: nothing, on a loopback host.
        draining: whether the server is about to end.
    """

    app: Callable[..., Awaitable[None]]
    host: str
    key: str | None
    draining: Callable[[], bool]

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            refused = self._refusal(scope)
            if refused is not None:
                answer = JSONResponse(refused.body, refused.status)
                if refused.status == 401:
                    answer.headers["www-authenticate"] = "Bearer"
                if refused.status == 503:
                    answer.headers["retry-after"] = "5"
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, scope: dict[str, Any]) -> RequestError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        # A name that leads here is not enough: another site's name can be made to.
        if self.key is None and _name(host) not in _HERE | {self.host}:
            return RequestError(
                "this server answers to localhost alone", status=403, code="wrong_host"
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return RequestError(
                "pages of other sites may not ask here", status=403, code="wrong_origin"
            )
        if self.key is not None and scope["path"] not in _OPEN and not self._has_key(headers):
            return RequestError(
                "this server needs its API key: Authorization: Bearer …", status=401,
                kind="authentication_error", code="invalid_api_key",
            )
        if scope["method"] == "POST":
            if self.draining():
                return RequestError(
                    "the server is shutting down", status=503, kind="server_error",
                    code="shutting_down",
                )
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return RequestError("Content-Type must be application/json", status=415)
        return None

    def _has_key(self, headers: Headers) -> bool:
        if self.key is None:
            return False
        kind, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.key.encode())
        return kind.lower() == "bearer" and same


def _name(host: str) -> str:
    """A Host header's name, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
