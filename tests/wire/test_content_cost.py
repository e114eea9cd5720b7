"""Costs that the content of a response states, from the socket of the upstream to the bucket of the client."""

import gzip
import json
import re
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from api_gateway.config import GatewayConfig
from api_gateway.downstream import listener
from api_gateway.eventloop.receive_buffer import READ_SIZE, RELAY_SIZE
from tests.cases import each
from tests.kit import (
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    eventually,
    in_front_of,
    reply,
)
from tests.wire.test_cost_settlement import finished, left, settled

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]
Behaviour = Callable[[Wire, RawRequest], bool | None]

WAYS = {"plain": (), "general": ("X-Odd:  two blanks",)}
both_ways = pytest.mark.parametrize("way", WAYS)
ESTIMATE = 2.0
CAPACITY = 100


def configuration(url: str, **cost_from: Any) -> dict[str, Any]:
    config = in_front_of(url)
    config["tiers"] = {"FREE": {"rate": 0.001, "capacity": CAPACITY}}
    config["routes"][0] |= {
        "cost": ESTIMATE,
        "cost_from": {"pointer": "/usage/total_tokens", "per": 1000, **cost_from},
    }
    return config


def usage(tokens: Any) -> bytes:
    return json.dumps({"id": "x", "choices": [{"text": '"}'}], "usage": {"total_tokens": tokens}}).encode()


def as_json(body: bytes, *fields: tuple[bytes, bytes], status: bytes = b"200 OK") -> Behaviour:
    return reply(body, status=status, headers=((b"Content-Type", b"application/json"), *fields))


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*pieces: bytes, media_type: bytes = b"text/event-stream", is_complete: bool = True) -> Behaviour:
    """Send pieces as chunks; unless `is_complete`, close the connection after them."""

    def behave(wire: Wire, _request: RawRequest) -> bool | None:
        wire.send(HEAD % media_type)
        for piece in pieces:
            wire.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        if is_complete:
            wire.send(b"0\r\n\r\n")
        return is_complete

    return behave


def events(*data: bytes) -> bytes:
    return b"".join(b"data: %b\n\n" % one for one in data)


def get(running: RunningGateway, way: str = "plain") -> RawAnswer:
    with RawClient(running.port) as raw:
        return raw.get("/api/x", ("X-Client-ID: c", *WAYS[way]))


