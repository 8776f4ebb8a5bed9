"""How large a base and its adapter are, from a configuration alone: nothing is loaded."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import huggingface_hub
import torch
from peft import PeftConfig
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

from qadapter.adapters.head_adapter import AdapterConfig
from qadapter.adapters.planning import planned_weights
from qadapter.errors import QAdapterError
from qadapter.trunk.loading import base_without_weights, on_meta
from qadapter.trunk.shells import blocks_of

_LLAMA = {
    "Llama-3.2-1B": (2048, 8192, 16, 32, 64, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 128, True),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 128, False),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 128, False),
    "Llama-3.1-405B": (16384, 53248, 126, 128, 128, False),
}
"""Hidden, inner, blocks, heads, size of a head, tied; as their authors published them. They are
behind a licence on the hub, and a plan is made before it is signed."""
_PUBLISHED = {
    f"meta-llama/{name}{suffix}": shape
    for name, shape in _LLAMA.items() for suffix in ("", "-Instruct")
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Numbers of weights and widths of a causal LM."""

    depth: int
    """Blocks."""
    hidden: int
    vocabulary: int
    query: int
    """Width of all queries of a token."""
    key_value: int
    """Width of its keys, and of its values."""
    inner: int
    """Width inside the MLP that a token passes: of all the experts it is sent to."""
    block: int
    """Weights of one block, on average."""
    active: int
    """Of those, what a token is multiplied with."""
    embeddings: int
    head: int
    """0 where it is tied to the embeddings."""
    around: int
    """What is neither: norms, and parts that no text runs through."""
    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        """Bytes a weight."""
        return self.dtype.itemsize

    @property
    def weights(self) -> int:
        return self.depth * self.block + self.embeddings + self.head + self.around

    @property
    def product(self) -> int:
        """Weights of the head's product, V·D."""
        return self.vocabulary * self.hidden

    @classmethod
    def of(cls, base: PreTrainedModel, dtype: torch.dtype | None = None) -> Shape:
        """Of a causal LM, on whatever device.

        Args:
            dtype: it will be loaded in; default: the checkpoint's.

        Raises:
            QAdapterError: its blocks or its head are not found.
        """
        config = base.config.get_text_config()
        _, blocks = blocks_of(base)
        head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
        if getattr(head, "weight", None) is None:
            raise QAdapterError(f"{type(base).__name__} has no linear lm_head")
        tied = head.weight is embeddings.weight or bool(config.tie_word_embeddings)
        in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
        share = _active_share(config)
        active = sum(
            p.numel() * (share if p.dim() == 3 else 1)
            for block in blocks for p in block.parameters() if p.dim() > 1
        )
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        counted = in_blocks + embeddings.weight.numel() + (0 if tied else head.weight.numel())
        total = sum(p.numel() for p in base.parameters())
        if tied and head.weight is not embeddings.weight:  # on the meta device they are not tied
            total -= head.weight.numel()
        dtype = dtype or getattr(config, "dtype", None) or torch.float32
        return cls(
            depth=len(blocks), hidden=config.hidden_size, vocabulary=head.weight.shape[0],
            query=heads * width, key_value=groups * width, inner=_inner(config),
            block=round(in_blocks / len(blocks)), active=round(active / len(blocks)),
            embeddings=embeddings.weight.numel(), head=0 if tied else head.weight.numel(),
            around=total - counted, dtype=dtype,
        )


def _experts(config: PretrainedConfig) -> int | None:
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(config, name, None):
            return getattr(config, name)
    return None


def _active_share(config: PretrainedConfig) -> float:
    """Of the routed experts, how many a token is sent to."""
    there = _experts(config)
    return 1.0 if there is None else getattr(config, "num_experts_per_tok", there) / there


def _inner(config: PretrainedConfig) -> int:
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if _experts(config) is None:
        return inner
    of_one = getattr(config, "moe_intermediate_size", None) or inner
    return of_one * getattr(config, "num_experts_per_tok", 1)


class Trained(NamedTuple):
    """What is trained on a base."""

    parameters: int
    first_block: int | None
    """The lowest block with a part of it; None: a head adapter."""
    inputs: int = 0
    """Widths of what its layers in one block read, summed."""
    distinct: int = 0
    """The same of what several layers read counted once."""
    ranks: int = 0
    """Of those layers, summed."""

    @classmethod
    def of(cls, base: PreTrainedModel, config: AdapterConfig | PeftConfig) -> Trained:
        """Raises QAdapterError where PEFT can't adapt the base so."""
        if isinstance(config, AdapterConfig):
            width = base.get_output_embeddings().weight.shape[1]
            adapter = config.build(width, torch.device("meta"))
            return cls(sum(p.numel() for p in adapter.parameters()), None)
        planned = planned_weights(base, config)
        if planned is None:
            raise QAdapterError(f"{type(base).__name__}: an adapter of this kind can't be planned")
        _, blocks = blocks_of(base)
        number_of = {block: number for number, block in enumerate(blocks)}
        places = {name: number_of[m] for name, m in base.named_modules() if m in number_of}
        found: dict[int, list[tuple[str, int, int]]] = {}
        for name, x in planned.items():
            path = name.removeprefix("base_model.model.").split(".")
            block = next(
                (places[p] for end in range(len(path)) if (p := ".".join(path[:end])) in places),
                0,  # outside the blocks: all of them run
            )
            found.setdefault(block, [])
            if path[-2] == "lora_A":
                rank, width = x.shape
                found[block].append((".".join(path[:-3]), width, rank))
        widest = max(found.values(), key=lambda layers: sum(width for _, width, _ in layers))
        return cls(
            sum(x.numel() for x in planned.values()), min(found),
            inputs=sum(width for _, width, _ in widest),
            distinct=sum(width for _, width in {(around, width) for around, width, _ in widest}),
            ranks=sum(rank for _, _, rank in widest),
        )


def outline_of(name: str, *, revision: str | None = None, trust_remote_code: bool = False
               ) -> tuple[PreTrainedModel, str]:
    """A base's modules without weights, and where its configuration is from.

    Raises:
        QAdapterError: not found, or not built so.
    """
    if name in _PUBLISHED and not isinstance(
        huggingface_hub.try_to_load_from_cache(name, "config.json"), str
    ):
        base, source = on_meta(_llama(*_PUBLISHED[name])), "its shape as published"
    else:
        base = base_without_weights(name, revision=revision, trust_remote_code=trust_remote_code)
        source = "its config.json"
    if base is None:
        raise QAdapterError(f"{name}: its code can't be built without weights, and so not planned")
    return base, source


def is_published(name: str) -> bool:
    """Whether a shape is known without the hub."""
    return name in _PUBLISHED


def _llama(
    hidden: int, inner: int, depth: int, heads: int, width: int, tied: bool
) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=128_256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=width,
        tie_word_embeddings=tied, max_position_embeddings=131_072, dtype="bfloat16",
    )
