"""Looks clients up that are not remembered: one question for all that are wanted at one time, and a deadline each."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

from api_gateway.clients.records import ClientRecord
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Client

logger = logging.getLogger(__name__)

LOOKUP_BATCH = 500  # clients looked up at once
LATE_RETRY_DELAY = 1.0  # seconds until what was late or failed is tried again


class LookupBatcher:
    """Questions under way, and the clients that nobody waits for at present because their answer is late."""

    def __init__(
        self,
        fetch: Callable[[Sequence[str]], Awaitable[Sequence[ClientRecord | None]]],
        on_result: Callable[[str, ClientRecord | None, bool], None],
        by_id: Callable[[str], Client],
        on_retry_due: Callable[[], None],
        *,
        limit: int,
        deadline: float,
    ) -> None:
        """`fetch` raises OSError. `on_result` is told each answer, and whether it came too late for somebody.

        `on_retry_due` is called when those that were late may be asked for again. At most `limit` clients are asked
        for at one time; further ones count as late.
        """
        self._fetch, self._on_result, self._by_id, self._on_retry_due = fetch, on_result, by_id, on_retry_due
        self._limit, self._deadline = limit, deadline
        self._pending: dict[str, asyncio.Future[Client]] = {}
        self._task: asyncio.Task[None] | None = None
        self._late: set[str] = set()

    def __repr__(self) -> str:
        return f"<LookupBatcher [{len(self._pending)} under way, {len(self._late)} late]>"

    def is_pending(self, client_id: str) -> bool:
        """Tell whether a question for a client is under way."""
        return client_id in self._pending

    def is_late(self, client_id: str) -> bool:
        """Tell whether an answer was late, so that nobody shall wait for it at present."""
        return client_id in self._late

    def retry_now(self, client_id: str | None = None) -> None:
        """Let a client that was late be asked for again; without a name all of them."""
        if client_id is None:
            self._late.clear()
        else:
            self._late.discard(client_id)

    async def look_up(self, client_id: str) -> Client:
        """Return a client as the store has it, or after the deadline as far as is known here."""
        result = self._pending.get(client_id)
        if result is None:
            if len(self._pending) >= self._limit:
                return self._by_id(client_id)
            result = self._pending[client_id] = asyncio.get_running_loop().create_future()
            if self._task is None:
                self._task = asyncio.create_task(self._look_up_all(), name="client look-ups")
        await asyncio.wait([result], timeout=self._deadline)
        if result.done():
            return result.result()
        self._mark_late(client_id)
        return self._by_id(client_id)

    async def close(self) -> None:
        """End the question under way."""
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
                logger.warning("clients could not be looked up, %d for a start: %s", len(client_ids), error)
            for client_id in client_ids:
                self._mark_late(client_id)
        else:
            for client_id, record in zip(client_ids, records, strict=True):
                was_late = client_id in self._late
                self._late.discard(client_id)
                self._on_result(client_id, record, was_late)
                self._pending[client_id].set_result(self._by_id(client_id))  # before it is forgotten for another
        for client_id in client_ids:
            result = self._pending.pop(client_id)
            if not result.done():
                result.set_result(self._by_id(client_id))

    def _mark_late(self, client_id: str) -> None:
        if not self._late:
            asyncio.get_running_loop().call_later(LATE_RETRY_DELAY, self._retry)
        self._late.add(client_id)

    def _retry(self) -> None:
        self._late.clear()
        self._on_retry_due()
