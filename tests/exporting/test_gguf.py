"""GGUF files: they hold the policy, say what a type loses, and what can't be written is refused."""

from __future__ import annotations

import importlib.util
import json

import gguf
import numpy as np
import peft
import pytest
import torch
from data.tiny import chatml
from safetensors.torch import load_file, save_file
from tiny_models import cli, save_tiny, tiny_base
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qadapter import AdapterConfig, QAdapterError, QAdapterModel
from qadapter.exporting import stock, verification
from qadapter.exporting.export import export
from qadapter.exporting.gguf import check, in_transformers
from qadapter.exporting.gguf.architectures import NotWritten, layout_of
from qadapter.exporting.gguf.vocabulary import vocabulary
from qadapter.exporting.gguf.writing import write_gguf

SIZES = {"vocab_size": 600, "hidden_size": 64, "head_dim": 16, "max_position_embeddings": 256}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}
ARCHITECTURES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 128},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {**GEMMA, "num_hidden_layers": 4},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7},
}
IDS = torch.tensor([[5, 9, 11, 3, 20, 7, 33, 2, 90]])


@pytest.fixture
def here(monkeypatch):
    """The stock side of the checks in this process, and no llama.cpp: others take seconds."""
    in_this_process(monkeypatch)


def in_this_process(monkeypatch):
    monkeypatch.setattr(verification, "ask_stock", lambda request, _: stock.answer(request))
    monkeypatch.setattr(
        check, "_ask", lambda script, request, scratch: in_transformers.answer(request, scratch)
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name, *rest: None if name == "llama_cpp" else find(name, *rest),
    )


def saved_base(folder, architecture="llama", tokenizer=None, dtype=torch.float32, **changes):
    base = tiny_base(architecture, **SIZES | ARCHITECTURES.get(architecture, {}) | changes)
    for name, parameter in base.named_parameters():
        if parameter.ndim == 1:  # norms of 1 and biases of 0 would hide what is done to them
            around = 0.0 if name.endswith("bias") or "gemma" in architecture else 1.0
            torch.nn.init.normal_(parameter, around, 0.2)
    base.to(dtype).save_pretrained(folder)
    (tokenizer or chatml()).save_pretrained(folder)
    return folder


def head_model(base, **options):
    model = QAdapterModel.from_base(base, AdapterConfig(form="linear", rank=4), **options).eval()
    torch.nn.init.normal_(model.adapter.up.weight, std=0.3)
    return model


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def card(folder):
    return (folder / "README.md").read_text()


# --- the policy in a file -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_policy_becomes_one_file_that_transformers_reads(tmp_path):
    """By the two processes of an export."""
    # Their reader doesn't look for biases, unless it is told so by another config.
    model = head_model(saved_base(tmp_path / "base", attention_bias=False, mlp_bias=False))
    model.set_policy(strength=1.4)
    report = export(model, tmp_path / "mine", "gguf")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "mine.gguf", "README.md", "manifest.json"
    }
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mine", gguf_file="mine.gguf", dtype=torch.float32
    )
    torch.testing.assert_close(
        loaded(IDS).logits.log_softmax(-1), model(IDS).logits.log_softmax(-1), atol=1e-4, rtol=0
    )
    assert report.gguf.kind == "f32" and report.gguf.weights == 0
    assert report.gguf.prompts.kl == 0 and report.gguf.prompts.same_top == 96
    text = card(tmp_path / "mine")
    assert "mine/mine.gguf" in text and "read the file beside the checkpoint" in text


