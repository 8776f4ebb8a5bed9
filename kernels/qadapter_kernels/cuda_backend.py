"""The compiled CUDA backend: for machines where Triton is missing or slower.

Same interface as ``torch_backend``. Sources: kernels/csrc/cuda. Nothing here waits for the GPU or
allocates outside PyTorch, so CUDA graphs capture it; results are the same bits in every run.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from . import native
from .native import doubles, float32, int64, matrix, pointer
from .reference import Coefficients

NAME = "cuda"


def unavailable_reason(device_type: str) -> str | None:
    """None if CUDA tensors can be served; else why not."""
    if device_type != "cuda":
        return f"the cuda backend serves CUDA tensors, not {device_type} tensors"
    if reason := native.unavailable_reason("cuda"):
        return reason
    if torch.version.hip is not None:
        return "the compiled kernels are for NVIDIA GPUs, and this PyTorch is built for AMD's"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _device_reason(torch.cuda.current_device())


@functools.cache
def _device_reason(index: int) -> str | None:
    """Asked once a device: the answer can't change."""
    library = native.library("cuda")
    with torch.cuda.device(index):
        status = library.qadapter_cuda_probe()
    if status == 0:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    targets = ", ".join(native.build_report().get("cuda", {}).get("targets", []))
    return (
        f"the compiled kernels ({targets}) can't run on {torch.cuda.get_device_name(index)} "
        f"(sm_{major}{minor}): {_error_name(library, status)}"
    )


def logits_forward(
    a_NV: Tensor, b_NV: Tensor, actions_N: Tensor, coef: Coefficients,
    base_lse_N: Tensor | None, statistics: bool,
) -> tuple[Tensor, ...]:
    num_rows, num_columns = a_NV.shape
    actions_N, base_lse_N = int64(actions_N), float32(base_lse_N)
    # An op's outputs share no memory.
    outputs = [_empty(num_rows, like=a_NV) for _ in range(4)] + [_empty(2, num_rows, like=a_NV)]
    stats_3N = _statistics(num_rows, statistics, like=a_NV)
    splits = _splits(a_NV)
    partials = _empty(num_rows * splits if splits > 1 else 0, 8, like=a_NV)
    _launch(
        "logits_forward", a_NV, *matrix(a_NV), *matrix(b_NV), pointer(actions_N),
        pointer(base_lse_N), doubles(coef), num_rows, num_columns, *map(pointer, outputs),
        pointer(stats_3N) if statistics else None, splits, pointer(partials),
    )
    return *outputs, stats_3N


def logits_backward(
    a_NV: Tensor, b_NV: Tensor, actions_N: Tensor, normalizer_2N: Tensor,
    grad_q_N: Tensor, grad_v_N: Tensor, coef: Coefficients, out_NV: Tensor,
) -> None:
    num_rows, num_columns = a_NV.shape
    if out_NV.dtype != a_NV.dtype:
        raise TypeError(f"the gradient of {a_NV.dtype} logits can't be {out_NV.dtype}")
    actions_N = int64(actions_N)
    rows = [float32(x_N) for x_N in (normalizer_2N, grad_q_N, grad_v_N)]
    _launch(
        "logits_backward", a_NV, *matrix(a_NV), *matrix(b_NV), pointer(actions_N),
        *map(pointer, rows), doubles(coef), num_rows, num_columns, *matrix(out_NV),
    )


