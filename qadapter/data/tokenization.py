"""Canonical pairs to token ids: where the answer begins, how it ends, and what does not fit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from datasets import Dataset, Features, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qadapter.data.preferences import as_preferences
from qadapter.data.report import BadRow, PreparationReport
from qadapter.data.sources import Row
from qadapter.errors import QAdapterError

TruncationMode = Literal["keep_start", "keep_end"]
OnBadRow = Literal["drop", "raise"]

# Something no template writes itself, to find what it puts after an answer.
_PROBE = "qadapter-probe-answer"
_SIDES = ("chosen", "rejected")
_FEATURES = Features(
    {f"{name}_ids": List(Value("int32")) for name in ("prompt", *_SIDES)}
    | {f"{side}_mask": List(Value("bool")) for side in _SIDES}
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


class EndOfTurn(NamedTuple):
    """The token that ends an answer.

    `from_template`: whether the chat template writes it; else the tokenizer's eos token is
    appended, once `tail`, the template's text behind an answer, is removed.
    """

    token_id: int
    from_template: bool
    tail: str = ""


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
            end of turn; "keep_end" cuts the start of the prompt.
        on_bad_row: "drop" pairs that cannot be used and count them, or "raise" at the first.
        num_proc: processes; None for this one.

    Raises:
        QAdapterError: no pair is left (with all reasons), a bad pair under "raise" (with its row),
            or a tokenizer without chat template or eos token where one is needed.
    """
    _check_choice("truncation_mode", truncation_mode, ("keep_start", "keep_end"))
    _check_choice("on_bad_row", on_bad_row, ("drop", "raise"))
    if max_length is not None and max_length < 2:
        raise QAdapterError(f"max_length must be at least 2 (prompt and answer), not {max_length}")
    pairs = as_preferences(dataset)
    encode, end = _encoder(pairs, tokenizer)
    step = _Preparation(encode, max_length, truncation_mode, on_bad_row)
    tokenized = pairs.map(
        step,
        remove_columns=[n for n in pairs.column_names if n not in ("row", "prompt_id")],
        features=Features({n: pairs.features[n] for n in ("row", "prompt_id")} | _FEATURES),
        num_proc=num_proc,
        desc="Tokenizing preferences",
    )
    report = PreparationReport(len(pairs), max_length=max_length, truncation_mode=truncation_mode)
    if end is not None:
        report.end_of_turn = tokenizer.convert_ids_to_tokens(end.token_id)
        report.end_of_turn_source = (
            "chat template" if end.from_template else "tokenizer's eos token"
        )
    return TokenizedPreferences(_keep_good(tokenized, report), report)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise QAdapterError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _encoder(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple["_Ids | _Conversation | _Text", EndOfTurn | None]:
    if "prompt_ids" in pairs.column_names:
        return _Ids(), None
    if isinstance(pairs.features["prompt"], List):
        end = learn_end_of_turn(tokenizer)
        return _Conversation(tokenizer, end), end
    end = EndOfTurn(_eos(tokenizer), from_template=False)
    return _Text(tokenizer, end, _special_prefix(tokenizer)), end


def _keep_good(tokenized: Dataset, report: PreparationReport) -> Dataset:
    """Count everything in `report`; return the usable pairs without the working columns."""
    rows, problems = list(tokenized["row"]), list(tokenized["problem"])
    good = [i for i, problem in enumerate(problems) if problem is None]
    report.kept = len(good)
    for row, problem, notes in zip(rows, problems, tokenized["notes"], strict=True):
        if problem is not None:
            report.count(report.dropped, BadRow.parse(problem).reason, [row])
        for note in notes:
            report.count(report.notes, note, [row])
    if not good:
        raise QAdapterError(f"no preference pair can be used: {report.summary()}")
    if len(good) < len(rows):
        tokenized = tokenized.select(good)
    unmasked = True
    lengths = {name: [] for name in ("prompt", *_SIDES)}
    for batch in tokenized.iter(1000):
        for name in lengths:
            lengths[name] += map(len, batch[f"{name}_ids"])
        unmasked &= all(all(mask) for side in _SIDES for mask in batch[f"{side}_mask"])
    report.answer_tokens = sum(sum(lengths[side]) for side in _SIDES)
    report.longest = max(p + max(c, r) for p, c, r in zip(*lengths.values(), strict=True))
    masks = [f"{side}_mask" for side in _SIDES] if unmasked else []
    return tokenized.remove_columns(["notes", "problem", *masks])


# --- the end of an answer ---------------------------------------------------------------------


def learn_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn:
    """Find the token a chat template ends an assistant's turn with.

    It is the first special token the template writes behind the answer of a probe conversation:
    the eos token often is another one, and the model generates on when it never learned this one.

    Raises:
        QAdapterError: no chat template, one that cannot render a question and its answer, or one
            that writes no such token for a tokenizer without eos token.
    """
    if not tokenizer.chat_template:
        raise QAdapterError(
            f"the data is conversational, but the tokenizer {tokenizer.name_or_path!r} has no chat "
            "template; take an instruction-tuned base, or data with plain text"
        )
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise QAdapterError(f"the chat template cannot render a conversation: {error}") from error
    tail = text.rpartition(_PROBE)[2]
    special = set(tokenizer.all_special_ids)
    special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    for token_id in _tokenize(tokenizer, tail):
        if token_id in special:
            return EndOfTurn(token_id, from_template=True)
    return EndOfTurn(_eos(tokenizer), from_template=False, tail=tail)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise QAdapterError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos token to end an answer with"
        )
    return tokenizer.eos_token_id