@pytest.mark.parametrize("kind", ["block", "lora"])
def test_other_adapters_that_merge(kind, here, tmp_path):
    folder = saved_base(tmp_path / "base", attention_bias=False, mlp_bias=False)
    config = AdapterConfig(form="block", rank=4) if kind == "block" else peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM"
    )
    model = QAdapterModel.from_base(folder, config).eval()
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    export(model, tmp_path / "out", "gguf")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="out.gguf", dtype=torch.float32
    )
    assert loaded.config.num_hidden_layers == (3 if kind == "block" else 2)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-3, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded(IDS).logits - base(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, here, tmp_path):
    """Weights, settings and tokens come back; llama.cpp's own answer is in `test_llama_cpp`."""
    folder = saved_base(tmp_path / "base", architecture)
    for kind in ("f32", "q8_0"):
        write_gguf(folder, tmp_path / f"{kind}.gguf", kind, "x", [])
        found = check.check_gguf(
            tmp_path / f"{kind}.gguf", folder, tmp_path, kind, AutoTokenizer.from_pretrained(folder)
        )
        assert found.weights <= 1 and found.prompts.states == 96
        assert (found.prompts.kl < 1e-9) == (kind == "f32")


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_what_a_type_loses_is_said(kind, here, tmp_path):
    model = head_model(saved_base(tmp_path / "base", attention_bias=False, mlp_bias=False))
    texts = [list(range(5, 60)), list(range(9, 300))]
    report = export(model, tmp_path / "out", "gguf", gguf_type=kind, texts=texts)
    found = report.gguf
    assert 0 < found.weights <= 1
    assert found.texts.states == 55 + 256  # of each text, no more
    assert 0 < found.texts.kl < 0.1 and found.texts.same_top > 250
    assert found.size < 0.7 * found_size_of_float32(model)
    text = card(tmp_path / "out")
    assert f"{found.texts.kl:.3g} nats a token, 311 tokens" in text
    assert f"{found.texts.same_top} of 311" in text
    # Independently: the same file by transformers' reader.
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="out.gguf", dtype=torch.float32
    )
    exact = model(torch.tensor([texts[0]])).logits.log_softmax(-1)
    near = loaded(torch.tensor([texts[0]])).logits.log_softmax(-1)
    first = (exact.exp() * (exact - near)).sum(-1).mean()
    assert 0.2 * first < found.texts.kl < 5 * first


def found_size_of_float32(model):
    head = model.head.weight.numel()  # of its own, beside the embedding
    return 4 * (sum(p.numel() for p in model.base.parameters()) + head)


def test_the_type_is_the_weights_own_unless_told(here, tmp_path):
    model = head_model(saved_base(tmp_path / "base", dtype=torch.bfloat16), dtype=torch.bfloat16)
    report = export(model, tmp_path / "out", "gguf")
    assert report.gguf.kind == "bf16" and report.gguf.weights == 0
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out/out.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "BF16" and types["blk.0.attn_norm.weight"] == "F32"


def test_rows_that_fill_no_block_are_stored_in_16_bits(here, tmp_path):
    folder = saved_base(tmp_path / "base", intermediate_size=72)
    write_gguf(folder, tmp_path / "x.gguf", "q8_0", "x", [])
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert check.check_gguf(
        tmp_path / "x.gguf", folder, tmp_path, "q8_0", tokenizer
    ).weights <= 1


def test_another_model_in_the_file_is_found(here, tmp_path):
    folder = saved_base(tmp_path / "base")
    write_gguf(folder, tmp_path / "x.gguf", "bf16", "x", [])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name][3, 5] *= 1.02
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(QAdapterError, match=rf"{name} is off by .* what rounding to bf16 explains"):
        check.check_gguf(tmp_path / "x.gguf", folder, tmp_path, "bf16", tokenizer)


def test_another_setting_in_the_file_is_found(here, tmp_path):
    folder = saved_base(tmp_path / "base")
    write_gguf(folder, tmp_path / "x.gguf", "f32", "x", [])
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QAdapterError, match=r"its rms_norm_eps is .*, not 0\.001"):
        check.check_gguf(
            tmp_path / "x.gguf", folder, tmp_path, "f32", AutoTokenizer.from_pretrained(folder)
        )


def test_beyond_float16(here, tmp_path):
    model = head_model(saved_base(tmp_path / "base"))
    model.base.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(QAdapterError, match=r"up_proj.weight does not fit f16: take gguf_type bf"):
        export(model, tmp_path / "out", "gguf", gguf_type="f16")
    assert not (tmp_path / "out").exists()


def test_large_checkpoints_in_many_files(here, tmp_path):
    folder = saved_base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
        tmp_path / "many", max_shard_size="50KB"
    )
    chatml().save_pretrained(tmp_path / "many")
    for name in ("base", "many"):
        write_gguf(tmp_path / name, tmp_path / f"{name}.gguf", "f32", "x", [])
    one, many = (
        {t.name: t.data for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("base", "many")
    )
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)


# --- settings -----------------------------------------------------------------------------------


def rope(architecture="llama", **parameters):
    return AutoConfig.for_model(architecture, **SIZES, rope_parameters={
        "rope_theta": 10_000.0, **parameters
    })


def test_llama3_frequencies_are_transformers_own():
    config = rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=64)
    factors = layout_of(config).tensors["rope_freqs.weight"]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert factors.dtype == np.float32 and 1 < factors[2] < 8  # one of them is between the two
    torch.testing.assert_close(plain / torch.from_numpy(factors), scaled, rtol=1e-6, atol=0)


