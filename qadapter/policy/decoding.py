"""Decoding several streams in one forward: a batch of B rows runs as S·B, a group for each stream,
the adapted one first, the base's last.

The weights are read once; adapters are gated per row (``qadapter.adapters.gating``), and the
hidden states meet in one product with the head (design §2, fact 5). Blocks below the lowest that an
adapter adapts do the same for every stream: they run once, on B rows, and keep B rows in the cache.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from qadapter.adapters.head_adapter import HeadAdapter
from qadapter.adapters.streams import BASE
from qadapter.errors import QAdapterError
from qadapter.policy.stream_cache import StreamCache, repeated
from qadapter.trunk.caches import CACHE, is_paged, name_of_cache, take_cache
from qadapter.trunk.lm_head import input_device, trunk
from qadapter.trunk.sharding import require_whole, share_draws
from qadapter.trunk.shells import depth_of

if TYPE_CHECKING:
    from transformers.generation.continuous_batching import PagedAttentionCache

    from qadapter.trunk.split import SplitTrunk

CONTINUOUS_BATCHING = "5.19"
"""The first transformers whose continuous batching runs this model right."""

_KEYS_AND_VALUES = {"full_attention", "sliding_attention", "chunked_attention", "sparse_attention"}
"""Types of layers, in a configuration, that keep nothing else."""
_FILLED: weakref.WeakKeyDictionary[Cache, tuple[int, ...]] = weakref.WeakKeyDictionary()
"""Which streams the caches hold that callers keep between turns."""


_TEXT = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"}
"""Tensors by which a trunk is given a text."""
_RECORDED = {"hidden_states": True, "attentions": False}
"""What a trunk may record of its blocks; whether the last of a part's is the next part's first."""


def _first(recorded: Sequence[Tensor | None], rows: int) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x[:rows] for x in recorded)


def _named(streams: Sequence[int]) -> str:
    alone = max(streams) == 0
    names = ["base" if s == BASE else "adapter" if alone else f"adapter {s + 1}" for s in streams]
    return " and ".join(names)


_STATES = (
    "{} keeps a state beside keys and values, which generation with an adapter can't carry along "
    "({:.200}): it can't be customised; take a model with attention alone"
)


def keeps_a_state(base: nn.Module) -> bool:
    """Whether a model carries more from token to token than keys and values."""
    layers = getattr(base.config.get_text_config(), "layer_types", None) or ()
    return (
        getattr(base, "_is_stateful", False)
        or name_of_cache(trunk(base)) != CACHE
        or not set(layers) <= _KEYS_AND_VALUES
    )


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return False
    tolerance = 64 * torch.finfo(ours.dtype).eps * theirs.abs().max().clamp_min(1.0)
    return bool((ours - theirs).abs().max() <= tolerance)


class StreamedGeneration(GenerationMixin):
    """Generation for models with ``base``, ``adapter`` and ``policy``: the trunk runs the streams
    that the policy needs, and caches hold those."""

    @property
    def adapts_trunk(self) -> bool:
        """Whether the streams differ inside the trunk (LoRA), not on its output alone."""
        return not isinstance(self.adapter, HeadAdapter)

    @property
    def reads_before_norm(self) -> bool:
        """Whether the trunk runs up to its final norm alone, which the adapter then applies."""
        return not self.adapts_trunk and self.adapter.reads_before_norm

    @property
    def feature_trunk(self) -> nn.Module:
        """The trunk up to what the adapter reads: its ``last_hidden_state`` are the features."""
        return self.adapter.final_norm.before if self.reads_before_norm else trunk(self.base)

    def _streams(self, strength: float | Tensor | None) -> tuple[int, ...]:
        """What the trunk has to run for a policy: adapters by their numbers, then ``BASE``."""
        if not self.adapts_trunk:
            return (BASE,)
        *adapters, base = self.policy.trunk_weights(strength)
        weights = {**dict(enumerate(adapters)), BASE: base}
        # A weight for each row is not looked at: that would wait for the GPU at every step.
        return tuple(s for s, w in weights.items() if isinstance(w, Tensor) or w != 0) or (BASE,)

    def _run(
        self, streams: tuple[int, ...], *, cache: Any = None, part: nn.Module | None = None,
        **inputs: Any,
    ) -> BaseModelOutputWithPast:
        """The trunk, for S streams with S·B rows; as far as the adapter reads.

        Args:
            part: the part of it to run, of a single stream.
        """
        body = self.feature_trunk if part is None else part
        shaped = inputs["input_ids"]
        if shaped is None:
            shaped = inputs["inputs_embeds"]
        rows, tokens = shaped.shape[:2]
        if len(streams) > 1 and is_paged(cache):
            return self._run_paged(streams, cache, **inputs)
        count = len(streams)
        if count > 1 and cache is None and self._uses_cache(inputs["use_cache"]):
            cache = StreamCache(DynamicCache(config=self.base.config), count)
        self._check_cache(streams, cache)
        split = self._shared_trunk(cache, inputs) if count > 1 else None
        if isinstance(cache, StreamCache):
            cache.rows = rows
            cache.share(split.first_block if split is not None else 0)
        # Attention looks for a paged cache by that name, whatever the trunk calls its own.
        name = "cache" if is_paged(cache) else self._trunk_cache
        if streams == (BASE,):
            off = self.adapter.off() if self.adapts_trunk else contextlib.nullcontext()
            with torch.no_grad(), off:
                return body(**{name: cache}, **inputs)
        with self.adapter.on(streams, count * rows, tokens):
            if count == 1:
                return body(**{name: cache}, **inputs)
            if split is not None:
                return self._run_shared(split, cache, rows, count, **inputs)
            outputs = body(**{name: cache}, **repeated(inputs, rows, count))
        for recorded in _RECORDED:  # the customised model's: its adapted stream
            if outputs.get(recorded) is not None:
                outputs[recorded] = _first(outputs[recorded], rows)
        return outputs

    def _shared_trunk(self, cache: Any, inputs: dict[str, Any]) -> SplitTrunk | None:
        """The trunk in two parts, where that spares streams their common blocks: not for a cache
        that was begun otherwise, or with inputs that the parts were not seen with (images)."""
        begun_whole = isinstance(cache, StreamCache) and cache.shared == 0
        others = any(isinstance(x, Tensor) for n, x in inputs.items() if n not in _TEXT)
        if self._keeps_a_state or begun_whole or others:
            return None
        split = self.split_trunk
        return split if split is not None and split.decodes else None

    def _run_shared(
        self, split: SplitTrunk, cache: StreamCache | None, rows: int, count: int, **inputs: Any
    ) -> BaseModelOutputWithPast:
        """The blocks that all streams have in common on B rows, the others on S·B."""
        name = self._trunk_cache
        if inputs.get("output_hidden_states"):  # some, by numbers that the parts don't know: all
            inputs["output_hidden_states"] = True
        common = split.below(**{name: cache and cache.below}, **inputs)
        inputs |= {"input_ids": None, "inputs_embeds": common.last_hidden_state}
        outputs = split.above(**{name: cache and cache.above}, **repeated(inputs, rows, count))
        outputs[name] = cache
        for recorded, ends in _RECORDED.items():
            if outputs.get(recorded) is not None:
                lower = common[recorded][:-1] if ends else common[recorded]
                outputs[recorded] = (*lower, *_first(outputs[recorded], rows))
        return outputs

    def _uses_cache(self, asked: bool | None) -> bool:
        return self.config.get_text_config().use_cache if asked is None else asked

    def _run_paged(
        self, streams: tuple[int, ...], cache: PagedAttentionCache, **inputs: Any
    ) -> BaseModelOutputWithPast:
        """One stream after the other, each in its layers of the cache."""
        from qadapter.policy.continuous_batching import StreamOfCache

        layers = depth_of(self.base)
        hidden = [
            self._run(
                (stream,), cache=StreamOfCache(cache, place * layers), **inputs
            ).last_hidden_state
            for place, stream in enumerate(streams)
        ]
        return BaseModelOutputWithPast(last_hidden_state=torch.cat(hidden))

    def _check_cache(self, streams: tuple[int, ...], cache: Any) -> None:
        if not isinstance(cache, Cache):
            return
        count = len(streams)
        held = cache.streams if isinstance(cache, StreamCache) else 1
        if held != count:
            raise QAdapterError(
                f"this policy runs {count} streams: pass past_key_values=qadapter.decoding."
                f"StreamCache(DynamicCache(config=model.config), {count})"
                if count > 1 else
                f"this policy runs the {_named(streams)} stream alone: a StreamCache can't serve it"
            )

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a cache may be given by any of the names its versions have. The
        processes of a tensor-parallel base must all call it, with the same inputs."""
        share_draws(self.base)
        cache = take_cache(kwargs)
        if cache is not None:
            kwargs[CACHE] = cache
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any,
        batch_size: int, max_cache_length: int,
    ) -> None:
        streams = self._streams(model_kwargs.get("strength"))
        given = model_kwargs.get(CACHE)
        if given is not None and self.adapts_trunk:
            filled = _FILLED.setdefault(given, streams)
            if filled != streams and given.get_seq_length():
                raise QAdapterError(
                    f"past_key_values hold the {_named(filled)} stream, this policy runs "
                    f"{_named(streams)}"
                )
            _FILLED[given] = streams
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode,
            len(streams) * batch_size, max_cache_length,
        )
        made = model_kwargs.get(CACHE)
        if len(streams) > 1 and given is None and made is not None:
            model_kwargs[CACHE] = StreamCache(made, len(streams))

    def check_generation(self) -> None:
        """Whether a base with a state beside keys and values (state-space layers, convolutions)
        generates here as it does by itself: seen on a few tokens, for other bases taken as given.

        Raises:
            QAdapterError: it does not.
        """
        if not keeps_a_state(self.base):
            return
        name, device = type(self.base).__name__, input_device(self.base)
        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        ids = torch.arange(3, 13, device=device).view(2, 5) % vocabulary
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        options = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4,
                   "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True,
                   "output_logits": True}
        runs = [(self.base, {}, {}), (self, {"strength": 0.0}, {})]
        if self.adapts_trunk:  # both streams, with and without a cache
            runs += [(self, {"strength": 0.5}, {"use_cache": False}), (self, {"strength": 0.5}, {})]
        try:
            off = self.adapter.off() if self.adapts_trunk else contextlib.nullcontext()
            with off:
                found = [runs[0][0].generate(ids, **options)]
            found += [m.generate(ids, **options, **a, **b) for m, a, b in runs[1:]]
            pairs = zip(found[::2], found[1::2], strict=True)
            same = all(_alike(torch.stack(a.logits), torch.stack(b.logits)) for a, b in pairs)
        except Exception as error:  # whatever a cache of another kind makes fail
            raise QAdapterError(_STATES.format(name, f"{type(error).__name__}: {error}")) from error
        if not same:
            raise QAdapterError(_STATES.format(name, "it gives other tokens"))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. A policy of several streams has to stay as it is until the manager
        stops: its cache is made for them.

        Raises:
            QAdapterError: the installed transformers is too old for it; the base is sharded.
        """
        require_whole(self.base, "continuous batching")
        if Version(transformers.__version__) < Version(CONTINUOUS_BATCHING):
            raise QAdapterError(
                f"continuous batching needs transformers {CONTINUOUS_BATCHING} or newer, and "
                f"{transformers.__version__} is installed: use generate, or upgrade it"
            )
        streams = self._streams(None)
        if len(streams) == 1:
            return super().init_continuous_batching(*args, **kwargs)
        from qadapter.policy.continuous_batching import PagedStreams

        return PagedStreams(self, streams).init_continuous_batching(*args, **kwargs)

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # The dial is this model's: an assistant proposes tokens in its own way.
        model_kwargs = {k: v for k, v in model_kwargs.items() if k != "strength"}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)
