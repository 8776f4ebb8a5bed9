"""A model that is moved: whatever is kept beside the parameters goes with them.

To another dtype; to a second device, whole or in part; to other weights.
"""

from __future__ import annotations

import copy
import dataclasses

import peft
import pytest
import torch
from naive import LENGTH, ROWS, left_padded
from second_device import SECOND, SecondDevice
from tiny_models import tiny_base

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.evaluation.scoring import Scorer, evaluating
from qadapter.policy.composition import compose
from qadapter.policy.sampling import fused_sample
from qadapter.training.losses import batch_loss
from qadapter.training.retention import RetentionStates
from qadapter.trunk.memo import TrunkMemo

POLICY = ObjectiveConfig(alpha_0=0.5, alpha_tilde=2.0)
EQUAL = ObjectiveConfig(alpha_0=0.5, alpha_tilde=0.5)
LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
TOP = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
KINDS = {
    "linear": ("llama", AdapterConfig(rank=4)),
    "mlp": ("phi", AdapterConfig(form="mlp", rank=4)),  # its head has a bias
    "block": ("cohere", AdapterConfig(form="block", rank=4)),  # its norm takes one dtype alone
    "softcap": ("gemma2", AdapterConfig(rank=4)),
    "lora": ("llama", LORA),
    "top lora": ("mistral", TOP),
    "heads": ("granite", AdapterConfig(rank=3)),
    "loras": ("llama", LORA),
}
COMPOSED = ("heads", "loras")
STRENGTHS = (0.0, 0.4, torch.tensor([0.0, 1.0, 2.0]))
SHORT = LENGTH | {"max_new_tokens": 4}


def build(kind: str) -> QAdapterModel:
    architecture, config = KINDS[kind]
    objective = EQUAL if kind in COMPOSED else POLICY
    models = []
    for seed in range(1 + (kind in COMPOSED)):
        model = QAdapterModel.from_base(tiny_base(architecture), config, objective).eval()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        models.append(model)
    return compose(models, (0.3, 0.9)) if kind in COMPOSED else models[0]


