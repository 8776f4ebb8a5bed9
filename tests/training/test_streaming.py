"""Training on streams: what comes in which order, and that a stopped run goes on with what would
have come next."""

from __future__ import annotations

import itertools
import json
import shutil

import peft
import pyarrow.parquet as pq
import pytest
import torch
from datasets import IterableDataset, interleave_datasets, load_dataset
from safetensors.torch import load_file
from training_tiny import build_model, build_pairs, build_tokenizer

from qadapter.data import PreferenceStream, stream_preferences
from qadapter.data import streams as streams_module
from qadapter.data.streams import DatasetSource, FileSource, Reading
from qadapter.errors import QAdapterError
from qadapter.training.own_samples import OWN
from qadapter.training.streaming import StreamedPairs

COUNT = 22


def write(folder, kind, pairs):
    """The pairs as files of a kind; the stream's argument."""
    folder.mkdir(parents=True, exist_ok=True)
    half = len(pairs) // 2
    for number, part in enumerate((pairs.select(range(half)), pairs.select(range(half, COUNT)))):
        path = folder / f"train-{number:05d}-of-00002.{kind}"
        if kind == "parquet":
            pq.write_table(part.data.table.combine_chunks(), path)
        else:
            path.write_text("\n".join(map(json.dumps, part)))
    return folder


def streams(folder):
    """Name → a function that opens the same pairs as a stream anew."""
    pairs = build_pairs(COUNT)
    jsonl, parquet = (write(folder / kind, kind, pairs) for kind in ("jsonl", "parquet"))
    files = {"train": sorted(map(str, jsonl.iterdir()))}
    return {
        "jsonl": lambda: stream_preferences(jsonl),
        "parquet": lambda: stream_preferences(parquet),
        "iterable": lambda: pairs.to_iterable_dataset(num_shards=3),
        "streaming": lambda: load_dataset(
            "json", data_files=files, split="train", streaming=True,
            cache_dir=str(folder / "hub"),
        ),
        "generated": lambda: IterableDataset.from_generator(lambda: iter(build_pairs(COUNT))),
        "mapped": lambda: pairs.to_iterable_dataset(num_shards=2).map(
            lambda batch: batch, batched=True, batch_size=4
        ),
        # Its buffer is not in its own state.
        "shuffled": lambda: pairs.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=5),
    }


def opened(stream) -> PreferenceStream:
    return stream if isinstance(stream, PreferenceStream) else PreferenceStream(
        DatasetSource(stream)
    )


def pairs_of(stream, buffer=4, seed=0, **changes) -> StreamedPairs:
    settings = {"max_length": 64, "truncation_mode": "keep_start", "on_bad_row": "drop",
                "known": 64, "positions": None, "shuffle_buffer": buffer, "seed": seed}
    return StreamedPairs(opened(stream), build_tokenizer(), **{**settings, **changes})


def rows(pairs, count):
    return [pair["row"] for batch in itertools.islice(pairs, count) for pair in batch]


# --- the order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", [0, 1, 4, 1000])
def test_a_pass_gives_each_pair_once(tmp_path, buffer):
    pairs = pairs_of(streams(tmp_path)["jsonl"](), buffer)
    found = rows(pairs, 3 * COUNT)
    passes = [found[:COUNT], found[COUNT : 2 * COUNT], found[2 * COUNT :]]
    assert all(sorted(x) == list(range(COUNT)) for x in passes)
    if buffer < 2:
        assert passes == [list(range(COUNT))] * 3
    else:
        assert passes[0] != passes[1] != passes[2]
        # None comes before it was read.
        assert all(row < number + buffer for number, row in enumerate(passes[0]))
    assert pairs.report.total == pairs.report.kept == 3 * COUNT and pairs.given == 3 * COUNT
    again = pairs_of(streams(tmp_path)["jsonl"](), buffer)
    assert rows(again, 3 * COUNT) == found
    if buffer > 1:
        assert rows(pairs_of(streams(tmp_path)["jsonl"](), buffer, seed=1), COUNT) != passes[0]


def test_all_kinds_of_sources_give_the_same(tmp_path):
    found = {}
    for name, make in streams(tmp_path).items():
        pairs = pairs_of(make(), 0)
        batches = list(itertools.islice(pairs, COUNT))
        found[name] = sorted(tuple(batch[0]["chosen_ids"]) for batch in batches)
    assert all(x == found["jsonl"] for x in found.values())


