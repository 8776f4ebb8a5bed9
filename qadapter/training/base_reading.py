"""The part of the trainer that runs the frozen base: features, own samples, retention states.

All of it happens once, before the first step; how much room it takes is known before it starts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader
from transformers import Trainer

from qadapter.data import padding_id
from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterModel
from qadapter.system.progress import Progress, Reporter, silent, tqdm_bar
from qadapter.system.room import available_memory, free_disk
from qadapter.training import feature_store
from qadapter.training.config import QAdapterConfig
from qadapter.training.crew import Crew
from qadapter.training.feature_set import FeatureSet
from qadapter.training.features import compute_features, feature_bytes, longest
from qadapter.training.own_samples import load_or_sample
from qadapter.training.placement import DiskRoom, place
from qadapter.training.retention import RetentionStates, scored_sequences
from qadapter.training.streaming import StreamedPairs
from qadapter.trunk.packing import can_pack
from qadapter.trunk.sharding import layout_of

logger = logging.getLogger(__name__)


class BaseReading(Trainer):
    """A ``Trainer`` on what a frozen base says, which is read once."""

    model: QAdapterModel
    args: QAdapterConfig
    _retention_texts: Any = None
    _retention_states: RetentionStates | None = None
    _training_prompts: Sequence[list[int]]
    _reporter: Reporter | None = None
    _say: Callable[[str], None] | None = None
    _pads_because: str | None = None

    @property
    def caches_features(self) -> bool:
        """Whether the base runs once over the data instead of at every step."""
        return self.args.cache_features != "none"

    @property
    def _pad_token_id(self) -> int:
        return padding_id(self.model, self.processing_class)

    def _prepare(self, dataset: Any, name: str) -> Dataset | FeatureSet:
        """A dataset in any form to tokenized pairs; features stay as they are."""
        raise NotImplementedError

    def features(self, dataset: Any, name: str = "eval") -> FeatureSet:
        """The base's features of a dataset, raw or tokenized; from the cache on disk if there."""
        return self._features((name, self._prepare(dataset, name)))[0]

    def read_base(self) -> None:
        """Everything that training needs of the base.

        Raises:
            QAdapterError: it does not fit where it is to be kept; nothing was run then.
        """
        if self._retention_texts is not None:  # what is wrong with them is told first
            scored_sequences(
                self.model, self.processing_class, self._retention_texts, self.args.max_length
            )
        self._settle_packing(self.train_dataset)
        if self.model.split_refused:
            self._tell(f"the whole trunk runs at every step: {self.model.split_refused}")
        if self.caches_features:
            self._tell("entropy and KL are not logged: no step computes the base's logits "
                       "(cache_features none does)", logging.INFO)
            held_out: dict[str, Any] = {}
            if self.args.eval_strategy != "no" and self.eval_dataset is not None:
                named = isinstance(self.eval_dataset, dict)
                held_out = self.eval_dataset if named else {"eval": self.eval_dataset}
            self.train_dataset, *found = self._features(
                ("train", self.train_dataset), *held_out.items()
            )
            if held_out is self.eval_dataset:
                self.eval_dataset = dict(zip(held_out, found, strict=True))
            elif found:
                [self.eval_dataset] = found
        if self.args.retention_coef > 0 and self._retention_states is None:
            with self.compute_loss_context_manager():
                self._retention_states = self._read_retention()

    def _features(self, *datasets: tuple[str, Dataset | FeatureSet]) -> list[FeatureSet]:
        """Of datasets and their names; there is room for all of them, or none is computed."""
        todo = [x for _, x in datasets if not isinstance(x, FeatureSet)]
        where = self._place(todo) if todo else None
        return [
            x if isinstance(x, FeatureSet) else self._compute(x, name, where)
            for name, x in datasets
        ]

    def _compute(self, dataset: Dataset, name: str, where: str) -> FeatureSet:
        settings = {
            "batch_tokens": self.args.feature_batch_tokens, "pad_token_id": self._pad_token_id,
            "packed": self.args.padding_free is not False,
        }
        pairs = "training pairs" if name == "train" else "held-out pairs"
        with (
            self._working(f"the base reads the {pairs}", "tokens") as progress,
            self.compute_loss_context_manager(),  # what the base would run in at a step
        ):
            if where == "memory":
                return compute_features(self.model, dataset, progress=progress, **settings)
            return feature_store.load_or_compute(
                self.model, dataset, self.processing_class, progress=progress, say=self._tell,
                max_length=self.args.max_length, cache_dir=self.args.feature_cache_dir,
                shard_mb=self.args.feature_shard_mb, crew=self._crew(), **settings,
            )

    @property
    def _data_size(self) -> int:
        """Processes that see different pairs."""
        return self.accelerator.num_processes // layout_of(self.model.base).tp_size

    def _crew(self) -> Crew:
        """This process among those that read the base."""
        layout, index = layout_of(self.model.base), self.accelerator.process_index
        seat = index // layout.tp_size
        return Crew(
            seat=seat, seats=self._data_size, index=index, leader=seat * layout.tp_size,
            lockstep=bool(layout.engine), gather=lambda x: gather_object([x]),
        )

    def _place(self, datasets: Sequence[Dataset]) -> str:
        """"memory" or "disk" for the features of all of these; all processes agree."""
        found: list[Any] = [None]
        processes = self.accelerator.num_processes
        # A name needs sums over the base's weights, which may lie on all processes.
        several = processes > 1 and self.args.cache_features != "memory"
        folders = [self._folder_of(x) for x in datasets] if several else None
        if self.is_world_process_zero():
            sizes = [int(feature_bytes(self.model, x).sum()) for x in datasets]
            try:
                found = [place(
                    self.args.cache_features, sum(sizes), available_memory(),
                    lambda: _disk_room(folders or map(self._folder_of, datasets), sizes),
                    processes,
                )]
            except QAdapterError as error:
                found = [error]
        if processes > 1:
            broadcast_object_list(found)
        if isinstance(found[0], QAdapterError):
            raise found[0]
        self._tell(found[0].reason, logging.INFO)
        return found[0].where

    def _folder_of(self, dataset: Dataset) -> Path:
        with self.compute_loss_context_manager():
            return feature_store.features_folder(
                self.model, dataset, self.processing_class, max_length=self.args.max_length,
                cache_dir=self.args.feature_cache_dir, pad_token_id=self._pad_token_id,
            )

    # --- retention --------------------------------------------------------------------------

    def _read_retention(self) -> RetentionStates:
        texts = self._retention_texts
        if texts is None:
            with (
                self._working("the base answers training prompts", "answers") as progress,
                nullcontext() if self._crew().lockstep else self.accelerator.main_process_first(),
            ):
                texts = load_or_sample(
                    self.model, self._training_prompts, self.processing_class,
                    cache_dir=self.args.feature_cache_dir, progress=progress, say=self._tell,
                    crew=self._crew(),
                )
        with self._working("the base reads the retention texts", "texts") as progress:
            return RetentionStates(
                self.model, self.processing_class, texts, max_length=self.args.max_length,
                progress=progress,
            )

    # --- what is fed -------------------------------------------------------------------------

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """By a mesh accelerate knows which processes get the same batches: all of a tensor-parallel
        base do. Its state is that of every trainer there is."""
        if self.args.parallelism_config is None:
            mesh = layout_of(self.model.base).mesh
            self.accelerator.state.device_mesh = mesh and DeviceMesh.from_group(
                mesh.get_group(), mesh.device_type, mesh_dim_names=("tp",)
            )
        return super()._get_dataloader(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise QAdapterError("training needs a train_dataset")
        if isinstance(self.train_dataset, StreamedPairs):
            return self._stream_loader(self.train_dataset)
        if self.caches_features:
            self.train_dataset = self._features(("train", self.train_dataset))[0]
        self._settle_packing(self.train_dataset)
        return super().get_train_dataloader()

    def _stream_loader(self, stream: StreamedPairs) -> DataLoader:
        """Nothing is fetched ahead: when a checkpoint is saved, the stream is where training is."""
        crew = self._crew()
        stream.batch_size, stream.seat, stream.seats = (
            self._train_batch_size, crew.seat, crew.seats
        )
        stream.collate = lambda pairs: send_to_device(self.data_collator(pairs), self.args.device)
        self._settle_packing(stream)
        # A generator of its own: the global one is where the checkpoint left it.
        return DataLoader(
            stream, batch_size=None, collate_fn=lambda batch: batch, generator=torch.Generator()
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if eval_dataset is None:
            raise QAdapterError("evaluation needs an eval_dataset")
        if isinstance(eval_dataset, str):
            if self.caches_features:
                found = self._features((eval_dataset, self.eval_dataset[eval_dataset]))[0]
                self.eval_dataset[eval_dataset] = found
        elif eval_dataset is self.eval_dataset:
            if self.caches_features:
                self.eval_dataset = eval_dataset = self._features(("eval", eval_dataset))[0]
        else:
            prepare = self.features if self.caches_features else self._prepare
            eval_dataset = prepare(eval_dataset, "eval")
        named = isinstance(eval_dataset, str)
        self._settle_packing(self.eval_dataset[eval_dataset] if named else eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        prepare = self.features if self.caches_features else self._prepare
        test_dataset = prepare(test_dataset, "test")
        self._settle_packing(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _settle_packing(self, dataset: Dataset | FeatureSet | StreamedPairs) -> None:
        """Whether trunks run on rows without padding; once they can't, they don't."""
        model, wanted = self.model, self.args.padding_free
        packed = wanted is not False and self._pads_because is None
        if packed:
            reason = can_pack(model.base, _longest(dataset), gradients=model.adapts_trunk)
            if reason is not None and wanted:
                raise QAdapterError(f"padding_free: {reason}")
            if reason is not None:
                self._pads_because = reason
                self._tell(f"sequences are padded: {reason}")
            packed = reason is None
        # Dropped alike on a shared prompt, two answers would not be two draws.
        share = not (model.adapts_trunk and model.adapter.drops)
        self.data_collator.settle(packed, share)

    # --- what is said ------------------------------------------------------------------------

    def _working(self, description: str, unit: str) -> AbstractContextManager[Progress]:
        """A context that shows how far something is, on the main process."""
        if not self.is_world_process_zero():
            return silent(description, unit)
        if self._reporter is not None:
            return self._reporter(description, unit)
        return (silent if self.args.disable_tqdm else tqdm_bar)(description, unit)

    def _tell(self, line: str, level: int = logging.WARNING) -> None:
        """A line about something that was decided here, on the main process."""
        if self.args.process_index > 0:
            return
        if self._say is None:
            logger.log(level, line)
        else:
            self._say(line)


def _disk_room(folders: Iterable[Path], sizes: Sequence[int]) -> DiskRoom:
    """For features of these sizes in these folders."""
    to_write, place = 0, Path()
    for folder, size in zip(folders, sizes, strict=True):
        place, there = folder, feature_store.bytes_in(folder)
        if there < size:
            feature_store.check_folder(folder)
            to_write += size - there
    return DiskRoom(str(place.parent), free_disk(place), to_write)


def _longest(dataset: Dataset | FeatureSet | StreamedPairs) -> int:
    """Tokens of the longest sequence, or the most that one of a stream may have."""
    if isinstance(dataset, StreamedPairs):
        return dataset.max_length or sys.maxsize
    return longest(dataset)
