"""Exports of a head adapter that reads before the final norm: the base with one decoder layer more.

The layer's attention gives zero, the norm before its MLP is the final one's double, and the MLP is
the adapter's, padded with zeros to the base's width: x′ = x + MLP(norm(x)). Whether a layer of the
base's own class can be that is seen on random states.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from qadapter.adapters.head_adapter import BlockHeadAdapter
from qadapter.errors import QAdapterError
from qadapter.exporting.checkpoints import replace_head, scaled
from qadapter.exporting.forms import ON_THE_COMMAND_LINE, nearest_linear
from qadapter.exporting.trunk import measured_tolerance
from qadapter.exporting.verification import Reference, check_states
from qadapter.trunk.lm_head import trunk
from qadapter.trunk.loading import shell_of
from qadapter.trunk.shells import blocks_of, evaluating, probes

if TYPE_CHECKING:
    from qadapter.policy.model import QAdapterModel

_ROWS = 8192
"""Rows of the vocabulary held in float64 at a time."""
_MOST_RANK = 64
_SCALES = 1e-3, 30.0
"""Sizes of the random states: where what is added to a mean square counts, and far from it."""
_DIFFERENCE = 1e-4
"""Of the adapter's part that another layer may add: norms compute in float32 at the least."""


@dataclasses.dataclass(frozen=True)
class BlockExport:
    """A policy of the adapted stream alone, times p_a."""

    model: QAdapterModel
    form: str = "merged"
    approximation: None = None
    beyond_lora: tuple[str, ...] = ()
    logits_factor: float = 1.0
    """The policy's logits over the export's."""

    @property
    def rank(self) -> int:
        return self.model.adapter_config.rank

    @property
    def reference(self) -> Reference:
        def reference(prompts, decoded, states):
            model = self.model
            check_states(model.base, model.feature_trunk, prompts, decoded, states.entering)
            return exact_logits(model, states.entering)

        return reference

    def checkpoint(self) -> PreTrainedModel:
        return merged_block(self.model)


def plan_block(model: QAdapterModel) -> BlockExport:
    """
    Raises:
        QAdapterError: no plain checkpoint is this policy; with the reason.
    """
    if getattr(model.base, "is_quantized", False):
        raise QAdapterError(
            "the base is quantized, and a layer more can't be written beside packed ones: load it "
            "in 16 bits to export it"
        )
    return BlockExport(model)


def merged_block(model: QAdapterModel) -> PreTrainedModel:
    """The base with the adapter as its last decoder layer, and p_a in its head.

    Raises:
        QAdapterError: a layer of the base's class can't be the adapter.
    """
    base, adapter = model.base, model.adapter
    shell = shell_of(base)
    name, blocks = blocks_of(base)
    text = shell.config.get_text_config()
    _lengthen(text, len(blocks))
    try:
        layer = type(blocks[-1])(_plain_attention(text), len(blocks)).eval()
        _fill(layer, adapter, text)
        layer.post_attention_layernorm.load_state_dict(adapter.final_norm.norm.state_dict())
        _check(layer, model, *_call_of(base, blocks[-1]))
    except QAdapterError as error:
        raise _refusal(base, str(error)) from error
    except Exception as error:  # a class that is made, called or named otherwise
        raise _refusal(base, f"{type(error).__name__}: {error!s:.200}") from error
    trunk(shell).get_submodule(name).append(layer.to(base.dtype).requires_grad_(False))
    p_a, _ = model.policy.stream_weights()
    if p_a != 1:
        replace_head(shell, *scaled(model.head, p_a))
    return shell


