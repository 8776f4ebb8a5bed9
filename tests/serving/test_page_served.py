"""The page before the server itself, with tiny models: what it shows is what they generate."""

from __future__ import annotations

import pytest
from browser import ENTER, Browser
from running import reference, running, save_adapters, service_of
from tiny_models import batches_continuously

from qadapter.data import as_preferences, load_preferences, tokenize_preferences
from qadapter.evaluation import generate_answers
from qadapter.evaluation.token_rewards import reward_pairs
from qadapter.serving.preferences import PreferenceFile
from qadapter.trunk.loading import load_tokenizer

pytestmark = batches_continuously
BASE, CUSTOM = ".side:first-child", ".side:last-child"
KEY = "a-key-of-some-length"


@pytest.mark.slow
def test_the_page_shows_what_the_models_say(tmp_path):
    folder = save_adapters(tmp_path)
    tokenizer, model = load_tokenizer(folder / "base"), reference(folder, "gated")
    question = [{"role": "user", "content": "What is blue?"}]

    def answer(strength):
        [found] = generate_answers(
            model, tokenizer, [question], max_new_tokens=20, strength=strength
        )
        return found.text

    service = service_of(folder, ("gated", "low"), key=KEY,
                         preferences=PreferenceFile(folder / "new.jsonl"))
    browser = Browser(tmp_path)
    try:
        with running(service) as server:
            browser.open(server.url + "/")
            browser.wait(lambda: browser.sees("#locked"))
            browser.type("#key", KEY + ENTER)
            browser.wait(lambda: browser.sees("#strength:enabled"))
            assert browser.run("return document.getElementById('longest').value") == "100"
            browser.run("document.getElementById('longest').value = 20")
            browser.type("#prompt", "What is blue?" + ENTER)
            for side, strength in ((BASE, 0), (CUSTOM, 1)):
                browser.wait(lambda side=side: browser.sees(f"{side} .answer[tabindex]"))
                assert browser.text(f"{side} .answer").strip() == answer(strength).strip()
            turn_dial = "const dial = document.getElementById('strength'); dial.value = {};"
            for strength in (2, 0):
                browser.run(turn_dial.format(strength) + "dial.oninput();")
                browser.wait(lambda x=strength: browser.text(f"{CUSTOM} .dial") == f"× {x:.2f}")
                browser.wait(lambda: browser.sees(f"{CUSTOM} .answer[tabindex]"))
                assert browser.text(f"{CUSTOM} .answer").strip() == answer(strength).strip()
            browser.click(f"{CUSTOM} .edit")
            browser.run("document.querySelector('.side textarea').value = '';")
            browser.type(".side textarea", "Yes, blue.")
            browser.click(".save")
            browser.wait(lambda: browser.text("#saved") == "1 saved")
            [pair] = load_preferences(str(folder / "new.jsonl"))
            assert pair["prompt"] == question
            assert pair["chosen"] == [{"role": "assistant", "content": "Yes, blue."}]
            assert pair["rejected"][0]["content"].strip() == answer(0).strip()
            browser.wait(lambda: browser.sees(f"{CUSTOM} .answer[tabindex]"))
            total = browser.text(f"{CUSTOM} .reward").split()[1].rstrip(",")
        told = [line for line in browser.logs("browser") if "401" not in line]
    finally:
        browser.quit()
    rows = tokenize_preferences(as_preferences([pair]), tokenizer, max_length=None).dataset
    [found] = reward_pairs(model, rows, tokenizer)
    assert float(total.replace("−", "-")) == pytest.approx(found.answers["chosen"].total, abs=1e-3)
    assert told == []
