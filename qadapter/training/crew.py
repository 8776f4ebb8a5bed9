"""The processes that read the base over one set of pairs, and which of them does what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Crew(NamedTuple):
    """A process among those of its launch.

    Shards of features are claimed one by one, by locks: any number of processes, of any number of
    launches and machines, read one set of pairs, and none needs to know of another. Its seat says
    with which shards a process begins, so that those of one launch don't meet.
    """

    seat: int = 0
    seats: int = 1
    lockstep: bool = False
    """A forward of the base is a collective: all processes must run as many, at the same points."""
    gather: Callable[[Any], list[Any]] = lambda x: [x]
    """What every process hands in, in their order; called under lockstep alone."""
    index: int = 0  # type: ignore[assignment]  # and no tuple's method
    """Of this process in what is gathered."""
    leader: int = 0
    """The process that claims and writes for this one's seat: itself, unless several compute the
    same."""

    def as_one(self) -> Crew:
        """All processes compute the same, the first one writes."""
        return self._replace(seat=0, seats=1, leader=0)

    @property
    def leads(self) -> bool:
        return not self.lockstep or self.index == self.leader

    def in_order(self, shards: Iterable[int]) -> list[int]:
        """As this process tries to claim them: its own share first."""
        return sorted(shards, key=lambda n: (n % self.seats != self.seat, n))

    def agree(self, ready: bool) -> bool:
        """Whether all processes are."""
        return all(self.gather(ready)) if self.lockstep else ready

    def most(self, count: int) -> int:
        """The highest count of all processes."""
        return max(self.gather(count)) if self.lockstep else count

    def first(self, x: Any) -> Any:
        """What the first process hands in."""
        return self.gather(x)[0] if self.lockstep else x
