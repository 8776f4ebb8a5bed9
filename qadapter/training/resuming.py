"""Whether a run can go on from a checkpoint as if it had never stopped: options, data, optimizer.

What decides where training goes must be what it was; only the length of a run may change.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import numbers
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qadapter.data.fingerprints import digest
from qadapter.errors import QAdapterError, shown
from qadapter.system.documents import read_json
from qadapter.training.config import QAdapterConfig
from qadapter.training.feature_set import FeatureSet
from qadapter.training.retention import RetentionStates
from qadapter.training.streaming import StreamedPairs

ARGUMENTS_NAME = "training_args.json"
RECORD_NAME = "resuming.json"
_SAME = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
    "weight_decay", "max_grad_norm", "seed", "data_seed", "train_sampling_strategy",
    "dataloader_drop_last", "ignore_data_skip", "bf16", "fp16", "retention_coef",
    "retention_states", "accelerator_config", "shuffle_buffer",
)
"""Options that decide where training goes. The objective and the adapter are saved with it, and
the tokenized pairs tell what the options of the data made."""
_LENGTH = ("max_steps", "num_train_epochs")
_FIXED = ("initial_lr", "weight_decay", "betas", "eps", "momentum")
"""Options of an optimizer's groups that stay what they were."""


# --- options ------------------------------------------------------------------------------------


