"""What an adapter rewards in an answer, token by token."""

from __future__ import annotations

import dataclasses
from typing import Any

from qadapter.data import as_preferences, tokenize_preferences
from qadapter.errors import QAdapterError
from qadapter.evaluation.token_rewards import RewardedAnswer, reward_answers
from qadapter.serving.models import ServedModel, ServedModels
from qadapter.serving.requests import (
    Fields,
    RequestError,
    find_model,
    messages_field,
    text_field,
)

_FIELDS = {"model", "messages", "answer"}


@dataclasses.dataclass(frozen=True)
class ToReward:
    """A prompt and an answer to it, as training would tokenize them."""

    served: ServedModel
    prompt: list[int]
    answer: list[int]


def read_rewards(body: Any, models: ServedModels, max_length: int) -> ToReward:
    """A body of /v1/qadapter/rewards.

    Raises:
        RequestError: names the field.
    """
    fields = Fields(body, _FIELDS)
    served = find_model(models, fields)
    if served.policy is None:
        raise RequestError(f"{served.name} is the base: it rewards nothing", "model")
    messages = messages_field(fields, "messages")
    answer = text_field(fields, "answer")
    row = {"prompt": messages} | {
        side: [{"role": "assistant", "content": text}]
        # Tokenization takes pairs; this partner is not looked at.
        for side, text in (("chosen", answer), ("rejected", answer + " ?"))
    }
    try:
        found = tokenize_preferences(as_preferences([row]), served.tokenizer, max_length=None)
        [tokens] = found.dataset
    except (QAdapterError, ValueError) as error:
        raise RequestError(f"this conversation can't be tokenized: {error}", "messages") from error
    length = len(tokens["prompt_ids"]) + len(tokens["chosen_ids"])
    if length > max_length:
        raise RequestError(
            f"this server takes {max_length:,} tokens of prompt and answer together, and these "
            f"have {length:,}", "answer", code="context_length_exceeded",
        )
    return ToReward(served, tokens["prompt_ids"], tokens["chosen_ids"])


def rewards(models: ServedModels, asked: ToReward) -> dict[str, Any]:
    """Rewards in nats; null for a token that is not the model's own. The texts of the tokens join
    to the answer: a token that ends it, or is no whole character yet, has none."""
    served = asked.served
    with models.rewards_apart(served):
        [found] = reward_answers(served.model, served.tokenizer, asked.prompt, [asked.answer])
    return {"model": served.name, "tokens": _tokens(found, served), "total": found.total}


def _tokens(found: RewardedAnswer, served: ServedModel) -> list[dict[str, Any]]:
    ends = (i for i, token in enumerate(found.token_ids) if token in served.ends)
    end = next(ends, len(found.token_ids))
    return [
        {"text": piece if i < end else "", "reward": reward if own else None}
        for i, (piece, reward, own) in enumerate(
            zip(found.pieces, found.rewards, found.scored, strict=True)
        )
    ]
