"""Random inputs of every operator on every backend there is, against float64.

    python tests/kernels/fuzz.py --seconds 600                  # as many as fit, from seed 0 on
    python tests/kernels/fuzz.py --trial soft_value:123         # one of them again

A trial is an operator and a seed; both together fix every shape, number, stride and option. What is
expected is worked out here, in float64 and apart from the library's own definition, which is one of
those that are tried (as "torch" in float64). The rules at the edges, for every number that is put
out and every one that it is made of:

- NaN in is NaN out, whatever else is excluded; a gradient is NaN in every column that is not;
- −inf in a stream that counts excludes the column; a row without any other has V = lse = −inf,
  gradient 0, statistics 0 (but is infinitely far from a row that has some);
- +inf gives no finite V or lse; rows masked out give 0 and get 0, whatever they hold;
- all else is as near to float64 as float32 arithmetic on numbers of this size can be, and rows of
  a softmax sum to 1 whatever offset their logits have in common.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import interpreter  # noqa: F401  first: it decides how triton is imported
import torch
from cases import COEFFICIENTS, DTYPES
from fuzz_inputs import ALL, Draw, served
from fuzz_oracle import (
    INF,
    NAN,
    Failure,
    agree,
    at,
    is_exact,
    log_softmax,
    logsumexp,
    mixed,
    not_finite,
    size_of,
    spread_of,
    statistics,
    value_of,
)
from rows import guarded, guards_hold
from torch import Tensor

from qadapter_kernels import bradley_terry, dispatch, linear_soft_value, soft_value
from qadapter_kernels.reference import LogitHead, ScoreRows
from qadapter_kernels.torch_backend import residual_view


def trial_soft_value(draw: Draw) -> None:
    """With its gradient, statistics, masks, a given lse(b), in place, and with a cached base."""
    (rows, vocab), dtype, coef = draw.shape(), draw.choice(*DTYPES), draw.coefficients()
    a, b = (draw.logits(rows, vocab, dtype, True) for _ in range(2))
    actions, g, v = draw.actions(rows, vocab), draw.upstream(rows), draw.upstream(rows)
    mask = None
    if draw.chance(0.5):
        mask = torch.rand(rows, generator=draw.generator) < 0.7
    want_statistics, in_place = draw.chance(0.6), draw.chance(0.3)
    a64, b64 = a.double(), b.double()
    lse_b = logsumexp(b64)
    given = lse_b.float() if draw.chance(0.3) else None

    # What is expected.
    weight_a, weight_b = coef.adapter_coef / coef.alpha_tilde, coef.base_weight / coef.alpha_tilde
    u = mixed(weight_a, a64, weight_b, b64)
    used_lse_b = lse_b if given is None else given.double()
    q_all = mixed(coef.adapter_coef, a64, coef.base_coef, b64)
    logprob = at(b64, actions) - used_lse_b
    logprob = torch.where((at(b64, actions) == -INF) & ~used_lse_b.isnan(), -INF, logprob)
    wanted = {
        "q": at(q_all, actions), "value": value_of(logsumexp(u), used_lse_b, coef),
        "base_logprob": logprob, "base_logsumexp": used_lse_b, **statistics(u, b64),
    }
    kept = torch.ones(rows, dtype=torch.bool) if mask is None else mask
    acting = kept & (actions >= 0)
    p = log_softmax(u).exp()
    onehot = torch.zeros_like(p).scatter_(1, actions.clamp_min(0)[:, None], 1.0)
    onehot *= (acting & (wanted["q"] != -INF))[:, None]
    grad = coef.adapter_coef * (g.double()[:, None] * onehot + v.double()[:, None] * p)
    dead = (u == -INF) | ~kept[:, None]
    grad = torch.where(dead, 0.0, grad) if coef.adapter_coef else torch.zeros_like(grad)

    # How near float32 can come to it.
    size_a, size_b = size_of(a64), size_of(b64)
    log_v = 1 + torch.log(torch.tensor(float(vocab)))
    both = abs(coef.adapter_coef) * size_a + abs(coef.base_weight) * size_b
    exact_u = is_exact(weight_a, weight_b) and 0 in (weight_a, weight_b)
    lost_u = 0.0 * both if exact_u else both / coef.alpha_tilde  # by rounding u
    lost_v = coef.alpha_tilde * lost_u + (coef.alpha_0 + coef.alpha_tilde) * log_v
    if not is_exact(coef.alpha_0, coef.alpha_tilde):
        lost_v += coef.alpha_tilde * size_of(u) + coef.alpha_0 * size_b
    if given is not None:
        lost_v += coef.alpha_0 * given.abs().nan_to_num(0.0, 0.0, 0.0)
    given_lost = 0.0 if given is None else size_b + given.abs().nan_to_num(0.0, 0.0, 0.0)
    compared = 4 * (lost_u + spread_of(u) + spread_of(b64) + log_v)
    losses = {
        "q": abs(coef.adapter_coef) * size_a + abs(coef.base_coef) * size_b, "value": lost_v,
        "base_logprob": spread_of(b64) + log_v + given_lost, "base_logsumexp": size_b + log_v,
        "entropy": compared, "kl_policy_base": compared, "kl_base_policy": compared,
    }
    lost_p = lost_u[:, None] + (u - u.nan_to_num(-INF, -INF, -INF).amax(-1, True)).abs() + log_v
    lost_grad = abs(coef.adapter_coef) * (
        v.double().abs()[:, None] * p * lost_p.nan_to_num(0.0, 0.0, 0.0)
        + g.double().abs()[:, None] * onehot
    )
    wild_u, wild_b = (u == INF).any(-1), (b64 == INF).any(-1) & (given is None)
    wild_q = ~wanted["q"].isfinite() & (wanted["q"] != -INF)
    for name in wanted:
        keep = acting if name in ("q", "base_logprob") else kept
        wanted[name] = torch.where(keep, wanted[name], 0.0)
    row_sum = (coef.adapter_coef * (torch.where(onehot.bool() & ~dead, g.double()[:, None], 0.0)
                                    .sum(-1) + v.double() * (p.sum(-1) > 0.5) * kept))

    def check(label: str, eps: float, outputs, found_statistics, found_grad) -> None:
        values = dict(zip(wanted, [*outputs, *(found_statistics or ())], strict=False))
        for name, found in values.items():
            wild = {"q": wild_q, "base_logprob": wild_b, "base_logsumexp": wild_b,
                    "value": wild_u | (wild_b & (coef.alpha_0 != 0))}.get(name, wild_u | wild_b)
            if name in ("entropy", "kl_policy_base", "kl_base_policy"):
                wild = wild | (b64 == INF).any(-1)
                # A weight below float32's smallest number excludes, on some backends, as −inf does.
                faint = (wanted[name] == INF) & (spread_of(u) + spread_of(b64) > 60)
                wild = wild | faint
            elif name != "q":
                put_out = acting if name == "base_logprob" else kept
                not_finite(f"{label}: {name}", found[wild & put_out])
            agree(f"{label}: {name}", found[~wild], wanted[name][~wild],
                  (32 * eps * losses[name])[~wild])
        tame = ~wild_u
        own = torch.finfo(found_grad.dtype)
        agree(f"{label}: gradient", found_grad[tame], grad[tame], 32 * eps * lost_grad[tame])
        finite = tame & grad.isfinite().all(-1) & (coef.adapter_coef != 0)
        agree(f"{label}: sum of a gradient's row", found_grad.double().sum(-1)[finite],
              row_sum[finite],
              max(24 * eps, own.eps if own.bits < 32 else 0.0)
              * (abs(coef.adapter_coef) * (v.double().abs() + g.double().abs()))[finite]
              + vocab * own.smallest_normal)

    def run(backend: str, dtype: torch.dtype):
        leaf = a.to(dtype) if dtype == torch.float64 else a.clone() if in_place else a
        leaf = leaf.detach().requires_grad_()
        given_to = leaf * 1 if in_place else leaf
        options = dict(
            row_mask=mask, return_statistics=want_statistics, backend=backend,
            base_logsumexp=given, inplace_backward=in_place, **coef._asdict(),
        )
        out = soft_value(given_to, b.to(dtype), actions, **options)
        outputs, found = out if want_statistics else (out, None)
        (found_grad,) = torch.autograd.grad(outputs[:2], leaf, [g.to(outputs[0].dtype),
                                                                v.to(outputs[0].dtype)])
        return outputs, found, found_grad

    check("torch in float64", 2.0**-42, *run("torch", torch.float64))
    for label, backend in served(draw.rng, ALL):
        check(label, 2.0**-23, *run(backend, dtype))
        if not (guards_hold(a) and guards_hold(b)):
            raise Failure(f"{label}: wrote beside the logits")
        if coef.base_weight == 0 and given is not None and not in_place:
            leaf = a.detach().requires_grad_()
            outputs = soft_value(
                leaf, None, actions, row_mask=mask, backend=backend, base_logsumexp=given,
                base_action_logit=at(b.float(), actions), **coef._asdict(),
            )
            (found_grad,) = torch.autograd.grad(outputs[:2], leaf, [g, v])
            check(f"{label}, base cached", 2.0**-23, outputs, None, found_grad)


def trial_rows(draw: Draw) -> None:
    """The hidden level's row kernel: log-sum-exps, statistics and P′ in place."""
    (rows, vocab), dtype = draw.shape(), draw.choice(*DTYPES)
    z, zb = (draw.logits(rows, vocab, dtype, False) for _ in range(2))
    if draw.chance(0.3):
        zb = None
    actions = draw.actions(rows, vocab)
    actions[torch.rand(rows, generator=draw.generator) < 0.2] = -2
    scale, base_scale = draw.choice(1.0, 0.7, 20.0), draw.choice(1.0, 0.25)
    bias, base_bias = (draw.normal(vocab) if draw.chance(0.4) else None for _ in range(2))
    if bias is not None and draw.chance(0.5):
        bias[torch.rand(vocab, generator=draw.generator) < 0.3] = -INF
    want_statistics = zb is not None and draw.chance(0.6)
    halves = [torch.bfloat16, torch.float16] if dtype == torch.float32 else []
    residual_dtype = draw.choice(None, dtype, *halves)
    exact = None
    if dtype.itemsize == 2 and draw.chance(0.5):
        exact = torch.stack([at(x.float(), actions) * s for x, s in
                             ((z, scale), (z if zb is None else zb, base_scale))])

    def logits(x: Tensor, scale: float, bias: Tensor | None, which: int) -> Tensor:
        out = x.double() * scale
        if bias is not None:
            out = out + bias.double()
        if exact is not None:
            acting = actions >= 0
            out[acting, actions[acting]] = exact[which].double()[acting]
        return out

    kept = actions != -2
    u = logits(z, scale, bias, 0)
    b = u if zb is None else logits(zb, base_scale, base_bias, 1)
    sizes = [32 * 2.0**-23 * (size_of(x) + 1 + torch.log(torch.tensor(float(vocab))))
             for x in (u, b)]
    wanted_statistics = torch.stack([*statistics(u, b).values()])
    residual = log_softmax(u).exp()
    supported = logsumexp(u) != -INF
    acting = (actions >= 0) & supported
    residual[acting, actions[acting]] -= 1.0
    residual = torch.where((kept & supported)[:, None], residual, 0.0)

    for label, backend in served(draw.rng, ALL):
        into = guarded(z, z.stride(0), z.storage_offset())
        stored = residual_dtype or dtype
        lse, base_lse, found = dispatch.load(backend).rows_forward(
            into, zb, actions, scale, bias, base_scale, base_bias, residual_dtype is not None,
            stored, want_statistics, exact,
        )
        agree(f"{label}: lse(u)", lse, torch.where(kept, logsumexp(u), 0.0), sizes[0])
        if zb is not None:
            agree(f"{label}: lse(b)", base_lse, torch.where(kept, logsumexp(b), 0.0), sizes[1])
        if want_statistics:
            faint = (wanted_statistics == INF) & (spread_of(u) + spread_of(b) > 60)
            expected = torch.where(kept, wanted_statistics, 0.0)
            compared = 8 * (sizes[0] + sizes[1] + 2.0**-18 * (spread_of(u) + spread_of(b)))
            agree(f"{label}: statistics", torch.where(faint, expected.float(), found), expected,
                  compared)
        if residual_dtype is None:
            continue
        found = residual_view(into, stored)
        open_ = ~(residual.isnan() & (u == -INF))  # in a row of NaN an excluded column may be any
        agree(f"{label}: P'", torch.where(open_, found, 0.0), torch.where(open_, residual, 0.0),
              (8 * sizes[0])[:, None])
        if dtype == stored and not guards_hold(into):
            raise Failure(f"{label}: wrote beside the logits")


