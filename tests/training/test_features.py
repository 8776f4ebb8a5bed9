"""Cached features are the base's own, and a cache that isn't right is never used."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from training_tiny import build_model, build_pairs, build_tokenizer

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError
from qadapter.data import PreferenceCollator, tokenize_preferences
from qadapter.objective import find_actions
from qadapter.training import feature_store, features
from qadapter.training.feature_store import features_folder, load_or_compute
from qadapter.training.features import FeatureCollator, compute_features
from qadapter.trunk.packing import can_pack

LIMIT = 64


@pytest.fixture
def tokenized(tokenizer):
    return tokenize_preferences(build_pairs(13), tokenizer, max_length=LIMIT).dataset


@pytest.fixture
def open_cache(tmp_path, tokenizer, tokenized, monkeypatch):
    """Opens the cache with shards of some three pairs; counts the shards that were computed."""
    computed = []
    compute = features.compute_shard

    def counting(model, dataset, *arguments):
        computed.append(len(dataset))
        return compute(model, dataset, *arguments)

    monkeypatch.setattr(feature_store, "compute_shard", counting)
    monkeypatch.setattr(feature_store, "MIB", 2048)

    def open_(model=None, dataset=None, **changes):
        computed.clear()
        settings = {"max_length": LIMIT, "cache_dir": tmp_path / "cache", "shard_mb": 1}
        result = load_or_compute(
            model or build_model(), tokenized if dataset is None else dataset, tokenizer,
            **{**settings, **changes},
        )
        return result, list(computed)

    return open_


def copied(cached):
    """In memory: what follows may write into the mapped files."""
    shards = [
        type(s)(**{name: x.clone() for name, x in s.parts().items()}) for s in cached.shards
    ]
    return type(cached)(shards, cached.kept)


def assert_same(ours, theirs, same=torch.equal):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in ("row", "num_actions", "lengths"):
            assert getattr(one, name) == getattr(other, name), name
        for name in ("hidden", "base_logsumexp", "tokens", "states"):
            assert same(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("alignment", ["action", "state"])
@pytest.mark.parametrize("multiple", [None, 8])
def test_a_batch_holds_what_the_padded_batch_scores(tokenized, alignment, multiple):
    """States, actions, hidden states and lse(b) against the model run on the padded batch; the
    batch mixes lengths, so that state alignment scores padding in all rows but the longest."""
    model = build_model(objective=ObjectiveConfig(mask_alignment=alignment))
    dataset = tokenized.add_column(
        "chosen_mask", [[i % 3 != 1 for i in range(len(x))] for x in tokenized["chosen_ids"]]
    ).add_column("rejected_mask", [[True] * len(x) for x in tokenized["rejected_ids"]])
    cached = compute_features(model, dataset, batch_tokens=40)
    chosen = [3, 0, 7, 12]
    ragged = FeatureCollator(multiple)([cached[i] for i in chosen])
    padded = PreferenceCollator(0, multiple)([dataset[i] for i in chosen])
    actions = find_actions(padded["input_ids"], padded["completion_mask"], alignment)
    hidden = model.base_hidden(padded["input_ids"], padded["attention_mask"])
    hidden = hidden[actions.sequence_N, actions.state_N]
    assert torch.equal(ragged["tokens"], actions.token_N)
    assert torch.equal(ragged["offsets"], actions.offsets_S1)
    assert torch.equal(ragged["rows"], padded["rows"])
    assert ragged["padded_length"] == padded["input_ids"].shape[1]
    assert ragged["num_tokens"] == padded["attention_mask"].sum()
    # The output at a padding position depends on what stands before it alone, but batches of
    # different shapes round differently.
    assert_close(ragged["hidden"], hidden, rtol=1e-4, atol=1e-5)
    lse = model.head(hidden).logsumexp(-1)
    assert_close(ragged["base_logsumexp"], lse, rtol=1e-5, atol=1e-5)


def test_what_is_kept_is_what_the_adapter_reads(tokenized, tokenizer, tmp_path):
    """The states before the final norm, or those behind it; neither passes for the other."""
    read, folders = {}, set()
    for form in ("linear", "mlp", "block"):
        model = build_model(AdapterConfig(form=form, rank=4))
        read[form] = compute_features(model, tokenized)
        folders.add(features_folder(
            model, tokenized, tokenizer, max_length=LIMIT, cache_dir=tmp_path, pad_token_id=0
        ))
        read[form].check(model, "these")
    assert len(folders) == 2  # linear and mlp share theirs
    assert_same(read["linear"], read["mlp"])
    for behind, before in zip(read["linear"], read["block"], strict=True):
        assert torch.equal(model.base_stream(before.hidden), behind.hidden)
        assert not torch.equal(before.hidden, behind.hidden)
        assert torch.equal(before.base_logsumexp, behind.base_logsumexp)
    with pytest.raises(QAdapterError, match="these are features that keep hidden states, this "
                       "adapter needs the states before the final norm"):
        read["linear"].check(model, "these")


def test_a_softcapped_head_is_cached_too(tokenized):
    model = build_model()
    plain = compute_features(model, tokenized)
    model.head = dataclasses.replace(model.head, softcap=3.0)
    capped = compute_features(model, tokenized)
    assert torch.equal(plain[2].hidden, capped[2].hidden)
    logits = torch.tanh(plain[2].hidden @ model.head.weight.T / 3.0) * 3.0
    assert_close(capped[2].base_logsumexp, logits.logsumexp(-1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_prompts_and_equal_answers_run_once(tokenized, attention):
    """Tokens that pass the trunk: packed where attention is sdpa, padded elsewhere."""
    first, second = tokenized[0], tokenized[1]
    other = {**first, "rejected_ids": second["rejected_ids"]}
    model, passed = build_model(), []
    model.base.set_attn_implementation(attention)
    body = model.base.model
    body.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    dataset = Dataset.from_list([first, first, other])
    cached = compute_features(model, dataset)
    prompt, *answers = (
        len(x) for x in (
            first["prompt_ids"], first["chosen_ids"], first["rejected_ids"], second["rejected_ids"]
        )
    )
    if attention == "sdpa":
        texts = [p["prompt_ids"] + p[f"{side}_ids"] for p in (first, other)
                 for side in ("chosen", "rejected")]
        beginnings = {tuple(ids[:end]) for ids in texts for end in range(1, len(ids) + 1)}
        assert passed[-1] == len(beginnings) <= prompt + sum(answers)
    else:
        distinct = 3 * prompt + sum(answers)
        assert distinct <= sum(passed) <= 3 * (prompt + max(answers))
    assert model.base.config._attn_implementation == attention
    for index, pair in enumerate((first, first, other)):
        for side, piece in (("chosen", slice(0, cached[index].num_actions[0])),
                            ("rejected", slice(cached[index].num_actions[0], None))):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            hidden = model.base_hidden(ids)[0, prompt - 1 : -1]
            assert_close(cached[index].hidden[piece], hidden, rtol=1e-4, atol=1e-5)


def test_a_base_that_cannot_be_packed_is_padded(tokenized):
    """Tokens that mix outside attention."""
    mixed, expected = [build_model() for _ in range(2)]
    for model in (mixed, expected):
        model.base.model.layers[0].register_forward_hook(
            lambda module, args, out: out + torch.nn.functional.pad(out[:, :-1], (0, 0, 1, 0))
        )
    expected.base.set_attn_implementation("eager")
    assert can_pack(mixed.base, 16) is not None
    assert_same(
        compute_features(mixed, tokenized), compute_features(expected, tokenized),
        lambda x, y: torch.allclose(x, y, rtol=1e-4, atol=1e-5),
    )


def test_the_disk_gives_back_what_was_computed(open_cache, tokenized):
    first, computed = open_cache()
    assert len(computed) > 2 and sum(computed) == 13
    # Other batches, other roundings.
    in_memory = compute_features(build_model(), tokenized)
    assert_same(first, in_memory, lambda x, y: torch.allclose(x, y, rtol=1e-4, atol=1e-5))
    again, computed = open_cache()
    assert computed == []
    assert_same(again, first)
    assert again.num_actions == first.num_actions and again.nbytes == first.nbytes


def test_everything_features_depend_on_is_in_the_key(open_cache, tokenized):
    """A cache made for something else is not taken: all shards are computed again."""
    open_cache()
    merged = build_model()  # what merging an adapter into the trunk would do
    merged.base.model.layers[1].self_attn.q_proj.weight.data += 1e-3
    for changes in (
        {"model": build_model(seed=1)},
        {"model": build_model(dtype=torch.bfloat16)},
        {"model": build_model(objective=ObjectiveConfig(mask_alignment="state"))},
        {"model": merged},
        {"dataset": tokenized.select(range(12, -1, -1))},
        {"max_length": LIMIT + 1},
    ):
        assert sum(open_cache(**changes)[1]) == 13, changes
    # The objective's other fields and the adapter leave the features as they are.
    assert open_cache(model=build_model(objective=ObjectiveConfig(gamma=0.5)))[1] == []


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "lose", "no record", "bad record", "other record"]
)
def test_what_is_damaged_is_computed_again_and_alone(open_cache, tmp_path, damage):
    first, computed = open_cache()
    first = copied(first)
    (folder,) = (tmp_path / "cache").iterdir()
    shard, record = sorted(folder.glob("*.safetensors"))[1], sorted(folder.glob("*.json"))[1]
    if damage == "flip":
        content = bytearray(shard.read_bytes())
        content[-3] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif damage == "lose":
        shard.unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "bad record":
        record.write_text("{")
    else:
        record.write_text(json.dumps({**json.loads(record.read_text()), "fingerprint": "x"}))
    again, computed = open_cache()
    assert len(computed) == 1
    assert_same(again, first)
    assert open_cache()[1] == []


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(tmp_path, open_cache):
    """SIGKILL while the second shard is being written, by a process of its own."""
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_features as t\n"
        "from pathlib import Path\n"
        "store, save, calls = t.feature_store, t.feature_store.save_file, []\n"
        "store.MIB = 2048\n"
        "def killed(tensors, path):\n"
        "    save(tensors, path); calls.append(path)\n"
        "    if len(calls) == 2:\n"
        "        path.write_bytes(path.read_bytes()[:100]); os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.save_file = killed\n"
        "tokenizer = t.build_tokenizer()\n"
        "data = t.tokenize_preferences(t.build_pairs(13), tokenizer, max_length=t.LIMIT).dataset\n"
        "t.load_or_compute(t.build_model(), data, tokenizer, max_length=t.LIMIT, shard_mb=1,\n"
        "                  cache_dir=Path(sys.argv[2]))\n"
    )
    here = os.path.dirname(__file__)
    process = subprocess.run(
        [sys.executable, "-c", script, here, str(tmp_path / "cache")], capture_output=True,
        text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 1
    again, computed = open_cache()
    assert sum(computed) < 13 and len(again) == 13  # the first shard was whole and is kept
    assert_same(again, open_cache(cache_dir=tmp_path / "elsewhere")[0])


def test_a_full_disk_is_one_clear_line(open_cache, tmp_path, monkeypatch):
    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_store, "save_file", full)
    with pytest.raises(QAdapterError, match=r"No space left on device.*feature_cache_dir"):
        open_cache()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_items_are_pairs(tokenized):
    cached = compute_features(build_model(), tokenized)
    pair = cached[-1]
    assert pair.row == 12 and len(cached) == 13
    assert sum(pair.num_actions) == len(pair.tokens) == len(pair.hidden)
    answers = tokenized[12]["chosen_ids"] + tokenized[12]["rejected_ids"]
    assert pair.tokens.tolist() == answers
    with pytest.raises(IndexError):
        cached[13]
    assert build_tokenizer().eos_token_id in answers


def test_a_selection_holds_the_features_of_its_pairs(tokenized):
    cached = compute_features(build_model(), tokenized)
    chosen = cached.select([5, 0, 11])
    assert len(chosen) == 3
    for got, index in zip((chosen[0], chosen[1], chosen[2]), (5, 0, 11), strict=True):
        expected = cached[index]
        assert (got.row, got.num_actions, got.lengths) == (
            expected.row, expected.num_actions, expected.lengths
        )
        for name in ("hidden", "base_logsumexp", "tokens", "states"):
            assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0)
