"""Many processes build one cache: none does what another has done, whatever becomes of the others.

Most of them are threads here, each with a model of its own: claims part threads like processes.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from training_tiny import build_model, build_pairs, build_tokenizer

from qadapter.data import tokenize_preferences
from qadapter.errors import QAdapterError
from qadapter.system import locking
from qadapter.training import feature_building, feature_store, features
from qadapter.training.crew import Crew

SETTINGS = {"max_length": 64, "shard_mb": 1}


class Gathering:
    """``gather`` of so many threads."""

    def __init__(self, processes: int):
        self.barrier, self.handed = threading.Barrier(processes, timeout=60), [None] * processes

    def of(self, index: int):
        def gather(x):
            self.handed[index] = x
            self.barrier.wait()
            found = list(self.handed)
            self.barrier.wait()
            return found

        return gather

    def crew(self, index: int, **changes) -> Crew:
        crew = Crew(index, len(self.handed), True, self.of(index), index, index)
        return crew._replace(**changes)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shards of some three pairs."""
    monkeypatch.setattr(feature_store, "MIB", 2048)
    monkeypatch.setattr(feature_building, "_LOOK_AGAIN", 0.01)


@pytest.fixture
def tokenized():
    return tokenize_preferences(build_pairs(23), build_tokenizer(), max_length=64).dataset


@pytest.fixture
def computed(monkeypatch):
    """(thread's name, rows) of each shard that was computed."""
    compute, calls = feature_store.compute_shard, []

    def counting(model, dataset, *arguments):
        calls.append((threading.current_thread().name, tuple(dataset["row"])))
        return compute(model, dataset, *arguments)

    monkeypatch.setattr(feature_store, "compute_shard", counting)
    return calls


def load(dataset, cache, model=None, **changes):
    return feature_store.load_or_compute(
        model or build_model(), dataset, build_tokenizer(), cache_dir=cache,
        **{**SETTINGS, **changes},
    )


