"""Exports: other libraries decode with them what we decode, and what can't be exact is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil

import peft
import pytest
import torch
from data.tiny import chatml
from naive import NaivePolicy, with_head
from safetensors.torch import load_file, save_file
from tiny_models import cli, save_tiny, tiny_base, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.adapters.head_adapter import LinearHeadAdapter
from qadapter.exporting import stock, verification
from qadapter.exporting.approximation import fit_linear
from qadapter.exporting.export import export
from qadapter.exporting.head import LinearPolicy
from qadapter.trunk import base_dtype
from qadapter.trunk.lm_head import LanguageModelHead

Q = ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.7, parametrization="q")
IDS = torch.tensor([[5, 9, 11, 3, 20, 7, 33, 2, 90]])
LINEAR = ("llama", "qwen3", "gemma", "mistral", "phi", "gpt_neox", "granite", "cohere")


@pytest.fixture
def here(monkeypatch):
    """The stock side of the check in this process: starting another takes seconds."""
    monkeypatch.setattr(
        verification, "ask_stock", lambda request, scratch: stock.answer(request)
    )


def head_model(architecture="llama", objective=Q, form="linear", seed=0, **changes):
    base = tiny_base(architecture, seed, **changes)
    model = QAdapterModel.from_base(base, AdapterConfig(form=form, rank=4), objective).eval()
    torch.nn.init.normal_(model.adapter.up.weight, std=0.5)
    return model


def lora_model(objective=None, dtype=torch.float32, base=None, **changes):
    config = peft.LoraConfig(**{
        "r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes
    })
    model = QAdapterModel.from_base((base or tiny_llama()).to(dtype), config, objective).eval()
    torch.manual_seed(1)
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def by_definition(model):
    """log π̃ at IDS, from two whole models."""
    naive = NaivePolicy(with_head(model.base, model.adapter), model.base, model.objective)
    return naive(IDS, strength=model.policy.strength).logits.log_softmax(-1)


def stock_logits(folder, base=None):
    if base is None:
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits.detach()
    return peft.PeftModel.from_pretrained(base, str(folder))(IDS).logits.detach()


# --- head adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", LINEAR)
def test_merged_checkpoint_of_every_architecture(architecture, here, tmp_path):
    model = head_model(architecture)
    model.set_policy(strength=1.4)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    expected = by_definition(model)
    report = export(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model.base)
    # float32 against float32: sums of some tens of products of size one.
    torch.testing.assert_close(
        loaded(IDS).logits.log_softmax(-1), expected, atol=2e-4, rtol=0
    )
    assert report.check.top_tokens == report.check.tokens == 96
    assert report.check.same_answers == report.check.prompts == 6
    assert report.temperature == 1.0
    assert not loaded.config.tie_word_embeddings
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight.data_ptr() != embedding.weight.data_ptr()
    assert torch.equal(embedding.weight, model.base.get_input_embeddings().weight)
    # The base is as it was, ties included.
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    assert model.base.config.tie_word_embeddings == (architecture in ("llama", "gemma", "cohere"))


@pytest.mark.parametrize("architecture", ["llama", "phi", "granite"])
def test_lm_head_lora_is_a_plain_peft_adapter(architecture, here, tmp_path):
    model = head_model(architecture)
    model.generation_config.temperature = 0.8
    model.set_policy(strength=1.4)
    expected = by_definition(model)
    report = export(model, tmp_path / "out", "lm_head_lora")
    # κ/α̃ = p_a + p_b is not 1 here: the policy is this LoRA at another temperature.
    factor = sum(model.policy.stream_weights())
    assert abs(factor - 1) > 0.1 and report.temperature == 0.8 / factor
    stored = GenerationConfig.from_pretrained(tmp_path / "out")
    assert stored.temperature == report.temperature
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert config.r == config.lora_alpha == 4 and config.task_type == "CAUSAL_LM"
    names = set(load_file(tmp_path / "out/adapter_model.safetensors"))
    name = "lm_head" if architecture != "gpt_neox" else "embed_out"
    assert names == {f"base_model.model.{name}.lora_{x}.weight" for x in "AB"}
    logits = stock_logits(tmp_path / "out", tiny_base(architecture))
    torch.testing.assert_close(
        (logits * factor).log_softmax(-1), expected, atol=2e-4, rtol=0
    )
    assert f"sample at temperature {report.temperature:.6g}" in card(tmp_path / "out")


def card(folder) -> str:
    return (folder / "README.md").read_text()


def test_trained_policy_parametrization_needs_no_temperature(here, tmp_path):
    model = head_model(objective=ObjectiveConfig(alpha_0=0.5, alpha_tilde=2.0))
    report = export(model, tmp_path / "out", "lm_head_lora")
    assert report.temperature == 1.0
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature in (None, 1.0)


def test_16_bit_head_is_rounded_once_and_checked_to_that(here, tmp_path):
    model = head_model(objective=ObjectiveConfig(), hidden_size=64)
    model.base.to(torch.bfloat16)
    model = QAdapterModel(
        model.base, model.adapter, model.adapter_config, model.objective, model.base_identity
    )
    report = export(model, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"]
    weight = model.head.weight.double()
    exact = weight + weight @ model.adapter.up.weight.double() @ model.adapter.down.weight.double()
    assert stored.dtype == torch.bfloat16 and torch.equal(stored, exact.bfloat16())
    assert 0 < report.check.error_to_tolerance < 1
    assert report.check.kl_per_token < 1e-2
    assert report.check.tokens == 96 and report.check.dtype == "bfloat16"


def test_the_tolerance_is_that_of_rounding(tmp_path):
    """It holds for a rounded head and fails for a policy that is 5% off."""
    policy = linear_policy(seed=0)
    hidden = torch.randn(64, 48).bfloat16()
    exact, tolerance = policy.exact_logits(hidden, torch.bfloat16)
    rounded = (hidden.float() @ policy.merged_weight().float().T).bfloat16().double()
    assert ((rounded - exact).abs() <= tolerance).all()
    off = policy._replace(adapter_weight=1.05 * policy.adapter_weight).exact_logits(
        hidden, torch.bfloat16
    )[0]
    assert ((off - exact).abs() > tolerance).any()
    assert (tolerance < 0.2 * exact.abs().max()).all()


def linear_policy(seed):
    torch.manual_seed(seed)
    base = tiny_base(vocab_size=200, hidden_size=48).bfloat16()
    torch.nn.init.normal_(base.get_output_embeddings().weight)
    return LinearPolicy(LanguageModelHead(base), torch.randn(4, 48), torch.randn(48, 4), 1.3, -0.2)


def test_sharded_like_the_base(here, tmp_path):
    tiny_base("qwen3", hidden_size=64, tie_word_embeddings=True).save_pretrained(
        tmp_path / "base", max_shard_size="60KB"
    )
    model = QAdapterModel.from_base(tmp_path / "base", AdapterConfig(rank=2), Q)
    export(model, tmp_path / "out")
    shards = {folder: list((tmp_path / folder).glob("*.safetensors")) for folder in ("base", "out")}
    # The untied head (96 × 64 float32 = 24 KB) is all that comes on top.
    assert 2 < len(shards["base"]) <= len(shards["out"]) <= len(shards["base"]) + 1
    largest = max(shard.stat().st_size for shard in shards["base"])
    assert all(shard.stat().st_size <= largest + 4096 for shard in shards["out"])
    export(model, tmp_path / "one", max_shard_size="1GB")
    assert (tmp_path / "one/model.safetensors").is_file()


def test_resized_embeddings_and_padded_vocabulary(here, tmp_path):
    base = tiny_base("llama")
    base.resize_token_embeddings(100, pad_to_multiple_of=64)
    model = QAdapterModel.from_base(base, AdapterConfig(rank=2), Q)
    torch.nn.init.normal_(model.adapter.up.weight, std=0.5)
    expected = by_definition(model)
    export(model, tmp_path / "out")
    assert expected.shape[-1] == 128
    torch.testing.assert_close(
        stock_logits(tmp_path / "out").log_softmax(-1), expected, atol=2e-4, rtol=0
    )


def test_capped_head_is_exact_where_one_stream_is_all(here, tmp_path):
    model = head_model("gemma2", objective=ObjectiveConfig())
    expected = by_definition(model)
    for form in ("merged", "lm_head_lora"):
        export(model, tmp_path / form, form)
    torch.testing.assert_close(
        stock_logits(tmp_path / "merged").log_softmax(-1), expected, atol=2e-4, rtol=0
    )
    model.set_policy(strength=0.5)
    for form in ("merged", "lm_head_lora"):
        with pytest.raises(QAdapterError, match=r"softcap 5.*two capped streams"):
            export(model, tmp_path / "no", form)


# --- LoRA in the trunk --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_trunk(dtype, here, tmp_path):
    model = lora_model(dtype=dtype)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    expected = model(IDS).logits
    report = export(model, tmp_path / "out")
    found = stock_logits(tmp_path / "out")
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    assert torch.equal(model(IDS).logits, expected)
    with model.adapter.off():
        base = model.base(IDS).logits
    distance, effect = (found - expected).abs().max(), (base - expected).abs().max()
    assert distance < (1e-4 if dtype == torch.float32 else 0.2) * effect
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert report.check.error_to_tolerance < 1


def test_merged_trunk_with_adapted_embeddings_and_scaled_head_is_untied(here, tmp_path):
    objective = ObjectiveConfig(alpha_0=0.0, alpha_tilde=0.5, parametrization="q")
    model = lora_model(objective, target_modules=["q_proj", "embed_tokens"], use_rslora=True)
    expected = model(IDS).logits
    export(model, tmp_path / "out")
    torch.testing.assert_close(stock_logits(tmp_path / "out"), expected, atol=2e-3, rtol=0)
    weights = load_file(tmp_path / "out/model.safetensors")
    torch.testing.assert_close(weights["lm_head.weight"], 2 * model.head.weight)
    assert not torch.equal(weights["model.embed_tokens.weight"], model.head.weight)


def test_trunk_adapter_as_peft_writes_it(here, tmp_path):
    objective = ObjectiveConfig(alpha_0=0.0, alpha_tilde=0.5, parametrization="q")
    model = lora_model(objective, use_dora=True)
    report = export(model, tmp_path / "out", "peft")
    assert report.temperature == 0.5
    assert not (tmp_path / "out/qadapter_config.json").exists()
    torch.testing.assert_close(
        2 * stock_logits(tmp_path / "out", tiny_llama()), model(IDS).logits, atol=1e-3, rtol=0
    )


def test_two_streams_are_refused_with_the_reason(tmp_path):
    model = lora_model(Q)
    for form in ("merged", "peft"):
        with pytest.raises(QAdapterError, match="two streams through the trunk"):
            model.export(tmp_path / "out", form)
    model = lora_model()
    model.set_policy(strength=0.5)
    with pytest.raises(QAdapterError, match=r"weights 0.5 adapted, 0.5 base"):
        model.export(tmp_path / "out")
    with pytest.raises(QAdapterError, match="is for head adapters"):
        model.export(tmp_path / "out", "lm_head_lora")
    assert not (tmp_path / "out").exists()


# --- approximation ------------------------------------------------------------------------------


def texts(count=12, length=40):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 96, (count, length), generator=generator).tolist()


def test_approximation_says_how_near_it_is(here, tmp_path):
    model = head_model(form="mlp")
    with pytest.raises(QAdapterError, match="not linear"):
        export(model, tmp_path / "out")
    report = export(model, tmp_path / "out", approximate=True, texts=texts())
    found = report.approximation
    # Independently: the export's own logits against the model's, on the texts held out.
    held_out = torch.tensor(texts()[::4])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        exact, near = (m(held_out).logits.log_softmax(-1) for m in (model, loaded))
    divergence = (exact.exp() * (exact - near)).sum(-1).mean()
    assert found.kl_policy_export == pytest.approx(float(divergence), rel=1e-3)
    same = (exact.argmax(-1) == near.argmax(-1)).float().mean()
    assert found.top1_agreement == pytest.approx(float(same), abs=0.01)
    assert 0 < found.kl_policy_export < 0.7 * found.kl_policy_base
    assert (found.fitted_states, found.held_out_states) == (9 * 40, 3 * 40)
    assert f"| {found.kl_policy_export:.3g} nats a token |" in card(tmp_path / "out")


def test_approximation_of_a_linear_adapter_finds_it(here):
    model = head_model()
    exact = model.adapter.up.weight @ model.adapter.down.weight
    for rank in (None, 4):
        policy, found = fit_linear(model, texts(40), rank)
        # The ridge holds back by a thousandth.
        torch.testing.assert_close(
            (policy.up_DR @ policy.down_RD).float(), exact, atol=0.03, rtol=0.03
        )
        assert found.kl_policy_export < 1e-3 < 0.1 < found.kl_policy_base
    assert fit_linear(model, texts(40), 1)[1].kl_policy_export > 10 * found.kl_policy_export


def test_low_rank_approximation_as_lora(here, tmp_path):
    model = head_model(form="mlp")
    report = export(model, tmp_path / "out", "lm_head_lora", approximate=True, texts=texts())
    full = export(model, tmp_path / "full", approximate=True, texts=texts())
    assert report.approximation.rank == 4 and full.approximation.rank is None
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "out")).r == 4
    assert report.approximation.kl_policy_export < report.approximation.kl_policy_base


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ({"form": "onnx"}, "form must be"),
    ({"form": "peft"}, "LoRA in the trunk"),
    ({"approximate": True, "texts": [[1, 2]] * 9}, "exported exactly"),
    ({"texts": [[1, 2]]}, "is for approximate=True"),
])
def test_refused_options(options, message, tmp_path):
    with pytest.raises(QAdapterError, match=message):
        export(head_model(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_refused_policies(tmp_path):
    model = head_model()
    model.set_policy(strength=0)
    with pytest.raises(QAdapterError, match="nothing to export"):
        export(model, tmp_path / "out")
    # p_a + p_b = w/α̃ + wα₀/α̃ + 1 − w; with α₀ = 0 and α̃ = 2 it is 0 at w = 2.
    model = head_model(objective=ObjectiveConfig(alpha_0=0.0, alpha_tilde=2.0, parametrization="q"))
    model.set_policy(strength=2.0)
    with pytest.raises(QAdapterError, match="at any temperature"):
        export(model, tmp_path / "out", "lm_head_lora")
    mlp = head_model(form="mlp")
    with pytest.raises(QAdapterError, match="approximate=True needs texts"):
        export(mlp, tmp_path / "out", approximate=True)
    with pytest.raises(QAdapterError, match="two texts"):
        export(mlp, tmp_path / "out", approximate=True, texts=[[1, 2]])
    assert list(tmp_path.iterdir()) == []


def test_an_adapted_output_layer_is_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    base = peft.get_peft_model(tiny_base("qwen3"), config).get_base_model()
    with pytest.raises(QAdapterError, match=r"no plain linear|PEFT layers|lm_head"):
        model = QAdapterModel.from_base(base, AdapterConfig(rank=2), Q)
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_sum_of_weights_of_zero_still_merges(here, tmp_path):
    model = head_model(objective=ObjectiveConfig(alpha_0=0.0, alpha_tilde=2.0, parametrization="q"))
    model.set_policy(strength=2.0)
    expected = by_definition(model)
    export(model, tmp_path / "out")
    torch.testing.assert_close(
        stock_logits(tmp_path / "out").log_softmax(-1), expected, atol=2e-4, rtol=0
    )


def test_folders_in_use_are_left_alone(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(QAdapterError, match="not empty"):
        export(head_model(), tmp_path / "used")
    with pytest.raises(QAdapterError, match="is a file"):
        export(head_model(), tmp_path / "file")
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["mine.txt"]


# --- the check ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage, message", [
    ("weight", "the logit of token id"), ("key", "can't load|do not fit"),
    ("temperature", "temperature"), ("tokenizer", "reads"),
])
def test_a_wrong_export_is_not_kept(damage, message, tmp_path, monkeypatch):
    def tampered(request, scratch):
        folder = scratch / "export"
        if damage in ("weight", "key"):
            weights = load_file(folder / "model.safetensors")
            if damage == "weight":
                weights["lm_head.weight"][7] *= 1.001
            else:
                weights["other.weight"] = weights.pop("lm_head.weight")
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        elif damage == "temperature":
            (folder / "generation_config.json").write_text('{"temperature": 0.5}')
        else:
            other = json.loads((folder / "tokenizer.json").read_text())
            other["model"]["merges"] = []
            (folder / "tokenizer.json").write_text(json.dumps(other))
        try:
            return stock.answer(request)
        except SystemExit as end:  # what ask_stock makes of another process's end
            raise QAdapterError(f"stock libraries can't load it ({end})") from end

    monkeypatch.setattr(verification, "ask_stock", tampered)
    with pytest.raises(QAdapterError, match=message):
        export(head_model(vocab_size=600), tmp_path / "out", tokenizer=chatml())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(here, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(verification, "ask_stock", full)
    with pytest.raises(QAdapterError, match="No space left"):
        export(head_model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_other_process_must_be_free_of_us(tmp_path):
    head_model().base.save_pretrained(tmp_path / "model")
    request = {
        "export": str(tmp_path / "model"), "base": None, "revision": None, "dtype": "float32",
        "device": "cpu", "attn_implementation": "sdpa", "threads": torch.get_num_threads(),
        "prompts": [[5, 6]], "texts": None, "max_new_tokens": 2,
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    with pytest.raises(SystemExit, match="free of"):
        stock.main(tmp_path / "request.json", tmp_path / "answer.safetensors")
    assert not (tmp_path / "answer.safetensors").exists()


# --- the command, with the other process --------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base with a tokenizer, and an adapter, on disk."""
    folder = tmp_path_factory.mktemp("export")
    save_tiny(folder / "model")
    model = QAdapterModel.from_base(folder / "model", AdapterConfig(rank=4), Q)
    torch.nn.init.normal_(model.adapter.up.weight, std=0.2)
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.slow
def test_an_export_has_the_checkpoints_type_whatever_this_cpu_multiplies_faster(
    saved, tmp_path, monkeypatch, capsys
):
    for name in ("model", "adapter"):
        shutil.copytree(saved / name, tmp_path / name)
    halved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    halved.save_pretrained(tmp_path / "model")
    rates = {torch.float32: 9e9, torch.bfloat16: 1e9}
    monkeypatch.setattr(base_dtype, "rates_of_width", lambda width: rates)
    shared = ("--base_model_name_or_path", tmp_path / "model", "--output_dir")
    assert cli("export", tmp_path / "adapter", *shared, tmp_path / "out") == 0
    assert "in bfloat16" in capsys.readouterr().out
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_command_exports_and_checks_in_another_process(saved, tmp_path, capsys):
    assert cli("export", saved / "adapter", "--output_dir", tmp_path / "out",
               "--strength", 0.5) == 0
    shown = capsys.readouterr().out
    assert "96 of 96" in shown and "6 of 6" in shown
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    original = AutoTokenizer.from_pretrained(saved / "model")
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer("Is it hot?") == original("Is it hot?")
    model = QAdapterModel.from_pretrained(saved / "adapter")
    assert isinstance(model.adapter, LinearHeadAdapter)
    model.set_policy(strength=0.5)
    torch.testing.assert_close(
        stock_logits(tmp_path / "out").log_softmax(-1), by_definition(model), atol=2e-4, rtol=0
    )
    text = card(tmp_path / "out")
    assert "| tokens that are the policy's most likely | 96 of 96 |" in text
    assert "| strength | 0.5 |" in text and "transformers (in the check)" in text


