"""Requests of several policies, each at a strength of its own, in one packed batch: what each is
answered is what its own model generates alone."""

import peft
import pytest
import torch
from tiny_models import batches_continuously, tiny_base
from transformers import ContinuousBatchingConfig, GenerationConfig

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterModel
from qadapter.policy.requests import BASE_ALONE, RequestBatches, ServedPolicy

pytestmark = batches_continuously
NEW = 6
PROMPTS = ([5, 6, 7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [30], [5, 6, 8, 9, 40, 41, 42])


class Asked:
    def __init__(self, mixture):
        self.mixture = mixture


def trained(model, seed):
    torch.manual_seed(seed)
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def head_model(base, form, seed=1, objective=None):
    return trained(QAdapterModel.from_base(base, AdapterConfig(form=form, rank=4), objective), seed)


def lora_of(rank=4, **changes):
    settings = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**settings | changes)


def answers(batches, asked):
    """Greedy answers of (prompt, mixture) pairs that are written together, 8 tokens a step."""
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = batches.init_continuous_batching(config, ContinuousBatchingConfig(
        page_size=4, num_blocks=40, max_batch_tokens=8, use_async_batching=False,
        use_cuda_graph=False, allow_block_sharing=batches.lora is None,
    ))
    for number, (_, mixture) in enumerate(asked):
        batches.requests[f"r{number}"] = Asked(mixture)
    for number, (prompt, _) in enumerate(asked):
        manager.add_request(prompt, request_id=f"r{number}", max_new_tokens=NEW)
    manager.start()
    found = {}
    try:
        while len(found) < len(asked):
            output = manager.get_result(timeout=60)
            assert output is not None and output.error is None, output
            found[output.request_id] = output.generated_tokens
    finally:
        manager.stop(block=True, hard_stop=True)
    return [found[f"r{number}"] for number in range(len(asked))]


def alone(model, prompt, strength):
    ids = torch.tensor([prompt])
    output = model.generate(ids, max_new_tokens=NEW, do_sample=False, strength=strength)
    return output[0, len(prompt):].tolist()


def likeliest(requests, logits):
    return logits.argmax(-1).tolist()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "phi"])
def test_head_adapters_of_all_forms_beside_each_other(architecture):
    base = tiny_base(architecture)
    far = ObjectiveConfig(alpha_0=0.5, alpha_tilde=0.25, parametrization="q")
    models = [
        head_model(base, "linear", 1), head_model(base, "mlp", 2),
        head_model(base, "linear", 3, far),
    ]
    final_norm = None
    if architecture in ("llama", "granite"):
        models.append(head_model(base, "block", 4))
        final_norm = models[-1].adapter.final_norm.norm
    asked = [
        (model, prompt, strength) for model in models
        for prompt, strength in zip(PROMPTS, (0.0, 0.5, 1.0, 1.7), strict=True)
    ]
    batches = RequestBatches(models[0], None, final_norm, 1, likeliest)
    found = answers(batches, [
        (prompt, ServedPolicy(model.policy, model.adapter).at(strength))
        for model, prompt, strength in asked
    ])
    expected = [alone(model, prompt, strength) for model, prompt, strength in asked]
    assert found == expected
    assert len({tuple(answer) for answer in expected}) > len(PROMPTS)


@pytest.mark.parametrize("architecture, options", [
    ("llama", {}), ("gemma2", {}), ("mistral", {}),
    ("llama", {"use_dora": True}), ("llama", {"modules_to_save": ["norm"]}),
    ("qwen3_moe", {"target_modules": ["q_proj", "v_proj"]}),
    ("qwen3_moe", {"target_modules": ["q_proj"],
                   "target_parameters": ["mlp.experts.gate_up_proj"]}),
])
def test_adapters_in_the_trunk_beside_each_other_and_a_head(architecture, options):
    def model_of(seed):
        return trained(QAdapterModel.from_base(tiny_base(architecture), lora_of(**options)), seed)

    one, other, head = model_of(1), model_of(2), head_model(tiny_base(architecture), "mlp", 3)
    shared = model_of(1)
    shared.adapter.add(lora_of(**options), other.adapter.state_dict())
    served = [
        (one, ServedPolicy(one.policy, streams=(0,))),
        (other, ServedPolicy(other.policy, streams=(1,))),
        (head, ServedPolicy(head.policy, head.adapter)),
    ]
    asked = [
        (*pair, prompt, strength) for pair in served
        for prompt, strength in zip(PROMPTS, (1.0, 0.4, 0.0, 1.5), strict=True)
    ]
    batches = RequestBatches(shared, shared.adapter, None, 2, likeliest)
    found = answers(batches, [(prompt, policy.at(s)) for _, policy, prompt, s in asked])
    expected = [alone(model, prompt, s) for model, _, prompt, s in asked]
    assert found == expected
    assert len({tuple(answer) for answer in expected}) > len(PROMPTS)


def test_what_a_request_needs_of_the_trunk():
    model = QAdapterModel.from_base(tiny_base(), lora_of())
    policy = ServedPolicy(model.policy, streams=(0,))
    assert policy.at(0.0) is BASE_ALONE
    assert policy.at(1.0).streams == ((0, 1.0),)
    assert policy.at(0.5).streams == ((0, 0.5), (-1, 0.5))


def test_a_request_that_was_ended_meanwhile_disturbs_nobody():
    model = head_model(tiny_base(), "mlp")
    batches = RequestBatches(model, None, None, 1, likeliest)
    mixture = ServedPolicy(model.policy, model.adapter).at(1.0)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = batches.init_continuous_batching(config, ContinuousBatchingConfig(
        page_size=4, num_blocks=40, max_batch_tokens=8, use_async_batching=False,
        use_cuda_graph=False,
    ))
    batches.requests["stays"] = Asked(mixture)
    manager.add_request(PROMPTS[1], request_id="gone", max_new_tokens=NEW)
    manager.add_request(PROMPTS[0], request_id="stays", max_new_tokens=NEW)
    manager.start()
    try:
        outputs = [manager.get_result(timeout=60) for _ in range(2)]
    finally:
        manager.stop(block=True, hard_stop=True)
    [found] = [o.generated_tokens for o in outputs if o.request_id == "stays"]
    assert found == alone(model, PROMPTS[0], 1.0)
