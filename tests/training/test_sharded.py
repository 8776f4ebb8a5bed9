"""Training on a base that FSDP2 spreads over two and over four processes is training in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import launch
from safetensors.torch import load_file
from sharded_run import CASES, RESUMED, train
from torch.testing import assert_close
from training_tiny import WORDS
from transformers import LlamaConfig, LlamaForCausalLM

from qadapter import QAdapterModel
from qadapter.training.checkpoints import check_whole

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("sharded_run.py")
# float32 sums of 24 pairs' terms in another order: each of some hundred steps from a weight to a
# number rounds to 6e-8 of its size, and learning at a rate of 1 carries it on for three steps.
NUMBERS = {"rtol": 2e-5, "atol": 1e-5}


def found(processes: int, *folders: Path) -> dict:
    """What the processes of ``sharded_run.py`` find together."""
    launch(SCRIPT, processes, *folders)
    return json.loads((folders[0] / "results.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def bases(folder):
    """Two bases, and that their shards are uneven: 3 layers' norms of 18 numbers on four."""
    for tied in (True, False):
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(WORDS) + 1, hidden_size=18, intermediate_size=31, num_hidden_layers=2,
            num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=tied,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ))
        torch.nn.init.normal_(base.lm_head.weight, std=0.5)
        base.save_pretrained(folder / "bases" / ("tied" if tied else "untied"))
    return folder / "bases"


@pytest.fixture(scope="module")
def alone(folder, bases):
    return {name: train(folder / "alone", bases, name, None) for name in CASES}


@pytest.fixture(scope="module")
def two(folder, bases, alone):
    (folder / "two").mkdir()
    return found(2, folder / "two", bases, folder / "alone")


@pytest.fixture(scope="module")
def four(folder, bases, two):
    (folder / "four").mkdir()
    return found(4, folder / "four", bases, folder / "two")


def numbers(metrics: dict) -> dict:
    left_out = ["runtime", "per_second", "preparation_time", "epoch", "grad_norm"]
    if any(n.endswith("rewards/margins") and abs(x) < 1e-6 for n, x in metrics.items()):
        # Rewards before any training are rounding alone, which decides between any two.
        left_out.append("rewards/accuracies")
    return {
        n: x for n, x in metrics.items() if not n.endswith(tuple(left_out)) and isinstance(x, float)
    }


def assert_same_run(ours: dict, theirs: dict, folders: list[Path]) -> None:
    """That a run, whose last part may be all there is of it, is another."""
    assert ours["engine"] == "FSDP2" and ours["begins alike"] and ours["alike"]
    assert {**ours["identity"], "name": ""} == {**theirs["identity"], "name": ""}
    assert ours["answers"] == theirs["answers"]
    expected = [numbers(x) for x in (*theirs["logs"], theirs["after"])]
    found = [numbers(x) for x in (*ours["logs"], ours["after"])]
    assert_close(found, expected[-len(found):], **NUMBERS)
    weights, others = (load_file(f / "adapter_model.safetensors") for f in folders)
    assert_close(weights, others, **NUMBERS)
    assert_close(torch.tensor(ours["logits"]), torch.tensor(theirs["logits"]), **NUMBERS)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_and_evaluate_like_one(name, folder, alone, two):
    ours, theirs = two[name], alone[name]
    assert len(ours["logs"]) == 3
    assert_close(numbers(ours["before"]), numbers(theirs["before"]), **NUMBERS)
    assert_same_run(ours, theirs, [folder / "two" / name, folder / "alone" / name])
    first, last = (
        load_file(folder / "two" / name / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in (1, 3)
    )
    moved = max(float((last[n] - x).abs().max()) for n, x in first.items())
    assert moved > 20 * NUMBERS["atol"]  # that they are alike says something


@pytest.mark.parametrize("name", ["linear, features on disk", "lora"])
def test_four_processes_train_and_evaluate_like_one(name, folder, alone, four):
    assert_same_run(four[name], alone[name], [folder / "four" / name, folder / "alone" / name])


def test_a_run_goes_on_from_one_process_on_two(folder, alone, two):
    assert len(two["resumed"]["logs"]) == 3  # with the first step's, of the checkpoint
    assert_same_run(
        two["resumed"], alone[RESUMED],
        [folder / "two/resumed" / RESUMED, folder / "alone" / RESUMED],
    )


def test_a_run_goes_on_from_two_processes_on_four(folder, alone, four):
    assert_same_run(
        four["resumed"], alone[RESUMED],
        [folder / "four/resumed" / RESUMED, folder / "alone" / RESUMED],
    )


def test_a_run_goes_on_from_two_processes_on_one(folder, bases, alone, two):
    checkpoint = folder / "two" / RESUMED / "checkpoint-1"
    check_whole(checkpoint)
    resumed = train(folder / "on-one", bases, RESUMED, None, checkpoint)
    assert_close(
        numbers(resumed["after"]), numbers(alone[RESUMED]["after"]), **NUMBERS
    )


@pytest.mark.parametrize("name", ["block", "lora"])
def test_what_was_trained_sharded_loads_whole(name, folder, bases, two):
    model = QAdapterModel.from_pretrained(folder / "two" / name, bases / CASES[name].base)
    logits = model(input_ids=torch.arange(3, 11)[None]).logits.flatten()
    assert_close(logits, torch.tensor(two[name]["logits"]), rtol=1e-6, atol=1e-6)


def test_an_adapter_on_a_sharded_base_is_that_on_the_whole_to_the_bit(two, four):
    for found in (two["equal"], four["equal"]):
        assert len(found) == 12 and all(found.values()), found


def test_processes_draw_alike(two):
    assert two["sampled alike"]


def test_a_launch_of_too_few_processes_is_told(two):
    assert "4 processes, and this launch has 2" in two["too few"]


def test_the_first_process_exports_what_all_have(folder, two):
    assert two["exported"]["written"] == [True, False]
    stock = LlamaForCausalLM.from_pretrained(folder / "two" / "exported")
    logits = stock(input_ids=torch.arange(3, 11)[None]).logits
    # Weights are rounded once more when the adapter is added: by 6e-8, in some 20 products each.
    assert_close(logits, torch.tensor(two["exported"]["logits"]), rtol=1e-5, atol=1e-5)
