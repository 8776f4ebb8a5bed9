"""Progress bars that show rate and time left; plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


def progress_bars(console: Console) -> Progress:
    """Done of all, rate, time passed and time left."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(),
        MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        console=console,
    )


@contextlib.contextmanager
def progress_bar(
    console: Console, description: str, unit: str
) -> Iterator[Callable[[int, int], None]]:
    """A bar for one piece of work, as the ``progress`` callback that evaluation takes."""
    start = time.monotonic()
    if not console.is_terminal:
        yield lambda done, total: None
        console.print(f"{description}: {time.monotonic() - start:.1f} s", highlight=False)
        return
    with progress_bars(console) as bars:
        task = bars.add_task(description, total=None, rate="", note="")

        def advance(done: int, total: int) -> None:
            rate = done / max(time.monotonic() - start, 1e-9)
            bars.update(task, completed=done, total=total, rate=f"{rate:.1f} {unit}/s")

        yield advance


class TrainingProgress(TrainerCallback):
    """A bar over the training steps with the last logged numbers beside it."""

    def __init__(self, console: Console):
        self.console = console
        self.bars: Progress | None = None
        self.start = (0.0, 0)
        self.note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.monotonic(), state.global_step
        if self.console.is_terminal:
            self.bars = progress_bars(self.console)
            self.bars.start()
            self.task = self.bars.add_task(
                "training", total=state.max_steps, completed=state.global_step, rate="", note=""
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bars is not None:
            self.bars.update(
                self.task, completed=state.global_step, rate=f"{self._rate(state):.2f} steps/s",
                note=self.note,
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:
        prefix = "eval_" if "eval_loss" in (logs or {}) else ""
        numbers = [f"{label} {logs[prefix + key]:.3f}" for key, label in _SHOWN.items()
                   if prefix + key in (logs or {})]
        if not numbers:
            return
        line = " ".join((["held-out"] if prefix else []) + numbers)
        if self.bars is not None and not prefix:
            self.note = line
            return
        left = (state.max_steps - state.global_step) / max(self._rate(state), 1e-9)
        self.console.print(
            f"step {state.global_step}/{state.max_steps}  {line}  ({left:.0f} s left)",
            highlight=False,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal as it was; also after training broke off."""
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def _rate(self, state: TrainerState) -> float:
        start, first_step = self.start
        return (state.global_step - first_step) / max(time.monotonic() - start, 1e-9)
