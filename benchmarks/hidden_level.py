"""The hidden-level loss as everybody would compute it: providers, inputs, the exact answer.

One objective for all, at which every provider's mathematics is the same: q is the adapted stream,
α₀ = α̃ = β, γ = 1, no χ² term, V of the action's own state. Then

    h_z = h_a/β + h_b,  log π̃ = log_softmax(W·h_z),  r = q − V = β·(log π̃ − log π)

which is DPO with policy hidden states h_z and reference h_b (design §2, facts 1 and 5). So peers
that know log-probabilities or DPO only compute the same loss and get the one-product algebra; the
eager code of the authors needs no more than they wrote. Nobody gets prompt or padding rows.

Shapes: N rows (states), V vocabulary, D hidden size, 2B sequences (chosen first).
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import FellBack, Head, Unavailable
from torch import Tensor

from qadapter_kernels import bradley_terry, dispatch, linear, linear_soft_value
from qadapter_kernels.reference import Coefficients

BETA = 0.5
COEFFICIENTS = Coefficients(alpha_0=BETA, alpha_tilde=BETA, adapter_coef=1.0, base_coef=0.0)
SEQUENCE_ROWS = 256
TRL_CHUNK = 32_768
"""Vocabulary columns of a tile: what TRL 1.16's trainers pass."""


class Inputs(NamedTuple):
    """What a training step has at hand when the trunk is done."""

    adapter_hidden: Tensor
    base_hidden: Tensor
    weight: Tensor
    actions: Tensor
    offsets: Tensor
    """int64 [2B + 1]."""
    sequences: Tensor
    """Sequence of each row [N]."""
    base_logsumexp: Tensor | None = None
    """Where the base is cached: lse(b) and log π(a) [N]."""
    base_logprob: Tensor | None = None


def make_inputs(head: Head, rows: int, dtype: torch.dtype, device: str, cached: bool) -> Inputs:
    """Synthetic, with logits like a language model's: of standard deviation 2, and the action's own
    raised by 0 to 14, so that some states are sure and others are not."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight = (normal(head.vocab, head.hidden) * (2 / head.hidden**0.5)).to(dtype)
    actions = torch.randint(head.vocab, (rows,), generator=generator, device=device)
    raised = torch.linspace(0, 14, rows, device=device)[:, None]
    base = normal(rows, head.hidden) + weight[actions].float() * (raised / 4)  # |w|² is about 4
    adapter = (normal(rows, head.hidden) * (0.3 * BETA)).to(dtype).requires_grad_()
    pairs = max(1, rows // (2 * SEQUENCE_ROWS))
    lengths = [len(part) for part in torch.arange(rows).tensor_split(2 * pairs)]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    sequences = torch.repeat_interleave(
        torch.arange(2 * pairs, device=device), offsets.diff(), output_size=rows
    )
    inputs = Inputs(adapter, base.to(dtype), weight, actions, offsets, sequences)
    if not cached:
        return inputs
    soft = linear_soft_value(
        inputs.base_hidden, inputs.base_hidden, weight, actions, **COEFFICIENTS._asdict()
    )
    linear._KEPT.memory = None  # whoever measures memory after this starts without a workspace
    return inputs._replace(base_logsumexp=soft.base_logsumexp, base_logprob=soft.base_logprob)


# --- providers ------------------------------------------------------------------------------------
# Each: Inputs → loss, 0-d, differentiable in adapter_hidden.


def preference_loss(rewards_N: Tensor, x: Inputs) -> Tensor:
    """The sequence loss in plain PyTorch."""
    sums_S = rewards_N.new_zeros(len(x.offsets) - 1).index_add(0, x.sequences, rewards_N)
    chosen_B, rejected_B = sums_S.tensor_split(2)
    return -F.logsigmoid(chosen_B - rejected_B).mean()


def eager_authors(x: Inputs) -> Tensor:
    """As the authors wrote it: two products, float32 copies of both logits, log_softmax of one and
    logsumexp of their sum."""
    q_NV = F.linear(x.adapter_hidden, x.weight).float()
    base_logprobs_NV = F.linear(x.base_hidden, x.weight).float().log_softmax(-1)
    value_N = BETA * ((q_NV + BETA * base_logprobs_NV) / BETA).logsumexp(-1)
    q_N = q_NV.gather(1, x.actions[:, None])[:, 0]
    return preference_loss(q_N - value_N, x)


def policy_hidden(x: Inputs) -> Tensor:
    """h_z: added in float32, rounded once."""
    return (x.adapter_hidden.float() / BETA + x.base_hidden.float()).to(x.weight.dtype)


def eager_one_product(x: Inputs) -> Tensor:
    """z = W·h_z instead of two logits in the graph; q of the action by a gather and a dot."""
    policy_lse_N = F.linear(policy_hidden(x), x.weight).float().logsumexp(-1)
    base_lse_N = x.base_logsumexp
    if base_lse_N is None:
        with torch.no_grad():
            base_lse_N = F.linear(x.base_hidden, x.weight).float().logsumexp(-1)
    q_N = (x.adapter_hidden.float() * x.weight[x.actions].float()).sum(-1)
    return preference_loss(q_N - BETA * (policy_lse_N - base_lse_N), x)


def imported(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error


def liger(x: Inputs) -> Tensor:
    """LigerFusedLinearDPOLoss with its defaults (compiled, one pair a chunk)."""
    if x.base_logprob is not None:
        raise Unavailable("takes no cached reference")
    lengths = x.offsets.diff().tolist()

    def padded(x_N: Tensor, value: float) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(x_N.split(lengths), True, value)

    loss = imported("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(
        beta=BETA, use_ref_model=True
    )
    return loss(
        x.weight, padded(policy_hidden(x), 0.0), padded(x.actions, -100),
        ref_input=padded(x.base_hidden, 0.0), ref_weight=x.weight,
    )[0]


def from_logprobs(x: Inputs, logprob: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss through a peer's log-probability of the action, of h_z and (not cached) of h_b."""
    policy_logprob_N = logprob(policy_hidden(x))
    base_logprob_N = x.base_logprob
    if base_logprob_N is None:
        with torch.no_grad():
            base_logprob_N = logprob(x.base_hidden)
    return preference_loss(BETA * (policy_logprob_N - base_logprob_N), x)


