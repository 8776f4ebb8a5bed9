"""The shortcuts for long text give the ids that the tokenizer gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import chatml, llama3
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qadapter.data import tokens
from qadapter.data.encoding import PlainText, PromptEncoder
from qadapter.data.tokens import SectionedText, token_ids
from qadapter.errors import QAdapterError


def metaspace(scheme, normalizer=None):
    """As SentencePiece models have it: spaces are letters, and one may be put before the text."""
    letters = "▁abcdefghijklmnopqrstuvwxyz?.<>|/ \n"
    pieces = [("<unk>", 0.0), *((letter, -5.0) for letter in letters), ("▁a", -1.0), ("▁so", -1.0),
              ("ab", -2.0), ("▁▁", -1.0), ("the", -2.0)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    if normalizer is not None:
        core.normalizer = normalizer
    if scheme is not None:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<pad>",
    )


def with_tokens(tokenizer, *added):
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
TOKENIZERS = {
    "byte-level": chatml(),
    "with a bos": llama3(),
    "metaspace first": metaspace("first"),
    "metaspace always": metaspace("always"),
    "metaspace never": metaspace("never"),
    "prepended by the normalizer": metaspace(None, LLAMA2),
    "swallows spaces": with_tokens(
        chatml(), AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True),
        AddedToken("<word>", single_word=True), AddedToken("<norm>", normalized=True),
        "<|im_end|>.", "<left><right>",
    ),
    "without added tokens": PreTrainedTokenizerFast(tokenizer_object=Tokenizer(
        models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])
    )),
}
PIECES = st.sampled_from([
    "a", "ab", " so", "the", "  ", "\n", ".", "é🙂", "<|im_start|>", "<|im_end|>", "<left>",
    "<right>", "<word>", "<norm>", "<|im_end|>.", "<|im_", "<|eot|>", "<|header|>", "<pad>",
])


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(texts=st.lists(st.lists(PIECES, max_size=12).map("".join), min_size=1, max_size=3))
def test_ids_are_the_tokenizers_own(tokenizer, texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_LONG", 1)
        sectioned = SectionedText(tokenizer)
        for text in (*texts, *texts[:2]):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert token_ids(tokenizer, text) == ids
            assert sectioned(text) == ids
        assert len(sectioned.kept) <= tokens._KEPT


@pytest.mark.parametrize("setting", [
    {"truncation": True, "max_length": 8}, {"padding": "max_length", "max_length": 90_000},
])
def test_what_an_earlier_call_has_set_is_not_taken_over(setting):
    text = "What color is the sky? " * 2000
    tokenizer = chatml()
    ids = tokenizer(text)["input_ids"]
    tokenizer("a", **setting)
    assert token_ids(tokenizer, text) == ids
    tokenizer = chatml(split_special_tokens=True)
    text += "<|im_end|>"
    assert token_ids(tokenizer, text) == tokenizer(text)["input_ids"] != chatml()(text)["input_ids"]


@pytest.mark.parametrize("prompt", [
    "cut \ud83d", PlainText("\udcff"), "long " * 9000 + "\ud83d",
    [{"role": "user", "content": "cut \ud83d"}],
])
def test_half_a_surrogate_pair_in_a_prompt_is_named(prompt):
    with pytest.raises(QAdapterError, match="holds half of a surrogate pair"):
        PromptEncoder(chatml())(prompt)


def test_a_long_section_is_tokenized_once(monkeypatch):
    tokenizer, seen = chatml(), []
    monkeypatch.setattr(
        tokens, "token_ids", lambda t, text: seen.append(len(text)) or token_ids(t, text)
    )
    sectioned, long = SectionedText(tokenizer), "What color is the sky? " * 2000
    for answer in ("", "yes<|im_end|>", "no<|im_end|>"):
        sectioned(f"<|im_start|>user\n{long}<|im_end|>\n<|im_start|>assistant\n{answer}")
    assert sum(length > len(long) for length in seen) == 1