def test_processes_share_each_batch(tmp_path):
    """What two take together is what one takes alone, whatever is saved by either."""
    make = streams(tmp_path)["iterable"]
    alone = pairs_of(make())
    alone.batch_size = 4
    expected = [[p["row"] for p in batch] for batch in itertools.islice(alone, 9)]
    seats = [pairs_of(make()) for _ in range(2)]
    for seat, pairs in enumerate(seats):
        pairs.batch_size, pairs.seat, pairs.seats = 2, seat, 2
    for batch in expected[:5]:
        assert [p["row"] for pairs in seats for p in next(iter(pairs))] == batch
    seats[1].save(tmp_path)
    seats[0].load(tmp_path)
    seats[1].load(tmp_path)
    for batch in expected[5:]:
        assert [p["row"] for pairs in seats for p in next(iter(pairs))] == batch


@pytest.mark.parametrize("name", ["jsonl", "parquet", "iterable", "streaming", "generated",
                                  "mapped", "shuffled"])
@pytest.mark.parametrize("buffer", [0, 4, 1000])
def test_a_saved_place_is_found_again(tmp_path, name, buffer):
    """After any number of pairs: in mid-pass, at its end, with a buffer that empties."""
    make = streams(tmp_path)[name]
    expected = rows(pairs_of(make(), buffer), 50)
    stream, folder = pairs_of(make(), buffer), tmp_path / "saved"
    folder.mkdir()
    for taken in (0, 1, 7, 17, COUNT - 1, COUNT, COUNT + 9):
        rows(stream, taken - stream.given)
        stream.save(folder)
        resumed = pairs_of(make(), buffer)
        resumed.load(folder)
        assert resumed.report.as_dict() == stream.report.as_dict()
        assert rows(resumed, 50 - taken) == expected[taken:], taken
    # Saving disturbs nothing.
    assert rows(stream, 50 - stream.given) == expected[COUNT + 9 :]


def test_a_stream_that_gives_other_rows_is_refused(tmp_path):
    turn = itertools.count()
    stream = IterableDataset.from_generator(lambda: iter(build_pairs(COUNT, seed=next(turn))))
    pairs = pairs_of(stream)
    rows(pairs, 3)
    pairs.save(tmp_path)
    with pytest.raises(QAdapterError, match=r"gives other rows than before: row \d+ of pass 0"):
        pairs.load(tmp_path)
    with pytest.raises(QAdapterError, match="no place in a stream is there"):
        pairs.load(tmp_path / "nowhere")


@pytest.mark.parametrize("change", [
    lambda stream: stream, lambda stream: stream.map(lambda row: row),
    lambda stream: stream.take(20),
    lambda stream: interleave_datasets([stream, stream]),
])
def test_a_stream_with_a_buffer_of_its_own_is_found_by_counting(tmp_path, change):
    """``datasets`` says that what is in it is lost."""
    def make():
        return opened(change(streams(tmp_path)["shuffled"]()))

    reading = Reading(make())
    for _ in range(9):
        reading.next()
    place = reading.place()
    assert place["state"] is None and place["row"] == 9
    expected = [reading.next() for _ in range(8)]
    other = Reading(make())
    other.go_to(place)
    assert [other.next() for _ in range(8)] == expected


def test_a_state_that_is_of_another_place_is_not_followed(tmp_path):
    reading = Reading(opened(streams(tmp_path)["iterable"]()))
    places = [reading.place()]
    for _ in range(9):
        reading.next()
    places.append(reading.place())
    expected = [reading.next() for _ in range(8)]
    reading.go_to(places[1] | {"state": places[0]["state"]})
    assert [reading.next() for _ in range(8)] == expected
    assert places[1]["state"] is not None and places[1]["row"] == 9


# --- what can't be used ---------------------------------------------------------------------------


def with_bad_rows():
    found = list(build_pairs(COUNT))
    found[3] = {**found[3], "chosen": None}
    found[8] = {**found[8], "rejected": found[8]["chosen"]}
    return IterableDataset.from_generator(lambda: iter(found))


