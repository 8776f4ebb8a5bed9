"""What ``fuzz`` expects, in float64 and apart from the library's own definition.

Shapes: rows [N, V] of logits; results [N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from qadapter_kernels import Coefficients

INF, NAN = torch.inf, torch.nan


class Failure(AssertionError):
    """A trial that went wrong; names the operator, its seed, the backend and what differs."""


def mixed(weight_a: float, a: Tensor, weight_b: float, b: Tensor) -> Tensor:
    streams = [(w, x) for w, x in ((weight_a, a), (weight_b, b)) if w != 0]
    total = torch.zeros_like(a)
    for w, x in streams:
        total = total + w * x
    for _, x in streams:
        total = torch.where(x == -INF, -INF, total)
    for _, x in streams:
        total = torch.where(x.isnan(), NAN, total)
    return total


def logsumexp(x: Tensor) -> Tensor:
    return torch.where(x.isnan().any(-1), NAN, x.logsumexp(-1))


def log_softmax(x: Tensor) -> Tensor:
    """NaN throughout where a row holds one; −inf throughout where it has no support."""
    lse = logsumexp(x)[:, None]
    return torch.where(lse.isnan(), NAN, torch.where(x == -INF, -INF, x - lse))


def expectation(logweight: Tensor, values: Tensor) -> Tensor:
    """Σ e^logweight·values; 0 for nothing to weigh with, NaN for a NaN among the weights."""
    terms = torch.where(logweight == -INF, 0.0, logweight.exp() * values)
    terms = torch.where((values == INF) & (logweight > -INF), INF, terms)
    return torch.where(logweight.isnan().any(-1), NAN, terms.sum(-1))


def statistics(u: Tensor, b: Tensor) -> dict[str, Tensor]:
    logp, logpi = log_softmax(u), log_softmax(b)
    return {
        "entropy": expectation(logp, -logp),
        "kl_policy_base": expectation(logp, logp - logpi),
        "kl_base_policy": expectation(logpi, logpi - logp),
    }


def value_of(lse_u: Tensor, lse_b: Tensor, coef: Coefficients) -> Tensor:
    value = coef.alpha_tilde * lse_u
    if coef.alpha_0 != 0:
        value = value - coef.alpha_0 * lse_b
        value = torch.where((lse_u == -INF) & ~lse_b.isnan(), -INF, value)
    return value


def at(x: Tensor, actions: Tensor) -> Tensor:
    return x.gather(1, actions.clamp_min(0)[:, None])[:, 0]


def size_of(x: Tensor) -> Tensor:
    """Largest finite |x| of each row."""
    return x.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1)


def spread_of(x: Tensor) -> Tensor:
    """Distance between the largest and the smallest finite number of each row."""
    high = torch.where(x.isfinite(), x, -INF).amax(-1)
    low = torch.where(x.isfinite(), x, INF).amin(-1)
    return torch.where(high >= low, high - low, 0.0)


def is_exact(*weights: float) -> bool:
    """Products with these lose no digit: 0 or powers of 2."""
    return all(w == 0 or torch.frexp(torch.tensor(w, dtype=torch.float64).abs())[0] == 0.5
               for w in weights)


def agree(name: str, found: Tensor, wanted: Tensor, allowed: Tensor | float) -> None:
    """Elementwise: NaN where NaN is wanted, the same infinity, and within ``allowed`` elsewhere."""
    if found.shape != wanted.shape:
        raise Failure(f"{name}: shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    limit = torch.finfo(found.dtype)
    x, y = found.double(), wanted.double()
    allowed = torch.as_tensor(allowed, dtype=torch.float64).expand_as(y)
    # Of what the result's own type can hold: half a rounding, what underflows, what overflows.
    allowed = allowed + limit.eps * y.abs() + limit.smallest_normal
    right = torch.where(y.isnan(), x.isnan(), (x == y) | ((x - y).abs() <= allowed))
    right |= (y.abs() + allowed > limit.max) & (x.abs() >= limit.max) & ~y.isnan()
    if right.all():
        return
    i = tuple((~right).nonzero()[0].tolist())
    raise Failure(
        f"{name} is wrong at {int((~right).sum())} of {right.numel()} places; at {list(i)} "
        f"{float(x[i])!r}, not {float(y[i])!r} within {float(allowed[i]):.3g}"
    )


def not_finite(name: str, found: Tensor) -> None:
    if found.isfinite().any():
        raise Failure(f"{name} is finite in a row that holds +inf")
