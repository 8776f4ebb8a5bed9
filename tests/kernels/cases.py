"""Cases and yardsticks of the kernel tests.

A result is judged against the definition in float64 on the same stored inputs, and may be off by
twice what plain PyTorch loses there plus a few roundings (design §6):

    |ours − fp64| ≤ 2·|eager − fp64| + eps

At the logits level eager works in float32 on the upcast inputs, because that is what a kernel
promises (float32 accumulation); at the hidden level eager's products are of the inputs' dtype, as
ours are, and everything after them is float32.

Shapes: N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qadapter_kernels import Coefficients, dispatch, linear_soft_value, reference, soft_value

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32_EPS = torch.finfo(torch.float32).eps

COEFFICIENTS = {
    "policy": Coefficients(1.0, 1.0, 1.0, -1.0),  # the default: the base has no weight in u
    "policy_dial": Coefficients(0.5, 2.0, 1.0, -1.0),  # other α's than it was trained with
    "policy_small": Coefficients(0.1, 0.05, 0.05, -0.1),
    "q": Coefficients(0.01, 1.0, 1.0, 0.0),  # the authors'
    "q_without_base": Coefficients(0.0, 0.5, 1.0, 0.0),
}

CPU_BACKENDS = tuple(
    name for name in dispatch.PREFERENCE["cpu"]
    if dispatch.load(name).unavailable_reason("cpu") is None
)
"""The backends that serve CPU tensors here, not counting Triton's interpreter."""


class Case(NamedTuple):
    """Inputs of the logits level, with upstream gradients."""

    adapter_logits: Tensor
    base_logits: Tensor
    actions: Tensor
    grad_q: Tensor
    grad_v: Tensor
    coef: Coefficients


class Result(NamedTuple):
    q_action: Tensor
    value: Tensor
    base_logprob: Tensor
    base_logsumexp: Tensor
    grad: Tensor


class LinearCase(NamedTuple):
    """Inputs of the hidden level, with upstream gradients."""

    adapter_hidden: Tensor
    base_hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    actions: Tensor
    grad_q: Tensor
    grad_v: Tensor
    coef: Coefficients


def logits_case(
    rows: int = 5, vocab: int = 130, dtype: torch.dtype = torch.float32, scale: float = 4.0,
    coef: Coefficients = COEFFICIENTS["q"], seed: int = 0, device: str = "cpu",
) -> Case:
    """Random logits; the first row's action is the last column, the third row has none."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    actions = torch.randint(vocab, (rows,), generator=generator, device=device)
    actions[:1] = vocab - 1
    actions[2:3] = -1
    return Case(
        (scale * normal(rows, vocab)).to(dtype), (scale * normal(rows, vocab)).to(dtype),
        actions, normal(rows), normal(rows), coef,
    )


def linear_case(
    rows: int = 7, vocab: int = 130, hidden: int = 48, dtype: torch.dtype = torch.float32,
    scale: float = 4.0, coef: Coefficients = COEFFICIENTS["q"], bias: bool = False,
    logit_scale: float = 1.0, seed: int = 0, device: str = "cpu",
) -> LinearCase:
    """Hidden states and a head whose logits have a standard deviation of ``scale``; the adapted
    stream is the base's with a change, as an adapter leaves it."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    base = normal(rows, hidden)
    weight = scale / logit_scale / hidden**0.5 * normal(vocab, hidden)
    actions = torch.randint(vocab, (rows,), generator=generator, device=device)
    actions[:1] = vocab - 1
    actions[2:3] = -1
    return LinearCase(
        (base + 0.3 * normal(rows, hidden)).to(dtype), base.to(dtype), weight.to(dtype),
        normal(vocab).to(dtype) if bias else None, logit_scale, actions,
        normal(rows), normal(rows), coef,
    )


# --- three ways to the same numbers -----------------------------------------------------------


