"""The queue of the times at which grants and keys end. Reads no clock and sets no timer."""

import heapq
from collections.abc import Callable, Iterable
from typing import NamedTuple

from api_gateway.clients.records import ClientRecord


class Expiry(NamedTuple):
    """When the grant or a key in one version of a client's record ends, in seconds since the epoch."""

    until: float
    client_id: str
    version: int


class ExpiryQueue:
    """A heap of expiries. Those of replaced records are removed at their time, or when `limit` is reached."""

    def __init__(self, limit: int) -> None:
        """Hold at most `limit` expiries, or twice the number of current ones if that is more."""
        self._limit = limit
        self._heap: list[Expiry] = []

    def __repr__(self) -> str:
        return f"<ExpiryQueue [{len(self._heap)}, next at {self.next_at}]>"

    def __len__(self) -> int:
        """Return the number of expiries held."""
        return len(self._heap)

    @property
    def next_at(self) -> float | None:
        """The earliest expiry, in seconds since the epoch; None without any."""
        return self._heap[0].until if self._heap else None

    def replace(self, records: Iterable[ClientRecord]) -> None:
        """Replace the queue with the expiries of these records."""
        self._heap = [Expiry(until, record.id, record.version) for record in records for until in record.ends]
        heapq.heapify(self._heap)

    def expect(self, record: ClientRecord, is_current: Callable[[Expiry], bool]) -> None:
        """Add the expiries of a record. `is_current` selects the expiries to keep if the queue is full."""
        if len(self._heap) >= self._limit:
            self._heap = [expiry for expiry in self._heap if is_current(expiry)]
            heapq.heapify(self._heap)
            self._limit = max(self._limit, 2 * len(self._heap))
        for until in record.ends:
            heapq.heappush(self._heap, Expiry(until, record.id, record.version))

    def due(self, now: float) -> Iterable[Expiry]:
        """Remove and yield the expiries up to `now`, earliest first."""
        while self._heap and self._heap[0].until <= now:
            yield heapq.heappop(self._heap)
