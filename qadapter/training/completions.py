"""Answers to some held-out prompts while training goes on: printed, in a file, and on trackers."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from qadapter.data import padding_id
from qadapter.data.ends import end_of_turn_ids, until_end
from qadapter.system.markup import markdown_table, one_line
from qadapter.system.scratch import replacing
from qadapter.training.own_samples import generate
from qadapter.trunk.lm_head import input_device
from qadapter.trunk.sharding import layout_of

if TYPE_CHECKING:
    from qadapter.training.trainer import QAdapterTrainer

FILE_NAME = "completions.jsonl"
_COLUMNS = ("step", "prompt", "completion", "reward", "ended")
_SHOWN = 70
"""Characters of a prompt, and of an answer, in a printed line."""

Row = dict[str, Any]


class LogCompletions(TrainerCallback):
    """Greedy answers of the policy before the first step, which are the base's, and at every
    evaluation. Each is a line of ``completions.jsonl``: step, prompt, completion, its reward R
    under the adapter as it is, and whether it ended by itself.

    Training is what it is without: no random number is drawn, and nothing waits for a tracker.

    Args:
        prompts: token ids up to where an answer begins.
    """

    def __init__(self, trainer: QAdapterTrainer, prompts: Sequence[list[int]]) -> None:
        self.trainer, self.prompts = trainer, list(prompts)
        self._step: int | None = None
        self._rows: list[Row] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step, self._rows = None, []
        if state.global_step == 0:
            self._log(state)
        elif args.process_index == 0:
            self._rows = self._until(state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.is_in_train and state.global_step != self._step:  # once for several sets
            self._log(state)

    def _log(self, state: TrainerState) -> None:
        # Of a sharded base a forward is a collective; else one process answers for all.
        together = bool(layout_of(self.trainer.model.base).engine)
        if not together and (self.trainer.args.process_index > 0 or self.trainer.stop_wanted):
            return
        self._step = state.global_step
        start = time.monotonic()
        rows = self._answer(state.global_step)
        if self.trainer.args.process_index > 0:
            return
        if state.global_step == 0:
            self.trainer._tell(
                f"{len(rows)} held-out prompts answered in {time.monotonic() - start:.1f} s, as at "
                "every evaluation to come (log_completions)", logging.INFO,
            )
        for row in rows:
            asked, said = one_line(row["prompt"]), one_line(row["completion"])
            asked = asked if len(asked) <= _SHOWN else f"…{asked[1 - _SHOWN :]}"  # its end tells
            said = said if len(said) <= _SHOWN else f"{said[: _SHOWN - 1]}…"
            self.trainer._tell(f"step {row['step']}: {asked} → {said}", logging.INFO)
        self._rows += rows
        if state.global_step > 0:  # a run that never came so far leaves no file
            self._write()
        for callback in self.trainer.callback_handler.callbacks:
            _track(callback, rows, state.global_step)

    @property
    def _file(self) -> Path:
        return Path(self.trainer.args.output_dir or ".") / FILE_NAME

    def _until(self, step: int) -> list[Row]:
        """What was logged until a step that a run goes on from."""
        rows = []
        if self._file.is_file():
            for line in self._file.read_bytes().splitlines():
                with contextlib.suppress(ValueError, LookupError, TypeError):  # cut, or not ours
                    row = json.loads(line)
                    rows += [row] if row["step"] <= step else []
        return rows

    def _write(self) -> None:
        """All of them: few are, and a file is whole at every moment."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._file) as written:
            written.write_text("".join(json.dumps(row) + "\n" for row in self._rows),
                               encoding="utf-8")

    @torch.no_grad()
    def _answer(self, step: int) -> list[Row]:
        model, tokenizer = self.trainer.model, self.trainer._load_tokenizer()
        ends = end_of_turn_ids(model, tokenizer)

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        training = model.training
        model.train(False)
        try:
            drawn = generate(
                model, self.prompts, padding_id(model, tokenizer), do_sample=False,
                temperature=None, top_p=None, top_k=None, eos_token_id=ends or None,
                max_new_tokens=self.trainer.args.max_completion_length,
            )
            rows = []
            for prompt, ids in zip(self.prompts, drawn, strict=True):
                answer, ended = until_end(ids, ends)
                rows.append({
                    "step": step, "prompt": decode(prompt).strip(),
                    "completion": decode(answer).strip(),
                    "reward": self._reward(prompt, answer), "ended": ended,
                })
        finally:
            model.train(training)
        return rows

    def _reward(self, prompt: list[int], answer: list[int]) -> float:
        model = self.trainer.model
        ids = torch.tensor([prompt + answer], device=input_device(model.base))
        mask = torch.arange(ids.shape[1], device=ids.device)[None] >= len(prompt)
        return round(model.token_rewards(ids, mask).sum().item(), 6)


def _track(callback: TrainerCallback, rows: list[Row], step: int) -> None:
    """As a table, where a tracker has such; transformers hands it numbers alone."""
    data = [[row[name] for name in _COLUMNS] for row in rows]
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        callback.tb_writer.add_text("completions", markdown_table(_COLUMNS, data), step)
    elif isinstance(callback, WandbCallback) and callback._wandb.run is not None:
        table = callback._wandb.Table(columns=list(_COLUMNS), data=data)
        callback._wandb.log({"completions": table, "train/global_step": step})
    elif isinstance(callback, TrackioCallback) and callback._initialized:
        import pandas

        table = callback._trackio.Table(dataframe=pandas.DataFrame(data, columns=list(_COLUMNS)))
        callback._trackio.log({"completions": table})
