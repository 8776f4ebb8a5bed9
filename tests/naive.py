"""The customised policy by its definition: both streams run over everything at every step.

Two whole models give a and b; z = (q + α₀·log π)/α̃ is written out over log-softmaxes. No cache, no
shared product, nothing of ``QAdapterModel``: what decoding is tested against, in float32.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter import ObjectiveConfig

ROWS = [[5, 9, 11, 3, 20, 7], [17, 4, 8], [30, 31, 5, 9]]
LENGTH = {"max_new_tokens": 10, "do_sample": False}
MODES = {
    "greedy": {},
    "uncached": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"num_beams": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "no repetitions": {"no_repeat_ngram_size": 2},
}


class NaivePolicy(PreTrainedModel, GenerationMixin):
    """Generates from π̃ given two causal LMs: one for the adapted stream, one for the base."""

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self, adapted: nn.Module, base: nn.Module, objective: ObjectiveConfig,
        alpha_0: float | None = None, alpha_tilde: float | None = None,
    ):
        super().__init__(copy.deepcopy(base.config))
        self.adapted, self.base, self.objective = adapted, base, objective
        self.alpha_0 = objective.alpha_0 if alpha_0 is None else alpha_0
        self.alpha_tilde = objective.alpha_tilde if alpha_tilde is None else alpha_tilde
        self.generation_config = copy.deepcopy(base.generation_config)
        self.generation_config.use_cache = False
        self.eval()

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, strength: float | Tensor = 1.0, **unused,
    ) -> CausalLMOutputWithPast:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        a = self.adapted(**inputs).logits.float()
        b = self.base(**inputs).logits.float()
        c = self.objective
        q = c.alpha_tilde * a - c.alpha_0 * b if c.parametrization == "policy" else a
        log_pi = b.log_softmax(-1)
        z = ((q + self.alpha_0 * log_pi) / self.alpha_tilde).log_softmax(-1)
        w = torch.as_tensor(strength, dtype=torch.float32).reshape(-1, 1, 1)
        return CausalLMOutputWithPast(logits=w * z + (1 - w) * log_pi)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # its models do

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()


def with_head(base: PreTrainedModel, adapter: nn.Module) -> PreTrainedModel:
    """A copy of a base whose lm_head sees (I + f)(h), whatever the model does to its logits; or, of
    an adapter that reads before the final norm, whose norm sees x′."""
    adapted = copy.deepcopy(base)
    if adapter.reads_before_norm:
        name = next(n for n, m in base.named_modules() if m is adapter.final_norm.norm)
        adapted.get_submodule(name).register_forward_pre_hook(
            lambda module, args: (_in_a_layer(adapter, args[0]),)
        )
        return adapted
    function = copy.deepcopy(adapter)
    adapted.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (function(args[0]).to(args[0].dtype),)
    )
    return adapted


def _in_a_layer(adapter: nn.Module, x: Tensor) -> Tensor:
    """x′ as a decoder layer would write it."""
    n = copy.deepcopy(adapter.final_norm.norm)(x)
    gated = nn.functional.silu(n @ adapter.gate.weight.T) * (n @ adapter.down.weight.T)
    return x + adapter.scale * (gated @ adapter.up.weight.T)


def left_padded(rows: list[list[int]], pad: int = 0) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def uncached(settings: dict) -> dict:
    """The same way of generating, without a cache."""
    return {k: v for k, v in settings.items() if k != "cache_implementation"} | {"use_cache": False}


def stock(call):
    """What plain models give; skips where the installed transformers can't do that with them."""
    try:
        result = call()
    except Exception as error:
        pytest.skip(f"transformers {transformers.__version__} can't do this itself: {error!r:.200}")
    if not len(result):
        pytest.skip(f"transformers {transformers.__version__} gives nothing here itself")
    return result


def batched_in_small_steps(model, rows, new_tokens):
    """Answers by continuous batching with 8 tokens a step: prompts are cut, and prefilled beside
    requests that are decoded."""
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    sizes, options = {"num_blocks": 8, "max_batch_tokens": 8}, {}
    if hasattr(transformers, "ContinuousBatchingConfig"):
        options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**sizes)
    else:  # the oldest versions look for them here
        vars(config).update(sizes)
    outputs = model.generate_batch(
        inputs=rows, generation_config=config, progress_bar=False, **options
    )
    return [output.generated_tokens for output in outputs.values()]
