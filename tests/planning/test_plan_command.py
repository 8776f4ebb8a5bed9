"""``qadapter plan``, as people call it."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from tiny_models import cli, save_tiny_inputs

from qadapter.errors import QAdapterError
from qadapter.planning import Engine, choose
from qadapter.planning.machines import machine_of

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("plan"), pairs=40)


def plan(capsys, *arguments):
    code = cli("plan", *arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def command_in(said):
    return shlex.split(said.strip().splitlines()[-1])


def test_the_command_it_prints_trains(place, capsys):
    code, out, _ = plan(
        capsys, "--model", place / "model", "--pairs", place / "pairs.jsonl", "--max_steps", 2,
        "--columns", "{}", "--output_dir", place / "run", "--answer_prompts", 0,
    )
    assert code == 2  # what is measured after training is no part of a plan
    options = ("--max_steps", 2, "--retention_coef", 0, "--eval_strategy", "no")
    code, out, _ = plan(capsys, "--model", place / "model", "--pairs", place / "pairs.jsonl",
                        *options, "--output_dir", place / "run")
    assert code == 0
    assert "this CPU" in out and "one process" in out
    program, *arguments = command_in(out)
    assert program == "qadapter"
    assert cli(*arguments) == 0
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert summary["steps"] == 2


def test_a_folder_with_a_configuration_is_enough(place, capsys, tmp_path):
    (tmp_path / "config.json").write_bytes((place / "model" / "config.json").read_bytes())
    code, out, _ = plan(capsys, "--model", tmp_path, "--pairs", place / "pairs.jsonl",
                        "--gpus", "8xH100")
    assert code == 0
    assert "characters a token" in out
    launch = ["torchrun", "--nproc_per_node", "8", "--no-python", "qadapter", "train"]
    assert command_in(out)[:6] == launch


@pytest.mark.parametrize(("model", "gpus", "shards"), [
    ("meta-llama/Llama-3.1-8B", "8xH100", None), ("meta-llama/Llama-3.1-70B", "8xH100", 8),
    ("meta-llama/Llama-3.1-405B-Instruct", "8xB200", 8),
    ("meta-llama/Llama-3.1-405B-Instruct", "2x8xH100", 16),
])
def test_a_base_is_sharded_where_no_gpu_holds_it(place, capsys, model, gpus, shards):
    code, out, _ = plan(capsys, "--model", model, "--pairs", place / "pairs.jsonl", "--gpus", gpus)
    assert code == 0
    words = command_in(out)
    asked = words[words.index("--model_init_kwargs") + 1] if shards else "{}"
    assert json.loads(asked).get("distributed_config", {}).get("fsdp_size") == shards
    assert ("--nnodes" in words) == gpus.startswith("2x")


def test_what_is_too_large_is_refused_with_what_would_do(place, capsys):
    code, out, err = plan(capsys, "--model", "meta-llama/Llama-3.1-405B", "--gpus", "8xH100",
                          "--pairs", place / "pairs.jsonl")
    assert code == 2
    assert "too much" in out and "torchrun" not in out
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "2x8xH100 would be enough" in err


@pytest.mark.parametrize(("gpus", "said"), [
    ("8xH1000", "did you mean 'H100'"), ("0xH100", "is none"), ("many", "is not known"),
    ("8*H100", "must read 8xH100"), ("", "must read 8xH100"), ("2x3x4xH100", "must read 8xH100"),
])
def test_gpus_that_are_none(place, capsys, gpus, said):
    code, _, err = plan(capsys, "--model", place / "model", "--pairs", place / "pairs.jsonl",
                        "--gpus", gpus)
    assert code == 2 and said in err


def test_machines():
    assert machine_of("8xH100").devices == 8
    assert str(machine_of("2x8xh200")) == "2x8xH200"
    assert machine_of("2x8xH200").devices == 16
    assert machine_of("H100-PCIe").per_node == 1
    with pytest.raises(QAdapterError):
        machine_of("8xTPU")


def test_how_a_base_is_spread_is_not_given(place, capsys):
    code, _, err = plan(
        capsys, "--model", place / "model", "--pairs", place / "pairs.jsonl", "--gpus", "8xH100",
        "--model_init_kwargs", "{distributed_config: {tp_size: 8}}",
    )
    assert code == 2 and "leave it out" in err


def test_the_faster_way_is_taken_or_the_simpler_of_like_ones():
    def way(name, needs, step_seconds):
        return Engine(name, 1, 1, {"all": needs}, 10.0, step_seconds, 0.0, 100, "products", 0.0)

    ways = [way("too large", 11, 1.0), way("slow", 9, 3.0), way("simple", 8, 2.1),
            way("fast", 7, 2.0)]
    assert choose(ways).name == "simple"
    assert choose([way("slow", 9, 3.0), way("fast", 7, 2.0)]).name == "fast"
    assert choose(ways[:1]) is None


def test_without_pairs_or_model(place, capsys):
    assert "--pairs" in plan(capsys, "--model", place / "model")[2]
    code, _, err = plan(capsys, "--model", place / "none", "--pairs", place / "pairs.jsonl")
    assert code == 2 and "no such folder" in err


@pytest.mark.slow
def test_the_table_of_the_docs_is_todays(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.delitem(sys.modules, "what_it_plans", raising=False)
    import what_it_plans

    assert what_it_plans.planned() in (DOCS / "scale.md").read_text()