def trial_combine(draw: Draw) -> None:
    """log π̃ and its mixtures with log π, for decoding."""
    (rows, vocab), dtype, coef = draw.shape(), draw.choice(*DTYPES), draw.coefficients()
    a, b = (draw.logits(rows, vocab, dtype, False) for _ in range(2))
    strength = None
    if draw.chance(0.7):
        strength = torch.tensor([draw.choice(0.0, 1.0, 0.5, 2.0, 0.3) for _ in range(rows)])
    weight_a, weight_b = coef.adapter_coef / coef.alpha_tilde, coef.base_weight / coef.alpha_tilde
    u = mixed(weight_a, a.double(), weight_b, b.double())
    wanted = log_softmax(u)
    w = torch.ones(rows) if strength is None else strength
    for i in range(rows):
        if w[i] == 0:
            wanted[i] = log_softmax(b.double()[i : i + 1])[0]
        elif w[i] != 1:
            # u and b in place of log π̃ and log π: a constant a row drops out.
            rowwise = mixed(float(w[i]), u[i : i + 1], float(1 - w[i]), b.double()[i : i + 1])
            wanted[i] = log_softmax(rowwise)[0]
    size = w * (abs(weight_a) * size_of(a.double()) + abs(weight_b) * size_of(b.double()))
    size = size + (1 + w) * size_of(b.double()) + 10
    for label, backend in served(draw.rng, ALL):
        found = dispatch.load(backend).combine_logits(a, b, coef, strength)
        agree(f"{label}: log-probabilities", found, wanted, (16 * 2.0**-23 * size)[:, None])


