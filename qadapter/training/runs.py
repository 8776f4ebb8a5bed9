"""A run from its first step, or from a checkpoint, to the saved adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from qadapter.errors import QAdapterError
from qadapter.system.locking import sole_run
from qadapter.system.scratch import remove_abandoned
from qadapter.training import checks, resuming
from qadapter.training.base_reading import BaseReading
from qadapter.training.checkpoints import (
    AdapterCheckpoints,
    AllStepsTaken,
    ResumedState,
    checkpoints_in,
    how_to_go_on,
)
from qadapter.training.stopping import LeftAnEvaluation, Stopping, StopWhenAsked
from qadapter.training.streaming import OneEpoch, StreamedPairs


class Runs(BaseReading, Stopping, AdapterCheckpoints):
    """A ``Trainer`` that has its output folder for itself, goes on from whole checkpoints and ends
    when it is asked to."""

    _resumed = False

    def _follow_runs(self) -> None:
        self.add_callback(ResumedState)
        if isinstance(self.train_dataset, StreamedPairs):
            self.add_callback(OneEpoch)
        self.add_callback(StopWhenAsked(self))

    def _forget_sums(self) -> None:
        """Of steps of an earlier run."""
        raise NotImplementedError

    def train(
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Train, and save the adapter to ``output_dir`` (unless ``save_strategy`` is "no").

        Args:
            resume_from_checkpoint: a checkpoint's folder, or true for the last whole one.

        Raises:
            QAdapterError: another run writes to ``output_dir``; the checkpoint isn't whole, or this
                run has other options or data than it; a number that isn't finite.
            TrainingStopped: ``stop_soon`` was called.
        """
        if not any(p.requires_grad for p in self.model.parameters()):
            raise QAdapterError(
                "the adapter is frozen: load it with from_pretrained(..., is_trainable=True)"
            )
        if self.train_dataset is None:
            raise QAdapterError("training needs a train_dataset")
        streamed = isinstance(self.train_dataset, StreamedPairs)
        checks.check_best_is_met(
            self.args, 0 if streamed else len(self.train_dataset), self._data_size
        )
        if self._pairs_digest is None:  # features take their place
            self._pairs_digest = resuming.digest_of_pairs(self.train_dataset)
        if not self.args.should_save:
            return self._run(resume_from_checkpoint or None, kwargs)
        with sole_run(self.args.output_dir):
            for folder in (self.args.output_dir, *checkpoints_in(self.args.output_dir)):
                remove_abandoned(folder)
            return self._run(resume_from_checkpoint or None, kwargs)

    def _run(self, wanted: str | bool | None, kwargs: dict[str, Any]) -> TrainOutput:
        with self._own_rotation():
            result = self._take_steps(wanted, kwargs)
        self._raise_if_stopped()
        self._keep_the_best_alone()
        if self.args.save_strategy != "no":
            try:
                self.save_model(_internal_call=True)
            except QAdapterError as error:
                raise QAdapterError(f"{error}; {how_to_go_on(self.args.output_dir)}") from error
        return result

    def _take_steps(self, wanted: str | bool | None, kwargs: dict[str, Any]) -> TrainOutput:
        checkpoint = None if wanted is None else self._find_checkpoint(wanted)
        self._resumed = checkpoint is not None
        self.stop_wanted = self._stopping = False
        self._forget_sums()
        self.read_base()
        if checkpoint is not None:
            resuming.check_retention(Path(checkpoint), self._retention_states)
        try:
            with self._own_place(checkpoint):
                return super().train(checkpoint, **kwargs)
        except AllStepsTaken:
            self.is_in_train = False
            self._end_rotation(Path(checkpoint))
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
        except LeftAnEvaluation:
            self._end_left_evaluation()
        finally:
            # Mixed precision is the training's: accelerate leaves it around the model's forward.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return TrainOutput(self.state.global_step, 0.0, {})

    # --- streams --------------------------------------------------------------------------------

    @contextmanager
    def _own_place(self, checkpoint: str | None) -> Iterator[None]:
        """A stream goes on by itself where it was: inside, transformers skips nothing."""
        stream = self.train_dataset
        if not isinstance(stream, StreamedPairs):
            yield
            return
        if checkpoint is None:
            stream.start_over()
        else:
            stream.load(Path(checkpoint))
        self._as_given = {"ignore_data_skip": self.args.ignore_data_skip}
        self.args.ignore_data_skip = True
        try:
            yield
        finally:
            self.args.ignore_data_skip = self._as_given.pop("ignore_data_skip")

    def _save_place(self, folder: Path) -> None:
        stream = self.train_dataset
        if not isinstance(stream, StreamedPairs):
            return
        taken = self.state.global_step * (
            stream.batch_size * stream.seats * self.args.gradient_accumulation_steps
        )
        if stream.given != taken:
            raise QAdapterError(f"the stream gave {stream.given} pairs, and training took {taken}")
        stream.save(folder)
