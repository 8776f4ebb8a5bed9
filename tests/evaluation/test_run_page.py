"""``report.html``: what is on it, in words and in headless Chromium."""

from __future__ import annotations

import math
import re

import pytest
from data.tiny import chatml
from serving.browser import HOME, LEFT, RIGHT, Browser
from tiny_models import tiny_adapter, tokenized

from qadapter.evaluation import charts, generate_answers
from qadapter.evaluation.along_dial import STRENGTHS, AlongDial, answer_along_dial
from qadapter.evaluation.preference import evaluate_preferences
from qadapter.evaluation.report import preference_rows
from qadapter.evaluation.run_page import run_page, write_run_page
from qadapter.evaluation.token_rewards import RewardedAnswer, reward_answers

EVIL = '</div><script>document.title="taken"</script><img src=//evil/x onerror=1> & \'" \u202egnorw'
LOG = [
    {"step": 10, "loss": 0.69, "rewards/accuracies": 0.5},
    {"step": 10, "eval_loss": 0.7, "eval_rewards/accuracies": 0.5, "note": EVIL},
    {"step": 20, "loss": 0.5, "rewards/accuracies": 0.75, "kl_base_policy": math.nan},
    {"step": 30, "loss": 0.4, "rewards/accuracies": "high", "retention_kl": 0.01},
]


def rewarded(text: str, reward: float = 0.5) -> RewardedAnswer:
    pieces = re.findall(r"\s*\S+", text)
    return RewardedAnswer(
        list(range(len(pieces))), pieces, [reward * (-1) ** k for k in range(len(pieces))],
        [True] * len(pieces),
    )


def asked(prompt: str = "Is it hot?", text: str = "said at") -> AlongDial:
    return AlongDial(
        prompt, {s: rewarded(f"{text} {s:g} .", s + 0.1) for s in STRENGTHS},
        {s: s != 2 for s in STRENGTHS},
        {"chosen": rewarded(f"{text} best"), "rejected": rewarded(f"{text} worst")},
    )


@pytest.fixture(scope="module")
def measured():
    """A tiny model's numbers, and its answers."""
    model, tokenizer, rows = tiny_adapter(trained=True), chatml(), tokenized(16)
    chosen = [rows[0], rows[4], rows[8]]
    prompts = [tokenizer.decode(row["prompt_ids"]) for row in chosen]
    along = answer_along_dial(model, tokenizer, chosen, prompts, max_new_tokens=6)
    return model, chosen, along, evaluate_preferences(model, rows, num_resamples=20)


def test_answers_are_those_of_the_dial_and_rewards_of_the_objective(measured):
    model, rows, along, _ = measured
    ids = [row["prompt_ids"] for row in rows]
    for s in STRENGTHS:
        alone = generate_answers(model, chatml(), ids, strength=s, max_new_tokens=6)
        assert [one.answers[s].token_ids for one in along] == [a.token_ids for a in alone]
        assert [one.ended[s] for one in along] == [a.ended for a in alone]
        for row, one in zip(rows, along, strict=True):
            [found] = reward_answers(
                model, chatml(), row["prompt_ids"], [one.answers[s].token_ids]
            )
            assert one.answers[s].rewards == pytest.approx(found.rewards, abs=1e-5)
    assert along[0].answers[0.0].token_ids != along[0].answers[2.0].token_ids
    assert along[1].pair["chosen"].token_ids == rows[1]["chosen_ids"]


def test_what_is_known_is_not_generated_again(measured, monkeypatch):
    model, rows, along, _ = measured
    ids = [row["prompt_ids"] for row in rows]
    known = {s: generate_answers(model, chatml(), ids, strength=s, max_new_tokens=6)
             for s in (*STRENGTHS, 1.5)}
    monkeypatch.setattr("qadapter.evaluation.along_dial.generate_answers", None)
    again = answer_along_dial(model, chatml(), rows, ["", "", ""], known=known)
    assert [one.answers for one in again] == [one.answers for one in along]


def test_all_parts_are_there_and_what_is_missing_is_left_out(measured):
    *_, along, preferences = measured
    page = run_page("A <run>", {"base": EVIL}, LOG, preferences=preferences,
                    rows=preference_rows(preferences), note="a coin 0.500", along=along)
    for part in ("A &lt;run&gt;", "held-out pairs ranked right", "accuracy by reward",
                 "a coin 0.500", "Calibration", "Loss", "customised, strength 0.5"):
        assert part in page, part
    bare = run_page("nothing", {}, [])
    assert "<script" not in bare and "Training" not in bare and "nothing" in bare


def test_its_size_is_bounded():
    long = AlongDial("why " * 100_000, {s: rewarded("word " * 20_000) for s in STRENGTHS},
                     dict.fromkeys(STRENGTHS, True), {"chosen": rewarded("word " * 20_000)})
    log = [{"step": i, "loss": 1 / (i + 1), "eval_loss": 1.0} for i in range(100_000)]
    page = run_page("long", {}, log, along=[long] * 6)
    assert len(page) < 2_000_000
    assert "19,400 tokens more" in page and "characters …" in page