def trial_linear(draw: Draw) -> None:
    """The hidden level: products in the weight's dtype, chunks, excluded columns, broken states."""
    (rows, vocab), hidden = draw.shape(), draw.choice(1, 8, 48)
    dtype, coef = draw.choice(*DTYPES), draw.coefficients()
    if not coef.adapter_coef:
        coef = COEFFICIENTS["policy"]
    h_b = draw.normal(rows, hidden)
    h_a = h_b + 0.3 * draw.normal(rows, hidden)
    weight = 4 / hidden**0.5 * draw.normal(vocab, hidden)
    for x in (h_a, h_b):
        if draw.chance(0.3):
            x[draw.rng.randrange(rows), draw.rng.randrange(hidden)] = NAN
    broken_head = draw.chance(0.1)  # then every row is NaN, as G' of all of them is
    if broken_head:
        weight[draw.rng.randrange(vocab)] = NAN
    h_a, h_b, weight = h_a.to(dtype), h_b.to(dtype), weight.to(dtype)
    bias = draw.normal(vocab).to(dtype) if draw.chance(0.5) and not broken_head else None
    if bias is not None and draw.chance(0.6):
        bias[torch.rand(vocab, generator=draw.generator) < 0.3] = -INF
    actions, g, v = draw.actions(rows, vocab), draw.upstream(rows), draw.upstream(rows)
    mask = None
    if draw.chance(0.5) and not broken_head:
        mask = torch.rand(rows, generator=draw.generator) < 0.7
    logit_scale, want_statistics = draw.choice(1.0, 0.25), draw.chance(0.4)

    leaf = h_a.double().requires_grad_()
    a, b = (logit_scale * torch.nn.functional.linear(
        h, weight.double(), None if bias is None else bias.double()) for h in (leaf, h_b.double()))
    weight_a, weight_b = coef.adapter_coef / coef.alpha_tilde, coef.base_weight / coef.alpha_tilde
    with torch.no_grad():
        u, lse_b = mixed(weight_a, a, weight_b, b), logsumexp(b)
        q = at(mixed(coef.adapter_coef, a, coef.base_coef, b), actions)
        logprob = at(log_softmax(b), actions)
        kept = torch.ones(rows, dtype=torch.bool) if mask is None else mask
        acting = kept & (actions >= 0)
        p = log_softmax(u).exp()
        slope = v.double()[:, None] * torch.where(u == -INF, 0.0, p)
        taken = torch.where(acting & (q != -INF), g.double(), 0.0)
        slope = slope.scatter_add(1, actions.clamp_min(0)[:, None], taken[:, None])
        grad = coef.adapter_coef * logit_scale * (slope @ weight.double())
        grad = torch.where(u.isnan().any(-1, True), NAN, grad)
        wanted = {
            "q": torch.where(acting, q, 0.0),
            "value": torch.where(kept, value_of(logsumexp(u), lse_b, coef), 0.0),
            "base_logprob": torch.where(acting, logprob, 0.0),
            "base_logsumexp": torch.where(kept, lse_b, 0.0),
            **{name: torch.where(kept, x, 0.0) for name, x in statistics(u, b).items()},
        }
        grad = torch.where(kept[:, None], grad, 0.0)
        # A product may be off by a rounding of each of its terms.
        lost = [(max(torch.finfo(dtype).eps, 2.0**-20) * logit_scale)
                * (h.double().abs().nan_to_num() @ weight.double().abs().nan_to_num().t()).amax(-1)
                + 2.0**-20 * (1 + (0.0 if bias is None else size_of(bias.double()[None])))
                for h in (h_a, h_b)]
        lost_u = abs(weight_a) * lost[0] + abs(weight_b) * lost[1] + 2.0**-20 * size_of(u)
        lost_v = coef.alpha_tilde * (lost_u + 2.0**-20 * size_of(u)) + coef.alpha_0 * lost[1]
        lost_v += 2.0**-20 * (coef.alpha_0 * size_of(b) + coef.alpha_tilde * 10)
        spread = spread_of(u) + spread_of(b) + 10
        compared = 4 * (lost_u + lost[1]) * (1 + spread) + 2.0**-18 * spread
        steep = (g.double().abs() + v.double().abs()) * abs(coef.adapter_coef) * logit_scale
        lost_grad = steep * size_of(weight.double().flatten()[None]) * (
            4 * lost_u + 8 * max(torch.finfo(dtype).eps, 2.0**-20))
    losses = {"q": abs(coef.adapter_coef) * lost[0] + abs(coef.base_coef) * lost[1] + lost_v,
              "value": 2 * lost_v, "base_logprob": 3 * lost[1] + 2.0**-18 * size_of(b),
              "base_logsumexp": lost[1] + 2.0**-20 * size_of(b)}
    for label, backend in served(draw.rng, ALL):
        x = h_a.clone().requires_grad_()
        out = linear_soft_value(
            x, h_b, weight, actions, **coef._asdict(), bias=bias, logit_scale=logit_scale,
            row_mask=mask, return_statistics=want_statistics, backend=backend,
            workspace_mb=draw.choice(512, 0.02),
        )
        soft, found_statistics = out if want_statistics else (out, ())
        (found_grad,) = torch.autograd.grad(soft[:2], x, [g, v])
        for name, found in zip(wanted, [*soft, *found_statistics], strict=False):
            far = (wanted[name] == INF) & (spread > 60)  # a weight that underflows excludes too
            agree(f"{label}: {name}", torch.where(far, wanted[name].float(), found), wanted[name],
                  losses.get(name, compared))
        agree(f"{label}: gradient", found_grad, grad, lost_grad[:, None])


