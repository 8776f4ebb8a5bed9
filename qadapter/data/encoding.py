"""Prompts and pairs to token ids: where an answer begins, and how it ends."""

import bisect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from datasets import Dataset, List
from transformers import PreTrainedTokenizerBase

from qadapter.data.arrow import Row
from qadapter.data.chat import ChatTemplate, EndOfTurn, Lost, eos_of
from qadapter.data.messages import Message, answered, normal_messages
from qadapter.data.report import BadRow
from qadapter.data.tokens import SectionedText, token_ids
from qadapter.data.turns import Span, common_prefix, locate_turns
from qadapter.errors import QAdapterError

SIDES = ("chosen", "rejected")


class PlainText(str):
    """A prompt of plain text, continued as it stands: never put through a chat template."""

    __slots__ = ()


Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Sequence[int]
"""A user's message, `PlainText`, a conversation, a row with a `prompt` and perhaps `tools` and
`chat_template_kwargs`, or token ids."""


def prompt_of(row: Row) -> Prompt:
    """The prompt of a canonical row, with all that its tokens depend on."""
    if "prompt_ids" in row:
        return row["prompt_ids"]
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return PlainText(prompt)
    more = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
    return {"prompt": prompt, **more} if more else prompt


def messages_of(prompt: Prompt) -> list[Message] | None:
    """The messages of a prompt, as they are written; None for token ids."""
    said: Any = prompt["prompt"] if isinstance(prompt, Mapping) else prompt
    if isinstance(said, str):
        return [{"role": "user", "content": str(said)}]
    return list(said) if isinstance(said[0], Mapping) else None


class PromptEncoder:
    """Prompts to token ids, up to where an answer begins: as training sees them, for every use."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.chat = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self.prefix = special_prefix(tokenizer)

    def __call__(self, prompt: Prompt) -> list[int]:
        """Token ids. A string is one user turn, through the chat template where the tokenizer has
        one. A conversation that ends with the assistant's turn is continued in it.

        Raises:
            QAdapterError: empty; a conversation for a tokenizer without a chat template, or one
                that its template refuses.
        """
        if _is_empty(prompt):
            raise QAdapterError("the prompt is empty")
        plain = isinstance(prompt, PlainText) or (isinstance(prompt, str) and self.chat is None)
        if plain:
            return encode_text(self.tokenizer, str(prompt), self.prefix)
        if messages_of(prompt) is None:
            return list(cast(Sequence[int], prompt))
        chat, messages, options = self._conversation(prompt)
        try:
            text = chat.prompt(messages, options)
        except BadRow as bad:
            raise QAdapterError(f"{chat.name} can't render a prompt: {bad.detail}") from bad
        return token_ids(self.tokenizer, text)

    def lost(self, prompt: Prompt) -> tuple[Lost, ...]:
        """What of a prompt the chat template leaves out."""
        if self.chat is None or isinstance(prompt, PlainText) or messages_of(prompt) is None:
            return ()
        chat, messages, options = self._conversation(prompt)
        return chat.lost(messages, options)

    def _conversation(
        self, prompt: Prompt
    ) -> tuple[ChatTemplate, list[Message], dict[str, Any]]:
        chat = self.chat or ChatTemplate(self.tokenizer)  # says why there is none, and the way out
        try:
            messages = normal_messages(messages_of(prompt), "prompt")
            options = chat.options_of(prompt if isinstance(prompt, Mapping) else {})
        except BadRow as bad:
            raise QAdapterError(f"a prompt can't be used: {bad.description}") from bad
        return chat, messages, options


def _is_empty(prompt: Prompt) -> bool:
    value = prompt["prompt"] if isinstance(prompt, Mapping) else prompt
    return len(value) == 0 or (isinstance(value, str) and not value.strip())


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before plain text: [BOS] or nothing."""
    # Not every vocabulary has every letter: its own tokens are tried too.
    special = set(tokenizer.all_special_ids)
    own = (str(tokenizer.decode([i])) for i in range(len(tokenizer)) if i not in special)
    for text in itertools.chain("a", own):
        try:
            plain = token_ids(tokenizer, text)
        except Exception:  # what a tokenizer without a token for the unknown raises is one
            continue
        if plain:
            whole = tokenizer(text)["input_ids"]
            starts = range(len(whole) - len(plain) + 1)
            return whole[: next((i for i in starts if whole[i : i + len(plain)] == plain), 0)]
    return tokenizer("")["input_ids"]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, prefix: list[int]) -> list[int]:
    """Plain text behind the tokenizer's prefix, which may be written out in it."""
    ids = token_ids(tokenizer, text)
    return ids if ids[: len(prefix)] == prefix else prefix + ids


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
        answers = row["chosen_ids"], row["rejected_ids"]
        chosen, rejected = row.get("chosen_mask"), row.get("rejected_mask")
        masks = None if chosen is None or rejected is None else (chosen, rejected)
        return TokenPair(row["prompt_ids"], answers, masks)


