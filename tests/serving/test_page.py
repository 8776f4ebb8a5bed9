"""The page at ``/`` in headless Chromium, before a server without a model."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest
from browser import ENTER, ESCAPE, HOME, LEFT, RIGHT, SHIFT, Browser
from stub_server import stub_server

from qadapter.data import load_preferences
from qadapter.serving.page import page

CHAT, REWARDS = "/v1/chat/completions", "/v1/qadapter/rewards"
PREFERENCES = "/v1/qadapter/preferences"
BASE, CUSTOM = ".turn:last-child .side:first-child", ".turn:last-child .side:last-child"


def test_its_policy_lets_nothing_in():
    text, headers = page()
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert re.findall(r"(?:https?:)?//[\w.]+", text) == ["http://www.w3.org"]  # SVG's name
    assert text.count("<script") == text.count("<style") == 1
    assert not re.search(r"\son\w+=|\sstyle=|innerHTML|outerHTML|insertAdjacent|eval\(", text)


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.quit()


@pytest.fixture
def stub():
    with stub_server() as server:
        yield server


@pytest.fixture
def browser(window, stub):
    """The page, ready; afterwards: no error in it, and nothing fetched from anywhere else."""
    window.resize(1280, 820)
    window.open(stub.url + "/")
    yield window
    told = [line for line in window.logs("browser") if "Failed to load resource" not in line]
    assert told == []
    fetched = {urlsplit(url)[:2] for url in window.fetched()}
    assert fetched <= {urlsplit(stub.url)[:2], ("data", ""), ("blob", "")}


def ask(browser, question):
    browser.wait(lambda: browser.sees("#strength:enabled"), "the models")
    browser.type("#prompt", question + ENTER)


def both(browser, first, second):
    browser.wait(lambda: browser.text(f"{BASE} .answer") == first, first)
    browser.wait(lambda: browser.text(f"{CUSTOM} .answer") == second, second)
    browser.wait(lambda: browser.sees(f"{BASE}[aria-busy=false]"))
    browser.wait(lambda: browser.sees(f"{CUSTOM}[aria-busy=false]"))


def colored(browser):
    browser.wait(lambda: browser.sees(f"{BASE} .answer[tabindex]"), "the base's rewards")
    browser.wait(lambda: browser.sees(f"{CUSTOM} .answer[tabindex]"), "the rewards")


def turn_dial(browser, *values):
    """As one movement: all of it before the page does anything else."""
    browser.run("""const dial = document.getElementById("strength");
        for (const value of arguments[0]) { dial.value = value; dial.oninput(); }""", list(values))


def test_two_answers_side_by_side_as_they_stream(browser, stub):
    stub.go.clear()
    ask(browser, "Hello?")
    browser.wait(lambda: browser.text(f"{BASE} .answer") == "The ")
    browser.wait(lambda: browser.text(f"{CUSTOM} .answer") == "poli")
    assert browser.sees(f"{BASE}[aria-busy=true]") and not browser.sees(f"{BASE} .better")
    assert not browser.sees("#send")
    left, right = (
        browser.run("return document.querySelector(arguments[0]).getBoundingClientRect()", side)
        for side in (BASE, CUSTOM)
    )
    assert left["top"] == right["top"] and left["right"] < right["left"]
    stub.go.set()
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    browser.wait(lambda: browser.sees("#send") and not browser.sees("#stop"))
    question = [{"role": "user", "content": "Hello?"}]
    for body in stub.bodies(CHAT):
        assert body.pop("strength", None) == (1 if body["model"] == "polite" else None)
        assert body == {"model": body["model"], "messages": question, "stream": True,
                        "max_tokens": 512, "temperature": 0}
    assert {body["model"] for body in stub.bodies(CHAT)} == {"base", "polite"}
    headers = stub.asked[0][2]
    assert headers["Origin"] == stub.url and headers["Content-Type"] == "application/json"


def test_the_dial_changes_the_customised_answer(browser, stub):
    ask(browser, "Hello?")
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    turn_dial(browser, 1.3, 1.6, 2)
    both(browser, "The base says: Hello?", "polite at 2.00 says: Hello? ✓é")
    assert browser.text("#dial output") == "2.00"
    assert [body["strength"] for body in stub.bodies(CHAT, model="polite")] == [1, 2]  # at rest
    browser.type("#strength", HOME)  # by keyboard
    both(browser, "The base says: Hello?", "polite at 0.00 says: Hello? ✓é")
    browser.type("#strength", RIGHT)
    both(browser, "The base says: Hello?", "polite at 0.05 says: Hello? ✓é")
    assert len(stub.bodies(CHAT, model="base")) == 1


def test_the_dial_moves_while_answers_stream(browser, stub):
    """The answer that was on its way is left, and nothing of it comes in any more."""
    stub.go.clear()
    ask(browser, "Hello?")
    browser.wait(lambda: browser.text(f"{CUSTOM} .answer") == "poli")
    turn_dial(browser, 0.5)
    browser.wait(lambda: stub.bodies(CHAT, strength=0.5))
    assert stub.left.wait(60)
    browser.wait(lambda: browser.text(f"{CUSTOM} .answer") == "poli")
    assert browser.sees(f"{CUSTOM}[aria-busy=true]") and browser.sees("#stop")
    stub.go.set()
    both(browser, "The base says: Hello?", "polite at 0.50 says: Hello? ✓é")


def test_text_is_never_markup(browser, stub):
    """The user's, the models', the server's."""
    evil = "<img src=/x onerror=alert(1)><script>alert(2)</script>&lt;b> </article>"
    stub.answer = lambda model, prompt, strength: f"{evil} {model}"
    stub.adapters = {evil: 1.0, "polite": 1.0}
    browser.open(stub.url + "/")
    ask(browser, evil)
    both(browser, f"{evil} base", f"{evil} {evil}")
    colored(browser)
    assert browser.text(".question") == evil
    assert browser.text(f"{CUSTOM} .name") == evil
    stub.failing = {PREFERENCES: (400, evil)}
    browser.click(f"{CUSTOM} .better")
    browser.wait(lambda: browser.text(".note") == f"Not saved: {evil}")
    stub.failing = {CHAT: (400, evil)}
    turn_dial(browser, 1.5)
    browser.wait(lambda: browser.text(f"{CUSTOM} .failed") == evil)
    assert browser.run("return document.querySelectorAll('img, b, main script').length") == 0


