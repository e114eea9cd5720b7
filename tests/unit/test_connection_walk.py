"""Random lives of a downstream connection: whatever happens, in whatever order, nothing is mixed up or left over.

Each life is generated from its number, so that a failure can be repeated. A longer run is a command of its own:
`make lives`, which also tells how many requests arrived whole, in pieces cut at random.
"""

import logging
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from api_gateway.downstream.states import ILLEGAL_EVENTS
from tests.downstream_kit import Harness
from tests.kit import LIMITS

LIVES = 400
LIFE = replace(LIMITS, header_bytes=4096, header_lines=40, body_rate=100.0, body_grace=2.0)
STEPS = 60
HOST = b"Host: a\r\n"
HANDSHAKE = b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n"


@dataclass(frozen=True, slots=True)
class Request:
    """One generated request; `is_bad`: it gets problem details at most, also if it arrives whole."""

    data: bytes
    is_bad: bool = False


def get(number: int, kind: bytes, *, lines: bytes = b"", version: bytes = b"1.1") -> Request:
    return Request(b"GET /%b%d HTTP/%b\r\n%b%b\r\n" % (kind, number, version, HOST, lines))


def counted(number: int, kind: bytes, size: int, *, lines: bytes = b"") -> Request:
    head = b"POST /%b%d HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n" % (kind, number, HOST, lines, size)
    return Request(head + b"y" * size)


def chunked(number: int, kind: bytes) -> Request:
    head = b"POST /%b%d HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n" % (kind, number, HOST)
    return Request(head + b"3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nX-Trailer: 1\r\n\r\n")


# Each makes one request with that number; plain ones are given more often, as in reality.
KINDS: tuple[Callable[[int], Request], ...] = (
    lambda number: get(number, b"w"),
    lambda number: get(number, b"e"),
    lambda number: get(number, b"e"),
    lambda number: get(number, b"l", lines=b"X:1\r\n"),
    lambda number: get(number, b"g"),
    lambda number: get(number, b"p"),
    lambda number: get(number, b"t"),
    lambda number: counted(number, b"b", 10),
    lambda number: counted(number, b"b", 3000, lines=b"Expect: 100-continue\r\n"),
    lambda number: counted(number, b"i", 300),
    lambda number: counted(number, b"e", 20),
    lambda number: counted(number, b"e", 70_000),
    lambda number: counted(number, b"g", 70_000),
    lambda number: chunked(number, b"b"),
    lambda number: chunked(number, b"e"),
    lambda number: chunked(number, b"i"),
    lambda number: Request(b"\r\nVERSION-CONTROL /l%d HTTP/1.1\r\n%b\r\n" % (number, HOST)),
    lambda number: get(number, b"l", lines=b"Connection: upgrade\r\nUpgrade: h2c\r\n"),
    lambda number: get(number, b"l", lines=HANDSHAKE),
)
RARE: tuple[Callable[[int], Request], ...] = (
    lambda number: get(number, b"h", lines=HANDSHAKE),
    lambda number: get(number, b"l", lines=b"Connection: close\r\n"),
    lambda number: get(number, b"e", lines=b"Connection: close\r\n"),
    lambda number: get(number, b"l", version=b"1.0"),
    lambda number: get(number, b"p", version=b"1.0"),
    lambda number: Request(get(number, b"x").data, is_bad=True),
    lambda number: Request(b"junk %d\r\n\r\n" % number, is_bad=True),
    lambda number: Request(get(number, b"l", lines=b"X: " + b"z" * 5000 + b"\r\n").data, is_bad=True),
    lambda number: Request(b"GET foo://%d HTTP/1.1\r\n%b\r\n" % (number, HOST), is_bad=True),
)


