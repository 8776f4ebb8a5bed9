"""``qadapter bench``: the benchmark scripts of the repository, one after the other."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import typer

from qadapter.commands.options import Group, command
from qadapter.errors import QAdapterError

QUESTIONS = {
    "linear_loss": "the hidden-level loss beside eager PyTorch, torch.compile, Liger, TRL and "
                   "cut-cross-entropy",
    "logits_loss": "the logits-level loss beside a copy",
    "scaling": "time over rows and over the vocabulary",
    "evaluation": "scores of held-out states beside eager PyTorch",
    "decoding": "two streams to one token",
    "training_step": "a training step of a whole model, lever by lever",
    "generation": "decoding one stream or two through generate",
}
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@dataclass
class BenchArguments:
    """What is measured, and where."""

    question: str = field(default="all", metadata={
        "help": "; ".join(f"{name}: {what}" for name, what in QUESTIONS.items()) + ".",
        "choices": ["all", *QUESTIONS],
    })
    device: str = field(default="auto", metadata={
        "help": "auto takes the GPU if there is one.", "choices": ["auto", "cpu", "cuda"],
    })
    threads: int = field(default=0, metadata={"help": "CPU threads; 0: PyTorch's own choice."})
    budget: float = field(default=20.0, metadata={
        "help": "Seconds of timed rounds for each group of cases."
    })
    output_dir: str = field(default="runs/bench", metadata={
        "help": "Folder for the measurements (JSON Lines, appended) and the pictures."
    })
    dry_run: bool = field(default=False, metadata={
        "help": "Tiny shapes, to see that everything works; the numbers mean nothing."
    })


def app(show_hidden: bool = False) -> typer.Typer:
    return command(
        "bench", "Measure the kernels beside their peers. Scripts: benchmarks/ of the repository.",
        (Group(BenchArguments, "Benchmarks"),), run, show_hidden=show_hidden,
    )


def run(options: BenchArguments, given: set[str]) -> None:
    if not (FOLDER / "linear_loss.py").exists():
        raise QAdapterError(
            "qadapter bench runs the scripts in benchmarks/ of the repository, which a wheel does "
            "not hold: install from a checkout (pip install -e .)"
        )
    flags = ["--budget", str(options.budget), "--output", options.output_dir]
    if options.device != "auto":
        flags += ["--device", options.device]
    if options.threads > 0:
        flags += ["--threads", str(options.threads)]
    if options.dry_run:
        flags.append("--dry-run")
    names = QUESTIONS if options.question == "all" else [options.question]
    failed = []
    for name in names:  # a process each: none finds what another compiled or allocated
        done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *flags])
        if done.returncode != 0:
            failed.append(name)
    if failed:
        raise QAdapterError(f"failed: {', '.join(failed)} (its own message is above)")
