"""Bases whose weights lie spread over processes: how, and the one way in.

transformers shards a base while it loads it (``from_pretrained(…, distributed_config=
DistributedConfig(fsdp_size=N))``, torch's FSDP2): each process keeps a part of every weight, and
gathers a block's weights when the block runs. The adapter stays whole, and alike, on every one.

FSDP2 gathers in hooks of the modules, and the first module that runs is taken for the root. So all
that runs a part of a base, or reads its head, is run by ``within``. All processes must do so the
same number of times, in the same order: each is a collective.

Or it splits every matrix, and each process computes its part of every product (``tp_size=N``,
tensor parallelism): all see the same batch, and have the same hidden states.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard

from qadapter.errors import QAdapterError
from qadapter.trunk.distributed_config import (
    FSDP2,
    MODES,
    QUANTIZED,
    TENSOR_PARALLEL,
    WAY,
    asks_for,
    matrices_are_split,
)

T = TypeVar("T")

class Layout(NamedTuple):
    """How a base lies over processes."""

    engine: str = ""
    """``FSDP2``, ``TENSOR_PARALLEL``, or "": whole in every process."""
    mesh: DeviceMesh | None = None
    """Of a tensor-parallel base."""

    @property
    def tp_size(self) -> int:
        """Processes that see the same batch."""
        return 1 if self.mesh is None else self.mesh.size()


_layouts: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()
_inside: WeakSet[nn.Module] = WeakSet()


def layout_of(base: nn.Module) -> Layout:
    """
    Raises:
        QAdapterError: it is sharded in a way that can't be served; names the engine and a way out.
    """
    if base not in _layouts:
        found = _found(base)
        if found.engine == FSDP2:
            base.run_within = _call
            register_fsdp_forward_method(base, "run_within")
            for module in (base, base.get_output_embeddings()):
                if isinstance(module, FSDPModule):  # the head, tied or not, is gathered once
                    module.set_reshard_after_backward(False, recurse=False)
        _layouts[base] = found
    return _layouts[base]


def within(base: nn.Module, function: Callable[[], T]) -> T:
    """What ``function`` gives, run where a sharded base gathers what runs; inside another
    ``within``, and for a whole base, simply run.

    Args:
        function: gives tensors, or tuples or outputs of a model that hold them.
    """
    if not isinstance(base, FSDPModule) or base in _inside:
        return function()
    layout_of(base)
    _inside.add(base)
    try:
        return base.run_within(functools.partial(_with_head, base, function))
    finally:
        _inside.discard(base)


def require_whole(base: nn.Module, what: str) -> None:
    """
    Raises:
        QAdapterError: the base is sharded, and something can't be done then; names it.
    """
    if engine := layout_of(base).engine:
        raise QAdapterError(
            f"{what} needs the whole base, and {engine} spreads it over processes: save the "
            "adapter (save_pretrained), and load it in one process without distributed_config"
        )


def require_whole_matrices(base: nn.Module, what: str) -> None:
    """
    Raises:
        QAdapterError: the base is tensor-parallel, and something can't be done then; names it.
    """
    if layout_of(base).engine == TENSOR_PARALLEL:
        raise matrices_are_split(what)


def entering(method: Callable[..., T]) -> Callable[..., T]:
    """A method of what has a ``base``, run ``within`` it."""

    @functools.wraps(method)
    def entered(self: Any, *args: Any, **kwargs: Any) -> T:
        return within(self.base, functools.partial(method, self, *args, **kwargs))

    return entered


def _call(function: Callable[[], T]) -> T:
    return function()


def _with_head(base: nn.Module, function: Callable[[], T]) -> T:
    """The norm before the head is gathered with it, but not by itself: torch before 2.13 waits for
    both to have run, and the head mostly doesn't."""
    head = base.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()
    return function()


def reshard(base: nn.Module) -> None:
    """Keep nothing of a base that was gathered: its parameters then are what this process keeps."""
    for module in base.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def freeze(base: nn.Module) -> None:
    """No gradients for a base's weights. FSDP2 has each twice, and takes over what is set for the
    one that is kept in parts."""
    reshard(base)
    base.requires_grad_(False)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this process may hold a part alone. For those a collective:
    all processes must ask, in the same order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Rows(NamedTuple):
    """What a process of a tensor-parallel group has of a tensor that lies over it row by row."""

    rows: Tensor
    start: int
    """Number of the first."""
    mesh: DeviceMesh


