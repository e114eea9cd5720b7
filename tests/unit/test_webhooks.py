"""Webhooks: signed as the published scheme, repeated with the same id, bounded, and never the same event twice."""

import asyncio
import random
from collections.abc import Callable

import httpx
import pytest
from standardwebhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from api_gateway.settings.webhook import signing_key
from api_gateway.transport.webhooks import (
    MAX_ATTEMPTS,
    MAX_QUEUED,
    MAX_WEBHOOK_DELAY,
    Webhook,
    WebhookEvent,
    signature_fields,
)
from tests.cases import each
from tests.kit import soon

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # that of the specification's example


class Receiver:
    """A receiver whose responses are given; the last one is repeated. A response 0 is a broken connection."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = [*statuses]
        self.requests: list[httpx.Request] = []
        self.slept: list[float] = []
        self.now = 1_800_000_000.0

    def webhook(self) -> Webhook:
        """Return a webhook that is delivered here."""
        return Webhook(
            "https://receiver.test/hook",
            signing_key(SECRET),
            wall_clock=lambda: self.now,
            source=random.Random(1),
            transport=httpx.MockTransport(self._respond),
            sleep=self._sleep,
        )

    def _respond(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status == 0:
            raise httpx.ReadError("connection lost")
        return httpx.Response(status, headers={"location": "https://elsewhere.test/"})

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    @property
    def ids(self) -> list[str]:
        """The id of each request."""
        return [request.headers["webhook-id"] for request in self.requests]


def event(number: int = 1) -> WebhookEvent:
    """Return an event."""
    return WebhookEvent(
        f"evt_{number}", "quota.warning", 1_800_000_000.25, {"limit": "monthly", "share": 0.8, "who": "ü"}
    )


async def delivered(receiver: Receiver, *events: WebhookEvent, until: Callable[[Webhook], bool]) -> Webhook:
    """Send events, and return the webhook when a condition holds."""
    webhook = receiver.webhook()
    webhook.start()
    for one in events:
        webhook.send(one)
    await soon(lambda: until(webhook), "the events are processed")
    await webhook.close()
    return webhook


def test_the_signature_is_that_of_the_specification() -> None:
    fields = signature_fields(
        signing_key(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, b'{"test": 2432232314}'
    )
    assert fields["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_the_reference_library_verifies_an_event_and_its_body() -> None:
    import time

    receiver = Receiver(204)
    receiver.now = time.time()  # the library refuses old timestamps
    webhook = await delivered(receiver, event(), until=lambda webhook: webhook.delivered == 1)
    request = receiver.requests[0]
    assert Verifier(SECRET).verify(request.content, dict(request.headers)) == {
        "type": "quota.warning",
        "timestamp": "2027-01-15T08:00:00.250Z",
        "data": {"limit": "monthly", "share": 0.8, "who": "ü"},
    }
    with pytest.raises(WebhookVerificationError):
        Verifier("whsec_" + "A" * 32).verify(request.content, dict(request.headers))
    assert repr(webhook) == "<Webhook [0 waiting, 1 delivered, 0 failed]>"


async def test_an_event_is_repeated_with_the_same_id_and_a_new_timestamp_until_it_is_accepted() -> None:
    receiver = Receiver(500, 0, 302, 429, 200)
    webhook = await delivered(receiver, event(), until=lambda webhook: webhook.delivered == 1)
    assert receiver.ids == ["evt_1"] * 5
    assert len({request.content for request in receiver.requests}) == 1
    assert len({request.headers["webhook-timestamp"] for request in receiver.requests}) >= 4
    assert [round(seconds) for seconds in receiver.slept] == sorted(round(seconds) for seconds in receiver.slept)
    assert webhook.failed == 0


async def test_events_arrive_in_order_and_the_same_event_once() -> None:
    receiver = Receiver(200, 503, 200)
    webhook = await delivered(
        receiver, event(1), event(2), event(1), event(3), event(2), until=lambda webhook: webhook.delivered == 3
    )
    assert receiver.ids == ["evt_1", "evt_2", "evt_2", "evt_3"]
    assert (webhook.delivered, webhook.failed, webhook.dropped) == (3, 0, 0)


async def test_a_receiver_that_never_accepts_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    receiver = Receiver(500)
    webhook = await delivered(receiver, event(), until=lambda webhook: webhook.failed == 1)
    assert len(receiver.requests) == MAX_ATTEMPTS
    assert max(receiver.slept) <= MAX_WEBHOOK_DELAY * 1.25
    assert 3600 < sum(receiver.slept) < 4 * 3600
    assert "given up after 12 attempts: status 500" in caplog.text
    assert SECRET not in caplog.text
    assert webhook.delivered == 0


async def test_a_receiver_that_is_gone_is_not_asked_again() -> None:
    receiver = Receiver(410)
    await delivered(receiver, event(), until=lambda webhook: webhook.failed == 1)
    assert len(receiver.requests) == 1


async def test_the_queue_is_bounded_and_what_was_not_delivered_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    webhook = Receiver(200).webhook()
    for number in range(MAX_QUEUED + 5):
        webhook.send(event(number))
    assert webhook.dropped == 5
    assert "event evt_0 is dropped" in caplog.text
    await webhook.close()
    assert "1000 events were not delivered: evt_5" in caplog.text


@each("secret", ["", "whsec_", "whsec_c2hvcnQ=", "not base64 at all!", "A" * 200])
def test_a_secret_that_is_none_is_refused_without_showing_it(secret: str) -> None:
    with pytest.raises(ValueError, match=r"^must be 24 to 64 random bytes in base64, optionally after whsec_$"):
        signing_key(secret)
