"""How the missing shards of a feature cache are shared out among processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from datasets import Dataset

from qadapter.errors import QAdapterError
from qadapter.training.crew import Crew
from qadapter.training.feature_set import Shard
from qadapter.training.features import Tokens

_LOOK_AGAIN = 0.5
"""Seconds between two looks at what other processes have finished."""
_UNSEEN = 120.0
"""Seconds after which all machines should see a file that one has written."""


class Files(Protocol):
    """The shards of a cache, by number; ``feature_store.Store``."""

    spans: list[tuple[int, int]]

    def missing(self) -> list[int]:
        """Those that are not there, or not what was written."""

    def holds(self, number: int) -> bool: ...

    def claim(self, number: int) -> bool:
        """Whether this process may make it; then ``release`` must follow."""

    def release(self, number: int) -> None: ...

    def write(self, number: int, shard: Shard) -> None: ...


Read = Callable[[Dataset, Tokens], Shard]
"""What the base says of a part of the pairs; counts what it has read."""


class Building:
    """Makes what is missing of a cache, with all others that do.

    Args:
        files: of the cache. dataset: its pairs. crew: this process among others.
        counts: tokens of each pair, int64 [P].
        progress: called with (tokens there or read, tokens that were missing at first).
        say: gets a line about what other processes do.
    """

    def __init__(
        self, files: Files, dataset: Dataset, crew: Crew, counts: np.ndarray,
        progress: Callable[[int, int], None] | None, say: Callable[[str], None] | None,
    ) -> None:
        self.files, self.dataset, self.crew, self.say = files, dataset, crew, say
        self._sizes = [int(counts[start:end].sum()) for start, end in files.spans]
        self._left = files.missing()
        self.done = Tokens(sum(self._sizes[n] for n in self._left), progress)

    def run(self, read: Read, idle: Callable[[], None]) -> None:
        """Until nothing is missing.

        Args:
            read: what the base says of a part of the pairs.
            idle: called under lockstep where other processes have a part and this one has none.

        Raises:
            QAdapterError, OSError: a shard can't be written; under lockstep by all processes.
        """
        if self.crew.lockstep:
            self._in_lockstep(read, idle)
        else:
            self._each_for_itself(read)

    # --- each for itself ----------------------------------------------------------------------

    def _each_for_itself(self, read: Read) -> None:
        told = False
        while missing := self._missing():
            number = next((n for n in self.crew.in_order(missing) if self.files.claim(n)), None)
            if number is not None:
                self._make(number, read)
                continue
            if not told and self.say is not None:
                self.say(f"waiting for other processes that make {len(missing)} of "
                         f"{len(self._sizes)} files of features")
            told = True
            time.sleep(_LOOK_AGAIN)

    def _make(self, number: int, read: Read) -> None:
        """A shard that this process has claimed."""
        try:
            if not self.files.holds(number):  # else another has just made it
                self.files.write(number, read(self._part(number), self.done))
                self._left.remove(number)
        finally:
            self.files.release(number)

    def _missing(self) -> list[int]:
        """What is; the work of others is counted as done."""
        missing = self.files.missing()
        finished = set(self._left) - set(missing)
        if finished:
            self._left = [n for n in self._left if n not in finished]
            self.done.add(sum(self._sizes[n] for n in finished))
        return missing

    def _part(self, number: int) -> Dataset:
        return self.dataset.select(range(*self.files.spans[number]))

    # --- all at once --------------------------------------------------------------------------

    def _in_lockstep(
        self, read: Read, idle: Callable[[], None]
    ) -> None:
        """Rounds, in each of which every process has a shard to make, or runs the base idly."""
        unseen_since: float | None = None
        failure: Exception | None = None
        while True:
            reports = self.crew.gather((self._missing(), None if failure is None else str(failure)))
            if failure is not None:
                raise failure
            if told := next((text for _, text in reports if text is not None), None):
                raise QAdapterError(told)
            everywhere = sorted(set.intersection(*(set(missing) for missing, _ in reports)))
            somewhere = sorted(set().union(*(missing for missing, _ in reports)))
            if not somewhere:
                return
            if not everywhere:
                unseen_since = unseen_since or time.monotonic()
                late = time.monotonic() - unseen_since > _UNSEEN
                if any(self.crew.gather(late)):
                    raise QAdapterError(
                        f"features {somewhere[0] + 1} of {len(self._sizes)} are written and not "
                        "seen by all processes: with a sharded base, feature_cache_dir must be on "
                        "a file system that all of them share"
                    )
                time.sleep(_LOOK_AGAIN)
                continue
            unseen_since = None
            failure = self._round(everywhere, read, idle)

    def _round(
        self, missing: list[int], read: Read, idle: Callable[[], None]
    ) -> Exception | None:
        """What went wrong here is told when all have run what they must."""
        claimed = None
        if self.crew.leads:
            ours = missing[self.crew.seat] if self.crew.seat < len(missing) else None
            claimed = ours if ours is not None and self.files.claim(ours) else None
        taken = self.crew.gather(claimed)
        number = taken[self.crew.leader]
        try:
            if all(x is None for x in taken):  # all of them are being made by other launches
                time.sleep(_LOOK_AGAIN)
                return None
            if number is None:
                idle()
                return None
            shard = read(self._part(number), self.done)
            if claimed is None:
                return None
            try:
                self.files.write(claimed, shard)
            except (QAdapterError, OSError) as error:
                return error
            self._left.remove(claimed)
            return None
        finally:
            if claimed is not None:
                self.files.release(claimed)
