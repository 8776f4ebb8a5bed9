"""Head adapters: the policy is what its definition says, in everything ``generate`` offers."""

from __future__ import annotations

import copy
import logging

import peft
import pytest
import torch
from data.tiny import chatml
from naive import LENGTH, MODES, ROWS, NaivePolicy, left_padded, stock, uncached, with_head
from tiny_models import ARCHITECTURES, tiny_adapter, tiny_base, tiny_llama, tokenized
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
    ViTConfig,
    ViTModel,
    pipeline,
)

from qadapter import (
    AdapterConfig,
    ObjectiveConfig,
    QAdapterError,
    QAdapterModel,
    linear_q_adapter_loss,
)
from qadapter.adapters.head_adapter import HEAD_FORMS
from qadapter.data import PreferenceCollator

ALPHAS = ObjectiveConfig(alpha_0=0.5, alpha_tilde=2.0)


def head_model(architecture="llama", form="linear", objective=ALPHAS, seed=0):
    model = QAdapterModel.from_base(
        tiny_base(architecture, seed), AdapterConfig(form=form, rank=4), objective
    ).eval()
    torch.nn.init.normal_(model.adapter.up.weight, std=0.5)
    return model


def naive_of(model, **alphas):
    return NaivePolicy(
        with_head(model.base, model.adapter), copy.deepcopy(model.base), model.objective, **alphas
    )


@pytest.fixture(scope="module", params=["linear", "block"])
def pair(request):
    model = head_model(form=request.param)
    return model, naive_of(model)


# --- logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", HEAD_FORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_policy_of_every_architecture(architecture, form):
    """Caps, biases and scales included, at the trained α's, other α's, and along the dial."""
    model = head_model(architecture, form)
    inputs = left_padded(ROWS)
    real = inputs["attention_mask"].bool()
    for policy, naive_args, strength in (
        ({}, {}, 1.0),
        ({"strength": 0.3}, {}, 0.3),
        ({"strength": 1.7}, {}, 1.7),
        ({"alpha_0": 1.5, "alpha_tilde": 0.7}, {"alpha_0": 1.5, "alpha_tilde": 0.7}, 1.0),
    ):
        model.set_policy(**policy)
        ours = model(**inputs).logits.log_softmax(-1)[real]
        theirs = naive_of(model, **naive_args)(**inputs, strength=strength).logits
        # Logits here reach some 50; float32 keeps 2^-23 of that through a few dozen additions.
        torch.testing.assert_close(ours, theirs.log_softmax(-1)[real], atol=1e-4, rtol=0)
    assert (ours - model.base(**inputs).logits.log_softmax(-1)[real]).abs().max() > 0.1


def test_cap_is_not_linear():
    """What the one-product algebra would give for a capped head is another policy."""
    model = head_model("gemma2")
    model.set_policy(strength=0.5)
    hidden = model.base_hidden(torch.tensor([ROWS[0]]))
    adapted = model.adapter(hidden)
    weight_a, weight_b = model.policy.stream_weights()
    one_product = model.head(weight_a * adapted + weight_b * hidden).log_softmax(-1)
    assert (model.policy_logits(hidden, adapted).log_softmax(-1) - one_product).abs().max() > 0.01


@pytest.mark.parametrize("form", ["linear", "block"])
def test_recorded_states_are_the_bases(form):
    model, inputs = head_model("gemma2", form), left_padded(ROWS)
    ours, theirs = (m(**inputs, output_hidden_states=True) for m in (model, model.base))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))


def test_untrained_adapter_is_the_base():
    base = tiny_base()
    model = QAdapterModel.from_base(base, AdapterConfig(rank=4))
    ids = torch.tensor([ROWS[0]])
    torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)


def test_strength_zero_is_the_base_bit_for_bit(pair):
    model, _ = pair
    ids = torch.tensor([ROWS[0]])
    assert torch.equal(model(ids, strength=0.0).logits, model.base(ids).logits)


def test_strength_of_each_row(pair):
    model, _ = pair
    inputs = left_padded(ROWS)
    strengths = [0.0, 1.0, 2.5]
    together = model(**inputs, strength=torch.tensor(strengths)).logits
    for row, strength in enumerate(strengths):
        torch.testing.assert_close(
            together[row], model(**inputs, strength=strength).logits[row], atol=1e-5, rtol=1e-5
        )