def test_the_browser_would_not_take_markup(browser):
    refused = browser.run("""const tried = [];
        for (const make of [() => { document.body.innerHTML = "<b>x</b>"; },
                            () => { document.body.setAttribute("onclick", "alert(1)"); },
                            () => { document.createElement("script").textContent = "1"; }])
          try { make(); } catch (error) { tried.push(error.name); }
        return tried;""")
    assert refused == ["TypeError"] * 3
    browser.logs("browser")  # where it told of them


def test_tokens_by_their_rewards(browser, stub):
    stub.answer = lambda model, prompt, strength: f"The {model} says:\n\n{prompt}"
    ask(browser, "Hello?")
    colored(browser)
    tokens = browser.run("""return [...document.querySelectorAll(arguments[0] + " .answer span")]
        .map((token) => [token.textContent, token.dataset.reward, token.className,
                         getComputedStyle(token).backgroundColor])""", BASE)
    assert [token[:3] for token in tokens] == [
        ["The", "−0.300", "less"], [" base", "+0.500", "more"], [" says:", "−0.600", "less"],
        ["\n\n", "+0.200", "breaks more"], ["Hello?", "−0.600", "less"], ["", "+0.000", "more"],
    ]
    shades = [token[3] for token in tokens]
    assert shades[2] == shades[4] and len(set(shades)) == 5  # as large as they are
    assert browser.text(f"{BASE} .reward") == "reward −0.800, 6 tokens"
    assert stub.bodies(REWARDS, answer="The base says:\n\nHello?") == [{
        "model": "polite", "messages": [{"role": "user", "content": "Hello?"}],
        "answer": "The base says:\n\nHello?",
    }]
    assert not browser.sees("#tip")
    browser.point_at(f"{BASE} .answer span:nth-child(2)")
    browser.wait(lambda: browser.sees("#tip") and browser.text("#tip") == "+0.500")
    browser.point_at("h1")
    browser.wait(lambda: not browser.sees("#tip"))
    browser.type(f"{BASE} .answer", RIGHT + RIGHT + RIGHT + LEFT)  # by keyboard
    assert browser.text("#tip") == "+0.500" and browser.text("#told") == "base: +0.500"
    assert browser.sees("#tip")
    browser.run("document.querySelector(arguments[0]).onclick()", f"{BASE} .edit")
    assert not browser.sees("#tip")  # nor what it belongs to
    browser.click(".cancel")
    browser.run("document.getElementById('colors').click()")
    browser.wait(lambda: not browser.sees(f"{BASE} .answer span"))
    assert browser.text(f"{BASE} .answer") == "The base says:\n\nHello?"