@pytest.mark.slow
def test_the_other_process_can_refuse(tmp_path):
    request = {"export": str(tmp_path), "threads": 1, "base": None, "revision": None,
               "dtype": "float32", "attn_implementation": "sdpa", "device": "cpu"}
    with pytest.raises(QAdapterError, match="stock libraries can't load it"):
        verification.ask_stock(request, tmp_path)


@pytest.mark.parametrize("flags, message", [
    (("--form", "onnx"), "none of merged, lm_head_lora, peft, gguf"),
    (("--approximate", "--texts_file", "x.txt"), "not needed: a linear adapter"),
    (("--texts_file", "x.txt"), "--texts_file FILE is for --approximate"),
    (("--strength", "0"), "nothing to export"),
    (("--strength", "-1"), "strength must be"),
    (("--form", "peft"), "--form lm_head_lora"),
])
def test_command_errors_are_one_line(flags, message, saved, tmp_path, capsys, monkeypatch):
    assert refused(saved / "adapter", tmp_path, flags, capsys, monkeypatch, message)


def refused(adapter, tmp_path, flags, capsys, monkeypatch, message) -> bool:
    """Whether an export ends with this line, and no base was loaded for it."""
    def load(*args, **kwargs):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("qadapter.commands.loading.QAdapterModel.from_pretrained", load)
    assert cli("export", adapter, "--output_dir", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1
    return not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    ((), "--approximate with --texts_file FILE"),
    (("--form", "lm_head_lora"), "--approximate with --texts_file FILE"),
    (("--approximate",), "--approximate needs --texts_file FILE"),
    (("--form", "peft", "--approximate"), "--form peft is for LoRA"),
])
def test_a_form_that_an_mlp_head_has_not_is_refused_before_the_base_is_loaded(
    flags, message, tmp_path, capsys, monkeypatch
):
    head_model(form="mlp").save_pretrained(tmp_path / "run")
    assert refused(tmp_path / "run", tmp_path, flags, capsys, monkeypatch, message)