def trial_sample(draw: Draw) -> None:
    """A drawn token is one that the filters leave; none of a row that holds NaN."""
    (rows, vocab), dtype = draw.shape(), draw.choice(*DTYPES)
    logits = draw.logits(rows, vocab, dtype, False)
    top_k, min_p = draw.choice(0, 1, 5, vocab), draw.choice(0.0, 0.1)
    temperature, top_p = draw.choice(0.5, 1.0, 3.0), draw.choice(1.0, 0.9, 0.01)
    x = logits.double()
    dead = x.isnan().any(-1) | (x == -INF).all(-1)
    kth = x.nan_to_num(-INF, INF, -INF).topk(min(top_k or vocab, vocab), -1)[0][:, -1]
    p = log_softmax(x / temperature).exp()
    for label, backend in served(draw.rng, ("triton",)):
        options = temperature, top_k, top_p, min_p, 3, draw.seed
        tokens = dispatch.load(backend).sample(logits, *options)
        if not torch.equal(tokens == -1, dead):
            raise Failure(f"{label}: drew {tokens.tolist()}, nothing can be where {dead.tolist()}")
        taken, at_most = at(x, tokens), at(p, tokens)
        allowed = dead | ((taken >= kth) & (at_most > 0) & (at_most >= 0.99 * min_p * p.amax(-1)))
        # What stands above a survivor of top-p has less than p.
        above = torch.where(x > taken[:, None], p, 0.0).sum(-1)
        allowed &= dead | (above <= top_p + 1e-3)
        if not allowed.all():
            raise Failure(f"{label}: drew {tokens.tolist()}, of which filtered out {(~allowed)}")


