"""Canonical pairs to token ids, cut to length, with every loss counted."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from qadapter.data.arrow import Row
from qadapter.data.columns import list_lengths, list_sums
from qadapter.data.encoding import SIDES, Encoder, TokenPair, encoder_for
from qadapter.data.preferences import as_preferences
from qadapter.data.report import BadRow, PreparationReport
from qadapter.errors import QAdapterError

TruncationMode = Literal["keep_start", "keep_end"]
OnBadRow = Literal["drop", "raise"]
_BATCH = 1000

_FEATURES = Features(
    {f"{name}_ids": List(Value("int32")) for name in ("prompt", *SIDES)}
    | {f"{side}_mask": List(Value("bool")) for side in SIDES}
    | {"notes": List(Value("string")), "problem": Value("string")}
)


class TokenizedPreferences(NamedTuple):
    """Token ids and what became of every pair.

    `dataset` has `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int32), `row`, `prompt_id`,
    and, only if some answer holds turns that are not the assistant's, `chosen_mask` and
    `rejected_mask` (lists of bool as long as the answers: whether a token is the assistant's own).
    """

    dataset: Dataset
    report: PreparationReport


def tokenize_preferences(
    dataset: Dataset | Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation_mode: TruncationMode = "keep_start",
    on_bad_row: OnBadRow = "drop",
    num_proc: int | None = None,
) -> TokenizedPreferences:
    """Tokenize preference pairs, cut them to length and drop those that cannot be used.

    Conversations go through the tokenizer's chat template; nothing else adds special tokens to
    them, so that a BOS the template writes is never doubled. An answer ends with the template's end
    of turn, which is learned; template text behind it (a newline) is left out. Plain text gets the
    tokenizer's BOS, where it has one, and one EOS. Token ids are taken as they are.

    Prompt and answer are tokenized together, and the answer begins where the prompt's own tokens
    end. Where a token spans both, the answer begins with that token (the pair is counted as
    `boundary_merged`): tokenizing the two apart would train on tokens the model never meets.

    Args:
        dataset: from `load_preferences`, or anything `as_preferences` takes.
        tokenizer: the base model's.
        max_length: most tokens of prompt + answer; None for no limit.
        truncation_mode: "keep_start" cuts the end of an answer that is too long, which then has no
            end of turn; "keep_end" cuts the start of the prompt, its BOS and system message first.
        on_bad_row: "drop" pairs that cannot be used and count them, or "raise" at the first.
        num_proc: processes; None for this one.

    Raises:
        QAdapterError: no pair is left (with all reasons), a bad pair under "raise" (with its row),
            or a tokenizer without chat template or eos token where one is needed.
    """
    pairs = as_preferences(dataset)
    step, report = prepare(pairs, tokenizer, max_length, truncation_mode, on_bad_row)
    tokenized = pairs.map(
        step,
        remove_columns=[n for n in pairs.column_names if n not in ("row", "prompt_id")],
        features=Features({n: pairs.features[n] for n in ("row", "prompt_id")} | _FEATURES),
        num_proc=num_proc,
        desc="Tokenizing preferences",
    )
    return TokenizedPreferences(_keep_good(tokenized, report), report)


def prepare(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None,
    truncation_mode: TruncationMode, on_bad_row: OnBadRow,
) -> tuple["Preparation", PreparationReport]:
    """What tokenizes pairs like these, and a report that counts none yet; arguments and errors as
    `tokenize_preferences`."""
    _check_choice("truncation_mode", truncation_mode, ("keep_start", "keep_end"))
    _check_choice("on_bad_row", on_bad_row, ("drop", "raise"))
    if max_length is not None and max_length < 2:
        raise QAdapterError(f"max_length must be at least 2 (prompt and answer), not {max_length}")
    encode, end = encoder_for(pairs, tokenizer)
    report = PreparationReport(len(pairs), max_length=max_length, truncation_mode=truncation_mode)
    if end is not None:
        report.end_of_turn = str(tokenizer.convert_ids_to_tokens(end.token_id))
        report.end_of_turn_source = (
            "chat template" if end.from_template else "tokenizer's eos token"
        )
    return Preparation(encode, max_length, truncation_mode, on_bad_row), report


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise QAdapterError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _keep_good(tokenized: Dataset, report: PreparationReport) -> Dataset:
    """Count everything in `report`; return the usable pairs without the working columns."""
    good: list[np.ndarray] = []
    start = 0
    for batch in tokenized.select_columns(["row", "problem", "notes"]).iter(_BATCH):
        problems = batch["problem"]
        for row, problem, notes in zip(batch["row"], problems, batch["notes"], strict=True):
            if problem is not None:
                report.count(report.dropped, BadRow.parse(problem).reason, [row])
            for note in notes:
                report.count(report.notes, note, [row])
        good.append(start + np.flatnonzero([problem is None for problem in problems]))
        start += len(problems)
    kept = np.concatenate([np.zeros(0, np.int64), *good])
    report.kept, report.indices = len(kept), kept
    if not len(kept):
        raise QAdapterError(f"no preference pair can be used: {report.summary()}")
    if len(kept) < start:
        tokenized = tokenized.select(kept)
    prompt, *answers = (list_lengths(tokenized, f"{name}_ids") for name in ("prompt", *SIDES))
    report.answer_tokens = int(sum(x.sum() for x in answers))
    report.longest = int((prompt + np.maximum(*answers)).max())
    unmasked = all(
        np.array_equal(list_sums(tokenized, f"{side}_mask"), lengths)
        for side, lengths in zip(SIDES, answers, strict=True)
    )
    masks = [f"{side}_mask" for side in SIDES] if unmasked else []
    return tokenized.remove_columns(["notes", "problem", *masks])


@dataclass
class Preparation:
    """A canonical row to the columns of `_FEATURES`; what `Dataset.map` runs, in any process."""

    encode: Encoder
    max_length: int | None
    truncation_mode: TruncationMode
    on_bad_row: OnBadRow

    def __call__(self, row: Row) -> dict[str, Any]:
        try:
            if row["problem"] is not None:
                raise BadRow.parse(row["problem"])
            pair = self.encode(row)
            if not pair.prompt:
                raise BadRow("empty_prompt")
            if pair.answers[0] == pair.answers[1]:
                raise BadRow("identical_answers")
            self._truncate(pair)
        except BadRow as bad:
            if self.on_bad_row == "raise":
                raise QAdapterError(
                    f"row {row['row']}: {bad.description}; on_bad_row='drop' would skip it"
                ) from bad
            return dict.fromkeys(_FEATURES) | {"notes": [], "problem": str(bad)}
        (chosen, rejected), masks = pair.answers, pair.masks
        return {
            "prompt_ids": pair.prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "chosen_mask": masks[0][: len(chosen)] if masks else [True] * len(chosen),
            "rejected_mask": masks[1][: len(rejected)] if masks else [True] * len(rejected),
            "notes": pair.notes,
            "problem": None,
        }

    def _truncate(self, pair: TokenPair) -> None:
        if self.max_length is None:
            return
        longest = max(map(len, pair.answers))
        if self.truncation_mode == "keep_end":
            room = self.max_length - longest
            if room < 1:  # the first answer token needs something before it
                raise BadRow("answer_too_long", f"{longest} tokens")
            if len(pair.prompt) > room:
                pair.prompt = pair.prompt[-room:]
                pair.notes.append("prompt_truncated")
            return
        room = self.max_length - len(pair.prompt)
        if room < 1:
            raise BadRow("prompt_too_long", f"{len(pair.prompt)} tokens")
        for side, answer in zip(SIDES, pair.answers, strict=True):
            if len(answer) > room:
                del answer[room:]
                pair.notes.append(f"{side}_truncated")
        if pair.answers[0] == pair.answers[1]:
            raise BadRow("identical_after_truncation")
