"""The compiled CPU backend: C++ with OpenMP; AVX-512, AVX2 or portable code, chosen at run time.

Same interface as ``torch_backend``. Sources: kernels/csrc/cpu. Results do not depend on the number
of threads (``torch.get_num_threads()``), bit for bit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native
from .native import doubles, float32, int64, matrix, pointer
from .reference import Coefficients, LogitHead, ScoreRows

NAME = "cpu"


def unavailable_reason(device_type: str) -> str | None:
    """None if CPU tensors can be served; else why not."""
    if device_type != "cpu":
        return f"the cpu backend serves CPU tensors, not {device_type} tensors"
    return native.unavailable_reason("cpu")


def logits_forward(
    a_NV: Tensor, b_NV: Tensor, actions_N: Tensor, coef: Coefficients,
    base_lse_N: Tensor | None, statistics: bool,
) -> tuple[Tensor, ...]:
    num_rows, num_columns = a_NV.shape
    actions_N = int64(actions_N)
    base_lse_N = float32(base_lse_N)
    outputs_6N = _empty(6, num_rows, like=a_NV)
    stats_3N = _empty(*((3, num_rows) if statistics else (0,)), like=a_NV)
    _check(native.library("cpu").qadapter_cpu_logits_forward(
        *matrix(a_NV), *matrix(b_NV), pointer(actions_N), pointer(base_lse_N), doubles(coef),
        num_rows, num_columns, pointer(outputs_6N), pointer(stats_3N) if statistics else None,
        torch.get_num_threads(),
    ), num_columns)
    # Clones: the outputs of an op may not share memory.
    return *(x_N.clone() for x_N in outputs_6N[:4]), outputs_6N[4:].clone(), stats_3N


def logits_backward(
    a_NV: Tensor, b_NV: Tensor, actions_N: Tensor, normalizer_2N: Tensor,
    grad_q_N: Tensor, grad_v_N: Tensor, coef: Coefficients, out_NV: Tensor,
) -> None:
    num_columns = a_NV.shape[1]
    actions_N, normalizer_2N = int64(actions_N), float32(normalizer_2N)
    grad_q_N, grad_v_N = float32(grad_q_N), float32(grad_v_N)
    _check(native.library("cpu").qadapter_cpu_logits_backward(
        *matrix(a_NV), *matrix(b_NV), pointer(actions_N), pointer(normalizer_2N),
        pointer(grad_q_N), pointer(grad_v_N), doubles(coef), len(a_NV), num_columns,
        *matrix(out_NV), torch.get_num_threads(),
    ), num_columns)


def rows_forward(
    z_RV: Tensor, zb_RV: Tensor | None, actions_R: Tensor, scale: float,
    offset_bias_V: Tensor | None, base_scale: float, base_bias_V: Tensor | None,
    write_residual: bool, residual_dtype: torch.dtype, statistics: bool,
    action_logits_2R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_columns = z_RV.shape
    if write_residual and not (
        residual_dtype == z_RV.dtype
        or (z_RV.dtype == torch.float32 and residual_dtype in (torch.bfloat16, torch.float16))
    ):
        raise TypeError(f"a residual of {residual_dtype} can't be written over {z_RV.dtype} logits")
    if statistics and zb_RV is None:
        raise ValueError("statistics compare with the base: zb_RV is needed")
    actions_R, action_logits_2R = int64(actions_R), float32(action_logits_2R)
    offset_bias_V, base_bias_V = float32(offset_bias_V), float32(base_bias_V)
    policy_lse_R = _empty(num_rows, like=z_RV)
    base_lse_R = _empty(0 if zb_RV is None else num_rows, like=z_RV)
    stats_3R = _empty(*((3, num_rows) if statistics else (0,)), like=z_RV)
    _check(native.library("cpu").qadapter_cpu_rows_forward(
        *matrix(z_RV), *matrix(zb_RV), pointer(actions_R), scale, pointer(offset_bias_V),
        base_scale, pointer(base_bias_V), pointer(action_logits_2R), num_rows, num_columns,
        write_residual, native.DTYPE_CODES[residual_dtype if write_residual else z_RV.dtype],
        pointer(policy_lse_R), pointer(base_lse_R), pointer(stats_3R) if statistics else None,
        torch.get_num_threads(),
    ), num_columns)
    return policy_lse_R, base_lse_R, stats_3R


def bradley_terry_forward(
    q_N: Tensor, v_N: Tensor, offsets_S1: Tensor, divisors_S: Tensor, gamma: float,
    chi2_coef: float, bootstrap_next: bool, inv_pairs: float, inv_actions: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q_N, v_N, divisors_S = float32(q_N), float32(v_N), float32(divisors_S)
    offsets_S1 = int64(offsets_S1)
    num_sequences = len(offsets_S1) - 1
    losses_3, sequence_rewards_S = _empty(3, like=q_N), _empty(num_sequences, like=q_N)
    token_rewards_N = torch.zeros_like(q_N)
    native.library("cpu").qadapter_cpu_bradley_terry_forward(
        pointer(q_N), pointer(v_N), pointer(offsets_S1), pointer(divisors_S), num_sequences, gamma,
        chi2_coef, bootstrap_next, inv_pairs, inv_actions, pointer(losses_3),
        pointer(sequence_rewards_S), pointer(token_rewards_N),
    )
    return losses_3, sequence_rewards_S, token_rewards_N


def bradley_terry_backward(
    token_rewards_N: Tensor, sequence_rewards_S: Tensor, offsets_S1: Tensor, divisors_S: Tensor,
    gamma: float, chi2_coef: float, bootstrap_next: bool, inv_pairs: float, inv_actions: float,
    grad_losses_3: Tensor, grad_sequence_S: Tensor, grad_tokens_N: Tensor,
) -> tuple[Tensor, Tensor]:
    inputs = [float32(token_rewards_N), float32(sequence_rewards_S), int64(offsets_S1),
              float32(divisors_S)]
    grads = [float32(grad_losses_3), float32(grad_sequence_S), float32(grad_tokens_N)]
    grad_q_N, grad_v_N = torch.zeros_like(inputs[0]), torch.zeros_like(inputs[0])
    native.library("cpu").qadapter_cpu_bradley_terry_backward(
        *map(pointer, inputs), len(sequence_rewards_S), gamma, chi2_coef, bootstrap_next,
        inv_pairs, inv_actions, *map(pointer, grads), pointer(grad_q_N), pointer(grad_v_N),
    )
    return grad_q_N, grad_v_N


def combine_logits(
    a_NV: Tensor, b_NV: Tensor, coef: Coefficients, strength_N: Tensor | None
) -> Tensor:
    num_rows, num_columns = a_NV.shape
    out_NV = _empty(num_rows, num_columns, like=a_NV)
    strength_N = float32(strength_N)
    _check(native.library("cpu").qadapter_cpu_combine_logits(
        *matrix(a_NV), *matrix(b_NV), doubles(coef), pointer(strength_N), num_rows, num_columns,
        pointer(out_NV), torch.get_num_threads(),
    ), num_columns)
    return out_NV


def score_rows(
    base_RV: Tensor, difference_RV: Tensor | None, actions_R: Tensor, head: LogitHead,
    policy_weights: tuple[float, float], coef: Coefficients | None,
) -> Tensor:
    for x_RV in (base_RV, difference_RV):
        if x_RV is not None and x_RV.dtype != torch.float32:
            raise TypeError(f"scores are made of float32 products, not {x_RV.dtype}")
    num_rows, num_columns = base_RV.shape
    actions_R, bias_V = int64(actions_R), float32(head.bias)
    outputs_8R = _empty(len(ScoreRows._fields), num_rows, like=base_RV)
    rewards = coef is not None
    doubles_4 = doubles(Coefficients(0.0) if coef is None else coef)
    _check(native.library("cpu").qadapter_cpu_score_rows(
        *matrix(base_RV)[:2], *matrix(difference_RV)[:2], pointer(bias_V),
        (ctypes.c_double * 3)(head.scale, head.softcap or 0.0, rewards), pointer(actions_R),
        (ctypes.c_double * 2)(*policy_weights), doubles_4,
        num_rows, num_columns, pointer(outputs_8R), torch.get_num_threads(),
    ), num_columns)
    return outputs_8R


def select_instruction_set(name: str) -> None:
    """Uses other kernels than the fastest ("best"), in the whole process. For tests.

    Raises:
        ValueError: this processor or build lacks them.
    """
    if native.library("cpu").qadapter_cpu_select_isa(name.encode()) != 0:
        raise ValueError(f"no kernels for instruction set {name!r} here")


def _empty(*shape: int, like: Tensor) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _check(status: int, num_columns: int) -> None:
    if status != 0:
        raise ValueError(f"an action is outside -2 .. {num_columns - 1}")