@torch.no_grad()
def exact_logits(model: QAdapterModel, entering_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's logits in float64, and how far rounding may take an export from them.

    A layer and a norm round less than ten times an element, in whatever dtype, and so does the
    model itself: the tolerance is a multiple of its own largest error at the same states.

    Args:
        entering_KD: states that enter the final norm, to the digits that the export computes from.

    Returns:
        (logits, tolerance), both [K, V] float64.
    """
    head, (p_a, _) = model.head, model.policy.stream_weights()
    adapter = BlockHeadAdapter(head.shape[1], model.adapter_config.rank).double()
    adapter.load_state_dict(model.adapter.state_dict())
    x_KD = entering_KD.to(torch.float64)
    norm = model.adapter.final_norm
    hidden_KD = p_a * norm(adapter.moved(x_KD, norm(x_KD)))
    products = [
        hidden_KD @ block.to("cpu", torch.float64).T for block in head.weight.split(_ROWS)
    ]
    exact_KV = head.finish(torch.cat(products, dim=-1).to(head.device), p_a).cpu()
    ours_KV = model.head_logits(entering_KD.to(head.weight)).to("cpu", torch.float64)
    return exact_KV, measured_tolerance(exact_KV, ours_KV, head.dtype)


def _refusal(base: PreTrainedModel, reason: str) -> QAdapterError:
    return QAdapterError(
        f"no decoder layer of {type(base).__name__} can be this adapter: {reason}; "
        f"{nearest_linear()} (on the command line {ON_THE_COMMAND_LINE.approximate} "
        f"{ON_THE_COMMAND_LINE.texts}); QAdapterModel itself serves the policy as it is"
    )


def _lengthen(config: PretrainedConfig, depth: int) -> None:
    """One layer more, of the last one's type where each has its own."""
    per_layer = {
        name: value for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == depth
        and not name.endswith(("_token_id", "architectures"))
    }
    config.num_hidden_layers = depth + 1
    for name, value in per_layer.items():
        setattr(config, name, [*value, value[-1]])


def _plain_attention(config: PretrainedConfig) -> PretrainedConfig:
    """The same with attention that runs in any dtype."""
    plain = copy.copy(config)
    plain._attn_implementation = "eager"
    return plain


@torch.no_grad()
def _fill(layer: nn.Module, adapter: BlockHeadAdapter, config: PretrainedConfig) -> None:
    """Makes a fresh layer the adapter's, by the names that such layers have."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
    mlp, rank = getattr(layer, "mlp", None), adapter.down.out_features
    if not hasattr(layer, "post_attention_layernorm"):
        raise QAdapterError("they have no norm between attention and MLP")
    if hasattr(mlp, "gate_up_proj"):
        gate_ID, up_ID = mlp.gate_up_proj.weight.chunk(2)
    elif hasattr(mlp, "gate_proj"):
        gate_ID, up_ID = mlp.gate_proj.weight, mlp.up_proj.weight
    else:
        raise QAdapterError("they have no gated MLP of gate_proj, up_proj and down_proj")
    if rank > len(gate_ID):
        raise QAdapterError(
            f"the adapter's rank is {rank}, their MLPs are {len(gate_ID)} wide: train one of at "
            "most that rank"
        )
    gate_ID[:rank] = adapter.gate.weight
    up_ID[:rank] = adapter.down.weight
    # Granite multiplies what a layer adds.
    multiplier = getattr(config, "residual_multiplier", None) or 1.0
    mlp.down_proj.weight[:, :rank] = adapter.scale * adapter.up.weight / multiplier


def _call_of(base: PreTrainedModel, block: nn.Module) -> tuple[tuple, dict[str, Any]]:
    """What a trunk hands its last block beside the states."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = {name: x for name, x in kwargs.items() if name != "hidden_states"}
        calls.append((args[1:], kwargs))

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), evaluating(base):
            trunk(base)(**probes(base)[0], use_cache=False)
    finally:
        handle.remove()
    return calls[-1]


@torch.no_grad()
def _check(
    layer: nn.Module, model: QAdapterModel, args: tuple, kwargs: dict[str, Any]
) -> None:
    """Whether a layer filled with an adapter does what the adapter does, in float64.

    Args:
        args, kwargs: what the base's last layer was called with, after the states.
    """
    base, size = model.base, model.head.shape[1]
    tokens = probes(base)[0]["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    adapter = BlockHeadAdapter(size, min(model.adapter_config.rank, _MOST_RANK)).double()
    for parameter in adapter.parameters():
        parameter.copy_(normal(*parameter.shape))
    adapter.scale.fill_(model.adapter.scale)
    filled = copy.deepcopy(layer).double()
    _fill(filled, adapter, base.config.get_text_config())
    # Attention adds nothing, whatever it sees.
    kwargs = _in_float64(kwargs) | ({"attention_mask": None} if "attention_mask" in kwargs else {})
    for scale in _SCALES:
        x_1TD = scale * normal(1, tokens, size)
        found = filled(x_1TD, *_in_float64(args), **kwargs)
        found = found[0] if isinstance(found, tuple) else found
        expected = adapter.moved(x_1TD, model.adapter.final_norm(x_1TD))
        part = (expected - x_1TD).norm(dim=-1)
        off = ((found - expected).norm(dim=-1) / part).nan_to_num(torch.inf).max()
        if not off <= _DIFFERENCE:
            raise QAdapterError(
                f"one filled with an adapter is off by {off:.0%} of it (it has another activation, "
                "other norms or another order than Llama's)"
            )


def _in_float64(value: Any) -> Any:
    """Tensors on the CPU, floats among them in float64."""
    if isinstance(value, Tensor):
        return value.to("cpu", torch.float64 if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {name: _in_float64(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_in_float64, value))
    return value