def test_scaled_positions():
    linear = layout_of(rope(rope_type="linear", factor=4.0)).metadata
    assert linear["rope.scaling.type"] == "linear" and linear["rope.scaling.factor"] == 4.0
    yarn = layout_of(
        rope("qwen2", rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    ).metadata
    assert yarn["rope.scaling.original_context_length"] == 64
    # Scaled from the context's end on: up to there it is the plain one.
    assert "rope.scaling.type" not in layout_of(rope(rope_type="dynamic", factor=4.0)).metadata
    for parameters in (
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
         "attention_factor": 1.3},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ):
        with pytest.raises(NotWritten):
            layout_of(rope(**parameters))


def test_a_window_that_llama_cpp_does_not_know_ends_the_context():
    settings = {**SIZES, "sliding_window": 100}
    assert layout_of(AutoConfig.for_model("mistral", **settings)).metadata["context_length"] == 100
    settings |= {"use_sliding_window": False}
    assert layout_of(AutoConfig.for_model("qwen2", **settings)).metadata["context_length"] == 256


@pytest.mark.parametrize("architecture, changes, message", [
    ("llama", {"hidden_act": "gelu"}, "with the activation silu, this base has gelu"),
    ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 16"),
    ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "in every 6th layer"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "with causal attention"),
    ("phi", {"head_dim": None}, "'phi' is not written"),
])
def test_what_llama_cpp_does_not_compute_is_refused(architecture, changes, message):
    settings = SIZES | ARCHITECTURES.get(architecture, {}) | changes
    with pytest.raises(QAdapterError, match=message):
        layout_of(AutoConfig.for_model(architecture, **settings))


# --- tokenizers ---------------------------------------------------------------------------------

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*" \
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*steps, ignore_merges=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["It is a red house, and it's 1234 hot."] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def split(words):
    return pre_tokenizers.Split(Regex(words), "isolated")


@pytest.mark.parametrize("steps, options, name", [
    ([pre_tokenizers.ByteLevel(False)], {}, "gpt-2"),
    ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)], {}, "smollm"),
    ([split(WORDS % r"\p{N}"), pre_tokenizers.ByteLevel(False, use_regex=False)], {}, "qwen2"),
    ([split(WORDS % r"\p{N}{1,3}"), pre_tokenizers.ByteLevel(False, use_regex=False)],
     {"ignore_merges": True}, "llama-bpe"),
    ([split(WORDS % r"\p{N}{1,2}"), pre_tokenizers.ByteLevel(False, use_regex=False)], {}, None),
    ([pre_tokenizers.ByteLevel(True)], {}, None),
    ([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)], {}, None),
])
def test_tokenizers_are_known_by_their_parts(steps, options, name):
    tokenizer = byte_level(*steps, **options)
    if name is None:
        with pytest.raises(NotWritten, match=r"none of llama\.cpp's tokenizers"):
            vocabulary(tokenizer, 300, [])
        return
    found = vocabulary(tokenizer, 320, [1, 7, 9])
    assert found["tokenizer.ggml.pre"] == name and found["tokenizer.ggml.model"] == "gpt2"
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 320
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1]  # specials, then words
    assert found["tokenizer.ggml.token_type"][-1] == 5  # a row without a token
    ends = [found[f"tokenizer.ggml.{end}_token_id"] for end in ("eos", "eot", "eom")]
    assert ends == [1, 7, 9] and found["tokenizer.ggml.bos_token_id"] == 0
    assert found["tokenizer.ggml.add_bos_token"] is False


def sentencepiece(prefix=True):
    """As Llama 2's: ▁ for spaces, bytes for what no token covers, merges in the scores' order."""
    words = ["▁is", "▁it", "▁red", "red", "▁r", "▁i", "▁re", "it", "is", "re", "ed"]
    letters = ["▁", *"abcdeihotrsxn"]
    vocab = {token: i for i, token in enumerate(
        ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *words]
    )}
    order = ["it", "is", "re", "ed", "▁it", "▁is", "▁re", "red", "▁red"]
    merges = [
        (token[:i], token[i:]) for token in order for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(
        vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
    ))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix):
    tokenizer = sentencepiece(prefix)
    found = vocabulary(tokenizer, len(tokenizer), [])
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert scores["it"] > scores["is"] > scores["▁it"] > scores["▁red"] > scores["x"]
    types = dict(
        zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True)
    )
    assert (types["<unk>"], types["<s>"], types["<0x41>"], types["red"[:2]]) == (2, 3, 6, 1)


