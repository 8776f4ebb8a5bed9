"""Exports of LoRA in the trunk, where the policy is one stream: p_b = 0, logits p_a·W·h_a; and what
an export whose layers compute is checked against."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftType
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapter.exporting.checkpoints import output_layer, replace_head, scaled
from qadapter.policy.storage import WEIGHTS_NAME
from qadapter.trunk.lm_head import input_device
from qadapter.trunk.loading import shell_of

if TYPE_CHECKING:
    from qadapter.policy.model import QAdapterModel

_MARGIN = 4.0
"""Merging rounds the adapted weights once, as every product of the trunk rounds its result; that
adds less than the trunk's own rounding. Four times the largest error of the model as it was trained
is far above the sum of two such errors, and far below any other policy."""


def merged_trunk(model: QAdapterModel) -> PreTrainedModel:
    """The base with the adapter in its weights, and p_a in its head."""
    wrapped = shell_of(model.adapter.peft_model)
    base = wrapped.get_base_model()
    head = base.get_submodule(output_layer(base))
    embedding = base.get_input_embeddings()
    tied = getattr(embedding, "base_layer", embedding).weight is head.weight
    adapted = {id(layer) for layer in model.adapter.layers}
    for name, layer in model.base.named_modules():
        if id(layer) in adapted and hasattr(layer, "base_layer"):
            _own(base.get_submodule(name).base_layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings: they are untied below
        merged = wrapped.merge_and_unload(safe_merge=True)
    p_a, _ = model.policy.stream_weights()
    changed = tied and merged.get_input_embeddings().weight is not head.weight
    if p_a != 1 or changed:
        replace_head(merged, *scaled(model.head, p_a))
    return merged


def write_adapter(
    model: QAdapterModel, folder: Path, base_name: str | None, revision: str | None
) -> None:
    """The adapter as PEFT writes it, in the simplest words for it."""
    weights = {name: x.detach().to("cpu") for name, x in model.adapter.state_dict().items()}
    config: PeftConfig = copy.deepcopy(model.adapter_config)
    if config.peft_type == PeftType.LORA:
        for name in _OF_THE_START:
            if hasattr(config, name):
                setattr(config, name, getattr(type(config)(), name))
        if config.use_rslora or config.rank_pattern or config.alpha_pattern:
            weights = _scaled_alike(weights, model, config)
    weights = {name: x.contiguous() for name, x in weights.items()}
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = base_name, revision
    config.save_pretrained(str(folder))


def largest_rank(weights: dict[str, Tensor]) -> int:
    """Of a LoRA's layers, from its state dict; 0 of one that has none of its matrices."""
    return max((x.shape[0] for name, x in weights.items() if ".lora_A." in name), default=0)


_OF_THE_START = ("init_lora_weights", "loftq_config", "eva_config", "corda_config")
"""Fields of LoRA's that are of training alone."""


def _scaled_alike(
    weights: dict[str, Tensor], model: QAdapterModel, config: LoraConfig
) -> dict[str, Tensor]:
    """The same adapter with one rank and the scale 1 for all layers, where it has others for some:
    llama.cpp's converter, for one, takes lora_alpha/r for every layer without a word.

    Args:
        config: is changed accordingly.
    """
    layers = dict(model.adapter.peft_model.named_modules())
    rank = largest_rank(weights)
    alike = {}
    for name, x in weights.items():
        module, kind, _ = name.rpartition(".lora_")
        if not kind or x.dim() != 2 or not name.endswith(("_A.weight", "_B.weight")):
            return weights  # embeddings, convolutions or more than two matrices: as they are
        if name.endswith("_A.weight"):
            alike[name] = F.pad(x, (0, 0, 0, rank - x.shape[0]))
        else:
            alike[name] = F.pad(x * layers[module].scaling["default"], (0, rank - x.shape[1]))
    config.r = config.lora_alpha = rank
    config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
    return alike


@torch.no_grad()
def reference_logits(
    model: PreTrainedModel, factor: float, prompts: list[list[int]], decoded: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """What an export is checked against: the policy's logits in the next higher precision (of a
    copy of the model), and how far rounding may take an export from them; float64 [K, V] both.

    Args:
        model: its logits times ``factor`` are the policy's.

    No a-priori bound says what rounding does to a deep network, so it is measured: the tolerance is
    a multiple of the largest error of this very model, in its own dtype, at the same states.
    """
    dtype = model.get_output_embeddings().weight.dtype
    higher = torch.float64 if dtype == torch.float32 else torch.float32
    exact_KV = factor * _logits(copy.deepcopy(model).to(higher), prompts, decoded)
    ours_KV = factor * _logits(model, prompts, decoded)
    return exact_KV, measured_tolerance(exact_KV, ours_KV, dtype)


def measured_tolerance(exact_KV: Tensor, ours_KV: Tensor, dtype: torch.dtype) -> Tensor:
    """How far rounding may take an export's logits from exact ones [K, V], where ours, computed in
    a dtype, are as far as they are."""
    rounding = torch.finfo(dtype).eps / 2 * exact_KV.abs().max()
    tolerance = _MARGIN * torch.maximum((ours_KV - exact_KV).abs().max(), rounding)
    return tolerance.expand_as(exact_KV)


def _logits(model: PreTrainedModel, prompts: list[list[int]], decoded: list[Tensor]) -> Tensor:
    rows = []
    for prompt, tokens in zip(prompts, decoded, strict=True):
        fed = torch.tensor([prompt + tokens.tolist()[:-1]], device=input_device(model))
        rows.append(model(input_ids=fed, use_cache=False).logits[0, len(prompt) - 1 :])
    return torch.cat(rows).to("cpu", torch.float64)


def _own(layer: nn.Module) -> None:
    """Copies in place of shared parameters, to be changed."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