@dataclass
class TextEncoder:
    """Plain text: prompt + answer + EOS, behind the tokenizer's BOS."""

    tokenizer: PreTrainedTokenizerBase
    end: EndOfTurn
    prefix: list[int]

    def __call__(self, row: Row) -> TokenPair:
        prompt = encode_text(self.tokenizer, row["prompt"], self.prefix)
        full = [
            encode_text(self.tokenizer, row["prompt"] + row[side], self.prefix) for side in SIDES
        ]
        pair = _split(prompt, *full)
        for answer in pair.answers:
            if not answer or answer[-1] != self.end.token_id:
                answer.append(self.end.token_id)
        return pair


@dataclass
class ConversationEncoder:
    """Messages, through the chat template."""

    tokenizer: PreTrainedTokenizerBase
    chat: ChatTemplate

    def __post_init__(self) -> None:
        self.token_ids = SectionedText(self.tokenizer)

    def __call__(self, row: Row) -> TokenPair:
        options = self.chat.options_of(row)
        prompt = self.chat.prompt(row["prompt"], options)
        sides = [_Side(self.chat, row, side, prompt, options) for side in SIDES]
        if all(side.is_plain for side in sides):
            pair = _split(self.token_ids(prompt), *(self.token_ids(s.text) for s in sides))
            chosen, rejected = pair.answers
            pair.answers = self._end(chosen), self._end(rejected)
        else:
            pair = self._split_by_turns(sides)
        notes = {note for side in sides for note in side.notes}
        pair.notes += sorted(notes)
        return pair

    def _end(self, ids: list[int]) -> list[int]:
        """`ids` up to and with the last end of turn, appended if there is none."""
        end = self.chat.end.token_id
        if self.chat.end.from_template and end in ids:
            return ids[: len(ids) - ids[::-1].index(end)]
        return ids if ids and ids[-1] == end else [*ids, end]

    def _split_by_turns(self, sides: list["_Side"]) -> TokenPair:
        """Answers from where the assistant's first turn begins (or where the two conversations
        part, if that is earlier), with what is the assistant's own marked."""
        full, starts = [], []
        for side in sides:
            ids, mask = self._marked(side)
            full.append((ids, mask))
            starts.append(mask.index(True) if True in mask else len(ids))
        (chosen, chosen_mask), (rejected, rejected_mask) = full
        start = min(*starts, common_prefix(chosen, rejected))
        return TokenPair(
            chosen[:start], (chosen[start:], rejected[start:]),
            (chosen_mask[start:], rejected_mask[start:]),
            ["prompt_rerendered"] if any(side.rerendered for side in sides) else [],
        )

    def _marked(self, side: "_Side") -> tuple[list[int], list[bool]]:
        """The conversation's tokens, and which of them are the assistant's own.

        A token across the start of a turn is the turn's, one across its end is not.
        """
        spans = side.spans()
        ids, position = _positions(self.tokenizer, side.text, self.chat.special)
        mask = [False] * len(ids)
        for span in spans:
            start, stop = position(span.start), position(span.stop)
            mask[start:stop] = [True] * (stop - start)
        stop = position(spans[-1].stop)
        ids, mask = ids[:stop], mask[:stop]
        if not spans[-1].ended:
            ids.append(self.chat.end.token_id)
            mask.append(True)
        return ids, mask


