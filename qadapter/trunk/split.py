"""A trunk in two parts: the blocks below one of them, and that one with all above it.

The parts are shells: models of the trunk's own class that hold the very same modules, each a
stretch of the blocks. The lower one ends without the final norm, the upper one is fed by
``inputs_embeds``. Nothing is written for any architecture: whether the two together are the whole
is seen on a few tokens, and where they are not (a model that scales or adds to what it is given as
embeddings, or hands more than states from block to block) the split is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from qadapter.errors import QAdapterError
from qadapter.trunk.caches import CachePart, name_of_cache
from qadapter.trunk.checkpointing import checkpoints_reentrantly
from qadapter.trunk.lm_head import trunk
from qadapter.trunk.sharding import within
from qadapter.trunk.shells import (
    PROBE_TOKENS,
    blocks_of,
    ending_of,
    evaluating,
    probes,
    same_states,
    trunk_shell,
)

_PROBE_STEPS = 8, 9, PROBE_TOKENS
"""Where the steps of a decoding end: a prompt, a token, and several at once."""
_PROBE_WINDOW = 4
_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Fields of a configuration that keep a token from seeing all that lies before it."""


@dataclass(frozen=True)
class SplitTrunk:
    """A trunk of L blocks as two models of the same modules; both take what the trunk takes
    (``attention_mask``, ``position_ids``, a cache, ``packing``, …)."""

    first_block: int
    """m: the lowest block of ``above``, 0 < m < L."""
    below: PreTrainedModel
    """From token ids (or embeddings) to the states that enter block m, its
    ``last_hidden_state`` [B, T, D]."""
    above: PreTrainedModel
    """From those, as ``inputs_embeds``, to the trunk's ``last_hidden_state`` [B, T, D]."""
    decodes: bool
    """Whether they are the whole with a cache, too, each seeing a ``CachePart`` of it."""

    @classmethod
    def of(cls, base: PreTrainedModel, first_block: int) -> SplitTrunk:
        """Split a causal LM's trunk below block m.

        Raises:
            QAdapterError: there is no block m above others, or the two parts are not the whole.
        """
        return within(base, lambda: cls._seen(base, first_block))

    @classmethod
    def _seen(cls, base: PreTrainedModel, first_block: int) -> SplitTrunk:
        name, blocks = blocks_of(base)
        if not 0 < first_block < len(blocks):
            raise QAdapterError(
                f"a trunk of {len(blocks)} blocks has two parts at block 1 to {len(blocks) - 1}, "
                f"not at {first_block}"
            )
        body = trunk(base)
        try:
            with torch.no_grad(), evaluating(body):
                ending = ending_of(base, name)
                below = trunk_shell(body, name, 0, first_block, without=ending)
                above = trunk_shell(body, name, first_block, len(blocks))
                above.register_forward_pre_hook(_reach_checkpoints, with_kwargs=True)
                probed = body, below, above
                alike = _alike(base, *probed)
                windows = _small_windows(base)
                if alike and windows:
                    # A window is mostly longer than a probe should be: all get a small one.
                    probed = (
                        trunk_shell(body, name, 0, len(blocks), changes=windows),
                        trunk_shell(body, name, 0, first_block, without=ending, changes=windows),
                        trunk_shell(body, name, first_block, len(blocks), changes=windows),
                    )
                    alike = _alike(base, *probed)
                decodes = alike and _decode_alike(base, *probed, first_block)
        except QAdapterError:
            raise
        except Exception as error:  # whatever a model's code needs of the blocks it misses
            reason = f"{type(error).__name__}: {error!s:.200}"
            raise QAdapterError(_refusal(base, first_block, reason)) from error
        if not alike:
            reason = "they give other states than the whole (it scales embeddings, or adds to them)"
            raise QAdapterError(_refusal(base, first_block, reason))
        return cls(first_block, below, above, decodes)


def _refusal(base: PreTrainedModel, first_block: int, reason: str) -> str:
    return f"{type(base).__name__} can't be run in two parts at block {first_block}: {reason}"


def lowest_adapted(base: PreTrainedModel) -> int | None:
    """The lowest block of a trunk that holds an adapter's layers. None where there are none, or
    some lie outside the blocks (on the embeddings, the last norm), or no list of blocks is seen."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    adapted = {m for m in base.modules() if isinstance(m, kinds)}
    try:
        _, blocks = blocks_of(base)
    except QAdapterError:
        return None
    held = [adapted.intersection(block.modules()) for block in blocks]
    if not adapted or set().union(*held) != adapted:
        return None
    return next(number for number, layers in enumerate(held) if layers)


def _reach_checkpoints(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of an upper part: the states it is given are constants, and some checkpoints
    give no gradients to blocks whose input needs none."""
    states = kwargs.get("inputs_embeds")
    if torch.is_grad_enabled() and states is not None and not states.requires_grad:
        if checkpoints_reentrantly(module):
            kwargs = kwargs | {"inputs_embeds": states.detach().requires_grad_()}
    return args, kwargs


# --- seeing that they are the whole ---------------------------------------------------------


def _alike(
    base: PreTrainedModel, whole: nn.Module, below: nn.Module, above: nn.Module
) -> bool:
    """Whether two parts, one after the other, do what the whole does."""
    for inputs in probes(base):
        states = below(**inputs, use_cache=False).last_hidden_state
        rest = {name: x for name, x in inputs.items() if name != "input_ids"}
        ours = above(inputs_embeds=states, **rest, use_cache=False).last_hidden_state

        def run(inputs: dict[str, Tensor] = inputs) -> Tensor:
            return whole(**inputs, use_cache=False).last_hidden_state

        if not same_states(ours, run, inputs.get("attention_mask")):
            return False
    return True


def _decode_alike(
    base: PreTrainedModel, whole: nn.Module, below: nn.Module, above: nn.Module, first_block: int
) -> bool:
    """The same with a cache, over a few steps."""
    inputs, name = probes(base)[1], name_of_cache(whole)
    mask = inputs.pop("attention_mask")

    def run(split: bool) -> Tensor:
        cache, states, start = DynamicCache(config=whole.config), [], 0
        parts = [(whole, cache)]
        if split:
            depth = len(cache.layers)
            parts = [(below, CachePart(cache, 0, first_block)),
                     (above, CachePart(cache, first_block, depth))]
        for stop in _PROBE_STEPS:
            given = {n: x[:, start:stop] for n, x in inputs.items()}
            for part, seen in parts:
                states_BTD = part(
                    **{name: seen}, **given, attention_mask=mask[:, :stop], use_cache=True
                ).last_hidden_state
                given |= {"input_ids": None, "inputs_embeds": states_BTD}
            states.append(states_BTD)
            start = stop
        return torch.cat(states, dim=1)

    try:
        return same_states(run(True), lambda: run(False), mask)
    except Exception:  # a cache of another kind
        return False


def _small_windows(base: PreTrainedModel) -> dict[str, int]:
    config = base.config.get_text_config()
    return {name: _PROBE_WINDOW for name in _WINDOWS if getattr(config, name, None) is not None}
