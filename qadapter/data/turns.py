"""Where the assistant's turns stand in a rendered conversation.

Templates may write a turn otherwise in the middle of a conversation than at its end (Qwen3's and
DeepSeek's thoughts, Phi-3.5's end of text, gpt-oss's channels), so that a conversation up to a turn
is no prefix of the whole. A turn is found in the whole rendering by rendering it once more with
other texts in that turn: what differs is the turn's own. Where its scaffolding begins and ends is
known from the conversation up to it, where the model is asked for the turn or has just given it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qadapter.data.chat import ChatTemplate, marker, replaced, shape
from qadapter.data.messages import REASONING, Message
from qadapter.data.report import BadRow

_APART = 8
"""Of many messages, those that far apart are looked for in one rendering."""
_MARGIN = 16
"""Characters beside a message's own that may change with it: quotes, brackets."""


class Span(NamedTuple):
    """From a character of a text to before another; `ended`: it ends in an end of turn."""

    start: int
    stop: int
    ended: bool = False


def locate_turns(
    chat: ChatTemplate, messages: Sequence[Message], first: int, text: str,
    options: Mapping[str, Any], continues: int | None = None,
) -> list[Span]:
    """The spans of the assistant's turns in a conversation, in order: what it generates, end of
    turn included, and nothing of the scaffolding that asks for it.

    Args:
        first: the message from which on turns are looked for.
        text: `chat.render(messages, options)`.
        continues: where in `text` what is the assistant's own begins in the turn `first`, where
            that is one the prompt begins.

    Raises:
        BadRow: a turn can't be told from its surroundings.
    """
    wanted = range(max(0, first - 1), len(messages))
    whole = _Rendering(chat, messages, options, text, wanted=wanted)
    spans: list[Span] = []
    done = 0
    for index in range(first, len(messages)):
        if messages[index]["role"] != "assistant":
            # Some templates put a tool's reply into the turn that asked for it.
            if spans and whole.own(index).start < done:
                raise _not_found(index, "it stands within a turn of the assistant's")
            continue
        start = continues if index == first and continues is not None else _start(whole, index)
        stop, ended = _stop(whole, index)
        if not done <= start <= whole.own(index).stop <= stop:
            raise _not_found(index, "it overlaps with another")
        spans.append(Span(start, stop, ended))
        done = stop
    return spans


class _Rendering:
    """A conversation as text, and where in it each message's own texts are.

    Args:
        text: where it is rendered already.
        wanted: the messages that will be asked for.
    """

    def __init__(
        self, chat: ChatTemplate, messages: Sequence[Message], options: Mapping[str, Any],
        text: str | None = None, *, ask: bool = False, wanted: Sequence[int] = (),
    ) -> None:
        self.chat, self.messages, self.options, self.ask = chat, messages, options, ask
        self.text = self._render(messages) if text is None else text
        self.wanted = wanted
        self._own: dict[int, Span] = {}
        self._behind: dict[tuple[Any, ...], list[tuple[str, int]]] = {}

    def up_to(self, count: int, *, ask: bool = False) -> _Rendering:
        return _Rendering(self.chat, self.messages[:count], self.options, ask=ask)

    def own(self, index: int) -> Span:
        """What changes in the text with the texts of one message."""
        if index not in self._own:
            group = [i for i in self.wanted if i % _APART == index % _APART]
            if len(group) > 1 and (found := self._changed_together(group)) is not None:
                self._own |= found
            else:
                self.wanted = ()
                self._own[index] = self._changed(index)
        return self._own[index]

    def behind(self, index: int, *, ask: bool) -> tuple[str, int]:
        """What is written behind a message where it is the last one (with `ask`, and the next turn
        is asked for), and how many of these characters stand behind it here too."""
        own, message = self.own(index), self.messages[index]
        before = self.messages[index - 1]["role"] if index else None
        seen = self._behind.setdefault((ask, before, shape(message)), [])
        # Turns of one shape are scaffolded alike: what was found twice is only looked up.
        if len(seen) > 1 and seen[-1] == seen[-2] and seen[-1][1] == self._shared(own, seen[-1][0]):
            return seen[-1]
        last = self
        if ask or index < len(self.messages) - 1:
            last = self.up_to(index + 1, ask=ask)
        text = last.text[last.own(index).stop :]
        seen.append((text, self._shared(own, text)))
        return seen[-1]

    def _shared(self, own: Span, text: str) -> int:
        return common_prefix(self.text[own.stop : own.stop + len(text)], text)

    def _changed(self, index: int) -> Span:
        mark = marker(self.text)
        changed = self._render([
            *self.messages[:index], _marked(self.messages[index], mark), *self.messages[index + 1 :]
        ])
        if changed == self.text:
            raise _not_found(index, "the template leaves it out")
        start = common_prefix(self.text, changed)
        most = min(len(self.text), len(changed)) - start
        same_end = min(most, common_suffix(self.text, changed))
        return Span(start, len(self.text) - same_end)

    def _changed_together(self, group: Sequence[int]) -> dict[int, Span] | None:
        """`_changed` of messages that stand apart, in one rendering: what is between them is found
        again in the text. None where that is not sure."""
        mark = marker(self.text)
        opening, closing = mark[0], mark[2]
        marks = {index: f"{opening}{index}{closing}" for index in group}
        try:
            changed = self._render([
                _marked(message, marks[index]) if index in marks else message
                for index, message in enumerate(self.messages)
            ])
        except BadRow:
            return None
        there = [
            (int(index), [match.span() for match in matches])
            for index, matches in itertools.groupby(
                re.finditer(f"{opening}([0-9]+){closing}", changed), key=lambda match: match[1]
            )
        ]
        if [index for index, _ in there] != list(group):
            return None
        bounds = [0, *(at for _, spans in there for at in (spans[0][0], spans[-1][1]))]
        pieces = [changed[i:j] for i, j in zip(bounds[::2], bounds[1::2], strict=False)]
        pieces.append(changed[bounds[-1] :])
        found: dict[int, Span] = {}
        end = common_prefix(self.text, pieces[0])
        if len(pieces[0]) - end > _MARGIN:
            return None
        for index, piece in zip(group, pieces[1:], strict=True):
            if index == group[-1]:
                same = min(common_suffix(self.text, piece), len(self.text) - end)
                place = (len(self.text) - same, len(self.text)) if (
                    len(piece) - same <= _MARGIN
                ) else None
            else:
                place = self._find(piece, end, _length(self.messages[index]))
            if place is None:
                return None
            found[index] = Span(end, place[0])
            end = place[1]
        return found

    def _find(self, piece: str, after: int, most: int) -> tuple[int, int] | None:
        """Where a piece stands in the text, but for a few characters at its ends.

        Args:
            most: characters between `after` and the piece.
        """
        cut = _MARGIN if len(piece) > 4 * _MARGIN else 0
        core, window = piece[cut : len(piece) - cut], after + most + 2 * _MARGIN + len(piece)
        at = self.text.find(core, after, window)
        if at < 0 or self.text.find(core, at + 1, window) >= 0:
            return None
        before = self.text[max(after, at - cut) : at]
        start = at - common_suffix(before, piece[:cut])
        stop = at + len(core)
        tail = piece[len(piece) - cut :]
        return start, stop + common_prefix(self.text[stop : stop + len(tail)], tail)

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            return self.chat.render(messages, self.options, ask=self.ask)
        except BadRow as bad:  # it takes the whole conversation, but not this part of it
            raise BadRow("turn_not_found", bad.detail) from bad


