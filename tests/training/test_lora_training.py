"""LoRA trained on what the base said once, on rows without padding, in the upper blocks alone: each
the same, step by step, as the padded run of the whole trunk with its base beside it.
"""

from __future__ import annotations

import itertools
import shutil

import peft
import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_base
from torch.testing import assert_close
from training_tiny import build_model, build_pairs
from transformers import AutoModelForCausalLM, Gemma3Config

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.data import PreferenceCollator, tokenize_preferences
from qadapter.training import QAdapterConfig, feature_store
from qadapter.training.feature_set import FeatureCollator, Kept, PackedCollator
from qadapter.training.features import compute_features, feature_bytes
from qadapter.training.losses import batch_loss
from qadapter.training.retention import RetentionStates

BLOCKS = 3
TRAINED = ["llama", "qwen3", "gemma3_text", "mistral", "phi", "mixtral"]
TARGETS = {"gpt_neox": ["query_key_value"], "gpt2": ["c_attn"]}
EXACT = {"phi", "gpt_neox"}
"""Their norms stay in float64; an RMSNorm computes in float32, whose last bit a sum in another
order can flip."""


def tolerance(architecture, steps=1):
    """Relative: float64 leaves orders of sums; float32 some tens of flipped last bits a layer."""
    if architecture == "gemma2":
        return 1e-4
    return 1e-9 if architecture in EXACT else steps * 1e-5


def lora_model(
    architecture="llama", objective=None, layers=None, dtype=torch.float64, **lora
) -> QAdapterModel:
    """With an adapter that does something already."""
    changes = {"sliding_window": 8} if architecture == "gemma3_text" else {}
    base = tiny_base(architecture, vocab_size=64, num_hidden_layers=BLOCKS, **changes).to(dtype)
    if architecture == "mixtral":
        base.set_experts_implementation("eager")  # the others know no float64
    config = peft.LoraConfig(
        r=2, target_modules=TARGETS.get(architecture, ["q_proj", "v_proj"]),
        layers_to_transform=layers, fan_in_fan_out=architecture == "gpt2", **lora,
    )
    model = QAdapterModel.from_base(base, config, objective)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.adapter.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.train()


@pytest.fixture(scope="module")
def dataset(tokenizer):
    """Pairs of which some share their prompt, and one of these an answer too."""
    found = tokenize_preferences(build_pairs(6), tokenizer).dataset
    rows = list(found)
    rows[2] = rows[1] | {"rejected_ids": rows[2]["rejected_ids"], "row": 2}
    return type(found).from_list(rows, features=found.features)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.adapter.parameters()))


def padded(model, dataset):
    return batch_loss(model, PreferenceCollator(0)(list(dataset)))


def check_same(model, ours, theirs, architecture="llama"):
    close = tolerance(architecture)
    for name in ("loss", "rewards"):
        assert_close(getattr(ours, name), getattr(theirs, name), rtol=close, atol=close)
    width = ours.columns.shape[1]  # the base's logits are needed for the last three
    assert_close(ours.columns, theirs.columns[:, :width], rtol=1e-5, atol=1e-5)
    for x, y in zip(
        gradients(model, ours.loss), gradients(model, theirs.loss), strict=True
    ):
        assert (x - y).norm() <= 3 * close * y.norm()


# --- the base's part of a step ----------------------------------------------------------------


OBJECTIVES = [
    ObjectiveConfig(
        alpha_0=0.6, alpha_tilde=0.9, gamma=0.95, parametrization=p, bootstrap=b, mask_alignment=m,
        length_normalization="padded",
    )
    for p, b, m in itertools.product(("policy", "q"), ("next", "current"), ("action", "state"))
]


