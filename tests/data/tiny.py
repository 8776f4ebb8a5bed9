"""Tiny tokenizers, trained here in milliseconds, with the chat templates that matter."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "What color is the sky? It is blue, and green, and sometimes red.",
    "You are a helpful assistant. Answer the question in one short sentence.",
    "Human: How do I boil an egg? Assistant: Put it in hot water for seven minutes.",
    "user system assistant tool I think so. Yes, no, maybe, never, always.",
]

# Like SmolLM2's: a default system prompt, and a newline behind the end of turn.
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Like Llama 3's: the template writes the BOS, trims, and its end of turn is not the eos token.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|header|>' + message['role'] + '<|end_header|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\\n\\n' }}{% endif %}"
)
# No special token at all; the generation prompt ends in a space, which merges with the answer.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Asks for thoughts in the generation prompt, which it leaves out once there is an answer.
RERENDERING = (
    "{% for message in messages %}{{ '<|header|>' + message['role'] + '<|end_header|>' + "
    "message['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>think' }}{% endif %}"
)
# Uses a keyword, the tools, keys some messages lack, and refuses two turns of one role.
STRICT = (
    "{% if tools %}{{ tools | length ~ ' tools ' }}{% endif %}"
    "{% if style is defined %}{{ style }}{% endif %}"
    "{% for message in messages %}"
    "{% if not loop.first and message['role'] == messages[loop.index0 - 1]['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.mood is defined %}{{ '(' + message.mood + ')' }}{% endif %}"
    "{{ '<|header|>' + message['role'] + '<|end_header|>' + message['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>' }}{% endif %}"
)


@cache
def _byte_level_bpe(specials: tuple[str, ...], bos: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def chatml(**kwargs) -> PreTrainedTokenizerFast:
    """As SmolLM2's: bos <|im_start|> (never added), eos and pad both <|im_end|>."""
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None),
        chat_template=CHATML,
        **(names | kwargs),
    )


def llama3(template: str | None = LLAMA3, **kwargs) -> PreTrainedTokenizerFast:
    """As Llama 3's: <|begin|> is added to plain text and written by the template."""
    specials = ("<|begin|>", "<|end|>", "<|header|>", "<|end_header|>", "<|eot|>", "<|pad|>")
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(specials, "<|begin|>"),
        chat_template=template,
        **(names | kwargs),
    )


def turns(*texts: str, first: str = "user") -> list[dict[str, str]]:
    """Messages that take turns, beginning with `first`."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
