"""Whatever a text holds, a browser, a reader of Markdown, matplotlib and a terminal show it."""

from __future__ import annotations

import io
import json
import warnings
from xml.etree import ElementTree

import pytest
from hostile.reading import Seen
from hostile.texts import TEXTS
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tiny_models import cli

from qadapter import QAdapterError
from qadapter.console.terminal import Terminal
from qadapter.evaluation.report import plain_labels
from qadapter.system.markup import (
    html_text,
    markdown_code,
    markdown_list,
    markdown_quote,
    markdown_table,
    markdown_text,
    one_line,
    picture_text,
    visible,
)

SIGNS = st.text(st.sampled_from("ab1 \n\t\\`*_[](){}<>#+-.!|~$&;:=/'\"^\r"), max_size=24)
READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("text", TEXTS)
def test_html_shows_it(text):
    seen = Seen(f'<p title="{html_text(text)}">{html_text(text)}</p>')
    assert seen.tags == ["p"]
    assert seen.attributes == [("title", visible(text))] and seen.text == visible(text)


def check_markdown(text):
    """In all places where a text may stand."""
    line = one_line(text)
    for written, tags in (
        (f"# {markdown_text(text)}", ["h1"]),
        (markdown_list([text]), ["ul", "li"]),
        (f"Before {markdown_text(text)} and after", ["p"]),
        (f"before\n{markdown_text(text)}", ["p"]),
        (f"**x**\n\n{markdown_quote(text)}", ["p", "strong", "blockquote", "p"]),
        (markdown_table(("a", "b"), [("x", text), (text, "y")]),
         ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td", "tr", "td", "td"]),
    ):
        seen = Seen(READER.render(written))
        assert [tag for tag in seen.tags if tag != "br"] == tags, written
        shown = words(seen.text)
        wanted = words(visible(text)) if "blockquote" in tags else line
        assert words(wanted) in shown, written
        assert all(name == "style" for name, _ in seen.attributes)
        assert "<" not in written and "&#" not in line.replace("&", "&amp;"), written
    if line:
        seen = Seen(READER.render(f"{markdown_code(text)} follows"))
        assert seen.tags == ["p", "code"] and words(line) in words(seen.text)


@pytest.mark.parametrize("text", TEXTS)
def test_markdown_shows_it(text):
    check_markdown(text)


@given(SIGNS.filter(str.strip))
def test_markdown_shows_whatever_it_may_be(text):
    check_markdown(text)


def test_lines_of_a_quote_stay_lines():
    seen = Seen(READER.render(markdown_quote("one\n\n  two\n3. three\n")))
    lines = seen.text.replace("\xa0", " ").split("\n")
    assert [line for line in lines if line] == ["one", "  two", "3. three"]
    assert markdown_quote(" \n") == "> (nothing)"


def test_what_needs_no_escape_has_none():
    for text in ("0.913 [0.871, 0.950]", "alpha_tilde 0.1", "rewards/margins", "KL(base‖customised)"
                 ", these answers", "12 of 40", "-1.2", "Qwen2.5-7B-Instruct (opponent)", "a > b!"):
        assert markdown_text(text) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if text.strip()])
def test_a_picture_shows_it(text):
    from matplotlib.figure import Figure

    label = picture_text(text)
    with plain_labels(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Glyph")  # the font's own gaps
        axes = Figure().subplots()
        axes.plot([1, 2], [1, 2], label=label)
        axes.set_title(label)
        axes.set_yticks([1], [label])
        axes.legend()
        axes.figure.savefig(io.BytesIO(), format="png")
        buffer = io.StringIO()
        axes.figure.savefig(buffer, format="svg")
    drawn = [x.text for x in ElementTree.fromstring(buffer.getvalue()).iter() if x.text]
    wanted = one_line(text)
    wanted = wanted if len(wanted) <= 40 else wanted[:39] + "…"
    assert sum(words(x) == words(wanted) for x in drawn) == 3


def test_labels_are_no_tex_whatever_the_user_has_set(tmp_path):
    import matplotlib

    from qadapter.evaluation import plot_training_curves

    with matplotlib.rc_context({"text.usetex": True}):
        assert plot_training_curves([{"step": 1, "loss": 1.0}], tmp_path)


@pytest.mark.parametrize("text", [text for text in TEXTS if words(text) == text])
def test_a_terminal_shows_it(text):
    from rich.table import Table

    terminal = Terminal(file=io.StringIO(), width=2000, force_terminal=True, color_system=None)
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    terminal.print(text)
    terminal.print(table)
    shown = terminal.file.getvalue()
    assert not set(shown) & set("\x1b\x07\x08\x9b\0") and "\u202e" not in shown
    assert words(shown).count(visible(text)) >= 3


def test_errors_show_what_they_name_and_nothing_acts(capsys):
    assert str(QAdapterError("a\x1b[2Jb\nc\ud800\u202e")) == "a\\x1b[2Jb c\\ud800\\u202e"
    assert cli("eval", "model", "--dataset_name", "\x1b]0;x\x07.jsonl") == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\x07" not in error and "\\x1b]0;x\\x07" in error


def test_an_argument_that_is_no_text_is_refused_at_once(capsys):
    assert cli("train", "--dataset_name", "d.jsonl", "--output_dir", "x\udc80y") == 2
    assert capsys.readouterr().err == (
        "error: x\\udc80y is not UTF-8 text: rename the file or folder\n"
    )


def test_files_hold_halves_of_characters_as_escapes(tmp_path):
    from qadapter.evaluation.report import write_json, write_text

    write_text(tmp_path / "a.md", "x\udc80")
    assert (tmp_path / "a.md").read_text() == "x\\udc80"
    write_json(tmp_path / "a.json", {"name": "x\udc80"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"name": "x\udc80"}