STREAM = events(b'{"delta":"a"}', b'{"usage":null}', usage(7000), b"[DONE]")
COMPLETE: dict[str, tuple[Behaviour, float]] = {
    "JSON": (as_json(usage(1500)), 1.5),
    "JSON in chunks": (chunked(usage(1500)[:20], usage(1500)[20:], media_type=b"application/json"), 1.5),
    "an error": (as_json(usage(500), status=b"500 Oops"), 0.5),
    "no tokens": (as_json(usage(0)), 0),
    "events": (chunked(STREAM), 7),
    "events in pieces": (chunked(*[STREAM[at : at + 3] for at in range(0, len(STREAM), 3)]), 7),
    "compressed": (as_json(gzip.compress(usage(1500)), (b"Content-Encoding", b"gzip")), 1.5),
    "its own field": (as_json(usage(1500), (b"X-Gateway-Cost", b"9")), 9),
}
OTHERWISE: dict[str, Behaviour] = {
    "no usage": as_json(b'{"usage": {}}'),
    "no number": as_json(usage("many")),
    "negative": as_json(usage(-5)),
    "no JSON": reply(usage(5)),
    "not readable": as_json(usage(1500), (b"Content-Encoding", b"br")),
    "events without": chunked(events(b'{"delta":"a"}', b"[DONE]")),
    "no body": lambda wire, _request: wire.send(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "nothing but a head": as_json(b""),
}


@both_ways
@pytest.mark.parametrize(("behave", "cost"), COMPLETE.values(), ids=COMPLETE)
def test_the_cost_in_the_content_is_charged(
    gateway: StartGateway, upstream: StartUpstream, way: str, behave: Behaviour, cost: float
) -> None:
    """At the end of the response, for the client's next request; the bytes are those of the upstream."""
    up = upstream(behave)
    running = gateway(configuration(up.url))
    done = finished(running)
    answer = get(running, way)
    assert answer.is_complete
    assert answer.all("x-ratelimit-remaining") == [b"%d" % (CAPACITY - (9 if cost == 9 else ESTIMATE))]
    assert left(running) == pytest.approx(CAPACITY - cost, abs=0.1)
    eventually(lambda: len(done) == 1, "it is recorded")
    assert done[0].cost == cost
    assert settled(running) == {"charged": int(cost > ESTIMATE), "refunded": int(cost < ESTIMATE), "unreadable": 0}


@pytest.mark.parametrize("behave", [COMPLETE["events in pieces"][0], COMPLETE["compressed"][0]])
def test_the_bytes_pass_unchanged(gateway: StartGateway, upstream: StartUpstream, behave: Behaviour) -> None:
    up = upstream(behave)
    body = get(gateway(configuration(up.url))).body
    assert body in (STREAM, gzip.compress(usage(1500))) or gzip.decompress(body) == usage(1500)


@both_ways
@pytest.mark.parametrize("otherwise", [None, 8.0, 0.5])
@pytest.mark.parametrize("behave", OTHERWISE.values(), ids=OTHERWISE)
def test_a_response_without_the_number_costs_what_is_stated_otherwise(
    gateway: StartGateway, upstream: StartUpstream, way: str, behave: Behaviour, otherwise: float | None
) -> None:
    up = upstream(behave)
    running = gateway(configuration(up.url, otherwise=otherwise))
    assert get(running, way).is_complete
    cost = ESTIMATE if otherwise is None else otherwise
    assert left(running) == pytest.approx(CAPACITY - cost, abs=0.1)
    assert settled(running)["unreadable"] == 1


CUT_OFF: dict[str, tuple[Behaviour, float]] = {
    "before the number": (chunked(events(b'{"delta":"a"}'), is_complete=False), 3),
    "within the number": (chunked(STREAM[: STREAM.index(b"7000") + 2], is_complete=False), 3),
    "after a higher number": (chunked(STREAM, is_complete=False), 7),
    "after a lower number": (chunked(events(usage(1)), is_complete=False), 3),
    "within JSON": (chunked(usage(1500)[:-4], media_type=b"application/json", is_complete=False), 3),
}


@both_ways
@pytest.mark.parametrize(("behave", "cost"), CUT_OFF.values(), ids=CUT_OFF)
def test_a_response_that_breaks_off_costs_no_less_than_is_stated_otherwise(
    gateway: StartGateway, upstream: StartUpstream, way: str, behave: Behaviour, cost: float
) -> None:
    up = upstream(behave)
    running = gateway(configuration(up.url, otherwise=3))
    assert not get(running, way).is_complete
    eventually(lambda: left(running) == pytest.approx(CAPACITY - cost, abs=0.1), "it is settled")


@pytest.mark.parametrize(("text", "cost"), [(usage(1500)[:-4], 3), (usage(7000)[:-4], 3), (usage(7000)[:-1], 7)])
def test_a_json_text_without_its_end_costs_no_less_than_is_stated_otherwise(
    gateway: StartGateway, upstream: StartUpstream, text: bytes, cost: float
) -> None:
    up = upstream(as_json(text))
    running = gateway(configuration(up.url, otherwise=3))
    assert get(running).is_complete
    assert left(running) == pytest.approx(CAPACITY - cost, abs=0.1)


@both_ways
def test_a_client_that_leaves_after_the_event_that_ends_a_stream_pays_what_it_states(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    """As many clients do, although the last bytes of the stream are still to come."""
    up = upstream()
    running = gateway(configuration(up.url, otherwise=3))

    def behave(wire: Wire, _request: RawRequest) -> bool:
        piece = events(usage(500), b"[DONE]")
        wire.send(HEAD % b"text/event-stream" + b"%x\r\n%b\r\n" % (len(piece), piece))
        wire.read_until(b"never")  # until the gateway closes the connection
        return False

    up.behave = behave
    with RawClient(running.port) as raw:
        raw.request("GET", "/api/x", ("X-Client-ID: c", *WAYS[way]))
        raw.read_until(b"[DONE]\n\n")
    eventually(lambda: left(running) == pytest.approx(CAPACITY - 0.5, abs=0.1), "it is settled")


@both_ways
@pytest.mark.parametrize("media_type", [b"text/event-stream", b"application/json"])
def test_a_client_that_leaves_pays_what_is_stated_otherwise(
    gateway: StartGateway, upstream: StartUpstream, way: str, media_type: bytes
) -> None:
    up = upstream()
    running = gateway(configuration(up.url, otherwise=3))

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(HEAD % media_type + b"9\r\ndata: 1\n\n\r\n")
        wire.read_until(b"never")  # until the gateway closes the connection
        return False

    up.behave = behave
    with RawClient(running.port) as raw:
        raw.request("GET", "/api/x", ("X-Client-ID: c", *WAYS[way]))
        raw.read_until(b"data: 1")
    eventually(lambda: left(running) == pytest.approx(CAPACITY - 3, abs=0.1), "it is settled")


@both_ways
@pytest.mark.parametrize(("number", "cost"), [(1, 3), (7000, 7)])
def test_a_stream_that_the_gateway_ends_when_it_stops_costs_no_less_than_is_stated_otherwise(
    gateway: StartGateway,
    upstream: StartUpstream,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    number: int,
    cost: float,
) -> None:
    """It ends between two events, for the client to continue elsewhere; what the next events state is not known."""
    up = upstream()
    monkeypatch.setattr(listener, "DRAIN_LINGER", 0.1)  # the client closes its connection later
    running = gateway(configuration(up.url, otherwise=3))
    done = finished(running)

    def behave(wire: Wire, _request: RawRequest) -> bool:
        piece = events(usage(number))
        wire.send(HEAD % b"text/event-stream" + b"%x\r\n%b\r\n" % (len(piece), piece))
        wire.read_until(b"never")  # until the gateway closes the connection
        return False

    up.behave = behave
    with RawClient(running.port) as raw:
        raw.request("GET", "/api/x", ("X-Client-ID: c", *WAYS[way]))
        raw.read_until(b"}\n\n")
        running.stop()
        assert [one.cost for one in done] == [cost]


def test_debt_delays_the_next_request(gateway: StartGateway, upstream: StartUpstream) -> None:
    up = upstream(as_json(usage(120_000)))
    running = gateway(configuration(up.url))
    assert get(running).status == 200
    assert left(running) == pytest.approx(-20, abs=0.1)
    assert get(running).status == 429


def test_a_limit_with_a_cost_of_its_own_keeps_it(gateway: StartGateway, upstream: StartUpstream) -> None:
    """So requests can be limited by their number besides what they have used."""
    up = upstream(as_json(usage(5000)))
    config = configuration(up.url)
    config["limits"] = [{"name": "requests", "key": "client", "rate": 0.001, "capacity": 2, "cost": 1}]
    running = gateway(config)
    assert [get(running).status for _ in range(3)] == [200, 200, 429]
    assert left(running) == pytest.approx(CAPACITY - 10, abs=0.1)


def test_request_bodies_of_such_routes_arrive(gateway: StartGateway, upstream: StartUpstream) -> None:
    """They are not on the fast path, whatever had been read of them there."""
    up = upstream(as_json(usage(1500)))
    running = gateway(configuration(up.url))
    body = b"x" * 300_000
    with RawClient(running.port) as raw:
        raw.request("POST", "/api/x", ("X-Client-ID: c", f"Content-Length: {len(body)}"), body)
        assert raw.answer().status == 200
    assert up.requests[-1].body == body
    assert left(running) == pytest.approx(CAPACITY - 1.5, abs=0.1)


def test_other_routes_are_not_read_and_use_the_fast_path(
    gateway: StartGateway, upstream: StartUpstream, fast_path_spy: list[bool]
) -> None:
    up = upstream(as_json(usage(1500)))
    config = configuration(up.url)
    config["routes"].append({"name": "other", "path": "/api/other", "upstream": "up", "cost": 5})
    running = gateway(config)
    with RawClient(running.port) as raw:
        assert raw.get("/api/other", ("X-Client-ID: c",)).status == 200
    assert fast_path_spy[-1]
    assert left(running) == pytest.approx(CAPACITY - 5, abs=0.1)
    assert settled(running) == {"charged": 0, "refunded": 0, "unreadable": 0}


@each(
    ("cost_from", "message"),
    [
        ({"pointer": "usage"}, r"0\.cost_from\.pointer.*a JSON pointer begins with / \(RFC 6901\)"),
        ({"pointer": "/a~b"}, r"0\.cost_from\.pointer.*in a JSON pointer, ~ is written ~0"),
        ({"pointer": "/a", "per": 0}, "cost_from.per"),
        (
            {"pointer": "/a", "otherwise": 101},
            r"routes\[0\] \(all\)\.cost_from\.otherwise: above the capacity of every tier \(at most 100\), got 101",
        ),
        ({"pointer": "/a", "per_token": 3}, "cost_from.per_token"),
        ({}, "cost_from.pointer"),
    ],
)
def test_a_mistake_in_the_setting_is_named_with_its_place(cost_from: dict[str, Any], message: str) -> None:
    config = configuration("http://127.0.0.1:9")
    config["routes"][0]["cost_from"] = cost_from
    config["tiers"] = {name: {"rate": 1, "capacity": CAPACITY} for name in ("FREE", "BASIC", "PREMIUM", "ENTERPRISE")}
    with pytest.raises(ValueError, match="cost_from") as raised:
        GatewayConfig.model_validate(config)
    assert re.search(message, str(raised.value), re.DOTALL)


LONG = b": comment\n" * 400_000
FRAMINGS = {
    "counted": b"Content-Length: %d\r\n\r\n%b" % (len(LONG), LONG),
    "until close": b"Connection: close\r\n\r\n" + LONG,
    "in chunks": b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(LONG), LONG),
}


@pytest.mark.parametrize("framed", FRAMINGS.values(), ids=FRAMINGS)
def test_one_read_of_content_that_is_scanned_is_taken_in_a_turn_of_the_event_loop(
    gateway: StartGateway, upstream: StartUpstream, framed: bytes
) -> None:
    """Other connections are served in between: an event loop that is ready to read reads megabytes at once."""

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + framed)
        return b"close" not in framed[:20]

    up = upstream(behave)
    running = gateway(configuration(up.url))
    loop, sent, is_over = running.server._loop, [0], threading.Event()

    def note() -> None:
        """Note in each turn how much was sent to the client."""
        exchanges = [getattr(one, "exchange", None) for one in running.server.server_state.connections]
        sent.append(max([one.exchange.bytes_out for one in exchanges if one is not None], default=sent[-1]))
        if not is_over.is_set():
            loop.call_soon(note)

    loop.call_soon_threadsafe(note)
    answer = get(running)
    is_over.set()
    assert (answer.is_complete, len(answer.body)) == (True, len(LONG))
    assert len(set(sent)) >= (len(LONG) - RELAY_SIZE) // READ_SIZE
    assert max(after - before for before, after in pairwise(sent)) <= RELAY_SIZE, "before the head, it is not known"
