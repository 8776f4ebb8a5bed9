"""Architectures that are written as GGUF here: what llama.cpp computes for each, and what of a
checkpoint it leaves out. What it leaves out is refused, or kept out of reach (a sliding window that
llama.cpp doesn't know becomes the context's length).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
from transformers import PreTrainedConfig

from qadapter.errors import QAdapterError

Value = str | bool | int | float | list


class NotWritten(QAdapterError):
    """Nothing here writes it, but llama.cpp's own converter may."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model of transformers stands in a GGUF file."""

    architecture: str
    """llama.cpp's name of it."""
    metadata: Mapping[str, Value]
    """Settings, without the architecture before their names."""
    paired_heads: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Projections whose rows are rotated in neighbouring pairs there, and in halves of a head in
    transformers: the number of heads of each."""
    norm_offset: float = 0.0
    """What transformers adds to a norm's weight, and llama.cpp doesn't."""
    reads_output_layer: bool = True
    """Whether an output layer of its own is read. Without, it is the input embedding."""
    tensors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Tensors that a checkpoint doesn't hold."""


def layout_of(config: PreTrainedConfig) -> Layout:
    """How the GGUF file of a checkpoint is laid out.

    Raises:
        NotWritten: an architecture, or a setting, that isn't written here.
        QAdapterError: a setting that llama.cpp doesn't compute.
    """
    describe = _ARCHITECTURES.get(config.model_type)
    if describe is None:
        raise NotWritten(f"the architecture {config.model_type!r} is not written as GGUF here")
    return describe(config)


# --- what they share ----------------------------------------------------------------------------


def _common(config: PreTrainedConfig, activation: str, context: int) -> dict[str, Value]:
    found = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if found != activation:
        raise QAdapterError(
            f"llama.cpp computes {config.model_type!r} with the activation {activation}, this base "
            f"has {found}"
        )
    head_dim = _head_dim(config)
    return {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _context(config: PreTrainedConfig) -> int:
    """The positions up to which attention is full."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _rope(
    rope: Mapping[str, object], head_dim: int
) -> tuple[dict[str, Value], dict[str, np.ndarray]]:
    """(settings, tensors) of rotary embeddings."""
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise NotWritten("rotary embeddings of a part of each head are not written as GGUF here")
    settings: dict[str, Value] = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    # "dynamic" scales from the context's end on, which is where the file's context ends.
    if kind in ("default", "dynamic"):
        return settings, {}
    if kind == "linear":
        return settings | {
            "rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])
        }, {}
    if kind == "llama3":
        return settings, {"rope_freqs.weight": _llama3_factors(rope, head_dim)}
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings",
             "beta_fast", "beta_slow", "partial_rotary_factor"}
    if kind == "yarn" and not {k for k, v in rope.items() if v is not None} - known:
        return settings | {
            "rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
        }, {}
    raise NotWritten(f"rope scaling {dict(rope)} is not written as GGUF here")


def _llama3_factors(rope: Mapping[str, object], head_dim: int) -> np.ndarray:
    """By what each frequency is divided [head_dim / 2]: long waves by the factor, short ones by 1,
    between the two a line in 1/wavelength."""
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - kept) / rope["factor"] + kept)).astype(np.float32)


def _alternating(config: PreTrainedConfig, period: int) -> None:
    """llama.cpp has the kinds of Gemma's layers by heart: every so many a full one."""
    kinds = [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != kinds:
        raise QAdapterError(
            f"llama.cpp computes {config.model_type!r} with full attention in every {period}th "
            "layer, this base has it in others"
        )


def _gemma_scale(config: PreTrainedConfig, largest: int) -> None:
    """llama.cpp knows Gemma's scale of attention by the number of layers."""
    expected = _head_dim(config)
    if config.num_hidden_layers == largest:
        expected = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != expected:
        raise QAdapterError(
            f"llama.cpp computes {config.model_type!r} of {config.num_hidden_layers} layers with "
            f"query_pre_attn_scalar {expected}, this base has {config.query_pre_attn_scalar}"
        )


# --- the architectures --------------------------------------------------------------------------


def _llama(config: PreTrainedConfig) -> Layout:
    head_dim = _head_dim(config)
    settings, tensors = _rope(config.rope_parameters, head_dim)
    return Layout(
        "llama",
        _common(config, "silu", _context(config)) | {"rope.dimension_count": head_dim} | settings,
        {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads},
        tensors=tensors,
    )


def _qwen(config: PreTrainedConfig) -> Layout:
    settings, tensors = _rope(config.rope_parameters, _head_dim(config))
    if tensors:
        raise QAdapterError(f"llama.cpp does not scale {config.model_type!r}'s rope as Llama 3's")
    return Layout(config.model_type, _common(config, "silu", _context(config)) | settings)


def _gemma2(config: PreTrainedConfig) -> Layout:
    _alternating(config, 2)
    _gemma_scale(config, largest=46)
    settings, tensors = _rope(config.rope_parameters, _head_dim(config))
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None or tensors:
        raise NotWritten("a Gemma 2 without its caps is not written as GGUF here")
    return Layout(
        "gemma2",
        _common(config, "gelu_pytorch_tanh", config.max_position_embeddings) | settings | {
            "attention.sliding_window": config.sliding_window,
            "attn_logit_softcapping": float(config.attn_logit_softcapping),
            "final_logit_softcapping": float(config.final_logit_softcapping),
        },
        norm_offset=1.0, reads_output_layer=False,
    )


def _gemma3(config: PreTrainedConfig) -> Layout:
    _alternating(config, 6)
    _gemma_scale(config, largest=62)
    full, local = (config.rope_parameters[k] for k in ("full_attention", "sliding_attention"))
    settings, tensors = _rope(full, _head_dim(config))
    if tensors or local.get("rope_type", "default") != "default":
        raise NotWritten("this rope scaling of a Gemma 3 is not written as GGUF here")
    if config.attn_logit_softcapping is not None or config.use_bidirectional_attention:
        raise QAdapterError(
            "llama.cpp computes 'gemma3_text' with causal attention and no cap in it"
        )
    metadata = _common(config, "gelu_pytorch_tanh", config.max_position_embeddings) | settings | {
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": float(local["rope_theta"]),
    }
    if config.final_logit_softcapping is not None:
        metadata["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return Layout("gemma3", metadata, norm_offset=1.0)


_ARCHITECTURES: dict[str, Callable[[PreTrainedConfig], Layout]] = {
    "llama": _llama, "mistral": _llama, "qwen2": _qwen, "qwen3": _qwen,
    "gemma2": _gemma2, "gemma3_text": _gemma3,
}
ARCHITECTURES = tuple(_ARCHITECTURES)
"""Model types of transformers."""