def trial_scores(draw: Draw) -> None:
    """Evaluation's row kernel."""
    rows, vocab = draw.shape()
    base = draw.logits(rows, vocab, torch.float32, False)
    difference = draw.choice(0.1, 1.0, 0.0) * draw.normal(rows, vocab)
    if draw.chance(0.2):
        difference[draw.rng.randrange(rows)] = NAN
    difference = None if draw.chance(0.2) else guarded(difference, vocab + draw.choice(0, 3))
    bias = draw.normal(vocab) if draw.chance(0.4) else None
    if bias is not None and draw.chance(0.5):
        bias[torch.rand(vocab, generator=draw.generator) < 0.3] = -INF
    head = LogitHead(draw.choice(1.0, 0.25), bias, draw.choice(None, None, 30.0))
    actions, coef = draw.actions(rows, vocab), draw.choice(None, *COEFFICIENTS.values())
    own = coef or COEFFICIENTS["policy"]
    weights = draw.choice(
        (own.adapter_coef / own.alpha_tilde, own.base_weight / own.alpha_tilde), (0.5, 0.5),
        (2.0, -1.0),
    )
    x = base.double() * head.scale + (0 if bias is None else bias.double())
    d = torch.zeros_like(x) if difference is None else difference.double() * head.scale
    b = x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
    if head.softcap is not None:
        d = head.softcap * torch.tanh((x + d) / head.softcap) - b

    def mixture(weight_a: float, weight_b: float) -> Tensor:
        out = (weight_a + weight_b) * b + weight_a * d
        return torch.where(b == -INF, -INF, out)

    z = b if difference is None else mixture(*weights)
    acting, lse_b = actions >= 0, logsumexp(b)
    found_by_name = {
        "base_logprob": torch.where(acting, at(log_softmax(b), actions), 0.0),
        "base_logsumexp": lse_b,
        "policy_logprob": torch.where(acting, at(log_softmax(z), actions), 0.0),
    }
    if difference is not None:
        compared = statistics(z, b)
        found_by_name |= {name: compared[name] for name in ("kl_base_policy", "kl_policy_base")}
        if coef is not None:
            u = mixture(coef.adapter_coef / coef.alpha_tilde, coef.base_weight / coef.alpha_tilde)
            q = at(mixture(coef.adapter_coef, coef.base_coef), actions)
            found_by_name |= {"q_action": torch.where(acting, q, 0.0),
                              "value": value_of(logsumexp(u), lse_b, coef)}
    largest = sum(map(abs, weights)) + sum(map(abs, own)) + sum(map(abs, own)) / own.alpha_tilde
    size = 64 * 2.0**-23 * (1 + largest) * (size_of(b) + size_of(d) + spread_of(b) + 10)
    holds_nan = (b.isnan() | z.isnan()).any(-1)
    for label, backend in served(draw.rng, ("torch", "cpu", "triton")):
        out = dispatch.load(backend).score_rows(base, difference, actions, head, weights, coef)
        out = ScoreRows(*out)
        for name, wanted in found_by_name.items():
            found = getattr(out, name)
            faint = (wanted == INF) & (spread_of(z) + spread_of(b) > 60)
            agree(f"{label}: {name}", torch.where(faint, wanted.float(), found), wanted, size)
        if difference is not None and out.same_top1[holds_nan].any():
            raise Failure(f"{label}: a row of NaN has the base's top token")