def _special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before plain text: [BOS] or nothing."""
    plain = _tokenize(tokenizer, "a")
    with_special = tokenizer("a")["input_ids"]
    return with_special[: with_special.index(plain[0])]


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


# --- one pair ---------------------------------------------------------------------------------


@dataclass
class _Pair:
    """A pair as token ids. `masks`: which tokens of each answer are the assistant's own."""

    prompt: list[int]
    answers: tuple[list[int], list[int]]
    masks: tuple[list[bool], list[bool]] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Ids:
    """Token ids, as given."""

    def __call__(self, row: Row) -> _Pair:
        return _Pair(list(row["prompt_ids"]), (list(row["chosen_ids"]), list(row["rejected_ids"])))


@dataclass
class _Text:
    """Plain text: prompt + answer + EOS, behind the tokenizer's BOS."""

    tokenizer: PreTrainedTokenizerBase
    end: EndOfTurn
    prefix: list[int]

    def __call__(self, row: Row) -> _Pair:
        prompt = self._ids(row["prompt"])
        full = [self._ids(row["prompt"] + row[side]) for side in _SIDES]
        pair = _split(prompt, full, rerendered=False)
        for answer in pair.answers:
            if not answer or answer[-1] != self.end.token_id:
                answer.append(self.end.token_id)
        return pair

    def _ids(self, text: str) -> list[int]:
        ids = _tokenize(self.tokenizer, text)
        written_out = ids[: len(self.prefix)] == self.prefix
        return ids if written_out else self.prefix + ids


@dataclass
class _Conversation:
    """Messages, through the chat template."""

    tokenizer: PreTrainedTokenizerBase
    end: EndOfTurn

    def __call__(self, row: Row) -> _Pair:
        options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        prompt_text = self._render(row["prompt"], options, add_generation_prompt=True)
        texts = [self._render(row["prompt"] + row[side], options) for side in _SIDES]
        pair = _split(
            _tokenize(self.tokenizer, prompt_text),
            [_tokenize(self.tokenizer, text) for text in texts],
            rerendered=not all(text.startswith(prompt_text) for text in texts),
        )
        pair.answers = tuple(map(self._end, pair.answers))
        if any(len(row[side]) > 1 for side in _SIDES):
            pair.masks = tuple(
                self._turn_mask(row["prompt"], row[side], pair.prompt, answer, options)
                for side, answer in zip(_SIDES, pair.answers, strict=True)
            )
        return pair

    def _render(self, messages: list[dict], options: Mapping[str, Any], **kwargs: Any) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **kwargs)
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRow("template_error", str(error)) from error
        if not self.end.from_template and not kwargs:
            text = text.removesuffix(self.end.tail)
        return text

    def _end(self, ids: list[int]) -> list[int]:
        """`ids` up to and with the last end of turn, appended if there is none."""
        end = self.end.token_id
        if self.end.from_template and end in ids:
            return ids[: len(ids) - ids[::-1].index(end)]
        return ids if ids and ids[-1] == end else [*ids, end]

    def _turn_mask(
        self,
        prompt: list[dict],
        turns: list[dict],
        prompt_ids: list[int],
        answer_ids: list[int],
        options: Mapping[str, Any],
    ) -> list[bool]:
        """True for the answer's tokens that belong to assistant turns, with their ends of turn.

        Found by rendering the conversation up to each turn.
        """
        ids, start = prompt_ids + answer_ids, len(prompt_ids)
        mask = [False] * len(ids)
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._render(prompt + turns[:index], options, add_generation_prompt=True)
            after = self._render(prompt + turns[: index + 1], options)
            begin = start if index == 0 else len(self._prefix_of(ids, before))
            if index == len(turns) - 1:
                stop = len(ids)
            else:
                stop = len(self._prefix_of(ids, after, ended=True))
            mask[begin:stop] = [True] * (stop - begin)
        return mask[start:]

    def _prefix_of(self, ids: list[int], text: str, ended: bool = False) -> list[int]:
        part = _tokenize(self.tokenizer, text)
        if ended and self.end.from_template:
            part = self._end(part)
        if ids[: len(part)] != part:
            raise BadRow("template_error", "turns of one answer cannot be told apart")
        return part


def _split(prompt: list[int], full: Sequence[list[int]], *, rerendered: bool) -> _Pair:
    """Divide the tokenized conversations where the tokens of the prompt end.

    Where those are no prefix of both, a token spans prompt and answer, and the answer begins with
    it. With `rerendered` the texts themselves part earlier: the prompt alone says nothing about the
    conversations then, and whatever these share is taken as the prompt.
    """
    chosen, rejected = full
    start = min(shared_prefix(prompt, chosen), shared_prefix(prompt, rejected))
    notes = []
    if start < len(prompt):
        notes.append("prompt_rerendered" if rerendered else "boundary_merged")
        if rerendered:
            start = shared_prefix(chosen, rejected)
    return _Pair(chosen[:start], (chosen[start:], rejected[start:]), notes=notes)


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


# --- every pair -------------------------------------------------------------------------------


@dataclass
class _Preparation:
    """A canonical row to the columns of `_FEATURES`; what `Dataset.map` runs, in any process."""

    encode: _Ids | _Conversation | _Text
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

    def _truncate(self, pair: _Pair) -> None:
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
        for side, answer in zip(_SIDES, pair.answers, strict=True):
            if len(answer) > room:
                del answer[room:]
                pair.notes.append(f"{side}_truncated")
        if pair.answers[0] == pair.answers[1]:
            raise BadRow("identical_after_truncation")
