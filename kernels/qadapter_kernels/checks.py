"""Checks of the public operators' arguments: messages name the argument and what it must be."""

from __future__ import annotations

import contextlib
import math
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .reference import MASKED_ROW, NO_ACTION, Coefficients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SMALLEST, LARGEST = 1e-30, 1e30
"""Kernels take numbers as float32: none may be larger, and none that is divided by smaller, so that
there is room for the logits. inf·0 would be NaN; what vanishes where it is added does no harm."""

# Asked once: torch 2.8 can't trace the question in torch.compile.
_AUTOCAST = {k for k in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(k)}


def exact_products(device_type: str) -> contextlib.AbstractContextManager[None]:
    """Inside, autocast rounds nothing."""
    if device_type not in _AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def coefficients(*numbers: float) -> Coefficients:
    """The four numbers of ``Coefficients``, checked.

    Raises:
        ValueError: one is out of range, or alpha_tilde too small beside the others.
    """
    coef = Coefficients(*map(finite, Coefficients._fields, numbers))
    if coef.alpha_tilde < SMALLEST:
        raise ValueError(
            f"alpha_tilde must be positive, at least {SMALLEST:g}, got {coef.alpha_tilde}"
        )
    weight = max(abs(coef.adapter_coef), abs(coef.base_weight))
    if weight > LARGEST * coef.alpha_tilde:
        raise ValueError(
            f"alpha_tilde is {coef.alpha_tilde:g}: too small beside a stream's weight of "
            f"{weight:g}, whose logits it divides (at most {LARGEST:g} times as much)"
        )
    return coef


def finite(name: str, number: float, at_least: float = -math.inf) -> float:
    """The number as a float.

    Raises:
        ValueError: not finite, below ``at_least``, or too large for float32 arithmetic.
    """
    # Comparisons, because math.isfinite does not take torch.compile's symbolic floats.
    if not -math.inf < number < math.inf or number < at_least:
        bound = "" if at_least == -math.inf else f", at least {at_least:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {number}")
    if not -LARGEST <= number <= LARGEST:
        shown = number if -1e300 < number < 1e300 else "more"  # some ints can't be printed
        raise ValueError(f"{name} must not be larger than {LARGEST:g} in size, got {shown}")
    return float(number)


def denominator(name: str, number: float) -> float:
    """0 (nothing to average over) or a positive number."""
    if 0 < number < SMALLEST:
        raise ValueError(f"{name} must be 0 or at least {SMALLEST:g}, got {number}")
    return finite(name, number, at_least=0.0)


def workspace_bytes(workspace_mb: int) -> int:
    if workspace_mb <= 0:
        raise ValueError(f"workspace_mb must be positive, got {workspace_mb}")
    return int(workspace_mb * (1 << 20))


def check_matrix(name: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape [N, columns], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if type(x).__name__ == "DTensor":
        raise TypeError(f"{name} is a DTensor: pass full_tensor() or to_local()")


def check_like(
    name: str, x: Tensor, other_name: str, other: Tensor, same_dtype: bool = True
) -> None:
    check_matrix(name, x)
    if x.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, {other_name} has {tuple(other.shape)}: "
            "they must be equal"
        )
    if same_dtype and x.dtype != other.dtype:
        raise TypeError(f"{name} is {x.dtype}, {other_name} is {other.dtype}: they must be equal")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}")


def check_frozen(name: str, x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            f"{name} requires grad, but the base is frozen and gets no gradient: "
            f"pass {name}.detach() (and compute it under torch.no_grad() to save its memory)"
        )


def check_group(group: ProcessGroup | None, vocab_start: int) -> tuple[str, int]:
    """The group's name, "" without one, and the first token id of this process's rows."""
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, Integral | torch.SymInt):
        raise TypeError(f"vocab_start must be an integer, got {type(vocab_start).__name__}")
    if vocab_start < 0:
        raise ValueError(f"vocab_start must not be negative, got {vocab_start}")
    if group is None:
        if vocab_start:
            raise ValueError(
                f"vocab_start is {vocab_start}, but there is no group that holds the other rows"
            )
        return "", 0
    if not isinstance(getattr(group, "group_name", None), str):
        raise TypeError(
            "group must be a torch.distributed process group that this process is in, "
            f"got {type(group).__name__}"
        )
    if isinstance(vocab_start, Integral):
        vocab_start = int(vocab_start)
    return group.group_name, vocab_start


