"""Delivers events to a URL by POST, signed as Standard Webhooks 1.0.0 describes, and repeated until they are accepted.

An event keeps its id in all attempts. The id is the caller's: it must be the same for the same event, also after a
restart and from another gateway, so that a receiver that ignores ids it has seen processes no event twice.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import random
from collections.abc import Awaitable, Callable

import httpx

from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Clock
from api_gateway.system.x509 import verifying_context
from api_gateway.transport.webhook_events import WaitingEvents, WebhookEvent

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 12  # about an hour and a half
FIRST_DELAY, MAX_WEBHOOK_DELAY = 1.0, 900.0  # seconds between attempts
WEBHOOK_TIMEOUT = 15.0  # seconds for an attempt
_GONE = 410


def signature_fields(key: bytes, event_id: str, at: int, body: bytes) -> dict[str, str]:
    """Return the header fields of an attempt at `at` (seconds since the epoch)."""
    signature = base64.b64encode(hmac.digest(key, f"{event_id}.{at}.".encode() + body, hashlib.sha256)).decode()
    return {"webhook-id": event_id, "webhook-timestamp": str(at), "webhook-signature": f"v1,{signature}"}


class Webhook:
    """Sends the events that wait, in their order, one at a time, from `start` to `close` or `stop`.

    `delivered` and `failed` count events: accepted with 2xx; given up after `MAX_ATTEMPTS` or a 410. Redirects are not
    followed.
    """

    def __init__(
        self,
        url: str,
        key: bytes,
        waiting: WaitingEvents,
        *,
        wall_clock: Clock,
        source: random.Random,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.url = url
        self.waiting = waiting
        self.delivered = self.failed = 0
        self._key = key
        self._wall_clock = wall_clock
        self._source = source
        self._transport = transport
        self._sleep = sleep
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Webhook [{len(self.waiting)} waiting, {self.delivered} delivered, {self.failed} failed]>"

    def start(self) -> None:
        """Deliver events from now on, first those that earlier processes have left."""
        self.waiting.start()
        self._task = asyncio.create_task(self._run(), name="webhook")

    def stop(self) -> None:
        """Cancel the delivery without waiting. Events in it stay queued; the first of them may have been delivered."""
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Cancel the delivery, and wait until it has ended."""
        if self._task is not None:
            await cancel_and_wait(self._task)
            self._task = None

    async def _run(self) -> None:
        waiting, context = self.waiting, await asyncio.to_thread(verifying_context)
        async with httpx.AsyncClient(
            verify=context, transport=self._transport, timeout=WEBHOOK_TIMEOUT, follow_redirects=False
        ) as client:
            while True:
                while (event := waiting.first) is None:
                    waiting.arrived.clear()
                    await waiting.arrived.wait()
                is_delivered = await self._deliver(client, event)
                self.delivered += is_delivered
                self.failed += not is_delivered
                waiting.remove(event)

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
        """Return why the event was not accepted (empty if it was), and whether to give up."""
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
