"""Training on a stream of preferences: pairs are tokenized as they come, shuffled in a buffer, and
a run that was stopped goes on with the pairs that would have come next.

Every process reads the whole stream and takes its share of each batch. So the pairs of a step don't
depend on how many processes there are, and one saved state is all of theirs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from qadapter.data.report import BadRow
from qadapter.data.streams import PreferenceStream, Reading
from qadapter.data.tokenization import OnBadRow, TruncationMode, prepare
from qadapter.data.vocabulary import check_pair
from qadapter.errors import QAdapterError
from qadapter.training.config import QAdapterConfig

STATE_NAME = "stream.safetensors"
_LISTS = {
    "prompt_ids": np.int32, "chosen_ids": np.int32, "rejected_ids": np.int32,
    "chosen_mask": np.bool_, "rejected_mask": np.bool_,
}
_DIGESTED = 128
"""Pairs by which a stream is known again."""
_BUFFER = 1000
"""Pairs that are shuffled at a time where no number is given."""
_DRAWS = 1024
"""Random numbers that are made at a time."""

Pair = dict[str, Any]
"""Token ids and masks of ``_LISTS``, and ``row``."""


class StreamedPairs(torch.utils.data.IterableDataset[Any]):
    """Tokenized pairs of a stream, pass after pass without end. Items: this process's share of a
    batch, collated.

    Args:
        stream, tokenizer: of the pairs.
        max_length, truncation_mode, on_bad_row: as in ``tokenize_preferences``.
        known, positions: token ids from 0 and positions that the model has.
        shuffle_buffer: pairs among which the next one is drawn; up to 1: as they come.

    Attributes:
        report: what became of the pairs that were read so far.
        given: pairs of all processes that were given so far.

    Raises:
        QAdapterError: as ``tokenize_preferences``, for the pairs of the first rows.
    """

    def __init__(
        self, stream: PreferenceStream, tokenizer: PreTrainedTokenizerBase, *,
        max_length: int | None, truncation_mode: TruncationMode, on_bad_row: OnBadRow,
        known: int, positions: int | None, shuffle_buffer: int, seed: int,
    ) -> None:
        self.stream, self.tokenizer, self.max_length = stream, tokenizer, max_length
        self.known, self.positions = known, positions
        self.shuffle_buffer, self.seed = max(1, shuffle_buffer), seed
        self._prepare, self.report = prepare(
            stream.sample, tokenizer, max_length, truncation_mode, on_bad_row
        )
        self.start_over()
        self._first = list(itertools.islice(self._tokenized(
            (row["row"], [row]) for row in stream.sample
        ), _DIGESTED))
        if not self._first:
            raise QAdapterError(
                f"of the first {len(stream.sample):,} pairs none can be used: "
                f"{self.report.summary()}"
            )
        self.batch_size, self.seat, self.seats = 1, 0, 1
        self.collate: Callable[[list[Pair]], Any] = lambda pairs: pairs
        self.start_over()

    def start_over(self) -> None:
        """The next pair is the first one again."""
        for name, value in (("total", 0), ("kept", 0), ("dropped", {}), ("notes", {}),
                            ("first_rows", {})):
            setattr(self.report, name, value)
        self._reading = Reading(self.stream)
        self._buffer: list[Pair] = []
        self._drawn = 0
        """Pairs that this pass has given."""
        self._exhausted = False
        self.given = 0

    @property
    def prompts(self) -> list[list[int]]:
        """Different prompts of the first pairs."""
        return list({tuple(x["prompt_ids"]): x["prompt_ids"] for x in self._first}.values())

    def digest(self) -> str:
        """Of the first pairs and of what decides which come, and when."""
        settings = [self.shuffle_buffer, self.seed, self.max_length, sorted(self.stream.left_out)]
        whole = hashlib.sha256(json.dumps(settings).encode())
        for pair in self._first:
            whole.update(json.dumps([list(map(int, pair[name])) for name in _LISTS]).encode())
        return f"stream:{whole.hexdigest()}"

    # --- pairs ----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        """From where the last iteration stopped."""
        while True:
            batch = [self._next() for _ in range(self.batch_size * self.seats)]
            self.given += len(batch)
            start = self.seat * self.batch_size
            yield self.collate(batch[start : start + self.batch_size])

    def _next(self) -> Pair:
        self._fill()
        if not self._buffer:
            self._start_pass()
        self._drawn += 1
        if self.shuffle_buffer == 1:
            return self._buffer.pop(0)
        place = self._draw(self._drawn) % len(self._buffer)
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        return self._buffer.pop()

    def _start_pass(self) -> None:
        if self._drawn == 0:
            raise QAdapterError(
                f"{self.stream.source.name}: pass {self._reading.number + 1} has no pair that can "
                f"be used: {self.report.summary()}"
            )
        self._reading.start_pass(self._reading.number + 1)
        self._drawn, self._exhausted = 0, False
        self._fill()
        if not self._buffer:
            self._start_pass()

    def _fill(self) -> None:
        while len(self._buffer) < self.shuffle_buffer and not self._exhausted:
            found = self._reading.next()
            if found is None:
                self._exhausted = True
                return
            index, row = found
            self._buffer += self._tokenized([(index, self.stream.pairs_of(row, index))])

    def _draw(self, number: int) -> int:
        """A random number that depends on the seed, the pass and how many were drawn in it."""
        key = self.seed, self._reading.number, number // _DRAWS
        if key != getattr(self, "_key", None):
            self._key = key
            self._numbers = np.random.default_rng(key).integers(2**62, size=_DRAWS).tolist()
        return self._numbers[number % _DRAWS]

    def _tokenized(self, rows: Iterable[tuple[int, list[dict[str, Any]]]]) -> Iterator[Pair]:
        """Those that can be used; all are counted."""
        for index, records in rows:
            for record in records:
                if record["prompt_id"] in self.stream.left_out:
                    continue
                self.report.total += 1
                done = self._prepare(record)
                if done["problem"] is not None:
                    reason = BadRow.parse(done["problem"]).reason
                    self.report.count(self.report.dropped, reason, [index])
                    continue
                for note in done["notes"]:
                    self.report.count(self.report.notes, note, [index])
                pair = {name: done[name] for name in _LISTS} | {"row": index}
                check_pair(
                    pair, self.known, self.positions, self.tokenizer, self.stream.source.name
                )
                self.report.kept += 1
                yield pair

    # --- the place in it ------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write what ``load`` needs; raises OSError."""
        state = {
            "place": self._reading.place(), "drawn": self._drawn, "exhausted": self._exhausted,
            "given": self.given,
            "rows": [pair["row"] for pair in self._buffer],
            "counts": {
                name: getattr(self.report, name)
                for name in ("total", "kept", "dropped", "notes", "first_rows")
            },
        }
        tensors = {}
        for name, kind in _LISTS.items():
            lists: list[np.ndarray] = [np.asarray(pair[name], dtype=kind) for pair in self._buffer]
            tensors[name] = np.concatenate([np.zeros(0, kind), *lists])
            tensors[f"{name}.lengths"] = np.array([len(x) for x in lists], dtype=np.int64)
        save_file(tensors, folder / STATE_NAME, metadata={"state": json.dumps(state)})

    def load(self, folder: Path) -> None:
        """Go on where a saved run stood.

        Raises:
            QAdapterError: nothing was saved, or the stream gives other rows than then.
        """
        path = folder / STATE_NAME
        try:
            with safe_open(path, "np") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise QAdapterError(f"{path}: no place in a stream is there ({error})") from error
        self.start_over()
        self._reading.go_to(state["place"])
        self._drawn, self._exhausted = state["drawn"], state["exhausted"]
        self.given = state["given"]
        columns = {
            name: np.split(tensors[name], np.cumsum(tensors[f"{name}.lengths"])[:-1])
            for name in _LISTS
        }
        self._buffer = [
            {name: columns[name][i].tolist() for name in _LISTS} | {"row": row}
            for i, row in enumerate(state["rows"])
        ]
        for name, value in state["counts"].items():
            setattr(self.report, name, value)


class OneEpoch(TrainerCallback):
    """A run on a stream is one epoch, also for transformers where it was resumed."""

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.epoch = state.global_step / state.max_steps


def buffer_of(args: QAdapterConfig) -> int:
    """Pairs among which the next one is drawn."""
    return _BUFFER if args.shuffle_buffer is None else args.shuffle_buffer


def check_arguments(args: QAdapterConfig) -> None:
    """What a stream can't do.

    Raises:
        QAdapterError: names the option, and the way out.
    """
    if args.max_steps <= 0:
        raise QAdapterError(
            "a stream has no known end: training on one needs max_steps (or give its rows as a "
            "list, which has epochs)"
        )
    if args.cache_features in ("memory", "disk"):
        raise QAdapterError(
            f"cache_features {args.cache_features}: nothing is kept of a stream, the base runs at "
            "every step; leave it at auto, or train on a file"
        )
    if args.dataloader_num_workers:
        raise QAdapterError(
            "dataloader_num_workers: a stream is read by the training process itself, take 0"
        )
    if args.train_sampling_strategy != "random":
        raise QAdapterError(
            f"train_sampling_strategy {args.train_sampling_strategy}: a stream's order is "
            "shuffle_buffer's, 0 for that of its rows"
        )
