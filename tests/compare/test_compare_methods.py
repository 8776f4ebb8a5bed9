"""The rows of a comparison one by one: what each trains on, by whom, and what comes of it."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from comparisons import settings, write_config, write_place
from tiny_models import preference_rows, write_jsonl
from transformers import AutoModelForCausalLM, TrainerCallback

from qadapter import QAdapterError
from qadapter.compare import methods, read_config, run_comparison
from qadapter.compare.kinds import DPO, RLOO, SDFT, SFT, AdapterSpec, BestOfN, QAdapter
from qadapter.compare.methods import interpolated, require_trl, train
from qadapter.compare.run import run_folder
from qadapter.compare.workbench import Workbench
from qadapter.evaluation import evaluate_preferences
from qadapter.evaluation.scoring import evaluating

LORA = AdapterSpec(kind="lora", r=2, target_modules=["q_proj", "v_proj"])
ADAPTERS = {
    "lora": LORA, "linear": AdapterSpec(form="linear", rank=4),
    "mlp": AdapterSpec(form="mlp", rank=4), "block": AdapterSpec(form="block", rank=4),
}
UNASKED = {**settings()["evaluation"], "prompts": 0, "strengths": [1.0]}


def unprobed(model):
    return {}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    folder = write_place(tmp_path_factory.mktemp("methods"))
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    yield folder
    patch.undo()


def bench_of(place, name="bench", **changes):
    written = {"sweeps": {}, "reference": None, "evaluation": UNASKED,
               "methods": {"sft": {"method": "sft"}}, **changes}
    config = read_config(write_config(place, f"{name}.yaml", **written))
    return Workbench(config, place / name, lambda line: None)


@pytest.fixture(scope="module")
def bench(place):
    return bench_of(place)


@pytest.fixture(scope="module")
def one_batch(place):
    """All pairs in every step: in which order they come does not matter."""
    training = {**settings()["training"], "per_device_train_batch_size": 64, "num_train_epochs": 6}
    return bench_of(place, "one_batch", training=training)


def trained(bench, method, best=None):
    return train(bench, method, 0, unprobed, best).model


def read(out, name, file="validation.json", seed=0):
    return json.loads((run_folder(out, name, seed) / file).read_text())


# --- DPO ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "mlp"])
def test_dpo_is_the_same_by_trl_and_by_our_trainer(one_batch, kind):
    """A weight of 1e-9 hands DPO over to TRL and adds nothing. Adam turns float32 noise in tiny
    gradients into at most a learning rate (5e-3) a step; what moved by some 1e-2 agrees to 1e-3."""
    spec = ADAPTERS[kind]
    ours = train(one_batch, DPO(beta=0.3, learning_rate=5e-3, adapter=spec), 0, unprobed)
    theirs = train(
        one_batch, DPO(beta=0.3, learning_rate=5e-3, nll_coef=1e-9, adapter=spec), 0, unprobed
    )
    assert ours.trained_by.startswith("QAdapterTrainer")
    assert theirs.trained_by.startswith("TRL") and theirs.trained_by.endswith("DPOTrainer")
    assert ours.steps == theirs.steps == 6
    start = one_batch.model(DPO(adapter=spec), ours.model.objective, 0).adapter.parameters()
    for mine, other, before in zip(
        ours.model.adapter.parameters(), theirs.model.adapter.parameters(), start, strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-3)
        assert (mine - before).abs().max() > 5e-3


def test_nll_adds_the_cross_entropy_of_the_preferred_answers(one_batch, tmp_path):
    """Before anything moved DPO's loss is log 2; what is added is the base's mean over tokens."""
    model = one_batch.fresh
    losses, count = 0.0, 0
    for row in one_batch.new.train.tokens:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with evaluating(model):
            logps = model(ids, strength=0.0).logits[0, :-1].log_softmax(-1)
        own = logps.gather(-1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :]
        losses, count = losses - float(own.sum()), count + len(own)
    for weight in (0.2, 1.0):
        method = DPO(beta=0.3, nll_coef=weight, learning_rate=1e-9)
        objective = methods._objective(method)
        trainer, _ = methods._trainer(
            one_batch, method, 0, one_batch.model(method, objective, 0), tmp_path, None
        )
        trainer.train()
        [first, *_] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert first == pytest.approx(math.log(2) + weight * losses / count, rel=1e-4)


def test_nll_makes_preferred_answers_likelier(one_batch):
    """What it is for: DPO alone only sets the two answers apart."""
    gains = []
    for weight in (None, 3.0):
        model = trained(one_batch, DPO(beta=0.3, nll_coef=weight, learning_rate=3e-2))
        pairs = evaluate_preferences(model, one_batch.new.train.tokens).pairs
        gains.append((pairs.chosen_policy_logp - pairs.chosen_base_logp).mean())
    assert gains[1] > gains[0] + 0.2


# --- interpolate --------------------------------------------------------------------------------


def tokens_of(bench):
    row = bench.new.validation.tokens[0]
    return torch.tensor([row["prompt_ids"] + row["chosen_ids"]])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_weights_between_the_base_and_what_was_trained(bench, kind):
    """0 is the base and 1 the trained policy, to the bit; after it all is as it was."""
    model, ids = trained(bench, QAdapter(adapter=ADAPTERS[kind])), tokens_of(bench)

    def logits(**options):
        with evaluating(model):
            return model(ids, **options).logits

    base, tuned = logits(strength=0.0), logits(strength=1.0)
    assert not torch.allclose(base, tuned, atol=1e-3)
    found = {}
    for weight in (0.0, 0.3, 1.0, 2.0):
        with interpolated(model, weight) as strength:
            found[weight] = logits(strength=strength)
    assert torch.equal(found[1.0], tuned) and torch.equal(logits(strength=1.0), tuned)
    torch.testing.assert_close(found[0.0], base, rtol=1e-6, atol=1e-6)
    if kind in ("linear", "mlp"):  # what such a head adds to the logits is linear in what it writes
        for weight in (0.3, 2.0):
            torch.testing.assert_close(found[weight], logits(strength=weight), rtol=1e-4, atol=1e-4)
    with pytest.raises(KeyboardInterrupt), interpolated(model, 0.3):
        raise KeyboardInterrupt
    assert torch.equal(logits(strength=1.0), tuned)


def test_a_loras_weights_are_mixed_as_two_checkpoints_are(bench, place):
    """(1 − w)·base + w·merged, tensor by tensor, is what the row at w computes."""
    model, ids = trained(bench, DPO(adapter=LORA)), tokens_of(bench)
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    mixed = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    model.merge_adapter()
    merged = {
        name.replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.base.state_dict().items() if "lora_" not in name
    }
    model.unmerge_adapter()
    for weight in (0.4, 1.5):
        mixed.load_state_dict({
            name: torch.lerp(tensor, merged[name], weight)
            for name, tensor in base.state_dict().items()
        })
        with evaluating(mixed):
            expected = mixed(ids).logits
        with evaluating(model), interpolated(model, weight) as strength:
            torch.testing.assert_close(
                model(ids, strength=strength).logits, expected, rtol=1e-4, atol=1e-4
            )


@pytest.mark.slow
def test_an_interpolated_row_has_weights_for_its_dial(place):
    rows = {
        "dpo": {"method": "dpo", "adapter": {"kind": "lora", "r": 2}},
        "mixed": {"method": "interpolate", "of": "dpo", "weights": [0.5, 2]},
    }
    config = read_config(write_config(
        place, "mixed.yaml", methods=rows, sweeps={}, reference="dpo", seeds=[0, 3],
        evaluation={**settings()["evaluation"], "strengths": [1.0, 2.0], "dial_seeds": 1},
    ))
    out = run_comparison(config, place / "mixed", only=["mixed"])
    # The row it is of is trained for it, and measured when its turn comes.
    assert (run_folder(out, "dpo", 3) / "training.json").is_file()
    assert not (run_folder(out, "dpo", 0) / "validation.json").exists()
    assert not (run_folder(out, "mixed", 0) / "training.json").exists()
    run_comparison(config, out)
    tuned, mixed = read(out, "dpo"), read(out, "mixed")
    assert mixed["preferences"] == tuned["preferences"]
    points = {point["strength"]: point for point in mixed["dial"]}
    assert list(points) == [0.5, 1.0, 2.0]
    assert points[1.0] == tuned["dial"][0]  # answers, judges and retention
    kls = [point["retention"]["texts"]["kl_per_token"] for point in mixed["dial"]]
    assert 0 < kls[0] < kls[1] < kls[2]
    assert kls[2] != pytest.approx(  # weights are mixed, not the two policies
        tuned["dial"][1]["retention"]["texts"]["kl_per_token"], rel=1e-3
    )
    assert points[2.0]["answers"]["new"]["judged"] and "old" not in points[2.0]["answers"]
    assert [point["strength"] for point in read(out, "mixed", seed=3)["dial"]] == [1.0]


def test_what_a_row_is_made_of_is_made_out_before_anything_runs(place):
    rows = {"dpo": {"method": "dpo", "adapter": {"kind": "lora", "target_modules": ["q_pro"]}},
            "mixed": {"method": "interpolate", "of": "dpo"}}
    config = read_config(write_config(
        place, "made_of.yaml", methods=rows, sweeps={}, reference=None, evaluation=UNASKED
    ))
    said: list[str] = []
    with pytest.raises(QAdapterError, match="q_pro"):
        run_comparison(config, place / "made_of", only=["mixed"], say=said.append)
    assert "measuring the base" not in said


# --- best of n ----------------------------------------------------------------------------------


def test_the_best_of_the_bases_answers_are_learned(bench, tmp_path, place):
    """By the sum of log-ratios, one to a prompt, through SFT."""
    judge = trained(bench, DPO(beta=0.3))
    best = bench.best_answers(judge, 3)
    prompts = {tuple(ids) for ids in bench.new.train.tokens["prompt_ids"]}
    assert {tuple(prompt) for prompt, _ in best} == prompts and len(best) == len(prompts)
    stored = [json.loads(line) for line in
              (place / "bench/base_answers/training.jsonl").read_text().splitlines()]
    assert len(stored) == 3 * len(best)

    def reward(prompt, answer):
        ids = torch.tensor([prompt + answer])
        with evaluating(judge):
            both = [judge(ids, strength=s).logits[0, :-1].log_softmax(-1) for s in (1.0, 0.0)]
        ratio = (both[0] - both[1]).gather(-1, ids[0, 1:, None])
        return 0.3 * float(ratio[len(prompt) - 1 :].sum())

    differing = 0
    for i, (prompt, answer) in enumerate(best):
        drawn = [row["token_ids"] for row in stored[i :: len(best)]]
        rewards = [reward(prompt, ids) for ids in drawn]
        assert answer in drawn
        assert reward(prompt, answer) == pytest.approx(max(rewards), abs=1e-5)
        differing += max(rewards) > min(rewards) + 1e-4
    assert differing > len(best) // 2
    method = BestOfN(of="dpo")
    model = bench.model(method, methods._objective(method), 0)
    trainer, name = methods._trainer(bench, method, 0, model, tmp_path, best)
    assert name.endswith("SFTTrainer")
    learned = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    assert learned == [(p + a, [-100] * len(p) + a) for p, a in best]
    # More answers go on from those that are there.
    bench.best_answers(judge, 4)
    again = [json.loads(line) for line in
             (place / "bench/base_answers/training.jsonl").read_text().splitlines()]
    assert again[: len(stored)] == stored and len(again) == 4 * len(best)


@pytest.mark.slow
def test_a_best_of_n_row_trains_the_row_that_rewards_first(place, monkeypatch):
    rows = {
        "best": {"method": "best_of_n", "of": "q", "n": 2}, "q": {"method": "q_adapter"},
        "mixed": {"method": "interpolate", "of": "best", "weights": [2]},
    }
    config = read_config(write_config(
        place, "best.yaml", methods=rows, reference=None, evaluation=UNASKED,
        sweeps={"n": {"of": "best", "option": "n", "values": [2, 3]}},
    ))
    out = run_comparison(config, place / "best", only=["mixed"])
    training, of = read(out, "best", "training.json"), read(out, "q", "training.json")
    assert training["trained_by"].endswith("SFTTrainer") and training["method"] == "best_of_n"
    # The same budget; a pass over answers this short may end within a step of it.
    step = training["tokens"] / training["steps"]
    assert training["tokens"] == pytest.approx(of["budget_tokens"], abs=1.5 * step)
    run_comparison(config, out)
    assert read(out, "best n=3")["preferences"]["new"] != read(out, "best")["preferences"]["new"]
    # What was trained with TRL needs it no more, nor what was made of it.
    monkeypatch.setitem(sys.modules, "trl", None)
    (run_folder(out, "mixed", 0) / "validation.json").unlink()
    run_comparison(config, out)
    (run_folder(out, "best", 0) / "training.json").unlink()
    (run_folder(out, "mixed", 0) / "validation.json").unlink()
    with pytest.raises(QAdapterError, match="best_of_n trains with TRL"):
        run_comparison(config, out)


# --- SDFT ---------------------------------------------------------------------------------------


class Batches(TrainerCallback):
    """What TRL says of the batches it made."""

    def __init__(self):
        self.seen = []

    def on_self_distillation_batch_prepared(self, args, state, control, **batch):
        self.seen.append({name: x for name, x in batch.items() if name.endswith("_ids")})


def sdft_trainer(bench, folder, **options):
    method = SDFT(**{"max_completion_length": 6, "learning_rate": 3e-2} | options)
    model = bench.model(method, methods._objective(method), 0)
    trainer, name = methods._trainer(bench, method, 0, model, folder, None)
    assert name.startswith("TRL") and name.endswith("SDFTTrainer")
    trainer.add_callback(batches := Batches())
    return trainer, model, batches


@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_the_teacher_is_the_base_that_was_shown_the_preferred_answer(bench, tmp_path, kind):
    trainer, model, batches = sdft_trainer(
        bench, tmp_path, adapter=ADAPTERS[kind], teacher_prompt_template=
        "{prompt} red {privileged_context} blue",
    )
    trainer.train()
    pairs = {}
    for pair in bench.new.train.pairs:
        pairs.setdefault(pair["prompt"][0]["content"], []).append(pair["chosen"][0]["content"])
    decode, pad = bench.tokenizer.decode, bench.tokenizer.pad_token_id
    for batch in batches.seen:
        for student, teacher, answer in zip(
            batch["prompt_ids"], batch["teacher_input_ids"], batch["completion_ids"], strict=True
        ):
            assert torch.equal(teacher[-len(answer) :], answer)
            student, teacher = (decode(ids[ids != pad]) for ids in (student, teacher))
            [asked] = [prompt for prompt in pairs if f"user\n{prompt}\n" in student]
            assert any(f"{asked} red {shown} blue" in teacher for shown in pairs[asked])
            assert not any(shown in student for shown in pairs[asked])
    ids = tokens_of(bench)
    with evaluating(model):
        base, policy = (model(ids, strength=s).logits for s in (0.0, 1.0))
        torch.testing.assert_close(trainer.teacher_model(ids).logits, base, rtol=0, atol=0)
    assert (policy - base).abs().max() > 1e-2


@pytest.mark.slow
def test_the_student_comes_nearer_to_its_teacher(place, tmp_path):
    training = {**settings()["training"], "num_train_epochs": 8}
    bench = bench_of(place, "longer", training=training)
    trainer, _, _ = sdft_trainer(bench, tmp_path, num_generations=4, adapter=LORA)
    trainer.train()
    name = "self_distillation/distillation_loss"
    losses = [log[name] for log in trainer.state.log_history if name in log]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_a_live_teacher_is_the_student(bench, tmp_path):
    trainer, _, _ = sdft_trainer(bench, tmp_path, teacher_model_kind="live")
    assert trainer.teacher_model is trainer.model


@pytest.mark.parametrize("method", [
    SDFT(max_completion_length=4), SDFT(max_completion_length=4, num_generations=2),
    RLOO(max_completion_length=4, num_generations=2),
])
def test_online_methods_keep_to_the_budget_with_few_prompts_too(place, method):
    """A batch that the prompts don't fill once is filled with them again, not left out."""
    training = {**settings()["training"], "per_device_train_batch_size": 16, "num_train_epochs": 8}
    few = bench_of(place, "few", training=training)
    found = train(few, method, 0, unprobed)
    step = found.tokens / found.steps
    assert found.tokens == pytest.approx(few.budget, abs=1.5 * step)
    ids = tokens_of(few)
    with evaluating(found.model):
        logits = [found.model(ids, strength=s).logits for s in (0.0, 1.0)]
    assert not torch.equal(*logits)


