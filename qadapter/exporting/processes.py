"""Other people's code, asked in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from qadapter.errors import QAdapterError


def run(
    command: Sequence[str], result: Path, failed: Callable[[str], QAdapterError]
) -> None:
    """Run Python with a command's words.

    Args:
        result: the file that it is to write.
        failed: the error, from the reason why there is none: its last line.
    """
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not result.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise failed(lines[-1][:500] if lines else f"exit code {done.returncode}")


def ask(
    script: Path, request: Mapping[str, Any], scratch: Path,
    failed: Callable[[str], QAdapterError],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Run a script that reads a request and writes tensors with metadata; those.

    Args:
        scratch: a folder for the exchange.
        failed: as in ``run``.
    """
    question, answer = (scratch / f"{script.stem}.{kind}" for kind in ("json", "safetensors"))
    question.write_text(json.dumps(request), encoding="utf-8")
    run(["-P", str(script), str(question), str(answer)], answer, failed)
    with safe_open(answer, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
