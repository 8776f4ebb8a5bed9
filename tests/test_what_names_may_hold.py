"""Runs whose folders, files, prompts and answers hold whatever a name or a text may hold."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from hostile.reading import Seen
from markdown_it import MarkdownIt
from tiny_models import cli, preference_rows, save_tiny, tiny_adapter, write_jsonl

from qadapter.commands.measuring import Comparison, _comparison_markdown
from qadapter.evaluation.answers import Answer
from qadapter.evaluation.report import Section, write_report
from qadapter.exporting.card import write_card
from qadapter.exporting.engines import Served
from qadapter.exporting.verification import Check
from qadapter.system.markup import one_line

NAME = "a|b$\\foo$ [bold] <img src=x onerror=1> `y` _z_ \x1b[31m"
ABOVE = "e[/x] </script>"
"""A folder in a folder: with the slash between them, a closing tag of rich and one of HTML."""
PROMPT = "<script>[/x] $\\foo$ | \x1b[2J\n# h\n```\n![x](http://tracker.invalid)"
OWN = {"h1", "h2", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "strong",
       "blockquote", "br", "pre", "code"}


def read_markdown(file: Path) -> Seen:
    """As a browser sees it; nothing but the report's own marks, links and pictures."""
    text = file.read_text()
    if text.startswith("---\n"):
        text = text.split("\n---\n", 1)[1]
    seen = Seen(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))
    for tag, attributes in seen.elements:
        if tag == "a":
            assert attributes == {"href": "https://arxiv.org/abs/2407.03856"}
        elif tag == "img":
            assert (file.parent / attributes["src"]).is_file()
        else:
            assert tag in OWN, tag
    assert not set(text) & set("\x1b\x07\x08")
    return seen


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names") / ABOVE / NAME
    save_tiny(folder / NAME)
    rows = preference_rows(64)
    for i, row in enumerate(rows):
        row["prompt"][0]["content"] = f"{PROMPT} {i // 2}"
    write_jsonl(folder / f"{NAME}.jsonl", rows)
    (folder / f"{NAME}.txt").write_text("What is blue green?\nAlways red.\n")
    arguments = ("--dataset_name", folder / f"{NAME}.jsonl", "--answer_tokens", 4,
                 "--retention_file", folder / f"{NAME}.txt")
    assert cli("train", "--model_name_or_path", folder / NAME, "--max_steps", 2,
               "--output_dir", folder / "run" / NAME, "--retention_coef", 0, *arguments) == 0
    return folder, arguments


def test_a_trained_run(place):
    run = place[0] / "run" / NAME
    report = read_markdown(run / "report.md")
    assert f"{one_line(NAME)}: a customised model" in report.text
    assert f"KL(base‖customised), {one_line(NAME)}.txt" in report.text
    assert one_line(PROMPT) in " ".join(report.text.split())
    words = read_markdown(run / "README.md").text
    assert words.count(one_line(NAME)) >= 2 and f"from_pretrained({NAME!r})" in words
    assert (run / "loss.png").is_file()


def test_what_is_measured_of_it(place, tmp_path, capsys):
    folder, arguments = place
    out = tmp_path / NAME
    assert cli("eval", folder / "run" / NAME, "--output_dir", out, *arguments) == 0
    title = f"{one_line(str(folder / 'run' / NAME))} on {one_line(arguments[1].as_posix())}"
    assert title in read_markdown(out / "report.md").text
    assert cli("judge", folder / "run" / NAME, "--dataset_name", arguments[1], "--output_dir",
               tmp_path / "judged", "--judge_fraction", 0.6, "--max_new_tokens", 4, "--num_prompts",
               3, "--draws", 1, "--opponent_draws", 1, "--opponent", folder / NAME) == 0
    judged = read_markdown(tmp_path / "judged" / "judge.md").text
    assert judged.count(f"{one_line(str(folder / NAME))} (opponent)") >= 4
    assert cli("rewards", folder / "run" / NAME, "--dataset_name", arguments[1], "--output_file",
               tmp_path / f"{NAME}.html", "--max_pairs", 4) == 0
    page = Seen((tmp_path / f"{NAME}.html").read_text())
    assert set(page.tags).isdisjoint({"script", "img", "a"})
    assert page.text.count(one_line(NAME)) >= 3
    shown = capsys.readouterr()
    assert not set(shown.out + shown.err) & set("\x1b\x07")
    assert "[/x] <" in shown.out and "$\\foo$ [bold]" in shown.out


def test_a_shell_reads_the_commands_of_an_exports_card(tmp_path):
    """They are there to be copied; a stranger's adapter names its base."""
    base = "x; touch pwned $(id) `id` '\"\n```\n<script> | y"
    model = tiny_adapter(trained=True)
    model.base_identity = dataclasses.replace(model.base_identity, name=base)
    check = Check(1, 1, 1, 1, 0.0, 0.0, 0.0, "float32", {"torch": "1 | 2"})
    write_card(tmp_path, model, Served("lm_head_lora", "out <b>put", base=base, rank=8), check)
    seen = read_markdown(tmp_path / "README.md")
    [line] = [line for line in seen.text.split("\n") if line.startswith("vllm serve")]
    assert shlex.split(line)[:3] == ["vllm", "serve", one_line(base)]
    assert shlex.split(line)[-1] == "custom=out <b>put"
    assert f"{one_line(base)} customised by" in seen.text and "1 | 2" in seen.text


def test_answers_are_text(tmp_path):
    shown = _comparison_markdown(Comparison(PROMPT, Answer("<img src=x>\n\n    1. x", [1], True),
                                            Answer("", [1], True)))
    write_report(tmp_path / "report.md", PROMPT, [Section("Answers", shown)])
    words = read_markdown(tmp_path / "report.md").text
    assert "<img src=x>" in words and "    1. x" in words.replace("\xa0", " ")
    assert "(nothing)" in words
