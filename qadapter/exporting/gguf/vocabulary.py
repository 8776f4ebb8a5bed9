"""A tokenizer as GGUF metadata.

llama.cpp has tokenizers of its own and knows them by name. Which of them reads text as a given one
does is decided by what that one is made of, not by the model it came with.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qadapter.data.templates import default_of
from qadapter.exporting.gguf.architectures import NotWritten, Value

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# How byte-level tokenizers cut text into words: the expressions of Llama 3, Qwen 2, GPT-4o, Tekken.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS, _SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING_LOWER = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_BEGINNING_UPPER = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LLAMA_3 = "|".join((_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _MARKS, _SPACES))
_QWEN_2 = "|".join((_CONTRACTIONS, _WORDS, r"\p{N}", _MARKS, _SPACES))
_GPT_4O = "|".join((
    f"{_ENDING_LOWER}{_CONTRACTIONS}?", f"{_BEGINNING_UPPER}{_CONTRACTIONS}?", r"\p{N}{1,3}",
    _PATHS, _SPACES,
))
_TEKKEN = "|".join((_ENDING_LOWER, _BEGINNING_UPPER, r"\p{N}", _PATHS, _SPACES))

_BYTES, _BYTES_OF_WORDS, _DIGITS = ("bytes", False), ("bytes", True), ("digits", True)
_BYTE_LEVEL = {
    ((_BYTES_OF_WORDS,), False): "gpt-2",
    ((_DIGITS, _BYTES_OF_WORDS), False): "smollm",
    ((("words", _LLAMA_3), _BYTES), False): "smaug-bpe",
    ((("words", _LLAMA_3), _BYTES), True): "llama-bpe",
    ((("words", _QWEN_2), _BYTES), False): "qwen2",
    ((("words", _GPT_4O), _BYTES), False): "gpt-4o",
    ((("words", _TEKKEN), _BYTES), True): "tekken",
}
"""(steps before the merges, whether a whole word that is a token is one) → llama.cpp's name."""


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, rows: int, end_ids: Sequence[int]
) -> dict[str, Value]:
    """The metadata of a tokenizer, by name.

    Args:
        rows: of the embedding; those without a token get an unused one.
        end_ids: tokens that end an answer.

    Raises:
        NotWritten: it is none of those that are written here.
    """
    if not tokenizer.is_fast:
        raise NotWritten(f"a {type(tokenizer).__name__} has no tokenizer.json")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get(
        "end_of_word_suffix"
    ):
        raise NotWritten(f"a tokenizer of type {model['type']} is not written as GGUF here")
    added = {token["id"]: token for token in parts["added_tokens"]}
    tokens = {index: token for token, index in model["vocab"].items()}
    tokens |= {index: token["content"] for index, token in added.items()}
    if max(tokens) >= rows:
        raise NotWritten(f"the tokenizer has {max(tokens) + 1} tokens, the embedding {rows} rows")
    types = dict.fromkeys(tokens, _NORMAL)
    types |= {i: _CONTROL if token["special"] else _USER_DEFINED for i, token in added.items()}
    found: dict[str, Value] = {}
    if model.get("byte_fallback"):
        found |= _sentencepiece(parts, tokens, types)
    else:
        found |= _byte_level(parts)
    found |= {
        "tokens": [tokens.get(i, f"[PAD{i}]") for i in range(rows)],
        "token_type": [types.get(i, _UNUSED) for i in range(rows)],
    }
    if "scores" in found:
        found["scores"] = [found["scores"].get(i, 0.0) for i in range(rows)]
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()} | _special_tokens(
        tokenizer, end_ids
    )


def _byte_level(parts: Mapping[str, Any]) -> dict[str, Value]:
    model, normalizer = parts["model"], parts["normalizer"]
    steps = tuple(_step(step) for step in _in_sequence(parts["pre_tokenizer"], "pretokenizers"))
    name = _BYTE_LEVEL.get((steps, bool(model.get("ignore_merges"))))
    # llama.cpp composes no characters: text that is typed composed, as nearly all is, is the same.
    if name is None or (normalizer is not None and normalizer["type"] != "NFC"):
        raise NotWritten("none of llama.cpp's tokenizers that are known here reads as this one")
    return {"model": "gpt2", "pre": name, "merges": [" ".join(pair) for pair in _merges(model)]}


def _step(step: Mapping[str, Any]) -> tuple:
    """A step of a pre-tokenizer, in short."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "bytes", step.get("use_regex", True)
        case {"type": "Digits"}:
            return "digits", step["individual_digits"]
        # All of a text matches these expressions: the matches are the words, either way.
        case {"type": "Split", "pattern": {"Regex": words}} if (
            (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
        ):
            return "words", words
    return "other", json.dumps(step)


def _sentencepiece(
    parts: Mapping[str, Any], tokens: Mapping[int, str], types: dict[int, int]
) -> dict[str, Any]:
    """SentencePiece's BPE: spaces are ▁, what no token covers is spelt in bytes, and a merge's
    place in the order is the token's score. Sets the types of bytes and of the unknown token."""
    model = parts["model"]
    steps = [
        *_in_sequence(parts["normalizer"], "normalizers"),
        *_in_sequence(parts["pre_tokenizer"], "pretokenizers"),
    ]
    prefix = False
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Metaspace", "replacement": "▁"}:
                prefix |= step.get("prepend_scheme", "always") != "never"
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}:
                pass  # there are none left
            case _:
                raise NotWritten("this kind of SentencePiece tokenizer is not written as GGUF here")
    ids = {token: i for i, token in tokens.items()}
    merges = _merges(model)
    _check_scores(merges, ids)
    scores: dict[int, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(ids[left + right], -float(rank))
    for i, token in tokens.items():
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = _BYTE
        elif i not in scores:
            scores[i] = -float(len(merges))
    if model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = _UNKNOWN
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def _check_scores(merges: Sequence[tuple[str, str]], ids: Mapping[str, int]) -> None:
    """A score belongs to a token, a rank to a pair: they order merges alike where all pairs that
    make one token stand together, and none is missing."""
    made = [left + right for left, right in merges]
    changes = sum(a != b for a, b in itertools.pairwise(made)) + bool(made)
    pairs = set(merges)
    whole = all(
        (token[:i], token[i:]) in pairs
        for token in set(made) for i in range(1, len(token))
        if token[:i] in ids and token[i:] in ids
    )
    if changes != len(set(made)) or not whole:
        raise NotWritten("this tokenizer's merges are not those of a SentencePiece model")


def _special_tokens(
    tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]
) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name, index in (
        ("bos", tokenizer.bos_token_id), ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        if index is not None:
            found[f"{name}_token_id"] = index
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *end_ids]))
    ends = [index for index in ends if index is not None]
    found |= {
        f"{name}_token_id": index for name, index in zip(("eos", "eot", "eom"), ends, strict=False)
    }
    plain, whole = (tokenizer("a", add_special_tokens=x)["input_ids"] for x in (False, True))
    start = whole.index(plain[0]) if plain else 0
    before, after = whole[:start], whole[start + len(plain):]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise NotWritten("a tokenizer that adds other tokens than bos and eos is not written here")
    found |= {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    keys = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
    template = default_of(tokenizer.chat_template)
    return keys if template is None else keys | {"tokenizer.chat_template": template}


def _in_sequence(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
