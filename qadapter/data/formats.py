"""Recognizing preference formats by their columns, and turning rows into pairs.

A pair is a dict with `prompt`, `chosen`, `rejected` (all text, or all lists of messages) or
`prompt_ids`, `chosen_ids`, `rejected_ids`, and optionally `tools` and `chat_template_kwargs`.
Formats and column names follow TRL's preference types; HH-RLHF transcripts and DSP come on top.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qadapter.data.arrow import Row
from qadapter.data.messages import Message, normal_messages
from qadapter.data.report import BadRow
from qadapter.errors import QAdapterError, listed, nearest, shown
from qadapter.system.documents import parse_json
from qadapter.system.textfiles import is_unicode

Kind = Literal["text", "messages", "tokenized"]

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
MASK_COLUMNS = ("chosen_mask", "rejected_mask")
COLUMNS = ("prompt", "chosen", "rejected", *ID_COLUMNS, *MASK_COLUMNS, "query", "responses")
TOKENIZED_BY_US = ("row", "prompt_id")
EXTRA_COLUMNS = ("tools", "chat_template_kwargs")
NEEDED = (
    "chosen + rejected (with or without prompt), prompt_ids + chosen_ids + rejected_ids, "
    "or query + responses"
)
# A turn of an HH-RLHF transcript begins a paragraph with the speaker's name.
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Format:
    """How the rows of a dataset are laid out.

    Attributes:
        kind: what `prompt`, `chosen` and `rejected` are made of.
        layout: "pairs", "transcripts" (HH-RLHF strings) or "responses" (DSP).
        explicit_prompt: whether the prompt has a column; else it is what both answers begin with.
        domain, rejected_domains: for "responses", whose answer is chosen and whose are rejected.
    """

    kind: Kind
    layout: Literal["pairs", "transcripts", "responses"] = "pairs"
    explicit_prompt: bool = False
    domain: str = ""
    rejected_domains: tuple[str, ...] = ()


def used_columns(columns: Sequence[str]) -> list[str]:
    """Of a dataset's columns, those that its format is read from, by their canonical names."""
    seen = set(columns)
    used: tuple[str, ...]
    if seen.issuperset(ID_COLUMNS):
        used = (*ID_COLUMNS, *MASK_COLUMNS, *TOKENIZED_BY_US)
    elif seen.issuperset(("chosen", "rejected")):
        used = ("prompt", "chosen", "rejected")
    else:
        used = ("query", "responses")
    return [name for name in (*used, *EXTRA_COLUMNS) if name in seen]


def detect_format(
    rows: Iterable[Row],
    columns: Sequence[str],
    *,
    name: str,
    domain: str | None = None,
    rejected_domains: Sequence[str] | None = None,
) -> Format:
    """Recognize the format from the columns and the first row that has values in them.

    Raises:
        QAdapterError: columns missing (what was seen, what is needed), or a domain that is missing,
            unknown, or given for data that has none.
    """
    seen = set(columns)
    if domain is None and rejected_domains is not None:
        raise QAdapterError("rejected_domains needs a domain, whose answers are chosen")
    if seen.issuperset(ID_COLUMNS):
        found = Format("tokenized")
    elif seen.issuperset(("chosen", "rejected")):
        found = _detect_pairs(rows, "prompt" in seen)
    elif seen.issuperset(("query", "responses")):
        return _detect_responses(rows, name, domain, rejected_domains)
    else:
        there = listed(columns, 20) or "(none)"
        raise QAdapterError(
            f"{name} has the columns {there}; a preference dataset needs "
            f"{NEEDED} (columns={{'chosen': 'name in the file'}} maps other names)"
        )
    if domain is not None:
        raise QAdapterError(
            f"domain {domain!r} was given, but {name} has no query and responses columns"
        )
    return found


def _detect_pairs(rows: Iterable[Row], has_prompt: bool) -> Format:
    for row in rows:
        chosen, rejected = row.get("chosen"), row.get("rejected")
        if isinstance(row.get("prompt"), list) or isinstance(chosen, list):
            return Format("messages", explicit_prompt=has_prompt)
        if isinstance(chosen, str) and isinstance(rejected, str):
            if not has_prompt and _SPEAKER.match(chosen) and _SPEAKER.match(rejected):
                return Format("messages", "transcripts")
            return Format("text", explicit_prompt=has_prompt)
    return Format("text", explicit_prompt=has_prompt)