def check_head(
    weight: Tensor, bias: Tensor | None, hidden: Tensor, sharded: bool = False
) -> tuple[Tensor, Tensor | None]:
    if weight.numel() == 0 and not sharded:
        raise ValueError(
            "weight is empty: under ZeRO-3 gather it first "
            "(deepspeed.zero.GatheredParameters around the call)"
        )
    if type(weight).__name__ == "DTensor":
        raise TypeError(
            "weight is a DTensor: pass full_tensor(), or the rows of to_local() with group and "
            "vocab_start"
        )
    check_matrix("weight", weight)
    check_frozen("weight", weight)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} but the hidden size is {hidden.shape[1]}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, the hidden states on {hidden.device}")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape [{weight.shape[0]}], got {tuple(bias.shape)}")
        if bias.device != weight.device:
            raise ValueError(f"bias is on {bias.device}, weight on {weight.device}")
        check_frozen("bias", bias)
    kind = weight.device.type
    autocast = kind in _AUTOCAST and torch.is_autocast_enabled(kind)
    if autocast and weight.dtype != torch.float64:
        weight = weight.to(torch.get_autocast_dtype(kind))
    return weight, bias


def check_rows(name: str, x: Tensor | None, num_rows: int, device: torch.device | None) -> None:
    if x is None:
        return
    if x.shape != (num_rows,):
        expected = "[N]" if num_rows < 0 else f"[{num_rows}]"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}, the other tensors on {device}")


def check_actions(
    actions: Tensor, num_rows: int, vocab_size: int | None, device: torch.device,
    row_mask: Tensor | None,
) -> Tensor:
    """``vocab_size``: None where no process knows it alone."""
    if actions.shape != (num_rows,):
        raise ValueError(f"actions must have shape [{num_rows}], got {tuple(actions.shape)}")
    if actions.is_floating_point() or actions.dtype == torch.bool:
        raise TypeError(f"actions must be integer token ids, got {actions.dtype}")
    if actions.device != device:
        raise ValueError(f"actions are on {actions.device}, the other tensors on {device}")
    if row_mask is not None:
        if row_mask.shape != (num_rows,) or row_mask.dtype != torch.bool:
            raise ValueError(
                f"row_mask must be bool of shape [{num_rows}], "
                f"got {row_mask.dtype} of shape {tuple(row_mask.shape)}"
            )
        if row_mask.device != device:
            raise ValueError(f"row_mask is on {row_mask.device}, the other tensors on {device}")
    # The range is checked where it costs no device synchronisation; on a GPU the kernels compare
    # columns with the action, so an id outside the vocabulary reads nothing it should not.
    if not torch.compiler.is_compiling() and device.type == "cpu" and num_rows:
        scored = actions if row_mask is None else actions.where(row_mask, NO_ACTION)
        low, high = (int(x) for x in scored.aminmax())
        if low < NO_ACTION or (vocab_size is not None and high >= vocab_size):
            wrong = low if low < NO_ACTION else high
            raise ValueError(
                f"actions holds {wrong}, outside the vocabulary"
                f"{'' if vocab_size is None else f' of {vocab_size}'} (-1 stands for no action)"
            )
    actions = actions.to(torch.int64).contiguous()
    if row_mask is not None:
        actions = torch.where(row_mask, actions, MASKED_ROW)
    return actions


def check_offsets(offsets: Tensor, lengths: Tensor, num_rows: int) -> None:
    # Like the range of actions: where it costs no device synchronisation.
    if torch.compiler.is_compiling() or offsets.device.type != "cpu":
        return
    if offsets[0] != 0 or offsets[-1] != num_rows or (lengths < 0).any():
        raise ValueError(
            f"sequence_offsets must rise from 0 to {num_rows} (the rows of q_action), "
            f"got {offsets.tolist() if len(offsets) <= 16 else 'something else'}"
        )


def unit_columns(x_NV: Tensor) -> Tensor:
    """Any row stride is served; columns must be next to each other."""
    return x_NV if x_NV.stride(1) == 1 or x_NV.shape[1] <= 1 else x_NV.contiguous()