def test_sft_keeps_to_the_budget_where_the_last_batch_is_not_full(place):
    written = settings()
    written["data"]["train"] = 5
    training = {**settings()["training"], "num_train_epochs": 3}
    few = bench_of(place, "five", data=written["data"], training=training)
    found = train(few, SFT(), 0, unprobed)
    assert found.tokens == pytest.approx(few.budget, abs=1.5 * found.tokens / found.steps)


def test_text_prompts_are_taken_as_they_are(place, tmp_path):
    rows = [
        {"prompt": row["prompt"][0]["content"] + "\n", "chosen": row["chosen"][0]["content"],
         "rejected": row["rejected"][0]["content"]} for row in preference_rows(80)
    ]
    write_jsonl(place / "text.jsonl", rows)
    written = settings()
    bench = bench_of(place, "text", data={**written["data"], "dataset_name": "text.jsonl"})
    trainer, _, batches = sdft_trainer(bench, tmp_path)
    trainer.train()
    pad = bench.tokenizer.pad_token_id
    prompts = {tuple(ids) for ids in bench.new.train.tokens["prompt_ids"]}
    found = {tuple(ids[ids != pad].tolist()) for b in batches.seen for ids in b["prompt_ids"]}
    assert found <= prompts


def test_a_teacher_is_shown_one_answer(place):
    rows = preference_rows(80)
    for row in rows:
        row["chosen"] = [*row["chosen"], {"role": "user", "content": "Is it always hot?"},
                         {"role": "assistant", "content": "Never."}]
    write_jsonl(place / "turns.jsonl", rows)
    bench = bench_of(place, "turns", data={**settings()["data"], "dataset_name": "turns.jsonl"})
    with pytest.raises(QAdapterError, match="sdft shows the teacher one answer"):
        train(bench, SDFT(), 0, unprobed)