def batch() -> dict[str, torch.Tensor]:
    """Two pairs of tokens, as the collator gives them."""
    ids = torch.randint(1, 96, (4, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.zeros_like(ids)
    mask[:, 3:] = 1
    return {
        "input_ids": ids, "completion_mask": mask, "attention_mask": torch.ones_like(ids),
        "rows": torch.arange(2),
    }


def everything(model: QAdapterModel, device: str = "cpu") -> dict[str, torch.Tensor]:
    """All that a model computes, on the CPU; its inputs are on ``device``."""
    found, inputs = {}, {k: x.to(device) for k, x in left_padded(ROWS).items()}
    pairs = {k: x.to(device) for k, x in batch().items()}
    with torch.no_grad():
        for number, strength in enumerate(STRENGTHS):
            real = inputs["attention_mask"].bool()
            found[f"logits {number}"] = model(**inputs, strength=strength).logits[real]
            found[f"answers {number}"] = model.generate(**inputs, **SHORT, strength=strength)
        found["loss"] = model(**inputs, labels=inputs["input_ids"]).loss
        ids = pairs["input_ids"]
        found["h_a"], found["h_b"] = model.hidden_streams(ids, pairs["attention_mask"])
        found["rewards"] = model.token_rewards(ids, pairs["completion_mask"])
        found["beams"] = model.generate(**inputs, **SHORT | {"num_beams": 2})
    if any(p.requires_grad for p in model.parameters()):
        output = batch_loss(model, pairs)
        output.loss.backward()
        found["pairs' loss"] = output.loss.detach()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found[f"gradient of {name}"], parameter.grad = parameter.grad, None
    return {name: x.cpu() for name, x in found.items()}


def assert_same(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(
            found[name], x, check_dtype=False, msg=lambda text, name=name: f"{name}: {text}",
            **tolerance,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_to_another_dtype(kind):
    if kind == "softcap":
        pytest.skip("transformers' own Gemma 2 gives NaN beside padding in float64")
    model = build(kind)
    wanted = everything(model)
    model.to(torch.float64)
    found = everything(model)
    assert found["logits 1"].dtype == found["h_b"].dtype == torch.float64
    assert_same(found, wanted, atol=2e-4, rtol=2e-3)
    # All of it is in float64: a copy in float32 anywhere would leave some 1e-7.
    ids = torch.tensor([ROWS[0]])
    base = model.bare_base()
    difference = model(ids, strength=0.0).logits - base(ids).logits
    assert difference.abs().max() < 1e-12
    for dtype in (torch.bfloat16, torch.float16):
        assert model.to(dtype)(ids, strength=0.4).logits.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_to_another_device_and_back(kind):
    model = build(kind)
    wanted = everything(model)
    with SecondDevice():
        model.to(SECOND)
        assert_same(everything(model, "meta"), wanted, atol=1e-4, rtol=1e-3)
        model.to("cpu")
        assert_same(everything(model), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", ["cpu", "meta"])
def test_a_trunk_and_a_head_on_two_devices(kind, inputs):
    """As ``device_map`` splits a base: hooks bring to each part what it is given."""
    model = build(kind)
    wanted = everything(model)
    with SecondDevice():
        split(model)
        assert model.head.weight.device == SECOND
        assert_same(everything(model, inputs), wanted, atol=1e-4, rtol=1e-3)


def split(model: QAdapterModel) -> None:
    """The last block, the final norm, the head and what is on it go to the second device."""
    def bring(module, args, kwargs):
        place = next(module.parameters()).device
        return torch.utils._pytree.tree_map(
            lambda x: x.to(place) if isinstance(x, torch.Tensor) else x, (args, kwargs)
        )

    parts = dict(model.base.named_children()) | dict(model.base.model.named_children())
    parts |= {str(i): layer for i, layer in enumerate(model.base.model.layers)}
    last = {"1", "lm_head", "norm", "final_layernorm"}
    for name, part in parts.items():
        if name in last:
            part.to(SECOND)
        if name not in ("model", "layers") and list(part.parameters()):
            part.register_forward_pre_hook(bring, with_kwargs=True)
    if not model.adapts_trunk:
        model.adapter.to(SECOND)
        if hasattr(model, "heads"):
            model.heads.to(SECOND)


@pytest.mark.parametrize("kind", ["linear", "lora", "top lora"])
def test_other_weights_in_place_and_assigned(kind):
    model, other = build(kind), build(kind)
    for parameter in other.parameters():
        parameter.data.add_(0.1)
    wanted = everything(other)
    state = copy.deepcopy(other.state_dict())
    for assign in (False, True):
        moved = copy.deepcopy(model)
        moved.load_state_dict(state, assign=assign)
        assert_same(everything(moved), wanted, atol=1e-4, rtol=1e-3)
        live = {id(p) for p in moved.parameters()}
        assert {id(p) for p in moved.adapter.parameters()} <= live
    shell = copy.deepcopy(model)
    shell.to("meta").load_state_dict(state, assign=True)
    shell.tie_weights()
    for name, buffer in model.named_buffers():  # not in a state dict: rotary frequencies
        shell.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
    assert_same(everything(shell), wanted, atol=1e-4, rtol=1e-3)


def test_a_head_that_is_tied_anew_or_grows():
    model = build("linear")
    base = model.base
    base.lm_head.weight = torch.nn.Parameter(torch.randn(96, 32))
    assert model.head.weight.data_ptr() == base.lm_head.weight.data_ptr()
    ids = torch.tensor([ROWS[0]])
    assert torch.equal(model(ids, strength=0.0).logits, base(ids).logits)
    base.resize_token_embeddings(100)
    assert torch.equal(model(ids, strength=0.0).logits, base(ids).logits)
    assert model(ids).logits.shape[-1] == 100


@pytest.mark.parametrize("kind", ["mlp", "softcap", "lora"])
def test_scorers_made_before_the_move(kind):
    model = build(kind).to(torch.bfloat16)
    scorer, pairs = Scorer(model), batch()

    def scores(device):
        with evaluating(model):
            h_a, h_b = scorer.hidden_streams(
                pairs["input_ids"].to(device), pairs["attention_mask"].to(device)
            )
            actions = pairs["input_ids"].flatten().to(device)
            found = scorer.score(h_a.flatten(0, 1), h_b.flatten(0, 1), actions)
        return found._replace(soft=found.soft.value)

    before = scores("cpu")
    with SecondDevice():
        model.to(SECOND)
        for name, ours in scores("meta")._asdict().items():
            theirs = getattr(before, name)
            if name == "same_top1":  # which of two alike is the larger may round either way
                assert theirs is None or ours.shape == theirs.shape
                continue
            # bfloat16 products of another device: 2⁻⁸ of logits of a few nats.
            torch.testing.assert_close(ours.cpu(), theirs, atol=0.05, rtol=0.05)
        model.to("cpu")
    model.to(torch.float64)
    assert scores("cpu").base_logprob.dtype == torch.float64


@pytest.mark.parametrize("kind", ["linear", "mlp", "lora"])
def test_retention_states_made_before_the_move(kind):
    model = build(kind)
    texts = [([5, 6], [7, 8, 9]), ([4], [3, 2, 1, 11]), ([], [20, 21, 22])]
    states = RetentionStates(model, None, texts)

    def loss_and_gradient():
        loss = states.loss(model, 6, seed=1)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return [x.detach().cpu() for x in (loss, *gradients)]

    wanted = loss_and_gradient()
    assert wanted[0] > 0
    with SecondDevice():
        model.to(SECOND)
        for ours, theirs in zip(loss_and_gradient(), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        model.to("cpu")
        loss_and_gradient()
    model.to(torch.float64)
    for ours, theirs in zip(loss_and_gradient(), wanted, strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=1e-5, rtol=1e-3)


def test_a_memo_filled_before_the_move():
    model, ids = build("linear"), torch.tensor([ROWS[0]])
    wanted = model.hidden_streams(ids)
    model.trunk_memo = TrunkMemo()
    model.hidden_streams(ids)
    with SecondDevice():
        model.to(SECOND)
        for ours, theirs in zip(model.hidden_streams(ids.to(SECOND)), wanted, strict=True):
            assert ours.device == SECOND
            torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-3)
        model.to("cpu")
    model.to(torch.float64)
    assert model.base_hidden(ids).dtype == torch.float64
    assert model.trunk_memo.num_bytes == model.base_hidden(ids).nbytes


def test_merged_before_the_move_and_taken_apart_after():
    model = build("lora")
    wanted = everything(model)
    model.merge_adapter()
    with SecondDevice():
        model.to(SECOND)
        model.unmerge_adapter()
        assert_same(everything(model, "meta"), wanted, atol=1e-4, rtol=1e-3)
        model.merge_adapter()
        model.to("cpu")
        model.unmerge_adapter()
    assert_same(everything(model), wanted, atol=1e-4, rtol=1e-3)


def test_adapters_of_two_devices_are_composed():
    models = [QAdapterModel.from_base(tiny_base(), AdapterConfig(rank=2), EQUAL) for _ in range(2)]
    for model in models:
        torch.nn.init.normal_(model.adapter.up.weight)
    wanted = compose(models, (0.5, 0.2))(torch.tensor([ROWS[0]])).logits
    with SecondDevice():
        models[1].to(SECOND)
        found = compose(models, (0.5, 0.2))(torch.tensor([ROWS[0]])).logits
    assert torch.equal(found, wanted)


def test_draws_follow_the_model():
    model, inputs = build("linear"), left_padded(ROWS)
    options = SHORT | {"do_sample": True, "custom_generate": fused_sample}
    with SecondDevice():
        model.to(torch.float64)
        answers = model.generate(**inputs, **options)
    assert answers.shape[0] == len(ROWS)


def test_a_head_without_its_weights_is_refused():
    base = tiny_base("phi")
    base.lm_head.to("meta")
    with pytest.raises(QAdapterError, match=r"not in memory.*device_map"):
        QAdapterModel.from_base(base)


def test_features_of_a_head_with_another_softcap():
    head = dataclasses.replace(build("linear").head, softcap=3.0)
    assert head(torch.ones(1, 32)).abs().max() <= 3.0
