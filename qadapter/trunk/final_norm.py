"""The last thing a trunk does, its final norm, apart from all before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from qadapter.errors import QAdapterError
from qadapter.trunk.lm_head import trunk
from qadapter.trunk.sharding import full, layout_of, within, without_hooks
from qadapter.trunk.shells import (
    blocks_of,
    ending_of,
    evaluating,
    probes,
    same_states,
    trunk_shell,
)


@dataclass(frozen=True)
class FinalNorm:
    """A frozen trunk as ``norm`` after ``before``; both are its own modules.

    Called with states that enter the norm, [..., D], it gives what the norm makes of them, in their
    dtype; gradients reach the states.
    """

    before: PreTrainedModel
    """The trunk without the norm: takes what the trunk takes, and its ``last_hidden_state`` are the
    states x [B, T, D] that enter it."""
    norm: nn.Module
    shrinks_by: float
    """How much larger states mostly are before it than behind it; a power of two."""
    bare: nn.Module | None = None
    """Of a sharded base: the norm, run with weights that are gathered here."""

    @classmethod
    def of(cls, base: PreTrainedModel) -> FinalNorm:
        """
        Raises:
            QAdapterError: the trunk doesn't end with one norm, it isn't in memory, or the two parts
                together are not the whole.
        """
        return within(base, lambda: cls._seen(base))

    @classmethod
    def _seen(cls, base: PreTrainedModel) -> FinalNorm:
        name, blocks = blocks_of(base)
        body = trunk(base)
        try:
            with torch.no_grad(), evaluating(body):
                ending = ending_of(base, name)
                if len(ending) != 1:
                    raise _refusal(base, f"{len(ending)} modules follow its blocks, not one norm")
                (norm,) = ending
                if any(parameter.is_meta for parameter in norm.parameters()):
                    raise _refusal(
                        base, "it is not in memory (offloaded?): give it a device of its own in "
                        "device_map"
                    )
                before = trunk_shell(body, name, 0, len(blocks), without=ending)
                bare = without_hooks(norm) if layout_of(base).engine else None
                text, padded = probes(base)
                found = cls(before, norm, _ratio(before, norm, text), bare)
                alike = all(_alike(found, body, inputs) for inputs in (text, padded))
        except QAdapterError:
            raise
        except Exception as error:  # whatever a model's code needs of what it misses
            raise _refusal(base, f"{type(error).__name__}: {error!s:.200}") from error
        if not alike:
            raise _refusal(base, "the rest of the trunk and it give other states than the whole")
        return found

    def __call__(self, states: Tensor) -> Tensor:
        parameters = {name: full(x) for name, x in self.norm.named_parameters()}
        here = next(iter(parameters.values()), states).device  # a device_map may put it elsewhere
        moved = states.to(here)
        if self.bare is None and all(x.dtype == states.dtype for x in parameters.values()):
            return self.norm(moved).to(states.device)
        # As the norm would be in the states' dtype: some refuse to mix two.
        cast = {name: x.to(states.dtype) for name, x in parameters.items()}
        return functional_call(self.bare or self.norm, cast, (moved,)).to(states.device)


def _refusal(base: PreTrainedModel, reason: str) -> QAdapterError:
    return QAdapterError(
        f"the final norm of {type(base).__name__} can't be told apart: {reason}; take an adapter "
        'of form "linear" or "mlp", which reads the states behind it'
    )


def _alike(found: FinalNorm, body: nn.Module, inputs: dict[str, Tensor]) -> bool:
    states = found.before(**inputs, use_cache=False).last_hidden_state
    ours = found(states)
    if ours.shape != states.shape:
        return False

    def run() -> Tensor:
        return body(**inputs, use_cache=False).last_hidden_state

    return same_states(ours, run, inputs.get("attention_mask"))


def _ratio(before: PreTrainedModel, norm: nn.Module, inputs: dict[str, Tensor]) -> float:
    states_TD = before(**inputs, use_cache=False).last_hidden_state[0]
    sizes = (x.float().norm(dim=-1) for x in (states_TD, norm(states_TD)))
    # The median: a text's first token is often much larger.
    ratio = torch.div(*sizes).nan_to_num(1.0).median().clamp(2.0**-20, 2.0**20)
    return 2.0 ** round(math.log2(ratio))
