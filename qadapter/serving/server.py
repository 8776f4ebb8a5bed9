"""The server's life: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from qadapter.errors import QAdapterError
from qadapter.serving.app import Service, build

_AFTER_GRACE = 5
"""Seconds in which answers that were ended say so to their clients."""

_KEEP_ALIVE = 75
"""Seconds for which a connection stays open without a request: longer than clients (httpx: 5) and
proxies (nginx: 60) keep theirs. Were the server the first to close it, a request sent meanwhile
would be lost."""


def listen(host: str, port: int) -> socket.socket:
    """A socket, before anything slow is done.

    Raises:
        QAdapterError: it can't be had.
    """
    try:
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        found = socket.socket(family, kind)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QAdapterError(f"{host}:{port}: {reason}: choose another --port or --host") from error
    return found


def address_of(listening: socket.socket, host: str) -> str:
    """Where a browser finds it."""
    port = listening.getsockname()[1]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def run(
    service: Service, listening: socket.socket, grace_seconds: float, ready: Callable[[], None]
) -> None:
    """Serves until a signal comes, which is then handed on.

    Args:
        grace_seconds: how long answers may go on after it.
        ready: called when requests are taken.

    Raises:
        QAdapterError: the models can't be batched.
    """
    asyncio.run(_run(service, listening, grace_seconds, ready))


async def _run(
    service: Service, listening: socket.socket, grace_seconds: float, ready: Callable[[], None]
) -> None:
    try:
        await service.engine.check()
        await Server(service, grace_seconds, ready).serve(sockets=[listening])
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            await service.engine.stop()
        service.close()
        listening.close()


class Server(uvicorn.Server):
    """One that lets answers end when a signal comes, and refuses new ones."""

    def __init__(self, service: Service, grace_seconds: float, ready: Callable[[], None]):
        super().__init__(uvicorn.Config(
            build(service), log_level="warning", access_log=False, server_header=False, ws="none",
            lifespan="off", timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=int(grace_seconds) + _AFTER_GRACE,
        ))
        self.service, self.grace_seconds, self.ready = service, grace_seconds, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self.ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        grace_seconds = 0.0 if self.should_exit else self.grace_seconds  # a second one: at once
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._drain, grace_seconds)

    def _drain(self, grace_seconds: float) -> None:
        self.service.draining = True
        self._loop.call_later(
            grace_seconds, self.service.engine.end_all, "the server was shut down meanwhile"
        )
