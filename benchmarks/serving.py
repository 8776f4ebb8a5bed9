"""What does serving cost: `qadapter serve` with an adapter as it was trained, beside `transformers
serve` with its merged export?

Both on loopback in one run, one after the other, on SmolLM2-135M-Instruct in float32 with the same
linear head adapter, and the same questions asked by N clients at once for some seconds, greedy.
`qadapter serve` once more with another strength for each client, which the export can't do.
A request that gets no answer is counted as lost.

    python benchmarks/serving.py --clients 1 8 32 --seconds 30
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Recorder

from qadapter import AdapterConfig, QAdapterModel

BASE = "smollm2@wheel"
THINGS = (
    "a river", "a violin", "the moon", "bread", "a bridge", "an oak", "glass", "a letter",
    "a market", "salt", "a kite", "winter", "a lighthouse", "tea", "a map", "wool",
)
QUESTIONS = [f"Tell me about {thing}, please, number {i}." for i in range(4) for thing in THINGS]
STRENGTHS = (0.0, 0.5, 1.0, 1.5)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER",
                         help="for serving.jsonl, which is appended to")
    options.add_argument("--commit", help="of a copy that git knows nothing about")
    options.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--seconds", type=float, default=30.0)
    options.add_argument("--tokens", type=int, default=48, help="most of an answer")
    given = options.parse_args()
    recorder = Recorder("serving", "cpu", "float32", given.output / "serving.jsonl", given.commit)
    with tempfile.TemporaryDirectory() as folder:
        adapter, merged = _models(Path(folder))
        _measure(given, recorder, "qadapter serve", adapter, {"model": "adapter"}, False)
        _measure(given, recorder, "qadapter serve, a strength each", adapter,
                 {"model": "adapter"}, True)
        for batching in ((), ("--continuous-batching",)):
            name = " ".join(("transformers serve, merged", *batching))
            _measure(given, recorder, name, merged, {"model": str(merged)}, False, batching)


def _models(folder: Path) -> tuple[Path, Path]:
    """An adapter that does something, and its export."""
    model = QAdapterModel.from_base(BASE, AdapterConfig(form="linear", rank=32), dtype="float32")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.adapter.up.weight, std=2e-3)
    model.save_pretrained(folder / "adapter")
    model.export(folder / "merged")
    return folder / "adapter", folder / "merged"


def _measure(
    given: argparse.Namespace, recorder: Recorder, name: str, folder: Path, fields: dict[str, Any],
    strengths: bool, flags: Sequence[str] = (),
) -> None:
    with _server(name, folder, flags) as url:
        _ask(url, QUESTIONS[0], given.tokens, fields)  # what is done once
        for clients in given.clients:
            found = _load(url, clients, given, fields, strengths)
            recorder.add(server=name, clients=clients, **found)
            print(
                f"{name}, {clients} clients: {found['tokens_per_second']:.1f} tokens/s, "
                f"{found['requests']} answers, {found['lost']} lost, median "
                f"{found['median_seconds']:.2f} s, slowest {found['slowest_seconds']:.2f} s",
                flush=True,
            )


def _load(
    url: str, clients: int, given: argparse.Namespace, fields: dict[str, Any], strengths: bool
) -> dict[str, Any]:
    """N clients, each with one question after the other until the time is over."""
    numbers, lock = itertools.count(), threading.Lock()
    took: list[float] = []
    tokens = lost = 0
    started = time.perf_counter()

    def client(number: int) -> None:
        nonlocal tokens, lost
        own = fields | ({"strength": STRENGTHS[number % len(STRENGTHS)]} if strengths else {})
        while time.perf_counter() - started < given.seconds:
            with lock:
                question = QUESTIONS[next(numbers) % len(QUESTIONS)]
            began = time.perf_counter()
            try:
                answer = _ask(url, question, given.tokens, own)
                written = answer["usage"]["completion_tokens"]
                whole = bool(answer["choices"][0]["message"]["content"]) and written > 0
            except (OSError, KeyError, ValueError):
                whole, written = False, 0
            with lock:
                took.append(time.perf_counter() - began)
                tokens += written
                lost += not whole

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds, "requests": len(took), "lost": lost, "most_tokens": given.tokens,
        "tokens_per_second": tokens / seconds, "median_seconds": statistics.median(took),
        "slowest_seconds": max(took),
    }


def _ask(url: str, question: str, tokens: int, fields: dict[str, Any]) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens,
            "temperature": 0, **fields}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


@contextlib.contextmanager
def _server(name: str, folder: Path, flags: Sequence[str]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = ("--host", "127.0.0.1", "--port", port)
    command = [sys.executable, "-P", "-m"]
    if name.startswith("qadapter"):
        command += ["qadapter.cli", "serve", str(folder), *place, "--dtype", "float32"]
    else:
        command += ["transformers.cli.transformers", "serve", str(folder), *place, "--device",
                    "cpu", *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        url = f"http://127.0.0.1:{port}"
        try:
            while not _alive(url):
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(log.read().decode(errors="replace")[-2000:])
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _alive(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


if __name__ == "__main__":
    main()
