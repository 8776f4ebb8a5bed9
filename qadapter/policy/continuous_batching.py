"""Continuous batching of several streams: each has layers of its own in transformers' paged cache.

The cache is built for a model of S·L layers, so that a request's blocks hold all its streams; the
streams of a step run one after the other over the same packed tokens, each through the whole trunk:
its blocks of memory have one size for all layers, shared or not.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter.errors import QAdapterError


class StreamOfCache(PagedAttentionCache):
    """One stream's layers of a paged cache.

    Args:
        cache: of a model with S·L layers.
        first_layer: where the stream's L begin.
    """

    def __init__(self, cache: PagedAttentionCache, first_layer: int):
        self.cache, self.first_layer = cache, first_layer  # the memory is the cache's: no super()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.cache.update(
            key_states, value_states, self.first_layer + layer_idx, *args, **kwargs
        )


def config_of_layers(config: PretrainedConfig, streams: int) -> PretrainedConfig:
    """A model's configuration with S·L layers, for the manager."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = list(text.layer_types) * streams
    text.num_hidden_layers *= streams
    return config


class PagedStreams(PreTrainedModel, GenerationMixin):
    """What the batching manager sees of a model that runs several streams: one with more layers.

    Args:
        model: a ``QAdapterModel``.
        streams: the S that its policy runs.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, model: PreTrainedModel, streams: tuple[int, ...]):
        super().__init__(config_of_layers(model.config, len(streams)))
        self.model = model
        self.streams = streams
        self.generation_config = model.generation_config
        self.train(model.training)

    def forward(
        self, logits_to_keep: int | Tensor = 0, **inputs: Any
    ) -> CausalLMOutputWithPast:
        if self.model._streams(None) != self.streams:
            raise QAdapterError("the policy was set anew while its requests were being served")
        return self.model(logits_to_keep=logits_to_keep, **inputs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # where the base has experts

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing to initialise."""
