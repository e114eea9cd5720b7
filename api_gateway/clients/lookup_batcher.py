"""Looks clients up that are not remembered: one question for all that are wanted at one time, and a deadline each."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

from api_gateway.clients.records import ClientRecord
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Client

logger = logging.getLogger(__name__)

BATCH = 500  # clients looked up at once
RETRY_AFTER = 1.0  # seconds until what was late or failed is tried again


class LookupBatcher:
    """Questions under way, and the clients that nobody waits for at present because their answer is late."""

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
        """`ask` raises OSError. `note` is told each answer, and whether it came too late for somebody.

        `look_again` is called when those that were late may be asked for again. At most `limit` clients are asked for
        at one time; further ones count as late.
        """
        self._ask, self._note, self._named, self._look_again = ask, note, named, look_again
        self._limit, self._deadline = limit, deadline
        self._asked: dict[str, asyncio.Future[Client]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._late: set[str] = set()

    def __repr__(self) -> str:
        return f"<LookupBatcher [{len(self._asked)} under way, {len(self._late)} late]>"

    def is_asked(self, client_id: str) -> bool:
        """Tell whether a question for a client is under way."""
        return client_id in self._asked

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
        answer = self._asked.get(client_id)
        if answer is None:
            if len(self._asked) >= self._limit:
                return self._named(client_id)
            answer = self._asked[client_id] = asyncio.get_running_loop().create_future()
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask_all(), name="client look-ups")
        await asyncio.wait([answer], timeout=self._deadline)
        if answer.done():
            return answer.result()
        self._hold_back(client_id)
        return self._named(client_id)

    async def close(self) -> None:
        """End the question under way."""
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
                logger.warning("clients could not be looked up, %d for a start: %s", len(client_ids), error)
            for client_id in client_ids:
                self._hold_back(client_id)
        else:
            for client_id, record in zip(client_ids, records, strict=True):
                was_late = client_id in self._late
                self._late.discard(client_id)
                self._note(client_id, record, was_late)
                self._asked[client_id].set_result(self._named(client_id))  # before it is forgotten for another
        for client_id in client_ids:
            answer = self._asked.pop(client_id)
            if not answer.done():
                answer.set_result(self._named(client_id))

    def _hold_back(self, client_id: str) -> None:
        if not self._late:
            asyncio.get_running_loop().call_later(RETRY_AFTER, self._retry)
        self._late.add(client_id)

    def _retry(self) -> None:
        self._late.clear()
        self._look_again()
