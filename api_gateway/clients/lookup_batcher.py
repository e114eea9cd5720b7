"""Look-ups of clients in the store: concurrent ones share one query, and each request waits up to a deadline."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

from api_gateway.clients.records import ClientRecord
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Client

logger = logging.getLogger(__name__)

BATCH = 500  # clients in one query
RETRY_AFTER = 1.0  # seconds after which clients whose look-up was late or failed are looked up again


class LookupBatcher:
    """Look-ups in progress, and the clients whose look-up was late.

    A client is unknown here, in a query (`is_asked`), or late (`is_late`: its look-up exceeded the deadline or failed,
    so requests do not wait for it until `RETRY_AFTER` has passed); it may be late and in a query.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[str]], Awaitable[Sequence[ClientRecord | None]]],
        note: Callable[[str, ClientRecord | None, bool], None],
        named: Callable[[str], Client],
        look_again: Callable[[], None],
        *,
        limit: int,
        deadline: float,
    ) -> None:
        """`ask` queries the store and may raise OSError. `deadline` is seconds.

        `note` is called with each result and whether it was late for a request. `named` returns a client as far as it
        is known without the store. `look_again` is called when late clients may be looked up again. At most `limit`
        clients are looked up at a time; for further ones the result of `named` is returned.
        """
        self._ask, self._note, self._named, self._look_again = ask, note, named, look_again
        self._limit, self._deadline = limit, deadline
        self._asked: dict[str, asyncio.Future[Client]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._late: set[str] = set()

    def __repr__(self) -> str:
        return f"<LookupBatcher [{len(self._asked)} in progress, {len(self._late)} late]>"

    def is_asked(self, client_id: str) -> bool:
        """Return whether a look-up of a client is in progress."""
        return client_id in self._asked

    def is_late(self, client_id: str) -> bool:
        """Return whether requests should not wait for a look-up of a client now."""
        return client_id in self._late

    def retry_now(self, client_id: str | None = None) -> None:
        """Permit look-ups of a client that was late, or of all (None)."""
        if client_id is None:
            self._late.clear()
        else:
            self._late.discard(client_id)

    async def look_up(self, client_id: str) -> Client:
        """Return a client as in the store or, after the deadline, as far as it is known without the store."""
        pending = self._asked.get(client_id)
        if pending is None:
            if len(self._asked) >= self._limit:
                return self._named(client_id)
            pending = self._asked[client_id] = asyncio.get_running_loop().create_future()
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask_all(), name="client look-ups")
        await asyncio.wait([pending], timeout=self._deadline)
        if pending.done():
            return pending.result()
        self._hold_back(client_id)
        return self._named(client_id)

    async def close(self) -> None:
        """Cancel the query in progress."""
        if self._asking is not None:
            await cancel_and_wait(self._asking)

    async def _ask_all(self) -> None:
        try:
            while self._asked:
                await self._ask_some(list(islice(self._asked, BATCH)))
        finally:
            self._asking = None

    async def _ask_some(self, client_ids: Sequence[str]) -> None:
        try:
            records = await self._ask(client_ids)
        except OSError as error:
            if not self._late:
                logger.warning("look-up of %d clients failed: %s", len(client_ids), error)
            for client_id in client_ids:
                self._hold_back(client_id)
        else:
            for client_id, record in zip(client_ids, records, strict=True):
                was_late = client_id in self._late
                self._late.discard(client_id)
                self._note(client_id, record, was_late)
                self._asked[client_id].set_result(self._named(client_id))  # the next `_note` may evict this record
        for client_id in client_ids:
            pending = self._asked.pop(client_id)
            if not pending.done():
                pending.set_result(self._named(client_id))

    def _hold_back(self, client_id: str) -> None:
        if not self._late:
            asyncio.get_running_loop().call_later(RETRY_AFTER, self._retry)
        self._late.add(client_id)

    def _retry(self) -> None:
        self._late.clear()
        self._look_again()
