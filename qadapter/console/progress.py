"""How far long work is: bars with rate and time left on a terminal; elsewhere (a log file, CI) a
line every 15 s.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
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

EVERY_S = 15.0
_RECENT_S = 60.0
_SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


class Pace:
    """Done of all, rate and time left of one piece of work; the rate is that of the last minute.

    Args:
        description: what is done. unit: what it is counted in.
        done: what was done before it starts.
        clock: seconds.
    """

    def __init__(
        self, description: str, unit: str, *, done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.unit, self.clock = description, unit, clock
        self.total: int | None = None
        self.start = clock()
        self._marks = deque([(self.start, done)])

    def __call__(self, done: int, total: int) -> None:
        """As the ``progress`` callback that libraries take."""
        self.total = total
        now = self.clock()
        self._marks.append((now, done))
        # The last mark before the last minute stays: there the rate is measured from.
        while len(self._marks) > 2 and now - self._marks[1][0] >= _RECENT_S:
            self._marks.popleft()

    @property
    def done(self) -> int:
        return self._marks[-1][1]

    def rate(self) -> float:
        """Units a second; 0 as long as nothing was done."""
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return max(0, after - before) / max(end - start, 1e-9)

    def line(self) -> str:
        """``answering: 12 of 64 answers, 0.8 answers/s, 1 min 5 s left``."""
        passed = duration(self.clock() - self.start)
        if self.total is None:
            return f"{self.description}: {passed} so far"
        line = f"{self.description}: {self.done:,} of {self.total:,} {self.unit}"
        rate = self.rate()
        if rate == 0:
            return f"{line}, {passed} so far"
        # What is left counts from now, not from the last time that something was done.
        left = (self.total - self.done) / rate - (self.clock() - self._marks[-1][0])
        return f"{line}, {_number(rate)} {self.unit}/s, {duration(max(left, 0))} left"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min 5 s``, ``3 h 20 min``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


class Heartbeat:
    """Says a line whenever nothing was said for 15 s, in a thread of its own: the work itself may
    be one long step.

    Args:
        line: what to say now. say: gets it.
        wait: for some seconds, and gives whether the work is done.
    """

    def __init__(
        self, line: Callable[[], str], say: Callable[[str], None], *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._line, self._say, self._clock = line, say, clock
        self._end = threading.Event()
        self._wait = self._end.wait if wait is None else wait
        self._thread = threading.Thread(target=self.run, daemon=True)
        self.said()

    def said(self) -> None:
        """Something was said by someone else: 15 s from now on."""
        self._due = self._clock() + EVERY_S

    def run(self) -> None:
        while not self._wait(max(self._due - self._clock(), 0)):
            if self._clock() >= self._due:
                self.said()
                self._say(self._line())

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()


def progress_bars(console: Console) -> Progress:
    """Done of all, rate, time passed and time left."""
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
        TaskProgressColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


@contextlib.contextmanager
def progress_bar(
    console: Console, description: str, unit: str, *, closing: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """Shows how far one piece of work is, which it tells the ``progress`` callback given.

    Args:
        closing: where there is no terminal, a line with its time at the end.
    """
    pace = Pace(description, unit)
    if not console.is_terminal:
        with Heartbeat(pace.line, saying(console)):
            yield pace
        if closing:
            saying(console)(f"{description}: {time.monotonic() - pace.start:.1f} s")
        return
    with progress_bars(console) as bars:
        task = bars.add_task(description, total=None, rate="", note="")

        def advance(done: int, total: int) -> None:
            pace(done, total)
            bars.update(
                task, completed=done, total=total, rate=f"{_number(pace.rate())} {unit}/s"
            )

        yield advance


def saying(console: Console) -> Callable[[str], None]:
    """Prints the lines that long work, and loading, have to tell."""
    # Not wrapped at the width of no terminal: a line is a line.
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


class TrainingProgress(TrainerCallback):
    """A bar over the training steps with the last logged numbers beside it; or lines."""

    def __init__(self, console: Console):
        self.console = console
        self.bars: Progress | None = None
        self.heartbeat: Heartbeat | None = None
        self.pace = Pace("training", "steps")
        self.evaluation: Pace | None = None
        self.note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pace = Pace("training", "steps", done=state.global_step)
        self.pace(state.global_step, state.max_steps)
        if self.console.is_terminal:
            self.bars = progress_bars(self.console)
            self.bars.start()
            self.task = self.bars.add_task(
                "training", total=state.max_steps, completed=state.global_step, rate="", note=""
            )
        else:
            self.heartbeat = Heartbeat(
                lambda: (self.evaluation or self.pace).line(), saying(self.console)
            )
            self.heartbeat.__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.evaluation = None
        self.pace(state.global_step, state.max_steps)
        if self.bars is not None:
            self.bars.update(
                self.task, completed=state.global_step, rate=f"{self.pace.rate():.2f} steps/s",
                note=self.note,
            )

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        eval_dataloader: Any = None, **kwargs: Any,
    ) -> None:
        if self.evaluation is None:
            self.evaluation = Pace("held-out pairs", "batches")
        self.evaluation(self.evaluation.done + 1, len(eval_dataloader))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:
        logs = logs or {}
        prefix = "eval_" if "eval_loss" in logs else ""
        if prefix:
            self.evaluation = None
        numbers = [f"{label} {logs[prefix + key]:.3f}" for key, label in _SHOWN.items()
                   if prefix + key in logs]
        if not numbers:
            return
        line = " ".join((["held-out"] if prefix else []) + numbers)
        if self.bars is not None and not prefix:
            self.note = line
            return
        if self.heartbeat is not None:
            self.heartbeat.said()
        left = (state.max_steps - state.global_step) / max(self.pace.rate(), 1e-9)
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
        if self.heartbeat is not None:
            self.heartbeat.__exit__()
            self.heartbeat = None
