"""What happened to every pair on its way to tokens: kept, changed or dropped, and why."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

DROP_REASONS: dict[str, str] = {
    "missing_value": "a value is missing (null)",
    "wrong_type": "a value is not text, messages or token ids",
    "bad_messages": "a message lacks its role or its text, or is not built as one",
    "not_text": "a message holds something other than text",
    "prompt_differs": "the two answers do not share one prompt",
    "empty_prompt": "the prompt has no tokens",
    "empty_answer": "an answer is empty",
    "answer_role": "an answer is not an assistant's turn",
    "identical_answers": "the two answers are the same",
    "template_error": "the chat template cannot render the conversation",
    "answer_left_out": "the chat template leaves out part of an answer",
    "turn_not_found": "the assistant's turns can't be told apart in what the template renders",
    "prompt_too_long": "the prompt leaves no room for an answer",
    "answer_too_long": "an answer alone does not fit",
    "identical_after_truncation": "the two answers are the same once cut",
}
"""Why a pair is dropped; the keys are stable and appear in `PreparationReport.as_dict()`."""

NOTES: dict[str, str] = {
    "chosen_truncated": "chosen answer cut (it ends without an end of turn)",
    "rejected_truncated": "rejected answer cut (it ends without an end of turn)",
    "prompt_truncated": "start of the prompt cut",
    "boundary_merged": "prompt and answer share a token; the answer begins with it",
    "prompt_rerendered": "the template renders the prompt differently once it is answered; "
    "the answers begin where the two differ",
    "prompt_left_out": "the chat template leaves out part of the prompt (a system message, tools, "
    "tool calls or their replies)",
    "reasoning_left_out": "the chat template leaves out reasoning that comes as a key of its own",
    "turn_rewritten": "the chat template writes a turn of the answer otherwise than it stands "
    "(as without its earlier thoughts)",
}
"""What was changed in a pair that is kept."""

FIRST_ROWS = 5
_MOST_DETAIL = 300


class BadRow(Exception):
    """A pair that cannot be used: `reason` (a key of `DROP_REASONS`) and what was seen, of which
    some hundred characters are kept."""

    def __init__(self, reason: str, detail: str = "") -> None:
        if len(detail) > _MOST_DETAIL:
            detail = f"{detail[:_MOST_DETAIL]}…"
        # It goes into a column, and what was seen may be half a character.
        detail = detail.encode("utf-8", "backslashreplace").decode()
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        """One string for a dataset column: ``reason: detail``."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason

    @classmethod
    def parse(cls, text: str) -> "BadRow":
        """Undo `str()`."""
        reason, _, detail = text.partition(": ")
        return cls(reason, detail)

    @property
    def description(self) -> str:
        """A sentence for people."""
        return DROP_REASONS[self.reason] + (f" ({self.detail})" if self.detail else "")


@dataclass
class PreparationReport:
    """Counts of pairs kept, changed and dropped, with the first rows of each reason.

    Attributes:
        total: pairs that came in.
        kept: pairs that came out.
        indices: where each of them stood among the pairs that came in, in order, int64 [kept].
        dropped: reason (a key of `DROP_REASONS`) → pairs dropped for it.
        notes: note (a key of `NOTES`) → pairs kept with that change.
        first_rows: reason or note → up to five source rows, in order.
        answer_tokens: tokens in all answers kept (both of each pair).
        longest: tokens in the longest prompt + answer kept.
        max_length, truncation_mode: the limits they were prepared with.
        end_of_turn: the token that ends an answer, as text; None for tokenized input.
        end_of_turn_source: "chat template", "tokenizer's eos token" or "as given".
    """

    total: int
    kept: int = 0
    indices: np.ndarray = field(
        default_factory=lambda: np.zeros(0, np.int64), repr=False, compare=False
    )
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    first_rows: dict[str, list[int]] = field(default_factory=dict)
    answer_tokens: int = 0
    longest: int = 0
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    end_of_turn: str | None = None
    end_of_turn_source: str = "as given"

    def count(self, counts: dict[str, int], key: str, rows: Iterable[int]) -> None:
        """Add `rows` (source rows, one entry a pair) to `counts[key]` (`dropped` or `notes`)."""
        rows = list(rows)
        if not rows:
            return
        counts[key] = counts.get(key, 0) + len(rows)
        first = self.first_rows.setdefault(key, [])
        for row in rows:
            if len(first) < FIRST_ROWS and row not in first:
                first.append(row)

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())

    def summary(self) -> str:
        """The whole report in one line."""
        if not self.dropped:
            return f"kept all {self.total} pairs"
        reasons = "; ".join(
            f"{n} × {DROP_REASONS[key]} (row {', '.join(map(str, self.first_rows[key]))}"
            f"{', …' if n > len(self.first_rows[key]) else ''})"
            for key, n in sorted(self.dropped.items(), key=lambda item: -item[1])
        )
        return f"kept {self.kept} of {self.total} pairs; dropped: {reasons}"

    def table(self) -> Table:
        """A rich table: one line a reason or note, with its count, share and first rows."""
        limit = "no limit" if self.max_length is None else f"{self.max_length} tokens"
        end = (
            "token ids as given" if self.end_of_turn is None
            else f"end of turn {self.end_of_turn!r} ({self.end_of_turn_source})"
        )
        caption = (
            f"{self.answer_tokens:,} answer tokens; longest sequence {self.longest:,}; {end}"
        )
        table = Table(
            title=f"Preference pairs: {self.kept:,} of {self.total:,} kept "
            f"({limit}, {self.truncation_mode})",
            # No markup: an end of turn may read [/INST].
            caption=Text(caption, style="table.caption"),
        )
        table.add_column("what")
        table.add_column("why")
        table.add_column("pairs", justify="right")
        table.add_column("share", justify="right")
        table.add_column("first rows")
        for what, counts, texts in (
            ("dropped", self.dropped, DROP_REASONS),
            ("changed", self.notes, NOTES),
        ):
            for key, n in sorted(counts.items(), key=lambda item: -item[1]):
                rows = ", ".join(map(str, self.first_rows[key]))
                more = ", …" if n > len(self.first_rows[key]) else ""
                table.add_row(what, texts[key], f"{n:,}", f"{n / self.total:.1%}", rows + more)
        if not table.rows:
            table.add_row("kept", "as they are", f"{self.kept:,}", "100.0%", "")
        return table

    def as_dict(self) -> dict[str, Any]:
        """All but the indices, as plain JSON types."""
        return {
            "total": self.total,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "notes": dict(self.notes),
            "first_rows": {key: list(rows) for key, rows in self.first_rows.items()},
            "answer_tokens": self.answer_tokens,
            "longest": self.longest,
            "max_length": self.max_length,
            "truncation_mode": self.truncation_mode,
            "end_of_turn": self.end_of_turn,
            "end_of_turn_source": self.end_of_turn_source,
        }