def check_options(
    args: QAdapterConfig, folder: Path, say: Callable[[str], None], *, alike: int = 1
) -> None:
    """Hold a run's options against those a checkpoint was trained with.

    Args:
        alike: processes that see the same pairs.
        say: gets a line about what may differ, and does.

    Raises:
        QAdapterError: one that must not differ; all of them are named.
    """
    before, now = read_json(folder / ARGUMENTS_NAME), json.loads(args.to_json_string())
    if not isinstance(before, dict):
        raise QAdapterError(f"{folder / ARGUMENTS_NAME} holds no options")
    changed = [
        f"{name} {shown(before[name])}, this run {shown(now[name])}" for name in _SAME
        if name in before and name in now and now[name] != before[name]
        # Its default is settled when the base is there; it is looked at again then.
        and not (name in ("learning_rate", "retention_coef") and now[name] is None)
    ]
    record = _record(folder)
    batch = _pairs_a_step(before, record.processes // record.alike)
    ours = _pairs_a_step(now, args.world_size // alike)
    if batch != ours:
        changed.append(f"{batch} pairs a step (batch size, accumulation, processes), this run "
                       f"{ours}")
    if changed:
        raise QAdapterError(
            f"{folder} was trained with {'; '.join(changed)}: go on with the same options, or "
            "start anew from its adapter (in Python: QAdapterModel.from_pretrained(folder, "
            "is_trainable=True))"
        )
    longer = [
        f"{name} {shown(before.get(name))} before, {shown(now[name])} now" for name in _LENGTH
        if now[name] != before.get(name)
    ]
    if longer:
        say(f"another length than {folder.name} was trained for ({', '.join(longer)}): from here "
            "on the learning rate follows the new schedule")


def _pairs_a_step(options: Mapping[str, Any], processes: int) -> Any:
    try:
        return (
            options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
            * processes
        )
    except (KeyError, TypeError):
        return "unknown"


# --- data ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint was trained on, and when."""

    pairs: str
    """Digest of the training pairs' tokens, in their order."""
    retention_texts: str | None
    """Digest of the retention texts' tokens; None without."""
    processes: int
    written: float
    """Seconds since 1970."""
    alike: int = 1
    """Processes that saw the same pairs."""

    @classmethod
    def of(
        cls, pairs: str, retention: RetentionStates | None, processes: int, alike: int
    ) -> Record:
        return cls(pairs, None if retention is None else digest_of_texts(retention), processes,
                   time.time(), alike)

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        (folder / RECORD_NAME).write_text(text, encoding="utf-8")


def written(folder: Path) -> float:
    """When a checkpoint was saved, seconds since 1970; raises QAdapterError."""
    return _record(folder).written


def _record(folder: Path) -> Record:
    path = folder / RECORD_NAME
    found = read_json(path)
    try:
        record = Record(**found)
    except TypeError as error:
        raise QAdapterError(f"{path} is damaged: {error}") from error
    kinds = {"pairs": str, "retention_texts": str | None, "processes": int, "written": float,
             "alike": int}
    for name, kind in kinds.items():
        value = getattr(record, name)
        if not isinstance(value, kind) or (name == "alike" and value < 1):
            raise QAdapterError(f"{path} is damaged: {name} is {shown(value)}")
    return record


def check_pairs(folder: Path, pairs: str) -> None:
    """Raises QAdapterError where a checkpoint was trained on other pairs than these."""
    if _record(folder).pairs != pairs:
        raise QAdapterError(
            f"{folder} was trained on other pairs: the dataset, how it is split (test_fraction, "
            "seed), tokenized (chat template, max_length, truncation_mode) or ordered is not what "
            "it was"
        )


def check_retention(folder: Path, retention: RetentionStates | None) -> None:
    """Raises QAdapterError where a checkpoint was held to other retention texts than these."""
    ours = None if retention is None else digest_of_texts(retention)
    if _record(folder).retention_texts != ours:
        raise QAdapterError(
            f"{folder} was trained with other retention texts: retention_dataset, or the base's "
            "own samples, are not what they were"
        )


def check_processes(folder: Path, processes: int, say: Callable[[str], None]) -> None:
    """Says what another number of processes changes."""
    before = _record(folder).processes
    if before != processes:
        say(f"{folder.name} was trained by {before} processes, this run has {processes}: random "
            "numbers (dropout) start anew")


def digest_of_pairs(dataset: Dataset | FeatureSet | StreamedPairs) -> str:
    """Of the tokens and their order, of a stream those of its first pairs; features made elsewhere
    have a digest of their own kind."""
    if isinstance(dataset, StreamedPairs):
        return dataset.digest()
    if isinstance(dataset, Dataset):
        return digest(dataset)
    whole = hashlib.sha256()
    for shard in dataset.shards:
        for name in ("tokens", "states", "offsets", "lengths", "ids", "lines"):
            if (tensor := getattr(shard, name)) is not None:
                whole.update(tensor.contiguous().numpy().tobytes())
    return f"features:{whole.hexdigest()}"


def digest_of_texts(retention: RetentionStates) -> str:
    """Of their tokens and where in each the states that count begin."""
    whole = hashlib.sha256()
    for first, ids in zip(retention.first, retention.texts, strict=True):
        whole.update(f"{first} {len(ids)} ".encode())
        whole.update(ids.to(torch.int64).numpy().tobytes())
    return whole.hexdigest()


# --- optimizer and schedule -----------------------------------------------------------------------


def check_optimizer(path: Path, optimizer: Optimizer) -> None:
    """Hold a saved optimizer against the one that is to go on, before it gets anything of it:
    torch takes whatever it is given, and its kernels trust the shapes.

    Raises:
        QAdapterError: other parameters, options, names, shapes or dtypes; numbers that aren't
            finite; no optimizer's state at all.
    """
    try:
        _check_optimizer(_load(path), optimizer)
    except _Differs as error:
        raise QAdapterError(f"{path} is not this run's optimizer: {error}") from None


def _check_optimizer(saved: Any, optimizer: Optimizer) -> None:
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    states = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or not isinstance(states, dict):
        raise _Differs("it has no state and param_groups")
    live = optimizer.param_groups
    if len(groups) != len(live):
        raise _Differs(f"{len(groups)} groups of parameters, not {len(live)}")
    order: list[Any] = []
    for number, (theirs, ours) in enumerate(zip(groups, live, strict=True)):
        names = theirs.get("params") if isinstance(theirs, dict) else None
        if not isinstance(names, list) or len(names) != len(ours["params"]):
            raise _Differs(f"group {number} has not {len(ours['params'])} parameters")
        order += names
        for key, value in ours.items():
            if key not in theirs:
                raise _Differs(f"group {number} has no {key}")
            if key in _FIXED and _plain(theirs[key]) != _plain(value):
                raise _Differs(f"group {number}: {key} is {shown(theirs[key])}, not {shown(value)}")
            if value is None or isinstance(value, bool):
                if not isinstance(theirs[key], bool | None):
                    raise _Differs(f"group {number}: {key} is {shown(theirs[key])}")
            elif isinstance(value, numbers.Number):
                _check_number(theirs[key], f"group {number}: {key}", -math.inf if value < 0 else 0)
    if len(order) != len(set(map(repr, order))) or not set(states) <= set(order):
        raise _Differs("its parameters are numbered twice or not at all")
    expected = _after_a_step(optimizer)
    for number, name in enumerate(order):
        _check_state(number, states.get(name, {}), None if expected is None else expected[number])


def _check_state(number: int, theirs: Any, ours: Mapping[str, Any] | None) -> None:
    if ours is None and isinstance(theirs, dict):
        ours = theirs
    if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
        found = sorted(map(str, theirs)) if isinstance(theirs, dict) else "nothing"
        raise _Differs(f"parameter {number} has {found}, not {sorted(ours)}")
    for key, expected in ours.items():
        value, what = theirs[key], f"{key} of parameter {number}"
        if not isinstance(expected, Tensor):
            if isinstance(expected, numbers.Number):
                _check_number(value, what)
            continue
        if not isinstance(value, Tensor):
            raise _Differs(f"{what} is no tensor")
        if (value.shape, value.dtype) != (expected.shape, expected.dtype):
            raise _Differs(
                f"{what} is {value.dtype} {list(value.shape)}, not {expected.dtype} "
                f"{list(expected.shape)}"
            )
        if not value.isfinite().all():
            raise _Differs(f"{what} is not finite")


def _after_a_step(optimizer: Optimizer) -> list[Mapping[str, Any]] | None:
    """The state of each parameter after a step of a copy, on gradients of zero; None for an
    optimizer of others that can't be copied or stepped like this."""
    try:
        twin = copy.deepcopy(optimizer)
        parameters = [p for group in twin.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        twin.step()
        return [twin.state[parameter] for parameter in parameters]
    except Exception:
        return None


def check_schedule(path: Path, schedule: LRScheduler, steps: int) -> None:
    """The same for a saved schedule.

    Args:
        steps: how many were taken.

    Raises:
        QAdapterError: no schedule's state, or another's; numbers that aren't finite; a step beyond
            those that were taken.
    """
    saved, live = _load(path), schedule.state_dict()
    try:
        if not isinstance(saved, dict):
            raise _Differs(f"it is {shown(saved)}")
        for key in live.keys() & {"last_epoch", "base_lrs", "_last_lr"}:
            theirs, several = saved.get(key), isinstance(live[key], list)
            if several and not (isinstance(theirs, list) and len(theirs) == len(live[key])):
                raise _Differs(f"{key} is {shown(theirs)}")
            for value in theirs if several else [theirs]:
                _check_number(value, key)
        place = saved.get("last_epoch")
        if type(place) is not int or not 0 <= place <= steps:
            raise _Differs(f"last_epoch is {shown(place)} after {steps} steps")
        if saved.get("base_lrs") != live.get("base_lrs"):
            raise _Differs(f"base_lrs is {shown(saved['base_lrs'])}, not {live['base_lrs']}")
    except _Differs as error:
        raise QAdapterError(f"{path} is not this run's schedule: {error}") from None


class _Differs(Exception):
    """Says in what."""


def _check_number(value: Any, what: str, least: float = -math.inf) -> None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, numbers.Real) or not math.isfinite(value) or value < least:
        raise _Differs(f"{what} is {shown(value)}")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _load(path: Path) -> Any:
    """What torch saved; no code of a pickle is run.

    Raises:
        QAdapterError: not there, damaged, or objects that training doesn't save.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError,
            EOFError, pickle.UnpicklingError) as error:
        raise QAdapterError(f"{path} can't be read: {error}") from error