def _positions(
    tokenizer: PreTrainedTokenizerBase, text: str, special: re.Pattern[str]
) -> tuple[list[int], Callable[[int], int]]:
    """The text's tokens, and a function from a character to how many tokens end before it.

    Args:
        special: matches the tokenizer's special tokens.
    """
    if tokenizer.is_fast:
        found = tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        ends = [end for _, end in found["offset_mapping"]]
        return found["input_ids"], lambda character: bisect.bisect_right(ends, character)
    ids = token_ids(tokenizer, text)
    # Special tokens cut a text into sections, of which only a character's own is looked into.
    starts = sorted({0, *(match.start() for match in special.finditer(text))})
    sections = [
        token_ids(tokenizer, text[start:stop])
        for start, stop in itertools.pairwise([*starts, len(text)])
    ]
    if list(itertools.chain.from_iterable(sections)) != ids:
        starts, sections = [0], [ids]
    before = [0, *itertools.accumulate(map(len, sections))]

    def position(character: int) -> int:
        section = bisect.bisect_right(starts, character) - 1
        part = token_ids(tokenizer, text[starts[section] : character])
        return before[section] + common_prefix(sections[section], part)

    return ids, position


class _Side:
    """One of a pair's two conversations, rendered."""

    def __init__(
        self, chat: ChatTemplate, row: Row, side: str, prompt: str, options: dict[str, Any]
    ) -> None:
        self.chat, self.side, self.prompt, self.options = chat, side, prompt, options
        self.messages = answered(row["prompt"], row[side])
        self.continues = row["prompt"][-1]["role"] == "assistant"
        self.first = len(row["prompt"]) - self.continues
        """The message the answer begins in."""
        self.text = chat.render(self.messages, options)
        self.rerendered = not self.text.startswith(prompt)
        self.is_plain = (
            not self.rerendered and len(row[side]) == 1 and "tool_calls" not in row[side][0]
        )
        self.notes = self._check()

    def _check(self) -> set[str]:
        """Notes on what the template leaves out of the prompt.

        Raises:
            BadRow: it leaves out something of the answer.
        """
        notes = set()
        for lost in self.chat.lost(self.messages, self.options):
            if lost.what == "reasoning":
                notes.add("reasoning_left_out")
            elif lost.index < self.first:
                notes.add("prompt_left_out")
            else:
                role = self.messages[lost.index]["role"]
                raise BadRow(
                    "answer_left_out",
                    f"{lost.what} of a turn of {self.side} (role {role})",
                )
        at = 0
        for message in self.messages[self.first :]:
            if message["role"] == "assistant" and (content := message.get("content")):
                found = self.text.find(content.strip(), at)
                if found < 0 and content.strip() not in self.text:
                    notes.add("turn_rewritten")
                at = max(at, found)  # turns stand in their order
        return notes

    def spans(self) -> list[Span]:
        continues = None
        if self.continues:
            continues = common_prefix(self.text, self.prompt)
        return locate_turns(
            self.chat, self.messages, self.first, self.text, self.options, continues
        )


def _split(prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenPair:
    """Divide tokenized conversations where the tokens of the prompt end.

    Where those are no prefix of both, a token spans prompt and answer, and the answer begins with
    it.
    """
    start = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    notes = ["boundary_merged"] if start < len(prompt) else []
    return TokenPair(chosen[:start], (chosen[start:], rejected[start:]), notes=notes)


Encoder = IdsEncoder | TextEncoder | ConversationEncoder


def encoder_for(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple["Encoder", EndOfTurn | None]:
    """The encoder for a canonical dataset, and how its answers end (None: as given)."""
    if "prompt_ids" in pairs.column_names:
        return IdsEncoder(), None
    if isinstance(pairs.features["prompt"], List):
        chat = ChatTemplate(tokenizer)
        return ConversationEncoder(tokenizer, chat), chat.end
    end = EndOfTurn(eos_of(tokenizer), from_template=False)
    return TextEncoder(tokenizer, end, special_prefix(tokenizer)), end
