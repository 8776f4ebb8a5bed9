"""The feature cache on disk: safetensors shards and an index that vouches for them.

A cache lives in a folder named by a fingerprint of everything its contents depend on: token ids,
tokenizer, lengths, the base and its dtype, the alignment of masks, which parts are kept. A shard
counts only if the index lists it with the size and SHA-256 it has; the index is written after the
shard, and both replace their file whole. So whatever is missing, damaged or left over from a killed
run is computed again, and it alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
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
from qadapter.system.documents import read_json
from qadapter.system.hashing import file_sha256
from qadapter.system.locking import exclusive
from qadapter.system.modes import give_usual_modes
from qadapter.system.progress import Progress
from qadapter.system.room import require_writable
from qadapter.system.scratch import remove_abandoned, replacing
from qadapter.training.feature_set import FeatureSet, Kept, Shard
from qadapter.training.features import (
    Tokens,
    compute_shard,
    feature_bytes,
    token_counts,
)
from qadapter.trunk.base_dtype import autocast_dtype
from qadapter.trunk.identity import digest_of
from qadapter.trunk.loading import cache_dir as default_cache_dir

FORMAT_VERSION = 2
MIB = 1 << 20
INDEX_NAME = "index.json"


def load_or_compute(
    model: QAdapterModel, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *,
    max_length: int | None, cache_dir: str | Path | None = None, shard_mb: int = 256,
    batch_tokens: int = 4096, pad_token_id: int = 0, packed: bool = True,
    progress: Progress | None = None, say: Callable[[str], None] | None = None,
) -> FeatureSet:
    """Features of tokenized pairs, mapped from disk; what is not there is computed and stored.

    Several processes may ask for the same at once: one computes, the others wait for it.

    Args:
        model, dataset, batch_tokens, pad_token_id, packed, progress: as in ``compute_features``.
        tokenizer, max_length: what the dataset was made with; part of its fingerprint.
        cache_dir: default: ``features`` in qadapter's own cache folder. Every dataset, base and
            setting gets a folder of its own below it; old ones can be deleted at any time.
        shard_mb: size of a file, MiB.
        say: gets a line if another process is waited for.

    Raises:
        QAdapterError: the folder can't be written (no space left, no permission).
    """
    folder = features_folder(
        model, dataset, tokenizer, max_length=max_length, cache_dir=cache_dir,
        pad_token_id=pad_token_id,
    )
    spans = list(_spans(dataset, model, shard_mb))
    remove_abandoned(folder)
    sizes = [end - start for start, end in spans]
    if (found := _Store(folder).load_all(sizes)) is not None:
        return FeatureSet(found, Kept.of(model))
    try:
        for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
            remove_abandoned(other)  # of other data, which may never be asked for again
        with exclusive(folder / INDEX_NAME, say):
            store = _Store(folder)  # read again: another process may just have written it
            missing = [n for n in range(len(spans)) if not store.holds(n, sizes)]
            parts = {number: dataset.select(range(*spans[number])) for number in missing}
            done = Tokens(sum(int(token_counts(part).sum()) for part in parts.values()), progress)
            for number, part in parts.items():
                shard = compute_shard(model, part, batch_tokens, pad_token_id, packed, done)
                store.write(number, len(spans), shard)
            shards = [store.load(number, len(spans)) for number in range(len(spans))]
            return FeatureSet(shards, Kept.of(model))
    except OSError as error:
        raise _cannot_cache(folder, error) from error


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


def _cannot_cache(path: Path, error: Exception) -> QAdapterError:
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
        **_autocast(model.head.weight.device.type),
    }


def _autocast(device: str) -> dict[str, str]:
    """Under autocast the base gives other numbers."""
    dtype = autocast_dtype(device)
    return {} if dtype is None else {"autocast": str(dtype)}


class _Store:
    """One cache folder, as it is now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = self._read_index()

    def load_all(self, sizes: list[int]) -> list[Shard] | None:
        """All shards, or None if one is missing, damaged, or just being deleted; ``sizes``: the
        pairs in each."""
        if not all(self.holds(number, sizes) for number in range(len(sizes))):
            return None
        try:
            return [self.load(number, len(sizes)) for number in range(len(sizes))]
        except (OSError, SafetensorError):
            return None

    def holds(self, number: int, sizes: list[int]) -> bool:
        """Whether a shard is there and is what was written, to the last bit."""
        path = self._path(number, len(sizes))
        entry = self.index["shards"].get(path.name)
        if not isinstance(entry, dict):
            return False
        try:
            same_size = path.is_file() and path.stat().st_size == entry.get("bytes")
            same = same_size and file_sha256(path) == entry.get("sha256")
            return same and _is_of(path, sizes[number])
        except (OSError, SafetensorError):
            return False

    def write(self, number: int, total: int, shard: Shard) -> None:
        path = self._path(number, total)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as written:
                save_file(shard.parts(), written)
                give_usual_modes(written.parent)
                self.index["shards"][path.name] = {
                    "bytes": written.stat().st_size, "pairs": len(shard.rows),
                    "sha256": file_sha256(written),
                }
            with replacing(self.folder / INDEX_NAME) as written:
                written.write_text(json.dumps(self.index, indent=1) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise _cannot_cache(path, error) from error

    def load(self, number: int, total: int) -> Shard:
        """Mapped into memory, so that only what is used is read."""
        return Shard(**load_file(self._path(number, total)))

    def _path(self, number: int, total: int) -> Path:
        return self.folder / f"features-{number + 1:05d}-of-{total:05d}.safetensors"

    def _read_index(self) -> dict[str, Any]:
        empty = {"format_version": FORMAT_VERSION, "fingerprint": self.folder.name, "shards": {}}
        try:
            index = read_json(self.folder / INDEX_NAME)
        except QAdapterError:
            return empty
        same = isinstance(index, dict) and all(
            index.get(key) == empty[key] for key in ("format_version", "fingerprint")
        )
        return index if same and isinstance(index.get("shards"), dict) else empty


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
        yield start, end
        start = end
