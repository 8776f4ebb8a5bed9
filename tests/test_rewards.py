"""Token rewards: the numbers, the page, the command, and answers reranked by them."""

from __future__ import annotations

import html
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from data.tiny import chatml
from tiny_models import (
    cli,
    preference_rows,
    save_tiny,
    tiny_adapter,
    tiny_llama,
    tokenized,
    write_jsonl,
)

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.evaluation.answers import encode_prompt
from qadapter.evaluation.rewards_page import rewards_page
from qadapter.evaluation.token_rewards import (
    RewardedAnswer,
    RewardedPair,
    best_of_n,
    reward_answers,
    reward_pairs,
    summarize,
    token_pieces,
)

ALPHAS = ObjectiveConfig(alpha_0=0.5, alpha_tilde=0.8, gamma=0.9)


@pytest.fixture(scope="module")
def model():
    return tiny_adapter(trained=True, objective=ALPHAS)


@torch.no_grad()
def by_definition(model, prompt, answer):
    """r_k = q(s_k, a_k) − γ·V(s_{k+1}), written out, in float64."""
    ids = torch.tensor([prompt + answer])
    h = model.base.model(ids).last_hidden_state[0, len(prompt) - 1 : -1].double()
    weight = model.head.weight.double()
    b = h @ weight.T
    a = b + h @ model.adapter.down.weight.double().T @ model.adapter.up.weight.double().T @ weight.T
    q = ALPHAS.alpha_tilde * a - ALPHAS.alpha_0 * b
    log_pi = b.log_softmax(-1)
    value = ALPHAS.alpha_tilde * torch.logsumexp(
        (q + ALPHAS.alpha_0 * log_pi) / ALPHAS.alpha_tilde, -1
    )
    value = torch.cat([value[1:], torch.zeros(1)])
    return q[range(len(answer)), answer] - ALPHAS.gamma * value


def test_rewards_of_pairs_are_the_definition_whatever_their_batch(model):
    data, tokenizer = tokenized(10), chatml()
    pairs = reward_pairs(model, data, tokenizer, batch_size=3)
    assert len(pairs) == 10
    for row, pair in zip(data, pairs, strict=True):
        for side in ("chosen", "rejected"):
            answer = pair.answers[side]
            expected = by_definition(model, row["prompt_ids"], row[f"{side}_ids"])
            torch.testing.assert_close(
                torch.tensor(answer.rewards).double(), expected, atol=2e-4, rtol=1e-4
            )
            assert answer.token_ids == row[f"{side}_ids"] and all(answer.scored)
            assert answer.total == pytest.approx(float(expected.sum()), abs=1e-3)
            assert "".join(answer.pieces) == tokenizer.decode(row[f"{side}_ids"])
    margins = [p.answers["chosen"].total - p.answers["rejected"].total for p in pairs]
    found = summarize(pairs)
    assert found["pairs"] == 10 and found["margin"] == pytest.approx(sum(margins) / 10)
    assert found["accuracy"] == sum(m > 0 for m in margins) / 10


def test_an_untrained_adapter_rewards_nothing():
    model = tiny_adapter(trained=False)
    [answer] = reward_answers(model, chatml(), "Is it hot?", [[40, 50, 60, 2]])
    assert max(map(abs, answer.rewards)) < 1e-4


def test_turns_of_others_are_not_scored(model):
    data = tokenized(2)
    mask = [False, *[True] * (len(data[0]["chosen_ids"]) - 1)]
    data = data.add_column("chosen_mask", [mask, [True] * len(data[1]["chosen_ids"])])
    data = data.add_column("rejected_mask", [[True] * len(x) for x in data["rejected_ids"]])
    answer = reward_pairs(model, data, chatml())[0].answers["chosen"]
    assert answer.scored == mask and answer.rewards[0] == 0 != answer.rewards[1]