@pytest.mark.parametrize("change", [
    lambda merges: merges.insert(0, merges.pop()),  # a token's pairs apart
    lambda merges: merges.remove(merges[-1]),  # one of a token's pairs is missing
])
def test_merges_that_no_scores_order_are_refused(change):
    parts = json.loads(sentencepiece().backend_tokenizer.to_str())
    assert len({a + b for a, b in parts["model"]["merges"][-2:]}) == 1
    change(parts["model"]["merges"])
    broken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))
    with pytest.raises(NotWritten, match="not those of a SentencePiece model"):
        vocabulary(broken, 400, [])


def test_the_chat_template_is_in_the_file(here, tmp_path):
    model = head_model(saved_base(tmp_path / "base"))
    model.base.generation_config.eos_token_id = model.generation_config.eos_token_id = [2, 0]
    export(model, tmp_path / "out", "gguf")
    found = fields(tmp_path / "out/out.gguf")
    assert found["tokenizer.chat_template"] == chatml().chat_template
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.ggml.eot_token_id"] == 0
    assert found["general.name"] == "out"


# --- llama.cpp, and its converter ---------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python"
)
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp(architecture, tmp_path):
    folder = saved_base(tmp_path / "base", architecture)
    for kind in ("f32", "q8_0"):
        write_gguf(folder, tmp_path / "x.gguf", kind, "x", [])
        found = check.check_gguf(
            tmp_path / "x.gguf", folder, tmp_path, kind, AutoTokenizer.from_pretrained(folder)
        )
        assert found.llama_cpp.states == 96
        assert kind != "f32" or found.llama_cpp_answers == 6


class LlamaCpp:
    """Stands in for it: answers as transformers does, but for ``changes``."""

    def __init__(self, monkeypatch, **changes):
        self.changes, self.seen = changes, {}
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec",
            lambda name, *rest: True if name == "llama_cpp" else find(name, *rest),
        )
        monkeypatch.setattr(check, "_ask", self)

    def __call__(self, script, request, scratch):
        if script == "in_transformers.py":
            self.seen = in_transformers.answer(request, scratch)
            return self.seen
        tokenizer = chatml()
        tensors = {"logits": self.seen[0]["gguf"]}
        tensors |= {f"greedy.{i}": torch.tensor(ids) for i, ids in enumerate(request["tokens"])}
        tensors |= {
            f"text.{i}": torch.tensor(tokenizer(text)["input_ids"])
            for i, text in enumerate(request["texts"])
        }
        return {k: self.changes.get(k, lambda x: x)(x) for k, x in tensors.items()}, {
            "version": "0.0"
        }


def test_llama_cpp_is_asked_too_where_it_is(here, monkeypatch, tmp_path):
    model = head_model(saved_base(tmp_path / "base"))
    LlamaCpp(monkeypatch, **{"greedy.1": lambda ids: ids.flip(0)})
    report = export(model, tmp_path / "out", "gguf")
    assert (report.gguf.llama_cpp_answers, report.gguf.llama_cpp_version) == (5, "0.0")
    text = card(tmp_path / "out")
    assert "llama-cpp-python 0.0" in text and "| 5 of 6 |" in text
    assert "not run in llama.cpp" not in text


