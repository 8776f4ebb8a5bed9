"""Long work says how far it is, where there is no terminal to draw on; short work says nothing."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from qadapter.console import progress
from qadapter.console.progress import EVERY_S, Heartbeat, Pace, TrainingProgress, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def lines_of(work, seconds, step=1.0):
    """What is said while ``work(second)`` is called every ``step`` seconds, with its times."""
    clock, said = Clock(), []
    pace = Pace("reading", "tokens", clock=clock)

    def wait(longest):
        end = clock.now + longest
        while clock.now < end:
            clock.now += step
            if clock.now - 100 > seconds:
                return True
            work(pace, clock.now - 100)
        return False

    Heartbeat(
        pace.line, lambda line: said.append((clock.now - 100, line)), clock=clock, wait=wait
    ).run()
    return said


def steadily(pace, second):
    pace(int(10 * second), 1000)


def test_short_work_says_nothing():
    assert lines_of(steadily, EVERY_S - 1) == []


def test_a_line_every_fifteen_seconds():
    said = lines_of(steadily, 50)
    assert [time for time, _ in said] == [15, 30, 45]
    assert said[0][1] == "reading: 150 of 1,000 tokens, 10 tokens/s, 1 min 25 s left"
    assert said[2][1] == "reading: 450 of 1,000 tokens, 10 tokens/s, 55 s left"


def test_one_long_step_is_heard_too():
    said = lines_of(lambda pace, second: None, 31)
    assert said == [(15, "reading: 15 s so far"), (30, "reading: 30 s so far")]
    said = lines_of(lambda pace, second: pace(0, 8), 16)
    assert said == [(15, "reading: 0 of 8 tokens, 15 s so far")]


def test_what_is_left_follows_the_recent_rate():
    """Slow at first, ten times as fast later: the slow start is forgotten."""

    def faster(pace, second):
        pace(int(min(second, 100) + 10 * max(second - 100, 0)), 10_000)

    last = lines_of(faster, 300)[-1][1]
    assert "10 tokens/s" in last and "13 min" in last


def test_steps_longer_than_a_minute_have_a_rate():
    clock = Clock()
    pace = Pace("reading", "tokens", clock=clock)
    for done in range(1, 5):
        clock.now += 90
        pace(done * 900, 9000)
    assert pace.rate() == pytest.approx(10)
    clock.now += 30  # what is being done is nearer its end
    assert pace.line().endswith("8 min 30 s left")


def test_what_was_there_before_is_no_work():
    clock = Clock()
    pace = Pace("training", "steps", done=500, clock=clock)
    clock.now += 10
    pace(510, 600)
    assert pace.rate() == pytest.approx(1)


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (12_060, "3 h 21 min"),
])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_closing_line_can_be_left_out():
    file = io.StringIO()
    console = Console(file=file, force_terminal=False)
    with progress.progress_bar(console, "reading", "tokens") as advance:
        advance(1, 2)
    assert file.getvalue().startswith("reading: 0.")
    file.truncate(0)
    with progress.progress_bar(console, "loading", "", closing=False):
        pass
    assert "loading" not in file.getvalue()


def test_the_heartbeat_ends_with_the_work_that_breaks_off():
    console = Console(file=io.StringIO(), force_terminal=False)
    with pytest.raises(KeyError), progress.progress_bar(console, "reading", "tokens"):
        raise KeyError
    callback = TrainingProgress(console)
    state = SimpleNamespace(global_step=0, max_steps=4)
    callback.on_train_begin(None, state, None)
    beating = callback.heartbeat
    callback.stop()
    assert callback.heartbeat is None and not beating._thread.is_alive()
    callback.stop()


def test_training_tells_its_steps_and_its_evaluation():
    callback = TrainingProgress(Console(file=io.StringIO(), force_terminal=False))
    state = SimpleNamespace(global_step=0, max_steps=4)
    callback.on_train_begin(None, state, None)
    try:
        state.global_step = 1
        callback.on_step_end(None, state, None)
        assert callback.heartbeat._line().startswith("training: 1 of 4 steps")
        for _ in range(2):
            callback.on_prediction_step(None, state, None, eval_dataloader=range(5))
        assert callback.heartbeat._line().startswith("held-out pairs: 2 of 5 batches")
        callback.on_log(None, state, None, logs={"eval_loss": 0.5})
        assert callback.heartbeat._line().startswith("training: 1 of 4 steps")
    finally:
        callback.stop()