def _detect_responses(
    rows: Iterable[Row], name: str, domain: str | None, rejected: Sequence[str] | None
) -> Format:
    domains: dict[str, None] = {}  # a set that keeps the order of the file
    for row in rows:
        if isinstance(row.get("responses"), dict):
            domains.update(dict.fromkeys(row["responses"]))
    if domain is None:
        raise QAdapterError(
            f"{name} answers each query in several domains; choose one with domain= "
            f"({listed(domains, 20)})"
        )
    rejected = [other for other in domains if other != domain] if rejected is None else rejected
    for wanted in (domain, *rejected):
        if wanted not in domains:
            raise QAdapterError(
                f"{name} has no domain {shown(wanted)} ({listed(domains, 20)})"
                + nearest(str(wanted), map(str, domains))
            )
    if domain in rejected or not rejected:
        raise QAdapterError(f"rejected_domains must name at least one domain other than {domain!r}")
    return Format("messages", "responses", domain=domain, rejected_domains=tuple(rejected))


def pairs_of_row(row: Row, form: Format) -> Iterator[dict[str, Any] | BadRow]:
    """The pairs of one source row, each a dict or the reason why there is none."""
    if form.layout == "responses":
        for other in form.rejected_domains:
            yield _guard(_responses_pair, row, form.domain, other)
    elif form.kind == "tokenized":
        yield _guard(_tokenized_pair, row)
    elif form.layout == "transcripts":
        yield _guard(_transcript_pair, row)
    elif form.kind == "messages":
        yield _guard(_messages_pair, row, form.explicit_prompt)
    else:
        yield _guard(_text_pair, row, form.explicit_prompt)


def _guard(convert: Any, row: Row, *args: Any) -> dict[str, Any] | BadRow:
    try:
        pair = convert(row, *args) | extras_of(row)
        for key, value in pair.items():
            _check_json(value, key)
        return pair
    except BadRow as bad:
        return bad


def _value(row: Row, key: str) -> Any:
    if row.get(key) is None:
        raise BadRow("missing_value", key)
    return row[key]


def _text(row: Row, key: str) -> str:
    value = _value(row, key)
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{key} is a {type(value).__name__}")
    return value


def _check_json(value: Any, key: str) -> None:
    """`value` must be JSON or token ids, its numbers finite and of 64 bits at most; no text in it
    may hold half of a surrogate pair."""
    if isinstance(value, str):
        if not is_unicode(value):
            raise BadRow("wrong_type", f"{key} is not valid Unicode (half of a surrogate pair)")
    elif isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise BadRow("wrong_type", f"{key} has a key that is a {type(name).__name__}")
            _check_json(name, key)
            _check_json(item, key)
    elif isinstance(value, list) and not key.endswith("_ids"):
        for item in value:
            _check_json(item, key)
    elif isinstance(value, int | float):
        if not -(2**63) <= value < 2**63:  # nor NaN
            raise BadRow("wrong_type", f"{key} holds {shown(value)}, a number beyond 64 bits")
    elif not isinstance(value, list | None):
        raise BadRow("wrong_type", f"{key} holds a {type(value).__name__}")


def _answer(text: str, key: str) -> str:
    if not text.strip():
        raise BadRow("empty_answer", key)
    return text


