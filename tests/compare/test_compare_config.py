"""A comparison's YAML: what is read, what is refused by name, what may change between two runs."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from comparisons import settings, write_config

from qadapter.compare.kinds import DPO, AdapterSpec, QAdapter
from qadapter.compare.reading import changes, fingerprint_files, read_config
from qadapter.errors import QAdapterError


def test_values_are_converted_and_names_found_beside_the_file(tmp_path):
    (tmp_path / "new.jsonl").write_text("{}\n")
    config = read_config(write_config(tmp_path))
    assert config.training.learning_rate == 0.01  # text to YAML
    assert isinstance(config.methods["dpo"], DPO) and config.methods["dpo"].beta == 0.3
    assert config.methods["q"].objective().alpha_tilde == 0.3
    assert config.find("new.jsonl") == str(tmp_path / "new.jsonl")
    assert config.find("some/hub-name") == "some/hub-name"
    assert str(tmp_path) not in str(config.as_dict())  # a results folder names no machine's paths


def test_what_is_held_to_the_built_in_passages_is_measured_on_others(tmp_path):
    methods = settings()["methods"]
    methods["q"]["retention_dataset_name"] = "built-in"
    texts = {"name": "passages", "file": "built-in"}
    spec = settings()["evaluation"] | {"retention": [texts]}
    with pytest.raises(QAdapterError, match=r"built-in is what q is held to.* unseen: true"):
        read_config(write_config(tmp_path, methods=methods, evaluation=spec))
    texts["unseen"] = True
    read_config(write_config(tmp_path, methods=methods, evaluation=spec))


def test_the_rows_of_a_sweep_leave_out_what_a_method_has(tmp_path):
    rows = read_config(write_config(tmp_path)).rows()
    assert [row.name for row in rows] == [
        "sft", "replay", "dpo", "rloo", "q", "asked", "back", "q alpha=1",
        "dpo adapter.form=linear",
    ]
    alpha, form = rows[-2:]
    assert alpha.method == QAdapter(alpha_0=1.0, alpha_tilde=1.0, retention_coef=1.0)
    assert (alpha.sweep, alpha.value, rows[0].sweep) == ("alpha", 1.0, None)
    assert form.method == DPO(beta=0.3, adapter=AdapterSpec(form="linear", rank=4))


@pytest.mark.parametrize(("path", "value", "message"), [
    (("trainig",), {}, "unknown key 'trainig'; did you mean 'training'"),
    (("data", "dataset_nam"), "x", "data: unknown key 'dataset_nam'; did you mean 'dataset_name'"),
    (("methods", "dpo", "method"), "ppo", "methods.dpo.method: expected one of sft"),
    (("methods", "dpo", "alpha_0"), 1, "methods.dpo: unknown key 'alpha_0'"),
    (("methods", "q", "alpha_tilde"), -1, "methods.q: alpha_tilde"),
    (("methods", "base"), {"method": "sft"}, "methods.base: the base is always compared"),
    (("methods",), {}, "nothing to compare"),
    (("methods", "q", "retention_dataset_name"), ["own", "texts.txt"],
     r"evaluation.retention.texts: texts.txt is what q is held to: measure on other texts"),
    (("methods", "q", "retention_dataset_name"), [], "methods.q: retention_dataset_name is empty"),
    (("methods", "dpo", "retention_dataset_name"), "own",
     "methods.dpo: retention_dataset_name has no say where retention_coef is 0"),
    (("methods", "dpo", "nll_coef"), 0, "methods.dpo: nll_coef must be positive"),
    (("adapter", "layers"), 2, "adapter: layers is a number of upper blocks that get a LoRA"),
    (("evaluation", "retention"), [{"name": "t", "file": "texts.txt", "unseen": True}],
     "evaluation.retention.t.unseen: is for the file built-in"),
    (("methods", "dpo", "method"), ["dpo"], "methods.dpo.method: expected one of sft"),
    (("methods",), {1: {"method": "sft"}, "1": {"method": "sft"}}, "methods: two keys read alike"),
    (("data", "train"), 10**30, "data.train: expected a number of 64 bits"),
    (("title",), {"a": ["x" * 1000] * 100}, "title: expected str, got ."),
    (("seeds",), [1, 1], "seeds: expected different"),
    (("seeds",), ["one"], r"seeds\[0\]: expected int, got 'one'"),
    (("training", "learning_rate"), "fast", "training.learning_rate: expected float"),
    (("sweeps", "alpha", "of"), "qq", "no method is called 'qq'; did you mean 'q'"),
    (("sweeps", "alpha", "option"), "alfa", "q_adapter has no 'alfa'"),
    (("adapter", "kind"), "tail", "adapter: kind must be head or lora, got 'tail'"),
    (("adapter", "rank"), 0, "adapter: adapter rank must be a whole number from 1 to 65,536"),
    (("adapter", "form"), "foo", 'adapter: adapter form must be "linear", "block" or "mlp"'),
    (("methods", "dpo", "adapter"), {"kind": "lora", "r": 0}, "methods.dpo.adapter: r and lora_"),
    (("seeds",), [-1], "seeds: expected different whole numbers from 0"),
    (("methods", "dpo", "seeds"), [1, 1], "methods.dpo.seeds: expected different"),
    (("sweeps", "alpha", "seeds"), [], "sweeps.alpha.seeds: expected different"),
    (("dtype",), "foo", "dtype: expected auto or a torch dtype"),
    (("training", "lr_scheduler_type"), "foo", "lr_scheduler_type: expected one of linear"),
    (("training", "warmup_steps"), -1, "training.warmup_steps: must be at least 0"),
    (("training", "max_grad_norm"), "nan", "training.max_grad_norm: expected a finite number"),
    (("evaluation", "retention"), [], "evaluation.retention: expected texts of different"),
    (("methods", ".."), {"method": "sft"}, "methods...: no folder can have this name"),
    (("methods", "base_answers"), {"method": "sft"}, "methods.base_answers: no folder can have"),
    (("methods", ""), {"method": "sft"}, "methods: a method's name is empty"),
    (("sweeps", "form", "values"), ["linear", "foo"], "sweeps.form.values: 'foo': adapter form"),
    (("sweeps", "form", "values"), [1], "sweeps.form.values: 1.0: adapter.form must be text"),
    (("sweeps", "rank"), {"of": "dpo", "option": "adapter.rank", "values": [2.5]},
     "sweeps.rank.values: 2.5: adapter.rank must be a whole number"),
    (("sweeps", "alpha", "values"), [0.3, 0.3], "sweeps.alpha.values: expected different values"),

    (("evaluation", "prompts"), -1, "evaluation.prompts: must be at least 0"),
    (("evaluation", "prompts"), 0, "methods.asked: nothing is asked where"),
    (("evaluation", "samples"), 0, "evaluation.samples: must be at least 1"),
    (("evaluation", "strengths"), [1, "nan"], r"evaluation.strengths\[1\]: expected a finite"),
    (("evaluation", "strengths"), [-1], "evaluation.strengths: a strength must not"),
    (("evaluation", "temperature"), 0, "evaluation.temperature: must be positive, got 0.0"),
    (("evaluation", "retention"), [{"name": "t", "file": "texts.txt", "max_texts": 0}],
     "evaluation.retention.t.max_texts: must be at least 1"),
    (("data", "judge"), 0, "data.judge: must be at least 1, got 0"),
    (("old", "max_length"), 0, "old.max_length: must be at least 1"),
    (("training", "learning_rate"), -1, "training.learning_rate: must be positive"),
    (("training", "per_device_train_batch_size"), 0, "per_device_train_batch_size: must be at"),
    (("methods", "sft", "learning_rate"), 0, "methods.sft: learning_rate must be positive"),
    (("methods", "replay", "replay_fraction"), 1, r"methods.replay: replay_fraction must be in"),
    (("methods", "dpo", "beta"), 0, "methods.dpo: beta must be positive"),
    (("methods", "dpo", "retention_coef"), -1, "methods.dpo: retention_coef must not be negative"),
    (("methods", "q", "retention_coef"), "nan", "methods.q.retention_coef: expected a finite"),
    (("methods", "rloo", "num_generations"), 3, "methods.rloo: num_generations must be at least 2 "
     "and divide a batch of 8 answers"),
    (("methods", "rloo", "max_completion_length"), 0, "methods.rloo: beta must not be negative, "
     "and max_completion_length at least 1"),
    (("methods", "d po"), {"method": "dpo", "beta": 2}, "methods.d po: its folder would be that "
     "of 'd-po'"),
    (("old",), None, "methods.replay: replay needs old data"),
    (("reference",), "dop", "reference: no row is called 'dop'; did you mean 'dpo'"),
    (("methods", "asked", "system"), " ", "methods.asked.system: is missing"),
    (("methods", "back", "of"), "dop", "no trained method is called 'dop'; did you mean 'dpo'"),
    (("methods", "back", "of"), "asked", "no trained method is called 'asked'"),
    (("methods", "back", "seeds"), [3], "methods.back.seeds: q has no seed 3"),
    (("methods", "back", "learning_rate"), 1, "methods.back: what is not trained"),
    (("methods", "q", "adapter"), {"kind": "lora"}, "only a head adapter can be reversed"),
    (("methods", "dpo", "adapter"), {"kind": "tail"}, "methods.dpo.adapter: kind must be head"),
    (("sweeps", "form", "option"), "adapter.from", "did you mean 'adapter.form'"),
    (("sweeps", "form", "of"), "asked", "sweeps.form.of: prompted is not trained"),
    (("sweeps", "alpha", "values"), [0.3, "x"], "sweeps.alpha.values: 'x': alpha_0 must be a num"),
    (("sweeps", "alpha", "values"), [0.3, -1], "sweeps.alpha.values: -1.0: alpha"),
    (("sweeps", "beta"), {"of": "dpo", "option": "beta", "values": [-1]},
     "sweeps.beta.values: -1.0: beta must be positive"),
    (("sweeps", "n"), {"of": "rloo", "option": "num_generations", "values": [2.5]},
     "sweeps.n.values: 2.5: num_generations must be a whole number"),
])
def test_what_cannot_be_is_named(tmp_path, path, value, message):
    written = settings()
    if path == ("methods", "d po"):
        written["methods"]["d-po"] = {"method": "dpo", "beta": 1}
    place = written
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(QAdapterError, match=message):
        read_config(write_config(tmp_path, **written))


def test_what_the_base_learns_first_needs_old_data(tmp_path):
    written = settings(first={"beta": 0.5})
    assert read_config(write_config(tmp_path, **written)).first.beta == 0.5
    del written["old"], written["methods"]["replay"]
    with pytest.raises(QAdapterError, match="first: the base can learn first only what old data"):
        read_config(write_config(tmp_path, **written | {"old": None}))


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(QAdapterError, match="can't be read"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: [1")
    with pytest.raises(QAdapterError, match="not YAML"):
        read_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("methods:\n  dpo: {method: dpo}\n  dpo: {method: sft}")
    with pytest.raises(QAdapterError, match=r"a.yaml:3 is not YAML: the key 'dpo' stands there tw"):
        read_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(QAdapterError, match="expected keys and values, got list"):
        read_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("data: {dataset_name: x}")
    with pytest.raises(QAdapterError, match="methods is missing"):
        read_config(tmp_path / "a.yaml")


def test_folders_are_known_by_what_is_in_them(tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/train.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"1")
    written = settings(model_name_or_path="model")
    written["data"]["dataset_name"] = "pairs"
    config = read_config(write_config(tmp_path, **written))
    first = fingerprint_files(config)
    assert {"data.dataset_name", "model_name_or_path"} <= set(first)
    (tmp_path / "pairs/train.jsonl").write_text("{ }\n")
    second = fingerprint_files(config)
    (tmp_path / "model/model.safetensors").write_bytes(b"2")
    third = fingerprint_files(config)
    assert first["data.dataset_name"] != second["data.dataset_name"] == third["data.dataset_name"]
    assert first["model_name_or_path"] == second["model_name_or_path"]
    assert second["model_name_or_path"] != third["model_name_or_path"]


def test_a_comparison_may_grow_and_not_change(tmp_path):
    (tmp_path / "new.jsonl").write_text("{}\n")
    config = read_config(write_config(tmp_path))
    before = config.as_dict() | {"files_sha256": fingerprint_files(config)}
    grown = copy.deepcopy(before)
    grown["methods"]["more"] = {"method": "sft"}
    grown["seeds"] = [0, 1]
    assert changes(before, grown) == []
    other = copy.deepcopy(before)
    other["methods"]["dpo"]["beta"] = 0.1
    other["evaluation"]["prompts"] = 4
    other["evaluation"]["retention"][1]["max_texts"] = 6
    del other["methods"]["sft"]
    assert changes(before, other) == [
        "evaluation.prompts: 3 → 4", "evaluation.retention.2.max_texts: 5 → 6",
        "methods.dpo.beta: 0.3 → 0.1",
    ]
    # An option that came later, in a text as in a method.
    earlier = copy.deepcopy(before)
    for parts in (earlier["evaluation"]["retention"][0], earlier["adapter"]):
        del parts["unseen" if "file" in parts else "layers"]
    assert changes(earlier, before) == changes(before, earlier) == []
    fewer = copy.deepcopy(before)
    fewer["evaluation"]["retention"].pop()
    [line] = changes(before, fewer)
    assert line.startswith("evaluation.retention: ")
    (tmp_path / "new.jsonl").write_text("{} \n")
    changed = config.as_dict() | {"files_sha256": fingerprint_files(config)}
    [line] = changes(before, changed)
    assert line.startswith("files_sha256.data.dataset_name: ")
    assert dataclasses.replace(config, seeds=[5]).rows()[0].seeds == (5,)
