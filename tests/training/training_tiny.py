"""A random two-layer Llama, a word-level tokenizer and pairs to learn from."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qadapter import AdapterConfig, QAdapterModel

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]


def build_tokenizer():
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )


def build_model(adapter=None, objective=None, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    base = LlamaForCausalLM(config).to(dtype)
    # Larger weights than a fresh model's: its logits would all be nearly alike.
    torch.nn.init.normal_(base.lm_head.weight, std=0.5)
    return QAdapterModel.from_base(base, adapter or AdapterConfig(form="mlp", rank=4), objective)


def build_pairs(count, seed=0):
    """Answers of even words are chosen over answers of odd ones; lengths differ throughout."""
    generator = torch.Generator().manual_seed(seed)

    def words(length, offset, step):
        numbers = torch.randint(0, 60 // step, (length,), generator=generator) * step + offset
        return " ".join(f"w{n}" for n in numbers.tolist())

    def length(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    return Dataset.from_list(
        [
            {
                "prompt": words(length(2, 7), 0, 1) + " ",
                "chosen": words(length(1, 9), 0, 2),
                "rejected": words(length(1, 9), 1, 2),
            }
            for _ in range(count)
        ]
    )