@pytest.mark.parametrize("flags, message", [
    (("--form", "lm_head_lora"), "takes --form merged or --form peft"),
    (("--approximate", "--texts_file", "x.txt"), "--approximate is for head adapters"),
    (("--strength", "0.5"), "at strength 1 (--strength 1)"),
])
def test_what_a_lora_can_not_be_is_refused_before_the_base_is_loaded(
    flags, message, tmp_path, capsys, monkeypatch
):
    lora_model().save_pretrained(tmp_path / "run")
    assert refused(tmp_path / "run", tmp_path, flags, capsys, monkeypatch, message)


def test_a_place_that_is_taken_is_refused_before_the_base_is_loaded(
    saved, tmp_path, capsys, monkeypatch
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("kept")
    assert not refused(saved / "adapter", tmp_path, (), capsys, monkeypatch, "is not empty")


def test_command_needs_an_adapter_and_a_folder(saved, tmp_path, capsys):
    assert cli("export", saved / "adapter") == 2
    assert "export needs --output_dir" in capsys.readouterr().err
    assert cli("export", "--output_dir", tmp_path / "out") == 2
    assert "export needs --model_name_or_path" in capsys.readouterr().err
    assert cli("export", saved / "model", "--output_dir", tmp_path / "out") == 2
    assert "plain model already" in capsys.readouterr().err
    assert cli("export", saved / "adapter", "--model_name_or_path", "x") == 2
    assert "given twice" in capsys.readouterr().err


# --- for whoever gets the folder ----------------------------------------------------------------


def everything(folder) -> str:
    """All text files of a folder."""
    return "\n".join(
        path.read_text() for path in sorted(folder.rglob("*")) if path.suffix != ".safetensors"
    )


@pytest.mark.parametrize("form, given", [
    ("merged", "absolute"), ("lm_head_lora", "absolute"), ("peft", "absolute"),
    ("peft", "relative"), ("lm_head_lora", "the hub's cache"),
])
def test_a_base_is_named_for_others(form, given, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = {
        "absolute": tmp_path / "models/some-base", "relative": "models/some-base",
        "the hub's cache": tmp_path / "hub/models--team--some-base/snapshots/abc123",
    }[given]
    save_tiny(place)
    if form == "peft":
        model = QAdapterModel.from_base(place, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    else:
        model = QAdapterModel.from_base(place, AdapterConfig(rank=2), Q)
    export(model, "out", form)
    name = {"absolute": "some-base", "relative": "models/some-base"}.get(given, "team/some-base")
    assert str(tmp_path) not in everything(tmp_path / "out")
    assert f"`{name}` customised by" in card(tmp_path / "out")
    on_hub = given == "the hub's cache"
    assert ("base_model: team/some-base" in card(tmp_path / "out")) == on_hub
    if form != "merged":
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name
        assert config["revision"] == ("abc123" if on_hub else None)
        assert ("has no name on a hub" in card(tmp_path / "out")) != on_hub
    if given == "relative" and form == "peft":  # where the name is the place, PEFT finds it
        assert peft.AutoPeftModelForCausalLM.from_pretrained("out") is not None


def test_a_tokenizers_pieces_come_along(here, tmp_path):
    save_tiny(tmp_path / "base")
    (tmp_path / "base/tokenizer.model").write_bytes(b"pieces")
    model = QAdapterModel.from_base(tmp_path / "base", AdapterConfig(rank=2), Q)
    export(model, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"pieces"
    assert "tokenizer.model" in json.loads((tmp_path / "out/manifest.json").read_text())["files"]
    export(model, tmp_path / "other", tokenizer=chatml())
    assert not (tmp_path / "other/tokenizer.model").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_modes_of_the_umask(umask, here, tmp_path):
    before = os.umask(umask)
    try:
        export(head_model(), tmp_path / "merged")
        export(head_model(), tmp_path / "lora", "lm_head_lora")
        export(lora_model(), tmp_path / "peft", "peft")
    finally:
        os.umask(before)
    for folder in ("merged", "lora", "peft"):
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / folder).iterdir()}
        assert set(modes.values()) == {0o666 & ~umask}, modes


def test_an_adapters_configuration_has_the_fields_of_every_peft(here, tmp_path):
    model = lora_model(use_dora=True, init_lora_weights="gaussian")
    export(model, tmp_path / "out", "peft")
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert set(fields) == {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r",
        "lora_alpha", "lora_dropout", "target_modules", "bias", "fan_in_fan_out",
        "modules_to_save", "use_dora",
    }
    found, given = peft.PeftConfig.from_pretrained(str(tmp_path / "out")), model.adapter_config
    changed = {name for name, x in given.to_dict().items() if found.to_dict()[name] != x}
    assert changed <= {"inference_mode", "base_model_name_or_path", "revision", "peft_version",
                       "init_lora_weights"}
    assert "not by vLLM" in card(tmp_path / "out") and "DoRA" in card(tmp_path / "out")


@pytest.mark.parametrize("changes", [
    {"use_rslora": True, "lora_alpha": 6},
    {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"layers.1.self_attn.v_proj": 24}},
])
def test_a_lora_whose_layers_differ_has_one_scale_for_all(changes, here, tmp_path):
    model = lora_model(**changes)
    expected = model(IDS).logits
    export(model, tmp_path / "out", "peft")
    torch.testing.assert_close(stock_logits(tmp_path / "out", tiny_llama()), expected)
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert fields["r"] == fields["lora_alpha"]
    assert not {"use_rslora", "rank_pattern", "alpha_pattern"} & set(fields)
    shapes = [x.shape for x in load_file(tmp_path / "out/adapter_model.safetensors").values()]
    assert all(fields["r"] in shape for shape in shapes)
    assert "--max-lora-rank 8" in card(tmp_path / "out")


def test_the_card_has_the_commands_of_its_own_folder(here, tmp_path):
    export(head_model("llama"), tmp_path / "my-model")
    text = card(tmp_path / "my-model")
    assert "vllm serve my-model --dtype float32" in text
    assert "convert_hf_to_gguf.py my-model" in text and "FROM ./my-model" in text
    export(head_model("gemma"), tmp_path / "gemma")
    assert "not by llama.cpp" in card(tmp_path / "gemma")
    export(head_model("llama"), tmp_path / "lora", "lm_head_lora")
    assert "not by llama.cpp" in card(tmp_path / "lora")  # tied
    export(head_model("qwen3"), tmp_path / "untied", "lm_head_lora")
    assert "convert_lora_to_gguf.py untied" in card(tmp_path / "untied")
