"""The most frequent keys of a stream, in bounded memory, with a bound on the error of every count. Counts only.

Space-Saving (Metwally, Agrawal and El Abbadi 2005): a key that is held is counted; one that is not takes over the
smallest counter, and what that stood at is how much of the new count may be somebody else's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heapreplace, nlargest
from typing import TypedDict

SIZE = 1000


class HeavyHittersState(TypedDict):
    """A sketch as plain JSON: its size, and key, count and error of every counter."""

    size: int
    counters: list[tuple[str, int, int]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """How often a key has come: at most `count`, and at least `count - error` times."""

    key: str
    count: int
    error: int


class HeavyHitters:
    """`size` counters for a stream of `n` keys: any key that came more than n / size times is held.

    A key that is held costs one look-up. A new one takes the smallest counter off a heap whose order is mended only
    when it is needed: each count sets at most one entry right later on, so that a flood of invented keys costs
    O(log size) for each, taken over all of them.
    """

    __slots__ = ("_counters", "_heap", "_size")

    def __init__(self, size: int = SIZE) -> None:
        if size < 1:
            raise ValueError(f"a sketch needs at least 1 counter, got {size}")
        self._size = size
        self._counters: dict[str, list[int]] = {}  # count and error
        self._heap: list[tuple[int, str]] = []  # counts as they were: never above what they are; made when first full

    def __repr__(self) -> str:
        return f"<HeavyHitters [{len(self._counters)} of {self._size} counters]>"

    def __len__(self) -> int:
        return len(self._counters)

    def add(self, key: str) -> None:
        """Count a key once."""
        counter = self._counters.get(key)
        if counter is not None:
            counter[0] += 1
        elif len(self._counters) < self._size:
            self._counters[key] = [1, 0]
        else:
            self._replace(key)

    @property
    def floor(self) -> int:
        """The most a key may have come that is not held."""
        if len(self._counters) < self._size:
            return 0
        return min(count for count, _ in self._counters.values())

    def estimate(self, key: str) -> Estimate:
        """Return how often a key has come, whether it is held or not."""
        counter = self._counters.get(key)
        if counter is None:
            floor = self.floor
            return Estimate(key, floor, floor)
        return Estimate(key, *counter)

    def heaviest(self, limit: int) -> list[Estimate]:
        """Return the keys that came most often, the heaviest first."""
        keys = nlargest(limit, self._counters, key=lambda key: self._counters[key][0])
        return [Estimate(key, *self._counters[key]) for key in keys]

    def state(self) -> HeavyHittersState:
        """Return all that is held, to be merged elsewhere."""
        counters = [(key, count, error) for key, (count, error) in self._counters.items()]
        return {"size": self._size, "counters": counters}

    @classmethod
    def from_state(cls, state: HeavyHittersState) -> "HeavyHitters":
        """Build the sketch whose `state` this is."""
        other = cls(state["size"])
        other._counters = {key: [count, error] for key, count, error in state["counters"]}
        return other

    def merge(self, state: HeavyHittersState) -> None:
        """Take in what another sketch of the same size has counted.

        A key that only one of them holds may have come to the other as often as its smallest counter says; adding
        that keeps every bound, and any key that came more than (n1 + n2) / size times (after Agarwal et al. 2012,
        "Mergeable Summaries"). Raises ValueError.
        """
        if state["size"] != self._size:
            raise ValueError(f"a sketch of {state['size']} counters cannot be merged into one of {self._size}")
        other = {key: (count, error) for key, count, error in state["counters"]}
        floor, other_floor = self.floor, _floor(other.values(), self._size)
        merged: dict[str, list[int]] = {}
        for key in self._counters.keys() | other.keys():
            count, error = self._counters.get(key, (floor, floor))
            other_count, other_error = other.get(key, (other_floor, other_floor))
            merged[key] = [count + other_count, error + other_error]
        kept = nlargest(self._size, merged, key=lambda key: (merged[key][0], key))
        self._counters = {key: merged[key] for key in kept}
        self._heap = []

    def _replace(self, key: str) -> None:
        """Give the smallest counter to a key that has none."""
        counters, heap = self._counters, self._heap
        if not heap:
            heap += [(count, held) for held, (count, _) in counters.items()]
            heapify(heap)
        known, smallest = heap[0]
        count = counters[smallest][0]
        while count != known:
            heapreplace(heap, (count, smallest))
            known, smallest = heap[0]
            count = counters[smallest][0]
        del counters[smallest]
        counters[key] = [count + 1, count]
        heapreplace(heap, (count + 1, key))


def _floor(counters: Iterable[tuple[int, int]], size: int) -> int:
    counts = [count for count, _ in counters]
    return min(counts) if len(counts) >= size else 0
