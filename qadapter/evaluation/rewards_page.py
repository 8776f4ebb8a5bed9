"""Token rewards as one HTML page: no network, no script, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qadapter.evaluation import colored_tokens, html_page
from qadapter.evaluation.colored_tokens import signed
from qadapter.evaluation.report import write_text
from qadapter.evaluation.token_rewards import RewardedAnswer, RewardedPair, summarize
from qadapter.system.markup import html_text

_STYLE = html_page.STYLE + """
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1rem; margin: 0; }
p { margin: .25rem 0 .75rem; }
section { border-top: 1px solid var(--line); padding: 1rem 0 1.25rem; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--dim); margin: .5rem 0 .75rem;
  max-height: 14rem; overflow: auto; }
.sides { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr));
  align-items: start; }
article header { display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap; }
th, td { padding: .1rem .9rem .1rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; }
""" + colored_tokens.STYLE


def rewards_page(
    pairs: Sequence[RewardedPair], title: str, facts: Mapping[str, str]
) -> str:
    """The page's HTML.

    Every token has its reward in a tooltip; an answer's most and least rewarded tokens also stand
    in a table under it, for those who can't hover or see the colors.

    Args:
        facts: what stands under the title, as label → text.
    """
    scale = colored_tokens.scale_of(answer for pair in pairs for answer in pair.answers.values())
    sections = "\n".join(_section(pair, n, scale) for n, pair in enumerate(pairs, 1))
    told = " · ".join(f"{html_text(k)}: {html_text(v)}" for k, v in facts.items())
    return html_page.html_page(title, _STYLE, f"""<header>
<h1>{html_text(title)}</h1>
<p class="dim">{told}</p>
{_summary(pairs)}
{colored_tokens.legend(scale)}
</header>
<main>
{sections}
</main>""")


def write_rewards_page(
    path: str | Path, pairs: Sequence[RewardedPair], title: str, facts: Mapping[str, str]
) -> None:
    """Write ``rewards_page`` to a file, whole or not at all."""
    write_text(path, rewards_page(pairs, title, facts))


def _summary(pairs: Sequence[RewardedPair]) -> str:
    found = summarize(pairs)
    if found["pairs"] < 2:  # one pair says it itself
        return ""
    return (
        f"<p>{found['pairs']:,} pairs; the chosen answer has the higher R in "
        f"<span class=\"number\">{found['accuracy']:.1%}</span>, by "
        f"<span class=\"number\">{signed(found['margin'])}</span> nats on average.</p>"
    )


def _section(pair: RewardedPair, number: int, scale: float) -> str:
    sides = "\n".join(_answer(name, answer, scale) for name, answer in pair.answers.items())
    margin = summarize([pair])
    gap = f" margin {signed(margin['margin'])}" if margin["pairs"] else ""
    return (
        f'<section>\n<h2>{number}<span class="number dim">{gap}</span></h2>\n'
        f'<div class="prompt" tabindex="0" role="region" aria-label="Prompt {number}">'
        f"{html_text(pair.prompt.strip())}</div>\n"
        f'<div class="sides">\n{sides}\n</div>\n</section>'
    )


def _answer(name: str, answer: RewardedAnswer, scale: float) -> str:
    return (
        f"<article>\n<header><h2>{html_text(name)}</h2>{colored_tokens.told(answer)}</header>\n"
        f"{colored_tokens.colored(answer, scale)}\n{colored_tokens.extremes(answer)}\n</article>"
    )