LIGER_SCALED = "liger_kernel.ops.fused_linear_scaled_cross_entropy"


def liger_scaled(x: Inputs) -> Tensor:
    """Liger's fused linear scaled cross-entropy: logits that are never written, made once more in
    the backward pass, which forms W's gradient too, wanted or not."""
    cross_entropy = imported(LIGER_SCALED).LigerFusedLinearScaledCrossEntropyFunction
    return from_logprobs(x, lambda hidden: -cross_entropy.apply(hidden, x.weight, x.actions))


def check_liger_scaled(x: Inputs) -> None:
    module = imported(LIGER_SCALED)
    if not x.weight.is_cuda or torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable("its fused kernel is for Hopper GPUs; elsewhere PyTorch serves it")
    try:
        chosen = module._resolve_implementation(x.weight.device).__name__
    except ImportError as error:
        raise Unavailable(f"its kernel's compiler is not installed: {error}") from error
    if chosen != "LigerFusedScaledCrossEntropySM90Function":
        raise FellBack(f"{chosen} serves, not the kernel for Hopper GPUs")


class QuackRows(torch.autograd.Function):
    """−log π of each row by quack's chunked linear cross-entropy with a frozen W: a product, a row
    kernel and the gradient's product a chunk. What it hands out is each row's loss and the gradient
    of that loss by the row's hidden state, so any upstream gradient is a factor of the row."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, actions: Tensor) -> Tensor:
        chunked = imported("quack.linear_cross_entropy").chunked_linear_cross_entropy_fwd
        need = ctx.needs_input_grad[0]
        losses_N, gradient_ND, *_ = chunked(
            hidden, weight, actions, need_dx=need, need_dw=False
        )
        ctx.save_for_backward(gradient_ND)
        return losses_N

    @staticmethod
    def backward(ctx, upstream_N: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (upstream_N[:, None] * gradient_ND).to(gradient_ND.dtype), None, None


def quack(x: Inputs) -> Tensor:
    return from_logprobs(x, lambda hidden: -QuackRows.apply(hidden, x.weight, x.actions))


def check_quack(x: Inputs) -> None:
    if not x.weight.is_cuda:
        raise Unavailable("its row kernel needs a GPU")
    imported("quack.linear_cross_entropy")
    if len(x.actions) % 8:
        raise Unavailable("wants a multiple of 8 rows")


def torch_linear(x: Inputs) -> Tensor:
    """PyTorch's own, in its chunks, with a loss for every row."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"PyTorch {torch.__version__} has none: it came with 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return from_logprobs(x, lambda hidden: -F.linear_cross_entropy(
        hidden, x.weight, x.actions, reduction="none", options=options
    ))