def plain_soft_value(
    a_NV: Tensor, b_NV: Tensor, actions: Tensor, coef: Coefficients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch with the one-product algebra, all in the logits' dtype. Finite logits only."""
    u_NV = (coef.adapter_coef * a_NV + (coef.base_coef + coef.alpha_0) * b_NV) / coef.alpha_tilde
    base_lse_N = b_NV.logsumexp(-1)
    value_N = coef.alpha_tilde * u_NV.logsumexp(-1) - coef.alpha_0 * base_lse_N
    column = actions.clamp_min(0)[:, None]
    q_N = (coef.adapter_coef * a_NV + coef.base_coef * b_NV).gather(1, column)[:, 0]
    logprob_N = b_NV.log_softmax(-1).gather(1, column)[:, 0]
    return q_N * (actions >= 0), value_N, logprob_N * (actions >= 0), base_lse_N


def _finish(outputs: tuple[Tensor, ...], leaf: Tensor, case: Case | LinearCase) -> Result:
    q, value = outputs[:2]
    (grad,) = torch.autograd.grad(
        [q, value], leaf, [case.grad_q.to(q.dtype), case.grad_v.to(value.dtype)]
    )
    return Result(*(x.detach() for x in outputs[:4]), grad)


def eager(case: Case, dtype: torch.dtype = torch.float32) -> Result:
    a = case.adapter_logits.detach().to(dtype).requires_grad_()
    b = case.base_logits.to(dtype)
    return _finish(plain_soft_value(a, b, case.actions, case.coef), a, case)


def definition(case: Case) -> Result:
    """The definition in float64, its gradient by autograd."""
    a = case.adapter_logits.detach().double().requires_grad_()
    outputs = reference.soft_value(a, case.base_logits.double(), case.actions, case.coef)
    return _finish(outputs, a, case)


def ours(case: Case, backend: str, **options) -> Result:
    a = case.adapter_logits.detach().requires_grad_()
    outputs = soft_value(
        a, case.base_logits, case.actions, **case.coef._asdict(), backend=backend, **options
    )
    return _finish(outputs, a, case)


def linear_eager(case: LinearCase) -> Result:
    """Two products in the inputs' dtype, everything after them in float32."""
    h = case.adapter_hidden.detach().requires_grad_()
    a, b = (
        case.logit_scale * F.linear(x, case.weight, case.bias).float()
        for x in (h, case.base_hidden)
    )
    return _finish(plain_soft_value(a, b, case.actions, case.coef), h, case)


def linear_definition(case: LinearCase) -> Result:
    h = case.adapter_hidden.detach().double().requires_grad_()
    bias = None if case.bias is None else case.bias.double()
    outputs = reference.linear_soft_value(
        h, case.base_hidden.double(), case.weight.double(), case.actions, case.coef, bias,
        case.logit_scale,
    )
    return _finish(outputs, h, case)


def linear_ours(case: LinearCase, backend: str, **options) -> Result:
    h = case.adapter_hidden.detach().requires_grad_()
    outputs = linear_soft_value(
        h, case.base_hidden, case.weight, case.actions, **case.coef._asdict(), bias=case.bias,
        logit_scale=case.logit_scale, backend=backend, **options,
    )
    return _finish(outputs, h, case)


# --- yardsticks -------------------------------------------------------------------------------


def error(x: Tensor, exact: Tensor) -> Tensor:
    """|x − exact|, elementwise; equal infinities are no error, a NaN is an infinite one."""
    difference = (x.double() - exact.double()).abs()
    difference = torch.where(x.double() == exact.double(), 0.0, difference)
    return difference.nan_to_num(nan=torch.inf)


def assert_close_as_eager(
    x: Tensor, exact: Tensor, eager: Tensor, scale: float, name: str = "", ulps: float = 8.0,
    given: float = 0.0,
) -> None:
    """``scale``: size of the numbers that were added up to get here; eps is ``ulps`` float32
    roundings of it, half a rounding of x's own dtype where that is a 16-bit one, and ``given``."""
    if exact.numel() == 0:
        assert x.numel() == 0
        return
    own = torch.finfo(x.dtype)
    rounding = (own.eps / 2 * exact.abs() + own.smallest_normal * own.eps) if own.bits < 32 else 0.0
    allowed = 2 * error(eager, exact).max() + ulps * FLOAT32_EPS * scale + rounding + given
    off = error(x, exact)
    assert (off <= allowed).all(), (
        f"{name}: off by {off.max():.3e}, eager by {error(eager, exact).max():.3e}, "
        f"allowed {torch.as_tensor(allowed).min():.3e}"
    )


def _size(x: Tensor) -> float:
    x = x.double()[torch.isfinite(x)]
    return float(x.abs().max()) if x.numel() else 0.0


def check_logits(result: Result, case: Case, exact: Result | None = None) -> None:
    """A backend's result against float64 and float32 eager (finite logits)."""
    exact, plain, coef = exact or definition(case), eager(case), case.coef
    size_a, size_b = 1 + _size(case.adapter_logits), 1 + _size(case.base_logits)
    scale = abs(coef.adapter_coef) * size_a + (abs(coef.base_coef) + coef.alpha_0) * size_b
    scales = Result(
        scale, scale, size_b, size_b,
        # p = exp(u − lse) is off by p times the rounding of u
        abs(coef.adapter_coef) * scale / coef.alpha_tilde
        * max(_size(case.grad_q), _size(case.grad_v)),
    )
    for name, x, y, z, s in zip(Result._fields, result, exact, plain, scales, strict=True):
        assert_close_as_eager(x, y, z, s, name)


def check_linear(result: Result, case: LinearCase) -> None:
    """The same at the hidden level: ours may lose twice what eager's products lose."""
    exact, plain, coef = linear_definition(case), linear_eager(case), case.coef
    upstream = max(_size(case.grad_q), _size(case.grad_v))
    base = _size(exact.base_logsumexp) + 1
    size = _size(exact.value) + _size(exact.q_action) + coef.alpha_0 * base
    grad_scale = abs(coef.adapter_coef) * upstream * _size(case.weight) * case.logit_scale
    scales = Result(size, size, base, base, grad_scale * (1 + size / coef.alpha_tilde))
    lost = _lost_by_rounding_logits(case, grad_scale)
    for name, x, y, z, s, given in zip(Result._fields, result, exact, plain, scales, lost,
                                       strict=True):
        assert_close_as_eager(x, y, z, s, name, given=given)


def _lost_by_rounding_logits(case: LinearCase, grad_scale: float) -> Result:
    """The most that rounding every logit once to 16 bits can do. Eager's products lose it too, but
    with a few logits they may happen to lose none of it; a log-sum-exp moves by no more than its
    largest logit does."""
    dtype = torch.finfo(case.weight.dtype)
    if dtype.bits > 16:
        return Result(0.0, 0.0, 0.0, 0.0, 0.0)
    weight, half, coef = case.weight.double(), dtype.eps / 2, case.coef
    a, b = (
        half * case.logit_scale * _size(h.double() @ weight.t())
        for h in (case.adapter_hidden.detach(), case.base_hidden)
    )
    both = abs(coef.adapter_coef) * a + (abs(coef.base_coef) + 2 * coef.alpha_0) * b
    # p is off by no more than its logits, and rounded itself before its product with W.
    return Result(both, both, 2 * b, b, grad_scale * (both / coef.alpha_tilde + half))


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: NaN-safe, and tells 0 from −0."""
    return x.detach().reshape(-1).contiguous().view(torch.uint8)


def same_bits(x, y) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(x, y, strict=True))
