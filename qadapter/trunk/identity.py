"""Which base an adapter belongs to: what changes a model's numbers, and nothing else.

Weights by sums over every tensor, rounded to bfloat16, so that one checkpoint has one identity in
every dtype it is loaded in; in one dtype also as they are. Configurations by the fields that both
have: versions of transformers and other tools add some, and those of token ids, dropout, caches or
names change no number.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from qadapter.errors import QAdapterError, shown
from qadapter.trunk.lm_head import head_weight
from qadapter.trunk.loading import LoadedBase
from qadapter.trunk.sharding import full, reshard

_SAMPLES = 64
"""Elements of each tensor that enter ``sampled``."""
_LANES = 61
"""Sums side by side, each of every 61st word: a prime, so that rows in other places are noticed."""
_BLOCK = 2048 * 8 * _LANES
"""Elements that are summed at once; whole words and whole lanes in every dtype."""
_LEAVING_VECTORS = ("bitsandbytes", "torchao", "quanto", "hqq")
"""Quantizations that pack matrices and leave norms and biases as they are."""
_WITHOUT_NUMBERS = (
    "_token_id", "_token_index", "_dropout", "dropout", "pdrop", "initializer_range",
    "transformers_version", "dtype", "use_cache", "_implementation", "architectures",
    "quantization_config", "id2label", "label2id", "max_position_embeddings", "vocab_size",
    "tie_word_embeddings", "pretraining_tp", "return_dict", "auto_map", "output_attentions",
    "output_hidden_states", "problem_type", "is_decoder", "output_router_logits",
    "distributed_config",
)
"""Ends of names of configuration fields that say nothing about the logits of a text, or nothing
that the weights don't say."""


@dataclasses.dataclass(frozen=True)
class BaseIdentity:
    """Which base an adapter belongs to. Weights and configuration decide, names are for people."""

    name: str
    revision: str | None
    head_sha256: str
    layout_sha256: str | None = None
    """Of the names and shapes of all tensors; None: not known (an adapter saved before)."""
    weights_sha256: str | None = None
    """Of samples of them. None: not known, packed by a quantization, or out of reach."""
    config: dict[str, Any] | None = None
    """The text model's configuration, without what changes no number."""
    content: dict[str, str] = dataclasses.field(default_factory=dict)
    """Digests of the whole weights, by what they are of and a digest of the names and shapes or
    dtypes. ``rounded``: to bfloat16. ``stored``: as they are. ``vectors``: of norms and biases
    alone, which most quantizations leave. What both bases have decides."""

    @classmethod
    def of(cls, base: LoadedBase) -> BaseIdentity:
        """Raises QAdapterError where the head can't be read."""
        model = base.model
        packed = getattr(model, "is_quantized", False)
        state = {} if packed else _in_reach(model)
        unreadable = packed or any(x.is_meta for x in state.values())
        return cls(
            name=base.name,
            revision=getattr(model.config, "_commit_hash", None),
            head_sha256=digest_of_head(head_weight(model)),
            layout_sha256=None if packed else _layout(state),
            weights_sha256=None if unreadable else sampled(state.items(), torch.bfloat16),
            config=numbers_of(model.config),
            content=_content(model, packed),
        )

    @classmethod
    def saved(cls, fields: dict[str, Any]) -> BaseIdentity:
        """From JSON; of adapters saved before only the head is held against a base (their hash of
        the whole configuration changes with transformers' version).

        Raises:
            TypeError: a field that is none, or of a wrong type.
        """
        identity = cls(**{name: x for name, x in fields.items() if name != "config_sha256"})
        texts = (identity.name, identity.head_sha256, *identity.content.values())
        others = (identity.revision, identity.layout_sha256, identity.weights_sha256)
        if not all(isinstance(x, str) for x in texts) or not all(
            isinstance(x, (str, type(None))) for x in others
        ) or not isinstance(identity.config, (dict, type(None))):
            raise TypeError("what it says of the base is of wrong types")
        return identity

    def require(self, found: BaseIdentity, adapter_dir: object) -> None:
        """Raises QAdapterError, with both names and what differs, unless ``found`` is the same
        model."""
        differing = ["head"] if self.head_sha256 != found.head_sha256 else []
        if self.config is not None and found.config is not None:
            changed = list(_differences(self.config, found.config))
            differing += [f"config ({', '.join(changed)})"] if changed else []
        if not differing and self._weights_differ(found):
            differing.append("trunk's weights")
        if differing:
            raise QAdapterError(
                f"{adapter_dir}: trained on {self.name}, but the base given is {found.name}: "
                f"its {' and '.join(differing)} differ"
            )

    def _weights_differ(self, found: BaseIdentity) -> bool:
        both = self.content.keys() & found.content.keys()
        if any(self.content[name] != found.content[name] for name in both):
            return True
        # Versions of transformers name or fuse tensors otherwise: then config and head decide.
        known = None not in (self.weights_sha256, found.weights_sha256)
        alike = known and self.layout_sha256 == found.layout_sha256
        return alike and self.weights_sha256 != found.weights_sha256


