"""Answers of a model to prompts, and what they look like in numbers."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.data import (
    Prompt,
    PromptEncoder,
    check_sequences,
    messages_of,
    padding_id,
)
from qadapter.data.collation import left_padded
from qadapter.data.ends import end_of_turn_ids, until_end
from qadapter.errors import QAdapterError
from qadapter.evaluation.scoring import evaluating
from qadapter.policy.model import QAdapterModel
from qadapter.policy.sampling import fused_sample


@dataclass(frozen=True)
class Answer:
    """``text`` without special tokens; ``token_ids`` with the end of turn, where there is one."""

    text: str
    token_ids: list[int]
    ended: bool
    """Whether the model ended its turn (else it was cut at ``max_new_tokens``)."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids up to where the answer begins, as training sees them (``data.PromptEncoder``).

    A string is one user turn, through the chat template where the tokenizer has one; else plain
    text. A conversation that ends with the assistant's turn is continued in that turn.

    Raises:
        QAdapterError: a conversation for a tokenizer without a chat template, or one that its
            template refuses; an empty prompt.
    """
    return PromptEncoder(tokenizer)(prompt)


def with_system(
    prompts: Sequence[Prompt], system: str, tokenizer: PreTrainedTokenizerBase, option: str
) -> list[Prompt]:
    """The prompts, each after a system message.

    Args:
        option: what asks for it, for messages.

    Raises:
        QAdapterError: no chat template, prompts of token ids, or a system message there already.
    """
    if not tokenizer.chat_template:
        raise QAdapterError(f"{option} needs a model with a chat template")
    found: list[Prompt] = []
    for prompt in prompts:
        messages = messages_of(prompt)
        if messages is None or messages[0]["role"] == "system":
            raise QAdapterError(
                f"{option} needs prompts of text or messages without a system message"
            )
        messages = [{"role": "system", "content": system}, *messages]
        found.append({**prompt, "prompt": messages} if isinstance(prompt, Mapping) else messages)
    return found


_NO_DIAL = "strength is the dial of an adapter; this model has none"


@contextlib.contextmanager
def at_strength(model: PreTrainedModel, strength: float | None) -> Iterator[None]:
    """The model's policy at a strength, put back after; None leaves it as it is.

    Raises:
        QAdapterError: a strength for a model without an adapter.
    """
    if strength is None:
        yield
        return
    if not isinstance(model, QAdapterModel):
        raise QAdapterError(_NO_DIAL)
    before = model.policy
    model.set_policy(strength=strength)
    try:
        yield
    finally:
        model.policy = before


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *,
    max_new_tokens: int = 256, batch_size: int = 8,
    strength: float | Sequence[float] | None = None, seed: int = 0,
    progress: Callable[[int, int], None] | None = None, **sampling: Any,
) -> list[Answer]:
    """One answer a prompt, in the prompts' order.

    Prompts are sorted by length and padded on the left; greedy unless ``do_sample=True``.

    Args:
        strength: 0 is the base, 1 the trained policy; a number, or one for each prompt; default: as
            the model is set.
        seed: of the sampling. A prompt's sample also depends on its batch.
        progress: called with (prompts done, prompts in all).
        sampling: passed to ``generate``: do_sample, temperature, top_p, top_k,
            repetition_penalty, …

    Raises:
        QAdapterError: an empty prompt, one with a token that the model does not know, or one that
            leaves no room for an answer within the model's positions; a strength for a model
            without an adapter.
    """
    encoded = list(map(PromptEncoder(tokenizer), prompts))
    check_sequences(encoded, model, tokenizer, "prompt", more=max_new_tokens)
    ends = end_of_turn_ids(model, tokenizer)
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    pad = padding_id(model, tokenizer)
    # The base's own sampling settings would bend a greedy answer (and warn about it).
    sampling = {"do_sample": False} | sampling
    if not sampling["do_sample"]:
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
    device = model.get_input_embeddings().weight.device
    # On a GPU transformers' own draw: the kernel's has not been timed there. Beams have their own.
    fused = sampling["do_sample"] and sampling.get("num_beams", 1) == 1 and device.type == "cpu"
    drawing = {"custom_generate": fused_sample} if fused else {}
    answers: dict[int, Answer] = {}
    each = strength if isinstance(strength, Sequence) else None
    if each is not None and not isinstance(model, QAdapterModel):
        raise QAdapterError(_NO_DIAL)
    everywhere = strength if each is None else None
    with evaluating(model), at_strength(model, everywhere), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = left_padded([encoded[i] for i in indices], pad, device)
            dial = {}
            if each is not None:
                dial = {"strength": torch.tensor([each[i] for i in indices], device=device)}
            output = model.generate(
                **batch, max_new_tokens=max_new_tokens, eos_token_id=ends or None,
                pad_token_id=pad, **sampling, **drawing, **dial,
            )
            added = output[:, batch["input_ids"].shape[1] :].tolist()
            for i, ids in zip(indices, added, strict=True):
                answers[i] = _answer(tokenizer, ids, set(ends))
            if progress is not None:
                progress(len(answers), len(order))
    return [answers[i] for i in range(len(encoded))]


def _answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: set[int]) -> Answer:
    ids, ended = until_end(ids, ends)
    return Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), ids, ended)


def answer_statistics(answers: Sequence[Answer]) -> dict[str, float]:
    """What a set of answers looks like, as JSON types.

    ``answers``; ``tokens_mean`` (end of turn included) and ``words_mean``, ``words_median``;
    ``share_ended``: answers whose turn was ended; ``distinct_1/2/3``: different n-grams of words
    over all n-grams, lower case, over all answers together (it falls as the number of answers
    grows: compare equal numbers).
    """
    if not answers:
        return {"answers": 0}
    words = [answer.text.lower().split() for answer in answers]
    counts = [len(w) for w in words]
    result = {
        "answers": len(answers),
        "tokens_mean": statistics.fmean(len(answer.token_ids) for answer in answers),
        "words_mean": statistics.fmean(counts),
        "words_median": float(statistics.median(counts)),
        "share_ended": statistics.fmean(answer.ended for answer in answers),
    }
    for n in (1, 2, 3):
        grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
        result[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else 0.0
    return result