def _marked(message: Message, mark: str) -> Message:
    if not message.get("content") and "tool_calls" not in message:
        return {**message, "content": mark}
    # A tool's name may stand elsewhere too: with its reply.
    return replaced(message, lambda _: mark, names=False)


def _length(message: Message) -> int:
    """The most characters that a message's texts may take, about."""
    return len(message.get("content") or "") + sum(
        len(json.dumps(call)) for call in message.get("tool_calls", ())
    ) + sum(len(str(message.get(name) or "")) for name in REASONING)


def _start(whole: _Rendering, index: int) -> int:
    """Where the model goes on from being asked for a turn: behind the message before it and what
    follows that when the turn is asked for. That may end in more than the turn then has (an
    opened thought): as far as the two agree."""
    if index == 0:
        return common_prefix(whole.text, whole.up_to(0, ask=True).text)
    before, own = whole.own(index - 1), whole.own(index)
    if before.stop > own.start:
        raise _not_found(index, "it overlaps with the message before it")
    scaffold, shared = whole.behind(index - 1, ask=True)
    start = before.stop + shared
    return start if shared == len(scaffold) else min(start, own.start)


def _stop(whole: _Rendering, index: int) -> tuple[int, bool]:
    """Behind the turn's end of turn, and whether there is one."""
    chat, own = whole.chat, whole.own(index)
    # As it is where the turn is the last: nothing of another message is in it.
    tail, shared = whole.behind(index, ask=False)
    ends = list(chat.special.finditer(tail))
    usual = [end for end in ends if chat.token_id(end.group()) == chat.end.token_id]
    # Others may stand behind the usual one (an end of text behind every rendering). Turns of tool
    # calls may have another, behind the call's own special tokens.
    end = usual[0] if usual else ends[-1] if ends else None
    if end is None or not (usual or not tail[end.end() :].strip()):
        return own.stop + shared, False
    # A turn may end with another token in the middle of a conversation, at the same place.
    found = chat.special.match(whole.text, own.stop + end.start())
    if found is None or shared < end.start():
        raise _not_found(index, "it ends otherwise within a conversation than at its end")
    return found.end(), True


def _not_found(index: int, why: str) -> BadRow:
    return BadRow("turn_not_found", f"message {index}: {why}")


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many elements two strings or lists share at their start."""
    low, high, step = 0, min(len(left), len(right)), 64
    # Slices are compared at the speed of memory; a loop over elements is not.
    while low < high:
        end = min(low + step, high)
        if left[low:end] != right[low:end]:
            high = end - 1
            break
        low, step = end, 2 * step
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_suffix(left: str, right: str) -> int:
    """How many characters two strings share at their end."""
    return common_prefix(left[::-1], right[::-1])
