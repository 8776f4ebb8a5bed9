"""What a server serves: a base, and adapters on it by their names."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qadapter.adapters.head_adapter import AdapterConfig
from qadapter.adapters.lora import LoraAdapter
from qadapter.adapters.streams import BASE
from qadapter.data import PromptEncoder
from qadapter.data.ends import end_of_turn_ids
from qadapter.data.vocabulary import configured_positions
from qadapter.errors import QAdapterError
from qadapter.policy import storage
from qadapter.policy.model import QAdapterModel
from qadapter.policy.requests import BASE_ALONE, Mixture, ServedPolicy
from qadapter.serving.sampling import Sampling
from qadapter.trunk.loading import LoadedBase


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A name that requests may give.

    Args:
        policy: None for the base.
        model: an adapter's own; of the base, any of its adapters'.
        strength, sampling: where a request says nothing; the base's strength is 0.
        tokenizer: with the chat template of this model.
        ends: tokens that end an answer.
    """

    name: str
    policy: ServedPolicy | None
    model: QAdapterModel
    strength: float
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    ends: frozenset[int]

    def at(self, strength: float) -> Mixture:
        return BASE_ALONE if self.policy is None else self.policy.at(strength)


@dataclasses.dataclass(frozen=True)
class ServedModels:
    """Adapters by their names, in the order they were given, then the base.

    Args:
        first: a model of the base they share.
        lora: the adapters in its trunk, if there are any.
        final_norm: the trunk's, where a head adapter reads the states that enter it.
        depth: most streams that a request may have.
    """

    by_name: dict[str, ServedModel]
    first: QAdapterModel
    lora: LoraAdapter | None
    final_norm: nn.Module | None
    depth: int

    def rewards_apart(self, served: ServedModel) -> Any:
        """A context in which a head adapter's own forward sees the bare base."""
        apart = self.lora is not None and not served.model.adapts_trunk
        return self.lora.off() if apart else contextlib.nullcontext()


def names_of(folders: Sequence[str], base: str) -> tuple[list[str], str]:
    """What requests call adapters and their base: the last part of a path where that is enough, the
    base by its name on the hub.

    Raises:
        QAdapterError: one adapter is given twice.
    """
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise QAdapterError(f"{folder} is given twice")
    short = [Path(folder).resolve().name if Path(folder).is_dir() else folder for folder in folders]
    short.append(Path(base).name if Path(base).is_dir() else base)
    names = [
        whole if short.count(name) > 1 else name
        for name, whole in zip(short, [*folders, base], strict=True)
    ]
    if names[-1] in names[:-1]:
        names[-1] = f"{names[-1]} (base)"
    return names[:-1], names[-1]


def fitting_length(models: ServedModels, wanted: int) -> int:
    """Most tokens of a prompt and its answer: as wanted, within the base's positions."""
    return min(wanted, configured_positions(models.first) or wanted)


def load(
    adapters: dict[str, str], base_name: str, loaded: LoadedBase,
    tokenizers: dict[str, PreTrainedTokenizerBase], strength: float,
) -> ServedModels:
    """Put adapters on one base.

    Args:
        adapters: names → folders or hub repositories.
        base_name: what requests call the base.
        tokenizers: by name, the base's too; each with the chat template of its model.
        strength: of adapters, where a request says nothing.

    Raises:
        QAdapterError: an adapter is damaged, or of another base; adapters that can't share a trunk.
    """
    saved = {name: storage.read(folder) for name, folder in adapters.items()}
    in_trunk = [n for n, found in saved.items() if not isinstance(found.adapter, AdapterConfig)]
    composed = [n for n in in_trunk if isinstance(saved[n].adapter, storage.Composition)]
    if composed and len(in_trunk) > 1:
        raise QAdapterError(
            f"{adapters[composed[0]]} holds several adapters in the trunk already: serve it "
            "without other LoRAs"
        )
    # Head adapters first: the others put layers into the base.
    models = {
        name: QAdapterModel.from_pretrained(folder, loaded)
        for name, folder in adapters.items() if name not in in_trunk
    }
    weights = {name: storage.read_weights(adapters[name]) for name in in_trunk[1:]}
    for name, tensors in weights.items():
        storage.require_planned(adapters[name], tensors, loaded.model, saved[name].adapter)
    lora = None
    streams: dict[str, tuple[int, ...]] = {}
    for name in in_trunk:
        if lora is None:
            model = QAdapterModel.from_pretrained(adapters[name], loaded)
            lora = model.adapter
            streams[name] = tuple(range(len(lora.names)))
        else:
            model = _added(
                adapters[name], saved[name], weights[name], models[in_trunk[0]]
            )
            streams[name] = (model.stream,)
        models[name] = model
    first = next(iter(models.values()))
    served = {}
    for name in adapters:
        model = models[name].eval().requires_grad_(False)
        policy = ServedPolicy(
            model.policy, None if name in in_trunk else model.adapter, streams.get(name, ())
        )
        served[name] = _served(name, policy, model, strength, tokenizers[name])
    served[base_name] = _served(base_name, None, first, 0.0, tokenizers[base_name])
    depth = 1 + max((len(s) for s in streams.values()), default=0)
    norms = (m.adapter.final_norm.norm for m in models.values() if m.reads_before_norm)
    return ServedModels(served, first, lora, next(norms, None), depth)


def _served(
    name: str, policy: ServedPolicy | None, model: QAdapterModel, strength: float,
    tokenizer: PreTrainedTokenizerBase,
) -> ServedModel:
    ends = frozenset(end_of_turn_ids(model, tokenizer))
    return ServedModel(
        name, policy, model, strength, _sampling_of(model), tokenizer, PromptEncoder(tokenizer),
        ends,
    )


def _sampling_of(model: QAdapterModel) -> Sampling:
    """What the base's generation configuration asks for; its filters only where it samples."""
    config = model.generation_config
    penalty = 1.0 if config.repetition_penalty is None else config.repetition_penalty
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty)
    temperature = 1.0 if config.temperature is None else config.temperature
    top_p = 1.0 if config.top_p is None else config.top_p
    return Sampling(temperature, top_p, config.top_k or 0, repetition_penalty=penalty)


class _OfStream(QAdapterModel):
    """One of several adapters in a trunk that another model put layers into."""

    def __init__(
        self, first: QAdapterModel, stream: int, saved: storage.SavedAdapter,
    ):
        super().__init__(
            first.base, first.adapter, saved.adapter, saved.objective,
            copy.copy(first.base_identity),
        )
        self.stream = stream

    def hidden_streams(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            adapted, base = self._trunk_streams((self.stream, BASE), input_ids, attention_mask)
        return adapted, base


def _added(
    folder: str, saved: storage.SavedAdapter, weights: dict[str, Tensor], first: QAdapterModel
) -> _OfStream:
    saved.require_base(first.base_identity, folder)
    try:
        first.adapter.add(saved.adapter, weights)
        stream = len(first.adapter.names) - 1
        storage.require_fitting(folder, weights, first.adapter.state_dict(adapter=stream))
    except QAdapterError as error:
        raise QAdapterError(f"{folder}: {error}") from error
    model = _OfStream(first, stream, saved)
    model.chat_template = storage.read_chat_template(folder)
    return model