def test_pairs_that_cannot_be_used_are_counted(tmp_path):
    pairs = pairs_of(with_bad_rows())
    found = rows(pairs, COUNT - 2)
    assert sorted(found) == [i for i in range(COUNT) if i not in (3, 8)]
    assert pairs.report.dropped == {"missing_value": 1, "identical_answers": 1}
    assert pairs.report.first_rows["missing_value"] == [3]
    with pytest.raises(QAdapterError, match="row 3"):
        pairs_of(with_bad_rows(), on_bad_row="raise")
    with pytest.raises(QAdapterError, match="of row 0 holds the token"):
        rows(pairs_of(streams(tmp_path)["jsonl"](), known=4), 1)


def test_held_out_prompts_are_left_out(tmp_path):
    stream = streams(tmp_path)["jsonl"]()
    stream.left_out = frozenset(stream.sample["prompt_id"][2:5])
    assert sorted(rows(pairs_of(stream), COUNT - 3)) == [0, 1, *range(5, COUNT)]


def test_a_stream_without_a_usable_pair_ends():
    bad = {"prompt": "w1", "chosen": "w2", "rejected": "w2"}
    with pytest.raises(QAdapterError, match="of the first 5 pairs none can be used: kept 0 of 5"):
        pairs_of(IterableDataset.from_generator(lambda: iter([bad] * 5)))
    turn = itertools.count()
    later_bad = IterableDataset.from_generator(
        lambda: iter(build_pairs(3) if next(turn) < 2 else [bad] * 3)
    )
    with pytest.raises(QAdapterError, match="pass 2 has no pair that can be used"):
        rows(pairs_of(later_bad), 10)


def test_a_column_that_comes_late_is_not_overlooked(tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "_SAMPLE", 5)
    path, found = tmp_path / "a.jsonl", list(build_pairs(9))
    for late in (None, []):
        found[7]["tools"], found[6]["other"] = late, "anything"
        path.write_text("\n".join(map(json.dumps, found)))
        pairs = pairs_of(stream_preferences(path), 0)
        if late is None:
            assert rows(pairs, 9) == list(range(9))
        else:
            with pytest.raises(QAdapterError, match="row 7 has 'tools', and the first 5 rows"):
                rows(pairs, 9)


def test_a_source_that_breaks_off_is_one_line():
    def broken():
        yield from build_pairs(3)
        raise ConnectionError("network\ndown")

    with pytest.raises(QAdapterError, match="the dataset can't be read on: network down"):
        pairs_of(IterableDataset.from_generator(broken))


