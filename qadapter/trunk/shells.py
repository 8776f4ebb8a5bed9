"""Models of a trunk's own class that hold its very modules, but not all of them: a stretch of the
blocks, or all without the final norm.

Nothing is written for any architecture: whether shells do what their part of the trunk does is seen
on a few tokens by those who make them (``split``, ``final_norm``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from qadapter.errors import QAdapterError
from qadapter.trunk.lm_head import input_device, trunk

PROBE_TOKENS = 12
_PADDING, _FIRST_POSITION = 3, 5
_REPEATED = 4.0
_DEPTH = "num_hidden_layers"

# --- what a trunk is made of ----------------------------------------------------------------


def depth_of(base: PreTrainedModel) -> int:
    """Blocks of a causal LM's trunk."""
    return base.config.get_text_config().num_hidden_layers


def blocks_of(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of a trunk's blocks, and its name in the trunk."""
    depth = depth_of(base)
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


def ending_of(base: PreTrainedModel, name: str) -> frozenset[nn.Module]:
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
        body(**probes(base)[0], use_cache=False, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    place = ran.index(last)
    return frozenset(ran[place + 1:]) - frozenset(ran[: place + 1])


# --- shells ---------------------------------------------------------------------------------


def trunk_shell(
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
    shell = object.__new__(type(module))
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


# --- seeing what they are ---------------------------------------------------------


def probes(base: PreTrainedModel) -> list[dict[str, Tensor]]:
    """A text by itself; and two of which one is padded, at positions that don't begin at 0."""
    device, vocabulary = input_device(base), base.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, 2 * PROBE_TOKENS + 1) * 7 % vocabulary).view(2, PROBE_TOKENS)
    mask = torch.ones_like(ids)
    mask[1, :_PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0) + _FIRST_POSITION
    padded = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return [
        {"input_ids": ids[:1].to(device)}, {name: x.to(device) for name, x in padded.items()},
    ]


def same_states(ours: Tensor, run: Callable[[], Tensor], mask: Tensor | None) -> bool:
    """Whether hidden states [B, T, D] are those that a run gives, bit for bit; or, where the run
    does not repeat itself (experts on a GPU sum in any order), not farther from it than it is
    from itself. Padding does not count."""
    theirs = run()
    seen = slice(None) if mask is None else mask.bool().to(theirs.device)
    error = ours.to(theirs.device)[seen].float() - theirs[seen].float()
    if not error.any():
        return True
    return bool(error.norm() <= _REPEATED * (run()[seen].float() - theirs[seen].float()).norm())


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
