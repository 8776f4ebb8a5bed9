"""An end that is asked for: a checkpoint after the step that is being taken, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from qadapter.errors import QAdapterError
from qadapter.training.checkpoints import how_to_go_on
from qadapter.training.config import QAdapterConfig


class TrainingStopped(QAdapterError):
    """Training ended before its last step because that was asked for; says how to go on."""


class Stopping(Trainer):
    """A ``Trainer`` that can be asked to stop soon, as by a signal."""

    args: QAdapterConfig
    stop_wanted = False
    """Whether ``stop_soon`` was called."""
    _stopping = False
    """Whether all processes know."""

    def stop_soon(self) -> bool:
        """After this step save a checkpoint, whatever ``save_strategy`` says, and let ``train``
        raise ``TrainingStopped``. Of several processes one is enough.

        Returns:
            False if no step is being taken, so that nothing would come of it.
        """
        self.stop_wanted = self.is_in_train
        return self.stop_wanted

    def _any_process(self, *flags: Tensor | bool) -> list[bool]:
        """Of each flag, whether it is set on any process; one exchange for all of them."""
        device = self.accelerator.device
        counts = torch.stack([torch.as_tensor(x, device=device).long() for x in flags])
        return [bool(x) for x in self.accelerator.reduce(counts, "sum").tolist()]

    @property
    def _chooses_by_evaluations(self) -> bool:
        return self.args.load_best_model_at_end or self.args.save_strategy == "best"

    def _leave_evaluation(self) -> None:
        """Evaluations may take longer than the time that is left: called in the midst of them.
        Several processes would not leave at the same place."""
        if self.is_in_train and self.stop_wanted and self.accelerator.num_processes == 1:
            raise LeftAnEvaluation

    def _end_left_evaluation(self) -> None:
        """The step before it is whole. Where checkpoints are chosen by evaluations, one without
        its own would not do."""
        self._stopping, self.is_in_train = True, False
        if not self._chooses_by_evaluations:
            self._save_checkpoint(self.model, None)

    def _raise_if_stopped(self) -> None:
        if not self._stopping or self.state.global_step >= self.state.max_steps:
            return
        step, folder = self.state.global_step, Path(self.args.output_dir)
        saved = folder / f"checkpoint-{step}"
        how = (
            f"{saved} is saved: go on from there with resume_from_checkpoint true"
            if saved.is_dir() else how_to_go_on(folder)
        )
        raise TrainingStopped(f"stopped after step {step} of {self.state.max_steps}: {how}")


class LeftAnEvaluation(Exception):
    """A stop was asked for in the midst of an evaluation."""


class StopWhenAsked(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, trainer: Stopping) -> None:
        self._trainer = trainer

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer._stopping:
            control.should_training_stop = control.should_save = True
            control.should_evaluate &= self._trainer._chooses_by_evaluations

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """transformers takes an epoch that was left for one that ended."""
        if self._trainer._stopping:
            ended = abs(state.epoch - round(state.epoch)) < 1e-6
            chooses = self._trainer._chooses_by_evaluations and ended
            control.should_evaluate &= chooses
            control.should_save &= chooses