WRONG = {
    "no rows": (lambda: IterableDataset.from_generator(lambda: iter(())), "holds no rows"),
    "others": (lambda: IterableDataset.from_generator(lambda: iter([{"a": 1}])), "has the columns"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_stream_of_preferences(kind):
    make, words = WRONG[kind]
    with pytest.raises(QAdapterError, match=words):
        opened(make())


def test_a_hub_dataset_is_streamed_by_its_name(monkeypatch):
    def load(name, config, split, streaming):
        assert (name, config, split, streaming) == ("owner/name", "en", "test", True)
        return build_pairs(5).to_iterable_dataset()

    monkeypatch.setattr("qadapter.data.sources.load_dataset", load)
    monkeypatch.setattr("qadapter.data.sources._check_reachable", lambda name: None)
    pairs = pairs_of(stream_preferences("owner/name", config="en", split="test"), 0)
    assert rows(pairs, 5) == [0, 1, 2, 3, 4]


def test_files_that_cannot_be_streamed(tmp_path):
    build_pairs(4).save_to_disk(tmp_path / "saved")
    with pytest.raises(QAdapterError, match="leave streaming out"):
        stream_preferences(tmp_path / "saved")
    with pytest.raises(QAdapterError, match="a stream is read whole"):
        stream_preferences(tmp_path / "saved", split="train[:3]")
    with pytest.raises(QAdapterError, match="no file or folder"):
        stream_preferences(tmp_path / "no/such/file.jsonl")
    with pytest.raises(QAdapterError, match="is no file"):
        FileSource([tmp_path])


# --- training -------------------------------------------------------------------------------------

LORA = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.2)


def build(make_trainer, folder, adapter, stream, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": 12, "save_strategy": "steps", "save_steps": 4,
        "shuffle_buffer": 7, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
        "retention_coef": 0.1,
    }
    torch.manual_seed(0)
    return make_trainer(build_model(adapter), stream, **{**settings, **changes})


@pytest.mark.parametrize("name", ["jsonl", "iterable", "shuffled"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["head", "lora"])
def test_a_stopped_run_goes_on_in_mid_pass(make_trainer, tmp_path, name, adapter):
    """With the same batches, to the same weights: 12 steps of 4 pairs are two passes and a bit."""
    make, held_out = streams(tmp_path / "data")[name], build_pairs(6, seed=1)
    whole = build(make_trainer, tmp_path / "whole", adapter, make(), evaluation=held_out,
                  eval_strategy="steps", eval_steps=4)
    whole.train()
    assert whole.reports["train"].kept >= 48
    for step in (4, 8):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed = build(make_trainer, folder, adapter, make(), evaluation=held_out,
                        eval_strategy="steps", eval_steps=4)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.reports["train"].as_dict() == whole.reports["train"].as_dict()
        ours, theirs = (
            load_file(x / "adapter_model.safetensors") for x in (folder, tmp_path / "whole")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), step
        logs = [
            [(x["epoch"], x.get("loss"), x.get("eval_loss")) for x in trainer.state.log_history
             if "train_runtime" not in x] for trainer in (resumed, whole)
        ]
        assert logs[0] == logs[1]
    assert whole.args.ignore_data_skip is False and whole.state.epoch == 1


def test_training_again_begins_again(make_trainer, tmp_path):
    trainer = build(make_trainer, tmp_path / "run", None, streams(tmp_path / "d")["iterable"](),
                    save_strategy="no")
    trainer.train()
    first = [entry.get("loss") for entry in trainer.state.log_history]
    again = build(make_trainer, tmp_path / "run", None, streams(tmp_path / "d")["iterable"](),
                  save_strategy="no")
    again.train_dataset = trainer.train_dataset
    again.train()
    assert [entry.get("loss") for entry in again.state.log_history] == first


def test_other_pairs_or_another_buffer_are_refused(make_trainer, tmp_path):
    folder = tmp_path / "run"
    build(make_trainer, folder, None, build_pairs(COUNT).to_iterable_dataset()).train()
    with pytest.raises(QAdapterError, match="shuffle_buffer 7, this run 8"):
        build(make_trainer, folder, None, build_pairs(COUNT).to_iterable_dataset(),
              shuffle_buffer=8).train(resume_from_checkpoint=True)
    with pytest.raises(QAdapterError, match="trained on other pairs"):
        build(make_trainer, folder, None, build_pairs(COUNT, seed=5).to_iterable_dataset()).train(
            resume_from_checkpoint=True
        )
    with pytest.raises(QAdapterError, match="shuffle_buffer 7, this run"):
        build(make_trainer, folder, None, build_pairs(COUNT), shuffle_buffer=None).train(
            resume_from_checkpoint=True
        )


def test_held_to_the_base_s_own_answers(make_trainer, tmp_path):
    trainer = build(make_trainer, tmp_path, None, build_pairs(COUNT).to_iterable_dataset(),
                    retention_dataset=OWN, feature_cache_dir=str(tmp_path / "cache"))
    trainer.train()
    assert "retention_kl" in trainer.state.log_history[0]


@pytest.mark.parametrize("options, words", [
    ({"max_steps": -1}, "max_steps"), ({"cache_features": "disk"}, "cache_features disk"),
    ({"cache_features": "memory"}, "cache_features memory"),
    ({"dataloader_num_workers": 1}, "dataloader_num_workers"),
    ({"train_sampling_strategy": "sequential"}, "shuffle_buffer"),
])
def test_what_a_stream_cannot_do_is_said(make_trainer, tmp_path, options, words):
    with pytest.raises(QAdapterError, match=words):
        build(make_trainer, tmp_path, None, build_pairs(4).to_iterable_dataset(), **options)


def test_a_buffer_is_for_streams(make_trainer, tmp_path):
    with pytest.raises(QAdapterError, match="shuffle_buffer is for streams"):
        build(make_trainer, tmp_path, None, build_pairs(4))
    with pytest.raises(QAdapterError, match="the eval data is a stream"):
        build(make_trainer, tmp_path, None, build_pairs(4), shuffle_buffer=None,
              evaluation=opened(build_pairs(4).to_iterable_dataset()))
