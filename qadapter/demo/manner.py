"""The built-in preference and its plain measure: short and plain, the answer first, then stop."""

from __future__ import annotations

import re

from qadapter.evaluation import Answer

DESCRIPTION = "one short plain paragraph that ends by itself"
MAX_WORDS = 75
"""The preferred answers have 27 to 60 words."""
_MARKDOWN = re.compile(r"^\s*([-*•#>]|\d+[.)]\s)|\*\*|```", re.MULTILINE)


def keeps_manner(answer: Answer) -> bool:
    """Whether an answer is what the built-in preference asks for: it ends by itself, in one
    paragraph of at most ``MAX_WORDS`` words without lists, headings or code blocks."""
    text = answer.text.strip()
    return (
        answer.ended
        and bool(text)
        and "\n" not in text
        and len(text.split()) <= MAX_WORDS
        and not _MARKDOWN.search(text)
    )
