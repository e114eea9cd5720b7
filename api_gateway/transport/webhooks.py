"""Delivers events to a URL by POST, signed as Standard Webhooks 1.0.0 describes, and repeated until they are accepted.

An event keeps its id in all attempts. The id is the caller's: it must be the same for the same event, also after a
restart and from another gateway, so that a receiver that ignores ids it has seen processes no event twice.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Clock

logger = logging.getLogger(__name__)

MAX_QUEUED = 1000  # events that wait; of more, the oldest is dropped
MAX_ATTEMPTS = 12  # about an hour and a half
FIRST_DELAY, MAX_WEBHOOK_DELAY = 1.0, 900.0  # seconds between attempts
WEBHOOK_TIMEOUT = 15.0  # seconds for an attempt
REMEMBERED = 10_000  # ids that were queued or delivered, so that none is queued again
_GONE = 410


@dataclass(frozen=True, slots=True)
class WebhookEvent:
    """What happened: a unique id, a type such as `quota.warning`, when (seconds since the epoch), and its members."""

    id: str
    type: str
    at: float
    data: Mapping[str, Any]

    @property
    def body(self) -> bytes:
        """The event in JSON."""
        at = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return json.dumps({"type": self.type, "timestamp": at, "data": self.data}, separators=(",", ":")).encode()


def signature_fields(key: bytes, event_id: str, at: int, body: bytes) -> dict[str, str]:
    """Return the header fields of an attempt at `at` (seconds since the epoch)."""
    signature = base64.b64encode(hmac.digest(key, f"{event_id}.{at}.".encode() + body, hashlib.sha256)).decode()
    return {"webhook-id": event_id, "webhook-timestamp": str(at), "webhook-signature": f"v1,{signature}"}


class Webhook:
    """Sends events in the order in which they were queued, one at a time, from `start` to `close`.

    `delivered`, `failed` and `dropped` count events: accepted with 2xx; given up after `MAX_ATTEMPTS` or a 410; and
    lost because too many waited. Redirects are not followed.
    """

    def __init__(
        self,
        url: str,
        key: bytes,
        *,
        wall_clock: Clock,
        source: random.Random,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.url = url
        self.delivered = self.failed = self.dropped = 0
        self._key = key
        self._wall_clock = wall_clock
        self._source = source
        self._transport = transport
        self._sleep = sleep
        self._waiting: deque[WebhookEvent] = deque()
        self._known: dict[str, None] = {}  # in the order of arrival
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Webhook [{len(self._waiting)} waiting, {self.delivered} delivered, {self.failed} failed]>"

    def send(self, event: WebhookEvent) -> None:
        """Queue an event, unless one with the same id was queued before."""
        if event.id in self._known:
            return
        self._known[event.id] = None
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        if len(self._waiting) >= MAX_QUEUED:
            lost = self._waiting.popleft()
            self.dropped += 1
            logger.warning("webhook: %d events wait, event %s is dropped", MAX_QUEUED, lost.id)
        self._waiting.append(event)
        self._arrived.set()

    def start(self) -> None:
        """Deliver events from now on."""
        self._task = asyncio.create_task(self._run(), name="webhook")

    def stop(self) -> list[WebhookEvent]:
        """End, and return the events that were not delivered; the first may have been."""
        if self._task is not None:
            self._task.cancel()
        waiting, self._waiting = list(self._waiting), deque()
        return waiting

    async def close(self) -> None:
        """End; events that were not delivered are lost, and logged."""
        if self._task is not None:
            await cancel_and_wait(self._task)
            self._task = None
        if self._waiting:
            logger.warning("webhook: %d events were not delivered: %s", len(self._waiting), self._waiting[0].id)

    async def _run(self) -> None:
        async with httpx.AsyncClient(
            transport=self._transport, timeout=WEBHOOK_TIMEOUT, follow_redirects=False
        ) as client:
            while True:
                while not self._waiting:
                    self._arrived.clear()
                    await self._arrived.wait()
                event = self._waiting[0]
                is_delivered = await self._deliver(client, event)
                self.delivered += is_delivered
                self.failed += not is_delivered
                if self._waiting and self._waiting[0] is event:  # else dropped meanwhile
                    self._waiting.popleft()

    async def _deliver(self, client: httpx.AsyncClient, event: WebhookEvent) -> bool:
        delay = FIRST_DELAY
        for attempt in range(1, MAX_ATTEMPTS + 1):
            cause, is_final = await self._attempt(client, event)
            if not cause:
                return True
            if is_final or attempt == MAX_ATTEMPTS:
                logger.error("webhook: event %s is given up after %d attempts: %s", event.id, attempt, cause)
                break
            if attempt == 1:
                logger.warning("webhook: event %s is not accepted, and repeated: %s", event.id, cause)
            await self._sleep(delay * self._source.uniform(0.75, 1.25))
            delay = min(3 * delay, MAX_WEBHOOK_DELAY)
        return False

    async def _attempt(self, client: httpx.AsyncClient, event: WebhookEvent) -> tuple[str, bool]:
        """Return why the event was not accepted (empty: it was), and whether an attempt makes no sense any more."""
        body = event.body
        fields = signature_fields(self._key, event.id, int(self._wall_clock()), body)
        try:
            async with asyncio.timeout(WEBHOOK_TIMEOUT):
                async with client.stream(
                    "POST", self.url, content=body, headers={"content-type": "application/json", **fields}
                ) as response:
                    status = response.status_code
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            return str(error) or type(error).__name__, False
        if httpx.codes.is_success(status):
            return "", False
        return f"status {status}", status == _GONE