@pytest.mark.parametrize("layers", [None, [2]], ids=["all blocks", "the upper one"])
@pytest.mark.parametrize(
    "objective", OBJECTIVES,
    ids=lambda x: f"{x.parametrization}-{x.bootstrap}-{x.mask_alignment}",
)
def test_cached_is_online_is_padded(dataset, objective, layers):
    model = lora_model(objective=objective, layers=layers)
    features = compute_features(model, dataset)
    assert Kept.of(model) == Kept(objective.parametrization == "q", True, layers and layers[0])
    assert features[0].entering is None if layers is None else features[0].entering is not None
    cached = FeatureCollator()(list(features))
    online = PackedCollator(objective.mask_alignment, 0)(list(dataset))
    for batch in (cached, online):
        check_same(model, batch_loss(model, batch), padded(model, dataset))


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "qwen3_moe"])
def test_cached_is_padded_on_every_architecture(dataset, name):
    """Gemma's softcap among them, which rules the kernel of hidden states out."""
    layers = None if name == "gpt_neox" else [1, 2]
    # transformers' own Gemma 2 gives NaN beside padding in float64
    dtype = torch.float32 if name == "gemma2" else torch.float64
    model = lora_model(name, ObjectiveConfig(alpha_0=0.6, alpha_tilde=0.9), layers, dtype)
    batch = FeatureCollator()(list(compute_features(model, dataset)))
    assert "hidden" not in batch and "base_action_logit" in batch
    check_same(model, batch_loss(model, batch), padded(model, dataset), name)


def test_16_bits_lose_nothing_by_being_kept(dataset):
    """What is kept is what a step would compute: the loss differs by roundings of the products."""
    model = lora_model(dtype=torch.bfloat16, layers=[2])
    cached = batch_loss(model, FeatureCollator()(list(compute_features(model, dataset))))
    online = batch_loss(model, PackedCollator("action", 0)(list(dataset)))
    # Sums of some 10 logits of size 5, each rounded to 8 bits.
    assert_close(cached.loss, online.loss, rtol=0, atol=10 * 5 * 2**-8)


def test_the_base_never_runs_in_a_step(dataset):
    """Nor do the blocks below the adapter: counted at the blocks."""
    model = lora_model(layers=[2])
    features = compute_features(model, dataset)
    ran = []
    for number, block in enumerate(model.base.model.layers):
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    batch_loss(model, FeatureCollator()(list(features))).loss.backward()
    assert set(ran) == {2}
    assert len(ran) == len(FeatureCollator()(list(features))["packing"].blocks)


def test_what_is_kept_is_what_was_estimated(dataset):
    for layers, objective in ((None, None), ([1, 2], None), ([2], OBJECTIVES[-1])):
        model = lora_model(objective=objective, layers=layers)
        size = compute_features(model, dataset).nbytes
        estimate = int(feature_bytes(model, dataset).sum())
        shared = estimate - size  # what two pairs of one prompt have in common is kept once
        assert 0 <= shared < estimate / 3, (layers, estimate, size)


def test_a_selection_is_a_copy(dataset):
    model = lora_model(layers=[1, 2])
    features = compute_features(model, dataset)
    chosen = features.select([4, 1, 2])
    ours = batch_loss(model, FeatureCollator()(list(chosen)))
    theirs = batch_loss(model, FeatureCollator()([features[i] for i in (4, 1, 2)]))
    assert torch.equal(ours.rewards, theirs.rewards)
    # Prompts and beginnings that pairs have in common are there once.
    assert chosen.nbytes < sum(features.select([i]).nbytes for i in (4, 1, 2))


def test_a_trunk_in_one_piece_runs_whole(make_trainer, dataset):
    """GPT-2 adds positions to what it is given as embeddings: its upper blocks can't be fed."""
    said = []
    model = lora_model("gpt2", layers=[2], dtype=torch.float32)
    trainer = make_trainer(model, dataset, say=said.append, num_train_epochs=1)
    trainer.train()
    assert Kept.of(model).first_block is None
    [line] = [x for x in said if x.startswith("the whole trunk runs at every step")]
    assert "block 2" in line


def test_features_of_another_adapter_are_refused(make_trainer, dataset):
    found = compute_features(lora_model(layers=[1, 2], dtype=torch.float32), dataset)
    make_trainer(lora_model(layers=[1, 2], dtype=torch.float32), found)
    for model, needs in (
        (lora_model(layers=[2], dtype=torch.float32), "block 2"),
        (lora_model(dtype=torch.float32), "two numbers a token, token ids: compute"),
        (lora_model(layers=[1, 2], objective=OBJECTIVES[-1], dtype=torch.float32), "hidden states"),
        (build_model(), "needs hidden states: compute"),
    ):
        with pytest.raises(QAdapterError, match=f"the train data are .* block 1, .*{needs}"):
            make_trainer(model, found)


# --- on disk ----------------------------------------------------------------------------------


def load(model, dataset, tokenizer, folder):
    return feature_store.load_or_compute(
        model, dataset, tokenizer, max_length=None, cache_dir=folder
    )


