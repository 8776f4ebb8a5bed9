"""QAdapterModel: the customised policy as a Hugging Face causal language model.

A frozen base with a head adapter. ``forward`` gives the customised policy's logits, so everything
built on it — ``generate`` in all its modes, pipelines, lm-eval — decodes that policy and nothing is
patched. For heads without a softcap one trunk pass and one lm_head product are all it takes
(design §2, fact 5): it costs what the base costs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter import storage
from qadapter.adapters import AdapterConfig, HeadAdapter
from qadapter.base import LoadedBase, load_base
from qadapter.errors import QAdapterError
from qadapter.head import LanguageModelHead, trunk
from qadapter.objective import ObjectiveConfig, find_actions, sequence_loss
from qadapter.policy import Policy
from qadapter_kernels import linear_soft_value, soft_value
from qadapter_kernels.reference import Coefficients


class QAdapterModel(PreTrainedModel, GenerationMixin):
    """A frozen base and an adapter that make up the customised policy π̃.

    Build with ``from_base`` or ``from_pretrained``. Attributes: ``base`` (the frozen causal LM),
    ``adapter`` (the only trainable part), ``objective``, ``adapter_config``, ``head``, ``policy``.
    """

    base_model_prefix = "base"
    main_input_name = "input_ids"
    _is_stateful = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(
        self, base: PreTrainedModel, adapter: HeadAdapter, adapter_config: AdapterConfig,
        objective: ObjectiveConfig, base_identity: storage.BaseIdentity,
    ):
        super().__init__(copy.deepcopy(base.config))
        self.base = base.requires_grad_(False).eval()
        self.adapter = adapter
        self.adapter_config = adapter_config
        self.objective = objective
        self.base_identity = base_identity
        self.policy = Policy(objective)
        self.head = LanguageModelHead.of(base)
        self.generation_config = copy.deepcopy(base.generation_config)
        self.all_tied_weights_keys = {}

    # --- building, saving, loading ----------------------------------------------------------

    @classmethod
    def from_base(
        cls, base: PreTrainedModel | str | Path, adapter: AdapterConfig | None = None,
        objective: ObjectiveConfig | None = None, **base_kwargs: Any,
    ) -> QAdapterModel:
        """A new, untrained adapter on a frozen base: its policy is the base's.

        Args:
            base: a causal LM, its folder, or its hub name.
            adapter: default ``AdapterConfig()``.
            objective: default ``ObjectiveConfig()``.
            base_kwargs: passed to ``load_base`` (dtype, revision, device_map, …) where ``base`` is
                a name.

        Raises:
            QAdapterError: the base can't be loaded, or has no plain linear head.
        """
        loaded = _as_loaded(base, base_kwargs)
        adapter = adapter or AdapterConfig()
        if not isinstance(adapter, AdapterConfig):
            raise QAdapterError(
                f"adapter must be a qadapter.AdapterConfig, got {type(adapter).__name__}"
            )
        head_weight = loaded.model.get_output_embeddings().weight
        return cls(
            loaded.model, adapter.build(head_weight.shape[1], head_weight.device), adapter,
            objective or ObjectiveConfig(), storage.BaseIdentity.of(loaded),
        )

    @classmethod
    def from_pretrained(
        cls, adapter_dir: str | Path, base: PreTrainedModel | str | Path | None = None,
        *, is_trainable: bool = False, **base_kwargs: Any,
    ) -> QAdapterModel:
        """Load a saved adapter on its base.

        Args:
            adapter_dir: folder written by ``save_pretrained``, or a hub repository.
            base: the base model, its folder or its name; default: the name the adapter was saved
                with. Any other model than the one the adapter was trained on is refused.
            is_trainable: keep the adapter's parameters trainable.

        Raises:
            QAdapterError: a file missing or damaged; the base is not the adapter's.
        """
        saved = storage.read(adapter_dir)
        loaded = _as_loaded(base if base is not None else saved.base.name, base_kwargs)
        saved.base.require(storage.BaseIdentity.of(loaded), adapter_dir)
        head_weight = loaded.model.get_output_embeddings().weight
        adapter = saved.adapter.build(head_weight.shape[1], head_weight.device)
        storage.load_weights(adapter_dir, adapter)
        adapter.requires_grad_(is_trainable)
        return cls(loaded.model, adapter, saved.adapter, saved.objective, saved.base)

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True, push_to_hub: bool = False, **hub_kwargs: Any,
    ) -> None:
        """Write the adapter, not the base: ``adapter_model.safetensors``, ``qadapter_config.json``.

        Args:
            state_dict: this model's state dict, where a trainer gathered it; default: its own.
            push_to_hub, hub_kwargs: as in transformers.
        """
        if not is_main_process:
            return
        weights = self.adapter.state_dict()
        if state_dict is not None:
            weights = {name: state_dict[f"adapter.{name}"] for name in weights}
        storage.write(
            save_directory, weights, self.adapter_config, self.objective, self.base_identity
        )
        if push_to_hub:
            repo_id = hub_kwargs.pop("repo_id", Path(save_directory).name)
            storage.upload(save_directory, repo_id, **hub_kwargs)

    def print_trainable_parameters(self) -> None:
        """Prints counts of trainable and of all parameters, as PEFT does."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        share = 100 * trainable / total
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"
        )

    # --- the policy -------------------------------------------------------------------------

    def set_policy(
        self, *, strength: float | None = None, alpha_0: float | None = None,
        alpha_tilde: float | None = None,
    ) -> Policy:
        """Choose the policy to decode: ``strength``, or raw α's; no argument: the trained one.

        Raises:
            ValueError: both a strength and α's, or a value out of range.
        """
        if strength is not None and (alpha_0 is not None or alpha_tilde is not None):
            raise ValueError("give either strength or alpha_0 and alpha_tilde, not both")
        self.policy = Policy(
            self.objective, 1.0 if strength is None else strength, alpha_0, alpha_tilde
        )
        return self.policy

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        strength: float | Tensor | None = None, return_dict: bool | None = None, **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the customised policy, [B, T, V], in the base's dtype.

        Args:
            labels: [B, T]; next-token cross-entropy under the policy is returned as ``loss``.
            logits_to_keep: last positions to compute logits for, as in transformers.
            strength: dial of this call: a number, or a tensor [B], one for each row.
            The others: as in the base's forward.
        """
        outputs = self._trunk_outputs(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.policy_logits(hidden[:, keep], strength=strength)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            )
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions"),
        )
        return result.to_tuple() if return_dict is False else result

    def policy_logits(
        self, base_hidden: Tensor, *, strength: float | Tensor | None = None
    ) -> Tensor:
        """Logits of the policy [..., V] from the base's last hidden states [..., D]."""
        weight_a, weight_b = self.policy.stream_weights(strength)
        if isinstance(weight_a, Tensor):  # one strength for each row of the batch
            shape = (-1,) + (1,) * (base_hidden.dim() - 1)
            weight_a, weight_b = (
                w.to(base_hidden.device, torch.float32).view(shape) for w in (weight_a, weight_b)
            )
        elif weight_a == 0 and weight_b == 1:  # the base itself, bit for bit
            return self.head(base_hidden)
        adapter_hidden = self.adapter(base_hidden)
        if self.head.softcap is not None:
            # The cap is not linear: the two streams are combined as logits.
            a, b = (
                self.head(h).float() for h in (adapter_hidden.to(base_hidden.dtype), base_hidden)
            )
            return (weight_a * a + weight_b * b).to(base_hidden.dtype)
        mixed = weight_a * adapter_hidden + weight_b * base_hidden
        products = nn.functional.linear(mixed.to(self.head.weight.dtype), self.head.weight)
        return self.head.finish(products, weight_a + weight_b)

    @torch.no_grad()
    def token_rewards(
        self, input_ids: Tensor, completion_mask: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Reward r of each completion token under the trained objective, at its position.

        Args:
            input_ids, completion_mask: [B, T]. attention_mask: [B, T]; default: all ones.

        Returns:
            float32 [B, T], 0 elsewhere. By fact 8 an estimate of r₂: what the preferences reward.
        """
        actions = find_actions(input_ids, completion_mask, self.objective.mask_alignment)
        base_hidden = self.base_hidden(input_ids, attention_mask)
        hidden = base_hidden[actions.sequence_N, actions.state_N]
        soft = self.soft_value(self.adapter(hidden), hidden, actions.token_N)
        offsets = actions.offsets_S1
        if input_ids.shape[0] % 2:  # the sequence loss pairs sequences; an empty one evens them
            offsets = torch.cat([offsets, offsets[-1:]])
        rewards = sequence_loss(
            soft, offsets, self.objective, padded_length=input_ids.shape[1]
        ).token_rewards
        return actions.scatter(rewards)

    # --- what training and evaluation build on ----------------------------------------------

    def base_hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The frozen base's last hidden states [B, T, D], after the final norm."""
        return self._trunk_outputs(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    def hidden_streams(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h_a, h_b), each [B, T, D]; gradients reach the adapter through h_a alone."""
        base_hidden = self.base_hidden(input_ids, attention_mask)
        return self.adapter(base_hidden), base_hidden

    def soft_value(
        self, adapter_hidden: Tensor, base_hidden: Tensor, actions: Tensor,
        coefficients: Coefficients | None = None, **kwargs: Any,
    ):
        """``qadapter_kernels``' soft value of N states through this model's head.

        Args:
            adapter_hidden, base_hidden: [N, D]. actions: [N].
            coefficients: default: the trained objective's.
            kwargs: ``base_logsumexp``, ``return_statistics``, ``workspace_mb``, ``backend``.
        """
        coef = coefficients or self.objective.coefficients
        if self.head.softcap is None:
            return linear_soft_value(
                adapter_hidden, base_hidden, self.head.weight, actions, **coef._asdict(),
                bias=self.head.bias, logit_scale=self.head.logit_scale, **kwargs,
            )
        kwargs.pop("workspace_mb", None)
        adapter_logits = self.head(adapter_hidden)
        with torch.no_grad():
            base_logits = self.head(base_hidden)
        return soft_value(adapter_logits, base_logits, actions, **coef._asdict(), **kwargs)

    def _trunk_outputs(self, **inputs: Any):
        with torch.no_grad():
            return trunk(self.base)(**inputs)

    # --- what transformers asks of a model --------------------------------------------------

    def train(self, mode: bool = True) -> QAdapterModel:
        """The frozen base stays in evaluation mode: its dropout would move the reference policy."""
        super().train(mode)
        self.base.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> None:
        raise QAdapterError("the base is frozen: resize its embeddings before from_base, not after")

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        self.base.tie_weights(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to initialise: the base is loaded and the adapter builds itself."""


def _as_loaded(base: PreTrainedModel | str | Path, base_kwargs: dict[str, Any]) -> LoadedBase:
    if isinstance(base, PreTrainedModel):
        if base_kwargs:
            raise QAdapterError(
                f"{', '.join(base_kwargs)}: only for a base given by name, not for a model object"
            )
        return LoadedBase(base, base.config.name_or_path or type(base).__name__, "model object", "")
    return load_base(base, **base_kwargs)