def trial_bradley_terry(draw: Draw) -> None:
    """The sequence loss and its gradients, with what excluded and broken rows hand it."""
    pairs = draw.rng.randint(0, 4)
    lengths = [draw.choice(0, 1, 2, 5, 40) for _ in range(2 * pairs)]
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    rows = int(offsets[-1])
    q, v = (draw.choice(1.0, 10.0) * draw.normal(rows) for _ in range(2))
    for x in (q, v):
        if rows and draw.chance(0.4):
            x[draw.rng.randrange(rows)] = draw.choice(NAN, -INF, -INF)
    options = dict(
        gamma=draw.choice(0.0, 0.9, 1.0), chi2_coef=draw.choice(0.0, 0.1),
        bootstrap=draw.choice("next", "current"), padded_length=50,
        length_normalization=draw.choice("none", "completion", "padded"),
    )
    upstream = draw.choice([1.0, 0.0, 0.0], [0.3, -1.0, 0.5])

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, v)]
        out = bradley_terry(*leaves, offsets, **options, backend=backend)
        loss = sum(w * x for w, x in zip(upstream, out[:3], strict=True) if w)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        grads = [0 * x if g is None else g for x, g in zip(leaves, grads, strict=True)]
        return [x.detach() for x in (*out, *grads)]

    wanted = run(torch.float64, "torch")
    names = ("loss", "preference loss", "χ² loss", "sequence rewards", "token rewards", "∂q", "∂V")
    size = float(sum(size_of(x[None]) for x in (q, v))) if rows else 0.0
    allowed = 2.0**-23 * 64 * (1 + size) ** 2 * (1 + max(lengths, default=0))
    for label, backend in served(draw.rng, ALL):
        for name, x, y in zip(names, run(torch.float32, backend), wanted, strict=True):
            agree(f"{label}: {name}", x, y, allowed)


