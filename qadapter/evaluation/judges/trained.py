"""Judges trained here, by Bradley–Terry on preference pairs that no policy may have seen.

Two that fail differently: one on the frozen base's hidden states, which knows what the policy's
features know and can be led astray by them, and one on which words occur, which knows nothing of
the model and is gamed by stuffing or repeating words. A gain that both see is worth more than one
that either sees; report them apart, with distinct-n beside.

Shapes: P pairs, F features, N answers, T tokens, D hidden.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.data import Prompt, PromptEncoder, check_sequences
from qadapter.errors import QAdapterError
from qadapter.evaluation.judges.interface import Progress, RewardJudge, check_lengths, wins
from qadapter.evaluation.judges.texts import PreferenceTexts
from qadapter.evaluation.scoring import evaluating
from qadapter.policy.model import QAdapterModel
from qadapter.trunk.lm_head import trunk

Encoded = tuple[tuple[int, ...], int]
"""Token ids of prompt and answer, and where the answer begins."""
PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.01, 0.001)
"""Weights of the L2 penalty that cross-validation chooses from, strongest first."""
FOLDS, MIN_PAIRS = 5, 20


def require_enough(prompt_ids: Sequence[str]) -> None:
    """
    Args:
        prompt_ids: of the pairs that a judge is to learn from.

    Raises:
        QAdapterError: too few pairs or prompts.
    """
    groups = len(set(prompt_ids))
    if len(prompt_ids) < MIN_PAIRS or groups < FOLDS:
        raise QAdapterError(
            f"a judge needs at least {MIN_PAIRS} pairs on {FOLDS} prompts to train on, got "
            f"{len(prompt_ids)} on {groups}"
        )


class TrainedJudge(RewardJudge):
    """A linear Bradley–Terry model on features of an answer."""

    weight_F: Tensor
    num_pairs: int
    """It was fitted to."""
    penalty: float
    cross_validated_accuracy: float
    """On folds that share no prompt with the pairs the judge was fitted to."""

    @abstractmethod
    def features(
        self, prompts: Sequence[Prompt], answers: Sequence[str], progress: Progress | None = None
    ) -> Tensor:
        """[N, F], dense or sparse, float64."""

    def scores(
        self, prompts: Sequence[Prompt], answers: Sequence[str], progress: Progress | None = None
    ) -> np.ndarray:
        check_lengths(prompts, answers)
        return (self.features(prompts, answers, progress) @ self.weight_F).numpy()

    def fit(self, texts: PreferenceTexts, progress: Progress | None = None) -> None:
        """Fit the weights; the penalty is chosen by cross-validation over prompts.

        Raises:
            QAdapterError: too few pairs or prompts.
        """
        require_enough(texts.prompt_ids)
        both = self.features(texts.prompts * 2, texts.chosen + texts.rejected, progress)
        pairs = torch.arange(len(texts.prompts))
        difference_PF = both.index_select(0, pairs) - both.index_select(0, pairs + len(pairs))
        self.num_pairs = len(pairs)
        self.weight_F, self.penalty, self.cross_validated_accuracy = fit_bradley_terry(
            difference_PF, texts.prompt_ids
        )

    def fitted(self) -> dict[str, Any]:
        """What ``fit`` found, as JSON types: for ``restore``."""
        return {
            "weight": self.weight_F.tolist(), "num_pairs": self.num_pairs, "penalty": self.penalty,
            "cross_validated_accuracy": self.cross_validated_accuracy,
        }

    def restore(self, fitted: Mapping[str, Any]) -> None:
        """Take over what the same judge's ``fit`` found, to the last digit.

        Raises:
            KeyError: it is no judge's of this kind.
        """
        self.weight_F = torch.tensor(fitted["weight"], dtype=torch.float64)
        self.num_pairs, self.penalty = fitted["num_pairs"], fitted["penalty"]
        self.cross_validated_accuracy = fitted["cross_validated_accuracy"]


class HiddenStateJudge(TrainedJudge):
    """On the base's last hidden states, averaged over the answer's tokens.

    Args:
        model: a causal LM, or a ``QAdapterModel`` (its frozen base is taken).
        max_length: most tokens read: half for the answer's start, the rest for the prompt's end.
        batch_size: answers read at once.
    """

    name = "hidden states"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *,
        max_length: int = 1024, batch_size: int = 8,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.encode_prompt = PromptEncoder(tokenizer)
        self.max_length, self.batch_size = max_length, batch_size

    def features(
        self, prompts: Sequence[Prompt], answers: Sequence[str], progress: Progress | None = None
    ) -> Tensor:
        encoded = [self._encode(*x) for x in zip(prompts, answers, strict=True)]
        check_sequences((ids for ids, _ in encoded), self.model, self.tokenizer, "judged answer")
        # An answer in several pairs (DSP's are) is read once.
        order = sorted(set(encoded), key=lambda x: (-len(x[0]), x))
        rows: dict[Encoded, Tensor] = {}
        with evaluating(self.model):
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                rows |= zip(batch, self._pool(batch), strict=True)
                if progress is not None:
                    progress(len(rows), len(order))
        return torch.stack([rows[x] for x in encoded])

    def _encode(self, prompt: Prompt, answer: str) -> Encoded:
        prompt_ids = self.encode_prompt(prompt)
        answer_ids = self.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        answer_ids = answer_ids[: self.max_length // 2]
        prompt_ids = prompt_ids[-(self.max_length - len(answer_ids)) :]
        # An empty answer is what the model sees where an answer would begin.
        return tuple(prompt_ids + answer_ids), len(prompt_ids) - (not answer_ids)

    def _pool(self, batch: list[Encoded]) -> Tensor:
        """Mean hidden states of the answers, [N, D] in float64 on the CPU."""
        device = self.model.get_input_embeddings().weight.device
        width = max(len(ids) for ids, _ in batch)
        input_ids = torch.tensor(
            [[*ids, *[0] * (width - len(ids))] for ids, _ in batch], device=device
        )
        position_T = torch.arange(width, device=device)
        end_N1 = torch.tensor([[len(ids)] for ids, _ in batch], device=device)
        start_N1 = torch.tensor([[start] for _, start in batch], device=device)
        attention_mask = (position_T < end_N1).long()
        if isinstance(self.model, QAdapterModel):
            hidden_NTD = self.model.base_hidden(input_ids, attention_mask)
        else:
            hidden_NTD = trunk(self.model)(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
        answer_NT = (position_T >= start_N1) & (position_T < end_N1)
        summed_ND = torch.where(answer_NT[:, :, None], hidden_NTD.float(), 0.0).sum(1)
        return (summed_ND / (end_N1 - start_N1)).double().cpu()


class WordPresenceJudge(TrainedJudge):
    """On which words an answer has, however often, scaled to unit length so that more words are no
    gain by themselves. It reads no prompt."""

    name = "words"
    MIN_ANSWERS = 3
    """A word counts if this many of the training answers have it."""

    def fit(self, texts: PreferenceTexts, progress: Progress | None = None) -> None:
        seen = Counter(word for answer in texts.chosen + texts.rejected for word in _words(answer))
        known = sorted(word for word, count in seen.items() if count >= self.MIN_ANSWERS)
        if not known:
            raise QAdapterError("the judge's training answers have no word in common")
        self.column = {word: i for i, word in enumerate(known)}
        super().fit(texts, progress)

    def fitted(self) -> dict[str, Any]:
        return {**super().fitted(), "words": list(self.column)}

    def restore(self, fitted: Mapping[str, Any]) -> None:
        super().restore(fitted)
        self.column = {word: i for i, word in enumerate(fitted["words"])}

    def features(
        self, prompts: Sequence[Prompt], answers: Sequence[str], progress: Progress | None = None
    ) -> Tensor:
        rows, columns, values = [], [], []
        for row, answer in enumerate(answers):
            found = [self.column[word] for word in sorted(_words(answer)) if word in self.column]
            rows += [row] * len(found)
            columns += found
            values += [max(len(found), 1) ** -0.5] * len(found)  # it may have no known word
        return torch.sparse_coo_tensor(
            torch.tensor([rows, columns], dtype=torch.int64), torch.tensor(values).double(),
            (len(answers), len(self.column)), check_invariants=True,
        ).coalesce()


def fit_bradley_terry(
    difference_PF: Tensor, groups: Sequence[Hashable]
) -> tuple[Tensor, float, float]:
    """Weights w that minimise mean −log σ(x·w) + λ/2·Σ (scale·w)², where x is chosen − rejected.

    λ is the one of ``PENALTIES`` with the least log loss in a cross-validation over groups; scale
    is each feature's root mean square, so that λ means the same on any features.

    Args:
        difference_PF: float64, dense or sparse COO.
        groups: of each pair; folds share none.

    Returns:
        (weights [F], λ, cross-validated accuracy, ties as one half).
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    # Groups are dealt out in a seeded shuffle: files are often sorted by subject.
    fold_of = np.random.default_rng(0).permutation(len(names)) % FOLDS
    fold_P = torch.tensor([int(fold_of[names[name]]) for name in groups])
    square_PF = difference_PF * difference_PF
    mean_F = square_PF.sum(0).to_dense() / len(fold_P)
    scale_F = mean_F.sqrt().clamp(min=1e-12)
    losses, margins = [], []
    for penalty in PENALTIES:
        margin_P = torch.empty(len(fold_P), dtype=torch.float64)
        for fold in range(FOLDS):
            train, test = ((fold_P != fold).nonzero()[:, 0], (fold_P == fold).nonzero()[:, 0])
            weight_F = _minimise(difference_PF.index_select(0, train), scale_F, penalty)
            margin_P[test] = difference_PF.index_select(0, test) @ weight_F
        losses.append(float(F.softplus(-margin_P).mean()))
        margins.append(margin_P)
    best = int(np.argmin(losses))
    weight_F = _minimise(difference_PF, scale_F, PENALTIES[best])
    accuracy = float(wins(margins[best].numpy(), np.zeros(len(fold_P))).mean())
    return weight_F, PENALTIES[best], accuracy


def _minimise(x_PF: Tensor, scale_F: Tensor, penalty: float) -> Tensor:
    scaled_F = torch.zeros_like(scale_F, requires_grad=True)
    optimizer = torch.optim.LBFGS([scaled_F], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = F.softplus(-(x_PF @ (scaled_F / scale_F))).mean()
            value = value + penalty / 2 * scaled_F.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (scaled_F / scale_F).detach()


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+|[^\w\s]", text.lower()))