def digest_of_head(weight: Tensor) -> str:
    """SHA-256 of an lm_head [V, D], rounded to bfloat16."""
    rounded = full(weight).to("cpu", torch.bfloat16, copy=True).contiguous()
    return hashlib.sha256(rounded.view(torch.uint8).numpy().data).hexdigest()


def numbers_of(config: PretrainedConfig) -> dict[str, Any]:
    """A text model's configuration, without what changes no number."""
    return _numbers(config.get_text_config().to_dict())


def summed(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """SHA-256 of sums over tensors, in the order of their names: at the speed of memory, and none
    of their elements can change alone without another digest.

    Args:
        dtype: as ``sampled``'s.
    """
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors, key=lambda item: item[0]):
        sums, rest = [], b""
        for block in full(tensor).reshape(-1).split(_BLOCK):
            if dtype is not None and block.is_floating_point():
                block = block.to(dtype)
            raw = block.contiguous().view(torch.uint8)
            whole = raw.numel() - raw.numel() % (8 * _LANES)
            rest = _bytes(raw[whole:])  # of the last block alone
            sums.append(_words(raw[:whole]).view(-1, _LANES).sum(0))
        if sums:
            digest.update(_bytes(torch.stack(sums)))
        digest.update(rest)
    return digest.hexdigest()


def digest_of(model: nn.Module) -> str:
    """Of everything that a model's numbers come from, packed weights included, as it is stored. Of
    what is on a disk samples are taken."""
    offloaded = any(x.is_meta for x in model.state_dict().values())
    return (sampled if offloaded else summed)(_in_reach(model).items())


def _bytes(tensor: Tensor) -> bytes:
    """Of a copy: FSDP2 can't let go of memory that numpy has seen."""
    return tensor.to("cpu", copy=True).numpy().tobytes()


def _words(raw: Tensor) -> Tensor:
    return (raw if raw.storage_offset() % 8 == 0 else raw.clone()).view(torch.int64)


def sampled(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """SHA-256 of samples of tensors, in the order of their names.

    Args:
        dtype: floating-point tensors are rounded to it; default: each as it is.
    """
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors, key=lambda item: item[0]):
        step = max(1, tensor.numel() // _SAMPLES)
        sample = full(tensor).reshape(-1)[::step].contiguous().cpu()
        if dtype is not None and sample.is_floating_point():
            sample = sample.to(dtype)
        digest.update(_bytes(sample.view(torch.uint8)))
    return digest.hexdigest()


def _in_reach(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, with what accelerate has put on a disk or in memory elsewhere."""
    reshard(model)
    state = model.state_dict()
    for name in [name for name, x in state.items() if x.is_meta]:
        path, _, own = name.rpartition(".")
        hook = getattr(model.get_submodule(path), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            weights_map = getattr(one, "weights_map", None)
            if weights_map is not None:
                state[name] = weights_map[own]
    return state


def _content(model: nn.Module, packed: bool) -> dict[str, str]:
    weights = dict(model.named_parameters())
    if any(x.is_meta for x in weights.values()):
        return {}  # on a disk: reading all of it takes as long as a forward
    vectors = {name: x for name, x in weights.items() if x.dim() < 2 and x.is_floating_point()}
    found = {}
    if not packed or _quantization(model) in _LEAVING_VECTORS:
        found[f"vectors {_layout(vectors)[:16]}"] = summed(vectors.items(), torch.bfloat16)
    if not packed:
        dtypes = "".join(f"{name}{x.dtype}" for name, x in sorted(weights.items()))
        dtypes = hashlib.sha256(dtypes.encode()).hexdigest()
        rounded = stored = summed(weights.items())
        if any(x.is_floating_point() and x.dtype != torch.bfloat16 for x in weights.values()):
            rounded = summed(weights.items(), torch.bfloat16)
        found |= {f"rounded {_layout(weights)[:16]}": rounded, f"stored {dtypes[:16]}": stored}
    return found


def _quantization(model: nn.Module) -> str:
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(
        config, "quant_method", ""
    )
    return str(getattr(method, "value", method))


def _layout(state: Mapping[str, Tensor]) -> str:
    text = "".join(f"{name}{tuple(x.shape)}" for name, x in sorted(state.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _numbers(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _numbers(x) if isinstance(x, dict) else x
        for name, x in config.items()
        if x is not None and not name.startswith("_")
        and not name.removesuffix("s").endswith(_WITHOUT_NUMBERS)
        and not name.endswith(_WITHOUT_NUMBERS)
        and isinstance(x, (bool, int, float, str, list, dict))
    }


def _differences(saved: dict[str, Any], found: dict[str, Any]) -> Iterable[str]:
    for name in saved.keys() & found.keys():
        ours, theirs = saved[name], found[name]
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differences(ours, theirs)
        elif ours != theirs:
            yield f"{name}: {shown(ours)} there, {shown(theirs)} here"
