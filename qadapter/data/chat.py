"""A tokenizer's chat template: how it takes messages, what it leaves out, how it ends a turn."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, combinations, product
from typing import Any, NamedTuple, cast

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from qadapter.data.messages import REASONING, Message
from qadapter.data.report import BadRow
from qadapter.errors import QAdapterError

# Something no template writes itself, to find what it puts after an answer.
_PROBE = "qadapter-probe-answer"
# Private-use characters: in no text, left alone by trimming and changes of case, and escaped where
# a template prints Python objects instead of what is in them.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKS = re.compile(f"{_OPEN}[0-9]+{_CLOSE}")
_WAY_OUT = (
    "--chat_template plain gives it the roles as words, --chat_template FILE a template of your "
    "own (in Python: chat_template_path)"
)
_MOST_PLANNED = 100_000
"""Messages in all shapes of conversations that are remembered."""
_MOST_ROLES = 6
"""Of which any may need lists of parts while others don't: more aren't tried one by one."""


class EndOfTurn(NamedTuple):
    """The token that ends an answer.

    `from_template`: whether the chat template writes it; else the tokenizer's eos token is
    appended, once `tail`, the template's text behind an answer, is removed.
    """

    token_id: int
    from_template: bool
    tail: str = ""


class Lost(NamedTuple):
    """What a template leaves out: `what` ("content", "tool calls", "reasoning", "tools") of the
    message `index` (-1 for the tools, which are the conversation's)."""

    what: str
    index: int  # type: ignore[assignment]  # and no tuple's method


class _Form(NamedTuple):
    """How a template takes a conversation."""

    parts: frozenset[str] = frozenset()
    """Roles whose content it takes as a list of parts (processors of images do)."""
    arguments: Callable[[dict[str, Any]], Any] = dict
    """Of tool calls: as objects, or as JSON text."""
    empty: bool = False
    """Whether a turn of tool calls alone needs an empty content."""
    developer: str = "developer"
    """What the role is called: OpenAI's name, or the system's for templates that know no other."""


class _Plan(NamedTuple):
    form: _Form
    lost: tuple[Lost, ...]


def learn_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn:
    """Find the token a chat template ends an assistant's turn with.

    It is the first special token the template writes behind the answer of a probe conversation:
    the eos token often is another one, and the model generates on when it never learned this one.

    Raises:
        QAdapterError: no chat template, one that cannot render a question and its answer, or one
            that writes no such token for a tokenizer without eos token.
    """
    return ChatTemplate(tokenizer).end


def eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's eos token.

    Raises:
        QAdapterError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise QAdapterError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos token to end an answer with"
        )
    return tokenizer.eos_token_id


