"""Where commands write to: a console that shows text and obeys none."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from qadapter.system.markup import visible


class Terminal(Console):
    """A rich console to which names and answers are no markup, no emoji codes and no escape
    sequences; what should look like something is a ``rich.text.Text``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)
