"""The trunk over many sequences at once: no padding, and what sequences begin with in common runs
once: a prompt for all its answers, a system message for all prompts.

Everything in a transformer but attention works on one token at a time, so the tokens of a batch
are laid out in one row and attention alone sees sequences again. It runs where the base uses
transformers' sdpa attention and a probe shows that the result is the base's own; else sequences are
padded as usual.

Shapes: N packed tokens, S sequences of at most T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qadapter.trunk.lm_head import trunk

_NAME = "qadapter_packed"
_PROBE_TOKENS = 48
_LIKE_LENGTH = 0.8
"""Sequences attend together if they are at least this share of the longest one's length."""
_LIMITS = ("sliding_window", "attention_chunk_size")


class Packing(NamedTuple):
    """Where the tokens of S sequences lie in one row of N. Sequences that begin alike share those
    tokens."""

    ids_N: Tensor
    positions_N: Tensor
    lines: list[Tensor]
    """Packed index of each sequence's tokens, S of [T], in the order the sequences were given."""
    blocks: list[Tensor]
    """The same for sequences of like length, [S, T] each; what stands behind a sequence's end does
    not matter (attention is causal)."""
    places_N: Tensor
    """For each packed token, one index into the blocks, flattened and joined, that holds it."""

    @classmethod
    def of(cls, sequences: Sequence[Tensor], device: torch.device) -> Packing:
        """Lay out sequences of token ids, int64 [T] each, T ≥ 1."""
        # In the order of a dictionary a sequence shares most with the one before it.
        order = sorted(range(len(sequences)), key=lambda i: sequences[i].tolist())
        lines: list[Tensor] = [torch.empty(0)] * len(sequences)
        pieces, positions, start = [], [], 0
        ids, line = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        for number in order:
            before, ids = ids, sequences[number]
            shared = _common(before, ids)
            line = torch.cat([line[:shared], torch.arange(start, start + len(ids) - shared)])
            start += len(ids) - shared
            lines[number] = line
            pieces.append(ids[shared:])
            positions.append(torch.arange(shared, len(ids)))
        blocks, places, place = [], torch.empty(start, dtype=torch.int64), 0
        for alike in _by_length(lines):
            blocks.append(nn.utils.rnn.pad_sequence(alike, batch_first=True).to(device))
            for line in alike:
                places[line] = torch.arange(place, place + len(line))
                place += blocks[-1].shape[1]
        return cls(
            torch.cat(pieces).to(device), torch.cat(positions).to(device), lines, blocks,
            places.to(device),
        )

    def gather(self, outputs: list[Tensor]) -> Tensor:
        """[N, ...] from one [S, T, ...] a block."""
        return torch.cat([x.flatten(0, 1) for x in outputs])[self.places_N]


def _common(one: Tensor, other: Tensor) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(one), len(other))
    return int((one[:length] == other[:length]).cumprod(0).sum())


def _by_length(lines: list[Tensor]) -> Iterator[list[Tensor]]:
    alike: list[Tensor] = []
    for line in sorted(lines, key=len, reverse=True):
        if alike and len(line) < _LIKE_LENGTH * len(alike[0]):
            yield alike
            alike = []
        alike.append(line)
    yield alike


def hidden_states(base: PreTrainedModel, packing: Packing, packed: bool) -> Tensor:
    """The base's last hidden states of all packed tokens [N, D].

    Args:
        packed: run them in one row, inside ``packed_attention``; else as padded batches.
    """
    body = trunk(base)
    if packed:
        outputs = body(
            input_ids=packing.ids_N[None], position_ids=packing.positions_N[None],
            use_cache=False, packing=packing,
        )
        return outputs.last_hidden_state[0]
    # Padding on the right comes after everything that is used: without a mask attention takes its
    # fastest path.
    return packing.gather(
        [
            body(input_ids=packing.ids_N[block], use_cache=False).last_hidden_state
            for block in packing.blocks
        ]
    )


def hidden_rows(
    base: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, packed: bool
) -> Tensor:
    """The base's last hidden states of a padded batch, [B, T, D]; 0 at padding, which is not run.

    Args:
        input_ids: [B, T]; attention_mask: [B, T], 1 on one stretch of each row.
        packed: as ``hidden_states``'.
    """
    mask_BT = attention_mask.bool()
    texts = [ids[mask] for ids, mask in zip(input_ids.cpu(), mask_BT.cpu(), strict=True)]
    packing = Packing.of(texts, input_ids.device)
    hidden_ND = hidden_states(base, packing, packed)
    hidden_BTD = hidden_ND.new_zeros(*input_ids.shape, hidden_ND.shape[-1])
    hidden_BTD[mask_BT] = hidden_ND[torch.cat(packing.lines).to(hidden_ND.device)]
    return hidden_BTD


@contextmanager
def packed_attention(base: PreTrainedModel, longest: int) -> Iterator[bool]:
    """Lets the base attend within packed sequences; yields whether it can.

    Args:
        longest: tokens of the longest sequence; a window of attention below it rules packing out.
    """
    config = base.config
    limits = [getattr(config, name, None) for name in _LIMITS]
    plain = config._attn_implementation == "sdpa" and config.get_text_config() is config
    if not plain or any(limit is not None and limit < longest for limit in limits):
        yield False
        return
    base.set_attn_implementation(_NAME)
    try:
        works = _probe(base)
        if not works:
            base.set_attn_implementation("sdpa")
        yield works
    finally:
        base.set_attn_implementation("sdpa")


def _probe(base: PreTrainedModel) -> bool:
    """Whether packed and padded runs agree: not where tokens also mix outside attention (state
    space models) or where positions are not taken from ``position_ids``."""
    ids = torch.arange(_PROBE_TOKENS) * 7 % (base.config.vocab_size - 1) + 1
    prefix, middle, ending = ids.tensor_split([16, 40])
    device = base.get_input_embeddings().weight.device
    texts = ([prefix, middle], [prefix, ending], [ending, middle])
    packing = Packing.of([torch.cat(text) for text in texts], device)
    try:
        ours = hidden_states(base, packing, packed=True).float()
    except TypeError:  # the model does not hand its keyword arguments on
        return False
    base.set_attn_implementation("sdpa")
    theirs = hidden_states(base, packing, packed=False).float()
    base.set_attn_implementation(_NAME)
    # Roundings of a deep 16-bit model reach a few times its precision; a wrong attention is off
    # by the size of the states themselves.
    tolerance = max(16 * torch.finfo(base.dtype).eps, 1e-3)
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    packing: Packing | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa over the packed sequences; [1, heads, N, d] in, [1, N, heads, d] out."""
    if packing is None:
        raise TypeError("packed attention needs its packing")
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    streams_NHd = [x[0].transpose(0, 1) for x in (query, key, value)]
    outputs = []
    for block_ST in packing.blocks:
        streams = (x_NHd[block_ST].transpose(1, 2) for x_NHd in streams_NHd)
        outputs.append(sdpa(module, *streams, None, **kwargs)[0])
    return packing.gather(outputs)[None], None


AttentionInterface.register(_NAME, _attention)
