"""The feature cache on disk: safetensors shards, each with a record that vouches for it.

A cache lives in a folder named by a fingerprint of everything its contents depend on: token ids,
tokenizer, lengths, the base and its dtype, the alignment of masks, which parts are kept. A shard
counts only if it has the size and SHA-256 that its record says; the record is written after the
shard, and both replace their file whole. So whatever is missing, damaged or left over from a killed
run is computed again, and it alone.

Any number of processes build a cache together, on any number of machines that see the folder: each
claims one missing shard after the other by a lock beside it, which dies with its process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from qadapter.data import fingerprint
from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterModel
from qadapter.system import locking
from qadapter.system.caches import cache_dir as default_cache_dir
from qadapter.system.documents import read_json
from qadapter.system.hashing import file_sha256
from qadapter.system.modes import give_usual_modes
from qadapter.system.progress import Progress
from qadapter.system.room import require_writable
from qadapter.system.scratch import remove_abandoned, replacing
from qadapter.training.crew import Crew
from qadapter.training.feature_building import Building
from qadapter.training.feature_set import FeatureSet, Kept, Shard
from qadapter.training.features import (
    Tokens,
    compute_shard,
    feature_bytes,
    longest,
    run_idly,
    token_counts,
)
from qadapter.trunk.base_dtype import autocast_dtype
from qadapter.trunk.identity import digest_of
from qadapter.trunk.packing import can_pack

FORMAT_VERSION = 3
MIB = 1 << 20
_MOST_PAIRS = 4096
"""Of a shard, which is put together in memory."""


def load_or_compute(
    model: QAdapterModel, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *,
    max_length: int | None, cache_dir: str | Path | None = None, shard_mb: int = 256,
    batch_tokens: int = 4096, pad_token_id: int = 0, packed: bool = True, crew: Crew | None = None,
    progress: Progress | None = None, say: Callable[[str], None] | None = None,
) -> FeatureSet:
    """Features of tokenized pairs, mapped from disk; what is not there is computed and stored.

    Several processes may ask for the same at once: they share the work, shard by shard.

    Args:
        model, dataset, batch_tokens, pad_token_id, packed, progress: as in ``compute_features``.
        tokenizer, max_length: what the dataset was made with; part of its fingerprint.
        cache_dir: default: ``features`` in qadapter's own cache folder. Every dataset, base and
            setting gets a folder of its own below it; old ones can be deleted at any time.
        shard_mb: size of a file, MiB.
        crew: the processes of this launch; default: this one alone.
        say: gets a line about what other processes do or have done.

    Raises:
        QAdapterError: the folder can't be written (no space left, no permission).
    """
    folder = features_folder(
        model, dataset, tokenizer, max_length=max_length, cache_dir=cache_dir,
        pad_token_id=pad_token_id,
    )
    crew = crew or Crew()
    store = Store(folder, _spans(dataset, model, shard_mb))
    remove_abandoned(folder)
    store.remove_stale_claims()
    if crew.agree((found := store.load_all()) is not None):
        return FeatureSet(found, Kept.of(model))
    packed = packed and can_pack(model.base, longest(dataset)) is None
    crew = crew if packed else crew.as_one()  # padded, a batch may be several forwards
    counts = token_counts(dataset)

    def read(part: Dataset, done: Tokens) -> Shard:
        return compute_shard(model, part, batch_tokens, pad_token_id, packed, done, crew.most)

    def idle() -> None:
        run_idly(model, crew.most(0), packed)

    try:
        for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
            remove_abandoned(other)  # of other data, which may never be asked for again
        for _ in range(2):
            folder.mkdir(parents=True, exist_ok=True)
            Building(store, dataset, crew, counts, progress, say).run(read, idle)
            if crew.agree((found := store.load_all()) is not None):
                return FeatureSet(found, Kept.of(model))
            store.forget()  # files were deleted meanwhile: once more
    except OSError as error:
        raise _cannot_cache(folder, error) from error
    raise _cannot_cache(folder, "files that were just written can't be read")


def load_finished(
    model: QAdapterModel, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *,
    max_length: int | None, cache_dir: str | Path | None = None, shard_mb: int = 256,
    pad_token_id: int = 0, say: Callable[[str], None] | None = None,
) -> FeatureSet:
    """What is there of a cache, whole or still being built; arguments as ``load_or_compute``'s.
    Nothing is computed and nobody waited for. Its pairs have their ``row``.

    Args:
        say: gets a line about how much is there.
    """
    folder = features_folder(
        model, dataset, tokenizer, max_length=max_length, cache_dir=cache_dir,
        pad_token_id=pad_token_id,
    )
    store = Store(folder, _spans(dataset, model, shard_mb))
    found = store.load_some()
    if say is not None and len(found) < len(store.spans):
        pairs = sum(len(shard.rows) for shard in found)
        say(f"{len(found)} of {len(store.spans)} files of features are finished: "
            f"{pairs:,} of {len(dataset):,} pairs")
    return FeatureSet(found, Kept.of(model))


def features_folder(
    model: QAdapterModel, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *,
    max_length: int | None, cache_dir: str | Path | None, pad_token_id: int,
) -> Path:
    """The folder of one dataset's features; arguments as in ``load_or_compute``."""
    identity = cache_identity(model, pad_token_id)
    name = fingerprint(dataset, tokenizer, identity, max_length)
    return Path(cache_dir or default_cache_dir() / "features").expanduser() / name


def bytes_in(folder: Path) -> int:
    """What is there of a dataset's features, whole or not."""
    try:
        return sum(path.stat().st_size for path in folder.glob("features-*.safetensors"))
    except OSError:
        return 0