class ChatTemplate:
    """Renders conversations (`normal_messages`) as text.

    How the template takes them is tried once for every shape of conversation, with marks in place
    of texts: content as text or as a list of parts, arguments of tool calls as objects or as JSON
    text. What of the marks appears in no form is left out by the template.

    Args:
        name: what the template is called in errors; default: by the tokenizer's folder.

    Raises:
        QAdapterError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise QAdapterError(
                f"the data is conversational, but the tokenizer {tokenizer.name_or_path!r} has no "
                f"chat template: {_WAY_OUT}; or take an instruction-tuned base, or plain text"
            )
        self.tokenizer = tokenizer
        self.name = name or f"the chat template of {tokenizer.name_or_path!r}"
        self._plans: dict[Any, _Plan] = {}
        self._planned = 0
        names = inspect.signature(tokenizer.apply_chat_template).parameters
        # How to render, what is rendered, and the special tokens, which mark turns.
        self._reserved = set(names) - {"documents", "kwargs"} | set(tokenizer.special_tokens_map)
        self._reserved |= {"messages", "conversations", "self"}

    @functools.cached_property
    def end(self) -> EndOfTurn:
        """See `learn_end_of_turn`; its errors."""
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self._apply(probe, self._plan(probe, {}).form, {})
        except BadRow as bad:
            raise QAdapterError(
                f"{self.name} cannot render a conversation: {bad.detail}"
            ) from bad
        _, found, tail = text.rpartition(_PROBE)
        if not found:
            raise QAdapterError(
                f"{self.name} renders a question and its answer without the answer"
            )
        special = self.special.search(tail)
        if special is not None:
            return EndOfTurn(self.token_id(special.group()), from_template=True)
        return EndOfTurn(eos_of(self.tokenizer), from_template=False, tail=tail)

    @functools.cached_property
    def special(self) -> re.Pattern[str]:
        """Matches the tokenizer's special tokens in a text."""
        tokens = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        tokens |= set(self.tokenizer.all_special_tokens)
        ordered = sorted(tokens - {""}, key=lambda token: (-len(token), token))
        # Without any, what matches nowhere.
        return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def token_id(self, token: str) -> int:
        return cast(int, self.tokenizer.convert_tokens_to_ids(token))

    # --- rendering ------------------------------------------------------------------------

    def render(
        self, messages: Sequence[Message], options: Mapping[str, Any], *, ask: bool = False
    ) -> str:
        """The conversation as text; with `ask`, up to where the assistant's next turn begins.

        Args:
            options: `options_of` a row.

        Raises:
            BadRow: the template refuses it.
        """
        text = self._apply(messages, self._plan(messages, options).form, options, ask=ask)
        return text if ask or self.end.from_template else text.removesuffix(self.end.tail)

    def whole(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        """The conversation with all that the template writes behind it.

        Raises:
            BadRow: the template refuses it.
        """
        return self._apply(messages, self._plan(messages, options).form, options)

    def prompt(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        """The conversation up to where an answer begins: the assistant's next turn or, where the
        last turn is the assistant's, what follows in it.

        Raises:
            BadRow: the template refuses it, or it ends with a tool call.
        """
        if messages[-1]["role"] != "assistant":
            return self.render(messages, options, ask=True)
        if "tool_calls" in messages[-1]:
            raise BadRow(
                "answer_role", "the prompt ends with the assistant's tool call: the tool's reply "
                "must follow"
            )
        form = self._plan(messages, options).form
        return self._apply(messages, form, options, continue_final_message=True)

    def options_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the template gets besides the messages: a row's `tools` and
        `chat_template_kwargs`.

        Raises:
            BadRow: keywords that are no variables of a template's own.
        """
        keywords = row.get("chat_template_kwargs") or {}
        for name in keywords:
            if name in self._reserved:
                raise BadRow("template_error", f"chat_template_kwargs can't set {name!r}")
        return {"tools": row.get("tools") or None, **keywords}

    def _apply(
        self, messages: Sequence[Message], form: _Form, options: Mapping[str, Any], *,
        ask: bool = False, continue_final_message: bool = False,
    ) -> str:
        try:
            return cast(str, self.tokenizer.apply_chat_template(
                [_in_form(message, form) for message in messages], tokenize=False,
                add_generation_prompt=ask, continue_final_message=continue_final_message,
                **options,
            ))
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, TemplateSyntaxError):
                reason += f" (line {error.lineno})"
            raise BadRow("template_error", reason) from error

    # --- what it takes, and what it leaves out ---------------------------------------------

    def lost(
        self, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> tuple[Lost, ...]:
        """What of a conversation appears nowhere in its rendering."""
        return self._plan(messages, options).lost

    def _plan(self, messages: Sequence[Message], options: Mapping[str, Any]) -> _Plan:
        keywords = {name: value for name, value in options.items() if name != "tools"}
        key = (
            tuple(map(shape, messages)), bool(options.get("tools")),
            json.dumps(keywords, sort_keys=True, default=str) if keywords else "",
        )
        if key not in self._plans:
            self._planned += len(messages)
            if self._planned > _MOST_PLANNED:
                self._plans.clear()
                self._planned = len(messages)
            self._plans[key] = self._make_plan(messages, options)
        return self._plans[key]

    def _make_plan(self, messages: Sequence[Message], options: Mapping[str, Any]) -> _Plan:
        marked, marks = _marked(messages)
        best: tuple[_Form, str, set[Lost]] | None = None
        for form in _forms(messages):
            try:
                text = self._apply(marked, form, options)
            except BadRow:
                continue
            there = set(_MARKS.findall(text))
            lost = {lost for mark, lost in marks.items() if mark not in there}
            if best is None or len(lost) < len(best[2]):
                best = form, text, lost
            if not lost:
                break
        if best is None:  # then the texts are refused too, with a reason that names them
            return _Plan(_Form(), ())
        form, text, lost = best
        if options.get("tools"):
            try:
                without = self._apply(marked, form, {**options, "tools": None})
            except BadRow:
                without = ""
            lost |= {Lost("tools", -1)} if without == text else set()
        return _Plan(form, tuple(sorted(lost, key=lambda x: (x.index, x.what))))


def shape(message: Message) -> tuple[Any, ...]:
    """All of a message that how it is rendered may depend on, but for its texts."""
    calls = message.get("tool_calls", ())
    return (
        message["role"], message.get("content") is None, bool(message.get("content")),
        tuple(bool(call["function"]["arguments"]) for call in calls),
        tuple(name for name in REASONING if message.get(name)),
    )


def _marked(messages: Sequence[Message]) -> tuple[list[Message], dict[str, Lost]]:
    """The messages with a mark for every text, and what each mark stands for."""
    marks: dict[str, Lost] = {}

    def mark(what: str, index: int) -> str:
        text = f"{_OPEN}{len(marks)}{_CLOSE}"
        marks[text] = Lost(what, index)
        return text

    return [
        replaced(message, functools.partial(mark, index=index))
        for index, message in enumerate(messages)
    ], marks


def replaced(message: Message, text: Callable[[str], str], *, names: bool = True) -> Message:
    """A message with every text in it replaced, but for an empty content; tool calls get other
    arguments and, with `names`, other names.

    Args:
        text: what is replaced ("content", "tool calls", "reasoning") → the new text.
    """
    found = dict(message)
    if found.get("content"):
        found["content"] = text("content")
    if thoughts := [name for name in REASONING if found.get(name)]:
        # One text: transformers copies it to the other names.
        found |= dict.fromkeys(thoughts, text("reasoning"))
    if "tool_calls" in found:
        found["tool_calls"] = [_replaced_call(call, text, names) for call in found["tool_calls"]]
    return found


def _replaced_call(
    call: dict[str, Any], text: Callable[[str], str], names: bool
) -> dict[str, Any]:
    function = {**call["function"], "arguments": {text("tool calls"): text("tool calls")}}
    return {**call, "function": function | ({"name": text("tool calls")} if names else {})}


def marker(text: str) -> str:
    """A mark that is not in `text`, nor is its first or last character."""
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    return next(free) + "0" + next(free)


def _forms(messages: Sequence[Message]) -> list[_Form]:
    """All that may be tried, the usual one first."""
    roles = sorted({message["role"] for message in messages})
    sizes = range(1, len(roles)) if len(roles) <= _MOST_ROLES else ()
    subsets = chain.from_iterable(combinations(roles, n) for n in sizes)
    parts = [frozenset(), frozenset(roles), *map(frozenset, subsets)]
    calls = [m for m in messages if "tool_calls" in m]
    arguments = [dict, _as_json] if calls else [dict]
    empty = [False, True] if any(m.get("content") is None for m in calls) else [False]
    developer = ["developer", "system"] if "developer" in roles else ["developer"]
    return [_Form(*form) for form in product(parts, arguments, empty, developer)]


def _as_json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _in_form(message: Message, form: _Form) -> Message:
    found = dict(message)
    if found["role"] == "developer":
        found["role"] = form.developer
    if form.empty and found.get("content") is None:
        found["content"] = ""
    if message["role"] in form.parts and found.get("content") is not None:
        found["content"] = [{"type": "text", "text": found["content"]}]
    if form.arguments is not dict and "tool_calls" in found:
        found["tool_calls"] = [
            {**call, "function": {
                **call["function"], "arguments": form.arguments(call["function"]["arguments"])
            }}
            for call in found["tool_calls"]
        ]
    return found
