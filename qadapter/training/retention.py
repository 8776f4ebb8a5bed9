"""The retention term: KL(π‖π̃) at states of unrelated text joins the loss.

What the frozen base says there is computed once. Write g = ∂lse(b)/∂h_b = logit_scale·Wᵀπ, a
constant of the base at each state; then E_π[a] = E_π[b] + (h_a − h_b)·g, and

    KL(π‖π̃) = E_π[b] − lse(b) − E_π[u] + lse(u),    u = (q + α₀·b)/α̃ = w_a·a + w_b·b

needs one product with W forward (lse(u)) and one backward (π̃W): its gradient in h_a is
w_a·(Σ π̃ W − Σ π W)·logit_scale. For a head adapter that is all; for LoRA the adapted trunk runs
over the texts drawn, from its first adapted block on. Ours, not the paper's (design §5).

Shapes: M states of all texts, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qadapter.data import check_sequences
from qadapter.data.passages import BUILT_IN, passages
from qadapter.data.rows import rows_of
from qadapter.data.vocabulary import configured_positions
from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterModel
from qadapter.system.progress import Progress
from qadapter.system.room import available_memory, size
from qadapter.system.textfiles import check_unicode
from qadapter.trunk.lm_head import input_device
from qadapter.trunk.packing import Packing, can_pack
from qadapter.trunk.sharding import within
from qadapter_kernels import Coefficients

_BASE = Coefficients(alpha_0=0.0)
"""Coefficients under which the adapted stream's value is its log-sum-exp."""
_CHUNK_ROWS = 1024
_BATCH_TOKENS = 2048


def check_head(model: QAdapterModel) -> None:
    """Raises QAdapterError where the term can't be computed through the model's head."""
    if model.head.softcap is not None:
        raise QAdapterError(
            "retention_coef needs a head without a softcap: E_π of capped logits is not linear"
        )


def scored_sequences(
    model: QAdapterModel, tokenizer: PreTrainedTokenizerBase | None,
    texts: Iterable[str] | Iterable[tuple[list[int], list[int]]], max_length: int | None,
) -> list[tuple[int, list[int]]]:
    """Of each text with a token to score its first state that counts and its token ids; arguments
    as RetentionStates'.

    Raises:
        QAdapterError: there is no such text; a token that the model does not know.
    """
    read = [
        ([], tokenizer(text)["input_ids"]) if isinstance(text, str) else text for text in texts
    ]
    # Learned positions end where the base's do.
    most = min((x for x in (max_length, configured_positions(model)) if x), default=None)
    sequences = [[*prompt, *answer][:most] for prompt, answer in read]
    check_sequences(sequences, model, tokenizer, "retention text")
    firsts = [max(len(prompt) - 1, 0) for prompt, _ in read]
    found = [x for x in zip(firsts, sequences, strict=True) if len(x[1]) > x[0] + 1]
    if not found:
        raise QAdapterError("the retention texts hold no text of two tokens or more")
    return found


