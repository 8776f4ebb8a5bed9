"""What clients ask for: OpenAI's fields and ours, checked one by one.

What can't be honoured is refused with the field's name; nothing is ignored but what only names or
files a request away.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from qadapter.data import PlainText, check_sequences
from qadapter.errors import QAdapterError, listed, nearest, shown
from qadapter.serving.models import ServedModel, ServedModels
from qadapter.serving.sampling import Sampling

MAX_STRENGTH = 4.0
_MOST_ANSWERS, _MOST_STOPS, _MOST_TOP = 128, 16, 20
_COMPLETION_TOKENS = 16
"""What OpenAI's completions write where max_tokens is not given."""


class RequestError(Exception):
    """What a client is told.

    Args:
        param: the field it is about.
        kind, code: OpenAI's ``type`` and ``code``.
    """

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400,
        kind: str = "invalid_request_error", code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request for answers, checked.

    Args:
        prompts: token ids of each.
        n: answers to each prompt.
        stops: texts that end an answer; they are not part of it.
        usage: whether a stream ends with the numbers of tokens.
    """

    served: ServedModel
    strength: float
    prompts: list[list[int]]
    max_tokens: list[int]
    """Most tokens of an answer to each prompt."""
    n: int
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    usage: bool

    @property
    def answers(self) -> int:
        return self.n * len(self.prompts)


# --- fields -----------------------------------------------------------------------------------

_LEFT_ALONE = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
"""They say who asks, or where it is filed."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},), "store": (False,),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
    "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],),
    "service_tier": ("auto", "default"), "echo": (False,), "suffix": ("",), "best_of": (1,),
    "parallel_tool_calls": (True, False), "min_p": (0,),
}
"""Fields of which only what asks for nothing is taken."""
_SHARED = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "stream",
    "stream_options", "logprobs", "seed", "strength", "presence_penalty", "frequency_penalty",
    "repetition_penalty",
}
_CHAT = _SHARED | {"messages", "max_completion_tokens", "top_logprobs"}
_COMPLETION = _SHARED | {"prompt"}


class Fields:
    """A request's fields, each taken by name and checked; null is as if it were not there."""

    def __init__(self, body: Any, known: set[str]):
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object")
        given = {name: value for name, value in body.items() if value is not None}
        for name, value in given.items():
            if name in known or name in _LEFT_ALONE:
                continue
            if name not in _ONLY:
                raise RequestError(
                    f"unknown field {shown(name)}{nearest(name, known)}", name,
                    code="unknown_parameter",
                )
            if not any(_same(value, only) for only in _ONLY[name]):
                raise RequestError(
                    f"{name} is not supported here: leave it out", name,
                    code="unsupported_parameter",
                )
        self.given = given

    def take(
        self, name: str, kinds: type | tuple[type, ...], what: str, default: Any = None,
        right: Callable[[Any], bool] = lambda value: True,
    ) -> Any:
        """Raises RequestError where it is not ``what``."""
        value = self.given.get(name, default)
        if value is default:
            return default
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong or not right(value):
            raise RequestError(f"{name} must be {what}, got {shown(value)}", name)
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        return self.take(
            name, (int, float), f"a number from {low:g} to {high:g}", default,
            lambda value: low <= value <= high,
        )

    def whole(self, name: str, low: int, high: int, default: int | None) -> int | None:
        return self.take(
            name, int, f"a whole number from {low:,} to {high:,}", default,
            lambda value: low <= value <= high,
        )


def _same(value: Any, only: Any) -> bool:
    return isinstance(value, bool) == isinstance(only, bool) and value == only


def find_model(models: ServedModels, fields: Fields) -> ServedModel:
    """The model that a request names; the first one where it names none."""
    first = next(iter(models.by_name))
    name = fields.take("model", str, "the name of a model", first)
    if name not in models.by_name:
        raise RequestError(
            f"there is no model {shown(name)} here: {listed(models.by_name)}", "model", status=404,
            code="model_not_found",
        )
    return models.by_name[name]


def strength_of(fields: Fields, served: ServedModel) -> float:
    strength = fields.number("strength", 0, MAX_STRENGTH, served.strength)
    if served.policy is None and strength != 0:
        raise RequestError(
            f"{served.name} is the base, and strength is the dial of an adapter", "strength"
        )
    return strength


# --- whole requests ---------------------------------------------------------------------------


def read_chat(body: Any, models: ServedModels, max_length: int) -> Asked:
    """A body of /v1/chat/completions.

    Raises:
        RequestError: names the field.
    """
    fields = Fields(body, _CHAT)
    served = find_model(models, fields)
    prompt = chat_prompt(fields, served, "messages")
    for name in ("max_completion_tokens", "max_tokens"):
        wanted = fields.whole(name, 1, 2**31 - 1, None)
        if wanted is not None:
            break
    told = fields.take("logprobs", bool, "true or false", False)
    top = fields.whole("top_logprobs", 0, _MOST_TOP, None)
    if top is not None and not told:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    return _asked(fields, served, [prompt], wanted, None, (top or 0) if told else None, max_length)


