"""The exemplar probe: what a model still knows, without a hub.

lm-evaluation-harness ships the worked examples that its few-shot prompts begin with: 282 questions
in the style of MMLU, 81 of BIG-Bench Hard, 8 of GSM8K, each with its reasoning and answer. They are
in every harness user's prompts and on the web, too few and too well known to stand for those
benchmarks: a score on them is called by this probe's name and compared with the base's, no more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.evaluation.bootstrap import ClusterBootstrap
from qadapter.evaluation.scoring import Scorer, evaluating
from qadapter.integrations.lm_eval import TaskComparison, import_harness
from qadapter.policy.model import QAdapterModel

NAME = "exemplar probe"
# Source → (files under the harness's tasks, key of the question).
_SOURCES = {
    "MMLU": ("mmlu/flan_cot_fewshot/mmlu_*.yaml", "question"),
    "BBH": ("bbh/cot_fewshot/*.yaml", "input"),
    "GSM8K": ("gsm8k/gsm8k-cot.yaml", "question"),
}
CHOICE, ANSWER = "right choice, no reasoning", "right answer, after the reasoning"
_Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exemplar:
    """A question with its worked solution."""

    source: str
    group: str
    """Examples of a group (a subject, a task) are one cluster."""
    question: str
    reasoning: str
    """Up to "answer is"."""
    answer: str
    """``(B)``, ``invalid``, ``39``."""

    @property
    def choices(self) -> list[str]:
        """Letters to choose from; none where the answer is no letter."""
        if not re.fullmatch(r"\([A-Z]\)", self.answer):
            return []
        named = set(re.findall(r"\(([A-Z])\)", self.question))
        letters = []
        for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
            if letter not in named:
                break
            letters.append(letter)
        return letters if self.answer[1] in letters and len(letters) > 1 else []


def load_exemplars() -> list[Exemplar]:
    """All of the installed harness's, in a fixed order.

    Raises:
        QAdapterError: lm-eval is not installed, or its files are not where 0.4.13 has them.
    """
    root = Path(import_harness().__file__).parent / "tasks"
    found = []
    for source, (pattern, key) in _SOURCES.items():
        for file in sorted(root.glob(pattern)):
            config = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
            for i, sample in enumerate(config.get("fewshot_config", {}).get("samples", ())):
                parts = re.fullmatch(
                    r"(.*\banswer is)\s+(.+?)\.?\s*", sample["target"], re.DOTALL
                )
                if parts is None:
                    continue  # then none of the source may be left, which is said below
                group = file.stem if source != "GSM8K" else f"{file.stem} {i}"
                found.append(Exemplar(source, group, sample[key].strip(), parts[1], parts[2]))
    if {exemplar.source for exemplar in found} != set(_SOURCES):
        raise QAdapterError(
            f"{NAME}: the installed lm-eval ships no exemplars where 0.4.13 does: pip install "
            "lm-eval==0.4.13"
        )
    return found


def evaluate_exemplars(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    exemplars: Sequence[Exemplar] | None = None, *, strength: float | None = None,
    max_length: int = 1024, batch_size: int = 8, num_resamples: int = 2000, seed: int = 0,
    progress: _Progress | None = None,
) -> list[TaskComparison]:
    """Two measures of every source, the base beside the customised policy.

    ``right choice, no reasoning``: of the letters offered, the right one is the most likely after
    "The answer is (" (MMLU, and BBH where there are letters). ``right answer, after the
    reasoning``: the same with the worked reasoning before it; where there are no letters, greedy
    decoding would write the answer (every token of it is the most likely one). Intervals are
    clustered by subject or task.

    Args:
        model: a ``QAdapterModel``, or a plain causal LM (``customised`` and ``change`` are None).
        exemplars: default: ``load_exemplars()``.
        strength: dial of the policy; default: as the model is set.
        max_length: tokens of an exemplar; those that are longer lose their start.
        progress: called with (texts done, texts in all).
    """
    exemplars = load_exemplars() if exemplars is None else list(exemplars)
    items = [item for e in exemplars for item in _items(e, tokenizer, max_length)]
    if not items:
        raise QAdapterError(f"{NAME}: there are no exemplars")
    with evaluating(model):
        right_2N = _right(model, items, batch_size, strength, progress)
    customised = isinstance(model, QAdapterModel)
    found = []
    for name in dict.fromkeys((item.exemplar.source, item.measure) for item in items):
        rows = [
            i for i, item in enumerate(items) if (item.exemplar.source, item.measure) == name
        ]
        bootstrap = ClusterBootstrap(
            [items[i].exemplar.group for i in rows], num_resamples=num_resamples, seed=seed
        )
        base, policy = right_2N[:, rows]
        chance = np.mean([1 / len(items[i].options) if items[i].options else 0 for i in rows])
        comparison = TaskComparison(
            f"{NAME}, {name[0]}'s", f"{name[1]} (guessing: {chance:.2f})", bootstrap.mean(base),
            None, None, len(rows),
        )
        if customised:
            comparison = replace(
                comparison, customised=bootstrap.mean(policy), change=bootstrap.mean(policy - base)
            )
        found.append(comparison)
    return found


def worked_solutions(
    tokenizer: PreTrainedTokenizerBase, exemplars: Sequence[Exemplar] | None = None
) -> tuple[list[list[int]], list[int]]:
    """(token ids of every question and its solution, where each solution begins): what
    ``evaluate_retention`` takes as texts and ``prompt_lengths``."""
    exemplars = load_exemplars() if exemplars is None else exemplars
    ids, starts = [], []
    for exemplar in exemplars:
        whole = _encode(exemplar, f"{exemplar.reasoning} {exemplar.answer}.", tokenizer)
        starts.append(_shared(_encode(exemplar, "", tokenizer), whole))
        ids.append(whole)
    return ids, starts


@dataclass(frozen=True)
class _Item:
    """Token ids, and what is asked at them: to choose one of ``options`` after the last token, or
    to write the ids from ``start`` on."""

    exemplar: Exemplar
    measure: str
    ids: list[int]
    start: int
    options: list[int]
    right: int


def _items(
    exemplar: Exemplar, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[_Item]:
    def item(measure: str, before: str, answers: list[str], right: int = 0) -> _Item:
        """Tokens may span a border: what is asked begins where the first token is not shared."""
        texts = [_encode(exemplar, before + answer, tokenizer) for answer in answers]
        alike = texts if len(texts) > 1 else [_encode(exemplar, before, tokenizer), *texts]
        start = _shared(*alike)
        cut = max(0, start - max_length)
        if len(texts) == 1:
            return _Item(exemplar, measure, texts[0][cut:], start - cut, [], right)
        return _Item(
            exemplar, measure, texts[0][cut:start], start - cut, [ids[start] for ids in texts],
            right,
        )

    letters = exemplar.choices
    if not letters:
        return [item(ANSWER, exemplar.reasoning, [f" {exemplar.answer}"])]
    offered = [f" ({letter})" for letter in letters]
    right = letters.index(exemplar.answer[1])
    return [
        item(CHOICE, "The answer is", offered, right),
        item(ANSWER, exemplar.reasoning, offered, right),
    ]


def _encode(exemplar: Exemplar, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(f"Q: {exemplar.question}\nA: {text}", verbose=False)["input_ids"]


def _shared(*sequences: list[int]) -> int:
    """Length of the prefix that all share."""
    columns = enumerate(zip(*sequences, strict=False))
    return next((i for i, ids in columns if len(set(ids)) > 1), min(map(len, sequences)))


def _right(
    model: PreTrainedModel, items: Sequence[_Item], batch_size: int, strength: float | None,
    progress: _Progress | None,
) -> np.ndarray:
    """[2, items] of 0 and 1: by the base, by the policy."""
    scorer = Scorer(model, strength=strength, rewards=False)
    order = sorted(range(len(items)), key=lambda i: -len(items[i].ids))
    right = np.empty((2, len(items)))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        input_ids, attention_mask = _pad([items[i].ids for i in indices], scorer.device)
        streams = scorer.hidden_streams(input_ids, attention_mask)
        for row, i in enumerate(indices):
            states = slice(items[i].start - 1, max(len(items[i].ids) - 1, items[i].start))
            logits = scorer.logits(*(hidden_BTD[row, states] for hidden_BTD in streams))
            right[:, i] = [_is_right(items[i], logits_NV) for logits_NV in logits]
        if progress is not None:
            progress(first + len(indices), len(order))
    return right


def _is_right(item: _Item, logits_NV: Tensor) -> bool:
    if item.options:
        return int(logits_NV[0, item.options].argmax()) == item.right
    wanted_N = torch.tensor(item.ids[item.start :], device=logits_NV.device)
    return bool((logits_NV.argmax(-1) == wanted_N).all())


def _pad(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences))
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences])
    lengths = torch.tensor([[len(ids)] for ids in sequences])
    return input_ids.to(device), (torch.arange(width) < lengths).long().to(device)


class _Loader(yaml.SafeLoader):
    """Task files name Python functions; none of them is wanted here."""


def _nothing(loader: yaml.SafeLoader, suffix: str, node: Any) -> None:
    return None


_Loader.add_multi_constructor("!", _nothing)
