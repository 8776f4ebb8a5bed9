"""Kinds of bases and adapters behind the server."""

import peft
import pytest
import requests
import torch
from running import running, service_of
from tiny_models import batches_continuously, save_tiny, tiny_llama
from transformers import GenerationConfig

from qadapter import AdapterConfig, QAdapterModel
from qadapter.composition import compose
from qadapter.errors import QAdapterError

pytestmark = batches_continuously
QUESTION = [{"role": "user", "content": "What is blue?"}]


def lora(base, seed=0, **changes):
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return trained(QAdapterModel.from_base(base, peft.LoraConfig(**settings | changes)), seed)


def trained(model, seed):
    torch.manual_seed(seed + 1)
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_the_bases_own_penalty_is_the_servers(tmp_path):
    save_tiny(tmp_path / "base")
    GenerationConfig(repetition_penalty=1.8).save_pretrained(tmp_path / "base")
    model = trained(QAdapterModel.from_base(tmp_path / "base", AdapterConfig(rank=2)), 3)
    model.save_pretrained(tmp_path / "head")
    body = {"model": "head", "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0}
    with running(service_of(tmp_path, ["head"])) as server:
        tokenizer = server.service.models.by_name["base"].tokenizer
        for change, penalty in (({}, 1.8), ({"repetition_penalty": 1}, 1.0)):
            answer = requests.post(server.url + "/v1/completions", timeout=60, json=body | change)
            ids = model.generate(
                torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False,
                repetition_penalty=penalty,
            )[0, 3:]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert answer.json()["choices"][0]["text"] == text
            assert (len(set(ids.tolist())) == 12) == (penalty == 1.8)


def test_a_composition_of_loras_and_a_head_beside_it(tmp_path):
    save_tiny(tmp_path / "base")
    parts = [lora(tiny_llama(), seed) for seed in range(2)]
    both = compose(parts, [0.5, 0.5])
    both.save_pretrained(tmp_path / "both")
    head = trained(QAdapterModel.from_base(tiny_llama(), AdapterConfig(form="mlp", rank=2)), 5)
    head.save_pretrained(tmp_path / "head")
    expected = {"both": both, "head": head}
    with running(service_of(tmp_path, ["both", "head"])) as server:
        for name, model in expected.items():
            for strength in (0.0, 0.6, 1.0):
                answer = requests.post(server.url + "/v1/completions", timeout=60, json={
                    "model": name, "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0,
                    "strength": strength, "logprobs": 0,
                }).json()
                ids = model.generate(
                    torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False,
                    strength=strength,
                )[0, 3:]
                assert answer["choices"][0]["text"] == server.service.models.by_name[
                    "base"
                ].tokenizer.decode(ids, skip_special_tokens=True), (name, strength)
            rewards = requests.post(server.url + "/v1/qadapter/rewards", timeout=60, json={
                "model": name, "messages": QUESTION, "answer": "Yes.",
            }).json()
            assert len(rewards["tokens"]) > 1
    parts[0].save_pretrained(tmp_path / "one")
    with pytest.raises(QAdapterError, match="serve it without other LoRAs"):
        service_of(tmp_path, ["both", "one"])


def test_what_cant_be_batched_is_refused_at_the_start(tmp_path):
    save_tiny(tmp_path / "base")
    lora(tiny_llama()).save_pretrained(tmp_path / "mine")
    service = service_of(tmp_path, ["mine"])

    def failing(*args):
        raise QAdapterError("these layers see tokens out of order, say")

    service.engine.batches.choose = failing
    with pytest.raises(QAdapterError, match=r"can't be served together: .*out of order"):
        with running(service):
            pass


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rewards_and_answers_with_any_attention(tmp_path, implementation):
    save_tiny(tmp_path / "base")
    head = trained(QAdapterModel.from_base(tiny_llama(), AdapterConfig(form="block", rank=2)), 5)
    head.save_pretrained(tmp_path / "head")
    service = service_of(tmp_path, ["head"], attn_implementation=implementation)
    rewards = []
    with running(service) as server:
        for _ in range(2):
            answer = requests.post(server.url + "/v1/chat/completions", timeout=60, json={
                "model": "head", "messages": QUESTION, "max_tokens": 5, "temperature": 0,
            })
            assert answer.status_code == 200, answer.text
            found = requests.post(server.url + "/v1/qadapter/rewards", timeout=60, json={
                "model": "head", "messages": QUESTION, "answer": "Yes, blue.",
            })
            assert found.status_code == 200, found.text
            rewards.append(found.json()["total"])
    ids = [*service.models.by_name["head"].encoder(QUESTION)]
    answer = service.models.by_name["head"].tokenizer("Yes, blue.", add_special_tokens=False)
    end = sorted(service.models.by_name["head"].ends)[-1]
    whole = torch.tensor([[*ids, *answer.input_ids, end]])
    mask = torch.arange(whole.shape[1])[None] >= len(ids)
    expected = float(head.token_rewards(whole, mask).sum())
    assert rewards == pytest.approx([expected] * 2, abs=1e-4)
