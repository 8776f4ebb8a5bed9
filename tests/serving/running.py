"""A server of tiny models, in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from tiny_models import save_tiny, tiny_llama

from qadapter import AdapterConfig, QAdapterModel
from qadapter.serving import models, server
from qadapter.serving.app import Service
from qadapter.serving.engine import Engine
from qadapter.trunk.loading import load_base, load_tokenizer

ADAPTERS = {
    "gated": AdapterConfig(form="mlp", rank=4), "block": AdapterConfig(form="block", rank=4),
    "low": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "rank": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}


def save_adapters(folder: Path) -> Path:
    """A base and an adapter of each kind, trained on nothing, that do something."""
    save_tiny(folder / "base")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        model = QAdapterModel.from_base(load_base(folder / "base", dtype="float32"), config)
        torch.manual_seed(seed + 1)
        for parameter in model.adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
    return folder


def service_of(
    folder: Path, names=tuple(ADAPTERS), *, max_length=200, max_concurrency=16, host="127.0.0.1",
    key=None, preferences=None, max_body_bytes=10_000, strength=1.0, **loading,
) -> Service:
    loaded = load_base(folder / "base", dtype="float32", **loading)
    adapters = {name: str(folder / name) for name in names}
    tokenizer = load_tokenizer(folder / "base")
    served = models.load(
        adapters, "base", loaded, dict.fromkeys([*adapters, "base"], tokenizer), strength
    )
    return Service(
        Engine(served, max_length, max_concurrency), served, host, key, preferences,
        max_body_bytes,
    )


class Running:
    """Attributes: ``url``, ``service``, ``server`` (uvicorn's)."""

    def __init__(self, service: Service, grace_seconds: float):
        self.service = service
        self.listening = server.listen("127.0.0.1", 0)
        self.url = server.address_of(self.listening, "127.0.0.1").rstrip("/")
        self.ready = threading.Event()
        self.grace_seconds = grace_seconds
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.error = error
        finally:
            self.ready.set()

    async def _serve(self) -> None:
        try:
            await self.service.engine.check()
            self.server = server.Server(self.service, self.grace_seconds, self.ready.set)
            await self.server.serve(sockets=[self.listening])
        finally:
            await self.service.engine.stop()
            self.service.close()
            self.listening.close()


@contextlib.contextmanager
def running(service: Service, grace_seconds: float = 10.0) -> Iterator[Running]:
    found = Running(service, grace_seconds)
    found.thread.start()
    found.ready.wait()
    try:
        if found.error is not None:
            raise found.error
        yield found
    finally:
        if found.thread.is_alive():
            found.server.should_exit = found.server.force_exit = True
            found.thread.join(60)
    assert not found.thread.is_alive()


def reference(folder: Path, name: str) -> QAdapterModel:
    """An adapter by itself; a base as ``tiny_llama`` made it."""
    if name == "base":
        return tiny_llama()
    return QAdapterModel.from_pretrained(folder / name, str(folder / "base"), dtype="float32")