def test_the_disk_knows_what_was_kept_for_whom(dataset, tokenizer, tmp_path, monkeypatch):
    """Another depth, another part, a head adapter: each its own; another start of the LoRA: the
    same, since the base alone speaks."""
    runs = []
    compute = feature_store.compute_shard
    monkeypatch.setattr(
        feature_store, "compute_shard", lambda *x: runs.append(1) or compute(*x)
    )
    models = [
        lora_model(layers=[2]), lora_model(layers=[1, 2]), lora_model(),
        lora_model(layers=[2], objective=OBJECTIVES[-1]),
    ]
    for number, model in enumerate(models):
        load(model, dataset, tokenizer, tmp_path)
        assert len(runs) == number + 1
    assert len(list(tmp_path.iterdir())) == len(models)
    again = lora_model(layers=[2])
    torch.nn.init.normal_(next(again.adapter.parameters()))
    found = load(again, dataset, tokenizer, tmp_path)
    assert len(runs) == len(models)
    computed = compute_features(models[0], dataset)
    for ours, theirs in zip(found, computed, strict=True):
        assert all(map(torch.equal, ours.entering, theirs.entering))
        assert torch.equal(ours.base_action_logit, theirs.base_action_logit)


def test_a_damaged_cache_is_computed_again(dataset, tokenizer, tmp_path):
    model = lora_model(layers=[2])
    load(model, dataset, tokenizer, tmp_path)
    [file] = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = load(model, dataset, tokenizer, tmp_path)
    assert torch.equal(found[5].entering[1], compute_features(model, dataset)[5].entering[1])