class Life:
    """One random life of a connection."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.random = random.Random(number)
        self.harness = Harness(LIFE)
        self.client = self.harness.client
        count = self.random.randrange(1, 24)
        kinds = [self.random.choice(RARE if self.random.random() < 0.08 else KINDS) for _ in range(count)]
        self.requests = [kind(number + 1) for number, kind in enumerate(kinds)]
        self.input = b"".join(request.data for request in self.requests)
        self.ends: list[int] = []
        for request in self.requests:
            self.ends.append(len(request.data) + (self.ends[-1] if self.ends else 0))
        self.delivered = 0
        self.refused_at: int | None = None  # how much was delivered when the refusal was first seen
        self.has_ended = False  # the client has sent EOF
        self.steps: list[str] = []

    def run(self) -> None:
        """Take random steps, then let everything end, and check what is left."""
        steps: tuple[tuple[Callable[[], None], int], ...] = (
            (self.send, 40),
            (self.turn, 20),
            (self.finish_exchange, 15),
            (self.open_gate, 15),
            (self.stall, 3),
            (self.flush, 6),
            (self.begin_again, 2),
            (self.wait, 2),
            (self.drain, 1),
            (self.end, 1),
            (self.lose, 1),
            (self.abort, 1),
        )
        weighted = [step for step, weight in steps for _ in range(weight)]
        for _ in range(STEPS):
            step = self.random.choice(weighted)
            self.steps.append(step.__name__)
            step()
            self.check_state()
        self.end_everything()

    # Steps

    @property
    def is_lost(self) -> bool:
        return self.client.transport.is_lost

    def send(self) -> None:
        """Send some more bytes, cut at random, often at the end of a request."""
        if self.has_ended or not self.client.transport.is_reading() or self.delivered == len(self.input):
            return
        if self.random.random() < 0.5:
            stop = next(end for end in self.ends if end > self.delivered)
        else:
            stop = self.delivered + self.random.choice((1, 5, 50, 500, 100_000))
        data = self.input[self.delivered : stop]
        self.delivered += len(data)
        if hasattr(self.client.transport.protocol, "data_received") and self.harness.app.tunnels == 0:
            self.client.receive(data)

    def turn(self) -> None:
        self.harness.turn(self.random.randrange(1, 4))

    def _exchange(self) -> Any:
        exchanges = self.harness.app.fast_path.current.exchanges
        return exchanges[0] if exchanges and not self.client.connection.is_write_paused else None

    def finish_exchange(self) -> None:
        exchange = self._exchange()
        if exchange is not None:
            exchange.finish()

    def begin_again(self) -> None:
        """Begin to forward after a reply of the store."""
        exchange = self._exchange()
        if exchange is not None:
            exchange.again()

    def open_gate(self) -> None:
        gates = self.harness.app.gates
        if gates:
            gate = gates.pop(0)
            if not gate.done():
                gate.set_result(None)
            self.harness.turn(self.random.randrange(3))

    def stall(self) -> None:
        self.client.transport.is_stalled = True

    def flush(self) -> None:
        self.client.transport.is_stalled = False
        if self.client.transport.pending:
            self.client.transport.flush()

    def wait(self) -> None:
        self.harness.wait(self.random.choice((0.5, 3.0, 20.0, 100.0)))

    def drain(self) -> None:
        self.client.connection.shutdown()

    def end(self) -> None:
        if not self.has_ended and self.client.transport.is_reading() and self.harness.app.tunnels == 0:
            self.has_ended = True
            self.client.end()

    def lose(self) -> None:
        if self.random.random() < 0.3:
            self.client.lose(ConnectionResetError())

    def abort(self) -> None:
        """End as a server does at the end of the drain: connections are aborted, then tasks cancelled."""
        if self.random.random() > 0.3:
            return
        self.drain()
        if not self.is_lost and self.client.connection.is_busy:
            self.client.connection.abort()
        for task in list(self.harness.state.tasks):
            task.cancel()
        self.harness.turn()

    # Checks

    def check_state(self) -> None:
        connection = self.client.connection
        if connection.accepts_plain:
            assert connection.state.is_idle
            assert not connection.held.data
        if connection.state.is_idle:
            assert self.client.transport.is_reading(), "an idle connection reads"
        if connection.state.is_held:
            assert connection.receiving is None
        self.check_responses()

    def check_responses(self) -> None:
        """Check that the client has received the responses to its requests in order, then at most one refusal."""
        received = self.client.sent + bytes(self.client.transport.pending)
        answered = 0
        while received.startswith(b"HTTP/1.1 ") and b"\r\n\r\n" in received:
            head, _, received = received.partition(b"\r\n\r\n")
            status, lines = head.split(b"\r\n")[0], head.split(b"\r\n")[1:]
            fields = dict(line.lower().split(b": ", 1) for line in lines)
            if status.startswith(b"HTTP/1.1 100"):
                continue
            body, received = received[: (size := int(fields.get(b"content-length", 0)))], received[size:]
            if b"x-number" in fields:
                answered += 1
                assert int(fields[b"x-number"]) == answered, "a response to a wrong request"
                assert not self.requests[answered - 1].is_bad
                assert len(body) == size or not received
            else:
                assert fields[b"content-type"] == b"application/problem+json"
                if self.refused_at is None:
                    self.refused_at = self.delivered
                is_incomplete = self.refused_at < self.ends[answered]
                assert self.requests[answered].is_bad or is_incomplete, "a refusal of a wrong request"
                assert received == b"", "nothing is sent behind a refusal"
                return

    def end_everything(self) -> None:
        """Let the client read, and the applications respond, until the connection has ended by itself."""
        harness = self.harness
        for _ in range(30):
            if self.is_lost:
                break
            self.flush()
            for exchange in list(harness.app.fast_path.current.exchanges):
                exchange.finish()
            harness.open_gates()
            if harness.app.tunnels:
                self.client.transport.abort()
            harness.wait(1000.0)
        assert self.is_lost, f"the connection does not end: {self.client.connection!r}"
        for _ in range(5):  # an application may wait again
            harness.open_gates()
            harness.turn(5)
        self.check_responses()
        connection = self.client.connection
        assert connection.state.is_lost
        assert harness.factory.slots.shares.in_use == harness.factory.slots.surplus.in_use == 0
        assert not harness.factory.slots.peers
        assert not harness.state.connections
        assert not harness.state.tasks
        assert not harness.app.fast_path.current.exchanges
        assert not harness.loop.live_timers()
        assert not harness.errors, harness.errors
        assert not ILLEGAL_EVENTS.counts


_SHORT = re.compile(rb"([xyz])\1{9,}")


def _shortened(match: re.Match[bytes]) -> bytes:
    return b"%b{%d}" % (match[1], len(match[0]))


def live(number: int) -> int:
    """Run one life and return how many requests arrived whole; what fails names its number and steps."""
    life = Life(number)
    try:
        life.run()
    except BaseException as error:
        error.add_note(f"life {number}: {' '.join(life.steps)}; {life.client.connection!r}")
        error.add_note(
            f"input: {_SHORT.sub(_shortened, life.input)[:1500]!r}, {life.delivered} of {len(life.input)} delivered"
        )
        error.add_note(f"sent: {_SHORT.sub(_shortened, life.client.sent)[-1500:]!r}")
        raise
    finally:
        life.harness.loop.close()
    return sum(end <= life.delivered for end in life.ends)


@pytest.mark.parametrize("part", range(8))
def test_whatever_happens_nothing_is_mixed_up_and_nothing_is_left(part: int, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(part * LIVES // 8, (part + 1) * LIVES // 8):
        live(number)
    assert not [one for one in caplog.records if "the application failed" not in one.getMessage()]


def test_a_connection_reads_on_after_the_last_of_more_requests_than_it_holds() -> None:
    """Of those that were held while reading was paused, the last one is served on the fast path (life 30664)."""
    with Harness(LIFE) as harness:
        client, exchanges = harness.client, harness.app.fast_path.current.exchanges
        client.receive(get(1, b"e").data)
        client.receive(b"".join(get(number, b"w").data for number in range(2, 2_502)) + get(2_502, b"e").data)
        assert not client.transport.is_reading()
        exchanges[0].finish()
        harness.turn()
        exchanges[0].finish()
        assert harness.connection.state.is_idle
        client.receive(get(2_503, b"w").data)
        assert client.sent.count(b"200 OK") == 2_503


def test_line_breaks_alone_are_no_head() -> None:
    """RFC 9112 section 2.2: they are ignored, so a client that sends them behind its request is not refused."""
    with Harness(LIFE) as harness:
        harness.client.receive(get(1, b"w").data)
        harness.client.receive(b"\r\n")
        sent = harness.client.sent
        harness.wait(LIFE.keep_alive_timeout + 1)
        assert harness.client.transport.is_lost
        assert harness.client.sent == sent


def test_line_breaks_without_end_are_refused() -> None:
    with Harness(LIFE) as harness:
        while not harness.client.sent:
            harness.client.receive(b"\r\n" * 100)
        assert harness.client.sent.startswith(b"HTTP/1.1 431 ")


def test_a_half_closed_client_is_owed_no_response_to_an_incomplete_head() -> None:
    with Harness(LIFE) as harness:
        harness.client.receive(get(1, b"e").data)
        harness.client.receive(get(2, b"l", lines=b"Connection: close\r\n").data + b"GET /l3 HT")
        harness.client.end()
        harness.app.fast_path.current.exchanges[0].finish()
        harness.turn(5)
        assert harness.client.sent.count(b"200 OK") == 2
        assert harness.client.transport.is_lost


def test_a_plain_request_waits_for_one_that_came_in_one_read_with_the_rest_of_a_body() -> None:
    """The body is that of a request whose response is complete already, so the connection is idle within that read."""
    with Harness(LIFE) as harness:
        early = counted(1, b"i", 300).data
        harness.client.receive(early[:-100])
        harness.turn()
        assert harness.client.sent.count(b"200 OK") == 1
        harness.client.receive(early[-100:] + get(2, b"g").data)
        harness.turn()
        harness.client.receive(get(3, b"w").data)
        harness.turn()
        assert harness.client.sent.count(b"200 OK") == 1
        harness.open_gates()
        harness.turn(5)
        assert [part[:1] for part in harness.client.sent.split(b"x-number: ")[1:]] == [b"1", b"2", b"3"]


def test_a_task_that_is_cancelled_before_it_begins_ends_the_connection() -> None:
    with Harness(LIFE) as harness:
        harness.client.receive(get(1, b"l").data + b"GET /l2")
        for task in list(harness.state.tasks):
            task.cancel()
        harness.turn()
        assert harness.client.transport.is_lost


def test_plain_requests_need_no_general_parser() -> None:
    with Harness(LIFE) as harness:
        harness.client.receive(get(1, b"w").data)
        assert harness.connection.reader._parser is None
        harness.client.receive(get(2, b"l").data)
        assert harness.connection.reader._parser is not None
        harness.turn()
        assert harness.client.sent.count(b"200 OK") == 2


if __name__ == "__main__":
    ILLEGAL_EVENTS.raises = True
    amount, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    logging.disable()  # of applications that fail, as they are asked to
    arrived = sum(live(one) for one in range(first, first + amount))
    print(f"{amount} lives, from number {first}, {arrived} requests: no response to a wrong request, nothing left")


@pytest.mark.parametrize("kind", [b"e", b"g"], ids=["fast-path", "asgi"])
def test_a_client_that_has_not_announced_its_end_may_still_be_sending_at_a_close(kind: bytes) -> None:
    """The gateway ends its own side first, as a close with unread input would destroy the response (RFC 9112 9.6)."""
    with Harness(LIFE) as harness:
        harness.client.receive(get(1, kind).data)
        harness.turn()
        harness.connection.shutdown()
        respond(harness, kind)
        assert harness.client.transport.has_eof
        assert not harness.client.transport.is_closing()
        harness.client.receive(get(2, kind).data)
        harness.client.end()
        harness.turn()
        assert harness.client.transport.is_lost
        assert harness.client.sent.count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("kind", [b"e", b"g"], ids=["fast-path", "asgi"])
def test_a_connection_is_closed_at_once_behind_the_request_that_its_client_has_announced_as_the_last(
    kind: bytes,
) -> None:
    with Harness(LIFE) as harness:
        harness.client.receive(get(1, kind, lines=b"Connection: close\r\n").data)
        harness.turn()
        respond(harness, kind)
        assert harness.client.transport.is_lost
        assert not harness.client.transport.has_eof


def respond(harness: Harness, kind: bytes) -> None:
    """Respond to the request in flight."""
    if kind == b"e":
        exchange = harness.app.fast_path.current.exchanges[0]
        exchange.finish()
    else:
        harness.open_gates()
    harness.turn(5)


def test_a_malformed_request_does_not_destroy_the_responses_before_it_by_a_reset() -> None:
    """The response that is still due is not sent, but those that have been sent can be read."""
    with Harness(LIFE) as harness:
        harness.client.receive(get(1, b"l", lines=b"X:1\r\n").data + get(2, b"g").data + b"garbage\r\n\r\n")
        harness.turn()
        assert harness.client.transport.has_eof
        assert not harness.client.transport.is_closing()
        harness.client.end()
        harness.turn()
        assert harness.client.transport.is_lost
