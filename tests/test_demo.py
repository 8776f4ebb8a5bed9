"""The built-in preferences, their measure, and the demo from end to end on a tiny model."""

from __future__ import annotations

import json

import pytest
from data.tiny import chatml
from tiny_models import save_tiny

from qadapter import QAdapterError, QAdapterModel
from qadapter.demo import run as demo
from qadapter.demo.build import ANSWERS, read_jsonl
from qadapter.demo.manner import MAX_WORDS, keeps_manner
from qadapter.evaluation import Answer


def _normal(prompt: str) -> str:
    return "".join(c for c in prompt.lower() if c.isalnum())


def _answer(text: str, ended: bool = True) -> Answer:
    return Answer(text=text, token_ids=[], ended=ended)


def test_the_pairs_are_many_various_and_split_by_prompt():
    pairs = demo.load_pairs(demo.Size(train_pairs=None, test_pairs=None))
    everything = pairs.train + pairs.test
    assert len(everything) >= 500
    assert len({pair["kind"] for pair in everything}) >= 10
    assert {pair["kind"] for pair in pairs.test} == {pair["kind"] for pair in everything}
    prompts = [_normal(pair["prompt"]) for pair in everything]
    assert len(set(prompts)) == len(prompts)  # so none is on both sides of the split
    assert all(pair["chosen"].strip() != pair["rejected"].strip() for pair in everything)


def test_the_pairs_are_the_answers_written_for_them():
    written = {row["prompt"]: row["chosen"] for row in read_jsonl(ANSWERS)}
    pairs = demo.load_pairs(demo.Size(train_pairs=None, test_pairs=None))
    assert all(written[p["prompt"]] == p["chosen"] for p in pairs.train + pairs.test)


def test_preferred_answers_keep_the_manner_and_the_bases_mostly_do_not():
    pairs = demo.load_pairs(demo.Size(train_pairs=None, test_pairs=None))
    everything = pairs.train + pairs.test
    assert all(keeps_manner(_answer(pair["chosen"])) for pair in everything)
    kept = sum(keeps_manner(_answer(p["rejected"], not p["rejected_cut"])) for p in everything)
    assert kept < len(everything) / 2


@pytest.mark.parametrize(
    ("text", "ended", "kept"),
    [
        ("Canberra. It lies between Sydney and Melbourne.", True, True),
        ("Canberra. It lies between Sydney and", False, False),
        ("Canberra.\n\nIt lies inland.", True, False),
        ("- Canberra", True, False),
        ("1. Canberra", True, False),
        ("The **capital** is Canberra.", True, False),
        ("", True, False),
        ("word " * (MAX_WORDS + 1), True, False),
        ("word " * MAX_WORDS, True, True),
    ],
)
def test_the_measure(text, ended, kept):
    assert keeps_manner(_answer(text, ended)) is kept


def test_a_cut_sample_has_no_end_of_turn():
    tokenizer = chatml()
    pairs = [
        {"prompt": f"question {i}", "chosen": "short", "rejected": "long", "rejected_cut": cut}
        for i, cut in enumerate((True, False))
    ]
    cut, whole = demo.tokenize_pairs(pairs, tokenizer, 64, 48)
    end = whole["chosen_ids"][-1]
    assert cut["chosen_ids"][-1] == whole["rejected_ids"][-1] == end
    assert cut["rejected_ids"] == whole["rejected_ids"][:-1]
    _, short = demo.tokenize_pairs(pairs, tokenizer, 64, 2)
    assert short["rejected_ids"] == whole["rejected_ids"][:2]
    assert short["chosen_ids"] == whole["chosen_ids"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    model = save_tiny(folder / "model")
    small = demo.Size(train_pairs=18, test_pairs=9, epochs=2.0, prompts=3, answer_tokens=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FAST", small)
        summary = demo.run_demo(folder / "run", fast=True, model_name_or_path=str(model))
    return folder / "run", model, summary


def test_a_run_writes_what_it_promises(tiny_run):
    folder, model, summary = tiny_run
    on_disk = json.loads((folder / "summary.json").read_text())
    assert on_disk == json.loads(json.dumps(summary))
    for key in (
        "preference_accuracy", "preference_accuracy_base", "preference_accuracy_policy",
        "kl_per_token", "perplexity", "perplexity_base", "manner_share", "manner_share_base",
        "seconds", "peak_rss_bytes",
    ):
        assert isinstance(on_disk[key], (int, float)), key
    page = (folder / "report.html").read_text()
    for part in ("customised, strength 0.5", "customised, strength 2", "one short plain", "<svg"):
        assert part in page, part
    report = (folder / "report.md").read_text()
    for picture in folder.glob("*.png"):
        assert picture.name in report and picture.stat().st_size > 5_000
    assert len(list(folder.glob("*.png"))) >= 3
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("rewards/accuracies" in step for step in steps)
    loaded = QAdapterModel.from_pretrained(folder, base=model)
    assert loaded.objective == demo.OBJECTIVE


def test_an_earlier_demo_is_replaced_but_no_other_run(tmp_path):
    with demo._demo_folder(tmp_path / "new") as folder:
        assert folder.is_dir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"run": "demo", "seconds": 9}')
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    for _ in range(2):  # the second time as if the first had been killed there
        with demo._demo_folder(tmp_path / "run") as folder:
            demo._claim(folder)
            assert "seconds" not in (folder / "summary.json").read_text()
            assert not (folder / "metrics.jsonl").exists()
            (folder / "checkpoint-3").mkdir()
    for number, held in enumerate(('{"preference_accuracy": 1}', "[]", "{")):
        other = tmp_path / f"other-{number}"
        other.mkdir()
        (other / "summary.json").write_text(held)
        with (
            pytest.raises(QAdapterError, match="holds another run"), demo._demo_folder(other)
        ):
            raise AssertionError("not reached")
        assert (other / "summary.json").read_text() == held
