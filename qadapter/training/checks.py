"""What ``TrainingArguments`` offers and can't be kept, or fails late, refused before anything is
loaded; each refusal names the option.
"""

from __future__ import annotations

import copy
import enum
import math
import multiprocessing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import huggingface_hub
import torch
from huggingface_hub import constants
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from qadapter.errors import QAdapterError, nearest, shown
from qadapter.system.documents import parse_json
from qadapter.training import engines
from qadapter.training.losses import PER_ACTION, PER_ALL_ACTIONS, PER_PAIR

if TYPE_CHECKING:
    from qadapter.training.config import QAdapterConfig

_UNSUPPORTED = {
    "label_smoothing_factor": (0.0, "preferences have no labels to smooth"),
    "neftune_noise_alpha": (None, "the base is frozen and gets no noise"),
    "use_liger_kernel": (False, "qadapter_kernels computes the loss"),
    "liger_kernel_config": (None, "qadapter_kernels computes the loss"),
    "torch_compile": (False, "the loss does not go through the model's forward"),
    "torch_compile_backend": (None, "the loss does not go through the model's forward"),
    "torch_compile_mode": (None, "the loss does not go through the model's forward"),
    "include_num_input_tokens_seen": ("no", "num_tokens is always logged"),
    "average_tokens_across_devices": (True, "every mean is over all processes"),
    "parallelism_config": (None, "the adapter is small: use data parallelism (accelerate launch)"),
    "bf16_full_eval": (False, "it would round the trained adapter; the base's data type is chosen "
                              "when it is loaded (dtype)"),
    "fp16_full_eval": (False, "it would round the trained adapter; the base's data type is chosen "
                              "when it is loaded (dtype)"),
}
"""Options of TrainingArguments that can't be honoured: the only value allowed, and why."""
_ENUMS = {
    "eval_strategy": IntervalStrategy, "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy, "hub_strategy": HubStrategy, "optim": OptimizerNames,
    "lr_scheduler_type": SchedulerType,
}
_LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
_DICTS = (
    "model_init_kwargs", "lr_scheduler_kwargs", "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
)
"""Options that hold a mapping and can't name a file of one."""
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""One option under its new and its old name; a transformers has one or both."""
_IN_BACKWARD = ("lomo", "adalomo")
_ON_TARGETS = ("galore_", "apollo_")
"""Optimizers that optim_target_modules is for begin like this."""
_TIMES = ("runtime", "samples_per_second", "steps_per_second")


def check_supported(args: QAdapterConfig) -> None:
    """Before transformers sees them: DeepSpeed's would be set up for the whole process.

    Raises:
        QAdapterError: an option that can't be honoured.
    """
    for name, (allowed, reason) in _UNSUPPORTED.items():
        value = getattr(args, name, allowed)
        unset = not value and allowed in (0.0, False, None, "no")
        if value != allowed and not unset:
            raise QAdapterError(f"{name}={shown(value)} can't be honoured: {reason}")
    engines.settle(args)
    for name, kind in _ENUMS.items():
        _check_choice(args, name, [member.value for member in kind])
    for name in ("log_level", "log_level_replica"):
        _check_choice(args, name, _LOG_LEVELS)
    if args.dataloader_multiprocessing_context is not None:
        _check_choice(
            args, "dataloader_multiprocessing_context", multiprocessing.get_all_start_methods()
        )
    for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor"):
        if getattr(args, name) and args.dataloader_num_workers == 0:
            raise QAdapterError(f"{name} needs dataloader_num_workers above 0")
    for name in _DICTS:
        value = getattr(args, name, None)
        if isinstance(value, str):
            try:
                value = parse_json(value, "the text")
            except QAdapterError as error:
                raise QAdapterError(
                    f"{name} must be a JSON object, got {shown(value)} ({error})"
                ) from error
            setattr(args, name, value)
        if value is not None and not isinstance(value, Mapping):
            raise QAdapterError(f"{name} must map names to values, got {shown(value)}")
    if args.fp16 and (args.use_cpu or not torch.accelerator.is_available()):
        raise QAdapterError(
            "fp16 needs a GPU: leave it out (a CPU's base computes in the data type it is loaded "
            "in, see dtype)"
        )


def _check_choice(args: QAdapterConfig, name: str, choices: Sequence[str]) -> None:
    value = getattr(args, name)
    value = value.value if isinstance(value, enum.Enum) else value
    if value not in choices:
        raise QAdapterError(
            f"{name}: {shown(value)} is none of {', '.join(choices)}" + nearest(str(value), choices)
        )


def check_reporting(args: QAdapterConfig) -> None:
    """Integrations and the hub: what is missing is missed at the start.

    Raises:
        QAdapterError: an integration that is not installed; no way to push to the hub.
    """
    if args.report_to:  # else nothing is looked for among the installed packages
        # transformers doesn't list these two wherever they can be used.
        usable = [*get_available_reporting_integrations(), "azure_ml", "flyte"]
        for name in args.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                raise QAdapterError(
                    f"report_to: {shown(name)} is none of {', '.join(INTEGRATION_TO_CALLBACK)}"
                    + nearest(str(name), INTEGRATION_TO_CALLBACK)
                )
            if name not in usable:
                raise QAdapterError(
                    f"report_to: {name} is not installed: pip install {name}, or leave it out"
                )
    if args.push_to_hub and constants.HF_HUB_OFFLINE:
        raise QAdapterError("push_to_hub: the hub is switched off (HF_HUB_OFFLINE)")
    if args.push_to_hub and args.hub_token is None and huggingface_hub.get_token() is None:
        raise QAdapterError("push_to_hub needs hub_token, or a login (hf auth login)")


def check_optimizer(args: QAdapterConfig) -> None:
    """Makes the optimizer and the schedule once, of a parameter of their own.

    Raises:
        QAdapterError: a package is missing, an argument is none of theirs or would be ignored, or
            updates happen where they can't be averaged.
    """
    name = args.optim.value
    if name in _IN_BACKWARD or name.endswith("_layerwise"):
        raise QAdapterError(
            f"optim={name!r} can't be honoured: it updates in the backward pass, before a step's "
            "gradients are averaged and checked"
        )
    if args.optim_target_modules is not None and not name.startswith(_ON_TARGETS):
        raise QAdapterError(f"optim_target_modules is for GaLore and APOLLO, and this is {name}")
    if args.learning_rate is None:  # its default is settled when the model is there
        args = copy.copy(args)
        args.learning_rate = 1e-3  # schedules may end at a rate of their own, which is lower
    stand_in = nn.Sequential(nn.Linear(2, 2, bias=False))
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, stand_in)
        if args.optim_args is not None:
            given, args.optim_args = args.optim_args, None
            try:
                without = Trainer.get_optimizer_cls_and_kwargs(args, stand_in)[1]
            finally:
                args.optim_args = given
            if without == kwargs:
                raise QAdapterError(f"optim_args={shown(given)}: optim={name!r} reads none of them")
        if name.startswith(_ON_TARGETS):
            return  # its parameters are the model's layers
        kwargs.pop("optimizer_dict", None)
        optimizer = kind(stand_in.parameters(), **kwargs)
    except QAdapterError:
        raise
    except Exception as error:  # of many packages
        options = "optim" if args.optim_args is None else "optim, optim_args"
        raise QAdapterError(f"{options}: {name!r} can't be used: {error}") from error
    try:
        get_scheduler(
            args.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=10,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
    except (TypeError, ValueError) as error:
        raise QAdapterError(
            f"lr_scheduler_type {args.lr_scheduler_type.value!r} can't be made with "
            f"lr_scheduler_kwargs {shown(args.lr_scheduler_kwargs or {})}: {error}"
        ) from error


def check_evaluation(
    args: QAdapterConfig, eval_names: Sequence[str] | None, *, cached: bool,
    own_metrics: bool = False,
) -> None:
    """What is chosen by a number must find that number.

    Args:
        eval_names: of the held-out sets, where they have names; empty for one without; None where
            there are no held-out pairs.
        cached: whether the loss is computed on cached features, which have fewer numbers.
        own_metrics: ``compute_metrics`` adds others, whose names nobody knows yet.

    Raises:
        QAdapterError: an unknown ``metric_for_best_model``; a best model without an evaluation or
            a checkpoint to choose by.
    """
    if args.eval_strategy != "no" and eval_names is None:
        raise QAdapterError("eval_strategy needs held-out pairs (eval_dataset)")
    evaluates = args.eval_strategy != "no"
    for name, wanted in (
        ("load_best_model_at_end", args.load_best_model_at_end),
        ("save_strategy best", args.save_strategy == "best"),
    ):
        if wanted and not evaluates:
            raise QAdapterError(
                f"{name} needs evaluations to choose by: held-out pairs and an eval_strategy"
            )
    if args.load_best_model_at_end and args.save_strategy == "no":
        raise QAdapterError("load_best_model_at_end needs checkpoints: set save_strategy")
    metric = args.metric_for_best_model
    if metric is None and args.save_strategy == "best":
        raise QAdapterError("save_strategy best needs metric_for_best_model, such as loss")
    if metric is None or not evaluates or own_metrics:
        return
    numbers = ["loss", *PER_PAIR, *(PER_ALL_ACTIONS if cached else PER_ACTION)]
    known = [f"{name}_{x}" for name in eval_names for x in numbers] or numbers
    name = metric.removeprefix("eval_")
    if name not in known and not name.endswith(_TIMES):
        raise QAdapterError(
            f"metric_for_best_model: no number of an evaluation is called {metric!r}"
            f"{nearest(name, known)} ({', '.join(known)})"
        )


def check_best_is_met(args: QAdapterConfig, num_pairs: int, num_processes: int) -> None:
    """Refuse to look for the best of no evaluation at all.

    Raises:
        QAdapterError: ``eval_steps`` is beyond the run's last step.
    """
    if not args.load_best_model_at_end or args.eval_strategy != "steps":
        return
    steps = args.max_steps
    if steps <= 0:
        batches = math.ceil(num_pairs / (args.per_device_train_batch_size * num_processes))
        epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        steps = math.ceil(args.num_train_epochs * epoch)
    if args.eval_steps > steps:
        raise QAdapterError(
            f"load_best_model_at_end: eval_steps {args.eval_steps:g} is beyond the last of {steps} "
            "steps, so there is no evaluation to choose by"
        )