@pytest.mark.parametrize("changes, message", [
    ({"text.7": lambda ids: ids[1:]}, r"llama\.cpp reads '日本語"),
    ({"text.9": lambda ids: ids[1:]}, "reads '<|im_start|>system"),  # a chat is read too
    ({"logits": lambda x: x + 3 * torch.randn_like(x)}, r"off by .* rounding explains"),
    ({"logits": lambda x: x * torch.nan}, "off by inf"),
])
def test_what_llama_cpp_does_otherwise_is_found(changes, message, here, monkeypatch, tmp_path):
    model = head_model(saved_base(tmp_path / "base"))
    LlamaCpp(monkeypatch, **changes)
    with pytest.raises(QAdapterError, match=message):
        export(model, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


CONVERTER = """
import shutil, sys
assert sys.argv[1].endswith("checkpoint") and sys.argv[4] == "--outtype", sys.argv
print("loading", file=sys.stderr)
if sys.argv[5] == "f16":
    sys.exit("Model PhiForCausalLM is not supported")
shutil.copy({file!r}, sys.argv[3])
"""


@pytest.fixture
def converter(tmp_path):
    """llama.cpp's folder, with a script that has the file ready."""
    write_gguf(saved_base(tmp_path / "llama"), tmp_path / "ready.gguf", "f32", "x", [])
    (tmp_path / "llama.cpp").mkdir()
    script = tmp_path / "llama.cpp/convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(file=str(tmp_path / "ready.gguf")))
    return script


def test_the_converter_writes_what_is_not_written_here(converter, here, monkeypatch, tmp_path):
    model = head_model(saved_base(tmp_path / "base", "granite"))
    with pytest.raises(QAdapterError, match=r"'granite' is not written.*llama_cpp_dir"):
        export(model, tmp_path / "out", "gguf")
    with pytest.raises(QAdapterError, match=r"holds no convert_hf_to_gguf\.py"):
        export(model, tmp_path / "out", "gguf", llama_cpp_dir=tmp_path)
    with pytest.raises(QAdapterError, match=r"can't convert .*PhiForCausalLM is not supported"):
        export(model, tmp_path / "out", "gguf", llama_cpp_dir=converter.parent, gguf_type="f16")
    # What it writes is run like everything else: that script's file is another model's.
    with pytest.raises(QAdapterError, match="was checked and is not kept"):
        export(model, tmp_path / "out", "gguf", llama_cpp_dir=converter.parent)
    # On PATH; and one that is read by nothing that is here can't be checked.
    monkeypatch.setenv("PATH", str(converter.parent), prepend=":")
    converter.chmod(0o755)
    monkeypatch.setattr(in_transformers, "AutoConfig", Unread)
    with pytest.raises(QAdapterError, match=r"can't be checked: .*granite is unknown.*llama-cpp"):
        export(model, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


class Unread:
    @staticmethod
    def from_pretrained(*_, **__):
        raise ValueError("granite is unknown")


# --- what is refused ----------------------------------------------------------------------------


def test_a_head_that_llama_cpp_would_leave_out(here, tmp_path):
    model = head_model(saved_base(tmp_path / "base", "gemma2"))
    with pytest.raises(QAdapterError, match="takes the input embedding for the output layer"):
        export(model, tmp_path / "out", "gguf")
    write = saved_base(tmp_path / "untied", "gemma2", tie_word_embeddings=False)
    with pytest.raises(QAdapterError, match="no output layer beside the input embedding"):
        write_gguf(write, tmp_path / "x.gguf", "f32", "x", [])


def test_options_and_bases_that_do_not_go_together(here, monkeypatch, tmp_path):
    model = head_model(saved_base(tmp_path / "base"))
    for options, message in (
        ({"form": "merged", "gguf_type": "f32"}, "for form gguf and ollama"),
        ({"form": "peft", "llama_cpp_dir": "x"}, "LoRA in the trunk"),
        ({"form": "gguf", "gguf_type": "q4_k"}, "gguf_type must be auto, f32"),
    ):
        with pytest.raises(QAdapterError, match=message):
            export(model, tmp_path / "out", **options)
    model.base.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(QAdapterError, match="the base is quantized"):
        export(model, tmp_path / "out", "gguf")
    del model.base.config.quantization_config
    bare = head_model(tiny_base("llama"))
    with pytest.raises(QAdapterError, match="this base came without one"):
        export(bare, tmp_path / "out", "gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QAdapterError, match=r"pip install 'qadapter\[gguf\]'"):
        export(model, tmp_path / "out", "gguf")


def test_command(here, tmp_path, capsys):
    save_tiny(tmp_path / "model")
    head_model(tmp_path / "model").save_pretrained(tmp_path / "adapter")
    (tmp_path / "texts.txt").write_text("It is red.\nIt is hot, always.\n")
    assert cli("export", tmp_path / "adapter", "--form", "ollama", "--gguf_type", "q8_0",
               "--texts_file", tmp_path / "texts.txt", "--output_dir", tmp_path / "out") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "type of the weights" in said and "given texts" in said
    assert "TEMPLATE is the chat template" in said
    assert (tmp_path / "out/out.gguf").is_file()
    for flags, message in (
        (("--form", "merged", "--gguf_type", "f16"), "gguf_type and llama_cpp_dir are for form"),
        (("--form", "gguf", "--llama_cpp_dir", tmp_path), "holds no convert_hf_to_gguf.py"),
    ):
        assert cli("export", tmp_path / "adapter", "--output_dir", tmp_path / "no", *flags) == 2
        error = capsys.readouterr().err
        assert message in " ".join(error.split()) and error.count("error: ") == 1
