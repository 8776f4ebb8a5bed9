"""Messages in one form, whatever they came as: content as text, tool calls with objects."""

from collections.abc import Mapping
from typing import Any

from qadapter.data.report import BadRow
from qadapter.errors import QAdapterError
from qadapter.system.documents import parse_json

Message = dict[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which a message carries what was thought before its content."""
_TEXT_PARTS = ("text", "input_text", "output_text")


def normal_messages(value: Any, key: str) -> list[Message]:
    """Messages as every use of them takes them, so that one conversation has the same tokens in
    all the forms it is written in.

    `content` is text: a list of parts is joined. Tool calls are
    ``{"type": "function", "function": {"name": …, "arguments": {…}}}``: arguments given as a JSON
    string (OpenAI's form) are parsed, and OpenAI's older `function_call` and role "function" become
    a tool call and a tool's reply. What is null or an empty list of calls is left out.

    Args:
        key: where they stand, for messages.

    Raises:
        BadRow: no list of messages, a part that is not text, arguments that are no JSON object.
    """
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{key} is a {type(value).__name__}, not a list of messages")
    return [_normal(message, f"{key}[{index}]") for index, message in enumerate(value)]


def answered(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """The whole conversation. Where the prompt ends with the assistant's turn, the answer goes on
    in it: the two are one turn."""
    if prompt[-1]["role"] != "assistant":
        return [*prompt, *answer]
    begun, (rest, *others) = prompt[-1], answer
    content = begun.get("content", "") + rest.get("content", "")
    return [*prompt[:-1], {**begun, **rest, "content": content}, *others]


def _normal(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRow("bad_messages", f"{where} has no role")
    found = {name: value for name, value in message.items() if value is not None}
    calls = found.pop("tool_calls", None) or []
    if "function_call" in found:
        calls = [found.pop("function_call")]
    if found["role"] == "function":
        found["role"] = "tool"
    calls = _parsed(calls, where, "tool_calls") if isinstance(calls, str) else calls
    if calls and not isinstance(calls, list):
        raise BadRow("bad_messages", f"{where}.tool_calls is a {type(calls).__name__}")
    if calls:
        found["tool_calls"] = [_normal_call(call, where) for call in calls]
    if "content" in found:
        found["content"] = _text(found["content"], where)
    elif not calls:
        raise BadRow("bad_messages", f"{where} has no text as content")
    return found


def _text(content: Any, where: str) -> str:
    """The text of a content, which may be a list of parts."""
    if not isinstance(content, str):
        parts = [content] if isinstance(content, Mapping) else content
        if not isinstance(parts, list):
            raise BadRow(
                "bad_messages", f"{where} has no text as content, but a {type(content).__name__}"
            )
        return "".join(_text_of_part(part, where) for part in parts)
    return content


def _text_of_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise BadRow("bad_messages", f"{where} holds a part that is a {type(part).__name__}")
    kind = part.get("type", "text")
    if kind not in _TEXT_PARTS:
        raise BadRow("not_text", f"{where} holds a part of type {kind!r}")
    if not isinstance(part.get("text"), str):
        raise BadRow("bad_messages", f"{where} holds a part of type {kind!r} without text")
    return part["text"]


def _normal_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("bad_messages", f"{where} has a tool call without a name")
    arguments = function.get("arguments")
    what = f"the arguments of the tool call {function['name']!r}"
    if isinstance(arguments, str):  # none are written as an empty string too
        arguments = _parsed(arguments, where, what) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise BadRow("bad_messages", f"{where}: {what} are no JSON object")
    more = {name: call[name] for name in ("id", "index") if call.get(name) is not None}
    return {**more, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def _parsed(text: str, where: str, what: str) -> Any:
    try:
        return parse_json(text, "the text", surrogates=True)
    except QAdapterError as error:
        raise BadRow("bad_messages", f"{where}: {what} are not read: {error}") from error
