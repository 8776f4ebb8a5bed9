"""A trunk in two parts: the blocks below one of them, and that one with all above it.

The parts are shells: models of the trunk's own class that hold the very same modules, each a
stretch of the blocks. The lower one ends without the final norm, the upper one is fed by
``inputs_embeds``. Nothing is written for any architecture: whether the two together are the whole
is seen on a few tokens, and where they are not (a model that scales or adds to what it is given as
embeddings, or hands more than states from block to block) the split is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from qadapter.errors import QAdapterError
from qadapter.trunk.caches import CachePart, name_of_cache
from qadapter.trunk.checkpointing import checkpoints_reentrantly
from qadapter.trunk.lm_head import input_device, trunk

_PROBE_TOKENS = 12
_PADDING, _FIRST_POSITION = 3, 5
_PROBE_STEPS = 8, 9, _PROBE_TOKENS
"""Where the steps of a decoding end: a prompt, a token, and several at once."""
_PROBE_WINDOW = 4
_REPEATED = 4.0
_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Fields of a configuration that keep a token from seeing all that lies before it."""
_DEPTH = "num_hidden_layers"


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
        name, blocks = _blocks(base)
        if not 0 < first_block < len(blocks):
            raise QAdapterError(
                f"a trunk of {len(blocks)} blocks has two parts at block 1 to {len(blocks) - 1}, "
                f"not at {first_block}"
            )
        body = trunk(base)
        try:
            with torch.no_grad(), _evaluating(body):
                ending = _ending(base, name)
                below = _shell(body, name, 0, first_block, without=ending)
                above = _shell(body, name, first_block, len(blocks))
                above.register_forward_pre_hook(_reach_checkpoints, with_kwargs=True)
                probed = body, below, above
                alike = _alike(base, *probed)
                windows = _small_windows(base)
                if alike and windows:
                    # A window is mostly longer than a probe should be: all get a small one.
                    probed = (
                        _shell(body, name, 0, len(blocks), changes=windows),
                        _shell(body, name, 0, first_block, without=ending, changes=windows),
                        _shell(body, name, first_block, len(blocks), changes=windows),
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
        _, blocks = _blocks(base)
    except QAdapterError:
        return None
    held = [adapted.intersection(block.modules()) for block in blocks]
    if not adapted or set().union(*held) != adapted:
        return None
    return next(number for number, layers in enumerate(held) if layers)


# --- what a trunk is made of ----------------------------------------------------------------


def _blocks(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of a trunk's blocks, and its name in the trunk."""
    depth = base.config.get_text_config().num_hidden_layers
    lists = _outermost_lists(trunk(base), "")
    found = [(name, blocks) for name, blocks in lists if len(blocks) == depth]
    if len(found) != 1:
        raise QAdapterError(
            f"{type(base).__name__} has {len(found)} lists of {depth} blocks: one is expected"
        )
    return found[0]


def _outermost_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def _holders(body: nn.Module, name: str) -> list[nn.Module]:
    """The modules around a list of blocks, the trunk first."""
    holders = [body]
    for part in name.split(".")[:-1]:
        holders.append(holders[-1].get_submodule(part))
    return holders


def _ending(base: PreTrainedModel, name: str) -> frozenset[nn.Module]:
    """The modules around the blocks that run after the last one alone: the final norm."""
    body = trunk(base)
    holders = _holders(body, name)
    ran: list[nn.Module] = []

    def note(module: nn.Module, args: Any) -> None:
        ran.append(module)

    around = [child for holder in holders for child in holder.children() if child not in holders]
    last = body.get_submodule(name)[-1]
    handles = [module.register_forward_pre_hook(note) for module in (*around, last)]
    try:
        # Asked for hidden states, the trunk hooks its blocks once: the shells must not do it again.
        body(**_probes(base)[0], use_cache=False, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    place = ran.index(last)
    return frozenset(ran[place + 1:]) - frozenset(ran[: place + 1])


# --- shells ---------------------------------------------------------------------------------


def _shell(
    body: nn.Module, name: str, first: int, stop: int, without: frozenset[nn.Module] = frozenset(),
    changes: dict[str, Any] | None = None,
) -> nn.Module:
    """A trunk with blocks ``first`` to ``stop`` alone.

    Args:
        name: of the list of blocks.
        without: modules that do nothing in it.
        changes: to fields of the text model's configuration.
    """
    holders = _holders(body, name)
    configs = _Configs(len(body.get_submodule(name)), first, stop, changes or {})
    shells = [_copied(holder, without, configs) for holder in holders]
    *path, leaf = name.split(".")
    for shell, inner, part in zip(shells, shells[1:], path, strict=False):
        shell._modules[part] = inner
    shells[-1]._modules[leaf] = nn.ModuleList(body.get_submodule(name)[first:stop])
    shells[0].register_forward_pre_hook(configs.follow)
    return shells[0]


def _copied(module: nn.Module, without: frozenset[nn.Module], configs: _Configs) -> nn.Module:
    """Another module of the same children, parameters and buffers; hooks are the original's."""
    shell = type(module).__new__(type(module))
    fields = vars(module) | vars(nn.Module()) | {"training": module.training}
    if fields.pop("_hf_hook", None) is not None:
        # Accelerate moves inputs here; the modules inside have hooks of their own for that.
        fields.pop("_old_forward", None)
        fields.pop("forward", None)
    if "forward" in fields:
        raise QAdapterError(f"the forward of {type(module).__name__} was replaced by another")
    for shared in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        fields[shared] = vars(module)[shared]
    fields["_modules"] = {
        name: nn.Identity() if child in without else child
        for name, child in module._modules.items()
    }
    if isinstance(fields.get("config"), PreTrainedConfig):
        fields["config"] = configs.part_of(fields["config"])
    vars(shell).update(fields)
    return shell


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


class _Configs:
    """Configurations of a part: the whole's, as they are at each forward (its attention may be set
    anew), but for what is said of each block."""

    def __init__(self, depth: int, first: int, stop: int, changes: dict[str, Any]):
        self.depth, self.first, self.stop, self.changes = depth, first, stop, changes
        self.pairs: list[tuple[PreTrainedConfig, PreTrainedConfig, dict[str, Any]]] = []

    def part_of(self, whole: PreTrainedConfig) -> PreTrainedConfig:
        for known, part, _ in self.pairs:
            if known is whole:
                return part
        own: dict[str, Any] = {}
        for name, value in vars(whole).items():
            if isinstance(value, PreTrainedConfig) and value is whole.get_text_config():
                own[name] = self.part_of(value)
            elif isinstance(value, (list, tuple)) and len(value) == self.depth:
                own[name] = value[self.first : self.stop]
        if whole.get_text_config() is whole:
            own[whole.attribute_map.get(_DEPTH, _DEPTH)] = self.stop - self.first
            own |= self.changes
        part = type(whole).__new__(type(whole))
        vars(part).update(vars(whole) | own)
        self.pairs.append((whole, part, own))
        return part

    def follow(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the part."""
        if torch.compiler.is_compiling():
            return
        for whole, part, own in self.pairs:
            vars(part).update(vars(whole) | own)


# --- seeing that they are the whole ---------------------------------------------------------


def _probes(base: PreTrainedModel) -> list[dict[str, Tensor]]:
    """A text by itself; and two of which one is padded, at positions that don't begin at 0."""
    device, vocabulary = input_device(base), base.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, 2 * _PROBE_TOKENS + 1) * 7 % vocabulary).view(2, _PROBE_TOKENS)
    mask = torch.ones_like(ids)
    mask[1, :_PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0) + _FIRST_POSITION
    padded = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return [
        {"input_ids": ids[:1].to(device)}, {name: x.to(device) for name, x in padded.items()},
    ]


def _alike(
    base: PreTrainedModel, whole: nn.Module, below: nn.Module, above: nn.Module
) -> bool:
    """Whether two parts, one after the other, do what the whole does."""
    for inputs in _probes(base):
        states = below(**inputs, use_cache=False).last_hidden_state
        rest = {name: x for name, x in inputs.items() if name != "input_ids"}
        ours = above(inputs_embeds=states, **rest, use_cache=False).last_hidden_state

        def run(inputs: dict[str, Tensor] = inputs) -> Tensor:
            return whole(**inputs, use_cache=False).last_hidden_state

        if not _same(ours, run, inputs.get("attention_mask")):
            return False
    return True


def _decode_alike(
    base: PreTrainedModel, whole: nn.Module, below: nn.Module, above: nn.Module, first_block: int
) -> bool:
    """The same with a cache, over a few steps."""
    inputs, name = _probes(base)[1], name_of_cache(whole)
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
        return _same(run(True), lambda: run(False), mask)
    except Exception:  # a cache of another kind
        return False


def _same(ours: Tensor, run: Callable[[], Tensor], mask: Tensor | None) -> bool:
    """Whether hidden states [B, T, D] are those that a run gives, bit for bit; or, where the run
    does not repeat itself (experts on a GPU sum in any order), not farther from it than it is
    from itself. Padding does not count."""
    theirs = run()
    seen = slice(None) if mask is None else mask.bool().to(theirs.device)
    error = ours.to(theirs.device)[seen].float() - theirs[seen].float()
    if not error.any():
        return True
    return bool(error.norm() <= _REPEATED * (run()[seen].float() - theirs[seen].float()).norm())


def _small_windows(base: PreTrainedModel) -> dict[str, int]:
    config = base.config.get_text_config()
    return {name: _PROBE_WINDOW for name in _WINDOWS if getattr(config, name, None) is not None}


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
