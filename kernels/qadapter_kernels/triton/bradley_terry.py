"""The sequence loss: ragged Bradley–Terry plus χ² over (q_action, V). One launch each way.

    r_k = q_k − γ·V(s_{k+1})  ("next")   or   q_k − γ·V(s_k)  ("current")
    R = Σ_k r_k / divisor,   L = −inv_pairs·Σ log σ(R_chosen − R_rejected) + χ²·inv_actions·Σ r²

Shapes: N rows (actions), S = 2B sequences; sequence i owns rows offsets[i]:offsets[i+1]; pair i is
(i, B + i), chosen first. All float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import log1p


@triton.jit
def _sequence_forward(
    sequence, q_ptr, v_ptr, offsets_ptr, divisors_ptr, token_rewards_ptr, sequence_rewards_ptr,
    gamma, NEXT: tl.constexpr, BOOTSTRAP: tl.constexpr, TILE: tl.constexpr,
):
    """Rewards of one sequence → its R and its Σ r². Sums run in a fixed order."""
    begin = tl.load(offsets_ptr + sequence).to(tl.int64)
    end = tl.load(offsets_ptr + sequence + 1).to(tl.int64)
    total, squares = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for start in range(begin, end, TILE):
        rows = start + tl.arange(0, TILE)
        inside = rows < end
        reward = tl.load(q_ptr + rows, mask=inside, other=0.0)
        if BOOTSTRAP:
            states = rows + 1 if NEXT else rows
            # After the last action of a sequence the value is 0; the next row is another's.
            reward -= gamma * tl.load(v_ptr + states, mask=states < end, other=0.0)
        tl.store(token_rewards_ptr + rows, reward, mask=inside)
        total += reward
        squares += reward * reward
    sequence_reward = tl.sum(total, axis=0) / tl.load(divisors_ptr + sequence)
    tl.store(sequence_rewards_ptr + sequence, sequence_reward)
    return sequence_reward, tl.sum(squares, axis=0)


@triton.jit(do_not_specialize=["num_pairs"])
def _forward_kernel(
    q_ptr, v_ptr, offsets_ptr, divisors_ptr, token_rewards_ptr, sequence_rewards_ptr,
    partials_ptr, arrivals_ptr, losses_ptr, num_pairs, gamma, chi2_coef, inv_pairs, inv_actions,
    NEXT: tl.constexpr, BOOTSTRAP: tl.constexpr, TILE: tl.constexpr,
):
    """One program a pair. The last to arrive adds up all pairs, always in the order of the pairs:
    who is last depends on the clock, the sum does not, which float atomics could not say."""
    pair = tl.program_id(0)
    chosen, chosen_squares = _sequence_forward(
        pair, q_ptr, v_ptr, offsets_ptr, divisors_ptr, token_rewards_ptr, sequence_rewards_ptr,
        gamma, NEXT, BOOTSTRAP, TILE,
    )
    rejected, rejected_squares = _sequence_forward(
        num_pairs + pair, q_ptr, v_ptr, offsets_ptr, divisors_ptr, token_rewards_ptr,
        sequence_rewards_ptr, gamma, NEXT, BOOTSTRAP, TILE,
    )
    margin = chosen - rejected
    # −log σ(m) = max(−m, 0) + log(1 + e^−|m|): no overflow, and no underflow to 0 for large m.
    preference = tl.where(margin < 0, -margin, 0.0) + log1p(tl.exp(-tl.abs(margin)))
    tl.store(partials_ptr + pair, preference)
    tl.store(partials_ptr + num_pairs + pair, chosen_squares + rejected_squares)

    tl.debug_barrier()  # both stores of this program, then its arrival
    if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == num_pairs - 1:
        preference_sum, squares_sum = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
        for start in range(0, num_pairs, TILE):
            pairs = start + tl.arange(0, TILE)
            inside = pairs < num_pairs
            # Past L1, which may hold another program's line from before it was written.
            preference_sum += tl.load(
                partials_ptr + pairs, mask=inside, other=0.0, cache_modifier=".cg"
            )
            squares_sum += tl.load(
                partials_ptr + num_pairs + pairs, mask=inside, other=0.0, cache_modifier=".cg"
            )
        preference_loss = inv_pairs * tl.sum(preference_sum, axis=0)
        chi2_loss = inv_actions * tl.sum(squares_sum, axis=0)
        weighted = tl.where(chi2_coef == 0, 0.0, chi2_coef * chi2_loss)  # 0·inf would be NaN
        tl.store(losses_ptr, preference_loss + weighted)
        tl.store(losses_ptr + 1, preference_loss)
        tl.store(losses_ptr + 2, chi2_loss)


@triton.jit(do_not_specialize=["num_pairs"])
def _backward_kernel(
    token_rewards_ptr, sequence_rewards_ptr, offsets_ptr, divisors_ptr,
    grad_losses_ptr, grad_sequence_ptr, grad_tokens_ptr, grad_q_ptr, grad_v_ptr,
    num_pairs, gamma, chi2_coef, inv_pairs, inv_actions,
    NEXT: tl.constexpr, TILE: tl.constexpr,
):
    """One program a sequence: ∂r_k = ∂R/divisor + 2·∂χ²·r_k + (upstream), ∂q_k = ∂r_k, and
    ∂V_k = −γ·∂r of the action whose reward V_k enters."""
    sequence = tl.program_id(0)
    is_chosen = sequence < num_pairs
    pair = tl.where(is_chosen, sequence, sequence - num_pairs)
    margin = (
        tl.load(sequence_rewards_ptr + pair) - tl.load(sequence_rewards_ptr + num_pairs + pair)
    )
    grad_loss = tl.load(grad_losses_ptr)
    grad_preference = grad_loss + tl.load(grad_losses_ptr + 1)
    grad_chi2 = chi2_coef * grad_loss + tl.load(grad_losses_ptr + 2)
    # d(−log σ(m))/dm = −σ(−m) for the chosen, +σ(−m) for the rejected; σ without overflow.
    tail = tl.exp(-tl.abs(margin))
    slope = tl.where(margin > 0, tail, 1.0) / (1.0 + tail)
    grad_reward = grad_preference * inv_pairs * tl.where(is_chosen, -slope, slope)
    grad_reward += tl.load(grad_sequence_ptr + sequence)
    shared = grad_reward / tl.load(divisors_ptr + sequence)
    chi2_slope = 2.0 * inv_actions * grad_chi2

    begin = tl.load(offsets_ptr + sequence).to(tl.int64)
    end = tl.load(offsets_ptr + sequence + 1).to(tl.int64)
    for start in range(begin, end, TILE):
        rows = start + tl.arange(0, TILE)
        inside = rows < end
        reward = tl.load(token_rewards_ptr + rows, mask=inside, other=0.0)
        upstream = tl.load(grad_tokens_ptr + rows, mask=inside, other=0.0)
        grad = shared + tl.where(chi2_slope == 0, 0.0, chi2_slope * reward) + upstream
        tl.store(grad_q_ptr + rows, grad, mask=inside)
        if NEXT:  # V_k enters the reward of action k − 1; the first state's value enters none
            before = inside & (rows > begin)
            reward = tl.load(token_rewards_ptr + rows - 1, mask=before, other=0.0)
            upstream = tl.load(grad_tokens_ptr + rows - 1, mask=before, other=0.0)
            grad = shared + tl.where(chi2_slope == 0, 0.0, chi2_slope * reward) + upstream
            grad = tl.where(before, grad, 0.0)
        tl.store(grad_v_ptr + rows, tl.where(gamma == 0, 0.0, -gamma * grad), mask=inside)


def bradley_terry_forward(
    q_N: Tensor, v_N: Tensor, offsets_S1: Tensor, divisors_S: Tensor, gamma: float,
    chi2_coef: float, bootstrap_next: bool, inv_pairs: float, inv_actions: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """→ [loss, preference_loss, chi2_loss], sequence rewards [S], token rewards [N]."""
    num_sequences = len(divisors_S)
    token_rewards_N, sequence_rewards_S = torch.empty_like(q_N), torch.empty_like(divisors_S)
    if num_sequences == 0:
        return q_N.new_zeros(3), sequence_rewards_S, token_rewards_N
    num_pairs = num_sequences // 2
    tile = launch.TILES["bradley_terry"]
    # Fresh for every call and not kept between them: calls on two streams must not share a count.
    arrivals = torch.zeros(1, dtype=torch.int32, device=q_N.device)
    losses_3, partials_2B = q_N.new_empty(3), q_N.new_empty(num_sequences)
    launch.launch(
        _forward_kernel, (num_pairs,), q_N.contiguous(), v_N.contiguous(), offsets_S1.contiguous(),
        divisors_S.contiguous(), token_rewards_N, sequence_rewards_S, partials_2B, arrivals,
        losses_3, num_pairs, gamma, chi2_coef, inv_pairs, inv_actions,
        NEXT=bootstrap_next, BOOTSTRAP=gamma != 0, TILE=tile.columns, warps=tile.warps,
    )
    return losses_3, sequence_rewards_S, token_rewards_N


def bradley_terry_backward(
    token_rewards_N: Tensor, sequence_rewards_S: Tensor, offsets_S1: Tensor, divisors_S: Tensor,
    gamma: float, chi2_coef: float, bootstrap_next: bool, inv_pairs: float, inv_actions: float,
    grad_losses_3: Tensor, grad_sequence_S: Tensor, grad_tokens_N: Tensor,
) -> tuple[Tensor, Tensor]:
    """→ ∂q_action [N], ∂V [N], exact for any upstream gradients (zeros, expanded, negative)."""
    grad_q_N, grad_v_N = torch.empty_like(token_rewards_N), torch.empty_like(token_rewards_N)
    num_sequences = len(divisors_S)
    if num_sequences:
        tile = launch.TILES["bradley_terry"]
        launch.launch(
            _backward_kernel, (num_sequences,), token_rewards_N.contiguous(),
            sequence_rewards_S.contiguous(), offsets_S1.contiguous(), divisors_S.contiguous(),
            grad_losses_3.contiguous(), grad_sequence_S.contiguous(), grad_tokens_N.contiguous(),
            grad_q_N, grad_v_N, num_sequences // 2, gamma, chi2_coef, inv_pairs, inv_actions,
            NEXT=bootstrap_next, TILE=tile.columns, warps=tile.warps,
        )
    return grad_q_N, grad_v_N
