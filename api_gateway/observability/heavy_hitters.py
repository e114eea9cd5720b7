"""The most frequent keys of a stream, in limited memory, with a known maximum error of every count.

Space-Saving (Metwally, Agrawal and El Abbadi 2005): a key without a counter takes over the smallest counter and
counts on from its value. That value is the maximum error of the key's count.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heapreplace, nlargest
from typing import TypedDict

SIZE = 1000


class HeavyHittersState(TypedDict):
    """Heavy hitters as JSON values: the size, and key, count and error of every counter."""

    size: int
    counters: list[tuple[str, int, int]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """The number of occurrences of a key: at most `count`, at least `count - error`."""

    key: str
    count: int
    error: int


class HeavyHitters:
    """A set of `size` counters: after n keys, every key with more than n / size occurrences has a counter.

    Counting a key that has a counter is one look-up. A new key replaces the smallest counter, found by a heap whose
    entries are corrected only when they reach the top: each count causes at most one later correction, so a new key
    costs O(log size), amortized.
    """

    __slots__ = ("_counters", "_heap", "_size")

    def __init__(self, size: int = SIZE) -> None:
        if size < 1:
            raise ValueError(f"heavy hitters need at least 1 counter, got {size}")
        self._size = size
        self._counters: dict[str, list[int]] = {}  # count and error
        self._heap: list[tuple[int, str]] = []  # earlier counts, so never too high; empty until first needed

    def __repr__(self) -> str:
        return f"<HeavyHitters [{len(self._counters)} of {self._size} counters]>"

    def __len__(self) -> int:
        return len(self._counters)

    def add(self, key: str) -> None:
        """Count one occurrence of a key."""
        counter = self._counters.get(key)
        if counter is not None:
            counter[0] += 1
        elif len(self._counters) < self._size:
            self._counters[key] = [1, 0]
        else:
            self._replace(key)

    @property
    def floor(self) -> int:
        """Maximum number of occurrences of a key without a counter."""
        if len(self._counters) < self._size:
            return 0
        return min(count for count, _ in self._counters.values())

    def estimate(self, key: str) -> Estimate:
        """Return the estimate for a key, with or without a counter."""
        counter = self._counters.get(key)
        if counter is None:
            floor = self.floor
            return Estimate(key, floor, floor)
        return Estimate(key, *counter)

    def heaviest(self, limit: int) -> list[Estimate]:
        """Return the estimates of the most frequent keys, at most `limit`, highest count first."""
        keys = nlargest(limit, self._counters, key=lambda key: self._counters[key][0])
        return [Estimate(key, *self._counters[key]) for key in keys]

    def state(self) -> HeavyHittersState:
        """Return all counters as JSON values, for `from_state` and `merge`."""
        counters = [(key, count, error) for key, (count, error) in self._counters.items()]
        return {"size": self._size, "counters": counters}

    @classmethod
    def from_state(cls, state: HeavyHittersState) -> "HeavyHitters":
        """Return the heavy hitters with this state."""
        other = cls(state["size"])
        other._counters = {key: [count, error] for key, count, error in state["counters"]}
        return other

    def merge(self, state: HeavyHittersState) -> None:
        """Add the counts of another set of the same size; raises ValueError if the sizes differ.

        A key without a counter in one set is counted there with that set's `floor`, as count and as error. So
        every maximum error stays valid, and every key with more than (n1 + n2) / size occurrences keeps a counter
        (after Agarwal et al. 2012, "Mergeable Summaries").
        """
        if state["size"] != self._size:
            raise ValueError(f"a set of {state['size']} counters cannot be merged into a set of {self._size}")
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
        """Give the smallest counter to a key without one."""
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
