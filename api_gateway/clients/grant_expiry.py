"""When grants end: the moments in their order. Decides, knows no clock, and sets no timer."""

import heapq
from collections.abc import Callable, Iterable
from typing import NamedTuple

from api_gateway.clients.records import ClientRecord


class Expiry(NamedTuple):
    """When the grant in one version of a client's record ends, in seconds since the epoch."""

    until: float
    client_id: str
    version: int


class ExpiryQueue:
    """A heap of endings. One whose record has been replaced stays until its time, or until there are too many."""

    def __init__(self, limit: int) -> None:
        """Hold `limit` endings, or as many more as are still current."""
        self._limit = limit
        self._heap: list[Expiry] = []

    def __repr__(self) -> str:
        return f"<ExpiryQueue [{len(self._heap)}, the next at {self.next_at}]>"

    def __len__(self) -> int:
        """Return the endings held."""
        return len(self._heap)

    @property
    def next_at(self) -> float | None:
        """The next moment at which something may end."""
        return self._heap[0].until if self._heap else None

    def replace(self, records: Iterable[ClientRecord]) -> None:
        """Hold the endings of these records, and no others."""
        self._heap = [_ending(record) for record in records if record.grant is not None]
        heapq.heapify(self._heap)

    def expect(self, record: ClientRecord, is_current: Callable[[Expiry], bool]) -> None:
        """Hold the ending of a record that has a grant."""
        if len(self._heap) >= self._limit:
            self._heap = [expiry for expiry in self._heap if is_current(expiry)]
            heapq.heapify(self._heap)
            self._limit = max(self._limit, 2 * len(self._heap))
        heapq.heappush(self._heap, _ending(record))

    def due(self, now: float) -> Iterable[Expiry]:
        """Give out those whose time has come, in their order."""
        while self._heap and self._heap[0].until <= now:
            yield heapq.heappop(self._heap)


def _ending(record: ClientRecord) -> Expiry:
    assert record.grant is not None  # noqa: S101 - only such are asked for
    return Expiry(record.grant.until, record.id, record.version)
