"""What a run did, as one page that people look at: answers along the dial, numbers, curves.

One file: it fetches nothing, and its one script moves the dial. Without scripts all that it shows
stands below each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qadapter.evaluation import charts, colored_tokens, html_page
from qadapter.evaluation.along_dial import AlongDial
from qadapter.evaluation.preference import PreferenceResult
from qadapter.evaluation.report import Row, format_value, row_cells, write_text
from qadapter.evaluation.retention import RetentionResult
from qadapter.evaluation.token_rewards import RewardedAnswer
from qadapter.system.markup import html_text, visible

PAGE_NAME = "report.html"
_MOST_CHARACTERS = 6000
"""Of a prompt; what is longer is cut."""
_MOST_TOKENS = 600
"""Of an answer that is shown; its sum is that of all."""

_STYLE = html_page.STYLE + """
[hidden] { display: none !important; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: .25rem 0 .75rem; max-width: 60rem; }
:focus-visible { outline: 2px solid rgb(var(--more)); outline-offset: 2px; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem 1rem; flex: 1 1 12rem; }
.tiles dt { color: var(--dim); font-size: .9rem; }
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
.tiles small { display: block; color: var(--dim); font-size: .8rem; font-weight: 400; }
.dial { position: sticky; top: 0; z-index: 1; background: var(--page); display: grid; gap: 0 1rem;
  grid-template-columns: auto minmax(8rem, 30rem) 2rem; align-items: center; padding: .6rem 0;
  justify-content: start;
  border-bottom: 1px solid var(--line); }
.dial label, .dial output { font-weight: 600; }
.dial input { width: 100%; margin: 0; height: 1.6rem; accent-color: rgb(var(--more)); }
.dial .marks { grid-column: 2; display: flex; justify-content: space-between; font-size: .8rem;
  padding-inline: .35rem; }
.asked { border-bottom: 1px solid var(--line); padding: 1.25rem 0; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; font-weight: 600; margin: 0 0 .75rem;
  max-height: 14rem; overflow: auto; }
.sides { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit,
  minmax(min(20rem, 100%), 1fr)); align-items: start; }
