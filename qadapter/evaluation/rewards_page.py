"""Token rewards as one HTML page: no network, no script, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from qadapter.evaluation.html_page import html_page
from qadapter.evaluation.report import write_text
from qadapter.evaluation.token_rewards import RewardedAnswer, RewardedPair, summarize
from qadapter.system.markup import html_text

_STEPS = 9
"""Shades to each side of zero."""
_OUTLIERS = 0.02
"""This share of the tokens is beyond the scale, and has its last shade."""
_EXTREMES = 5
"""Tokens listed in words under an answer, at each end."""

# Blue and orange are told apart with any color vision; the backgrounds stay pale (or dull, in the
# dark) enough for the text's contrast to be above 7:1 at every shade.
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #16181d; --dim: #5a606b; --line: #d5d9e0;
  --card: #f7f8fa; --more: 40 110 200; --less: 222 110 20; --most: 0.5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --text: #f0f1f4; --dim: #a3a9b5; --line: #363b45; --card: #1b1e24;
    --more: 50 120 215; --less: 190 85 10; --most: 0.55; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1rem; margin: 0; }
p { margin: .25rem 0 .75rem; }
.dim { color: var(--dim); }
section { border-top: 1px solid var(--line); padding: 1rem 0 1.25rem; }
.prompt, .answer { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: var(--dim); margin: .5rem 0 .75rem; max-height: 14rem; overflow: auto; }
.sides { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr));
  align-items: start; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem 1rem; min-width: 0; }
article header { display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap; }
.number { font-variant-numeric: tabular-nums; }
.answer { line-height: 1.75; margin: .5rem 0; }
.answer span { border-radius: .2rem; padding: .12em 0; }
.answer .other { color: var(--dim); font-style: italic; }
.answer .mark { font-size: .8em; }
.legend { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .75rem 0; }
.scale { display: flex; border: 1px solid var(--line); border-radius: .25rem; overflow: hidden; }
.scale span { width: 1.4rem; height: 1.4rem; }
summary { cursor: pointer; color: var(--dim); }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .1rem .9rem .1rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; }
code { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def rewards_page(
    pairs: Sequence[RewardedPair], title: str, facts: Mapping[str, str]
) -> str:
    """The page's HTML.

    Every token has its reward in a tooltip; an answer's most and least rewarded tokens also stand
    in a table under it, for those who can't hover or see the colors.

    Args:
        facts: what stands under the title, as label → text.
    """
    scale = _scale(pairs)
    style = _STYLE + "".join(
        f".{side}{k} {{ background: rgb(var(--{side}) / calc({k / _STEPS:.3f} * var(--most))); }}\n"
        for side in ("more", "less") for k in range(1, _STEPS + 1)
    )
    sections = "\n".join(_section(pair, n, scale) for n, pair in enumerate(pairs, 1))
    told = " · ".join(f"{html_text(k)}: {html_text(v)}" for k, v in facts.items())
    return html_page(title, style, f"""<header>
