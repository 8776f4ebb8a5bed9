"""QAdapterModel: the customised policy as a Hugging Face causal language model.

A frozen base with an adapter on its head or in its trunk. ``forward`` gives the customised policy's
logits, so everything built on it — ``generate`` in all its modes, pipelines, lm-eval — decodes that
policy and nothing is patched. Without a softcap one lm_head product is all it takes (design §2,
fact 5), and mostly one trunk pass: of the base for head adapters; for LoRA, of the stream whose
weight is not zero. Only where both streams have a weight they both run, in one batch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qadapter.adapters.head_adapter import AdapterConfig, HeadAdapter
from qadapter.adapters.streams import BASE
from qadapter.errors import QAdapterError
from qadapter.objective import ObjectiveConfig, find_actions, sequence_loss
from qadapter.policy import hub, storage
from qadapter.policy.adapter_files import AdapterFiles
from qadapter.policy.card import adapter_card, write_card
from qadapter.policy.decoding import StreamedGeneration, keeps_a_state
from qadapter.policy.dial import Policy
from qadapter.trunk.caches import CACHE, name_of_cache, take_cache
from qadapter.trunk.checkpointing import checkpoints_reentrantly
from qadapter.trunk.distributed_config import FSDP2, require_whole_matrices_of
from qadapter.trunk.identity import BaseIdentity
from qadapter.trunk.lm_head import LanguageModelHead, trunk
from qadapter.trunk.loading import LoadedBase, as_loaded
from qadapter.trunk.memo import TrunkMemo
from qadapter.trunk.packing import Packing, hidden_states
from qadapter.trunk.sharding import entering, freeze, layout_of, make_alike
from qadapter_kernels import PolicyStatistics, SoftValue, linear_soft_value, soft_value
from qadapter_kernels.reference import Coefficients, accumulation_dtype

if TYPE_CHECKING:
    from peft import PeftConfig

    from qadapter.adapters.lora import LoraAdapter
    from qadapter.exporting.forms import Form
    from qadapter.trunk.split import SplitTrunk

# Where pipelines look up which classes generate text; any other name is logged as an error.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["qadapter"] = "QAdapterModel"


class QAdapterModel(StreamedGeneration, PreTrainedModel, GenerationMixin):
    """A frozen base and an adapter that make up the customised policy π̃.

    Build with ``from_base`` or ``from_pretrained``. Attributes: ``base`` (the frozen causal LM),
    ``adapter`` (the only trainable part), ``objective``, ``adapter_config``, ``head``, ``policy``;
    ``trunk_memo`` (None), which several models of one base may share; ``chat_template`` (None),
    what conversations were rendered with in training.
    """

    base_model_prefix = "base"
    main_input_name = "input_ids"
    _is_stateful = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    if TYPE_CHECKING:  # transformers evaluates a class's annotations when it is made
        base: PreTrainedModel
        adapter: HeadAdapter | LoraAdapter
        adapter_config: AdapterConfig | PeftConfig

    def __init__(
        self, base: PreTrainedModel, adapter: HeadAdapter | LoraAdapter,
        adapter_config: AdapterConfig | PeftConfig, objective: ObjectiveConfig,
        base_identity: BaseIdentity,
    ):
        super().__init__(copy.deepcopy(base.config))
        self.base = base.eval()
        self.adapter = adapter
        self.adapter_config = adapter_config
        self.objective = objective
        self.base_identity = base_identity
        self.policy = Policy(objective)
        self.trunk_memo: TrunkMemo | None = None
        self.chat_template: str | None = None
        self.head = LanguageModelHead.of(base)
        self._trunk_cache = name_of_cache(trunk(base))
        self._keeps_a_state = keeps_a_state(base)
        self.generation_config = copy.deepcopy(base.generation_config)
        self.all_tied_weights_keys = {}
        self.supports_gradient_checkpointing = self.adapts_trunk
        if hasattr(base, "hf_device_map"):  # trainers then leave it where it is
            self.hf_device_map = base.hf_device_map
        layout = layout_of(base)
        if layout.engine:
            make_alike(adapter.state_dict().values())
        if layout.engine == FSDP2:
            self._is_fsdp_managed_module = True  # processes then generate equally many tokens

    # --- building, saving, loading ----------------------------------------------------------

    @classmethod
    def from_base(
        cls, base: PreTrainedModel | LoadedBase | str | Path,
        adapter: AdapterConfig | PeftConfig | str | None = None,
        objective: ObjectiveConfig | None = None, **base_kwargs: Any,
    ) -> QAdapterModel:
        """A new, untrained adapter on a frozen base: its policy is the base's.

        Args:
            base: a causal LM, its folder, or its hub name. It is frozen, and LoRA's layers are put
                into it.
            adapter: default ``AdapterConfig()``, on the head; a ``peft.LoraConfig`` (or another
                PEFT configuration that adapts layers), in the trunk; or "paper", the authors' LoRA.
            objective: default ``ObjectiveConfig()``.
            base_kwargs: passed to ``load_base`` (dtype, revision, device_map, …) where ``base`` is
                a name.

        Raises:
            QAdapterError: the base can't be loaded, or has no plain linear head; an adapter that
                can't be one.
        """
        config = _adapter_config(adapter)
        _check_fits(config, base_kwargs)
        loaded = as_loaded(base, base_kwargs)
        _require_bare(loaded.model)
        identity = BaseIdentity.of(loaded)
        return cls._assemble(loaded, config, objective or ObjectiveConfig(), identity)

    @classmethod
    def _assemble(
        cls, loaded: LoadedBase, config: AdapterConfig | PeftConfig, objective: ObjectiveConfig,
        identity: BaseIdentity,
    ) -> QAdapterModel:
        base = loaded.model.eval()
        freeze(base)
        LanguageModelHead.of(base)  # says what is wrong with it before anything is built
        if isinstance(config, AdapterConfig):
            adapter = config.build_on(base)
        else:
            from qadapter.adapters.lora import LoraAdapter

            adapter = LoraAdapter(base, config)
            config = adapter.config
            config.base_model_name_or_path = identity.name
            config.revision = identity.revision
        model = cls(base, adapter, config, objective, identity)
        try:
            model.check_generation()
        except QAdapterError:
            if model.adapts_trunk:
                adapter.peft_model.unload()
            raise
        return model

    @classmethod
    def from_pretrained(
        cls, adapter_dir: str | Path, base: PreTrainedModel | str | Path | None = None,
        *, objective: ObjectiveConfig | None = None, is_trainable: bool = False,
        **base_kwargs: Any,
    ) -> QAdapterModel:
        """Load a saved adapter on its base.

        Args:
            adapter_dir: folder written by ``save_pretrained``, or a hub repository. Also a plain
                PEFT adapter, as a Q-function or policy stream; it needs an ``objective``, unless
                the authors' code left its ``training_config.json`` beside it.
            base: the base model, its folder or its name; default: the name the adapter was saved
                with. Any other model than the one the adapter was trained on is refused.
            objective: what a plain PEFT adapter was trained with. Our own adapters, and those of
                the authors' code, carry theirs.
            is_trainable: keep the adapter's parameters trainable.

        Raises:
            QAdapterError: a file missing or damaged; the base is not the adapter's.
        """
        files = AdapterFiles(adapter_dir)
        saved = storage.read(files, objective)
        composed = isinstance(saved.adapter, storage.Composition)
        weights = {} if composed else storage.read_weights(files)
        chat_template = storage.read_chat_template(files)
        if base is None and saved.base_name is None:
            raise QAdapterError(f"{adapter_dir} names no base: pass base=")
        _check_fits(saved.adapter, base_kwargs)
        loaded = as_loaded(base if base is not None else saved.base_name, base_kwargs)
        _require_bare(loaded.model)
        identity = BaseIdentity.of(loaded)
        if saved.base is not None:
            saved.base.require(identity, adapter_dir)
            identity = dataclasses.replace(
                identity, name=saved.base.name, revision=saved.base.revision
            )
        if composed:
            from qadapter.policy.composition import load

            if is_trainable:
                raise QAdapterError(f"{adapter_dir}: a composition is frozen: train its adapters")
            model = load(saved, loaded, identity)
            model.chat_template = chat_template
            return model
        storage.require_planned(adapter_dir, weights, loaded.model, saved.adapter)
        try:
            model = cls._assemble(loaded, saved.adapter, saved.objective, identity)
        except QAdapterError as error:
            raise QAdapterError(f"{adapter_dir}: {error}") from error
        storage.require_fitting(adapter_dir, weights, model.adapter.state_dict())
        model.adapter.load_state_dict(weights)
        model.adapter.requires_grad_(is_trainable)
        model.chat_template = chat_template
        return model

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True, push_to_hub: bool = False, repo_id: str | None = None,
        **hub_kwargs: Any,
    ) -> None:
        """Write the adapter, not the base: ``adapter_model.safetensors``, ``qadapter_config.json``
        and, for LoRA, PEFT's ``adapter_config.json``, so that PEFT loads it too (one stream of it);
        ``chat_template.jinja``, where the model has one of its own; a manifest of these; and a
        model card, unless a README.md is there that people wrote or edited.

        Args:
            state_dict: this model's state dict, where a trainer gathered it; default: its own.
            push_to_hub: send the adapter's files, and no others of the folder, to the hub.
            repo_id: default: the folder's name. hub_kwargs: as ``push_to_hub``'s.

        Raises:
            QAdapterError: the folder can't be written; or what was saved can't be sent.
        """
        if not is_main_process:
            return
        self._write(save_directory, state_dict)
        self._write_card(save_directory, Path(save_directory).resolve().name)
        if push_to_hub:
            repo = hub.create(
                repo_id or Path(save_directory).resolve().name, hub_kwargs.get("token"),
                hub_kwargs.pop("private", None),
            )
            hub.push(save_directory, repo, f"the adapter is saved in {save_directory}",
                     **hub_kwargs)

    def push_to_hub(self, repo_id: str, **hub_kwargs: Any) -> str:
        """Send the adapter, its card and nothing else to the hub.

        Args:
            repo_id: is made if it is not there.
            hub_kwargs: ``commit_message``, ``commit_description``, ``private``, ``token``,
                ``revision``, ``create_pr``, as in transformers.

        Returns:
            The commit's address.

        Raises:
            QAdapterError: no network, no token, no permission.
        """
        repo = hub.create(repo_id, hub_kwargs.get("token"), hub_kwargs.pop("private", None))
        with tempfile.TemporaryDirectory(prefix="qadapter-") as folder:
            self._write(folder, None)
            self._write_card(folder, repo)
            return hub.push(folder, repo, "the model is as it was", **hub_kwargs)

    def described(self) -> dict[str, Any]:
        """What the adapter is and what it was trained with, for people; JSON types."""
        return {**storage.told(self.adapter_config), **dataclasses.asdict(self.objective)}

    def _write_card(self, folder: str | Path, name: str) -> None:
        try:
            write_card(folder, adapter_card(name, self.base_identity, self.described()))
        except OSError as error:
            raise QAdapterError(f"{folder}: the model card can't be saved: {error}") from error

    def bare_base(self) -> PreTrainedModel:
        """The base without the adapter's layers; its tensors are shared."""
        return self.adapter.bare_base() if self.adapts_trunk else self.base

    def _write(self, folder: str | Path, state_dict: dict[str, Tensor] | None) -> None:
        if self.adapts_trunk:
            weights = self.adapter.state_dict(state_dict)
        else:
            weights = self.adapter.state_dict()
            if state_dict is not None:
                weights = {name: state_dict[f"adapter.{name}"] for name in weights}
        storage.write(
            folder, weights, self.adapter_config, self.objective, self.base_identity,
            self.chat_template,
        )

    def export(self, output_dir: str | Path, form: Form = "merged", **options: Any) -> Any:
        """Write the policy as it is set for engines that don't know us: ``qadapter.exporting``."""
        from qadapter.exporting.export import export

        return export(self, output_dir, form, **options)

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
        self.policy = dataclasses.replace(
            self.policy, strength=1.0 if strength is None else strength, alpha_0=alpha_0,
            alpha_tilde=alpha_tilde,
        )
        return self.policy

    @entering
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        strength: float | Tensor | None = None, return_dict: bool | None = None, **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the customised policy, [B, T, V], in the base's dtype.

        Args:
            past_key_values: also by the name ``cache``, as transformers calls it from 5.24 on; what
                is returned has the installed version's name.
            labels: [B, T]; next-token cross-entropy under the policy is returned as ``loss``.
            logits_to_keep: last positions to compute logits for, as in transformers.
            strength: dial of this call: a number, or a tensor [B], one for each row.
            The others: as in the base's forward.
        """
        streams = self._streams(strength)
        kwargs["past_key_values"] = past_key_values
        outputs = self._run(
            streams, cache=take_cache(kwargs), input_ids=input_ids, attention_mask=attention_mask,
            position_ids=position_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # On a CPU a product with a slice of a batch would copy the head's weight for every row.
        hidden = outputs.last_hidden_state[:, keep].contiguous().chunk(len(streams))
        if self.adapts_trunk:
            weights = self.policy.trunk_weights(strength)
            logits = self._mix([weights[stream] for stream in streams], hidden)
        else:
            logits = self.head_logits(hidden[0], strength)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
            )
        given = inputs_embeds if input_ids is None else input_ids
        recorded = outputs.get("hidden_states")
        if recorded and recorded[-1] is not None:  # the last is the last hidden state, as in a base
            recorded = (*recorded[:-1], self.base_stream(recorded[-1]))
        result = CausalLMOutputWithPast(
            # Where a device_map splits the base, too, logits return to where the ids came from.
            loss=loss, logits=logits.to(given.device), hidden_states=recorded,
            attentions=outputs.get("attentions"), **{CACHE: outputs.get(self._trunk_cache)},
        )
        return result.to_tuple() if return_dict is False else result

    @entering
    def head_logits(self, features: Tensor, strength: float | Tensor | None = None) -> Tensor:
        """Logits of the policy [..., V] from ``features`` [..., D], of an adapter on the head."""
        adapter_hidden, base_hidden = self.adapter.streams(features)
        return self.policy_logits(base_hidden, adapter_hidden, strength=strength)

    @entering
    def policy_logits(
        self, base_hidden: Tensor | None, adapter_hidden: Tensor | None, *,
        strength: float | Tensor | None = None,
    ) -> Tensor:
        """Logits of the policy [..., V] from last hidden states [..., D].

        Args:
            base_hidden, adapter_hidden: h_b and h_a; None only where its weight is 0.
        """
        weights = self.policy.stream_weights(strength)
        terms = [
            (weight, hidden)
            for weight, hidden in zip(weights, (adapter_hidden, base_hidden), strict=True)
            if isinstance(weight, Tensor) or weight != 0
        ]
        return self._mix(*zip(*terms or [(0.0, base_hidden)], strict=True))

    def _mix(
        self, weights: Sequence[float | Tensor], hidden: Sequence[Tensor]
    ) -> Tensor:
        """Logits of a weighted sum of streams [..., D]; weights are numbers or [B]."""
        if len(hidden) == 1 and not isinstance(weights[0], Tensor) and weights[0] == 1:
            return self.head(hidden[0])  # nothing is rounded on the way: the base, bit for bit
        device, dtype = self.head.device, accumulation_dtype(self.head.dtype)
        hidden = [h.to(device) for h in hidden]
        per_row = (-1,) + (1,) * (hidden[0].dim() - 1)
        weights = [
            w.to(device, dtype).view(per_row) if isinstance(w, Tensor) else w
            for w in weights
        ]
        terms = list(zip(weights, hidden, strict=True))
        if self.head.softcap is not None:
            # The cap is not linear: the streams are combined as logits.
            return sum(w * self.head(h).to(dtype) for w, h in terms).to(self.head.dtype)
        mixed = sum(w * h.to(dtype) for w, h in terms)
        return self.head(mixed, sum(weights)).to(self.head.dtype)

    @torch.no_grad()
    @entering
    def token_rewards(
        self, input_ids: Tensor, completion_mask: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Reward r of each completion token under the trained objective, at its position.

        Args:
            input_ids, completion_mask: [B, T]. attention_mask: [B, T]; default: all ones.

        Returns:
            float32 [B, T], 0 elsewhere. By fact 8 an estimate of r₂: what the preferences reward.
        """
        device = self.head.device
        actions = find_actions(
            input_ids.to(device), completion_mask.to(device), self.objective.mask_alignment
        )
        states = actions.sequence_N, actions.state_N
        streams = self.hidden_streams(input_ids, attention_mask)
        adapter_hidden, base_hidden = (hidden[states] for hidden in streams)
        soft = self.soft_value(adapter_hidden, base_hidden, actions.token_N)
        offsets = actions.offsets_S1
        if input_ids.shape[0] % 2:  # the sequence loss pairs sequences; an empty one evens them
            offsets = torch.cat([offsets, offsets[-1:]])
        rewards = sequence_loss(
            soft, offsets, self.objective, padded_length=input_ids.shape[1]
        ).token_rewards
        return actions.scatter(rewards).to(input_ids.device)

    def merge_adapter(self) -> None:
        """Add a LoRA to the trunk's weights, for a policy of one stream: it then costs what the
        base costs, at the price of one rounding of the weights and a copy of them on the CPU.

        Raises:
            QAdapterError: a head adapter (it costs nothing as it is), or a quantized base.
        """
        self._trunk_adapter().merge()

    def unmerge_adapter(self) -> None:
        """Put the base's weights back, bit for bit."""
        self._trunk_adapter().unmerge()

    def _trunk_adapter(self) -> LoraAdapter:
        if not self.adapts_trunk:
            raise QAdapterError("only an adapter in the trunk can be merged into the model; export "
                                "merges a linear head adapter into a checkpoint")
        return self.adapter

    # --- what training and evaluation build on ----------------------------------------------

    @entering
    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the frozen base says of every token, [B, T, D] in its dtype: what an adapter on the
        head reads, and what both streams are made of there, h_a by ``adapter`` and h_b by
        ``base_stream``. For a LoRA h_b itself."""
        run = partial(self._trunk_hidden, BASE)
        if self.trunk_memo is None:
            return run(input_ids, attention_mask)
        return self.trunk_memo(
            run, input_ids, attention_mask, dtype=self.base.dtype,
            before_norm=self.reads_before_norm,
        )

    @entering
    def base_stream(self, features: Tensor) -> Tensor:
        """h_b [..., D] of features."""
        return features if self.adapts_trunk else self.adapter.base_stream(features)

    @entering
    def base_hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The frozen base's last hidden states [B, T, D], after the final norm."""
        with torch.no_grad():
            return self.base_stream(self.features(input_ids, attention_mask))

    @entering
    def adapter_hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The adapted stream's last hidden states [B, T, D]; gradients reach the adapter."""
        if self.adapts_trunk:
            return self._trunk_hidden(0, input_ids, attention_mask)
        return self.adapter(self.features(input_ids, attention_mask))

    @entering
    def hidden_streams(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h_a, h_b), each [B, T, D]; gradients reach the adapter through h_a alone."""
        if self.adapts_trunk:
            adapter_hidden, base_hidden = self._trunk_streams((0, BASE), input_ids, attention_mask)
            return adapter_hidden, base_hidden
        return self.adapter.streams(self.features(input_ids, attention_mask))

    @property
    def split_trunk(self) -> SplitTrunk | None:
        """The trunk in two parts, the upper one from the first block that the adapter changes; None
        where there is no part below, or the trunk can't be run in parts (then it runs whole)."""
        return self.adapter.split if self.adapts_trunk else None

    @property
    def split_refused(self) -> str:
        """Why the trunk can't be run in parts, though its lower blocks are not adapted; or ''."""
        return self.adapter.split_refused if self.adapts_trunk else ""

    @entering
    def packed_base(self, packing: Packing, *, packed: bool) -> tuple[Tensor, Tensor | None]:
        """What the frozen base says of all packed tokens: their ``features`` [M, D], and the states
        that enter ``split_trunk``'s first block, where there is one; arguments as
        ``packed_hidden``'s."""
        run = partial(self.packed_hidden, packing, packed=packed, base_stream=True)
        entering_MD = None if self.split_trunk is None else run(below=True)
        return run(entering_ND=entering_MD), entering_MD

    def packed_hidden(
        self, packing: Packing, *, packed: bool, base_stream: bool = False, below: bool = False,
        entering_ND: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states of all packed tokens [M, D] out of the trunk, through which gradients
        reach a LoRA.

        Args:
            packing: on the base's device.
            packed: run it as one row, where the base's attention can (``packing.can_pack``).
            base_stream: the frozen base's ``features`` instead.
            below: the states that enter ``split_trunk``'s first block instead.
            entering_ND: those, where they are known.
        """
        part = self.split_trunk.below if below else None
        if entering_ND is not None:
            part = self.split_trunk.above
        if not self.adapts_trunk:
            part = self.feature_trunk
        apart = base_stream and self.adapts_trunk
        off = self.adapter.off() if apart else contextlib.nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not base_stream), off:
            hidden_MD = hidden_states(
                self.base, packing, packed=packed, trunk=part, entering_ND=entering_ND
            )
        return hidden_MD.to(self.head.device)

    def _trunk_streams(
        self, streams: Sequence[int], input_ids: Tensor, attention_mask: Tensor | None
    ) -> Iterator[Tensor]:
        """Last hidden states [B, T, D] of streams that differ in the trunk, one run after the
        other. Without gradients, blocks that they have in common run once."""
        split = None if torch.is_grad_enabled() or self.trunk_memo else self.split_trunk
        if split is None:
            for stream in streams:
                run = self.base_hidden if stream == BASE else partial(self._trunk_hidden, stream)
                yield run(input_ids, attention_mask)
            return
        states = split.below(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        for stream in streams:
            yield self._trunk_hidden(stream, None, attention_mask, states, split.above)

    def _trunk_hidden(
        self, stream: int, input_ids: Tensor | None, attention_mask: Tensor | None,
        inputs_embeds: Tensor | None = None, part: nn.Module | None = None,
    ) -> Tensor:
        hidden = self._run(
            (stream,), part=part, input_ids=input_ids, inputs_embeds=inputs_embeds,
            attention_mask=attention_mask, use_cache=False,
        ).last_hidden_state
        return hidden.to(self.head.device)  # another one's, where a device_map splits them

    @overload
    def soft_value(
        self, adapter_hidden: Tensor, base_hidden: Tensor | None, actions: Tensor,
        coefficients: Coefficients | None = None, *, return_statistics: Literal[False] = False,
        **kwargs: Any,
    ) -> SoftValue: ...
    @overload
    def soft_value(
        self, adapter_hidden: Tensor, base_hidden: Tensor | None, actions: Tensor,
        coefficients: Coefficients | None = None, *, return_statistics: Literal[True],
        **kwargs: Any,
    ) -> tuple[SoftValue, PolicyStatistics]: ...
    @overload
    def soft_value(
        self, adapter_hidden: Tensor, base_hidden: Tensor | None, actions: Tensor,
        coefficients: Coefficients | None = None, *, return_statistics: bool,
        **kwargs: Any,
    ) -> SoftValue | tuple[SoftValue, PolicyStatistics]: ...
    @entering
    def soft_value(
        self, adapter_hidden: Tensor, base_hidden: Tensor | None, actions: Tensor,
        coefficients: Coefficients | None = None, **kwargs: Any,
    ) -> SoftValue | tuple[SoftValue, PolicyStatistics]:
        """``qadapter_kernels``' soft value of N states through this model's head.

        Args:
            adapter_hidden: [N, D]. base_hidden: [N, D], or None where ``base_action_logit`` and
                ``base_logsumexp`` stand for it. actions: [N].
            coefficients: default: the trained objective's.
            kwargs: ``base_action_logit``, ``base_logsumexp``, ``return_statistics``,
                ``workspace_mb``, ``backend``.
        """
        coef, device = coefficients or self.objective.coefficients, self.head.device
        adapter_hidden, base_hidden, actions = (
            x if x is None else x.to(device) for x in (adapter_hidden, base_hidden, actions)
        )
        for name in ("base_action_logit", "base_logsumexp"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].to(device)
        if self.head.softcap is None:
            return linear_soft_value(
                adapter_hidden, base_hidden, actions=actions, **self.head.operands,
                **coef._asdict(), **kwargs,
            )
        kwargs.pop("workspace_mb", None)
        adapter_logits = self.head(adapter_hidden)
        with torch.no_grad():
            base_logits = None if base_hidden is None else self.head(base_hidden)
        return soft_value(adapter_logits, base_logits, actions, **coef._asdict(), **kwargs)

    # --- what transformers asks of a model --------------------------------------------------

    def train(self, mode: bool = True) -> QAdapterModel:
        """The frozen base stays in evaluation mode: its dropout would move the reference policy."""
        super().train(mode)
        self.base.eval()
        if self.adapts_trunk:
            self.adapter.train(mode)
        return self

    def enable_input_require_grads(self) -> None:
        """Only where checkpoints of activations need it: transformers asks for it with every kind,
        and gradients would run down to the embeddings through blocks that hold no adapter."""
        if checkpoints_reentrantly(self.base):
            super().enable_input_require_grads()

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> None:
        raise QAdapterError("the base is frozen: resize its embeddings before from_base, not after")

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # where the base has experts; without, the setting means nothing

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """How the base computes its routed experts, as in transformers."""
        super().set_experts_implementation(experts_implementation)
        self.base.set_experts_implementation(experts_implementation)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        self.base.tie_weights(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to initialise: the base is loaded and the adapter builds itself."""


def _require_bare(base: PreTrainedModel) -> None:
    if hasattr(base, "peft_config"):
        raise QAdapterError(
            f"{type(base).__name__} holds PEFT layers already: merge or unload them"
        )


def _check_fits(config: Any, base_kwargs: dict[str, Any]) -> None:
    """What can't be put into a base that is still to be loaded."""
    if not isinstance(config, AdapterConfig | storage.Composition):
        require_whole_matrices_of(base_kwargs.get("distributed_config"), "an adapter of PEFT's")


def _adapter_config(adapter: Any) -> AdapterConfig | PeftConfig:
    if adapter is None:
        return AdapterConfig()
    if isinstance(adapter, AdapterConfig):
        return adapter
    from peft import PeftConfig

    from qadapter.adapters.lora import preset

    if isinstance(adapter, str):
        return preset(adapter)
    if not isinstance(adapter, PeftConfig):
        raise QAdapterError(
            "adapter must be a qadapter.AdapterConfig, a peft configuration or the name of a "
            f"preset, got {type(adapter).__name__}"
        )
    return adapter
