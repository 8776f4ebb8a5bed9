"""The trunk over many sequences at once: no padding, and what sequences begin with in common runs
once: a prompt for all its answers, a system message for all prompts.

Everything in a transformer but attention works on one token at a time, so the tokens of a batch
are laid out in one row and attention alone sees sequences again (``packed_attention``). The first
time a base is packed it is checked that the result, and its gradient, are the base's own; else
sequences are padded as usual.

Shapes: N packed tokens, S sequences of at most T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qadapter.errors import QAdapterError
from qadapter.trunk.base_dtype import autocast_dtype
from qadapter.trunk.layout import Packing
from qadapter.trunk.lm_head import input_device
from qadapter.trunk.lm_head import trunk as trunk_of
from qadapter.trunk.packed_attention import PACKS, Unserved, install, kernels_for
from qadapter.trunk.sharding import layout_of, within

_PROBE_TOKENS = 48
_ROUNDINGS = 4, 8
"""How far packed states and gradients may be from padded ones, in the precision of their dtype. A
30-layer base in bfloat16 differs by 1.5 in its gradients; tokens that mix outside attention, or a
prompt whose second answer is forgotten, by 6 at the least, mostly by more than 30."""

__all__ = ["Packing", "can_pack", "hidden_rows", "hidden_states"]


# --- the trunk ------------------------------------------------------------------------------


def hidden_states(
    base: PreTrainedModel, packing: Packing, *, packed: bool, trunk: nn.Module | None = None,
    entering_ND: Tensor | None = None,
) -> Tensor:
    """The base's last hidden states of all packed tokens [N, D]; gradients flow to its adapters.

    Args:
        packed: run them in one row, where ``can_pack`` says so; else as padded batches.
        trunk: a part of the base's trunk to run instead of all of it.
        entering_ND: what enters that part, [N, D], instead of token ids.

    Raises:
        QAdapterError: ``packed``, and this base can't be.
    """
    body = trunk_of(base) if trunk is None else trunk
    if packed:
        verdict = _verdict(base, torch.is_grad_enabled())
        if verdict.reason is not None:
            raise QAdapterError(f"{type(base).__name__} can't run packed: {verdict.reason}")
        install(base.config._attn_implementation)
        packing = dataclasses.replace(packing, kernel=verdict.kernel)
        return _in_a_row(base, body, packing, entering_ND)
    return _in_blocks(base, body, packing, entering_ND)


def _in_a_row(
    base: PreTrainedModel, body: nn.Module, packing: Packing, entering_ND: Tensor | None = None
) -> Tensor:
    # A mask of four dimensions is handed through as it is: none of [N, N] is made, and positions
    # that start again are not taken for packed sequences of transformers' own kind.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.ids_N.device)
    run = functools.partial(
        body, **_entering(packing.ids_N, entering_ND), attention_mask=mask,
        position_ids=packing.positions_N[None], use_cache=False, packing=packing,
    )
    return within(base, run).last_hidden_state[0]


def _in_blocks(
    base: PreTrainedModel, body: nn.Module, packing: Packing, entering_ND: Tensor | None = None
) -> Tensor:
    def run(block: Tensor) -> Tensor:
        entering = None if entering_ND is None else entering_ND[block]
        inputs = _entering(packing.ids_N[block], entering)
        # Padding on the right comes after everything that is used: without a mask attention takes
        # its fastest path.
        forward = functools.partial(body, **inputs, use_cache=False)
        return within(base, forward).last_hidden_state

    if not layout_of(base).engine:
        return packing.gather([run(block) for block in packing.blocks])
    # All processes must run a sharded base as often: in one block, whatever their texts.
    width = max(block.shape[1] for block in packing.blocks)
    wide = [nn.functional.pad(block, (0, width - block.shape[1])) for block in packing.blocks]
    outputs = run(torch.cat(wide)).split([len(block) for block in wide])
    pairs = zip(outputs, packing.blocks, strict=True)
    return packing.gather([hidden[:, : block.shape[1]] for hidden, block in pairs])


def _entering(ids: Tensor, entering: Tensor | None) -> dict[str, Tensor]:
    row = ids[None] if ids.dim() == 1 else ids
    if entering is None:
        return {"input_ids": row}
    return {"inputs_embeds": entering[None] if entering.dim() == 2 else entering}


def hidden_rows(
    run: Callable[[Packing], Sequence[Tensor]], input_ids: Tensor, attention_mask: Tensor,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Hidden states of a padded batch, [B, T, D]; 0 at padding, which is not run.

    Args:
        run: from the batch's packing to states of its tokens, [N, D] each: of one stream or more.
        input_ids: [B, T]; attention_mask: [B, T], 1 on one stretch of each row.
        device: of the packing; default: the ids'.
    """
    mask_BT = attention_mask.bool()
    texts = [ids[mask] for ids, mask in zip(input_ids.cpu(), mask_BT.cpu(), strict=True)]
    packing = Packing.of(texts, device or input_ids.device)
    line_M = torch.cat(packing.lines)
    rows = []
    for hidden_ND in run(packing):
        hidden_BTD = hidden_ND.new_zeros(*input_ids.shape, hidden_ND.shape[-1])
        hidden_BTD[mask_BT.to(hidden_ND.device)] = hidden_ND[line_M.to(hidden_ND.device)]
        rows.append(hidden_BTD)
    return rows


