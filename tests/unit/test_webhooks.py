"""Webhooks: signed as the published scheme, repeated with the same id, bounded, and never the same event twice."""

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from standardwebhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from api_gateway.settings.webhook import signing_key
from api_gateway.transport.webhook_events import MAX_QUEUED, WaitingEvents, WaitingFile, WebhookEvent
from api_gateway.transport.webhooks import MAX_ATTEMPTS, MAX_WEBHOOK_DELAY, Webhook, signature_fields
from tests.cases import each
from tests.kit import soon

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # that of the specification's example


class Receiver:
    """A receiver whose responses are given; the last one is repeated. A response 0 is a broken connection."""

    def __init__(self, *statuses: int, folder: Path | None = None) -> None:
        self.folder = folder
        self.statuses = [*statuses]
        self.requests: list[httpx.Request] = []
        self.slept: list[float] = []
        self.now = 1_800_000_000.0

    def webhook(self) -> Webhook:
        """Return a webhook that is delivered here."""
        return Webhook(
            "https://receiver.test/hook",
            signing_key(SECRET),
            WaitingEvents(self.folder),
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
        webhook.waiting.add(one)
    await soon(lambda: until(webhook), "the events are processed")
    await webhook.close()
    await webhook.waiting.close()
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
    assert (webhook.delivered, webhook.failed, webhook.waiting.dropped) == (3, 0, 0)


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
        webhook.waiting.add(event(number))
    assert webhook.waiting.dropped == 5
    assert "event evt_0 is dropped" in caplog.text
    await webhook.waiting.close()
    assert "1000 events were not delivered: evt_5" in caplog.text


async def test_events_that_wait_are_sent_after_a_restart_once_and_in_order(tmp_path: Path) -> None:
    """Also to another URL; those that were delivered before are not sent again."""
    first = Receiver(200, 500, folder=tmp_path)
    await delivered(first, event(1), event(2), event(3), until=lambda _: "evt_2" in first.ids)
    (file,) = files(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600
    stored = json.loads(file.read_text())
    assert (stored["version"], [one["id"] for one in stored["events"]]) == (1, ["evt_2", "evt_3"])
    second = Receiver(200, folder=tmp_path)
    webhook = await delivered(second, event(4), event(2), until=lambda webhook: webhook.delivered == 3)
    assert second.ids in (["evt_2", "evt_3", "evt_4"], ["evt_4", "evt_2", "evt_3"]), "the former ones in their order"
    assert second.requests[second.ids.index("evt_2")].content == event(2).body
    assert len(webhook.waiting) == 0
    assert files(tmp_path) == [], "nothing waits"


async def test_events_of_a_killed_process_are_taken_over_and_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    killed, living = WaitingFile(tmp_path), WaitingFile(tmp_path)
    assert (killed.take(), living.take()) == ([], [])
    killed.write([event(1)])
    living.write([event(2)])
    killed.close(is_empty=False)  # no more than what the end of a process does
    after = WaitingEvents(tmp_path)
    after.start()
    await soon(lambda: after.first is not None, "the events are taken over")
    assert (after.first, len(after)) == (event(1), 1)
    await after.close()
    living.write([event(3)])
    living.close(is_empty=False)
    assert sorted(stored_ids(tmp_path)) == ["evt_1", "evt_3"], "each is in one file, for the next start"


def files(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the files of a folder."""
    return sorted(folder.glob(pattern))


def stored_ids(folder: Path) -> list[str]:
    """Return the ids of the events in all files."""
    documents = [json.loads(text) for file in files(folder, "*.json") if (text := file.read_text())]
    return [one["id"] for document in documents for one in document["events"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 2, "events": [{"kind": "new"}]}', "was written by a newer gateway"),
        ('{"version": 1, "events": [{"id": "a"}]}', "has no events that can be read (KeyError)"),
        ("[", "has no events that can be read (JSONDecodeError)"),
        ("", None),
    ],
)
async def test_a_file_that_cannot_be_read_is_kept_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, message: str | None
) -> None:
    (tmp_path / "webhook-0.json").write_text(content)
    waiting = WaitingEvents(tmp_path)
    waiting.start()
    waiting.add(event(5))
    await soon(lambda: stored_ids(tmp_path) == ["evt_5"] if waiting._taking is None else False, "it has written")
    await waiting.close()
    kept = files(tmp_path, "*.backup")
    assert [file.read_text() for file in kept] == ([] if message is None else [content])
    assert (message or "") in caplog.text


async def test_a_folder_that_cannot_be_written_is_named_and_events_are_still_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    receiver = Receiver(200, folder=tmp_path / "file" / "state")
    await delivered(receiver, event(), until=lambda webhook: webhook.delivered == 1)
    assert "webhook: waiting events are not kept for a restart" in caplog.text


async def test_why_events_are_not_stored_is_known_until_they_are(tmp_path: Path) -> None:
    waiting = WaitingEvents(tmp_path)
    waiting.start()
    await soon(lambda: waiting._taking is None, "it has a file")
    (tmp_path / "webhook-0.new").mkdir()
    waiting.add(event(5))
    await soon(lambda: "webhook-0.new" in str(waiting.error), "it cannot write")
    (tmp_path / "webhook-0.new").rmdir()
    await soon(lambda: waiting.error is None, "it has written")
    await waiting.close()


@each("secret", ["", "whsec_", "whsec_c2hvcnQ=", "not base64 at all!", "A" * 200])
def test_a_secret_that_is_none_is_refused_without_showing_it(secret: str) -> None:
    with pytest.raises(ValueError, match=r"^must be 24 to 64 random bytes in base64, optionally after whsec_$"):
        signing_key(secret)
