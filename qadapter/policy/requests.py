"""Requests of several policies of one base, packed in one of transformers' continuous batches,
each at a strength of its own.

A request is a few streams of the trunk with weights: its adapter's with 1 at strength 1, the base's
with 1 at strength 0, both between. The paged cache is built for a model of S·L layers, as for one
policy of S streams (``continuous_batching``), but which stream fills a request's first L layers is
the request's own choice: every token of a packed row is gated by itself. So a step runs the trunk
once for all requests at strengths 0 and 1, whatever their adapters, and twice where one of them
lies elsewhere. Head adapters need the base's stream alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter.adapters.head_adapter import HeadAdapter
from qadapter.adapters.lora import LoraAdapter
from qadapter.adapters.streams import BASE
from qadapter.policy.continuous_batching import StreamOfCache, config_of_layers
from qadapter.policy.dial import Policy
from qadapter.policy.model import QAdapterModel
from qadapter.trunk.lm_head import input_device, trunk
from qadapter.trunk.sharding import require_whole
from qadapter.trunk.shells import depth_of


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A policy at a strength: its logits are those of Σ wᵢ·hᵢ + w·f(h_b)."""

    streams: tuple[tuple[int, float], ...]
    """Of the trunk, with their weights; never none."""
    head: HeadAdapter | None = None
    """f."""
    head_weight: float = 0.0


BASE_ALONE = Mixture(((BASE, 1.0),))


@dataclasses.dataclass(frozen=True)
class ServedPolicy:
    """A policy that requests may ask for.

    Args:
        policy: gives the weights at a strength.
        head: a head adapter; or None for adapters in the trunk:
        streams: their numbers in ``LoraAdapter``.
    """

    policy: Policy
    head: HeadAdapter | None = None
    streams: tuple[int, ...] = ()

    def at(self, strength: float) -> Mixture:
        if strength == 0:
            return BASE_ALONE
        if self.head is not None:
            weight_a, weight_b = self.policy.stream_weights(strength)
            return Mixture(((BASE, weight_b),), self.head, weight_a)
        weights = zip((*self.streams, BASE), self.policy.trunk_weights(strength), strict=True)
        return Mixture(tuple((s, w) for s, w in weights if w != 0) or BASE_ALONE.streams)


class RequestBatches(PreTrainedModel, GenerationMixin):
    """What the batching manager sees of several policies: a model that draws its tokens itself, and
    gives each as the only possible one, so that every request has a sampling of its own.

    Args:
        model: any of them; its base, and the trunk's adapters, are all the others'.
        lora: the adapters in the trunk, if there are any.
        final_norm: the trunk's own, where a head adapter reads the states that enter it.
        depth: most streams that a request may have.
        choose: called at each step with what ``requests`` holds for the requests that get a token
            (None for one that is not there any more) and their logits [N, V], float32; returns the
            N tokens.

    Attributes: ``requests``: by the manager's ids, anything with a ``mixture``; ``lock``: held
    while a step runs.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self, model: QAdapterModel, lora: LoraAdapter | None, final_norm: nn.Module | None,
        depth: int, choose: Callable[[list[Any], Tensor], list[int]],
    ):
        require_whole(model.base, "serving")
        super().__init__(config_of_layers(model.config, depth))
        self.base = model.base
        self.lora = lora
        self.final_norm = final_norm
        self.choose = choose
        self.requests: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.generation_config = copy.deepcopy(model.generation_config)
        self._mix = model._mix
        self._layers = depth_of(model)
        self._manager: Any = None
        self.eval()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with ``use_async_batching`` and ``use_cuda_graph`` off: what a step
        runs depends on its requests."""
        self._manager = super().init_continuous_batching(*args, **kwargs)
        return self._manager

    @torch.no_grad()
    def forward(
        self, logits_to_keep: Tensor, cache: Any = None, **inputs: Any
    ) -> CausalLMOutputWithPast:
        """Args:
            logits_to_keep: [R], the last token of each request that gets one, and zeros after.
        """
        states = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        with self.lock:
            found = [self.requests.get(state.state.request_id) for state in states]
            mixtures = [BASE_ALONE if r is None else r.mixture for r in found]
            lengths = [state.query_length for state in states]
            drawing = [i for i, state in enumerate(states) if state.has_new_token]
            last = logits_to_keep[: len(drawing)]
            depth = max(len(mixture.streams) for mixture in mixtures)
            hidden, entering = [], []
            for k in range(depth):
                streams = [m.streams[k if k < len(m.streams) else 0][0] for m in mixtures]
                part = StreamOfCache(cache, k * self._layers) if k else cache
                with self._gated(streams, lengths), self._watched(entering):
                    outputs = trunk(self.base)(cache=part, **inputs)
                hidden.append(outputs.last_hidden_state[0, last])
            tokens: list[int] = []
            if drawing:
                features = entering[0][0, last] if entering else None
                logits_NV = self._logits([mixtures[i] for i in drawing], hidden, features)
                tokens = self.choose([found[i] for i in drawing], logits_NV.float())
        vocabulary = self.base.get_output_embeddings().weight.shape[0]
        logits_RV = torch.zeros(
            len(logits_to_keep), vocabulary, device=logits_to_keep.device, dtype=self.dtype
        )
        drawn = torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device)
        logits_RV[torch.arange(len(tokens), device=logits_RV.device), drawn] = 1.0
        return CausalLMOutputWithPast(logits=logits_RV[None])

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Between two steps, for whoever else wants to run the base: inside, its attention is that
        of a forward without a paged cache."""
        with self.lock:
            paged = self.base.config._attn_implementation
            own = paged.removeprefix("paged|")
            if own != paged:
                self.base.set_attn_implementation(own)
            try:
                yield
            finally:
                if own != paged:
                    self.base.set_attn_implementation(paged)

    def _gated(self, streams: Sequence[int], lengths: Sequence[int]) -> Any:
        if self.lora is None:
            return contextlib.nullcontext()
        device = input_device(self.base)
        stream_T = torch.tensor(streams, device=device).repeat_interleave(
            torch.tensor(lengths, device=device)
        )
        return self.lora.on_tokens(stream_T)

    @contextlib.contextmanager
    def _watched(self, entering: list[Tensor]) -> Iterator[None]:
        """Notes the states that enter the final norm."""
        if self.final_norm is None:
            yield
            return
        handle = self.final_norm.register_forward_pre_hook(
            lambda module, args: entering.append(args[0])
        )
        try:
            yield
        finally:
            handle.remove()

    def _logits(
        self, mixtures: Sequence[Mixture], hidden: Sequence[Tensor], entering: Tensor | None
    ) -> Tensor:
        """[N, V] of N requests; hidden: their states [N, D] in each of their streams; entering:
        those of the first that entered the final norm."""
        device = hidden[0].device
        terms = []
        for k, states_ND in enumerate(hidden):
            weights = [m.streams[k][1] if k < len(m.streams) else 0.0 for m in mixtures]
            terms.append((torch.tensor(weights, device=device), states_ND))
        for head in {id(m.head): m.head for m in mixtures if m.head is not None}.values():
            own = torch.tensor(
                [i for i, m in enumerate(mixtures) if m.head is head], device=device
            )
            adapted_ND = torch.zeros_like(hidden[0], dtype=torch.float32)
            features = entering if head.reads_before_norm else hidden[0]
            adapted_ND[own] = head(features[own]).to(adapted_ND.dtype)
            weights = [m.head_weight if m.head is head else 0.0 for m in mixtures]
            terms.append((torch.tensor(weights, device=device), adapted_ND))
        return self._mix(*zip(*terms, strict=True))

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # where the base has experts

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to initialise."""