def test_pieces_join_to_the_text_where_tokens_end_inside_characters():
    tokenizer = chatml()
    for text in ("Ångström 😀 is\n\n  blue — never.", "  two  spaces", "日本語", "a\tb"):
        ids = tokenizer(text)["input_ids"]
        pieces = token_pieces(tokenizer, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    cut = "Yes 😀 and \N{REPLACEMENT CHARACTER}"  # as text that ended inside a character
    ids = tokenizer(cut)["input_ids"]
    assert "".join(token_pieces(tokenizer, ids)) == cut
    assert "".join(token_pieces(tokenizer, [*ids, 2])[:-1]) == cut
    assert token_pieces(tokenizer, [2]) == ["<|im_end|>"]
    assert token_pieces(tokenizer, []) == []


# --- best of n ----------------------------------------------------------------------------------


def test_best_of_n_sorts_sampled_answers_by_their_rewards(model):
    tokenizer = chatml()
    options = {"max_new_tokens": 6, "temperature": 1.5, "seed": 3}
    found = best_of_n(model, tokenizer, "Is it hot?", 6, batch_size=4, **options)
    assert [c.reward for c in found] == sorted((c.reward for c in found), reverse=True)
    assert len({c.answer.text for c in found}) > 3
    prompt = encode_prompt(tokenizer, "Is it hot?")
    for candidate in found:
        expected = by_definition(model, prompt, candidate.answer.token_ids).sum()
        assert candidate.reward == pytest.approx(float(expected), abs=1e-3)
    again = best_of_n(model, tokenizer, "Is it hot?", 6, batch_size=4, **options)
    assert again == found
    base = best_of_n(model, tokenizer, "Is it hot?", 6, batch_size=4, strength=0.0, **options)
    assert {c.answer.text for c in base} != {c.answer.text for c in found}


def test_best_of_n_needs_an_adapter_and_answers(model):
    with pytest.raises(QAdapterError, match="at least one answer"):
        best_of_n(model, chatml(), "Is it hot?", 0)
    with pytest.raises(QAdapterError, match="has none"):
        best_of_n(tiny_llama(), chatml(), "Is it hot?", 2)


# --- the page -----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are closed in order; collects what a test asks for."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def answer(*tokens: tuple[str, float]) -> RewardedAnswer:
    return RewardedAnswer(
        list(range(len(tokens))), [t for t, _ in tokens], [r for _, r in tokens],
        [True] * len(tokens),
    )


EVIL = '</span><script>alert("x")</script><img src=//evil onerror=1> & \'"'


def test_page_is_one_file_that_fetches_and_runs_nothing():
    pair = RewardedPair(EVIL, {EVIL: answer((EVIL, 0.5), ("\n", -0.25))})
    text = rewards_page([pair], EVIL, {EVIL: EVIL})
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "link", "iframe", "a"})
    assert not re.search(r"url\(|@import|https?:", text)
    assert not [a for _, a in page.tags for name in a if name.startswith("on") or name == "src"]
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    # All of it is there, as text.
    assert "".join(page.text).count(EVIL) >= 4 and html.escape(EVIL) in text


def test_tokens_have_their_number_and_a_shade_on_one_scale():
    rewards = {" up": 1.0, " half": 0.5, " none": 0.001, " down": -1.0, " far": -7.0}
    pairs = [
        RewardedPair("p", {"chosen": answer(*rewards.items()), "rejected": answer((" x", 0.25))}),
        RewardedPair("p", {"chosen": answer(*[(" y", 1.0)] * 200)}),
    ]
    page = Page(rewards_page(pairs, "t", {}))
    spans = [a for tag, a in page.tags if tag == "span" and "title" in a]
    shades = {a["title"]: a.get("class", "") for a in spans}
    assert shades == {
        "+1.000": "more9", "+0.500": "more4", "+0.001": "", "−1.000": "less9",
        "−7.000": "less9", "+0.250": "more2",
    }
    scale = next(a["aria-label"] for _, a in page.tags if a.get("role") == "img")
    assert "−1.000" in scale and "+1.000" in scale
    words = " ".join(page.text)
    assert "R = −6.499 over 5 tokens" in words and "margin −6.749" in words
    assert "most and least rewarded tokens" in words
    assert "prefers-color-scheme: dark" in words


def test_text_on_every_shade_is_legible():
    """WCAG contrast above 7:1 on the strongest shades, light and dark."""
    style = rewards_page([], "t", {})
    light, dark = style.split("prefers-color-scheme: dark", 1)
    for part in (light, dark):
        ink = _hex(re.search(r"--text: (#\w+)", part)[1])
        card = _hex(re.search(r"--card: (#\w+)", part)[1])
        alpha = float(re.search(r"--most: ([\d.]+)", part)[1])
        for name in ("more", "less"):
            color = [int(c) for c in re.search(rf"--{name}: (\d+) (\d+) (\d+)", part).groups()]
            shade = [alpha * c + (1 - alpha) * k for c, k in zip(color, card, strict=True)]
            low, high = sorted((_luminance(ink), _luminance(shade)))
            assert (high + 0.05) / (low + 0.05) > 7


def _hex(text: str) -> list[int]:
    digits = text[1:] if len(text) == 7 else "".join(2 * c for c in text[1:])
    return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]


def _luminance(rgb) -> float:
    parts = [c / 255 for c in rgb]
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    save_tiny(folder / "model")
    model = QAdapterModel.from_base(folder / "model", AdapterConfig(rank=4), ALPHAS)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.adapter.up.weight, std=0.2)
    model.save_pretrained(folder / "adapter")
    write_jsonl(folder / "pairs.jsonl", preference_rows(8))
    return folder