def test_what_the_models_did_not_say_has_no_reward(browser, stub):
    stub.reward = lambda token, number: None if number == 1 else 0.25
    ask(browser, "Hello?")
    colored(browser)
    assert browser.text(f"{BASE} .other") == " base"
    assert browser.text(f"{BASE} .reward") == "reward +1.000, 5 tokens"


def test_the_better_answer_is_saved_and_goes_on(browser, stub):
    ask(browser, "Hello?")
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    browser.click(f"{BASE} .better")
    browser.wait(lambda: browser.text(".note") == "Saved to the server's file of preferences.")
    question = {"role": "user", "content": "Hello?"}
    assert stub.saved == [{"prompt": [question], "chosen": "The base says: Hello?",
                           "rejected": "polite at 1.00 says: Hello? ✓é"}]
    assert browser.text("#saved") == "1 saved"
    assert browser.sees(f"{BASE}.kept") and not browser.sees(f"{BASE} .better:enabled")
    ask(browser, "And now?")
    both(browser, "The base says: And now?", "polite at 1.00 says: And now? ✓é")
    ask(browser, "And then?")  # nothing chosen: the customised answer goes on
    both(browser, "The base says: And then?", "polite at 1.00 says: And then? ✓é")
    assert stub.bodies(CHAT, model="base")[-1]["messages"] == [
        question, {"role": "assistant", "content": "The base says: Hello?"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "polite at 1.00 says: And now? ✓é"},
        {"role": "user", "content": "And then?"},
    ]
    turn_dial(browser, 2)  # the newest turn's alone
    browser.wait(lambda: browser.text(f"{CUSTOM} .answer").startswith("polite at 2.00"))
    assert len(stub.bodies(CHAT, strength=2)) == 1


def test_an_edited_answer_is_better_than_before(browser, stub):
    ask(browser, "Hello?")
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    browser.click(f"{CUSTOM} .edit")
    assert not browser.sees("#strength:enabled") and not browser.sees(".save:enabled")
    browser.type(".side textarea", f" Yes.{SHIFT}{ENTER}{SHIFT}No.")
    stub.failing = {PREFERENCES: (507, "no room on the disk")}
    browser.click(".save")
    browser.wait(lambda: browser.text(".note") == "Not saved: no room on the disk")
    stub.failing = {}
    browser.wait(lambda: browser.sees(".save:enabled"))  # nothing lost
    browser.click(".save")
    mended = "polite at 1.00 says: Hello? ✓é Yes.\nNo."
    browser.wait(lambda: browser.text(f"{CUSTOM} .answer") == mended)
    assert stub.saved == [{"prompt": [{"role": "user", "content": "Hello?"}], "chosen": mended,
                           "rejected": "polite at 1.00 says: Hello? ✓é"}]
    colored(browser)
    assert stub.bodies(REWARDS, answer=mended)  # the new text's
    assert browser.text(f"{CUSTOM} .state") == "edited" and browser.sees(f"{CUSTOM}.kept")


def test_an_edit_can_be_left(browser, stub):
    ask(browser, "Hello?")
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    browser.click(f"{BASE} .edit")
    browser.type(".side textarea", "x" + ESCAPE)
    browser.wait(lambda: not browser.sees(".side textarea"))
    assert browser.text(f"{BASE} .answer") == "The base says: Hello?"
    assert browser.sees("#strength:enabled") and browser.sees(f"{BASE} .better:enabled")