def check_folder(folder: Path) -> None:
    """Make the folder and see whether it can be written.

    Raises:
        QAdapterError: it can't; names ``feature_cache_dir``.
    """
    try:
        require_writable(folder)
    except OSError as error:
        raise _cannot_cache(folder, error) from error


def _cannot_cache(path: Path, error: Exception | str) -> QAdapterError:
    return QAdapterError(
        f"{path}: features can't be cached ({error}); free some space, or choose another "
        "feature_cache_dir or cache_features, and run it again: what the base has read is kept"
    )


def cache_identity(model: QAdapterModel, pad_token_id: int) -> dict[str, Any]:
    """Everything of a model that its features depend on, as JSON."""
    base, alignment = model.base, model.objective.mask_alignment
    return {
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(model.base_identity),
        "weights": digest_of(model.bare_base()),
        "kept": Kept.of(model)._asdict(),
        "dtype": str(base.dtype),
        "mask_alignment": alignment,
        "pad_token_id": pad_token_id if alignment == "state" else None,
        **_autocast(model.head.device.type),
    }


def _autocast(device: str) -> dict[str, str]:
    """Under autocast the base gives other numbers."""
    dtype = autocast_dtype(device)
    return {} if dtype is None else {"autocast": str(dtype)}


class Store:
    """The files of one cache.

    Args:
        spans: the pairs (start, end) that each shard is of.
    """

    def __init__(self, folder: Path, spans: Iterable[tuple[int, int]]) -> None:
        self.folder, self.spans = folder, list(spans)
        self._seen: set[int] = set()
        """Shards that were whole when they were looked at."""

    def load_all(self) -> list[Shard] | None:
        """All shards; None if one is missing or damaged, or has just been deleted."""
        if self.missing():
            return None
        try:
            return [self._load(number) for number in range(len(self.spans))]
        except (OSError, SafetensorError):
            self.forget()
            return None

    def load_some(self) -> list[Shard]:
        """Those that are there."""
        found = []
        for number in sorted(set(range(len(self.spans))) - set(self.missing())):
            with contextlib.suppress(OSError, SafetensorError):
                found.append(self._load(number))
        return found

    def missing(self) -> list[int]:
        """Shards that are not there, or not what was written. Each is read once; the folder is
        listed, as it may be far away and have thousands."""
        try:
            there = set(os.listdir(self.folder))
        except OSError:
            there = set()
        return [
            number for number in range(len(self.spans))
            if self._record(number).name not in there or not self.holds(number)
        ]

    def holds(self, number: int) -> bool:
        """Whether a shard is there and is what was written, to the last bit."""
        if number not in self._seen and self._is_whole(number):
            self._seen.add(number)
        return number in self._seen

    def claim(self, number: int) -> bool:
        """Whether this process may make a shard; nobody else may until it is released."""
        return locking.take(self._lock(number))

    def release(self, number: int) -> None:
        locking.let_go(self._lock(number))

    def write(self, number: int, shard: Shard) -> None:
        path, record = self._path(number), self._record(number)
        try:
            with replacing(path) as written:
                save_file(shard.parts(), written)
                give_usual_modes(written.parent)
                found = {
                    "format_version": FORMAT_VERSION, "fingerprint": self.folder.name,
                    "bytes": written.stat().st_size, "pairs": len(shard.rows),
                    "sha256": file_sha256(written),
                }
            with replacing(record) as written:
                written.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise _cannot_cache(path, error) from error

    def forget(self) -> None:
        """Look at all of them again."""
        self._seen.clear()

    def remove_stale_claims(self) -> None:
        """Those of processes that were killed."""
        for path in self.folder.absolute().glob("features-*.lock"):
            locking.remove_stale(path)

    def _load(self, number: int) -> Shard:
        """Mapped into memory, so that only what is used is read."""
        return Shard(**load_file(self._path(number)))

    def _is_whole(self, number: int) -> bool:
        path, record = self._path(number), self._record(number)
        try:
            if not record.is_file():
                return False
            found = read_json(record)
            wanted = {"format_version": FORMAT_VERSION, "fingerprint": self.folder.name}
            if not isinstance(found, dict) or any(found.get(k) != v for k, v in wanted.items()):
                return False
            same_size = path.is_file() and path.stat().st_size == found.get("bytes")
            same = same_size and file_sha256(path) == found.get("sha256")
            start, end = self.spans[number]
            return same and _is_of(path, end - start)
        except (OSError, SafetensorError, QAdapterError):
            return False

    def _path(self, number: int) -> Path:
        name = f"features-{number + 1:05d}-of-{len(self.spans):05d}.safetensors"
        return self.folder.absolute() / name

    def _record(self, number: int) -> Path:
        return self._path(number).with_suffix(".json")

    def _lock(self, number: int) -> Path:
        return self._path(number).with_suffix(".lock")


def _is_of(path: Path, pairs: int) -> bool:
    """Whether a file is a shard of so many pairs."""
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        needed = {name for name in Shard._fields if name not in Shard._field_defaults}
        return needed <= names <= set(Shard._fields) and all(
            file.get_slice(name).get_shape() == [count] for name, count in
            (("rows", pairs), ("lengths", 2 * pairs), ("offsets", 2 * pairs + 1))
        )


def _spans(dataset: Dataset, model: QAdapterModel, shard_mb: int) -> Iterator[tuple[int, int]]:
    """Runs of pairs whose features take about ``shard_mb``."""
    sizes = np.cumsum(feature_bytes(model, dataset))
    start, limit = 0, shard_mb * MIB
    while start < len(dataset):
        before = sizes[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(sizes, before + limit, side="right")))
        end = min(end, start + _MOST_PAIRS)
        yield start, end
        start = end
