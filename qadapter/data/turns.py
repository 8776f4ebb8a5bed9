"""Where the assistant's turns stand in a rendered conversation.

Templates may write a turn otherwise in the middle of a conversation than at its end (Qwen3's and
DeepSeek's thoughts, Phi-3.5's end of text, gpt-oss's channels), so that a conversation up to a turn
is no prefix of the whole. A turn is found in the whole rendering by rendering it once more with
other texts in that turn: what differs is the turn's own. Where its scaffolding begins and ends is
known from the conversation up to it, where the model is asked for the turn or has just given it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qadapter.data.chat import ChatTemplate, marker, replaced
from qadapter.data.messages import Message
from qadapter.data.report import BadRow


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
    whole = _Rendering(chat, messages, options, text)
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
    """A conversation as text, and where in it each message's own texts are."""

    def __init__(
        self, chat: ChatTemplate, messages: Sequence[Message], options: Mapping[str, Any],
        text: str | None = None, *, ask: bool = False,
    ) -> None:
        self.chat, self.messages, self.options, self.ask = chat, messages, options, ask
        self.text = self._render(messages) if text is None else text
        self._own: dict[int, Span] = {}

    def up_to(self, count: int, *, ask: bool = False) -> _Rendering:
        return _Rendering(self.chat, self.messages[:count], self.options, ask=ask)

    def own(self, index: int) -> Span:
        """What changes in the text with the texts of one message."""
        if index not in self._own:
            self._own[index] = self._changed(index)
        return self._own[index]

    def _changed(self, index: int) -> Span:
        mark, message = marker(self.text), self.messages[index]
        if not message.get("content") and "tool_calls" not in message:
            other = {**message, "content": mark}
        else:
            # A tool's name may stand elsewhere too: with its reply.
            other = replaced(message, lambda _: mark, names=False)
        changed = self._render([*self.messages[:index], other, *self.messages[index + 1 :]])
        if changed == self.text:
            raise _not_found(index, "the template leaves it out")
        start = common_prefix(self.text, changed)
        most = min(len(self.text), len(changed)) - start
        same_end = min(most, common_prefix(self.text[::-1], changed[::-1]))
        return Span(start, len(self.text) - same_end)

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            return self.chat.render(messages, self.options, ask=self.ask)
        except BadRow as bad:  # it takes the whole conversation, but not this part of it
            raise BadRow("turn_not_found", bad.detail) from bad


def _start(whole: _Rendering, index: int) -> int:
    """Where the model goes on from being asked for a turn: behind the message before it and what
    follows that when the turn is asked for. That may end in more than the turn then has (an
    opened thought): as far as the two agree."""
    asked = whole.up_to(index, ask=True)
    if index == 0:
        return common_prefix(whole.text, asked.text)
    before, own = whole.own(index - 1), whole.own(index)
    if before.stop > own.start:
        raise _not_found(index, "it overlaps with the message before it")
    scaffold = asked.text[asked.own(index - 1).stop :]
    shared = common_prefix(whole.text[before.stop :], scaffold)
    start = before.stop + shared
    return start if shared == len(scaffold) else min(start, own.start)


def _stop(whole: _Rendering, index: int) -> tuple[int, bool]:
    """Behind the turn's end of turn, and whether there is one."""
    chat, behind = whole.chat, whole.text[whole.own(index).stop :]
    # As it is where the turn is the last: nothing of another message is in it.
    last = whole if index == len(whole.messages) - 1 else whole.up_to(index + 1)
    tail = last.text[last.own(index).stop :]
    ends = list(chat.special.finditer(tail))
    usual = [end for end in ends if chat.token_id(end.group()) == chat.end.token_id]
    # Others may stand behind the usual one (an end of text behind every rendering). Turns of tool
    # calls may have another, behind the call's own special tokens.
    end = usual[0] if usual else ends[-1] if ends else None
    if end is None or not (usual or not tail[end.end() :].strip()):
        return whole.own(index).stop + common_prefix(behind, tail), False
    # A turn may end with another token in the middle of a conversation, at the same place.
    found = chat.special.match(behind, end.start())
    if found is None or behind[: end.start()] != tail[: end.start()]:
        raise _not_found(index, "it ends otherwise within a conversation than at its end")
    return whole.own(index).stop + found.end(), True


def _not_found(index: int, why: str) -> BadRow:
    return BadRow("turn_not_found", f"message {index}: {why}")


def common_prefix(left: Sequence, right: Sequence) -> int:
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