TRIALS: dict[str, Callable[[Draw], None]] = {
    name.removeprefix("trial_"): trial for name, trial in list(globals().items())
    if name.startswith("trial_")
}


def trial(operator: str, seed: int) -> None:
    """One trial.

    Raises:
        Failure: with how to run it again.
    """
    try:
        TRIALS[operator](Draw(seed))
    except Failure as failure:
        raise Failure(f"{operator}:{seed}: {failure}") from None
    except Exception as error:
        raise Failure(f"{operator}:{seed}: {type(error).__name__}: {error}") from error


class Report(NamedTuple):
    trials: int
    failures: list[str]


def run(seconds: float = float("inf"), first_seed: int = 0, trials: float = float("inf")) -> Report:
    """Every operator with each seed from ``first_seed`` on, until the time or the number is up."""
    end, done, failures, seed = time.monotonic() + seconds, 0, [], first_seed
    while done < trials and time.monotonic() < end:
        for operator in TRIALS:
            try:
                trial(operator, seed)
            except Failure as failure:
                failures.append(str(failure))
            done += 1
        seed += 1
    return Report(done, failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--trial", metavar="OPERATOR:SEED", help="this one alone")
    options = parser.parse_args()
    if options.trial:
        operator, _, seed = options.trial.partition(":")
        trial(operator, int(seed))
        return 0
    report = run(options.seconds, options.seed)
    print(f"{report.trials} trials, {len(report.failures)} failures")
    for failure in report.failures:
        print(failure)
    return bool(report.failures)


if __name__ == "__main__":
    raise SystemExit(main())
