"""Ends grants and keys when they expire: a timer, and the removal of expired grants from the store."""

import asyncio
import random
from contextlib import suppress
from typing import Protocol

from api_gateway.clients.grant_expiry import Expiry, ExpiryQueue
from api_gateway.clients.records import ClientRecord, ClientStore
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Clock

CLEAR_RETRY_DELAY = 1.0  # seconds between two attempts to remove an expired grant
_CLEAR_SPREAD = 0.2  # seconds over which processes spread the removal of an expired grant
_MAX_TIMER_DELAY = 30.0  # seconds; the wall clock may be changed, so timers are at most this long


class GrantRecords(Protocol):
    """The records as their ends are applied to them."""

    def held(self, client_id: str) -> ClientRecord | None:
        """Return the record that is held of a client; None if there is none."""
        ...

    def on_expired(self) -> None:
        """A grant or key on which earlier decisions relied may have expired."""
        ...

    def on_grant_ended(self, record: ClientRecord) -> None:
        """The grant of a record that is held has ended."""
        ...

    def apply(self, record: ClientRecord) -> None:
        """Apply a record without its grant, as it is in the store now."""
        ...


class GrantTimer:
    """Ends grants and keys by the clock of this process; one process then removes a grant from the store."""

    def __init__(
        self, records: GrantRecords, store: ClientStore, limit: int, *, wall_clock: Clock, source: random.Random
    ) -> None:
        """At most about `limit` ends are kept."""
        self.expiries = ExpiryQueue(limit)
        self._records = records
        self._store = store
        self._wall_clock = wall_clock
        self._random = source
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<GrantTimer [{len(self.expiries)} expected]>"

    async def close(self) -> None:
        """Cancel the timer and the removals."""
        if self._timer is not None:
            self._timer.cancel()
        await cancel_and_wait(*self._tasks)

    def expect(self, record: ClientRecord) -> None:
        """End what a record has at its time."""
        self.expiries.expect(record, self._is_current)
        self.set_timer()

    def end_expired(self) -> None:
        """End every grant and key that has expired, and set the timer for the next."""
        now = self._wall_clock()
        for expiry in self.expiries.due(now):
            record = self._records.held(expiry.client_id)
            if record is None or record.version == expiry.version:
                self._records.on_expired()  # the client may have been resolved, or the key verified, before
            if record is not None and record.version == expiry.version:
                self._end_grant(record, now)
        self.set_timer()

    def set_timer(self) -> None:
        """Set the timer for the next end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.expiries.next_at is not None:
            delay = min(max(self.expiries.next_at - self._wall_clock(), 0), _MAX_TIMER_DELAY)
            self._timer = asyncio.get_running_loop().call_later(delay, self.end_expired)

    def _is_current(self, expiry: Expiry) -> bool:
        record = self._records.held(expiry.client_id)
        return record is not None and record.version == expiry.version

    def _end_grant(self, record: ClientRecord, now: float) -> None:
        if record.grant is None or record.grant.until > now:
            return
        self._records.on_grant_ended(record)
        task = asyncio.create_task(self._clear(record), name="clearing of an ended grant")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _clear(self, record: ClientRecord) -> None:
        """Remove an expired grant from the store, unless another process does. Runs in the background."""
        written = None
        await asyncio.sleep(self._random.uniform(0, _CLEAR_SPREAD))
        while written is None and self._records.held(record.id) == record:
            with suppress(OSError):
                written = await self._store.end_grant(record.id, record.version)
            if written is None:
                await asyncio.sleep(CLEAR_RETRY_DELAY)
        if written is not None:
            self._records.apply(written.after)
