"""Attention over packed sequences: what transformers' attention is where ``packing=`` is given.

It stands in front of a registered attention function ("sdpa") under that function's own name: a
model's configuration says what it said, and whoever reads it (masks, continuous batching, models
with a branch of their own) does what it did. Without ``packing=`` the call goes on unchanged. With
it the packing travels where the call goes, into a checkpoint's recomputation too.

How the sequences are attended to is the packing's ``kernel``:

    blocks    sdpa over padded blocks of like length; any device and dtype
    varlen    one call of torch's variable-length attention: each packed token is a query once, and
              sees the keys of its line up to itself (causal from the bottom right); 16-bit, CUDA
    flex      FlexAttention over the packed row: for capped logits; CUDA

Shapes: N packed tokens, M keys of all lines, H heads, d of a head; S sequences of a block, T long.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qadapter.errors import QAdapterError
from qadapter.trunk.gathering import gather, pick

if TYPE_CHECKING:
    from qadapter.trunk.layout import Packing

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None

PACKS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention functions that packing can stand in front of."""
_FLEX_MULTIPLE = 128
_FLEX_FLOAT32 = {f"BLOCK_{side}{step}": 32 for side in "MN" for step in ("", "1", "2")}
"""Tiles that fit a GPU's shared memory in float32."""
_UNSERVED = ("position_bias", "s_aux", "head_mask")


class Unserved(QAdapterError):
    """What the packed attention can't do; the message says what."""


def install(name: str) -> None:
    """From now on the attention of that name takes ``packing=``."""
    plain = ALL_ATTENTION_FUNCTIONS[name]
    if not hasattr(plain, "takes_packing"):
        AttentionInterface.register(name, _in_front_of(plain))


def _in_front_of(plain: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Tensor | None, *args: Any, packing: Packing | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packing is None:
            return plain(module, query, key, value, attention_mask, *args, **kwargs)
        return _packed(module, query, key, value, packing, **kwargs), None

    attention.takes_packing = True
    return attention


def _packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packing: Packing, *,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    sliding_window: int | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> Tensor:
    """[1, H, N, d] in, [1, N, H, d] out."""
    if given := [name for name in _UNSERVED if kwargs.get(name) is not None]:
        raise Unserved(f"its attention takes {', '.join(given)}")
    if is_causal is False or (is_causal is None and not getattr(module, "is_causal", True)):
        raise Unserved("its attention is not causal")
    if dropout:
        raise Unserved(f"its attention drops {dropout:g} of its weights")
    if packing.windows is not None:
        packing.windows.append(sliding_window)
    if sliding_window is not None and sliding_window >= packing.longest:
        sliding_window = None
    return KERNELS[packing.kernel](
        module, query, key, value, packing, scaling, softcap, sliding_window
    )


def by_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packing: Packing,
    scaling: float | None, softcap: float | None, window: int | None,
) -> Tensor:
    if softcap is not None:
        raise Unserved("its attention caps its logits, which sdpa can't")
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    places = packing.block_places
    streams = [
        gather(x[0].transpose(0, 1), places, once=x is query) for x in (query, key, value)
    ]
    sizes = [block.numel() for block in packing.blocks]
    outputs = []
    for block_ST, *parts in zip(packing.blocks, *(x.split(sizes) for x in streams), strict=True):
        q, k, v = (x.unflatten(0, block_ST.shape).transpose(1, 2) for x in parts)
        mask = None if window is None else packing.band(block_ST.shape[1], window)
        outputs.append(sdpa(module, q, k, v, mask, scaling=scaling)[0].flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return pick(joined, places)[None]


def by_lines(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packing: Packing,
    scaling: float | None, softcap: float | None, window: int | None,
    attend: Callable[..., Tensor] | None = varlen_attn,
) -> Tensor:
    if softcap is not None:
        raise Unserved("its attention caps its logits, which variable lengths can't")
    if attend is None:
        raise Unserved("this torch has no torch.nn.attention.varlen")
    known = inspect.signature(attend).parameters
    if missing := {"window_size", "scale"} - known.keys():
        raise Unserved(f"torch.nn.attention.varlen has no {', '.join(sorted(missing))} here")
    query_NHd, key_NHd, value_NHd = (x[0].transpose(0, 1) for x in (query, key, value))
    key_MHd, value_MHd = (gather(x, packing.key_places) for x in (key_NHd, value_NHd))
    options: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            key_MHd, value_MHd = (x.repeat_interleave(groups, 1) for x in (key_MHd, value_MHd))
    return attend(
        query_NHd.contiguous(), key_MHd, value_MHd, packing.query_offsets, packing.key_offsets,
        packing.most_queries, packing.longest, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), **options,
    )[None]


def by_flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packing: Packing,
    scaling: float | None, softcap: float | None, window: int | None,
) -> Tensor:
    tokens = query.shape[2]
    missing = -tokens % _FLEX_MULTIPLE  # a compiled backward wants whole blocks
    query, key, value = (F.pad(x, (0, 0, 0, missing)) for x in (query, key, value))

    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    attended = flex_attention(
        query, key, value, score_mod=None if softcap is None else capped,
        block_mask=packing.flex_mask(missing, window), scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=_FLEX_FLOAT32 if query.dtype == torch.float32 else None,
    )
    return attended[:, :, :tokens].transpose(1, 2)


def sees(
    ends: Tensor, positions: Tensor, window: int | None
) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """FlexAttention's mask: token i sees j where j stands in i's line, not behind it (i is among
    what follows j in the row until j's sequences end), and within the window."""

    def mask(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i) & (i < ends[j])
        return seen if window is None else seen & (positions[i] - positions[j] < window)

    return mask


KERNELS = {"blocks": by_blocks, "varlen": by_lines, "flex": by_flex}


def kernels_for(device: torch.device, dtype: torch.dtype, softcap: bool) -> list[str]:
    """Kernels worth trying, the best first."""
    if device.type != "cuda":
        return ["blocks"]
    half = dtype in (torch.float16, torch.bfloat16)
    if softcap:
        return ["flex"]
    return ["varlen", "flex", "blocks"] if half else ["blocks"]


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention as uncompiled

    return torch.compile(uncompiled, dynamic=True)  # once for all lengths


def flex_attention(*args: Any, **options: Any) -> Tensor:
    # One code, compiled for each window, cap and mode; beyond the limit of 8 it would run eagerly.
    with torch._dynamo.config.patch(recompile_limit=64):
        return _compiled_flex()(*args, **options)
