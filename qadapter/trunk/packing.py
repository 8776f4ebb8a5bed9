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
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qadapter.errors import QAdapterError
from qadapter.trunk.gathering import Gathering
from qadapter.trunk.lm_head import input_device
from qadapter.trunk.lm_head import trunk as trunk_of
from qadapter.trunk.packed_attention import PACKS, Unserved, install, kernels_for, sees

_PROBE_TOKENS = 48
_LIKE_LENGTH = 0.8
"""Sequences attend together if they are at least this share of the longest one's length."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of S sequences lie in one row of N. Sequences that begin alike share those
    tokens; the row is the tree of their beginnings, a branch after the other."""

    ids_N: Tensor
    positions_N: Tensor
    ends_N: Tensor
    """Where in the row the sequences that hold a token end: those after it and before are its
    continuations."""
    lines: list[Tensor]
    """Packed index of each sequence's tokens, S of [T], in the order the sequences were given; on
    the CPU."""
    blocks: list[Tensor]
    """The same for distinct sequences of like length, [S, T] each; what stands behind a sequence's
    end does not matter (attention is causal)."""
    block_places: Gathering
    """The packed tokens in all blocks, flattened and joined."""
    key_places: Gathering
    """The packed tokens in the lines of distinct sequences, joined in the order of the row."""
    query_offsets: Tensor
    """int32: where in the row each distinct sequence's own tokens begin, and N."""
    key_offsets: Tensor
    """int32: where its line begins in ``key_places``, and their number."""
    most_queries: int
    longest: int
    """Tokens of the longest sequence."""
    kernel: str = "blocks"
    windows: list[int | None] | None = None
    """Filled, where it is a list, with each attention's sliding window."""
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, sequences: Sequence[Tensor], device: torch.device | str | None = None, *,
        share: bool = True,
    ) -> Packing:
        """Lay out sequences of token ids, int64 [T] on the CPU each, T ≥ 1.

        Args:
            share: run common beginnings once; else every sequence is on its own.
        """
        texts = [np.asarray(ids) for ids in sequences]
        order, shared = list(range(len(texts))), [0] * len(texts)
        if share:
            # In the order of a dictionary a sequence shares most with the one before it.
            words = [ids.astype(">i8").tobytes() for ids in texts]
            order.sort(key=words.__getitem__)
            shared = [0, *(_common(texts[a], texts[b]) for a, b in itertools.pairwise(order))]
        lines: list[np.ndarray] = [np.empty(0)] * len(texts)
        distinct, own, start = [], [0], 0
        total = sum(map(len, texts)) - sum(shared)
        ids, positions = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
        ends = np.full(total, total)
        line = np.empty(0, dtype=np.int64)
        for number, common in zip(order, shared, strict=True):
            ends[line[common:]] = start
            stop = start + len(texts[number]) - common
            if stop > start:
                line = np.concatenate([line[:common], np.arange(start, stop)])
                ids[start:stop] = texts[number][common:]
                positions[start:stop] = np.arange(common, len(line))
                distinct.append(line)
                own.append(stop)
            lines[number] = line
            start = stop
        return cls._laid_out(ids, positions, ends, lines, distinct, own).to(device or "cpu")

    @classmethod
    def _laid_out(
        cls, ids: np.ndarray, positions: np.ndarray, ends: np.ndarray, lines: list[np.ndarray],
        distinct: list[np.ndarray], own: list[int],
    ) -> Packing:
        blocks, used, place = [], [], 0
        for alike in _by_length(distinct):
            width = len(alike[0])
            block = np.zeros((len(alike), width), dtype=np.int64)
            for row, line in zip(block, alike, strict=True):
                row[: len(line)] = line
                used.append(np.arange(place, place + len(line)))
                place += width
            blocks.append(block)
        keys = np.concatenate(distinct)
        lengths = [len(line) for line in distinct]
        joined = torch.from_numpy(np.concatenate(lines))
        return cls(
            *map(torch.from_numpy, (ids, positions, ends)),
            lines=list(joined.split([len(line) for line in lines])),
            blocks=[torch.from_numpy(block) for block in blocks],
            block_places=Gathering.of(
                np.concatenate([block.ravel() for block in blocks]), np.concatenate(used), len(ids)
            ),
            key_places=Gathering.of(keys, np.arange(len(keys)), len(ids)),
            query_offsets=torch.tensor(own, dtype=torch.int32),
            key_offsets=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
            most_queries=max(b - a for a, b in itertools.pairwise(own)),
            longest=max(lengths),
        )

    @property
    def places_N(self) -> Tensor:
        """For each packed token, one index into the blocks, flattened and joined, that holds it."""
        return self.block_places.first_N

    def gather(self, outputs: list[Tensor]) -> Tensor:
        """[N, ...] from one [S, T, ...] a block."""
        return torch.cat([x.flatten(0, 1) for x in outputs])[self.places_N]

    def collect(self, per_sequence: Sequence[Tensor]) -> Tensor:
        """[N, ...] from one [T, ...] a sequence, in the order the sequences were given; of what
        several hold, one's."""
        joined = torch.cat(list(per_sequence))
        owner_N = torch.empty(len(self.ids_N), dtype=torch.int64)
        owner_N[torch.cat(self.lines)] = torch.arange(len(joined))
        return joined[owner_N.to(joined.device)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packing:
        """The same on a device; ``lines`` stay on the CPU."""
        if self.ids_N.device == torch.device(device):
            return self
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Packing:
        """The same in memory that is copied to a GPU without waiting."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, do: Callable[[Tensor], Tensor]) -> Packing:
        names = {f.name for f in dataclasses.fields(self)} - {"lines", "windows", "kept"}
        changed = {name: _mapped(getattr(self, name), do) for name in names}
        return dataclasses.replace(self, **changed, kept={})

    def band(self, length: int, window: int) -> Tensor:
        """Who sees whom in a sequence: a window back, bool [1, 1, T, T]."""
        key = length, window
        if key not in self.kept:
            seen = torch.ones(length, length, dtype=torch.bool, device=self.ids_N.device)
            self.kept[key] = (seen.tril() & seen.triu(1 - window))[None, None]
        return self.kept[key]

    def flex_mask(self, missing: int, window: int | None) -> Any:
        """FlexAttention's mask, of the row and ``missing`` more tokens that see themselves."""
        key = "flex", missing, window
        if key not in self.kept:
            from torch.nn.attention.flex_attention import create_block_mask

            tokens, device = len(self.ids_N), self.ids_N.device
            rest = torch.arange(tokens, tokens + missing, device=device)
            # A mask made in inference mode could not be used by a backward later.
            with torch.inference_mode(False):
                ends = torch.cat([self.ends_N, rest + 1])
                positions = nn.functional.pad(self.positions_N, (0, missing))
                self.kept[key] = create_block_mask(
                    sees(ends, positions, window), None, None, tokens + missing, tokens + missing,
                    device=device,
                )
        return self.kept[key]


def _mapped(value: Any, do: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return do(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(x, do) for x in value)
    if isinstance(value, Gathering):
        fields = {f.name: _mapped(getattr(value, f.name), do) for f in dataclasses.fields(value)}
        return Gathering(**fields)
    return value


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def _by_length(lines: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    alike: list[np.ndarray] = []
    for line in sorted(lines, key=len, reverse=True):
        if alike and len(line) < _LIKE_LENGTH * len(alike[0]):
            yield alike
            alike = []
        alike.append(line)
    yield alike


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
        return _in_a_row(body, dataclasses.replace(packing, kernel=verdict.kernel), entering_ND)
    return _in_blocks(body, packing, entering_ND)


def _in_a_row(body: nn.Module, packing: Packing, entering_ND: Tensor | None = None) -> Tensor:
    # A mask of four dimensions is handed through as it is: none of [N, N] is made, and positions
    # that start again are not taken for packed sequences of transformers' own kind.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.ids_N.device)
    outputs = body(
        **_entering(packing.ids_N, entering_ND), attention_mask=mask,
        position_ids=packing.positions_N[None], use_cache=False, packing=packing,
    )
    return outputs.last_hidden_state[0]


def _in_blocks(body: nn.Module, packing: Packing, entering_ND: Tensor | None = None) -> Tensor:
    # Padding on the right comes after everything that is used: without a mask attention takes its
    # fastest path.
    outputs = []
    for block in packing.blocks:
        entering = None if entering_ND is None else entering_ND[block]
        inputs = _entering(packing.ids_N[block], entering)
        outputs.append(body(**inputs, use_cache=False).last_hidden_state)
    return packing.gather(outputs)


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


_verdicts: WeakKeyDictionary[PreTrainedModel, dict[tuple, _Verdict]] = WeakKeyDictionary()


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
    dtype = base.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    known = _verdicts.setdefault(base, {})
    key = name, device, dtype, gradients
    if key not in known:
        reason = _unfit(config)
        if reason is not None:
            known[key] = _Verdict("", reason, [])
        else:
            install(name)
            softcap = getattr(config, "attn_logit_softcapping", None) is not None
            for kernel in kernels_for(device, dtype, softcap):
                known[key] = _tried(base, kernel, dtype, gradients)
                if known[key].reason is None:
                    break
    return known[key]


def _unfit(config: Any) -> str | None:
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
    return f'its attention is {name!r}: load it with attn_implementation="sdpa"'


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
            hidden_ND = _in_a_row(body, packing)
            seen = list(windows)  # a checkpoint's recomputation adds to it
            ours = _outcome(hidden_ND, parameters)
            theirs = _outcome(_in_blocks(body, plain), parameters)
    except torch.OutOfMemoryError:
        raise
    except Unserved as error:
        return _Verdict(kernel, str(error), seen)
    except Exception as error:  # a model's own code, which was not written for this
        first = next(iter(str(error).splitlines()), "")
        return _Verdict(kernel, f"it can't be run packed: {type(error).__name__}: {first}", seen)
    # Roundings of a deep 16-bit model reach a few times its precision; a wrong attention is off
    # by the size of the states themselves.
    tolerance = max(16 * torch.finfo(dtype).eps, 1e-3)
    for what, one, other in zip(("states", "gradients"), ours, theirs, strict=True):
        off = float((one - other).norm() / other.norm().clamp_min(1e-30))
        if not off <= tolerance:
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
