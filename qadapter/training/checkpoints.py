"""Checkpoints of an adapter: what is written, what counts as whole, what may be loaded.

A checkpoint is whole when its manifest lists all that a resumed run reads and every file is what
the manifest says. The manifest is written last, and removed first when a checkpoint is written
again; old checkpoints go when the new one is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState

from qadapter.errors import QAdapterError, shown
from qadapter.policy import storage
from qadapter.policy.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from qadapter.policy.card import CARD_NAME
from qadapter.system import manifest
from qadapter.system.documents import read_json
from qadapter.system.manifest import MANIFEST_NAME
from qadapter.system.room import free_disk, size
from qadapter.system.scratch import scratch_folder
from qadapter.training import card, resuming
from qadapter.training.pushes import HubPushes
from qadapter.training.resuming import ARGUMENTS_NAME, RECORD_NAME, Record
from qadapter.training.retention import RetentionStates
from qadapter.trunk.sharding import layout_of

CHECKPOINT_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-[0-9]+")
_NEEDED = (
    CONFIG_NAME, WEIGHTS_NAME, ARGUMENTS_NAME, RECORD_NAME, CHECKPOINT_STATE, OPTIMIZER_NAME,
    SCHEDULER_NAME,
)

_STATE = {
    "global_step": int, "num_input_tokens_seen": int, "log_history": list,
    "stateful_callbacks": dict, "train_batch_size": int | None, "epoch": int | float | None,
    "best_metric": int | float | None, "best_global_step": int | None,
    "best_model_checkpoint": str | None, "total_flos": int | float,
}
"""What a resumed run computes with."""


# --- finding them -------------------------------------------------------------------------------


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Folders that are named as checkpoints are, whole or not, by their steps. Whatever else begins
    like that, such as checkpoint-4-backup, is the user's."""
    with suppress(OSError):
        found = [path for path in Path(output_dir).iterdir() if _NAME.fullmatch(path.name)]
        return sorted(
            (path for path in found if path.is_dir()), key=lambda path: int(path.name[11:])
        )
    return []


def find_checkpoint(
    output_dir: str | Path, wanted: str | bool, say: Callable[[str], None] = lambda line: None
) -> str:
    """The checkpoint's folder, held against its manifest; ``wanted``: a folder, or true for the one
    in ``output_dir`` that was saved last and is whole.

    Args:
        say: gets a line for each that was passed over, and why.

    Raises:
        QAdapterError: none there, or not whole; the message names the file.
    """
    if wanted is not True:
        check_whole(wanted)
        return str(wanted)
    whole: dict[Path, float] = {}
    broken: dict[Path, str] = {}
    for folder in checkpoints_in(output_dir):
        try:
            check_whole(folder)
            whole[folder] = resuming.written(folder)
        except QAdapterError as error:
            broken[folder] = str(error)
    if not whole:
        why = "".join(f" ({text})" for text in broken.values())
        raise QAdapterError(
            f"{output_dir}: no checkpoint to resume from{why}: start again without "
            "resume_from_checkpoint; what is there of a run that broke off goes with "
            "overwrite_output_dir"
        )
    last = max(whole, key=whole.__getitem__)
    for text in broken.values():
        say(f"passed over, going on from {last}: {text}")
    return str(last)