def test_preferences_are_downloaded_where_the_server_keeps_none(browser, stub, tmp_path):
    stub.keeps = False
    browser.open(stub.url + "/")
    browser.click("[popovertarget=settings]")
    browser.type("#system", "Be brief.")
    browser.run("document.getElementById('settings').hidePopover()")
    ask(browser, "Hello?")
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    browser.click(f"{CUSTOM} .better")
    browser.wait(lambda: browser.text("#download") == "Download 1 preference")
    browser.open(stub.url + "/")  # a reload loses none
    ask(browser, "And\u2028now?")
    browser.wait(lambda: browser.sees(f"{CUSTOM} .better:enabled"))
    browser.click(f"{CUSTOM} .better")
    browser.wait(lambda: browser.text("#download") == "Download 2 preferences")
    browser.click("#download")
    path = browser.folder / "preferences.jsonl"
    browser.wait(path.exists, "the file")
    path = path.rename(tmp_path / "mine.jsonl")
    rows = list(load_preferences(str(path)))
    assert rows[0]["prompt"] == [{"role": "system", "content": "Be brief."},
                                 {"role": "user", "content": "Hello?"}]
    assert rows[0]["chosen"] == [
        {"role": "assistant", "content": "polite at 1.00 says: Hello? ✓é"}]
    assert rows[1]["rejected"] == [
        {"role": "assistant", "content": "The base says: And\u2028now?"}]
    assert stub.saved == []


@pytest.mark.parametrize("why", ["same", "cut", "empty"])
def test_no_pair_of_answers_that_are_none(browser, stub, why):
    if why == "same":
        stub.answer = lambda model, prompt, strength: "Yes."
    elif why == "empty":
        stub.answer = lambda model, prompt, strength: "" if model == "base" else "Yes."
    else:
        stub.finish = "length"
    ask(browser, "Hello?")
    browser.wait(lambda: browser.sees(f"{CUSTOM} .better") and browser.sees(f"{BASE} .better"))
    assert not browser.sees(".better:enabled") and browser.sees(f"{BASE} .edit:enabled")
    told = browser.run("return document.querySelector('.better').title")
    assert {"same": "the same", "cut": "cut off", "empty": "no text"}[why] in told
    if why == "cut":
        assert browser.text(f"{BASE} .state") == "cut off at 512 tokens"


def test_a_busy_server_is_asked_again(browser, stub):
    stub.busy = 2
    ask(browser, "Hello?")
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    assert len(stub.bodies(CHAT)) == 4
    assert not browser.sees(".failed")


def test_asking_again(browser, stub):
    """For other answers, where they are drawn."""
    browser.click("[popovertarget=settings]")
    browser.run("""for (const name of ["temperature", "longest"])
        document.getElementById(name).value = "";""")
    browser.type("#temperature", "0.7")
    browser.keys(ESCAPE)
    ask(browser, "Hello?")
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    browser.click(f"{CUSTOM} .better")
    browser.wait(lambda: browser.text(".note"))
    stub.answer = lambda model, prompt, strength: f"{model} again"
    browser.click(".both")
    both(browser, "base again", "polite again")
    assert not browser.text(".note") and not browser.sees(".kept")
    bodies = stub.bodies(CHAT)
    assert len(bodies) == 4 and all(body["temperature"] == 0.7 for body in bodies)
    assert not any("max_tokens" in body for body in bodies)  # as long as fits
    browser.click(f"{BASE} .better")
    browser.wait(lambda: browser.text("#saved") == "2 saved")
    assert [pair["chosen"] for pair in stub.saved] == ["polite at 1.00 says: Hello? ✓é",
                                                       "base again"]


def test_nothing_is_saved_of_an_answer_that_is_about_to_go(browser, stub):
    ask(browser, "Hello?")
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    colored(browser)
    stub.go.clear()
    able = browser.run("""const dial = document.getElementById("strength");
        dial.value = 2; dial.oninput();
        return document.querySelectorAll(".better:enabled, .edit:enabled").length;""")
    assert able == 0
    browser.wait(lambda: browser.text(f"{CUSTOM} .answer") == "poli")
    assert not browser.sees(f"{CUSTOM} .better") and not browser.sees(".better:enabled")
    assert not browser.sees(f"{CUSTOM} .answer[tabindex]")
    stub.go.set()
    both(browser, "The base says: Hello?", "polite at 2.00 says: Hello? ✓é")
    browser.wait(lambda: browser.sees(f"{BASE} .better:enabled"))


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop(browser, stub, by):
    stub.go.clear()
    ask(browser, "Hello?")
    browser.wait(lambda: browser.text(f"{BASE} .answer") and browser.text(f"{CUSTOM} .answer"))
    browser.click("#stop") if by == "button" else browser.keys(ESCAPE)
    assert stub.left.wait(60)  # the server is told
    browser.wait(lambda: browser.text(f"{BASE} .state") == "stopped")
    browser.wait(lambda: browser.text(f"{CUSTOM} .state") == "stopped")
    assert browser.text(f"{BASE} .answer") == "The "
    stub.go.set()
    ask(browser, "And now?")
    both(browser, "The base says: And now?", "polite at 1.00 says: And now? ✓é")


