"""The machine and the versions a number came from."""

from __future__ import annotations

import importlib.metadata
import platform
import resource

import datasets
import torch
import transformers

PACKAGES = (
    "qadapter", "torch", "triton", "transformers", "peft", "accelerate", "datasets", "safetensors",
    "huggingface_hub",
)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def devices() -> dict[str, str]:
    """Device → what it is."""
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def peak_rss_bytes() -> int:
    """Most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def quiet_libraries() -> None:
    """No progress bars and warnings of libraries between our own lines."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
