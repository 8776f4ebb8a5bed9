"""Nothing phones home: what is on this machine is customised and asked without a connection."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny_inputs

# What Python's own sockets are asked for, from the first import on; an attempt counts, whatever
# becomes of it.
WATCH = """
import sys

def told(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        where = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
        host = where[0] if isinstance(where, tuple) else where
        if host not in ("localhost", "127.0.0.1", "::1", None):
            print(f"went out: {event} {where}", file=sys.stderr)

sys.addaudithook(told)
"""
RUN = """
from qadapter.cli import main

def run(*arguments):
    try:
        main(list(arguments))
    except SystemExit as end:
        assert end.code == 0, (arguments, end.code)

run("train", "--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--output_dir",
    "run", "--max_steps", "2", "--max_completion_length", "2", "--answer_prompts", "2",
    "--answer_tokens", "2", "--bootstrap_resamples", "5", "--test_fraction", "0.3")
run("generate", "run", "--prompt", "Is it hot?", "--max_new_tokens", "2")
run("rewards", "run", "--dataset_name", "pairs.jsonl")
run("info")
"""


@pytest.fixture(scope="module")
def went_out(tmp_path_factory) -> list[str]:
    folder = save_tiny_inputs(tmp_path_factory.mktemp("home"), pairs=12)
    watcher = folder / "watch"
    watcher.mkdir()
    (watcher / "sitecustomize.py").write_text(WATCH)  # processes that it starts are watched too
    hub = [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]
    environment = {k: v for k, v in os.environ.items() if k not in hub} | {
        "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(watcher), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, env=environment, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(folder / "run/report.html").is_file()
    return [line for line in done.stderr.splitlines() if line.startswith("went out: ")]


@pytest.mark.slow
def test_a_run_on_this_machine_opens_no_connection(went_out):
    assert went_out == []


@pytest.mark.slow
def test_what_goes_out_is_seen(tmp_path):
    """Or the test above would find nothing wherever it looks."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    code = ("import socket; "
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert "went out: socket.connect ('192.0.2.1', 9)" in done.stderr