# --- whether it is the base's own -----------------------------------------------------------


class _Verdict(NamedTuple):
    kernel: str
    reason: str | None
    windows: list[int | None]
    """Each attention's, in the order they run."""


_verdicts: WeakKeyDictionary[PreTrainedModel, dict[tuple, _Verdict]] = WeakKeyDictionary()
_said: WeakKeyDictionary[PreTrainedModel, set[str]] = WeakKeyDictionary()


def _say_once(base: PreTrainedModel, line: str) -> None:
    said = _said.setdefault(base, set())
    if line not in said:
        said.add(line)
        logging.getLogger(__name__).warning("%s: %s", type(base).__name__, line)


def can_pack(base: PreTrainedModel, longest: int, *, gradients: bool = False) -> str | None:
    """Whether ``hidden_states`` can run sequences of this base packed: None, or why not, a line.

    The first time on a device and in a dtype a few tokens are run packed and padded, and compared.

    Args:
        longest: tokens of the longest sequence.
        gradients: those of the adapters' trainable parameters are compared too.
    """
    config = base.config
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < longest:
        return f"its attention works in chunks of {chunk} tokens, and a sequence has {longest}"
    verdict = _verdict(base, gradients)
    if verdict.reason is not None:
        return verdict.reason
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest and verdict.windows != _windows(config):
        return (
            f"its layers don't tell their attention of their window ({window} tokens), and a "
            f"sequence has {longest}"
        )
    return None


def _windows(config: Any) -> list[int | None]:
    """Each layer's, as the configuration says."""
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in types]


def _verdict(base: PreTrainedModel, gradients: bool) -> _Verdict:
    config, device = base.config, input_device(base)
    name = config._attn_implementation
    gradients = gradients and any(p.requires_grad for p in base.parameters())
    dtype = autocast_dtype(device.type) or base.dtype
    known = _verdicts.setdefault(base, {})
    key = name, device, dtype, gradients
    if key not in known:
        reason = _unfit(base)
        known[key] = (
            _first_that_works(base, device, dtype, gradients) if reason is None
            else _Verdict("", reason, [])
        )
    return known[key]


def _first_that_works(
    base: PreTrainedModel, device: torch.device, dtype: torch.dtype, gradients: bool
) -> _Verdict:
    install(base.config._attn_implementation)
    softcap = getattr(base.config, "attn_logit_softcapping", None) is not None
    first = None
    for kernel in kernels_for(device, dtype, softcap):
        verdict = _tried(base, kernel, dtype, gradients)
        first = first or verdict
        if verdict.reason is None:
            if verdict is not first:
                _say_once(base, f"packed by {kernel}, not by {first.kernel}: {first.reason}")
            return verdict
    return first