def test_set_policy_without_arguments_is_the_trained_policy(pair):
    model, _ = pair
    trained = model(torch.tensor([ROWS[0]])).logits
    model.set_policy(strength=0.2)
    assert not torch.equal(model(torch.tensor([ROWS[0]])).logits, trained)
    model.set_policy()
    assert torch.equal(model(torch.tensor([ROWS[0]])).logits, trained)


@pytest.mark.parametrize(
    "arguments", [{"strength": -1.0}, {"strength": float("nan")}, {"alpha_tilde": 0.0},
                  {"alpha_0": -0.1}, {"strength": 1.0, "alpha_0": 1.0}, {"strength": 1e40},
                  {"alpha_tilde": 1e-40}, {"alpha_0": 1e20, "alpha_tilde": 1e-20}],
)
def test_policy_out_of_range(pair, arguments):
    with pytest.raises(ValueError, match=r"strength|alpha"):
        pair[0].set_policy(**arguments)


def test_logits_to_keep_and_labels(pair):
    model, _ = pair
    ids = torch.tensor([ROWS[0]])
    full = model(ids).logits
    for keep in (1, 3, torch.tensor([0, 2])):
        index = slice(-keep, None) if isinstance(keep, int) else keep
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, full[:, index])
    labels = ids.clone()
    labels[0, :2] = -100
    loss = model(ids, labels=labels).loss
    picked = full[0, 1:-1].log_softmax(-1).gather(1, ids[0, 2:, None])
    torch.testing.assert_close(loss, -picked.mean())


