"""The retention term: KL(π‖π̃) at states of unrelated text joins the loss.

With a frozen trunk it is nearly free. Write g = ∂lse(b)/∂h_b = logit_scale·Wᵀπ, a constant of the
base at each state; then E_π[a] = E_π[b] + (h_a − h_b)·g, and

    KL(π‖π̃) = E_π[b] − lse(b) − E_π[u] + lse(u),    u = (q + α₀·b)/α̃ = w_a·a + w_b·b

needs one product with W forward (lse(u)) and one backward (π̃W): its gradient in h_a is
w_a·(Σ π̃ W − Σ π W)·logit_scale. Ours, not the paper's (design §5).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.model import QAdapterModel
from qadapter_kernels import Coefficients

_BASE = Coefficients(alpha_0=0.0)
"""Coefficients under which the adapted stream's value is its log-sum-exp."""
_CHUNK_ROWS = 1024


class RetentionStates:
    """States of unrelated text and what the frozen base says there.

    Shapes: M states, D hidden.

    Args:
        model: a head adapter's; its base runs once over the texts.
        texts: strings; every token but the first of each is predicted from a state.
        max_length: most tokens of a text.

    Raises:
        QAdapterError: no text of two tokens or more; a model this term can't be computed for.
    """

    def __init__(
        self, model: QAdapterModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *,
        max_length: int | None = 1024,
    ) -> None:
        if model.head.softcap is not None:
            raise QAdapterError(
                "retention_coef needs a head without a softcap: E_π of capped logits is not linear"
            )
        hidden = []
        for text in texts:
            ids = tokenizer(text)["input_ids"][:max_length]
            if len(ids) > 1:
                ids_1T = torch.tensor([ids], device=model.head.weight.device)
                hidden.append(model.base_hidden(ids_1T)[0, :-1])
        if not hidden:
            raise QAdapterError("the retention texts hold no text of two tokens or more")
        self.hidden_MD = torch.cat(hidden)
        pieces = [self._constants(model, h) for h in self.hidden_MD.split(_CHUNK_ROWS)]
        self.base_lse_M, self.base_mean_M, self.gradient_MD = (
            torch.cat(x) for x in zip(*pieces, strict=True)
        )

    def __len__(self) -> int:
        return len(self.hidden_MD)

    @staticmethod
    def _constants(model: QAdapterModel, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """lse(b), E_π[b] and g."""
        no_action = torch.full((len(hidden),), -1, device=hidden.device)
        with torch.enable_grad():
            leaf = hidden.detach().float().requires_grad_()
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
        hidden, base_lse = self.hidden_MD[states], self.base_lse_M[states]
        adapter_hidden, coef = model.adapter(hidden), model.objective.coefficients
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
        """Mean divergence at ``num_states`` states drawn by ``seed``, 0-d."""
        generator = torch.Generator().manual_seed(seed)
        states = torch.randint(len(self), (num_states,), generator=generator)
        return self.divergence(model, states.to(self.hidden_MD.device)).mean()


def as_texts(dataset: Dataset | Iterable[str]) -> list[str]:
    """Texts of a dataset with a ``text`` column, or of an iterable of strings."""
    if isinstance(dataset, Dataset):
        if "text" not in dataset.column_names:
            raise QAdapterError(
                f"retention_dataset needs a column text, it has {', '.join(dataset.column_names)}"
            )
        dataset = dataset["text"]
    texts = list(dataset)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise QAdapterError(
                f"retention_dataset: row {number} is {type(text).__name__}, not text"
            )
    return texts