def check_whole(folder: str | Path) -> None:
    """
    Raises:
        QAdapterError: no checkpoint, never finished, a part is missing or not what was saved, or
            it was saved without what a resumed run needs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise QAdapterError(f"{folder}: not a checkpoint (no such folder)")
    if not (folder / MANIFEST_NAME).exists():
        started = any((folder / name).exists() for name in _NEEDED)
        raise QAdapterError(
            f"{folder} was never finished, or saved by a version before this one "
            f"({MANIFEST_NAME} is missing)" if started
            else f"{folder}: not a checkpoint ({MANIFEST_NAME} is missing)"
        )
    listed = manifest.read(folder / MANIFEST_NAME)
    if CHECKPOINT_STATE not in listed.files:
        raise QAdapterError(
            f"{folder}: not a checkpoint, or never finished ({CHECKPOINT_STATE} is not in "
            f"{MANIFEST_NAME})"
        )
    listed.check(folder)
    if OPTIMIZER_NAME not in listed.files and _saved_model_only(folder):
        raise QAdapterError(
            f"{folder} was saved with save_only_model: without {OPTIMIZER_NAME} no run can go on "
            "from it; a new one can start from its adapter (in Python: "
            "QAdapterModel.from_pretrained(folder, is_trainable=True))"
        )
    for name in _NEEDED:
        if name not in listed.files:
            raise QAdapterError(f"{folder / name} is not listed in {MANIFEST_NAME}")
    if not any(name.startswith("rng_state") for name in listed.files):
        raise QAdapterError(f"{folder}: the state of random numbers (rng_state) is missing")
    _check_state(folder / CHECKPOINT_STATE)


def _check_state(path: Path) -> None:
    """transformers takes whatever it finds there."""
    state = read_json(path)
    try:
        TrainerState(**state)
    except TypeError as error:
        raise QAdapterError(f"{path} is damaged: {error}") from error
    for name, kind in _STATE.items():
        value = state.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise QAdapterError(f"{path} is damaged: {name} is {shown(value)}")
    named = _NAME.fullmatch(path.parent.name)
    if named and state["global_step"] != int(path.parent.name[11:]):
        raise QAdapterError(f"{path} is damaged: it is of step {shown(state['global_step'])}")
    if state["global_step"] < 0 or not all(isinstance(x, dict) for x in state["log_history"]):
        raise QAdapterError(f"{path} is damaged: its steps or its log are none")


def _saved_model_only(folder: Path) -> bool:
    arguments = read_json(folder / ARGUMENTS_NAME)
    return isinstance(arguments, dict) and arguments.get("save_only_model") is True


def how_to_go_on(output_dir: str | Path) -> str:
    """What a message about a run that broke off ends with."""
    if any((folder / MANIFEST_NAME).exists() for folder in checkpoints_in(output_dir)):
        return (
            "earlier checkpoints are as they were: go on later from the last one with "
            "resume_from_checkpoint true"
        )
    return (
        "there is no checkpoint yet to go on from: start again later (with overwrite_output_dir, "
        "if it left files)"
    )


def remove_checkpoint(folder: Path) -> None:
    """Remove one; from the first moment on it doesn't count as whole, and if the process is killed
    the next one removes what is left."""
    with suppress(OSError):
        manifest.remove(folder)
        with scratch_folder(folder.parent, "removing") as scratch:
            folder.rename(scratch / folder.name)
    shutil.rmtree(folder, ignore_errors=True)  # where it couldn't be moved


# --- the trainer's part -------------------------------------------------------------------------


class AllStepsTaken(Exception):
    """A run that was killed after its last step has nothing left to train."""


class ResumedState(TrainerCallback):
    """transformers takes the steps between logs, evaluations and checkpoints from the checkpoint,
    whatever the options now say, and looks whether a run is at its end after a step alone."""

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)
        if state.global_step >= state.max_steps:
            raise AllStepsTaken


class AdapterCheckpoints(HubPushes):
    """A ``Trainer`` whose checkpoints hold the adapter alone, and nothing of it as pickle."""

    _limit: int | None = None
    """save_total_limit, while training."""
    _as_given: Mapping[str, Any] = MappingProxyType({})
    """Other options that are not theirs while training."""

    _checkpoint: str | None = None
    """What this run goes on from."""
    _pairs_digest: str | None = None
    """Of the training pairs."""
    _retention_states: RetentionStates | None = None

    @contextmanager
    def _own_rotation(self) -> Iterator[None]:
        """transformers removes old checkpoints before the new one has its manifest, and takes
        folders for checkpoints that only begin like one: inside, it removes none."""
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit, self._limit = self._limit, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; an adapter that isn't finite is not saved."""
        self._check_finite()
        super().save_model(output_dir, _internal_call)

    def _check_finite(self) -> None:
        bad = [
            name for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and not parameter.isfinite().all()
        ]
        if bad:
            raise QAdapterError(
                f"after step {self.state.global_step} the adapter is not finite "
                f"({', '.join(bad[:3])}{', …' if len(bad) > 3 else ''}): it is not saved, "
                "checkpoints are as they were (try a lower learning_rate)"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                _begin(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                Record.of(
                    self._pairs_digest, self._retention_states, self.args.world_size,
                    layout_of(self.model.base).tp_size,
                ).write(folder)
                self._save_place(folder)
                manifest.write(folder, _files(folder))
        except Exception as error:  # of torch, tokenizers, …: each tells of a full disk its own way
            if self.args.should_save and folder.is_dir():
                remove_checkpoint(folder)
            raise QAdapterError(
                f"{folder}: the checkpoint can't be saved: {error} ({_room(run_dir)} free there); "
                f"{how_to_go_on(run_dir)}"
            ) from error
        if self.args.should_save:
            self._rotate(run_dir, folder)
            self._push_checkpoint(folder)

    def _save_place(self, folder: Path) -> None:
        """Of a run on a stream, where in it the run is."""

    def _rotate(self, run_dir: Path, newest: Path) -> None:
        """Remove what ``save_total_limit`` does not keep: first what isn't whole, then what was
        saved first. The newest and the best stay."""
        if not self._limit or self._limit < 0:
            return
        best = self.state.best_model_checkpoint
        kept = {os.path.realpath(path) for path in (newest, best) if path is not None}
        others = [
            path for path in checkpoints_in(run_dir)
            if os.path.realpath(path) not in kept and not path.is_symlink()
        ]
        others.sort(key=_age)
        for path in others[: max(0, len(others) + len(kept) - self._limit)]:
            remove_checkpoint(path)

    def _end_rotation(self, last: Path) -> None:
        """A run that was killed after its last checkpoint may have been in the midst of it."""
        run_dir = Path(self.args.output_dir)
        if self.args.should_save and os.path.samefile(last.parent, run_dir):
            self._rotate(run_dir, last)

    def _keep_the_best_alone(self) -> None:
        """At the end, with ``save_total_limit`` 1 and a best checkpoint: as transformers does."""
        best = self.state.best_model_checkpoint
        if self.args.save_total_limit == 1 and best is not None and self.args.should_save:
            for path in checkpoints_in(self.args.output_dir):
                if not path.is_symlink() and os.path.realpath(path) != os.path.realpath(best):
                    remove_checkpoint(path)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """The adapter, the tokenizer, the arguments and the card; nothing that needs pickle."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.processing_class is not None:
            saved = self.processing_class.save_pretrained(folder)
            self._tokenizer_files = [os.path.relpath(path, folder) for path in saved]
        # After the tokenizer, which writes a chat template too: the adapter's manifest lists it.
        self.model.save_pretrained(folder, state_dict=state_dict)
        (folder / ARGUMENTS_NAME).write_text(self._arguments() + "\n", encoding="utf-8")
        card.write(self, folder)

    def _arguments(self) -> str:
        options = self.args.to_dict()
        if self._limit is not None:
            options["save_total_limit"] = self._limit
        options |= self._as_given
        return json.dumps(options, indent=2)

    # --- going on from one ----------------------------------------------------------------------

    def _find_checkpoint(self, wanted: str | bool) -> str:
        """The one to go on from, if this run can; raises QAdapterError."""
        found = find_checkpoint(self.args.output_dir, wanted, self._tell)
        folder = Path(found)
        alike = layout_of(self.model.base).tp_size
        resuming.check_options(self.args, folder, self._tell, alike=alike)
        resuming.check_pairs(folder, self._pairs_digest)
        resuming.check_processes(folder, self.args.world_size, self._tell)
        self._checkpoint = found
        return found

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_adapter(self.state.best_model_checkpoint)

    def _load_adapter(self, folder: str) -> None:
        saved = storage.read(folder)
        saved.require_base(self.model.base_identity, folder)
        theirs, ours = storage.describe(saved.adapter), storage.describe(self.model.adapter_config)
        if (theirs, saved.objective) != (ours, self.model.objective):
            raise QAdapterError(
                f"{folder}: trained with {theirs}, {saved.objective}; this run has {ours}, "
                f"{self.model.objective}"
            )
        storage.load_weights(folder, self.model.adapter)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
            resuming.check_optimizer(Path(checkpoint, OPTIMIZER_NAME), optimizer)
            resuming.check_schedule(
                Path(checkpoint, SCHEDULER_NAME), self.lr_scheduler, self.state.global_step
            )
        with _naming(checkpoint, "optimizer and schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_callback_state(self) -> None:
        with _naming(self._checkpoint, "the callbacks' states"):
            super()._load_callback_state()
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):  # those that the checkpoint doesn't know
                known = self.state.stateful_callbacks
                known.setdefault(type(callback).__name__, callback.state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _naming(checkpoint, "the state of random numbers"):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _naming(checkpoint, "the gradient scaler"):
            super()._load_scaler(checkpoint)


def _room(folder: Path) -> str:
    """torch tells of a full disk in words of its own."""
    try:
        return size(free_disk(folder))
    except OSError:
        return "nothing is known to be"


def _begin(folder: Path) -> None:
    """Nothing of an earlier checkpoint of the same step must pass for a part of the new one."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        remove_checkpoint(folder)


def _files(folder: Path) -> list[str]:
    """What a checkpoint holds but the card, which people edit."""
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [
        path.as_posix() for path in inside
        if path.as_posix() not in (CARD_NAME, MANIFEST_NAME)
        and not any(part.startswith(".") for part in path.parts)
    ]


def _age(folder: Path) -> tuple[float, int]:
    try:
        when = resuming.written(folder) if (folder / MANIFEST_NAME).exists() else 0.0
    except QAdapterError:
        when = 0.0
    return when, int(folder.name[11:])


@contextmanager
def _naming(checkpoint: str | None, what: str) -> Iterator[None]:
    """What a library says of a file that is no state of its own, as one line."""
    try:
        yield
    except Exception as error:
        raise QAdapterError(f"{checkpoint}: {what} can't be restored: {error}") from error
