"""The check of every export: reloaded by stock libraries in a fresh process, compared with ours.

Stock transformers (and PEFT) decode a fixed set of prompts greedily. Every token they choose and
every logit they chose it from is held against the policy's logits at the same state, computed here
in higher precision: the difference must be within what rounding explains, and so must the choice.

Shapes: K tokens decoded, over all prompts; V vocabulary; D hidden.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.exporting import processes
from qadapter.trunk.caches import name_of_cache
from qadapter.trunk.lm_head import input_device

if TYPE_CHECKING:
    from qadapter.policy.model import QAdapterModel

PROMPTS = (
    "The capital of France is",
    "Write one sentence about the sea.",
    "def fibonacci(n):\n    ",
    "1, 2, 4, 8, 16,",
    "Dear colleagues, thank you for",
    "Die Sonne scheint und",
)
TOKENS = 16
"""Tokens decoded after each prompt."""

_STATES_MAY_DIFFER = 1024
"""Units of relative rounding by which another order of sums may move a trunk's output. (Where the
processes align their memory alike, it is 0.)"""


class States(NamedTuple):
    """Of an export, where its tokens were chosen; [K, D] both."""

    last: Tensor
    """Its last hidden states."""
    entering: Tensor
    """What entered its last layer."""


Reference = Callable[[list[list[int]], list[Tensor], States], tuple[Tensor, Tensor]]
"""(prompts, the tokens decoded after each, the states they were chosen in) → the policy's logits
there, and how far rounding may take the export's from them: [K, V] float64 each. May raise: the
states themselves are wrong."""


@dataclasses.dataclass(frozen=True)
class Check:
    """What the comparison found; all of it within the tolerance, or there is no export."""

    prompts: int
    tokens: int
    """Tokens decoded by the stock libraries, over all prompts."""
    top_tokens: int
    """How many of them are the policy's most likely token to the last digit; the others tie with
    it within rounding."""
    same_answers: int
    """Prompts to which ``QAdapterModel.generate`` gives the same tokens, greedily."""
    max_logit_error: float
    """Largest |stock − exact| logit."""
    error_to_tolerance: float
    """Largest ratio of a logit's error to its tolerance; at most 1."""
    kl_per_token: float
    """KL(exact policy ‖ export), nats a token, over the decoded states."""
    dtype: str
    versions: Mapping[str, str]