def test_command_writes_a_page_of_pairs(place, tmp_path, capsys):
    page = tmp_path / "r.html"
    command = ("rewards", place / "adapter", "--dataset_name", place / "pairs.jsonl",
               "--max_pairs", 3, "--output_file", page)
    assert cli(*command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 pairs: the chosen answer has the higher R in" in shown
    parsed = Page(page.read_text())
    assert sum(tag == "section" for tag, _ in parsed.tags) == 3
    assert "What is blue 0?" in "".join(parsed.text)
    assert cli(*command) == 2
    assert "exists" in capsys.readouterr().err
    assert cli(*command, "--overwrite_output_file") == 0


@pytest.mark.parametrize("spelling", [
    "pairs.jsonl", "sub/../pairs.jsonl", "hard link", "symlink", "adapter", "config", "base",
])
def test_an_input_is_never_written_over(place, tmp_path, capsys, spelling):
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    shutil.copy(place / "pairs.jsonl", tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "run.yaml").write_text("max_pairs: 2\n")
    (tmp_path / "hard").hardlink_to(tmp_path / "pairs.jsonl")
    (tmp_path / "soft").symlink_to(tmp_path / "pairs.jsonl")
    page = {
        "hard link": "hard", "symlink": "soft", "adapter": "adapter/qadapter_config.json",
        "config": "run.yaml", "base": place / "model/config.json",
    }.get(spelling, spelling)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert cli("rewards", tmp_path / "adapter", "--dataset_name", tmp_path / "pairs.jsonl",
               "--config", tmp_path / "run.yaml", "--output_file", tmp_path / page,
               "--overwrite_output_file") == 2
    assert "is another file than this command writes" in " ".join(capsys.readouterr().err.split())
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_page_that_can_not_be_written_is_named_before_any_work(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for page in (tmp_path / "file/r.html", tmp_path / ("x" * 300), "/proc/r.html"):
        for command in ("rewards", "generate"):
            asked = tmp_path / "asked.txt"
            asked.write_text("Hot?\n")
            flags = ("--prompts_file", asked) if command == "generate" else (
                "--prompt", "a", "--answer", "b"
            )
            assert cli(command, "--model_name_or_path", tmp_path / "nowhere", *flags,
                       "--output_file", page) == 2
            error = capsys.readouterr().err
            assert "output_file" in error and "can't be written" in error, error


def test_command_scores_one_prompt_with_its_end_of_turn(place, tmp_path, capsys):
    page = tmp_path / "r.html"
    ask = ("rewards", place / "adapter", "--prompt", "Is it hot?", "--answer", "Yes.",
           "--output_file", page, "--overwrite_output_file")
    assert cli(*ask) == 0
    shown = capsys.readouterr().out
    model, tokenizer = QAdapterModel.from_pretrained(place / "adapter"), chatml()
    ids = tokenizer("Yes.<|im_end|>")["input_ids"]
    [expected] = reward_answers(model, tokenizer, "Is it hot?", [ids])
    assert f"answer: R = {expected.total:+.3f}" in shown
    text = "".join(Page(page.read_text()).text)
    assert "<|im_end|>" in text and "rejected" not in text
    assert cli(*ask, "--rejected_answer", "Never.") == 0
    shown = capsys.readouterr().out
    assert f"chosen: R = {expected.total:+.3f}" in shown and "rejected: R =" in shown


@pytest.mark.parametrize("flags, message", [
    ((), "either --dataset_name, or --prompt"),
    (("--prompt", "a"), "needs --answer"),
    (("--prompt", "a", "--dataset_name", "b"), "either --dataset_name"),
    (("--dataset_name", "b", "--answer", "c"), "answer is for --prompt"),
    (("--prompt", "a", "--answer", " "), "must not be empty"),
    (("--prompt", "a", "--answer", "b", "--rejected_answer", "b"), "are the same"),
    (("--prompt", "a", "--answer", "b", "--max_pairs", "0"), "max_pairs must be at least 1"),
    (("--prompt", "a", "--answer", "b", "--output_file", "."), "is a folder"),
])
def test_command_errors_are_one_line(flags, message, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("rewards", place / "adapter", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_command_needs_an_adapter(place, tmp_path, capsys):
    flags = ("--prompt", "a", "--answer", "b", "--output_file", tmp_path / "r.html")
    assert cli("rewards", place / "model", *flags) == 2
    assert "no adapter" in capsys.readouterr().err
    assert cli("rewards", *flags) == 2
    assert "needs --model_name_or_path" in capsys.readouterr().err


def test_generate_prints_the_best_of_its_samples(place, capsys):
    ask = ("generate", place / "adapter", "--prompt", "Is it hot?", "--max_new_tokens", 6)
    assert cli(*ask, "--do_sample", "--best_of", 5, "--seed", 2) == 0
    shown = capsys.readouterr()
    model, tokenizer = QAdapterModel.from_pretrained(place / "adapter"), chatml()
    best, *others = best_of_n(
        model, tokenizer, "Is it hot?", 5, max_new_tokens=6, seed=2, temperature=0.7, top_p=0.95,
        top_k=0, repetition_penalty=1.0,
    )
    assert shown.out == best.answer.text + "\n"
    assert f"{best.reward:+.2f}, {others[0].reward:+.2f}" in " ".join(shown.err.split())
    assert cli(*ask, "--best_of", 5) == 2
    assert "best_of needs --prompt and --do_sample" in capsys.readouterr().err
    assert cli(*ask, "--do_sample", "--best_of", 0) == 2
    assert "at least 1" in capsys.readouterr().err