def test_a_disk_without_room_is_told_before_anything_runs(
    dataset, make_trainer, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    model = lora_model(layers=[2], dtype=torch.float32)
    trainer = make_trainer(
        model, dataset, cache_features="disk", feature_cache_dir=str(tmp_path / "c")
    )
    model.base.register_forward_pre_hook(pytest.fail)
    with pytest.raises(QAdapterError, match=r"cache_features disk: .* take .* are free at"):
        trainer.train()


# --- whole runs -------------------------------------------------------------------------------


def trained(make_trainer, model, dataset, collator=None, **arguments):
    settings = {
        "max_steps": 3, "cache_features": "none", "train_sampling_strategy": "sequential",
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "max_grad_norm": 0.0, "optim": "sgd", "weight_decay": 0.0, "use_cpu": True,
    }
    trainer = make_trainer(model, dataset, **{**settings, **arguments})
    if collator is not None:
        trainer.data_collator.tokens = collator
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    return losses, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def check_runs(ours, theirs, our_weights, their_weights, architecture):
    close = tolerance(architecture, steps=3)
    assert ours == pytest.approx(theirs, rel=close)
    for name, weight in their_weights.items():
        assert (our_weights[name] - weight).norm() <= close * weight.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_run_is_the_padded_run(make_trainer, dataset, name, checkpointing):
    """Loss by loss and weight by weight, with and without recomputed activations; float64 leaves
    nothing but the order of sums."""
    found = []
    for layers, arguments, collator in (
        (None, {}, PreferenceCollator(0)), (None, {"cache_features": "memory"}, None),
        (None, {}, None),
    ):
        model = lora_model(name, layers=layers)
        found.append(trained(
            make_trainer, model, dataset, collator, gradient_checkpointing=checkpointing,
            **arguments,
        ))
    (losses, weights), *others = found
    assert abs(losses[-1] - losses[0]) > 1e-3  # it moved
    for other_losses, other_weights in others:
        check_runs(other_losses, losses, other_weights, weights, name)


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_of_the_upper_blocks_is_the_padded_run(make_trainer, dataset, name):
    found = []
    for checkpointing, arguments, collator in (
        (False, {}, PreferenceCollator(0)), (False, {"cache_features": "memory"}, None),
        (True, {"cache_features": "memory"}, None),
    ):
        model = lora_model(name, layers=[2])
        assert model.split_trunk.first_block == 2
        found.append(trained(
            make_trainer, model, dataset, collator, gradient_checkpointing=checkpointing,
            **arguments,
        ))
    (losses, weights), *others = found
    for other_losses, other_weights in others:
        check_runs(other_losses, losses, other_weights, weights, name)


@pytest.mark.parametrize("layers", [None, [2]], ids=["all blocks", "the upper one"])
def test_a_step_does_not_depend_on_how_it_is_split(make_trainer, dataset, layers):
    found = []
    for batch, accumulation in ((6, 1), (1, 6), (2, 3)):
        model = lora_model(layers=layers)
        found.append(trained(
            make_trainer, model, dataset, cache_features="memory",
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        ))
    (losses, weights), *others = found
    for other_losses, other_weights in others:
        check_runs(other_losses, losses, other_weights, weights, "llama")


def test_evaluation_reads_the_same_cache(make_trainer, dataset):
    model = lora_model(layers=[2], dtype=torch.float32)
    metrics = []
    for cache in ("memory", "none"):
        trainer = make_trainer(model, dataset, dataset, cache_features=cache)
        metrics.append(trainer.evaluate())
    for name in ("eval_loss", "eval_rewards/margins", "eval_chi2_loss"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5)
    assert "eval_entropy" in metrics[1] and "eval_entropy" not in metrics[0]


# --- retention --------------------------------------------------------------------------------


def test_retention_runs_the_upper_blocks_alone(dataset):
    texts = [([1, 2, 3], [4, 5, 6, 7]), ([1, 2, 3], [8, 9]), ([5], [6] * 12), ([], [9, 8, 7])]
    whole, upper = (lora_model(layers=[2]) for _ in range(2))
    whole.adapter._split = None, ""
    losses = []
    for model in (whole, upper):
        states = RetentionStates(model, None, texts)
        assert (states.entering is None) == (model is whole)
        ran = []
        hook = model.base.model.layers[0].register_forward_pre_hook(lambda *_, r=ran: r.append(1))
        loss = states.loss(model, num_states=9, seed=3)
        hook.remove()
        assert bool(ran) == (model is whole)
        losses.append((loss, gradients(model, loss)))
    assert losses[0][0] > 1e-3
    close = tolerance("llama")
    assert_close(losses[1][0], losses[0][0], rtol=close, atol=0)
    for x, y in zip(losses[1][1], losses[0][1], strict=True):
        assert (x - y).norm() <= 3 * close * y.norm()


# --- what is asked for ------------------------------------------------------------------------


def test_dropout_draws_for_every_answer(dataset, make_trainer):
    """A prompt that two answers share would be dropped alike for both."""
    for dropout, fewer in ((0.0, True), (0.1, False)):
        model = lora_model(lora_dropout=dropout, dtype=torch.float32)
        trainer = make_trainer(model, dataset, per_device_train_batch_size=6)
        batch = next(iter(trainer.get_train_dataloader()))
        assert (len(batch["packing"].ids_N) < batch["num_tokens"]) == fewer


def test_padding_is_said_once_and_why(make_trainer, dataset):
    said = []
    model = lora_model("gemma2", dtype=torch.float32)
    trainer = make_trainer(model, dataset, dataset, say=said.append, num_train_epochs=1)
    trainer.train()
    trainer.evaluate()
    [line] = [x for x in said if x.startswith("sequences are padded")]
    assert "its attention" in line
    with pytest.raises(QAdapterError, match="padding_free: its attention"):
        make_trainer(model, dataset, padding_free=True).train()


def test_padding_free_can_be_turned_off(make_trainer, dataset):
    for wanted, packed in ((None, True), (True, True), (False, False)):
        trainer = make_trainer(lora_model(dtype=torch.float32), dataset, padding_free=wanted)
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["packed"] == packed


@pytest.mark.parametrize(("given", "blocks"), [(1, [1]), ("top:2", [0, 1]), ("all", None)])
def test_upper_blocks_by_their_number(make_trainer, pairs, given, blocks):
    base = build_model().base
    trainer = make_trainer(base, pairs, adapter_kind="lora", lora_layers=given,
                           lora_target_modules=["q_proj"])
    assert trainer.model.adapter_config.layers_to_transform == blocks
    adapted = {n.split(".")[2] for n, _ in trainer.model.base.named_parameters() if "lora" in n}
    assert adapted == {str(n) for n in blocks or [0, 1]}


def test_all_linear_layers_of_upper_blocks(make_trainer, pairs):
    """PEFT takes no ``all-linear`` together with blocks."""
    trainer = make_trainer(build_model().base, pairs, adapter_kind="lora", lora_layers=1,
                           lora_target_modules="all-linear")
    adapted = {tuple(n.split(".")[2:5:2]) for n, _ in trainer.model.base.named_parameters()
               if "lora" in n}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert adapted == {("1", name) for name in names}
    with pytest.raises(QAdapterError, match=r"by a list of names or by all-linear.*_proj"):
        make_trainer(build_model().base, pairs, adapter_kind="lora", lora_layers=1,
                     lora_target_modules=r".*\.q_proj")


@pytest.mark.parametrize("given", [0, "0", "top:", "bottom:1", "top:-1", "1.5", 3, "top:3"])
def test_upper_blocks_that_are_none(make_trainer, pairs, given):
    with pytest.raises(QAdapterError, match="lora_layers"):
        make_trainer(build_model().base, pairs, adapter_kind="lora", lora_layers=given,
                     lora_target_modules=["q_proj"])


# --- what is trained where nothing was said -------------------------------------------------------


def test_by_default_a_lora_in_all_linear_layers_of_the_upper_two_blocks(make_trainer, pairs):
    lines = []
    base = tiny_base(num_hidden_layers=3, vocab_size=64)
    trainer = make_trainer(base, pairs, learning_rate=None, say=lines.append)
    config = trainer.model.adapter_config
    assert (config.layers_to_transform, config.r, config.lora_alpha) == ([1, 2], 8, 16)
    assert len(trainer.model.adapter.layers) == 2 * 7 and config.layers_pattern is None
    assert trainer.args.learning_rate == 3e-3
    assert "learning rate 0.003, for an adapter in 2 of 3 blocks" in lines
    shallow = make_trainer(tiny_base(num_hidden_layers=1, vocab_size=64), pairs)
    assert shallow.model.adapter_config.layers_to_transform == [0]


@pytest.mark.parametrize(("given", "rate"), [
    ({"lora_layers": 4}, 3e-3), ({"lora_layers": 5}, 1e-3), ({"lora_layers": 8}, 1e-3),
    ({"lora_layers": "all"}, 3e-4), ({"lora_target_modules": r".*\.[0-8]\..*q_proj"}, 3e-4),
    ({"adapter_rank": 4}, 3e-4), ({"adapter_form": "linear"}, 3e-4),
    ({"adapter_kind": "head"}, 3e-4),
    ({"lora_r": 4, "learning_rate": 0.0}, 0.0),
])
def test_the_learning_rate_is_that_of_what_is_trained(make_trainer, pairs, given, rate):
    base = tiny_base(num_hidden_layers=9, vocab_size=64)
    trainer = make_trainer(base, pairs, **{"learning_rate": None} | given)
    assert trainer.args.learning_rate == rate
    head = {"adapter_rank", "adapter_form"} & given.keys() or given.get("adapter_kind") == "head"
    assert trainer.model.adapts_trunk != bool(head)
    assert trainer.args.adapter_kind == ("head" if head else "lora")


def test_a_model_s_own_adapter_decides_its_learning_rate(make_trainer, pairs):
    trainer = make_trainer(build_model(AdapterConfig(rank=2)), pairs, learning_rate=None)
    assert trainer.args.learning_rate == 3e-4


@pytest.mark.parametrize("given", [
    {"adapter_kind": "lora", "adapter_rank": 128}, {"adapter_kind": "head", "lora_r": 8},
    {"adapter_form": "linear", "lora_dropout": 0.0}, {"adapter_rank": 4, "lora_layers": "all"},
])
def test_options_of_both_kinds_are_refused_at_their_defaults_too(given):
    with pytest.raises(QAdapterError, match="is for adapter_kind"):
        QAdapterConfig(use_cpu=True, **given)


def test_the_upper_blocks_of_a_vision_language_model_are_its_language_model_s(make_trainer, pairs):
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = tiny_base("gemma3_text", head_dim=8, num_hidden_layers=3, vocab_size=64).config
    base = AutoModelForCausalLM.from_config(Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=63, mm_tokens_per_image=4
    ))
    trainer = make_trainer(base, pairs, max_steps=1)
    layers = trainer.model.adapter.layers
    adapted = {n for n, m in trainer.model.base.named_modules() if m in layers}
    assert len(adapted) == 2 * 7
    assert {n.split(".")[3] for n in adapted if n.startswith("model.language_model.layers.")} == {
        "1", "2"
    }
    trainer.train()
