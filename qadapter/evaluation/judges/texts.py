"""Preference pairs as texts: what judges are trained on and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qadapter.data import Prompt, messages_of, prompt_of
from qadapter.data.messages import normal_messages
from qadapter.data.report import BadRow
from qadapter.errors import QAdapterError


class PreferenceTexts(NamedTuple):
    """One entry a pair."""

    prompts: list[Prompt]
    chosen: list[str]
    rejected: list[str]
    prompt_ids: list[str]
    """The ``prompt_id`` of ``load_preferences``: equal for equal prompts, in any dataset."""


def preference_texts(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreferenceTexts:
    """Canonical pairs as texts; unusable pairs, and those whose answers read alike, are left out.

    Args:
        pairs: from ``load_preferences``.
        tokenizer: needed for pairs that are token ids.

    Raises:
        QAdapterError: no pair left; token ids without a tokenizer.
    """
    found = PreferenceTexts([], [], [], [])
    for row in pairs:
        if row["problem"] is not None:
            continue
        prompt = prompt_of(row)
        if "prompt_ids" in row:
            if tokenizer is None:
                raise QAdapterError("pairs of token ids can't be judged without their tokenizer")
            chosen, rejected = (
                tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True)
                for side in ("chosen", "rejected")
            )
        else:
            chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
        if chosen.strip() == rejected.strip():
            continue
        for column, value in zip(
            found, (prompt, chosen.strip(), rejected.strip(), row["prompt_id"]), strict=True
        ):
            column.append(value)
    if not found.prompts:
        raise QAdapterError("no pair can be judged: their answers are unusable or all alike")
    return found


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a judge reads it: a lone user's message as it is, a conversation with its roles
    and the tools it was given.

    Raises:
        QAdapterError: token ids, or messages that are none.
    """
    if isinstance(prompt, str):
        return str(prompt)
    messages = judged_messages(prompt)
    tools = prompt.get("tools") if isinstance(prompt, Mapping) else None
    if len(messages) == 1 and not tools:
        return message_text(messages[0])
    turns = [f"{message['role']}: {message_text(message)}" for message in messages]
    return "\n\n".join(([f"tools: {_json(tools)}"] if tools else []) + turns)


def judged_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt's messages in their one form.

    Raises:
        QAdapterError: token ids, or messages that are none.
    """
    messages = messages_of(prompt)
    if messages is None:
        raise QAdapterError("this judge reads text: prompts given as token ids can't be judged")
    try:
        return normal_messages(messages, "prompt")
    except BadRow as bad:
        raise QAdapterError(f"a prompt can't be judged: {bad.description}") from bad


def message_text(message: Mapping[str, Any]) -> str:
    """What a message says: its content, then its tool calls as ``name({…})``."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [f"{function['name']}({_json(function['arguments'])})" for function in functions]
    return "\n".join(filter(None, [message.get("content"), *calls]))


def _text(answer: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(answer, str):
        return answer
    return "\n\n".join(filter(None, map(message_text, answer)))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
