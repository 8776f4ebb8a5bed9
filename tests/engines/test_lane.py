"""What decides whether an engine's answers are ours, and what was committed of the last run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import every_engine
import pytest
from comparing import compare
from policies import Answer, Expected, Reference
from servers import answer_of

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.01


def expected(*tokens: str, ended: bool = False, likely: dict[str, float] | None = None) -> Expected:
    """One answer whose tokens have log-probability −1, and beside each the same others."""
    answer = Answer(tokens, ended, (-1.0,) * len(tokens))
    places = len(tokens) + ended
    words = (*tokens, "") if ended else tokens
    candidates = tuple({words[i]: -1.0, **(likely or {})} for i in range(places))
    return Expected((Reference(answer, candidates),), TOLERANCE)


def engines(*tokens: str, ended: bool = False, off: float = 0.0) -> list[Answer]:
    return [Answer(tokens, ended, (-1.0 + off,) * len(tokens))]


def test_the_same_answer():
    found = compare(expected("a", "b", ended=True), engines("a", "b", ended=True, off=0.005))
    assert (found.same, found.compared, found.gaps, found.wrong) == (2, 2, (), [])
    assert found.difference == pytest.approx(0.005)


def test_a_tie_may_go_the_other_way_and_ends_the_comparison():
    ours = expected("a", "b", "c", likely={"x": -1.015})
    found = compare(ours, engines("a", "x", "y"))
    assert (found.same, found.compared, found.wrong) == (1, 2, [])
    assert found.gaps == pytest.approx((0.015,))


@pytest.mark.parametrize("likely", [{"x": -1.03}, {}], ids=["by more than rounding", "unlikely"])
def test_another_token_is_wrong(likely):
    found = compare(expected("a", "b", likely=likely), engines("a", "x"))
    assert len(found.wrong) == 1 and found.gaps[0] > 2 * TOLERANCE


def test_a_log_probability_beyond_rounding_is_wrong():
    assert len(compare(expected("a", "b"), engines("a", "b", off=0.02)).wrong) == 1


def test_ending_is_a_token_too():
    found = compare(expected("a", "b", "c"), engines("a", "b", ended=True))
    assert found.gaps == (math.inf,) and found.wrong
    found = compare(expected("a", ended=True, likely={"b": -1.0}), engines("a", "b"))
    assert found.gaps == (0.0,) and not found.wrong


def test_engines_list_the_end_or_not_and_some_no_tokens_at_all():
    ours = Answer(("a", " b"), True, None)
    entries = [{"token": t, "logprob": -1.0} for t in ("a", " b", "<end>")]
    for listed in (entries, entries[:2]):
        choice = {"finish_reason": "stop", "logprobs": {"content": listed}}
        assert answer_of(choice, ours, "<end>").tokens == ("a", " b")
    for text, tokens in (("a b", ("a", " b")), ("a c", ("a", " c")), ("a", ("a",))):
        choice = {"finish_reason": "stop", "message": {"content": text}}
        assert answer_of(choice, ours, "<end>") == Answer(tokens, True, None)


def committed() -> dict:
    return json.loads(every_engine.RESULTS.read_text(encoding="utf-8"))


def test_nothing_of_the_committed_run_is_wrong():
    rows = {
        (name, row["form"]): row["wrong"]
        for name, engine in committed()["engines"].items() for row in engine["rows"]
    }
    known = {(case.engine, case.label) for case in every_engine.CASES}
    known |= {(name, every_engine.BASE_ITSELF) for name, _ in known}
    assert rows.keys() <= known and not any(rows.values())


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import what_serves_it

    return what_serves_it


def between(page: str, name: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0]


def test_the_tables_are_the_committed_run(tables):
    assert between("docs/serving.md", "what serves it") == tables.served()


def test_the_commands_are_those_of_the_cards(tables):
    assert between("docs/serving.md", "commands") == tables.commands()