def _differ(chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise BadRow("identical_answers")


def extras_of(row: Row) -> dict[str, Any]:
    """A row's `tools` and `chat_template_kwargs`, each as JSON values or as a JSON string.

    Raises:
        BadRow: of another type.
    """
    extras: dict[str, Any] = {}
    for key, kind in zip(EXTRA_COLUMNS, (list, dict), strict=True):
        value = row.get(key)
        if isinstance(value, str):
            try:
                value = parse_json(value, key, surrogates=True)
            except QAdapterError as error:
                raise BadRow("wrong_type", str(error)) from error
        if value is not None:
            if not isinstance(value, kind):
                raise BadRow("wrong_type", f"{key} is a {type(value).__name__}")
            extras[key] = value
    return extras


# --- text -------------------------------------------------------------------------------------


def _text_pair(row: Row, explicit_prompt: bool) -> dict[str, Any]:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if explicit_prompt:
        prompt = _text(row, "prompt")
    else:
        _differ(chosen, rejected)
        shared = _shared_text(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    _answer(chosen, "chosen"), _answer(rejected, "rejected")
    _differ(chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _shared_text(chosen: str, rejected: str) -> int:
    """Length of the shared start; a word cut in two, with its space, is left to the answers.

    Tokenizers keep words whole and begin them with their space; the exact boundary is drawn later,
    between tokens.
    """
    shared = _shared_length(chosen, rejected)
    if shared == 0:
        raise BadRow("prompt_differs", "nothing is shared at the start")
    one_goes_on = shared == min(len(chosen), len(rejected))
    if one_goes_on or any(text[shared].isalnum() for text in (chosen, rejected)):
        while shared and chosen[shared - 1].isalnum():
            shared -= 1
    if shared == 0:
        raise BadRow("prompt_differs", "only the start of a word is shared")
    if shared > 1 and chosen[shared - 1] == " ":
        shared -= 1
    return shared


def _shared_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many elements two sequences share at their start."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return next(i for i in range(length) if left[i] != right[i])


# --- messages ---------------------------------------------------------------------------------


def _messages_pair(row: Row, explicit_prompt: bool) -> dict[str, Any]:
    chosen, rejected = (_completion(row, key) for key in ("chosen", "rejected"))
    if not explicit_prompt:
        return _split_messages(chosen, rejected)
    prompt = _value(row, "prompt")
    if isinstance(prompt, str):
        # The prompt as text beside whole conversations (UltraFeedback), or beside answers alone.
        asked = [message.get("content") for message in chosen if message["role"] == "user"]
        if prompt in asked:
            return _split_messages(chosen, rejected)
        prompt = [{"role": "user", "content": prompt}]
    prompt = normal_messages(prompt, "prompt")
    if not prompt:
        raise BadRow("empty_prompt")
    repeats = [answer[: len(prompt)] == prompt for answer in (chosen, rejected)]
    if all(repeats):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return _checked_messages(prompt, chosen, rejected)


def _completion(row: Row, key: str) -> list[Message]:
    value = _value(row, key)
    if isinstance(value, str):  # a bare answer to a conversational prompt
        value = [{"role": "assistant", "content": value}]
    return normal_messages(value, key)


def _split_messages(chosen: list[Message], rejected: list[Message]) -> dict[str, Any]:
    """Take the turns both conversations share as the prompt."""
    _differ(chosen, rejected)
    shared = _shared_length(chosen, rejected)
    if shared == 0:
        raise BadRow("prompt_differs", "no turn is shared at the start")
    # Turns of the assistant that follow each other stay turns: none is continued in the next.
    own = chosen[shared:] and rejected[shared:] and chosen[shared]["role"] == "assistant"
    while own and shared > 1 and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    return _checked_messages(chosen[:shared], chosen[shared:], rejected[shared:])


def _checked_messages(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> dict[str, Any]:
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns:
            raise BadRow("empty_answer", f"{key} has no turn of its own")
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[0]["role"] in ("user", "system"):
            raise BadRow("prompt_differs", f"{key} has a {turns[0]['role']} turn of its own")
        if turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
            role = next(t["role"] for t in (turns[0], turns[-1]) if t["role"] != "assistant")
            raise BadRow("answer_role", f"{key} begins or ends with a {role} turn")
        if not turns[-1].get("tool_calls"):
            _answer(turns[-1]["content"], key)
    _differ(chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# --- HH-RLHF, DSP, token ids ------------------------------------------------------------------


def _transcript_pair(row: Row) -> dict[str, Any]:
    return _split_messages(*(_transcript(_text(row, key), key) for key in ("chosen", "rejected")))


def _transcript(text: str, key: str) -> list[Message]:
    """``"\\n\\nHuman: a\\n\\nAssistant: b"`` as messages, white space around each turn removed."""
    before, *rest = _SPEAKER.split(text)
    if before.strip() or not rest:
        raise BadRow("wrong_type", f"{key} is no Human/Assistant transcript")
    return [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(rest[::2], rest[1::2], strict=True)
    ]


def _responses_pair(row: Row, domain: str, other: str) -> dict[str, Any]:
    query = _text(row, "query")
    responses = _value(row, "responses")
    if not isinstance(responses, dict):
        raise BadRow("wrong_type", f"responses is a {type(responses).__name__}")
    chosen, rejected = _text(responses, domain), _text(responses, other)
    return _checked_messages(
        [{"role": "user", "content": query}],
        [{"role": "assistant", "content": chosen}],
        [{"role": "assistant", "content": rejected}],
    )


def _tokenized_pair(row: Row) -> dict[str, Any]:
    pair = {}
    for key in ID_COLUMNS:
        ids = _value(row, key)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise BadRow("wrong_type", f"{key} is not a list of token ids")
        pair[key] = ids
    if not pair["prompt_ids"]:
        raise BadRow("empty_prompt")
    for key in ("chosen_ids", "rejected_ids"):
        if not pair[key]:
            raise BadRow("empty_answer", key)
    for key, ids in (("chosen_mask", "chosen_ids"), ("rejected_mask", "rejected_ids")):
        mask = row.get(key)
        if mask is not None:
            if not isinstance(mask, list) or len(mask) != len(pair[ids]) or not any(mask):
                raise BadRow("wrong_type", f"{key} does not fit {ids}")
            pair[key] = [bool(own) for own in mask]
    _differ(pair["chosen_ids"], pair["rejected_ids"])
    return pair
