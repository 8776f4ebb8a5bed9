"""Answers as HTML whose tokens are colored by their rewards."""

from __future__ import annotations

import math
from collections.abc import Iterable

from qadapter.evaluation.token_rewards import RewardedAnswer
from qadapter.system.markup import html_text

_STEPS = 9
"""Shades to each side of zero."""
_OUTLIERS = 0.02
"""This share of the tokens is beyond the scale, and has its last shade."""
_EXTREMES = 5
"""Tokens listed in words under an answer, at each end."""

STYLE = """
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem 1rem; min-width: 0; }
summary { cursor: pointer; color: var(--dim); }
table { border-collapse: collapse; font-size: .9rem; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; margin: .5rem 0; }
.answer span { border-radius: .2rem; padding: .12em 0; }
.answer .other { color: var(--dim); font-style: italic; }
.answer .mark { font-size: .8em; }
.legend { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .75rem 0; }
.scale { display: flex; border: 1px solid var(--line); border-radius: .25rem; overflow: hidden; }
.scale span { width: 1.4rem; height: 1.4rem; }
code { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
""" + "".join(
    f".{side}{k} {{ background: rgb(var(--{side}) / calc({k / _STEPS:.3f} * var(--most))); }}\n"
    for side in ("more", "less") for k in range(1, _STEPS + 1)
)
"""After ``html_page.STYLE``."""


def scale_of(answers: Iterable[RewardedAnswer]) -> float:
    """|r| of the last shade: one scale for a whole page, so that colors compare."""
    sizes = sorted(
        abs(r) for answer in answers
        for r, scored in zip(answer.rewards, answer.scored, strict=True)
        if scored and math.isfinite(r)
    )
    if not sizes:
        return 1.0
    return sizes[min(len(sizes) - 1, int((1 - _OUTLIERS) * len(sizes)))] or sizes[-1] or 1.0


def legend(scale: float) -> str:
    """What the colors mean."""
    steps = [f"less{k}" for k in range(_STEPS, 0, -1)] + [""]
    steps += [f"more{k}" for k in range(1, _STEPS + 1)]
    boxes = "".join(f'<span class="{step}"></span>' for step in steps)
    return (
        f'<div class="legend"><span class="number">≤ {signed(-scale)}</span>'
        f'<div class="scale" role="img" aria-label="Color scale from {signed(-scale)} (orange) '
        f'over 0 (none) to {signed(scale)} (blue)">{boxes}</div>'
        f'<span class="number">≥ {signed(scale)}</span>'
        '<span class="dim">reward r of a token, in nats: blue raises the answer\'s sum R, orange '
        "lowers it. Point at a token for its number.</span></div>"
    )


def colored(answer: RewardedAnswer, scale: float) -> str:
    """The answer's text, each token with its reward in a tooltip."""
    tokens = "".join(
        _token(piece, reward, scored, scale)
        for piece, reward, scored in zip(
            answer.pieces, answer.rewards, answer.scored, strict=True
        )
    )
    return f'<div class="answer">{tokens}</div>'


def told(answer: RewardedAnswer) -> str:
    """Its sum, in words."""
    return (f'<span class="number">R = {signed(answer.total)} over {sum(answer.scored):,} '
            "tokens</span>")


def extremes(answer: RewardedAnswer) -> str:
    """Its most and least rewarded tokens, for those who can't hover or see the colors."""
    ranked = sorted(
        ((r, piece) for r, piece, scored in
         zip(answer.rewards, answer.pieces, answer.scored, strict=True) if scored),
        key=lambda token: token[0],
    )
    least = ranked[: min(_EXTREMES, len(ranked) // 2)]
    most = ranked[::-1][: min(_EXTREMES, len(ranked) - len(least))]
    rows = "".join(
        f'<tr><td class="number">{signed(r)}</td><td>{_named(piece)}</td></tr>'
        for r, piece in [*most, *reversed(least)]
    )
    return (
        "<details><summary>most and least rewarded tokens</summary>\n"
        f"<table><tr><th>r</th><th>token</th></tr>{rows}</table></details>"
    )


def signed(number: float) -> str:
    """With a real minus sign, which screen readers read."""
    return f"{number:+.3f}".replace("-", "−")


def _shade(reward: float, scale: float) -> str:
    """CSS class of a reward; none for what rounds to zero."""
    if math.isnan(reward):
        return ""
    step = min(_STEPS, round(_STEPS * min(1.0, abs(reward) / scale)))
    return f"{'more' if reward > 0 else 'less'}{step}" if step else ""


def _token(piece: str, reward: float, scored: bool, scale: float) -> str:
    if not scored:
        return f'<span class="other" title="not the model\'s own">{html_text(piece)}</span>'
    # A line break alone would be a color without a place.
    text = html_text(piece).replace("\n", '<span class="mark">↵</span>\n')
    text = text or '<span class="mark">·</span>'
    shade = _shade(reward, scale)
    named = f' class="{shade}"' if shade else ""
    return f'<span{named} title="{signed(reward)}">{text}</span>'


def _named(piece: str) -> str:
    """A token on its own: spaces and line breaks visible."""
    if not piece:
        return "part of a character"
    return f"<code>{html_text(repr(piece)[1:-1])}</code>"