article header { display: flex; justify-content: space-between; gap: .1rem 1rem; flex-wrap: wrap; }
details { margin-top: .5rem; }
.wide { overflow-x: auto; }
th, td { padding: .2rem 1.2rem .2rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; }
.measures td, .measures th { border-bottom: 1px solid var(--line); }
.facts { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1.2rem; margin: 0; }
.facts dt { color: var(--dim); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
""" + colored_tokens.STYLE + charts.STYLE

_SCRIPT = """"use strict";
const dial = document.getElementById("strength"), told = document.getElementById("told");
const strengths = dial.dataset.strengths.split(" ");
function show() {
  const at = strengths[dial.value];
  for (const side of document.querySelectorAll("[data-strength]"))
    side.hidden = side.dataset.strength !== at;
  told.textContent = at;
  dial.setAttribute("aria-valuetext", "strength " + at);
}
dial.addEventListener("input", show);
document.getElementById("dial").hidden = false;
show();
"""


def run_page(
    title: str, facts: Mapping[str, str], log_history: Sequence[Mapping[str, Any]], *,
    preferences: PreferenceResult | None = None,
    retentions: Mapping[str, RetentionResult] | None = None, rows: Sequence[Row] = (),
    note: str = "", along: Sequence[AlongDial] = (),
) -> str:
    """The page's HTML; what has nothing to show is left out.

    Args:
        title: text. facts: what was done, as label → text.
        log_history: a trainer's ``state.log_history``.
        preferences, retentions: of the held-out pairs, and of texts by what they are called.
        rows: all measures, as ``report.comparison_table`` takes them. note: what stands below.
        along: held-out prompts and their answers along the dial.
    """
    drawn = charts.training_charts(log_history)
    if preferences is not None and preferences.calibration is not None:
        drawn.append(charts.calibration_chart(preferences.calibration))
    sections = [
        _answers(along) if along else "",
        _measures(rows, note) if rows else "",
        f'<h2>Training</h2>\n<div class="charts">\n{"".join(drawn)}\n</div>' if drawn else "",
        f"<h2>What was done</h2>\n{_facts(facts)}",
    ]
    body = (
        f"<header>\n<h1>{html_text(title)}</h1>\n{_tiles(preferences, retentions or {})}\n"
        "</header>\n<main>\n" + "\n".join(filter(None, sections)) + "\n</main>"
    )
    return html_page.html_page(title, _STYLE, body, _SCRIPT if along else "")


def write_run_page(path: str | Path, *args: Any, **kwargs: Any) -> None:
    """Write ``run_page`` to a file, whole or not at all."""
    write_text(path, run_page(*args, **kwargs))


def _tiles(
    preferences: PreferenceResult | None, retentions: Mapping[str, RetentionResult]
) -> str:
    found = []
    if preferences is not None and preferences.preference_accuracy is not None:
        found.append(("held-out pairs ranked right, by reward", preferences.preference_accuracy, 3))
        found.append(("reward margin, nats", preferences.reward_margin, 2))
    found += [
        (f"KL from the base on {where}, nats a token", result.kl_per_token, 4)
        for where, result in retentions.items()
    ]
    if not found:
        return ""
    tiles = []
    for label, value, digits in found:
        number, _, interval = format_value(value, digits).partition(" ")
        interval = f"<small>{interval}</small>" if interval else ""
        tiles.append(f'<div><dt>{html_text(label)}</dt><dd class="number">{number}{interval}</dd>'
                     "</div>")
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _measures(rows: Sequence[Row], note: str) -> str:
    lines = "\n".join(
        f"<tr><td>{html_text(measure)}</td>"
        + "".join(f'<td class="number">{html_text(cell)}</td>' for cell in cells) + "</tr>"
        for measure, *cells in map(row_cells, rows)
    )
    return (
        '<h2>Base beside customised</h2>\n<div class="wide"><table class="measures">\n<tr>'
        '<th>measure</th><th class="number">base</th><th class="number">customised</th></tr>\n'
        f'{lines}</table></div>\n<p class="dim">{html_text(note)}</p>'
    )


def _facts(facts: Mapping[str, str]) -> str:
    lines = "".join(
        f"<dt>{html_text(name)}</dt><dd>{html_text(text)}</dd>\n" for name, text in facts.items()
    )
    return f'<dl class="facts">\n{lines}</dl>'


# --- the answers --------------------------------------------------------------------------------


def _answers(along: Sequence[AlongDial]) -> str:
    scale = colored_tokens.scale_of(
        answer for asked in along
        for answer in (*asked.answers.values(), *asked.pair.values())
    )
    strengths = [f"{s:g}" for s in along[0].answers]
    asked = "\n".join(_asked(one, number, scale) for number, one in enumerate(along, 1))
    return (
        "<h2>Held-out prompts, answered by both</h2>\n"
        '<p class="dim">Greedy answers. The strength is the policy\'s dial: 0 is the base, 1 what '
        "was trained, more goes beyond. Rewards are those of the trained objective, whatever the "
        f"strength.</p>\n{_dial(strengths)}\n{colored_tokens.legend(scale)}\n{asked}"
    )


def _dial(strengths: Sequence[str]) -> str:
    marks = "".join(f"<span>{s}</span>" for s in strengths)
    at = strengths.index("1") if "1" in strengths else len(strengths) - 1
    return (
        '<div class="dial" id="dial" hidden><label for="strength">strength</label>'
        f'<input type="range" id="strength" min="0" max="{len(strengths) - 1}" step="1" '
        f'value="{at}" data-strengths="{" ".join(strengths)}" autocomplete="off">'
        '<output id="told" for="strength"></output>'
        f'<div class="marks dim" aria-hidden="true">{marks}</div></div>'
    )


def _asked(asked: AlongDial, number: int, scale: float) -> str:
    base = next(iter(asked.answers))
    customised = "\n".join(
        f'<div data-strength="{s:g}">'
        f'{_side(f"customised, strength {s:g}", answer, scale, asked.ended[s])}</div>'
        for s, answer in asked.answers.items()
    )
    pair = ""
    if asked.pair:
        both = "\n".join(_side(name, answer, scale) for name, answer in asked.pair.items())
        pair = (f"<details><summary>the pair in the data</summary>\n<div class=\"sides\">{both}"
                "</div></details>")
    return (
        f'<section class="asked" aria-label="Prompt {number}">\n'
        f'<div class="prompt" tabindex="0" role="region" aria-label="Text of prompt {number}">'
        f"{html_text(_cut(asked.prompt.strip()))}</div>\n<div class=\"sides\">\n"
        f"{_side('base', asked.answers[base], scale, asked.ended[base])}\n"
        f"<div>{customised}</div>\n</div>\n{pair}\n</section>"
    )


def _side(name: str, answer: RewardedAnswer, scale: float, ended: bool = True) -> str:
    more = len(answer.pieces) - _MOST_TOKENS
    shown = _first(answer, _MOST_TOKENS) if more > 0 else answer
    cut = f'<p class="dim">… and {more:,} tokens more</p>' if more > 0 else ""
    if not ended:
        cut += '<p class="dim">cut here</p>'
    return (
        f"<article>\n<header><h3>{html_text(name)}</h3>{colored_tokens.told(answer)}</header>\n"
        f"{colored_tokens.colored(shown, scale)}\n{cut}{colored_tokens.extremes(answer)}\n"
        "</article>"
    )


def _first(answer: RewardedAnswer, count: int) -> RewardedAnswer:
    return RewardedAnswer(**{
        f.name: getattr(answer, f.name)[:count] for f in dataclasses.fields(answer)
    })


def _cut(text: str) -> str:
    text = visible(text)
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters …\n{text[-half:]}"