def test_charts_say_their_numbers():
    [loss, accuracy, kl] = charts.training_charts(LOG)
    assert "training from 0.69 at 10 to 0.4 at 30; held out from 0.7 at 10" in loss
    assert "<td class=\"number\">20</td><td class=\"number\">0.5</td>" in loss
    assert "share of pairs" in accuracy and "level" in accuracy
    assert kl.count("<circle") == 1 and "retention texts, training" in kl  # its only point
    assert charts.training_charts([{"step": 1, "loss": math.inf}, {"loss": 1.0}]) == []


@pytest.mark.parametrize(("low", "high", "ticks"), [
    (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.694, 0.512, None), (3, 3, None),
    (0, 0, [-1.0, -0.5, 0.0, 0.5, 1.0]), (-2e-9, 3e-9, None), (1e90, 5e90, None), (7, 68, None),
])
def test_ticks_are_round_and_within(low, high, ticks):
    low, high = sorted((low, high))
    found = charts._ticks(low, high)
    assert 2 <= len(found) <= 7 and found == sorted(set(found))
    assert ticks is None or found == ticks
    if low < high:
        assert all(low - 1e-9 * abs(low) <= t <= high * (1 + 1e-9) for t in found)


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.quit()


@pytest.fixture
def browser(window, tmp_path):
    """A page, hostile in all its texts; afterwards: no error in it, and nothing fetched."""
    path = tmp_path / "report.html"
    write_run_page(path, EVIL, {EVIL: EVIL}, LOG, note=EVIL,
                   along=[asked(), asked(EVIL, EVIL)])
    window.command("Emulation.setEmulatedMedia", features=[
        {"name": "prefers-color-scheme", "value": "light"}])
    window.resize(1280, 820)
    window.open(path.as_uri())
    yield window
    assert window.logs("browser") == []
    assert window.fetched() <= {path.as_uri()}


def seen(browser) -> list[str]:
    """The customised answers that are seen, by their headings."""
    return browser.run("""return [...document.querySelectorAll("[data-strength]")]
        .filter((side) => side.checkVisibility())
        .map((side) => side.querySelector("h3").textContent)""")


def test_the_slider_moves_through_the_strengths(browser):
    assert browser.sees("#strength") and seen(browser) == ["customised, strength 1"] * 2
    browser.type("#strength", RIGHT)
    assert seen(browser) == ["customised, strength 2"] * 2
    assert browser.text("#told") == "2"
    browser.type("#strength", HOME)
    assert seen(browser) == ["customised, strength 0"] * 2
    browser.type("#strength", RIGHT + RIGHT + LEFT)
    assert seen(browser) == ["customised, strength 0.5"] * 2
    said = "return document.getElementById('strength').getAttribute('aria-valuetext')"
    assert browser.run(said) == "strength 0.5"
    shown = browser.run("return document.querySelector('main').innerText")
    assert "said at 0.5 ." in shown and "said at 2 ." not in shown


def test_texts_are_texts(browser):
    written = EVIL.replace("\u202e", "\\u202e")
    assert browser.text("h1") == written and browser.run("return document.title") == written
    assert browser.text(".asked:last-of-type .prompt") == written
    assert browser.text(".facts dt") == browser.text(".facts dd") == written
    assert browser.run("return document.querySelectorAll('img, main script').length") == 0
    refused = browser.run("""try { document.body.innerHTML = "<b>x</b>"; return "";
        } catch (error) { return error.name; }""")
    assert refused == "TypeError"
    browser.logs("browser")  # where it told of that


def test_light_and_dark_wide_and_narrow(browser):
    def ground() -> str:
        return browser.run("return getComputedStyle(document.body).backgroundColor")

    sides = """return [...document.querySelectorAll(".asked:first-of-type .sides > *")].slice(0, 2)
        .map((side) => side.getBoundingClientRect().top)"""
    top, beside = browser.run(sides)
    assert ground() == "rgb(255, 255, 255)" and top == beside
    browser.command("Emulation.setEmulatedMedia", features=[
        {"name": "prefers-color-scheme", "value": "dark"}])
    browser.resize(380, 800)
    assert ground() == "rgb(20, 22, 26)"
    top, below = browser.run(sides)
    assert below > top
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


def test_all_can_be_reached_by_keyboard_and_has_a_name(browser):
    named = browser.run("""const without = [];
        for (const part of document.querySelectorAll("[role], section, input"))
          if (!part.getAttribute("aria-label") && !part.labels?.length) without.push(part.id);
        return without;""")
    assert named == []
    assert browser.run("return document.querySelectorAll('.prompt[tabindex=\"0\"]').length") == 2
    browser.run("document.querySelector('summary').focus()")
    browser.keys("\ue007")
    assert browser.sees("details[open] table")