@pytest.mark.parametrize("last", [
    {"role": "system", "content": "Be red."}, {"role": "assistant", "content": "It is"},
])
def test_a_teacher_is_asked_by_a_user(place, last):
    rows = [{**row, "prompt": [*row["prompt"], last]} for row in preference_rows(80)]
    name = f"ends_with_{last['role']}"
    write_jsonl(place / f"{name}.jsonl", rows)
    bench = bench_of(place, name, data={**settings()["data"], "dataset_name": f"{name}.jsonl"})
    with pytest.raises(QAdapterError, match=r"sdft .* messages that end with a user's"):
        train(bench, SDFT(), 0, unprobed)


# --- what can't be ------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "message"), [
    ({"method": "sdft", "num_generations": 3}, "num_generations must be at least 1 and divide a"),
    ({"method": "sdft", "max_completion_length": 0}, "max_completion_length must be at least 1"),
    ({"method": "sdft", "teacher_model_kind": "ema"}, "teacher_model_kind must be base or live"),
    ({"method": "sdft", "teacher_prompt_template": "{prompt}"}, "needs {prompt} and {privileged"),
    ({"method": "sdft", "teacher_prompt_template": "{prompt} {answer}"}, "and {privileged_context"
     "} alone"),
    ({"method": "sdft", "teacher_prompt_template": "{prompt} {"}, "other braces doubled"),
    ({"method": "best_of_n", "of": "q", "n": 1}, "x: n must be at least 2, got 1"),
    ({"method": "best_of_n"}, "x.of: no trained method is called ''"),
    ({"method": "best_of_n", "of": "asked"}, "x.of: no trained method is called 'asked'"),
    ({"method": "best_of_n", "of": "x"}, "x.of: x is best_of_n itself"),
    ({"method": "best_of_n", "of": "q", "seeds": [0, 4]}, "x.seeds: q has no seed 4"),
    ({"method": "interpolate", "of": "qq"}, "called 'qq'; did you mean 'q'"),
    ({"method": "interpolate", "of": "back"}, "x.of: no trained method is called 'back'"),
    ({"method": "interpolate", "of": "q", "weights": [-1]}, "x: weights must not be negative"),
    ({"method": "interpolate", "of": "q", "weights": ["nan"]}, "expected a finite number"),
    ({"method": "interpolate", "of": "q", "learning_rate": 1}, "what is not trained takes no ada"),
    ({"method": "interpolate", "of": "paper"}, "at weight 0 paper is not the base"),
    ({"method": "prompted", "system": "Be red", "adapter": {"rank": 8}}, "what is not trained"),
])
def test_what_cannot_be_a_row_is_named(tmp_path, row, message):
    written = settings()
    written["methods"] |= {
        "x": row, "paper": {"method": "q_adapter", "parametrization": "q"},
    }
    with pytest.raises(QAdapterError, match=message) as told:
        read_config(write_config(tmp_path, **written))
    assert "methods.x" in str(told.value)


def test_sweeps_of_rows_that_are_made_of_others(tmp_path):
    written = settings()
    written["methods"] |= {"best": {"method": "best_of_n", "of": "q"},
                           "mixed": {"method": "interpolate", "of": "q"}}
    for sweep, message in (
        ({"of": "best", "option": "of", "values": ["dpo"]}, "option: best_of_n has no 'of'"),
        ({"of": "best", "option": "n", "values": [1, 2]}, "values: 1.0: n must be at least 2"),
        ({"of": "best", "option": "n", "values": [2], "seeds": [5]}, "seeds: q has no seed 5"),
        ({"of": "mixed", "option": "weights", "values": [1]}, "of: interpolate is not trained"),
    ):
        with pytest.raises(QAdapterError, match=r"sweeps\.s.*" + message):
            read_config(write_config(tmp_path, **written | {"sweeps": {"s": sweep}}))


def test_which_methods_need_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    require_trl([QAdapter(), DPO(), DPO(retention_coef=1.0)])
    for method in (SDFT(), BestOfN(of="q"), DPO(nll_coef=0.1)):
        with pytest.raises(QAdapterError, match=rf"{method.kind} trains with TRL: pip install"):
            require_trl([method])
