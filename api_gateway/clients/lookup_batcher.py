"""Look-ups of clients in the store, by id or by key.

Concurrent look-ups share one query, and each request waits up to a deadline.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from api_gateway.clients.records import ClientRecord
from api_gateway.eventloop.tasks import cancel_and_wait

T = TypeVar("T")

logger = logging.getLogger(__name__)

LOOKUP_BATCH = 500  # clients in one query
LATE_RETRY_DELAY = 1.0  # seconds after which clients whose look-up was late or failed are looked up again


class LookupBatcher(Generic[T]):
    """Look-ups in progress, and the clients whose look-up was late.

    A client may be pending (in a query) and late: its look-up exceeded the deadline or failed, so requests do not wait
    for it until `LATE_RETRY_DELAY` has passed. Late and pending are independent; other clients are unknown here.
    """

    def __init__(
        self,
        fetch: Callable[[Sequence[str]], Awaitable[Sequence[ClientRecord | None]]],
        on_result: Callable[[str, ClientRecord | None, bool], None],
        by_id: Callable[[str], T],
        on_retry_due: Callable[[], None],
        *,
        limit: int,
        deadline: float,
    ) -> None:
        """`fetch` queries the store and may raise OSError. `deadline` is seconds.

        `on_result` is called with each result and whether it was late for a request. `by_id` returns a client as far
        as it is known without the store. `on_retry_due` is called when late clients may be looked up again. At most
        `limit` clients are looked up at a time; for further ones the result of `by_id` is returned.
        """
        self._fetch, self._on_result, self._by_id, self._on_retry_due = fetch, on_result, by_id, on_retry_due
        self._limit, self._deadline = limit, deadline
        self._pending: dict[str, asyncio.Future[T]] = {}
        self._task: asyncio.Task[None] | None = None
        self._late: set[str] = set()

    def __repr__(self) -> str:
        return f"<LookupBatcher [{len(self._pending)} in progress, {len(self._late)} late]>"

    @property
    def is_idle(self) -> bool:
        """Return whether no look-up is in progress."""
        return not self._pending

    def is_pending(self, client_id: str) -> bool:
        """Return whether a look-up of a client is in progress."""
        return client_id in self._pending

    def is_late(self, client_id: str) -> bool:
        """Return whether requests should not wait for a look-up of a client now."""
        return client_id in self._late

    def retry_now(self, client_id: str | None = None) -> None:
        """Permit look-ups of a client that was late, or of all (None)."""
        if client_id is None:
            self._late.clear()
        else:
            self._late.discard(client_id)

    async def look_up(self, client_id: str) -> T:
        """Return a client as in the store or, after the deadline, as far as it is known without the store."""
        pending = self._pending.get(client_id)
        if pending is None:
            if len(self._pending) >= self._limit:
                return self._by_id(client_id)
            pending = self._pending[client_id] = asyncio.get_running_loop().create_future()
            if self._task is None:
                self._task = asyncio.create_task(self._look_up_all(), name="client look-ups")
        await asyncio.wait([pending], timeout=self._deadline)
        if pending.done():
            return pending.result()
        self._mark_late(client_id)
        return self._by_id(client_id)

    async def close(self) -> None:
        """Cancel the query in progress."""
        if self._task is not None:
            await cancel_and_wait(self._task)

    async def _look_up_all(self) -> None:
        try:
            while self._pending:
                await self._look_up_batch(list(islice(self._pending, LOOKUP_BATCH)))
        finally:
            self._task = None

    async def _look_up_batch(self, client_ids: Sequence[str]) -> None:
        try:
            records = await self._fetch(client_ids)
        except OSError as error:
            if not self._late:
                logger.warning("look-up of %d clients failed: %s", len(client_ids), error)
            for client_id in client_ids:
                self._mark_late(client_id)
        else:
            for client_id, record in zip(client_ids, records, strict=True):
                was_late = client_id in self._late
                self._late.discard(client_id)
                self._on_result(client_id, record, was_late)
                # Resolved here, because the next `_on_result` may evict this record.
                self._pending[client_id].set_result(self._by_id(client_id))
        for client_id in client_ids:
            pending = self._pending.pop(client_id)
            if not pending.done():
                pending.set_result(self._by_id(client_id))

    def _mark_late(self, client_id: str) -> None:
        if not self._late:
            asyncio.get_running_loop().call_later(LATE_RETRY_DELAY, self._retry)
        self._late.add(client_id)

    def _retry(self) -> None:
        self._late.clear()
        self._on_retry_due()