def test_starting_over_leaves_what_streams(browser, stub):
    stub.go.clear()
    ask(browser, "Hello?")
    browser.wait(lambda: browser.text(f"{BASE} .answer"))
    browser.click("#anew")
    assert stub.left.wait(60)
    assert browser.sees("#start") and not browser.sees(".turn")
    stub.go.set()
    browser.click("#examples button")
    browser.wait(lambda: browser.sees(f"{CUSTOM} .better:enabled"))
    assert len(stub.bodies(CHAT, model="base")[-1]["messages"]) == 1


def test_an_api_key_is_asked_for(browser, stub):
    stub.key = "open-sesame"
    browser.open(stub.url + "/")
    browser.wait(lambda: browser.sees("#locked"))
    assert browser.text("#key-said") == ""
    browser.type("#key", "wrong" + ENTER)
    browser.wait(lambda: browser.text("#key-said") == "this server wants another API key")
    browser.type("#key", "open-sesame" + ENTER)
    browser.wait(lambda: not browser.sees("#locked"))
    ask(browser, "Hello?")
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    stub.key = "another"  # in the middle of a conversation
    ask(browser, "And now?")
    browser.wait(lambda: browser.sees("#locked"))
    browser.wait(lambda: browser.text(f"{BASE} .failed") and browser.text(f"{CUSTOM} .failed"))
    browser.type("#key", "another" + ENTER)
    both(browser, "The base says: And now?", "polite at 1.00 says: And now? ✓é")
    browser.run("sessionStorage.clear()")


@pytest.mark.parametrize("breaks, told", [
    ("error", "the model ran out of room"), ("off", "The answer broke off."),
    ("garbage", "The server's answer can't be read."),
])
def test_an_answer_that_breaks_off(browser, stub, breaks, told):
    stub.breaks = breaks
    ask(browser, "Hello?")
    browser.wait(lambda: browser.text(f"{BASE} .failed") == told)
    browser.wait(lambda: browser.text(f"{CUSTOM} .failed") == told)
    assert browser.text(f"{BASE} .answer") == "The "  # what came is shown
    assert not browser.sees(".better") and not browser.sees(".edit")
    stub.breaks = ""
    browser.click(f"{BASE} .again")
    browser.click(f"{CUSTOM} .again")
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    assert not browser.sees(".failed")


def test_refusals_are_told_in_the_servers_words(browser, stub):
    stub.failing = {CHAT: (429, "32 answers are being written; try again in a moment"),
                    REWARDS: (500, "no rewards today")}
    ask(browser, "Hello?")
    browser.wait(lambda: browser.text(f"{BASE} .failed").startswith("32 answers"))
    browser.wait(lambda: browser.text(f"{CUSTOM} .failed").startswith("32 answers"))
    del stub.failing[CHAT]
    ask(browser, "And now?")  # what had no answer is no part of the conversation
    both(browser, "The base says: And now?", "polite at 1.00 says: And now? ✓é")
    assert len(stub.bodies(CHAT)[-1]["messages"]) == 1
    browser.wait(lambda: browser.text(f"{BASE} .reward") == "no rewards: no rewards today")


@pytest.mark.parametrize("said, told", [
    ("the model is being loaded", "the model is being loaded"), (None, "The server answered 503."),
])
def test_a_server_that_is_not_there_yet(browser, stub, said, told):
    stub.failing = {"/v1/models": (503, said)}
    browser.open(stub.url + "/")
    browser.wait(lambda: browser.text("#trouble span") == told)
    assert not browser.sees("#send:enabled") and not browser.sees("#strength:enabled")
    stub.failing = {}
    browser.click("#trouble button")
    browser.wait(lambda: browser.sees("#strength:enabled") and not browser.sees("#trouble"))