def together(*functions):
    """What each gives, or raises, in a thread of its own."""
    found = [None] * len(functions)

    def run(number):
        try:
            found[number] = functions[number]()
        except Exception as error:
            found[number] = error

    threads = [
        threading.Thread(target=run, args=(n,), name=str(n)) for n in range(len(functions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def hidden(found):
    assert not isinstance(found, Exception), found
    return torch.cat([shard.hidden for shard in found.shards])


def left(cache: Path) -> set[str]:
    return {path.suffix for path in cache.rglob("*") if path.is_file()}


def test_processes_share_the_work(tokenized, tmp_path, computed):
    """Without a word between them; each has its own share first."""
    alone = hidden(load(tokenized, tmp_path / "alone"))
    shards = len(computed)
    computed.clear()
    models = [build_model() for _ in range(3)]
    start = threading.Barrier(3)

    def work(seat):
        start.wait()
        crew = Crew(seat=seat, seats=3)
        return load(tokenized, tmp_path / "cache", models[seat], crew=crew)

    found = together(*(lambda seat=seat: work(seat) for seat in range(3)))
    assert all(torch.equal(hidden(x), alone) for x in found)
    assert len(computed) == shards == len({rows for _, rows in computed})
    assert len({name for name, _ in computed}) == 3
    assert left(tmp_path / "cache") == {".json", ".safetensors"}


def test_a_share_is_first_and_not_all():
    assert Crew(seat=1, seats=3).in_order([0, 2, 3, 4, 7]) == [4, 7, 0, 2, 3]
    assert Crew().in_order([2, 0]) == [0, 2]


CLAIM = """
import sys, time
from pathlib import Path
from qadapter.system import locking
print(all([locking.take(Path(p)) for p in sys.argv[1:]]), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_what_a_killed_process_had_claimed_is_made_by_others(tokenized, tmp_path, computed):
    """They wait for it while it lives; its locks are not left behind."""
    model = build_model()
    folder = feature_store.features_folder(
        model, tokenized, build_tokenizer(), max_length=64, cache_dir=tmp_path, pad_token_id=0
    )
    folder.mkdir(parents=True)
    total = len(list(feature_store._spans(tokenized, model, 1)))
    claims = [folder / f"features-{n:05d}-of-{total:05d}.lock" for n in (1, 2)]
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIM, *map(str, claims)], stdout=subprocess.PIPE, text=True
    )
    lines, waiting = [], threading.Event()

    def say(line):
        lines.append(line)
        waiting.set()

    try:
        assert other.stdout.readline() == "True\n"
        thread = threading.Thread(target=load, args=(tokenized, tmp_path, model),
                                  kwargs={"say": say})
        thread.start()
        assert waiting.wait(60)
        assert len(computed) == total - 2 and thread.is_alive()
        # What is finished can be read meanwhile.
        told = []
        some = feature_store.load_finished(
            build_model(), tokenized, build_tokenizer(), cache_dir=tmp_path, **SETTINGS,
            say=told.append,
        )
        assert [pair.row for pair in some] == [row for _, rows in computed for row in rows]
        assert told == [f"{total - 2} of {total} files of features are finished: {len(some)} of 23 "
                        "pairs"]
    finally:
        other.kill()
        other.wait()
    thread.join(60)
    assert len(computed) == total and len(lines) == 1 and "waiting for other proc" in lines[0]
    assert left(tmp_path) == {".json", ".safetensors"}
    whole = feature_store.load_finished(
        build_model(), tokenized, build_tokenizer(), cache_dir=tmp_path, **SETTINGS,
        say=told.append,
    )
    assert torch.equal(hidden(whole), hidden(load(tokenized, tmp_path))) and len(told) == 1


def test_locks_of_processes_that_were_done_are_removed(tokenized, tmp_path):
    load(tokenized, tmp_path)
    (shard, *_) = sorted(tmp_path.rglob("*.safetensors"))
    shard.with_suffix(".lock").write_text("{}")
    load(tokenized, tmp_path)
    assert left(tmp_path) == {".json", ".safetensors"}


def test_nothing_finished_is_an_empty_set(tokenized, tmp_path):
    told = []
    found = feature_store.load_finished(
        build_model(), tokenized, build_tokenizer(), cache_dir=tmp_path, **SETTINGS, say=told.append
    )
    assert len(found) == 0 and told[0].startswith("0 of ") and not left(tmp_path)


# --- bases of which a forward is a collective -----------------------------------------------------


def counting_model(calls, attention="sdpa"):
    model = build_model()
    model.base.set_attn_implementation(attention)
    run = model.packed_base

    def packed_base(packing, **options):
        calls.append((len(packing.ids_N), options["packed"]))
        return run(packing, **options)

    model.packed_base = packed_base
    return model


@pytest.mark.parametrize("processes", [2, 3])
def test_in_lockstep_all_run_the_base_as_often(tokenized, tmp_path, computed, processes):
    alone = hidden(load(tokenized, tmp_path / "alone"))
    shards = len(computed)
    computed.clear()
    calls, gathering = [[] for _ in range(processes)], Gathering(processes)
    models = [counting_model(x) for x in calls]
    found = together(*(
        lambda n=n: load(tokenized, tmp_path / "cache", models[n], crew=gathering.crew(n),
                         batch_tokens=40)
        for n in range(processes)
    ))
    for x in found:
        torch.testing.assert_close(hidden(x), alone, rtol=1e-4, atol=1e-5)  # other batches
    assert len(computed) == shards and len({name for name, _ in computed}) == processes
    assert len({len(x) for x in calls}) == 1
    assert any(tokens == 1 for x in calls for tokens, _ in x)  # who had fewer batches
    computed.clear()
    assert together(*(
        lambda n=n: load(tokenized, tmp_path / "cache", models[n], crew=gathering.crew(n)) and 1
        for n in range(processes)
    )) == [1] * processes and not computed


def test_in_lockstep_a_base_that_is_padded_does_the_same_everywhere(tokenized, tmp_path, computed):
    calls, gathering = [[], []], Gathering(2)
    models = [counting_model(x, "eager") for x in calls]
    found = together(*(
        lambda n=n: load(tokenized, tmp_path, models[n], crew=gathering.crew(n)) for n in range(2)
    ))
    assert torch.equal(hidden(found[0]), hidden(found[1]))
    assert calls[0] == calls[1] and {packed for _, packed in calls[0]} == {False}
    by_process = [[rows for name, rows in computed if name == str(n)] for n in range(2)]
    assert by_process[0] == by_process[1]


def test_in_lockstep_followers_compute_what_their_leader_does(tokenized, tmp_path, computed):
    """Two and two, as with tensor parallelism: process 1 follows 0, process 3 follows 2."""
    gathering, models = Gathering(4), [build_model() for _ in range(4)]
    found = together(*(
        lambda n=n: load(
            tokenized, tmp_path, models[n],
            crew=gathering.crew(n, seat=n // 2, seats=2, leader=n - n % 2),
        ) for n in range(4)
    ))
    assert all(torch.equal(hidden(x), hidden(found[0])) for x in found)
    rows = [{rows for name, rows in computed if name == str(n)} for n in range(4)]
    assert rows[0] == rows[1] and rows[2] == rows[3] and not rows[0] & rows[2]


def test_in_lockstep_what_one_cannot_write_all_are_told(tokenized, tmp_path, monkeypatch):
    save = feature_store.save_file

    def full(tensors, path):
        if threading.current_thread().name == "1":
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(feature_store, "save_file", full)
    gathering, models = Gathering(2), [build_model(), build_model()]
    found = together(*(
        lambda n=n: load(tokenized, tmp_path, models[n], crew=gathering.crew(n)) for n in range(2)
    ))
    assert all(isinstance(x, QAdapterError) and "No space left" in str(x) for x in found), found
    assert ".lock" not in left(tmp_path)


def test_in_lockstep_folders_that_are_not_shared_are_named(tokenized, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_building, "_UNSEEN", 0.1)
    gathering, models = Gathering(2), [build_model(), build_model()]
    found = together(*(
        lambda n=n: load(tokenized, tmp_path / str(n), models[n], crew=gathering.crew(n))
        for n in range(2)
    ))
    assert all("all of them share" in str(x) for x in found), found


def test_in_lockstep_what_another_launch_makes_is_waited_for(tokenized, tmp_path, computed):
    model = build_model()
    folder = feature_store.features_folder(
        model, tokenized, build_tokenizer(), max_length=64, cache_dir=tmp_path, pad_token_id=0
    ).absolute()
    folder.mkdir(parents=True)
    spans = list(feature_store._spans(tokenized, model, 1))
    claim = folder / f"features-00001-of-{len(spans):05d}.lock"
    assert locking.take(claim)
    timer = threading.Timer(0.5, locking.let_go, [claim])
    timer.start()
    gathering, models = Gathering(2), [model, build_model()]
    found = together(*(
        lambda n=n: load(tokenized, tmp_path, models[n], crew=gathering.crew(n)) for n in range(2)
    ))
    timer.join()
    assert torch.equal(hidden(found[0]), hidden(found[1]))
    assert len(computed) == len(spans)


def test_idle_runs_leave_no_trace(tokenized):
    calls = []
    features.run_idly(counting_model(calls), 3, True)
    assert calls == [(1, True)] * 3
