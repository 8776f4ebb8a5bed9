"""Head adapters in vLLM as they were saved: nothing is exported, so that forms which can't be
merged (``mlp``) are served, and every form at any strength.

vLLM finds the plug-in where qadapter is installed beside it (entry point ``vllm.general_plugins``):

    vllm serve BASE --hf-overrides \
        '{"architectures": ["QAdapterLlamaForCausalLM"], "qadapter": "runs/mine"}'

``QAdapter`` before the architecture in the base's config.json names a subclass of vLLM's own model
of it, whose output layer is given the policy's hidden states. ``"qadapter_strength": 0.5`` turns
the dial, for the life of the server. A head adapter is a function of the last hidden states (design
§2, fact 5), so nothing else of the model is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qadapter.errors import QAdapterError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from qadapter.policy.storage import SavedAdapter
    from qadapter.trunk.final_norm import FinalNorm

PREFIX = "QAdapter"
_OUTPUTS = ("compute_logits", "compute_logits_local")
"""How vLLM's models turn last hidden states into logits: all, or a rank's own."""
_KNOWN_BY_NAME = ("BloomForCausalLM",)
"""Architectures whose positions vLLM handles by their name."""


def register() -> None:
    """Offer every architecture that vLLM knows with an adapter too."""
    from vllm import ModelRegistry

    for name in list(ModelRegistry.get_supported_archs()):
        if not name.startswith(PREFIX):  # plug-ins may be loaded more than once
            ModelRegistry.register_model(PREFIX + name, f"{__name__}:{PREFIX}{name}")


def __getattr__(name: str) -> type[nn.Module]:
    """vLLM's class of an architecture with an adapter, made when it is asked for."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm import ModelRegistry

    base = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    outputs = {output: _adapted(output) for output in _OUTPUTS if hasattr(base, output)}
    return type(name, (_Adapted, base), {"__module__": __name__, **outputs})


def _adapted(output: str) -> Callable[..., Tensor | None]:
    def logits(self: _Adapted, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        own = getattr(super(_Adapted, self), output)
        return self.policy_logits(lambda hidden: own(hidden, *args, **kwargs), hidden_states)

    return logits


class _Adapted(nn.Module):
    """What a model of vLLM's has more: a head adapter, and the weights of the two streams."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        config = vllm_config.model_config.hf_config
        saved, weights = _asked_for(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        text = config.get_text_config()
        self.qadapter = saved.adapter.build(text.hidden_size)
        self._stream_weights = weights
        self._softcapped = getattr(text, "final_logit_softcapping", None) is not None
        self._asked = saved, config

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        from qadapter.policy import storage

        loaded = super().load_weights(weights)
        saved, config = self._asked
        _require_base(saved, config, getattr(self, "lm_head", None))
        storage.load_weights(config.qadapter, self.qadapter)
        if self.qadapter.reads_before_norm:
            self.qadapter.final_norm = _final_norm(self, config)
        return {*loaded, *(f"qadapter.{name}" for name in self.qadapter.state_dict())}

    def policy_logits(
        self, logits: Callable[[Tensor], Tensor | None], hidden: Tensor
    ) -> Tensor | None:
        """Of last hidden states [N, D]; None on a rank that ``logits`` gives none."""
        p_a, p_b = self._stream_weights
        adapted, base = self.qadapter.streams(hidden)
        if p_a + p_b == 1 and not (p_b and self._softcapped):  # one product (design §2, fact 5)
            return logits((p_a * adapted + p_b * base).to(hidden.dtype))
        ours, base = logits(adapted.to(hidden.dtype)), logits(base)
        return None if ours is None else p_a * ours + p_b * base


class _BeforeNorm(nn.Module):
    """In the place of a trunk's final norm: gives what that would be given."""

    def forward(self, states: Tensor, residual: Tensor | None = None) -> Any:
        return states if residual is None else (states + residual, residual)


def _final_norm(model: nn.Module, config: Any) -> FinalNorm:
    """Take the final norm out of vLLM's model.

    Raises:
        QAdapterError: it isn't where Llama's is.
    """
    from vllm.model_executor.layers.layernorm import RMSNorm

    from qadapter.trunk.final_norm import FinalNorm

    body = getattr(model, "model", None)
    norm = getattr(body, "norm", None)
    if type(norm) is not RMSNorm:
        raise QAdapterError(
            f"{config.qadapter}: reads the states before the final norm, which vLLM's "
            f"{type(model).__mro__[2].__name__} doesn't keep apart: qadapter export merges it"
        )
    body.norm = _BeforeNorm()
    return FinalNorm(body, norm, 1.0)  # how much it shrinks is saved with the adapter


def _asked_for(config: Any) -> tuple[SavedAdapter, tuple[float, float]]:
    """The adapter that an overridden configuration names, and the streams' weights.

    Raises:
        QAdapterError: none, none of this kind, or not with this architecture.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from qadapter.adapters.head_adapter import AdapterConfig
    from qadapter.policy import storage
    from qadapter.policy.dial import Policy

    folder = getattr(config, "qadapter", None)
    if not isinstance(folder, str):
        raise QAdapterError('name the adapter: --hf-overrides \'{…, "qadapter": "runs/mine"}\'')
    architecture = config.architectures[0].removeprefix(PREFIX)
    if architecture in (*_KNOWN_BY_NAME, *MODELS_CONFIG_MAP):
        raise QAdapterError(
            f"{folder}: vLLM sets {architecture} up by that name, and would not by another: export "
            "the adapter, or serve it with qadapter serve"
        )
    saved = storage.read(folder)
    if not isinstance(saved.adapter, AdapterConfig):
        raise QAdapterError(
            f"{folder}: not a head adapter. vLLM itself serves a LoRA of the trunk: qadapter "
            "export --form peft"
        )
    try:
        policy = Policy(saved.objective, getattr(config, "qadapter_strength", 1.0))
    except (TypeError, ValueError) as error:
        raise QAdapterError(f"qadapter_strength: {error}") from error
    return saved, policy.stream_weights()


def _require_base(saved: SavedAdapter, config: Any, head: nn.Module | None) -> None:
    """
    Args:
        head: vLLM's, which may be padded, or hold a rank's part.

    Raises:
        QAdapterError: the adapter was trained on another base.
    """
    from qadapter.trunk.identity import BaseIdentity, digest_of_head, numbers_of

    weight = getattr(head, "weight", None)
    rows = config.get_text_config().vocab_size
    digest = saved.base.head_sha256
    # Rounded to float16 it can't be told.
    if weight is not None and len(weight) >= rows and weight.dtype in (
        torch.bfloat16, torch.float32
    ):
        digest = digest_of_head(weight[:rows])
    found = BaseIdentity(config.name_or_path, None, digest, config=numbers_of(config))
    saved.base.require(found, config.qadapter)
