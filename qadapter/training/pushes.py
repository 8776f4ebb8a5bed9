"""What a trainer sends to the hub: the adapter's files, its tokenizer's and the card. Checkpoints
go along where ``hub_strategy`` says so; nothing else of the output folder does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from qadapter.policy import hub
from qadapter.training.config import QAdapterConfig


class HubPushes(Trainer):
    """A ``Trainer`` whose pushes hold what a load reads."""

    args: QAdapterConfig
    _tokenizer_files: Sequence[str] = ()
    """Names of what the tokenizer was saved as."""
    _repo: str | None = None
    """The repository, once it is there."""
    _pushes: Sequence[Future[Any]] = ()
    """Those that are still going on, or were never looked at."""

    def _tell(self, line: str, level: int = logging.WARNING) -> None:
        """A line about something that was decided here."""
        raise NotImplementedError

    def _make_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Called before anything is loaded, as this is what may fail; raises QAdapterError."""
        args = self.args
        if self._repo is None and args.process_index == 0:
            self._repo = hub.create(
                args.hub_model_id or self._folder.resolve().name,
                token or args.hub_token,
                args.hub_private_repo if private is None else private,
            )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, if it is not there; raises QAdapterError."""
        self._make_repo(token, private)
        self.hub_model_id = self._repo  # type: ignore[assignment]  # transformers declares None

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True,
        token: str | None = None, revision: str | None = None, private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the adapter and send it.

        Args:
            blocking: wait until it is there.
            kwargs: of ``create_model_card``: dataset_name, tags, license, results, …

        Returns:
            What ``HfApi.create_commit`` gives; a future where ``blocking`` is False.

        Raises:
            QAdapterError: no network, no token, no permission. What was trained is saved.
        """
        self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)  # of several processes, all
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self._repo} | kwargs)
        self._finish_current_push()
        return self._commit(
            hub.adapter_operations(self._folder, self._more(self._folder)),
            commit_message or "End of training", token, revision, blocking,
        )

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir or ".")

    def _finish_current_push(self) -> None:
        wait(self._pushes)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """transformers calls it before a checkpoint is whole: ``_push_checkpoint`` does it."""

    def _push_checkpoint(self, folder: Path) -> None:
        """Send a whole checkpoint's adapter, while training goes on: it waits for none that is
        still being sent, and ends for none that could not be."""
        args = self.args
        if not args.push_to_hub or args.hub_strategy == HubStrategy.END:
            return
        if not self.is_world_process_zero():
            return
        for done in (push for push in self._pushes if push.done()):
            if (error := done.exception()) is not None:
                self._tell(f"push_to_hub: {hub.first_line(error)}; training goes on")
        self._pushes = [push for push in self._pushes if not push.done()]
        if self._pushes and not args.hub_always_push:
            return
        operations = hub.adapter_operations(folder, self._more(folder))
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            newest = args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if newest else folder.name
            operations += [
                CommitOperationAdd(f"{place}/{path.relative_to(folder).as_posix()}", path)
                for path in sorted(folder.rglob("*")) if path.is_file()
            ]
        message = f"Training in progress, step {self.state.global_step}"
        push = self._commit(operations, message, None, None, blocking=False)
        self._pushes = [*self._pushes, push]

    def _commit(
        self, operations: list[CommitOperationAdd], message: str, token: str | None,
        revision: str | None, blocking: bool,
    ) -> Any:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        return hub.commit(
            self._repo or "", operations, message=message, token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision, run_as_future=not blocking,
            way_out=f"the adapter is saved in {self.args.output_dir}: "
            "QAdapterModel.from_pretrained(…).push_to_hub(…) sends it later",
        )

    def _more(self, folder: Path) -> dict[str, Path]:
        paths = {name: folder / name for name in self._tokenizer_files}
        return {name: path for name, path in paths.items() if path.is_file()}