<h1>{html_text(title)}</h1>
<p class="dim">{told}</p>
{_summary(pairs)}
{_legend(scale)}
</header>
<main>
{sections}
</main>""")


def write_rewards_page(
    path: str | Path, pairs: Sequence[RewardedPair], title: str, facts: Mapping[str, str]
) -> None:
    """Write ``rewards_page`` to a file, whole or not at all."""
    write_text(path, rewards_page(pairs, title, facts))


def _scale(pairs: Sequence[RewardedPair]) -> float:
    """|r| of the last shade: one scale for the whole page, so that colors compare."""
    sizes = sorted(
        abs(r) for pair in pairs for answer in pair.answers.values()
        for r, scored in zip(answer.rewards, answer.scored, strict=True)
        if scored and math.isfinite(r)
    )
    if not sizes:
        return 1.0
    return sizes[min(len(sizes) - 1, int((1 - _OUTLIERS) * len(sizes)))] or sizes[-1] or 1.0


def _shade(reward: float, scale: float) -> str:
    """CSS class of a reward; none for what rounds to zero."""
    if math.isnan(reward):
        return ""
    step = min(_STEPS, round(_STEPS * min(1.0, abs(reward) / scale)))
    return f"{'more' if reward > 0 else 'less'}{step}" if step else ""


def _summary(pairs: Sequence[RewardedPair]) -> str:
    found = summarize(pairs)
    if found["pairs"] < 2:  # one pair says it itself
        return ""
    return (
        f"<p>{found['pairs']:,} pairs; the chosen answer has the higher R in "
        f"<span class=\"number\">{found['accuracy']:.1%}</span>, by "
        f"<span class=\"number\">{_signed(found['margin'])}</span> nats on average.</p>"
    )


def _legend(scale: float) -> str:
    steps = [f"less{k}" for k in range(_STEPS, 0, -1)] + [""]
    steps += [f"more{k}" for k in range(1, _STEPS + 1)]
    boxes = "".join(f'<span class="{step}"></span>' for step in steps)
    return (
        f'<div class="legend"><span class="number">≤ {_signed(-scale)}</span>'
        f'<div class="scale" role="img" aria-label="Color scale from {_signed(-scale)} (orange) '
        f'over 0 (none) to {_signed(scale)} (blue)">{boxes}</div>'
        f'<span class="number">≥ {_signed(scale)}</span>'
        '<span class="dim">reward r of a token, in nats: blue raises the answer\'s sum R, orange '
        "lowers it. Point at a token for its number.</span></div>"
    )


def _section(pair: RewardedPair, number: int, scale: float) -> str:
    sides = "\n".join(_answer(name, answer, scale) for name, answer in pair.answers.items())
    margin = summarize([pair])
    gap = f" margin {_signed(margin['margin'])}" if margin["pairs"] else ""
    return (
        f'<section>\n<h2>{number}<span class="number dim">{gap}</span></h2>\n'
        f'<div class="prompt" tabindex="0" role="region" aria-label="Prompt {number}">'
        f"{html_text(pair.prompt.strip())}</div>\n"
        f'<div class="sides">\n{sides}\n</div>\n</section>'
    )


def _answer(name: str, answer: RewardedAnswer, scale: float) -> str:
    tokens = "".join(
        _token(piece, reward, scored, scale)
        for piece, reward, scored in zip(
            answer.pieces, answer.rewards, answer.scored, strict=True
        )
    )
    count = sum(answer.scored)
    return (
        f'<article>\n<header><h2>{html_text(name)}</h2><span class="number">R = '
        f"{_signed(answer.total)} over {count:,} tokens</span></header>\n"
        f'<div class="answer">{tokens}</div>\n{_extremes(answer)}\n</article>'
    )


def _token(piece: str, reward: float, scored: bool, scale: float) -> str:
    if not scored:
        return f'<span class="other" title="not the model\'s own">{html_text(piece)}</span>'
    # A line break alone would be a color without a place.
    text = html_text(piece).replace("\n", '<span class="mark">↵</span>\n')
    text = text or '<span class="mark">·</span>'
    shade = _shade(reward, scale)
    named = f' class="{shade}"' if shade else ""
    return f'<span{named} title="{_signed(reward)}">{text}</span>'


def _extremes(answer: RewardedAnswer) -> str:
    ranked = sorted(
        ((r, piece) for r, piece, scored in
         zip(answer.rewards, answer.pieces, answer.scored, strict=True) if scored),
        key=lambda token: token[0],
    )
    least = ranked[: min(_EXTREMES, len(ranked) // 2)]
    most = ranked[::-1][: min(_EXTREMES, len(ranked) - len(least))]
    rows = "".join(
        f'<tr><td class="number">{_signed(r)}</td><td>{_named(piece)}</td></tr>'
        for r, piece in [*most, *reversed(least)]
    )
    return (
        "<details><summary>most and least rewarded tokens</summary>\n"
        f"<table><tr><th>r</th><th>token</th></tr>{rows}</table></details>"
    )


def _named(piece: str) -> str:
    """A token on its own: spaces and line breaks visible."""
    if not piece:
        return "part of a character"
    return f"<code>{html_text(repr(piece)[1:-1])}</code>"


def _signed(number: float) -> str:
    """With a real minus sign, which screen readers read."""
    return f"{number:+.3f}".replace("-", "−")