def rows_forward(
    z_RV: Tensor, zb_RV: Tensor | None, actions_R: Tensor, scale: float,
    offset_bias_V: Tensor | None, base_scale: float, base_bias_V: Tensor | None,
    write_residual: bool, residual_dtype: torch.dtype, statistics: bool,
    action_logits_2R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_columns = z_RV.shape
    if not write_residual:
        residual_dtype = z_RV.dtype
    fits = residual_dtype in native.DTYPE_CODES and z_RV.dtype in (torch.float32, residual_dtype)
    if not fits:
        raise TypeError(f"a residual of {residual_dtype} can't be written over {z_RV.dtype} logits")
    if statistics and zb_RV is None:
        raise ValueError("statistics compare with the base: zb_RV is needed")
    actions_R, action_logits_2R = int64(actions_R), float32(action_logits_2R)
    offset_bias_V, base_bias_V = float32(offset_bias_V), float32(base_bias_V)
    policy_lse_R = _empty(num_rows, like=z_RV)
    base_lse_R = _empty(0 if zb_RV is None else num_rows, like=z_RV)
    stats_3R = _statistics(num_rows, statistics, like=z_RV)
    _launch(
        "rows_forward", z_RV, *matrix(z_RV), *matrix(zb_RV), pointer(actions_R), scale,
        pointer(offset_bias_V), base_scale, pointer(base_bias_V), pointer(action_logits_2R),
        num_rows, num_columns, write_residual, native.DTYPE_CODES[residual_dtype],
        pointer(policy_lse_R), None if zb_RV is None else pointer(base_lse_R),
        pointer(stats_3R) if statistics else None,
    )
    return policy_lse_R, base_lse_R, stats_3R


def bradley_terry_forward(
    q_N: Tensor, v_N: Tensor, offsets_S1: Tensor, divisors_S: Tensor, gamma: float,
    chi2_coef: float, bootstrap_next: bool, inv_pairs: float, inv_actions: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [float32(q_N), float32(v_N), int64(offsets_S1), float32(divisors_S)]
    num_sequences = len(divisors_S)
    losses_3, sequence_rewards_S = _empty(3, like=q_N), _empty(num_sequences, like=q_N)
    token_rewards_N, terms_S = torch.empty_like(inputs[0]), _empty(num_sequences, like=q_N)
    _launch(
        "bradley_terry_forward", q_N, *map(pointer, inputs), num_sequences, gamma, chi2_coef,
        bootstrap_next, inv_pairs, inv_actions, pointer(losses_3), pointer(sequence_rewards_S),
        pointer(token_rewards_N), pointer(terms_S),
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
    grad_q_N, grad_v_N = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    _launch(
        "bradley_terry_backward", token_rewards_N, *map(pointer, inputs), len(divisors_S), gamma,
        chi2_coef, bootstrap_next, inv_pairs, inv_actions, *map(pointer, grads),
        pointer(grad_q_N), pointer(grad_v_N),
    )
    return grad_q_N, grad_v_N


def combine_logits(
    a_NV: Tensor, b_NV: Tensor, coef: Coefficients, strength_N: Tensor | None
) -> Tensor:
    num_rows, num_columns = a_NV.shape
    strength_N, out_NV = float32(strength_N), _empty(num_rows, num_columns, like=a_NV)
    _launch(
        "combine_logits", a_NV, *matrix(a_NV), *matrix(b_NV), doubles(coef), pointer(strength_N),
        num_rows, num_columns, pointer(out_NV),
    )
    return out_NV


def _splits(x_NV: Tensor) -> int:
    """Blocks that share a row, so that few rows fill the device too."""
    with torch.cuda.device(x_NV.device):
        splits: int = native.library("cuda").qadapter_cuda_logits_splits(*x_NV.shape)
    return splits


def _launch(kernel: str, like: Tensor, *arguments: Any) -> None:
    """On the current stream of ``like``'s device.

    Raises:
        RuntimeError: the launch failed; names the kernel and CUDA's error.
    """
    library = native.library("cuda")
    with torch.cuda.device(like.device):
        stream = torch.cuda.current_stream().cuda_stream
        status = getattr(library, f"qadapter_cuda_{kernel}")(*arguments, stream)
    if status != 0:
        raise RuntimeError(f"CUDA kernel {kernel} failed to launch: {_error_name(library, status)}")


def _error_name(library: ctypes.CDLL, status: int) -> str:
    name: bytes = library.qadapter_cuda_error_name(status)
    return name.decode()


def _empty(*shape: int, like: Tensor) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _statistics(num_rows: int, wanted: bool, like: Tensor) -> Tensor:
    return _empty(*((3, num_rows) if wanted else (0,)), like=like)
