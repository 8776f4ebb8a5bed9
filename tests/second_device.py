"""A second device on a machine that has none: tensors that say "meta" and hold numbers.

Inside ``SecondDevice()`` whatever is moved to or made on "meta" computes on the CPU, and an
operation on tensors of both devices fails, as it does beside a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SECOND = torch.device("meta")
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _There(Tensor):
    """A tensor on the second device."""

    @staticmethod
    def __new__(cls, held: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=SECOND,
        )

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with SecondDevice():  # backward runs in threads of its own
            return func(*args, **(kwargs or {}))


class SecondDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # torch.tensor(…, device="meta") forgets its numbers; without any it is as good.
        args, kwargs = tree_map(
            lambda x: _There(torch.empty(x.shape, dtype=x.dtype))
            if isinstance(x, Tensor) and x.is_meta and not isinstance(x, _There) and not x.numel()
            else x, (args, kwargs)
        )
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        wrappers = {id(x.held): x for x in tensors if isinstance(x, _There)}
        there = bool(wrappers)
        # A number in a tensor is taken from the CPU by every device.
        here = any(not isinstance(x, _There) and x.dim() for x in tensors)
        if there and here and func not in _MOVES:
            raise RuntimeError(f"{func}: tensors on two devices")
        if func == torch.ops.aten.copy_.default:
            there = isinstance(args[0], _There)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]) == SECOND
            kwargs = kwargs | {"device": torch.device("cpu")}
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, _There) else x, (args, kwargs))
        outputs = func(*args, **kwargs)
        if not there:
            return outputs

        def wrap(x):
            if not isinstance(x, Tensor):
                return x
            # An operation in place gives back the very tensor it was given.
            return wrappers[id(x)] if id(x) in wrappers else _There(x)

        return tree_map(wrap, outputs)