def check_torch_linear(x: Inputs) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="linear_cross_entropy: ")
        try:
            torch_linear(few_rows(x))
        except UserWarning as warning:
            raise FellBack(f"the chunks don't serve: {warning}") from warning


def trl(x: Inputs) -> Tensor:
    """TRL's chunked log-probability kernel (its PyTorch path where there is no GPU)."""
    chunked = imported("trl.kernels").ChunkedLogProbFunction
    return from_logprobs(x, lambda hidden: chunked.apply(
        hidden, x.weight, None, x.actions, 1.0, TRL_CHUNK, None, 1.0, ()
    )[0])


def check_trl(x: Inputs) -> None:
    if x.weight.is_cuda and not imported("trl.kernels.chunked_logprob")._use_triton(
        x.weight.device
    ):
        raise FellBack("PyTorch folds its tiles, not its Triton kernel")


def cut_cross_entropy(x: Inputs, impl: str) -> Tensor:
    """Apple's cut-cross-entropy, with its default gradient filter. PyPI's 25.1.1 has no
    return_lse; its per-token loss is −log π̃, which is all that this objective needs."""
    cross_entropy = imported("cut_cross_entropy").linear_cross_entropy
    if impl == "cce" and not x.weight.is_cuda:
        raise Unavailable("its Triton kernels need a GPU")
    return from_logprobs(x, lambda hidden: -cross_entropy(
        hidden, x.weight, x.actions, reduction="none", impl=impl
    ))


def ours(x: Inputs, backend: str | None = None) -> Tensor:
    soft = linear_soft_value(
        x.adapter_hidden, x.base_hidden, x.weight, x.actions, **COEFFICIENTS._asdict(),
        base_logsumexp=x.base_logsumexp, backend=backend,
    )
    return bradley_terry(
        soft.q_action, soft.value, x.offsets, gamma=1.0, bootstrap="current", backend=backend
    ).loss


def check_ours(x: Inputs) -> None:
    """On a GPU, where nothing but a kernel would be a result."""
    for said in dispatch.serving(x.weight.device.type) if x.weight.is_cuda else ():
        if said.operator in ("linear_soft_value", "bradley_terry") and said.is_fallback:
            raise FellBack(f"{said.backend} serves {said.operator}: {said.reason}")


def few_rows(x: Inputs) -> Inputs:
    """The first and the last row, as a pair."""
    ends = torch.tensor([0, -1], device=x.actions.device)
    return Inputs(
        x.adapter_hidden.detach()[ends], x.base_hidden[ends], x.weight, x.actions[ends],
        torch.arange(3, device=ends.device), torch.arange(2, device=ends.device),
    )


class Provider(NamedTuple):
    loss: Callable[[Inputs], Tensor]
    compiled: bool = False
    """Compiles for a shape, by torch.compile."""
    cacheable: bool = True
    """Can use a cached base."""
    logits_bytes: int = 0
    """Rough peak in bytes for each of the N·V logits; decides whether it is tried at all."""
    check: Callable[[Inputs], None] = lambda x: None
    """Raises Unavailable, or FellBack where another path would serve than the one that is meant."""