def test_a_server_that_is_gone(browser, stub):
    browser.wait(lambda: browser.sees("#strength:enabled"))
    stub.shutdown()
    stub.server_close()
    ask(browser, "Hello?")
    gone = "The server can't be reached. Is it still running?"
    browser.wait(lambda: browser.text(f"{BASE} .failed") == gone)


def test_adapters_by_name(browser, stub):
    assert not browser.sees("#adapter")
    stub.adapters = {"polite": 1.0, "brief": 0.5}
    browser.open(stub.url + "/")
    ask(browser, "Hello?")
    both(browser, "The base says: Hello?", "polite at 1.00 says: Hello? ✓é")
    colored(browser)
    browser.type("#adapter", "brief")
    both(browser, "The base says: Hello?", "brief at 0.50 says: Hello? ✓é")
    browser.wait(lambda: len(stub.bodies(REWARDS, model="brief")) == 2)  # of the base's words too
    assert len(stub.bodies(CHAT, model="base")) == 1


@pytest.mark.parametrize("width, height", [(320, 640), (390, 640), (667, 320)])
def test_small_screens(browser, stub, width, height):
    browser.resize(width, height)
    stub.adapters = {"a-name-without-any-space-" * 4: 1.0, "other": 1.0}
    stub.answer = lambda model, prompt, strength: "long" * 200
    browser.open(stub.url + "/")
    ask(browser, "https://example.com/" + "a" * 300)
    colored(browser)
    browser.click(f"{CUSTOM} .edit")
    wide = browser.run("""return [...document.querySelectorAll("body *")].filter((element) =>
        element.checkVisibility() && !element.closest(".unseen")
        && element.getBoundingClientRect().right > innerWidth).map((e) => e.outerHTML)""")
    assert wide == [] and browser.run("return document.documentElement.scrollWidth") <= width
    first, second = (
        browser.run("return document.querySelector(arguments[0]).getBoundingClientRect()", side)
        for side in (BASE, CUSTOM)
    )
    assert first["bottom"] < second["top"]  # one below the other
    edge = browser.run("return document.querySelector('#ask textarea').getBoundingClientRect().x")
    assert edge == first["left"] == second["left"]


CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const luminance = (colors) => {  // of the colors on each other, the last one on top
  for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((byte) => byte / 255)
    .map((value) => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
return [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
    && !element.closest(".unseen, :disabled") && [...element.childNodes].some(
      (node) => node.nodeType === Node.TEXT_NODE && node.data.trim())).map((element) => {
  const under = [];
  for (let e = element; e; e = e.parentElement) under.unshift(getComputedStyle(e).backgroundColor);
  const [back, text] = [luminance(under), luminance([...under, getComputedStyle(element).color])];
  return [(Math.max(back, text) + .05) / (Math.min(back, text) + .05),
          element.matches(".answer span"), element.outerHTML];
});
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_in_both_themes(browser, stub, theme):
    """WCAG's: 4.5:1 for all text, 7:1 for what stands on a reward's color."""
    browser.command("Emulation.setEmulatedMedia",
                    features=[{"name": "prefers-color-scheme", "value": theme}])
    ask(browser, "Hello?")
    colored(browser)
    browser.click(f"{CUSTOM} .better")
    browser.wait(lambda: browser.text(".note"))
    browser.click("[popovertarget=settings]")
    found = browser.run(CONTRAST)
    assert len(found) > 25
    assert [(ratio, html) for ratio, token, html in found if ratio < (7 if token else 4.5)] == []
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (theme == "light")
    browser.command("Emulation.setEmulatedMedia", features=[])


@pytest.mark.slow
def test_whoever_can_not_see_it_is_told(browser, stub):
    """Every control has a name, and an answer says whose it is."""
    stub.adapters = {"polite": 1.0, "brief": 0.5}
    browser.open(stub.url + "/")
    ask(browser, "Hello?")
    colored(browser)
    browser.click("[popovertarget=settings]")
    tree = browser.command("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree if not node["ignored"]
    }
    controls = {"button", "textbox", "slider", "combobox", "checkbox", "spinbutton"}
    assert {name for role, name in named if role in controls} >= {
        "Prompt", "Strength", "Customised model", "System message", "This is better", "Ask again",
    }
    assert not any(name == "" for role, name in named if role in controls)
    assert {("article", "Base"), ("article", "Customised"), ("group", "Base: answer")} <= named