def test_tuple_outputs_and_hidden_states(pair):
    model, _ = pair
    ids = torch.tensor([ROWS[0]])
    outputs = model(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert torch.equal(model(ids, return_dict=False)[0], outputs.logits)


# --- generate -------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_generate_is_the_definition(pair, mode, strength):
    model, naive = pair
    inputs, settings = left_padded(ROWS), LENGTH | MODES[mode]
    ours_settings = settings | {"strength": strength}
    torch.manual_seed(3)
    ours = model.generate(**inputs, **ours_settings)
    torch.manual_seed(3)
    assert torch.equal(ours, naive.generate(**inputs, **uncached(ours_settings)))


@pytest.mark.parametrize("architecture", ["gemma2", "phi", "cohere"])
def test_generate_with_caps_biases_and_scales(architecture):
    model = head_model(architecture)
    inputs = left_padded(ROWS)
    ours = model.generate(**inputs, **LENGTH)
    assert torch.equal(ours, naive_of(model).generate(**inputs, **LENGTH))
    assert not torch.equal(ours, model.base.generate(**inputs, **LENGTH))


def test_generate_with_a_strength_for_each_row(pair):
    model, naive = pair
    inputs, strength = left_padded(ROWS), torch.tensor([0.0, 1.0, 2.0])
    for settings in (LENGTH, LENGTH | {"num_beams": 2}):
        ours = model.generate(**inputs, **settings, strength=strength)
        assert torch.equal(ours, naive.generate(**inputs, **settings, strength=strength))
    assert torch.equal(
        model.generate(**inputs, **LENGTH, strength=strength)[0],
        model.base.generate(**inputs, **LENGTH)[0],
    )


def test_rows_of_a_left_padded_batch_are_answered_as_alone(pair):
    model, _ = pair
    together = model.generate(**left_padded(ROWS), **LENGTH)
    for row, ids in enumerate(ROWS):
        alone = model.generate(torch.tensor([ids]), **LENGTH)
        assert torch.equal(alone[0, len(ids):], together[row, -LENGTH["max_new_tokens"]:])


def test_prompt_lookup_and_assistants(pair):
    model, naive = pair
    ids = torch.tensor([[5, 9, 11, 3, 5, 9, 11, 3, 5, 9]])
    stock(lambda: model.base.generate(ids, **LENGTH, prompt_lookup_num_tokens=3))
    expected = naive.generate(ids, **LENGTH)
    assert torch.equal(model.generate(ids, **LENGTH, prompt_lookup_num_tokens=3), expected)
    assistants = [copy.deepcopy(model.base), head_model(seed=1)]
    for assistant in assistants:
        assert torch.equal(model.generate(ids, **LENGTH, assistant_model=assistant), expected)
    weaker = model.generate(ids, **LENGTH, assistant_model=assistants[0], strength=0.4)
    assert torch.equal(weaker, naive.generate(ids, **LENGTH, strength=0.4))


def test_cache_carries_over_turns(pair):
    model, naive = pair
    cache, ids = DynamicCache(config=model.config), torch.tensor([ROWS[0]])
    for turn in ([], [40, 41, 42]):
        ids = torch.cat([ids, torch.tensor([turn], dtype=torch.int64)], dim=1)
        ours = model.generate(ids, **LENGTH, past_key_values=cache)
        assert torch.equal(ours, naive.generate(ids, **LENGTH))
        ids = ours


def test_streamer_and_pipeline(capsys, caplog):
    model, tokenizer = tiny_adapter(trained=True).eval(), chatml()
    inputs = tokenizer("hot red", return_tensors="pt")
    model.generate(**inputs, **LENGTH, streamer=TextStreamer(tokenizer, skip_prompt=True))
    ours = model.generate(**inputs, **LENGTH)[0, inputs["input_ids"].shape[1]:]
    assert capsys.readouterr().out.strip() == tokenizer.decode(ours).strip()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    finally:
        logger.removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
    answer = pipe("hot red", **LENGTH, return_full_text=False)[0]["generated_text"]
    assert answer.strip() == tokenizer.decode(ours, skip_special_tokens=True).strip()


# --- rewards and training -------------------------------------------------------------------


@pytest.mark.parametrize("objective", [ObjectiveConfig(), ObjectiveConfig.authors()])
def test_token_rewards_are_the_objectives(objective):
    model = tiny_adapter(trained=True, objective=objective).eval()
    batch = PreferenceCollator(pad_token_id=2)(list(tokenized(4)))
    ids, mask = batch["input_ids"], batch["completion_mask"]
    h_a, h_b = model.hidden_streams(ids, batch["attention_mask"])
    expected = linear_q_adapter_loss(h_a, h_b, model.head.weight, ids, mask, objective)
    rewards = model.token_rewards(ids, mask, batch["attention_mask"])
    torch.testing.assert_close(rewards, expected.token_rewards.detach(), atol=1e-5, rtol=1e-5)
    odd = model.token_rewards(ids[:3], mask[:3], batch["attention_mask"][:3])
    torch.testing.assert_close(odd, rewards[:3], atol=1e-5, rtol=1e-5)


def test_only_the_adapter_trains_and_the_base_stays_in_evaluation_mode(capsys):
    model = head_model().train()
    assert model.training and not any(m.training for m in model.base.modules())
    h_a, h_b = model.hidden_streams(torch.tensor([ROWS[0]]))
    assert h_a.requires_grad and not h_b.requires_grad
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"adapter.down.weight", "adapter.up.weight"}
    model.print_trainable_parameters()
    assert f"trainable params: {2 * 4 * 32:,} " in capsys.readouterr().out


# --- what is refused ------------------------------------------------------------------------


def test_encoder_decoder_is_refused(tmp_path):
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
                 decoder_start_token_id=0)
    )
    with pytest.raises(QAdapterError, match="encoder-decoder"):
        QAdapterModel.from_base(t5)
    t5.save_pretrained(tmp_path)
    with pytest.raises(QAdapterError, match="encoder-decoder"):
        QAdapterModel.from_base(tmp_path)


