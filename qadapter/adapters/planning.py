"""What an adapter of a base will hold, before any of it is."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qadapter.adapters.head_adapter import AdapterConfig
from qadapter.errors import QAdapterError, beginning
from qadapter.system.room import available_memory, size

if TYPE_CHECKING:
    from peft import PeftConfig


def planned_weights(
    base: nn.Module, adapter: AdapterConfig | PeftConfig
) -> dict[str, Tensor] | None:
    """The state dict of an adapter, on the meta device; None of the few of PEFT's kinds that can't
    be built there. The base stays as it is.

    Raises:
        QAdapterError: PEFT can't adapt the base so.
    """
    if isinstance(adapter, AdapterConfig):
        head = getattr(base.get_output_embeddings(), "weight", None)
        if head is None or head.dim() != 2:
            return None  # building the model says what is wrong with it
        return adapter.build(head.shape[1], torch.device("meta")).state_dict()
    import peft

    from qadapter.adapters.peft_config import require_adapting, require_matching

    require_adapting(adapter)
    require_matching(adapter, (name for name, _ in base.named_modules()))
    adapter = copy.deepcopy(adapter)
    if getattr(adapter, "init_lora_weights", None):
        adapter.init_lora_weights = False  # some would read the base's weights
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            planned = peft.get_peft_model(_outline(base), adapter, low_cpu_mem_usage=True)
            return peft.get_peft_model_state_dict(planned, save_embedding_layers=False)
    except (NotImplementedError, RuntimeError):
        return None
    except Exception as error:
        raise QAdapterError(
            f"PEFT can't adapt {type(base).__name__}: {beginning(error)}; a head adapter fits any "
            "base"
        ) from error


def require_room(base: nn.Module, adapter: AdapterConfig | PeftConfig) -> None:
    """Raises QAdapterError where an adapter alone takes more than the memory there is."""
    planned = planned_weights(base, adapter) or {}
    wanted = sum(4 * math.prod(x.shape) for x in planned.values())
    if wanted > (there := available_memory()):
        raise QAdapterError(
            f"the adapter alone takes {size(wanted)}, {size(there)} of memory are available: "
            "choose a smaller rank"
        )


def _outline(base: nn.Module) -> nn.Module:
    """A copy on the meta device. Packed weights, which tell how they are packed, are shared."""
    outlined = {
        id(x): nn.Parameter(x.detach().to("meta"), requires_grad=False)
        if isinstance(x, nn.Parameter) else x.to("meta")
        for x in itertools.chain(base.parameters(), base.buffers())
        if type(x) in (nn.Parameter, Tensor)
    }
    shared = {id(x): x for x in itertools.chain(base.parameters(), base.buffers())}
    return copy.deepcopy(base, shared | outlined)
