"""Checkpoints of an adapter: what is written, what counts as whole, what may be loaded."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerState

from qadapter.errors import QAdapterError
from qadapter.policy import storage
from qadapter.training import card

CHECKPOINT_STATE = "trainer_state.json"
"""Written last by transformers: a checkpoint without it was interrupted."""
ARGUMENTS_NAME = "training_args.json"


def find_checkpoint(output_dir: str | Path, wanted: str | bool) -> str:
    """The checkpoint's folder, looked through; ``wanted``: a folder, or true for the last whole
    one in ``output_dir``.

    Raises:
        QAdapterError: none there, or damaged; the message names the file.
    """
    if wanted is not True:
        folder = Path(wanted)
        if not (folder / CHECKPOINT_STATE).is_file():
            raise QAdapterError(f"{wanted}: not a checkpoint ({CHECKPOINT_STATE} is missing)")
    else:
        whole = {
            int(path.parent.name.removeprefix("checkpoint-")): path.parent
            for path in Path(output_dir).glob(f"checkpoint-[0-9]*/{CHECKPOINT_STATE}")
        }
        if not whole:
            raise QAdapterError(f"{output_dir}: no checkpoint to resume from")
        folder = whole[max(whole)]
    try:
        TrainerState.load_from_json(str(folder / CHECKPOINT_STATE))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder / CHECKPOINT_STATE, error) from error
    for path in sorted((*folder.glob("*.pt"), *folder.glob("*.pth"))):
        # torch.save writes zip files with checksums: read here, nothing need be unpickled.
        try:
            with zipfile.ZipFile(path) as file:
                bad = file.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            raise _damaged(path, error) from error
        if bad is not None:
            raise _damaged(path, f"the checksum of {bad} is wrong")
    return str(folder)


def _damaged(path: Path, why: object) -> QAdapterError:
    return QAdapterError(f"{path} is damaged ({why}): resume from another checkpoint")


class AdapterCheckpoints(Trainer):
    """A ``Trainer`` whose checkpoints hold the adapter alone, and nothing of it as pickle."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        was_there = folder.exists()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, QAdapterError) as error:  # torch raises RuntimeError
            if not was_there:
                shutil.rmtree(folder, ignore_errors=True)
            raise QAdapterError(
                f"{folder}: the checkpoint can't be saved: {error}; earlier ones are as they were"
            ) from error

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """The adapter, the tokenizer, the arguments and the card; nothing that needs pickle."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        # After the tokenizer, which writes a chat template too: the adapter's manifest lists it.
        self.model.save_pretrained(folder, state_dict=state_dict)
        (folder / ARGUMENTS_NAME).write_text(self.args.to_json_string() + "\n", encoding="utf-8")
        card.write(self, folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_adapter(self.state.best_model_checkpoint)

    def _load_adapter(self, folder: str) -> None:
        saved = storage.read(folder)
        saved.base.require(self.model.base_identity, folder)
        theirs, ours = storage.describe(saved.adapter), storage.describe(self.model.adapter_config)
        if (theirs, saved.objective) != (ours, self.model.objective):
            raise QAdapterError(
                f"{folder}: trained with {theirs}, {saved.objective}; this run has {ours}, "
                f"{self.model.objective}"
            )
        storage.load_weights(folder, self.model.adapter)