def read_completion(body: Any, models: ServedModels, max_length: int) -> Asked:
    """A body of /v1/completions; raises as ``read_chat``."""
    fields = Fields(body, _COMPLETION)
    served = find_model(models, fields)
    prompt = fields.take(
        "prompt", (str, list), "text, a list of texts, token ids, or a list of lists of them",
    )
    if prompt is None:
        raise RequestError("prompt is missing", "prompt", code="missing_required_parameter")
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list))
    prompts = [_text_prompt(one, served) for one in (prompt if several else [prompt])]
    wanted = fields.whole("max_tokens", 1, 2**31 - 1, None)
    top = fields.whole("logprobs", 0, _MOST_TOP, None)
    return _asked(fields, served, prompts, wanted, _COMPLETION_TOKENS, top, max_length)


def chat_prompt(fields: Fields, served: ServedModel, name: str) -> list[int]:
    """Token ids of a conversation."""
    try:
        return served.encoder(messages_field(fields, name))
    except QAdapterError as error:
        raise RequestError(str(error), name) from error


def _text_prompt(prompt: Any, served: ServedModel) -> list[int]:
    """Plain text as it is, without a chat template; or token ids."""
    if isinstance(prompt, list):
        if not prompt or not all(type(token) is int for token in prompt):
            raise RequestError("prompt is neither texts nor token ids", "prompt")
        return prompt
    try:
        return served.encoder(PlainText(prompt))
    except QAdapterError as error:
        raise RequestError(str(error), "prompt") from error


def _asked(
    fields: Fields, served: ServedModel, prompts: list[list[int]], wanted: int | None,
    default: int | None, top: int | None, max_length: int,
) -> Asked:
    most = [_most_tokens(len(prompt), wanted, default, max_length) for prompt in prompts]
    check_prompts(prompts, served)
    stream = fields.take("stream", bool, "true or false", False)
    options = fields.take("stream_options", dict, "an object", {})
    if options and not stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        raise RequestError(f"unknown field in stream_options: {listed(unknown)}", "stream_options")
    usage = options.get("include_usage") or False
    if not isinstance(usage, bool):
        raise RequestError("include_usage must be true or false", "stream_options")
    stop = fields.take("stop", (str, list), "text or a list of texts", [])
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise RequestError(f"stop must be up to {_MOST_STOPS} texts, none of them empty", "stop")
    defaults = served.sampling
    sampling = Sampling(
        float(fields.number("temperature", 0, 100, defaults.temperature)),
        float(fields.take("top_p", (int, float), "a number above 0, up to 1", defaults.top_p,
                          lambda value: 0 < value <= 1)),
        max(0, fields.whole("top_k", -1, 2**31 - 1, defaults.top_k)),
        fields.whole("seed", -(2**63), 2**63 - 1, None), top,
        float(fields.take("repetition_penalty", (int, float), "a number above 0, up to 10",
                          defaults.repetition_penalty, lambda value: 0 < value <= 10)),
        float(fields.number("presence_penalty", -2, 2, 0.0)),
        float(fields.number("frequency_penalty", -2, 2, 0.0)),
    )
    if 0 < sampling.temperature < 1e-5:  # its inverse would leave float32
        sampling = dataclasses.replace(sampling, temperature=0.0)
    return Asked(
        served, strength_of(fields, served), prompts, most,
        fields.whole("n", 1, _MOST_ANSWERS, 1), sampling, tuple(stops), stream, usage,
    )


def check_prompts(prompts: Sequence[list[int]], served: ServedModel) -> None:
    """Raises RequestError for a token that the model does not know."""
    try:
        check_sequences(prompts, served.model, served.tokenizer, "prompt")
    except QAdapterError as error:
        raise RequestError(str(error), "prompt") from error


def _most_tokens(length: int, wanted: int | None, default: int | None, max_length: int) -> int:
    room = max_length - length
    if room < 1 or (wanted or 0) > room:
        asked = f" and {wanted:,} of the answer" if wanted else ""
        raise RequestError(
            f"this server takes {max_length:,} tokens of prompt and answer together, and the "
            f"prompt has {length:,}{asked}", "max_tokens" if room >= 1 else "messages",
            code="context_length_exceeded",
        )
    return wanted or min(room, default or math.inf)


def messages_field(fields: Fields, name: str) -> list[dict[str, Any]]:
    """Messages that must be there, each with a role."""
    messages = fields.take(
        name, list, "a list of messages, each with a role", None,
        lambda value: value and all(isinstance(m, dict) and "role" in m for m in value),
    )
    if messages is None:
        raise RequestError(f"{name} is missing", name, code="missing_required_parameter")
    return messages


def text_field(fields: Fields, name: str) -> str:
    """A text that must be there and hold more than spaces."""
    text = fields.take(name, str, "text", None, lambda value: bool(value.strip()))
    if text is None:
        raise RequestError(f"{name} is missing", name, code="missing_required_parameter")
    return text