def _unfit(base: PreTrainedModel) -> str | None:
    config = base.config
    name = config._attn_implementation
    if config.get_text_config() is not config:
        return "its language model is a part of it"
    if name in PACKS:
        return None
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return (
            f"its attention ({name}) caps its logits, which sdpa can't: on a GPU load it with "
            'attn_implementation="flex_attention"'
        )
    way = 'load it with attn_implementation="sdpa"'
    if not getattr(base, "_supports_sdpa", False):
        way = f"transformers has no sdpa attention for {type(base).__name__}"
    return f"its attention is {name!r}: {way}"


def _tried(base: PreTrainedModel, kernel: str, dtype: torch.dtype, gradients: bool) -> _Verdict:
    """Packed against padded: not alike where tokens also mix outside attention (state space
    models), or where positions are not taken from ``position_ids``."""
    ids = torch.arange(_PROBE_TOKENS) * 7 % (base.config.vocab_size - 1) + 1
    prefix, middle, ending = ids.tensor_split([16, 40])
    texts = ([prefix, middle], [prefix, ending], [ending, middle])
    windows: list[int | None] = []
    seen: list[int | None] = []
    plain = Packing.of([torch.cat(text) for text in texts], input_device(base))
    packing = dataclasses.replace(plain, kernel=kernel, windows=windows)
    parameters = [p for p in base.parameters() if p.requires_grad] if gradients else []
    body = trunk_of(base)
    try:
        with _still(base), torch.inference_mode(False), torch.set_grad_enabled(gradients):
            hidden_ND = _in_a_row(base, body, packing)
            seen = list(windows)  # a checkpoint's recomputation adds to it
            if not seen:
                return _Verdict(kernel, "its layers hand its attention no keyword arguments", seen)
            ours = _outcome(hidden_ND, parameters)
            theirs = _outcome(_in_blocks(base, body, plain), parameters)
            noise = within(base, lambda: _noise(body, plain, theirs[0]))
    except torch.OutOfMemoryError:
        raise
    except Unserved as error:
        return _Verdict(kernel, str(error), seen)
    except Exception as error:  # a model's own code, which was not written for this
        first = next(iter(str(error).splitlines()), "")
        return _Verdict(kernel, f"it can't be run packed: {type(error).__name__}: {first}", seen)
    for what, one, other, times in zip(
        ("states", "gradients"), ours, theirs, _ROUNDINGS, strict=True
    ):
        off = float((one - other).norm() / other.norm().clamp_min(1e-30))
        roundings = max(times * torch.finfo(dtype).eps, 1e-3)
        if not off <= roundings + min(2 * noise, roundings):
            return _Verdict(
                kernel, f"its packed {what} are not its padded ones (off by {off:.1%})", seen
            )
    return _Verdict(kernel, None, seen)


def _outcome(hidden_ND: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """States and gradients, flat."""
    states = hidden_ND.float()
    if not parameters:
        return states.flatten(), states.new_zeros(0)
    directions = torch.arange(states.numel(), device=states.device).sin().view_as(states)
    found = torch.autograd.grad((states * directions).sum(), parameters, allow_unused=True)
    flat = [g.detach().flatten().float().to(states.device) for g in found if g is not None]
    return states.detach().flatten(), torch.cat(flat)


@torch.no_grad()
def _noise(body: nn.Module, packing: Packing, states: Tensor) -> float:
    """How far the base is from itself where each sequence runs alone."""
    states_ND = states.view(len(packing.ids_N), -1)
    off = [0.0]
    for line in packing.lines:
        line = line.to(states.device)
        alone_TD = body(input_ids=packing.ids_N[line][None], use_cache=False).last_hidden_state[0]
        expected_TD = states_ND[line]
        off.append(float((alone_TD - expected_TD).norm() / expected_TD.norm()))
    return max(off)


@contextlib.contextmanager
def _still(base: nn.Module) -> Iterator[None]:
    """Without dropout; layers that are checkpointed still are."""
    dropping = [
        m for m in base.modules()
        if m.training and not isinstance(m, GradientCheckpointingLayer)
    ]
    for module in dropping:
        module.training = False
    try:
        yield
    finally:
        for module in dropping:
            module.training = True
