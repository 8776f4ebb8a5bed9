"""What transformers calls the cache of keys and values: its versions and its models differ.

``past_key_values`` became ``cache`` in 5.24; before, state-space models said ``cache_params``, and
``cache`` was the paged one of continuous batching. So a cache is told by its type, and what a
function calls it by the function's own signature.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter.errors import QAdapterError

_NAMES = ("cache", "past_key_values", "cache_params")
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE = next(name for name in _NAMES if name in _FIELDS)
"""What the installed transformers calls a cache: in ``generate`` and in what a model returns."""


def name_of_cache(trunk: nn.Module) -> str:
    """What a trunk's forward and its outputs call the cache."""
    parameters = inspect.signature(trunk.forward).parameters
    return next((name for name in _NAMES if name in parameters), CACHE)


def is_paged(cache: Any) -> bool:
    """Whether a cache is continuous batching's, of requests that are packed into one row."""
    if cache is None or isinstance(cache, Cache):
        return False
    from transformers.generation.continuous_batching import PagedAttentionCache

    return isinstance(cache, PagedAttentionCache)


def take_cache(arguments: dict[str, Any]) -> Any:
    """Takes the cache out of keyword arguments, by whichever name it was given.

    Raises:
        QAdapterError: it was given twice.
    """
    given = {n: x for n in _NAMES if n in arguments and (x := arguments.pop(n)) is not None}
    if len(given) > 1:
        raise QAdapterError(f"{' and '.join(given)} are two names of one thing: give one of them")
    return next(iter(given.values()), None)


class CachePart(Cache):
    """The layers of a cache that a part of a trunk fills, as that part sees them: lengths are its
    own layers'; blocks write where they do in the whole.

    Args:
        cache: of the whole trunk.
        first, stop: numbers of the part's blocks there.
    """

    def __init__(self, cache: Cache, first: int, stop: int):
        own = cache.layers[first:stop]
        # Blocks are numbered as in the whole; the trunk around them asks from number 0 on.
        super().__init__(layers=own[:1] * first + own)
        self.cache = cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """By the whole, which may keep its layers elsewhere meanwhile."""
        return self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