def check_export(
    folder: Path, scratch: Path, model: QAdapterModel, reference: Reference, *,
    base: str | None, revision: str | None, logits_factor: float, temperature: float,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Check:
    """Have stock libraries decode with an export and compare.

    Args:
        folder: the export. scratch: an empty folder for the exchange.
        base, revision: the base that a PEFT export is put on; None for a checkpoint.
        logits_factor: the policy's logits over the export's.
        temperature: what its generation_config.json must say.
        tokenizer: the export's; None: there is none, the prompts are token ids.

    Raises:
        QAdapterError: it can't be loaded, or decodes something else; the message says what.
    """
    texts = None if tokenizer is None else list(PROMPTS)
    prompts = _plain_ids(model.config.get_text_config().vocab_size)
    if texts is not None:
        prompts = [tokenizer(text)["input_ids"] for text in texts]
    spread = len(set(getattr(model.base, "hf_device_map", {}).values())) > 1
    request = {
        "export": str(folder), "base": base, "revision": revision,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "device": "auto" if spread else str(model.base.device),
        "attn_implementation": model.base.config._attn_implementation,
        "threads": torch.get_num_threads(), "prompts": prompts, "texts": texts,
        "max_new_tokens": TOKENS,
    }
    tensors, metadata = ask_stock(request, scratch)
    if (json.loads(metadata["temperature"]) or 1.0) != temperature:
        raise _failed(
            f"generation_config.json says temperature {metadata['temperature']}, not {temperature}"
        )
    for i, text in enumerate(texts or ()):
        if tensors[f"prompt.{i}"].tolist() != prompts[i]:
            raise _failed(
                f"the tokenizer reads {text!r} as {tensors[f'prompt.{i}'].tolist()}, not as "
                f"{prompts[i]}"
            )
    return _compare(tensors, json.loads(metadata["versions"]), prompts, model, reference,
                    logits_factor, request["dtype"])


def ask_stock(request: Mapping[str, Any], scratch: Path) -> tuple[dict[str, Tensor], dict]:
    """Run ``stock.py`` in a process of its own; its tensors and metadata."""
    return processes.ask(
        Path(__file__).with_name("stock.py"), request, scratch, lambda reason: QAdapterError(
            "the export was checked and is not kept: stock libraries can't load it "
            f"({reason})"
        ),
    )


@torch.no_grad()
def check_states(
    base: PreTrainedModel, body: nn.Module, prompts: list[list[int]], decoded: list[Tensor],
    states_KD: Tensor,
) -> None:
    """Whether an export's trunk is the base's: the states its tokens were chosen in are computed
    again as ``generate`` does, the prompt at once, then a token at a time from the cache.

    Args:
        body: the base's trunk, as far as the states are its ``last_hidden_state``.

    Raises:
        QAdapterError: they differ by more than rounding.
    """
    device, name, rows = input_device(base), name_of_cache(body), []
    for prompt, tokens in zip(prompts, decoded, strict=True):
        fed, cache, length = torch.tensor([prompt], device=device), None, 0
        for token in tokens.tolist():
            length += fed.shape[1]
            output = body(
                input_ids=fed, use_cache=True, **{name: cache},
                attention_mask=torch.ones(1, length, dtype=torch.int64, device=device),
            )
            rows.append(output.last_hidden_state[0, -1])
            cache, fed = output.get(name), torch.tensor([[token]], device=device)
    ours_KD = torch.stack(rows).to("cpu", torch.float64)
    differences_K = (states_KD.double() - ours_KD).norm(dim=-1) / ours_KD.norm(dim=-1)
    allowed = min(0.25, _STATES_MAY_DIFFER * torch.finfo(base.dtype).eps)
    if not differences_K.max() <= allowed:
        raise _failed(
            f"its hidden states differ from the base's by {differences_K.max():.2g} of their "
            f"size; rounding explains {allowed:.2g} at most"
        )


def _plain_ids(vocab_size: int) -> list[list[int]]:
    """Prompts for a base without a tokenizer."""
    return [
        [(3 + 31 * i + 17 * k) % vocab_size for k in range(5 + i)] for i in range(len(PROMPTS))
    ]


def _compare(
    tensors: Mapping[str, Tensor], versions: Mapping[str, str], prompts: list[list[int]],
    model: QAdapterModel, reference: Reference, logits_factor: float, dtype: str,
) -> Check:
    decoded = [tensors[f"tokens.{i}"] for i in range(len(prompts))]
    places = [f"prompt {i}, token {k}" for i, ids in enumerate(decoded) for k in range(len(ids))]
    tokens_K1 = torch.cat(decoded)[:, None]
    stock_KV = torch.cat([tensors[f"logits.{i}"] for i in range(len(prompts))]).double()
    stock_KV *= logits_factor
    states = (
        torch.cat([tensors[f"{name}.{i}"] for i in range(len(prompts))])
        for name in ("states", "entering")
    )
    exact_KV, tolerance_KV = reference(prompts, decoded, States(*states))
    if stock_KV.shape != exact_KV.shape:
        raise _failed(f"{stock_KV.shape[1]} logits a token, not {exact_KV.shape[1]}")
    error_KV = (stock_KV - exact_KV).abs().nan_to_num(nan=torch.inf)
    k, v = divmod(int((error_KV - tolerance_KV).argmax()), exact_KV.shape[1])
    if error_KV[k, v] > tolerance_KV[k, v]:
        raise _failed(
            f"{places[k]}: the logit of token id {v} is {stock_KV[k, v]:.6g}, the policy's "
            f"{exact_KV[k, v]:.6g}; rounding to {dtype} explains {tolerance_KV[k, v]:.2g} at most"
        )
    best_K1 = exact_KV.argmax(-1, keepdim=True)
    gap_K = (exact_KV.gather(1, best_K1) - exact_KV.gather(1, tokens_K1))[:, 0]
    slack_K = (tolerance_KV.gather(1, best_K1) + tolerance_KV.gather(1, tokens_K1))[:, 0]
    k = int((gap_K - slack_K).argmax())
    if gap_K[k] > slack_K[k]:
        raise _failed(
            f"{places[k]}: greedy decoding chose id {int(tokens_K1[k])}, the policy's best is "
            f"{int(best_K1[k])}, ahead by {gap_K[k]:.3g}"
        )
    log_probs = exact_KV.log_softmax(-1)
    divergence = (log_probs.exp() * (log_probs - stock_KV.log_softmax(-1))).sum(-1).mean()
    return Check(
        prompts=len(prompts), tokens=len(tokens_K1), top_tokens=int((gap_K == 0).sum()),
        same_answers=sum(
            _greedy(model, prompt).equal(ids) for prompt, ids in zip(prompts, decoded, strict=True)
        ),
        max_logit_error=float(error_KV.max()),
        error_to_tolerance=float((error_KV / tolerance_KV.clamp_min(1e-300)).max()),
        kl_per_token=float(divergence), dtype=dtype, versions=dict(versions),
    )


def _greedy(model: QAdapterModel, prompt: list[int]) -> Tensor:
    fed = torch.tensor([prompt], device=input_device(model.base))
    before = model.generation_config
    # As in stock.py: the logits alone choose.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
    )
    try:
        output = model.generate(input_ids=fed, attention_mask=torch.ones_like(fed))
    finally:
        model.generation_config = before
    return output[0, len(prompt):].cpu()


def _failed(what: str) -> QAdapterError:
    return QAdapterError(
        f"the export was checked and is not kept: in stock libraries it is another policy: {what}"
    )