def test_other_ways_to_make_logits_are_refused():
    class Squared(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    base = tiny_base("mistral")
    base.lm_head = Squared(32, 96, bias=False)
    with pytest.raises(QAdapterError, match=r"MistralForCausalLM turns hidden states into logits"):
        QAdapterModel.from_base(base)


def test_bad_arguments_of_from_base():
    with pytest.raises(QAdapterError, match="AdapterConfig"):
        QAdapterModel.from_base(tiny_base(), adapter="linear")
    with pytest.raises(QAdapterError, match="dtype: only for a base given by name"):
        QAdapterModel.from_base(tiny_base(), dtype=torch.float32)
    for arguments in ({"rank": 0}, {"form": "square"}, {"kind": "lora"}):
        with pytest.raises(ValueError, match=r"rank|form|kind"):
            AdapterConfig(**arguments)


@pytest.mark.parametrize("adapter", [
    AdapterConfig(rank=4),
    peft.LoraConfig(r=4, target_modules=r"model\.language_model\..*\b(q_proj|v_proj)"),
], ids=["head", "lora"])
def test_the_text_of_a_vision_language_model(adapter):
    """Its language model is customised; images are refused by name."""
    text = tiny_base(vocab_size=96).config
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=8, projection_dim=32,
    )
    base = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    ).eval()
    model = QAdapterModel.from_base(copy.deepcopy(base), adapter, ALPHAS).eval()
    ids = torch.tensor([ROWS[0]])
    expected = base(ids).logits.log_softmax(-1)  # of an untrained adapter, whatever the strength
    torch.testing.assert_close(model(ids).logits.log_softmax(-1), expected, atol=1e-5, rtol=0)
    settings = LENGTH | {"strength": 0.4}
    assert torch.equal(model.generate(ids, **settings), base.generate(ids, **LENGTH))
    with pytest.raises(ValueError, match="pixel_values"):
        model.generate(ids, **settings, pixel_values=torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_a_lora_that_reaches_a_vision_tower_is_refused_with_the_way_out(targets):
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=8, projection_dim=32,
    )
    base = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=tiny_base().config, image_token_index=95
    )).eval()
    config = peft.LoraConfig(r=2, target_modules=targets)
    with pytest.raises(QAdapterError, match=r"no text runs .*model.vision_tower") as refused:
        QAdapterModel.from_base(base, config)
    assert not hasattr(base, "peft_config")
    way = str(refused.value).partition("target_modules=r'")[2].partition("'")[0]
    model = QAdapterModel.from_base(base, peft.LoraConfig(r=2, target_modules=way))
    ids = torch.tensor([ROWS[0]])
    model.hidden_streams(ids)[0].sum().backward()
    assert all(p.grad is not None for p in model.adapter.parameters())


STATES = {
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8,
              "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
              "num_key_value_heads": 2},
}


@pytest.mark.parametrize("architecture", STATES)
@pytest.mark.parametrize("targets", [None, r".*(q_proj|in_proj|feed_forward\.w1|key)"])
def test_models_with_a_state_generate_as_their_bases_or_are_refused(architecture, targets):
    base = tiny_base(architecture, **STATES[architecture])
    adapter = targets and peft.LoraConfig(r=2, target_modules=targets)
    inputs = left_padded(ROWS)
    wanted = base.generate(**inputs, **LENGTH)
    try:
        model = QAdapterModel.from_base(base, adapter, ALPHAS).eval()
    except QAdapterError as error:
        assert architecture not in ("lfm2", "bamba") or "can't" in str(error)
        assert not hasattr(base, "peft_config")
        return
    torch.manual_seed(0)
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert torch.equal(model.generate(**inputs, **LENGTH, strength=0.0), wanted)
    both = LENGTH | {"strength": 0.4}
    ours, uncached = (model.generate(**inputs, **both, use_cache=x) for x in (True, False))
    assert torch.equal(ours, uncached)


def test_models_without_a_language_model_head_are_refused():
    vision = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                       num_attention_heads=4, image_size=16, patch_size=8)
    with pytest.raises(QAdapterError, match="ViTModel has no lm_head"):
        QAdapterModel.from_base(ViTModel(vision))


def test_embeddings_resized_before_count_and_after_are_refused():
    """A vocabulary padded for speed: its padding is part of the policy like any column."""
    base = tiny_llama()
    base.resize_token_embeddings(601, pad_to_multiple_of=64)
    model = QAdapterModel.from_base(base, AdapterConfig(rank=4)).eval()
    torch.nn.init.normal_(model.adapter.up.weight, std=0.5)
    ids = torch.tensor([ROWS[0]])
    ours = model(ids).logits
    assert ours.shape[-1] == 640
    theirs = naive_of(model)(ids).logits
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-4, rtol=0)
    with pytest.raises(QAdapterError, match="before from_base"):
        model.resize_token_embeddings(700)