def providers(device: str) -> dict[str, Provider]:
    """By name, ours first. Ours without a backend is what users get."""
    others = [
        name for name in dispatch.PREFERENCE[device]
        if name != dispatch.default(device).NAME
        and dispatch.load(name).unavailable_reason(device) is None
    ]
    # The whole of it or nothing: a part left out would run eagerly.
    compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True)
    return {
        "ours": Provider(ours, check=check_ours),
        **{f"ours ({name})": Provider(functools.partial(ours, backend=name)) for name in others},
        "eager, authors": Provider(eager_authors, cacheable=False, logits_bytes=28),
        "eager, one product": Provider(eager_one_product, logits_bytes=16),
        "torch.compile, authors":
            Provider(compiled(eager_authors), True, cacheable=False, logits_bytes=16),
        "torch.compile, one product":
            Provider(compiled(eager_one_product), True, logits_bytes=10),
        "Liger scaled cross-entropy": Provider(liger_scaled, check=check_liger_scaled),
        "Liger DPO": Provider(liger, True, cacheable=False),
        "quack chunked": Provider(quack, check=check_quack),
        "torch linear_cross_entropy": Provider(torch_linear, check=check_torch_linear),
        "TRL chunked log-prob": Provider(trl, check=check_trl),
        "cut-cross-entropy": Provider(functools.partial(cut_cross_entropy, impl="cce")),
        "cut-cross-entropy, torch_compile": Provider(
            functools.partial(cut_cross_entropy, impl="torch_compile"), True, logits_bytes=10
        ),
    }


# --- the floor ------------------------------------------------------------------------------------


def products(x: Inputs, with_gradient: bool) -> Callable[[], None]:
    """Our matrix products alone, in our chunks, into memory that is there already."""
    product = linear.Product(x.weight)
    streams = 1 if x.base_logsumexp is not None else 2
    together = streams if x.weight.is_cuda else 1  # a CPU runs the streams' products apart
    rows = linear.chunk_rows(
        len(x.actions), x.weight.shape[1], together * product.bytes_per_row, 512 << 20,
        x.weight.device,
    )
    workspace = x.weight.new_zeros((together * rows, len(x.weight)), dtype=product.dtype)
    stacked = x.base_hidden.repeat(together, 1)
    gradient = torch.zeros_like(x.base_hidden)

    def run() -> None:
        for start in range(0, len(x.actions), rows):
            count = min(rows, len(x.actions) - start)
            z = workspace[: together * count]
            for _ in range(streams // together):
                product.into(stacked[together * start : together * (start + count)], z)
            if with_gradient:
                probabilities = linear.residual_view(z[:count], x.weight.dtype)
                torch.mm(probabilities, x.weight, out=gradient[start : start + count])

    return run


# --- the exact answer -----------------------------------------------------------------------------


def exact(x: Inputs, block: int = 128) -> tuple[Tensor, Tensor]:
    """Loss and ∂loss/∂h_a [N, D] by the definition in float64, block by block of rows."""
    weight = x.weight.double()
    hidden = x.adapter_hidden.detach().double().requires_grad_()

    def soft(rows: slice) -> tuple[Tensor, Tensor]:
        q_RV = hidden[rows] @ weight.t()
        b_RV = x.base_hidden[rows].double() @ weight.t()
        value_R = BETA * ((q_RV / BETA + b_RV).logsumexp(-1) - b_RV.logsumexp(-1))
        return q_RV.gather(1, x.actions[rows, None])[:, 0], value_R

    blocks = [slice(i, i + block) for i in range(0, len(x.actions), block)]
    with torch.no_grad():
        parts = [soft(rows) for rows in blocks]
    q_N, value_N = (torch.cat(part).requires_grad_() for part in zip(*parts, strict=True))
    loss = preference_loss(q_N - value_N, x)
    loss.backward()
    for rows in blocks:
        torch.autograd.backward(soft(rows), (q_N.grad[rows], value_N.grad[rows]))
    return loss.detach(), hidden.grad


def errors(loss_of: Callable[[Inputs], Tensor], x: Inputs, truth: tuple[Tensor, Tensor]) -> dict:
    """|loss − exact| and the gradient's relative error ‖g − exact‖/‖exact‖."""
    x.adapter_hidden.grad = None
    loss = loss_of(x)
    loss.backward()
    gradient, x.adapter_hidden.grad = x.adapter_hidden.grad.double(), None
    return {
        "loss_error": float((loss.detach().double() - truth[0]).abs()),
        "gradient_error": float((gradient - truth[1]).norm() / truth[1].norm()),
    }
