"""What a trainer is made of: its model, and a collator for whatever its data is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterModel
from qadapter.training.config import QAdapterConfig
from qadapter.training.feature_set import FeatureCollator, PackedCollator, PairFeatures
from qadapter.trunk.loading import as_loaded


class EitherCollator:
    """Cached features and tokenized pairs each have their own collator.

    Args:
        features: for cached ones. tokens: for the others; a user's own, perhaps.
    """

    def __init__(
        self, features: FeatureCollator, tokens: PackedCollator | Callable[..., Any]
    ) -> None:
        self.features, self.tokens = features, tokens

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        cached = isinstance(examples[0], PairFeatures)
        return self.features(examples) if cached else self.tokens(examples)

    def settle(self, packed: bool, share: bool) -> None:
        """How trunks are run on the batches."""
        for collator in (self.features, self.tokens):
            if isinstance(collator, FeatureCollator | PackedCollator):
                collator.packed, collator.share = packed, share


def as_qadapter_model(
    model: Any, args: QAdapterConfig, quantization_config: Any, peft_config: Any,
    say: Callable[[str], None] | None = None,
) -> QAdapterModel:
    """The model of a trainer: a ``QAdapterModel`` as it is; a base gets the adapter and objective
    that ``args`` and ``peft_config`` describe. Errors are the trainer's."""
    by_name = isinstance(model, (str, Path))
    if not by_name and (args.model_init_kwargs or quantization_config is not None):
        raise QAdapterError(
            "model_init_kwargs and quantization_config are for a model given by name"
        )
    if isinstance(model, QAdapterModel):
        if peft_config is not None:
            raise QAdapterError("the model has its adapter: peft_config is for a plain causal LM")
        wanted = args.objective_config()
        if wanted not in (model.objective, type(wanted)()):
            raise QAdapterError(
                f"the model has its own objective, {model.objective}; args ask for {wanted}: "
                "give it to QAdapterModel.from_base instead"
            )
        args.set_objective(model.objective)
        return model
    kwargs: dict[str, Any] = {}
    if by_name:
        kwargs = {
            "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {}),
            "say": say,
        }
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
    elif not isinstance(model, PreTrainedModel):
        raise QAdapterError(
            f"model must be a QAdapterModel, a causal LM or its name, got {type(model).__name__}"
        )
    if peft_config is None:
        model = as_loaded(model, kwargs)
        kwargs, adapter = {}, args.adapter_config(model.model)
    else:
        adapter = peft_config
    set_seed(args.seed)  # the adapter's start is random too
    return QAdapterModel.from_base(model, adapter, args.objective_config(), **kwargs)
