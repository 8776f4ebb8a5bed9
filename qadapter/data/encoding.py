"""One pair to token ids: where the answer begins, and how it ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset, List
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qadapter.data.report import BadRow
from qadapter.data.sources import Row
from qadapter.errors import QAdapterError

SIDES = ("chosen", "rejected")
# Something no template writes itself, to find what it puts after an answer.
_PROBE = "qadapter-probe-answer"


class EndOfTurn(NamedTuple):
    """The token that ends an answer.

    `from_template`: whether the chat template writes it; else the tokenizer's eos token is
    appended, once `tail`, the template's text behind an answer, is removed.
    """

    token_id: int
    from_template: bool
    tail: str = ""


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
class TokenPair:
    """A pair as token ids. `masks`: which tokens of each answer are the assistant's own."""

    prompt: list[int]
    answers: tuple[list[int], list[int]]
    masks: tuple[list[bool], list[bool]] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class IdsEncoder:
    """Token ids and masks, as given."""

    def __call__(self, row: Row) -> TokenPair:
        answers = tuple(row[f"{side}_ids"] for side in SIDES)
        masks = tuple(row.get(f"{side}_mask") for side in SIDES)
        return TokenPair(row["prompt_ids"], answers, None if None in masks else masks)


@dataclass
class TextEncoder:
    """Plain text: prompt + answer + EOS, behind the tokenizer's BOS."""

    tokenizer: PreTrainedTokenizerBase
    end: EndOfTurn
    prefix: list[int]

    def __call__(self, row: Row) -> TokenPair:
        prompt = self._ids(row["prompt"])
        full = [self._ids(row["prompt"] + row[side]) for side in SIDES]
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
class ConversationEncoder:
    """Messages, through the chat template."""

    tokenizer: PreTrainedTokenizerBase
    end: EndOfTurn

    def __call__(self, row: Row) -> TokenPair:
        options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        prompt_text = self._render(row["prompt"], options, ask=True)
        texts = [self._render(row["prompt"] + row[side], options) for side in SIDES]
        pair = _split(
            _tokenize(self.tokenizer, prompt_text),
            [_tokenize(self.tokenizer, text) for text in texts],
            rerendered=not all(text.startswith(prompt_text) for text in texts),
        )
        pair.answers = tuple(map(self._end, pair.answers))
        if any(len(row[side]) > 1 for side in SIDES):
            pair.masks = tuple(
                self._turn_mask(row["prompt"], row[side], text, pair.prompt, answer, options)
                for side, text, answer in zip(SIDES, texts, pair.answers, strict=True)
            )
        return pair

    def _render(self, messages: list[dict], options: Mapping[str, Any], ask: bool = False) -> str:
        """The conversation as text; with `ask`, up to where the assistant's next turn begins."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, **options
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRow("template_error", str(error)) from error
        return text if ask or self.end.from_template else text.removesuffix(self.end.tail)

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
        text: str,
        prompt_ids: list[int],
        answer_ids: list[int],
        options: Mapping[str, Any],
    ) -> list[bool]:
        """True for the answer's tokens that belong to assistant turns, with their ends of turn.

        Found by rendering the conversation (`text`) up to each turn and after it.
        """
        ids, start = prompt_ids + answer_ids, len(prompt_ids)
        mask = [False] * len(ids)
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            begin, stop = start, len(ids)
            if index > 0:
                before = self._render(prompt + turns[:index], options, ask=True)
                begin = shared_prefix(ids, self._start_of(text, before))
            if index < len(turns) - 1:
                after = self._start_of(text, self._render(prompt + turns[: index + 1], options))
                stop = shared_prefix(ids, self._end(after) if self.end.from_template else after)
            mask[begin:stop] = [True] * (stop - begin)
        return mask[start:]

    def _start_of(self, text: str, start: str) -> list[int]:
        if not text.startswith(start):
            raise BadRow("template_error", "turns of one answer cannot be told apart")
        return _tokenize(self.tokenizer, start)


def _split(prompt: list[int], full: Sequence[list[int]], *, rerendered: bool) -> TokenPair:
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
    return TokenPair(chosen[:start], (chosen[start:], rejected[start:]), notes=notes)


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


Encoder = IdsEncoder | TextEncoder | ConversationEncoder


def encoder_for(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple["Encoder", EndOfTurn | None]:
    """The encoder for a canonical dataset, and how its answers end (None: as given)."""
    if "prompt_ids" in pairs.column_names:
        return IdsEncoder(), None
    if isinstance(pairs.features["prompt"], List):
        end = learn_end_of_turn(tokenizer)
        return ConversationEncoder(tokenizer, end), end
    end = EndOfTurn(_eos(tokenizer), from_template=False)
    return TextEncoder(tokenizer, end, _special_prefix(tokenizer)), end