class RetentionStates:
    """States of unrelated text and what the frozen base says there.

    Args:
        model: its base runs once over the texts.
        texts: strings, every token but the first of each is predicted from a state; or (prompt ids,
            answer ids), where the answer's tokens are.
        tokenizer: for strings.
        max_length: most tokens of a text; no more than the base has positions for.
        packed: run texts in one row, where the base's attention can.
        progress: called with (texts done, of how many).

    Raises:
        QAdapterError: no text of two tokens or more; more states than there is memory for; a model
            this term can't be computed for.
    """

    def __init__(
        self, model: QAdapterModel, tokenizer: PreTrainedTokenizerBase | None,
        texts: Iterable[str] | Iterable[tuple[list[int], list[int]]], *,
        max_length: int | None = 1024, packed: bool = True, progress: Progress | None = None,
    ) -> None:
        check_head(model)
        scored = scored_sequences(model, tokenizer, texts, max_length)
        self.texts = [torch.tensor(ids) for _, ids in scored]
        """Token ids of each text."""
        self.first = [first for first, _ in scored]
        """The first state of each text that counts: the one its first scored token is predicted
        from."""
        _check_room(model, self.texts, self.first)
        self.packed = packed and can_pack(model.base, max(map(len, self.texts)),
                                          gradients=model.adapts_trunk) is None
        self.entering: list[Tensor] | None = None
        """Of each text the states that enter the first adapted block, [T, D], on the CPU."""
        features = self._read(model, progress)
        self.features_MD = torch.cat(features)
        counts = torch.tensor([len(x) for x in features])
        self.offsets = nn.functional.pad(counts.cumsum(0), (1, 0)).tolist()
        pieces = [
            self._constants(model, model.base_stream(x).detach())
            for x in self.features_MD.split(_CHUNK_ROWS)
        ]
        self.base_lse_M, self.base_mean_M, self.gradient_MD = (
            torch.cat(x) for x in zip(*pieces, strict=True)
        )

    def __len__(self) -> int:
        return len(self.features_MD)

    @torch.no_grad()
    def _read(self, model: QAdapterModel, progress: Progress | None) -> list[Tensor]:
        """The base's features at the states that count, of each text."""
        device = input_device(model.base)
        features: list[Tensor] = []
        entering: list[Tensor] = []
        for texts in _batches(self.texts):
            packing = Packing.of(texts, device)
            features_MD, entering_MD = model.packed_base(packing, packed=self.packed)
            if entering_MD is not None:
                entering += [entering_MD.to("cpu")[line] for line in packing.lines]
            for line in packing.lines:
                first = self.first[len(features)]
                features.append(features_MD[line[first:-1].to(features_MD.device)])
            if progress is not None:
                progress(len(features), len(self.texts))
        self.entering = entering or None
        return features

    def _follow(self, model: QAdapterModel) -> None:
        """What is kept goes where the model is now."""
        device = model.head.device
        if self.features_MD.device == device:
            return
        for name in ("features_MD", "base_lse_M", "base_mean_M", "gradient_MD"):
            setattr(self, name, getattr(self, name).to(device))

    @staticmethod
    def _constants(model: QAdapterModel, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """lse(b), E_π[b] and g."""
        no_action = torch.full((len(hidden),), -1, device=hidden.device)
        with torch.enable_grad():
            leaf = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
            leaf.requires_grad_()
            soft, statistics = model.soft_value(
                leaf, hidden, no_action, _BASE, return_statistics=True
            )
            (gradient,) = torch.autograd.grad(soft.value.sum(), leaf)
        lse = soft.value.detach()
        return lse, lse - statistics.entropy, gradient

    def divergence(self, model: QAdapterModel, states: Tensor) -> Tensor:
        """KL(π‖π̃) of the trained policy at the given states [n], nats; differentiable.

        16-bit products leave an error of the size of their rounding (about 1e-3 on a CPU).
        """
        return within(model.base, lambda: self._divergence(model, states))

    def _divergence(self, model: QAdapterModel, states: Tensor) -> Tensor:
        self._follow(model)
        places, states = states, states.to(self.features_MD.device)
        features, base_lse = self.features_MD[states], self.base_lse_M[states]
        hidden = model.base_stream(features)
        if model.adapts_trunk:
            adapter_hidden = self._run_trunk(model, places)
        else:
            adapter_hidden = model.adapter(features)
        coef = model.objective.coefficients
        soft = model.soft_value(
            adapter_hidden, hidden, torch.full_like(states, -1), base_logsumexp=base_lse
        )
        policy_lse = (soft.value + coef.alpha_0 * base_lse) / coef.alpha_tilde
        weight_a = coef.adapter_coef / coef.alpha_tilde
        weight_b = coef.base_weight / coef.alpha_tilde
        base_mean = self.base_mean_M[states]
        shift = ((adapter_hidden - hidden) * self.gradient_MD[states]).sum(-1)
        policy_mean = weight_a * (base_mean + shift) + weight_b * base_mean
        return base_mean - base_lse - policy_mean + policy_lse

    def loss(self, model: QAdapterModel, num_states: int, seed: int) -> Tensor:
        """Mean divergence at states drawn by ``seed``, 0-d: ``num_states`` of them anywhere for a
        head adapter; for LoRA those of whole texts, until there are as many (the last is cut)."""
        generator = torch.Generator().manual_seed(seed)
        if model.adapts_trunk:
            order = torch.randperm(len(self.texts), generator=generator).tolist()
            drawn = [torch.arange(self.offsets[i], self.offsets[i + 1]) for i in order]
            states = torch.cat(drawn)[:num_states]
        else:
            states = torch.randint(len(self), (num_states,), generator=generator)
        return self.divergence(model, states).mean()

    def _run_trunk(self, model: QAdapterModel, states: Tensor) -> Tensor:
        """The adapted stream's hidden states [n, D]; runs each text once, up to its last state."""
        places = states.tolist()
        owner = torch.bucketize(states.cpu(), torch.tensor(self.offsets[1:]), right=True).tolist()
        needed: dict[int, int] = {}
        for place, text in zip(places, owner, strict=True):
            end = self.first[text] + place - self.offsets[text] + 1
            needed[text] = max(needed.get(text, 0), end)
        number = {text: n for n, text in enumerate(needed)}
        device = input_device(model.base)
        packing = Packing.of(
            [self.texts[text][:end] for text, end in needed.items()],
            share=not model.adapter.drops,
        )
        entering_MD = None
        if self.entering is not None:
            entering_MD = packing.collect(
                [self.entering[text][:end] for text, end in needed.items()]
            ).to(device)
        hidden_MD = model.packed_hidden(
            packing.to(device), packed=self.packed, entering_ND=entering_MD
        )
        at = [
            packing.lines[number[text]][self.first[text] + place - self.offsets[text]]
            for place, text in zip(places, owner, strict=True)
        ]
        return hidden_MD[torch.stack(at).to(hidden_MD.device)]


def _batches(texts: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Of texts in their order, about ``_BATCH_TOKENS`` each."""
    start, tokens = 0, 0
    for number, ids in enumerate(texts):
        if tokens and tokens + len(ids) > _BATCH_TOKENS:
            yield texts[start:number]
            start, tokens = number, 0
        tokens += len(ids)
    yield texts[start:]


def _check_room(model: QAdapterModel, texts: Sequence[Tensor], first: Sequence[int]) -> None:
    """Refuse states that there is no memory for, before the base reads them."""
    head = model.head
    num_states = sum(len(ids) - 1 - n for ids, n in zip(texts, first, strict=True))
    itemsize = head.dtype.itemsize + torch.promote_types(head.dtype, torch.float32).itemsize
    needed = 2 * num_states * head.shape[1] * itemsize  # twice: they are joined in the end
    if head.device.type == "cuda":
        room = torch.cuda.mem_get_info(head.device)[0]
    else:
        room = available_memory()
    if needed > room:
        raise QAdapterError(
            f"the retention texts hold {num_states:,} states, which take {size(needed)}, and "
            f"{size(room)} of memory are available: take fewer of them (retention_dataset_name, "
            "retention_dataset) or a lower max_length"
        )


def as_texts(
    dataset: str | Dataset | Iterable[str] | Iterable[tuple[list[int], list[int]]]
) -> list[str] | list[tuple[list[int], list[int]]]:
    """Texts of a dataset, frame or dict with a ``text`` column, or of an iterable; (prompt ids,
    answer ids) are texts too. ``built-in``: the library's own passages."""
    if isinstance(dataset, str) and dataset == BUILT_IN:
        return passages(held_to=True)
    if isinstance(dataset, str | Path):
        raise QAdapterError(f"retention_dataset is a name, {str(dataset)!r}: read_texts reads it")
    if isinstance(dataset, Dataset | IterableDataset | Mapping) or hasattr(dataset, "iloc"):
        rows = rows_of(dataset, ["text"])
        if "text" not in rows.columns:
            there = ", ".join(map(str, rows.columns))
            raise QAdapterError(f"retention_dataset needs a column text, it has {there}")
        dataset = (row.get("text") for row in rows.take({"text": "text"}))
    texts = list(dataset)
    for number, text in enumerate(texts):
        ids = isinstance(text, tuple) and len(text) == 2
        if not isinstance(text, str) and not ids:
            raise QAdapterError(
                f"retention_dataset: row {number} is {type(text).__name__}, not text"
            )
    check_unicode(texts, "retention text")
    return texts
