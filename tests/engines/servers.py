"""Engines as processes on this machine alone: started by the commands of an export's card, asked by
OpenAI's API."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from policies import TOKENS, Answer

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600.0
"""Seconds that a server may take to start."""


@dataclass(frozen=True)
class Engine:
    """How an engine is run here: where its programs are, what to add to its commands."""

    name: str
    """As ``qadapter.exporting.engines`` calls it."""
    environment: str
    """A virtual environment of this checkout."""
    version: str
    """A command whose last line it is."""
    options: tuple[str, ...] = ()
    """What this lane adds: how much of the machine it may take, and float32 all along."""
    gives_logprobs: bool = True

    @property
    def programs(self) -> Path:
        return ROOT / self.environment / "bin"


ENGINES = {
    engine.name: engine for engine in (
        Engine(
            "vLLM", ".venv-vllm", "vllm --version",
            # Without a compilation it starts in half a minute.
            ("--gpu-memory-utilization", "0.1", "--max-model-len", "2048", "--enforce-eager"),
        ),
        Engine(
            "llama.cpp", ".venv-llama", "cat .venv-llama/version",
            # Keys and values, and attention's sums, are in 16 bits by default.
            ("--threads", "1", "--ctx-size", "2048", "--parallel", "1", "--cache-type-k", "f32",
             "--cache-type-v", "f32", "--flash-attn", "off"),
        ),
        Engine("transformers serve", ".venv", "transformers version", ("--device", "cpu"), False),
    )
}


def environment_of(engine: Engine) -> dict[str, str]:
    """What its processes see: its programs first, nothing of ours, no network."""
    paths = (str(engine.programs), str(Path(sys.executable).parent), os.environ["PATH"])
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {
        **own, "PATH": ":".join(paths), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }


def version_of(engine: Engine) -> str:
    """Its own word for its version."""
    output = subprocess.run(
        shlex.split(engine.version), cwd=ROOT, env=environment_of(engine), check=True,
        stdout=subprocess.PIPE, text=True,
    ).stdout
    return output.strip().splitlines()[-1]


@contextlib.contextmanager
def serving(engine: Engine, commands: Sequence[str], folder: Path) -> Iterator[str]:
    """Run shell lines in a folder, the last of which serves; the server's URL."""
    assert engine.programs.is_dir(), f"{engine.name} is not installed: make test-engines"
    env = environment_of(engine)
    *before, command = commands
    for line in before:
        done = subprocess.run(line, shell=True, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    port = free_port()
    command = shlex.join(
        [*shlex.split(command), *engine.options, "--host", "127.0.0.1", "--port", str(port)]
    )
    log = folder / f"{engine.name.replace(' ', '-')}-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {command}"], cwd=folder, env=env, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}", command, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(process)


def _wait(process: subprocess.Popen, url: str, command: str, log: Path) -> None:
    start = time.monotonic()
    while not _alive(url):
        if process.poll() is not None or time.monotonic() - start > PATIENCE:
            text = log.read_text(errors="replace")[-6000:]
            pytest.fail(f"{command}\ndid not serve ({process.poll()}):\n{text}", pytrace=False)
        time.sleep(0.5)


def _end(process: subprocess.Popen) -> None:
    """The server, and what it started."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _alive(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def ask(url: str, model: str, prompt: str, logprobs: bool) -> dict:
    """A greedy chat completion."""
    body = {
        "model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
        "max_tokens": TOKENS, **({"logprobs": True, "top_logprobs": 2} if logprobs else {}),
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", method="POST", data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return json.load(response)["choices"][0]
    except urllib.error.HTTPError as error:
        pytest.fail(f"{error}: {error.read()[:2000]!r}", pytrace=False)


def answer_of(choice: dict, ours: Answer, end: str) -> Answer:
    """What a choice says, token by token.

    Args:
        ours: by which a text is divided where an engine lists no tokens.
        end: the text of the token that ends an answer; some engines list it, some don't.
    """
    ended = choice["finish_reason"] == "stop"
    if not choice.get("logprobs"):
        return Answer(_divided(choice["message"]["content"], ours.tokens), ended, None)
    entries = choice["logprobs"]["content"]
    if ended and entries and entries[-1]["token"] in (end, ""):
        entries = entries[:-1]
    return Answer(
        tuple(entry["token"] for entry in entries), ended,
        tuple(entry["logprob"] for entry in entries),
    )


def _divided(text: str, tokens: Sequence[str]) -> tuple[str, ...]:
    """Tokens for as long as a text goes on with them, then what is left of it."""
    found = []
    for token in tokens:
        if not token or not text.startswith(token):
            break
        found.append(token)
        text = text.removeprefix(token)
    return (*found, text) if text else tuple(found)
