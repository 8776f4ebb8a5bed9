"""Policies as what is written of them: a checkpoint, or a PEFT adapter, and what it is checked by.

Of head adapters before the final norm: ``block``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from qadapter.adapters.head_adapter import LinearHeadAdapter
from qadapter.errors import QAdapterError
from qadapter.exporting import checkpoints
from qadapter.exporting.approximation import Approximation, fit_linear
from qadapter.exporting.block import BlockExport, plan_block
from qadapter.exporting.head import LinearPolicy
from qadapter.exporting.trunk import largest_rank, merged_trunk, reference_logits, write_adapter
from qadapter.exporting.verification import Reference, check_states
from qadapter.policy.card import CARD_NAME
from qadapter.trunk.lm_head import trunk
from qadapter.trunk.loading import shell_of

if TYPE_CHECKING:
    from qadapter.policy.model import QAdapterModel


@dataclasses.dataclass(frozen=True)
class HeadExport:
    """A policy of one matrix product."""

    model: QAdapterModel
    form: str
    policy: LinearPolicy
    approximation: Approximation | None = None

    @property
    def rank(self) -> int:
        return self.policy.down_RD.shape[0]

    beyond_lora = ()

    @property
    def logits_factor(self) -> float:
        """The policy's logits over the export's."""
        return 1.0 if self.form == "merged" else self.policy.weight_sum

    @property
    def reference(self) -> Reference:
        stored = self.model.base.dtype if self.form == "merged" else torch.float32

        def reference(prompts, decoded, states):
            base = self.model.base
            check_states(base, trunk(base), prompts, decoded, states.last)
            return self.policy.exact_logits(states.last, stored)

        return reference

    def checkpoint(self) -> PreTrainedModel:
        shell = shell_of(self.model.base)
        checkpoints.replace_head(shell, self.policy.merged_weight(), self.policy.merged_bias())
        return shell

    def write_peft(self, folder: Path, base_name: str | None, revision: str | None) -> None:
        shell = shell_of(self.model.base)
        name = checkpoints.output_layer(shell)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.rank, lora_dropout=0.0, target_modules=[name],
            bias="none", task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # PEFT warns those who merge of tied embeddings; nothing is merged here.
            warnings.simplefilter("ignore")
            peft_model = get_peft_model(shell, config)
            # Now: PEFT has put the place there that the base was loaded from.
            config.base_model_name_or_path, config.revision = base_name, revision
            layer = peft_model.get_base_model().get_submodule(name)
            for linear, weight in zip(
                (layer.lora_A["default"], layer.lora_B["default"]), self.policy.lora(), strict=True
            ):
                linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
            peft_model.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / CARD_NAME).unlink(missing_ok=True)  # PEFT's: it says nothing of this policy


_BEYOND_LORA = {
    "use_dora": "DoRA", "modules_to_save": "modules_to_save", "lora_bias": "lora_bias",
    "target_parameters": "target_parameters",
}
"""Fields of LoRA's configuration that bring more than two matrices a layer."""


@dataclasses.dataclass(frozen=True)
class TrunkExport:
    """A LoRA whose policy is its adapted stream, times p_a."""

    model: QAdapterModel
    form: str
    approximation: None = None

    @property
    def rank(self) -> int:
        """The largest of a layer."""
        return largest_rank(self.model.adapter.state_dict())

    @property
    def beyond_lora(self) -> tuple[str, ...]:
        """What the adapter has that two matrices a layer are not."""
        config = self.model.adapter_config
        kind = config.peft_type.value
        if kind != "LORA":
            return (kind,)
        return tuple(
            said for name, said in _BEYOND_LORA.items()
            if getattr(config, name, None)
        )

    @property
    def logits_factor(self) -> float:
        return 1.0 if self.form == "merged" else self.model.policy.stream_weights()[0]

    @property
    def reference(self) -> Reference:
        p_a, _ = self.model.policy.stream_weights()
        return lambda prompts, decoded, _: reference_logits(self.model.base, p_a, prompts, decoded)

    def checkpoint(self) -> PreTrainedModel:
        return merged_trunk(self.model)

    def write_peft(self, folder: Path, base_name: str | None, revision: str | None) -> None:
        write_adapter(self.model, folder, base_name, revision)


Exporter = HeadExport | BlockExport | TrunkExport


def plan(
    model: QAdapterModel, form: str, fitted_to: Sequence[Sequence[int]] | None
) -> Exporter:
    """
    Args:
        form: "merged", "lm_head_lora" or "peft", and one that the adapter has.
        fitted_to: token ids of texts, for the nearest linear adapter.

    Raises:
        QAdapterError: the base is against it; with the reason.
    """
    _check_cap(model, form)
    if model.adapts_trunk:
        if form == "merged" and getattr(model.base, "is_quantized", False):
            raise QAdapterError(
                "the base is quantized, and merging would round its weights once more: load it in "
                '16 bits to merge, or take form "peft"'
            )
        return TrunkExport(model, form)
    _check_output_layer(model.base)
    adapter = model.adapter
    if isinstance(adapter, LinearHeadAdapter):
        weights = model.policy.stream_weights()
        policy = LinearPolicy(model.head, adapter.down.weight, adapter.up.weight, *weights)
        return HeadExport(model, form, policy)
    if fitted_to is None:
        return plan_block(model)
    rank = None if form == "merged" else model.adapter_config.rank
    return HeadExport(model, form, *fit_linear(model, fitted_to, rank))


def _check_cap(model: QAdapterModel, form: str) -> None:
    """Refuse what the base's cap makes no single head of."""
    p_a, p_b = model.policy.stream_weights()
    cap = model.head.softcap
    if cap is not None and (p_b != 0 or (form == "merged" and p_a != 1)):
        raise QAdapterError(
            f"the base caps its logits (softcap {cap:g}), which is not linear: this policy adds up "
            f"two capped streams (weights {p_a:g} and {p_b:g}) and is no single head. A policy "
            "trained in the policy parametrization can be exported at strength 1"
        )


def _check_output_layer(base: PreTrainedModel) -> None:
    layer = base.get_output_embeddings()
    names = {name for name, _ in layer.named_parameters()}
    if not names <= {"weight", "bias"} or not layer.weight.is_floating_point():
        raise QAdapterError(
            f"the base's output layer is a {type(layer).__name__} with {', '.join(sorted(names))}, "
            "no plain linear layer: merge its own adapter, or load it unquantized, first"
        )