def rows_of(base: nn.Module, tensor: Tensor) -> Rows | None:
    """None for a tensor that is not split so."""
    if layout_of(base).engine != TENSOR_PARALLEL or not isinstance(tensor, DTensor):
        return None
    if tensor.placements != (Shard(0),):
        return None
    mesh, length = tensor.device_mesh, tensor.shape[0]
    each = -(-length // mesh.size())  # as torch.chunk, after which the last may have fewer, or none
    start = min(each * mesh.get_local_rank(), length)
    return Rows(tensor.detach().to_local(), start, mesh)


def product_over(rows: Rows, hidden: Tensor, weight: DTensor) -> Tensor:
    """hidden·weightᵀ, whole on every process, and so is its gradient. A collective, and another
    backward."""
    hidden = DTensor.from_local(hidden, rows.mesh, [Replicate()], run_check=False)
    return F.linear(hidden, weight.detach()).full_tensor()


def full_weight(module: nn.Module) -> Tensor:
    """A module's ``weight``, whole."""
    if isinstance(module.weight, DTensor) and isinstance(module, FSDPModule):
        module.unshard()
    return full(module.weight)


@contextlib.contextmanager
def stand_ins(base: nn.Module) -> Iterator[None]:
    """Inside, in the places of weights of which this process keeps a part: tensors of their whole
    shapes that take no memory. They hold NaN, so that nothing is made of them unnoticed."""
    kept = [
        (module, name, parameter) for module in base.modules()
        for name, parameter in module._parameters.items() if isinstance(parameter, DTensor)
    ]
    for module, name, parameter in kept:
        nothing = parameter.to_local().new_full((), torch.nan).expand(parameter.shape)
        module._parameters[name] = nn.Parameter(nothing, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


def kind_of(module: nn.Module) -> type[nn.Module]:
    """A module's class; of one that FSDP2 sharded, what it was before."""
    return type(module).__bases__[1] if isinstance(module, FSDPModule) else type(module)


def without_hooks(
    module: nn.Module, copies: dict[nn.Module, nn.Module] | None = None
) -> nn.Module:
    """Modules of the same tensors, and of the classes they had before they were sharded, whose
    weights nothing gathers: to be read, or run with others (``torch.func.functional_call``)."""
    copies = {} if copies is None else copies
    if module not in copies:
        copies[module] = copy = object.__new__(kind_of(module))
        vars(copy).update(vars(module) | vars(nn.Module()) | {"training": module.training})
        copy._parameters, copy._buffers = dict(module._parameters), dict(module._buffers)
        copy._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        copy._modules = {
            name: None if child is None else without_hooks(child, copies)
            for name, child in module._modules.items()
        }
    return copies[module]


@torch.no_grad()
def make_alike(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def share_draws(base: nn.Module) -> None:
    """Give the processes of a tensor-parallel base the first one's random numbers: all draw the
    same tokens. A collective."""
    mesh = layout_of(base).mesh
    if mesh is None:
        return
    modules = [torch.random]
    if mesh.device_type != "cpu":
        modules.append(torch.get_device_module(mesh.device_type))
    states = [module.get_rng_state() for module in modules]
    group = mesh.get_group()
    dist.broadcast_object_list(states, src=dist.get_global_rank(group, 0), group=group)
    for module, state in zip(modules, states, strict=True):
        module.set_rng_state(state)


# --- what is found ------------------------------------------------------------------------------


def _found(base: nn.Module) -> Layout:
    name = kind_of(base).__name__
    if any(isinstance(module, FullyShardedDataParallel) for module in base.modules()):
        raise QAdapterError(f"{name} is sharded by FSDP1, which can't be served: {WAY}")
    parameters = list(base.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise QAdapterError(f"{name} is sharded by DeepSpeed ZeRO-3, which can't be served: {WAY}")
    config = getattr(getattr(base, "config", None), "distributed_config", None)
    for field, mode in MODES.items():
        if asks_for(getattr(config, field, None)):
            raise QAdapterError(
                f"{name} is spread by {mode} ({field}), which can't be served: {WAY}"
            )
    if not any(isinstance(module, FSDPModule) for module in base.modules()):
        shards = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
        return _tensor_parallel(base, shards) if shards else Layout()
    _check_fully_sharded(base, parameters, config)
    return Layout(FSDP2)


def _tensor_parallel(base: nn.Module, shards: list[DTensor]) -> Layout:
    name, mesh = kind_of(base).__name__, shards[0].device_mesh
    if getattr(base, "tp_size", None) is None:
        raise QAdapterError(
            f"{name} is sharded, not by FSDP2 and not by transformers, which can't be served: {WAY}"
        )
    if any(x.device_mesh != mesh for x in shards) or mesh.ndim != 1:
        raise QAdapterError(
            f"{name} is spread over processes in several ways at once, which can't be served: {WAY}"
        )
    if getattr(base, "is_quantized", False):
        raise QAdapterError(f"{name}: {QUANTIZED}")
    return Layout(TENSOR_PARALLEL, mesh)


def _check_fully_sharded(base: nn.Module, parameters: list[nn.Parameter], config: object) -> None:
    name = kind_of(base).__name__
    if not isinstance(base, FSDPModule):
        raise QAdapterError(
            f"parts of {name} are sharded by FSDP2, the whole is not: call fully_shard on it too, "
            f"or {WAY}"
        )
    shards = [p for p in parameters if isinstance(p, DTensor)]
    if any(isinstance(x, Shard) for p in shards for x in p.placements[:-1]):
        raise QAdapterError(
            f"{name} is spread by FSDP2 and another parallelism at once, which can't be served: "
            f"{WAY}"
        )
    offloaded = any(p.device.type != p.device_mesh.device_type for p in shards)
    if offloaded or getattr(config, "fsdp_cpu_offload", False):
        raise QAdapterError(
            f"{name} is kept on the CPU by FSDP2 (fsdp_cpu_offload), which can't be served: load "
            "it without, on more processes if need be"
        )
    states = [fully_shard.state(m) for m in base.modules() if isinstance(m, FSDPModule)]
    if any(state._mp_policy.param_dtype not in (None, base.dtype) for state in states):
        raise QAdapterError(
            f"{name} has FSDP2's mixed precision, which is for weights that are trained: load a "
            "frozen base without it (fsdp_mixed_precision), in the dtype that it computes in"
        )
    if getattr(base, "is_quantized", False):
        raise QAdapterError(f"{name}: {QUANTIZED}")
