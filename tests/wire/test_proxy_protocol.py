"""The PROXY protocol on the wire: the client that a trusted peer names is the client, on both paths."""

import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api_gateway.downstream.listener import change_protocol
from api_gateway.downstream.proxy_protocol import SIGNATURE
from api_gateway.settings.server import ServerSection
from tests.kit import (
    PATIENCE,
    RawClient,
    RawUpstream,
    RunningGateway,
    eventually,
    in_front_of,
    reason,
    running_gateway,
)
from tests.wire.test_fast_path import ODD

BOTH_WAYS = pytest.mark.parametrize("odd", [(), (ODD,)], ids=["fast path", "general parser"])
FIRST = b"PROXY TCP4 203.0.113.9 192.0.2.1 4711 443\r\n"
SECOND = (
    SIGNATURE
    + struct.pack("!BBH", 0x21, 0x21, 36 + 7)
    + socket.inet_pton(socket.AF_INET6, "2001:db8::9") * 2
    + struct.pack("!HH", 4711, 443)
    + b"\x03\x00\x04crc!"
)
LOCAL = SIGNATURE + struct.pack("!BBH", 0x20, 0, 0)
TRUSTING = {"proxy_protocol": ["127.0.0.1"], "header_timeout": 1}


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    return in_front_of(shared.url) | {"server": TRUSTING}


def request(client: RawClient, *headers: str, header: bytes = b"", target: str = "/api/x") -> Any:
    """Send a header and a request in one piece, and return the response."""
    lines = "".join(f"{line}\r\n" for line in ("Host: gateway.test", *headers))
    client.send(header + f"GET {target} HTTP/1.1\r\n{lines}\r\n".encode())
    return client.answer()


@BOTH_WAYS
@pytest.mark.parametrize(
    ("header", "address"), [(FIRST, b"203.0.113.9"), (SECOND, b"2001:db8::9"), (LOCAL, b"127.0.0.1")]
)
def test_the_named_client_is_the_client_of_all_requests(
    client: RawClient, up: RawUpstream, odd: tuple[str, ...], header: bytes, address: bytes
) -> None:
    assert request(client, *odd, header=header).status == 200
    assert request(client, *odd).status == 200
    assert [one.all("x-forwarded-for") for one in up.requests] == [[address], [address]]


@pytest.mark.parametrize("header", [FIRST, SECOND])
def test_a_header_may_come_in_pieces(client: RawClient, up: RawUpstream, header: bytes) -> None:
    for byte in header:
        client.send(bytes([byte]))
        time.sleep(0.001)
    assert request(client).status == 200
    assert len(up.requests) == 1


def test_the_address_limit_counts_the_named_client(shared: RawUpstream, tmp_path: Path) -> None:
    sections = in_front_of(shared.url) | {"server": TRUSTING, "address_limit": {"rate": 0.001, "capacity": 1}}
    with running_gateway(sections, tmp_path) as running:
        for number, expected in ((1, 200), (1, 429), (2, 200)):
            with RawClient(running.port) as client:
                header = FIRST.replace(b"203.0.113.9", b"203.0.113.%d" % number)
                assert request(client, header=header).status == expected


def test_a_named_client_that_is_a_trusted_proxy_reports_the_client_itself(
    shared: RawUpstream, up: RawUpstream, tmp_path: Path
) -> None:
    """A balancer of TCP in front of a proxy of HTTP: the header is the balancer's, the field the proxy's."""
    server = TRUSTING | {"trusted_proxies": ["203.0.113.9"]}
    sections = in_front_of(shared.url) | {"server": server, "addresses": {"deny": ["192.0.2.7"]}}
    with running_gateway(sections, tmp_path) as running:
        with RawClient(running.port) as client:
            assert reason(request(client, "X-Forwarded-For: 192.0.2.7", header=FIRST)) == (403, "address_denied")
            assert request(client, "X-Forwarded-For: 192.0.2.8").status == 200
        with RawClient(running.port) as client:
            assert request(client, "X-Forwarded-For: 192.0.2.7", header=SECOND).status == 200
    assert up.requests[0].all("x-forwarded-for") == [b"192.0.2.8, 203.0.113.9"]
    assert up.requests[1].all("x-forwarded-for") == [b"2001:db8::9"]


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /api/x HTTP/1.1\r\nHost: x\r\n\r\n",
        FIRST.replace(b"TCP4", b"TCP9"),
        b"PROXY UNKNOWN " + b"x" * 200,
        SIGNATURE + b"\x31\x11\x00\x00",
        b"\x16\x03\x01\x02\x00",
    ],
)
def test_a_connection_of_a_trusted_peer_must_begin_with_a_header(
    running: RunningGateway, client: RawClient, up: RawUpstream, begin: bytes
) -> None:
    client.send(begin)
    answer = client.answer()
    assert reason(answer) == (400, "bad_request")
    assert "must begin with a PROXY protocol header" in json.loads(answer.body)["detail"]
    assert client.is_closed()
    assert up.requests == []
    assert running.live.recorder.in_flight == 0


@pytest.mark.parametrize("begin", [b"", FIRST[:20], SECOND[:20]])
def test_the_header_has_a_timeout(client: RawClient, begin: bytes) -> None:
    client.send(begin)
    assert reason(client.answer()) == (408, "request_timeout")
    assert client.is_closed()


@BOTH_WAYS
@pytest.mark.parametrize("header", [FIRST, SECOND, LOCAL])
def test_the_header_of_a_stranger_is_refused(
    shared: RawUpstream, up: RawUpstream, tmp_path: Path, header: bytes, odd: tuple[str, ...]
) -> None:
    sections = in_front_of(shared.url) | {"server": {"proxy_protocol": ["10.0.0.0/8"]}}
    with running_gateway(sections, tmp_path) as running:
        with RawClient(running.port) as client:
            assert reason(request(client, *odd, header=header)) == (400, "bad_request")
            assert client.is_closed()
        assert up.requests == []
        with RawClient(running.port) as client:
            assert request(client, *odd).status == 200
        assert up.requests[0].all("x-forwarded-for") == [b"127.0.0.1"]


def test_a_second_header_is_refused(client: RawClient, up: RawUpstream) -> None:
    assert reason(request(client, header=FIRST + FIRST)) == (400, "bad_request")
    assert up.requests == []


def test_the_client_of_a_balancer_is_never_a_local_operator(client: RawClient, running: RunningGateway) -> None:
    """Even if the balancer runs on this machine, and its client says that it asks localhost."""
    header = FIRST.replace(b"203.0.113.9", b"127.0.0.1")
    client.send(header + b"GET /clients HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.answer().status in (401, 403)
    with RawClient(running.port) as other:
        other.send(LOCAL + b"GET /clients HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert other.answer().status in (401, 403)
    with RawClient(running.port) as probe:
        probe.send(LOCAL + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert probe.answer().status == 200


def test_shares_of_connections_are_those_of_named_clients(shared: RawUpstream, tmp_path: Path) -> None:
    sections = in_front_of(shared.url) | {"server": TRUSTING | {"max_connections_per_peer": 1}}
    with running_gateway(sections, tmp_path) as running, RawClient(running.port) as first:
        assert request(first, header=FIRST).status == 200
        with RawClient(running.port) as second:
            assert reason(request(second, header=FIRST)) == (503, "overloaded")
        with RawClient(running.port) as third:
            assert request(third, header=SECOND).status == 200


def test_connections_that_wait_for_their_header_count_in_the_total(shared: RawUpstream, tmp_path: Path) -> None:
    """They end with the timeout of the header, so others are served then."""
    sections = in_front_of(shared.url) | {"server": TRUSTING | {"max_connections": 3, "header_timeout": 1}}
    with running_gateway(sections, tmp_path) as running:
        slots = slots_of(running)
        waiting = [RawClient(running.port) for _ in range(3)]
        eventually(lambda: slots.shares.in_use == 3, "they have slots")
        with RawClient(running.port) as one:
            assert reason(request(one, header=FIRST)) == (503, "overloaded")
        for client in waiting:
            assert client.answer().status == 408
            client.close()
        eventually(lambda: slots.shares.in_use == slots.surplus.in_use == 0, "all slots are returned")
        with RawClient(running.port) as one:
            assert request(one, header=FIRST).status == 200
            assert slots.shares.in_use == 1
        eventually(lambda: slots.shares.in_use == 0, "the slot is returned")


def test_a_connection_that_is_refused_or_lost_before_its_header_returns_its_slot(running: RunningGateway) -> None:
    slots = slots_of(running)
    eventually(lambda: slots.shares.in_use == 0, "the connections of other tests are closed")
    with RawClient(running.port) as lost:
        lost.send(FIRST[:10])
        eventually(lambda: slots.shares.in_use == 1, "it has a slot")
    with RawClient(running.port) as refused:
        refused.send(b"GET / HTTP/1.1\r\n\r\n")
        assert refused.answer().status == 400
    eventually(lambda: slots.shares.in_use == 0, "the slots are returned")


def slots_of(running: RunningGateway) -> Any:
    factory: Any = running.server.config.http
    return factory.slots


@pytest.fixture
def stopping(shared: RawUpstream, tmp_path: Path) -> Iterator[RunningGateway]:
    server = TRUSTING | {"header_timeout": 60, "drain_timeout": 20}
    gateway = RunningGateway(in_front_of(shared.url) | {"server": server}, tmp_path)
    yield gateway
    if gateway._thread.is_alive():
        gateway.stop()


def test_a_connection_without_its_header_does_not_delay_a_stop(stopping: RunningGateway) -> None:
    with RawClient(stopping.port) as client:
        client.send(FIRST[:10])
        eventually(lambda: bool(stopping.server.server_state.connections), "the connection is accepted")
        began = time.monotonic()
        stopping.stop()
        assert time.monotonic() - began < PATIENCE / 2
        assert client.is_closed()


def test_a_reload_changes_the_trusted_peers(shared: RawUpstream, tmp_path: Path) -> None:
    sections = in_front_of(shared.url)
    with running_gateway(sections, tmp_path) as running:
        assert request_on(running).status == 200
        factory: Any = running.server.config.http
        change_protocol(factory, ServerSection.model_validate(TRUSTING))
        assert request_on(running).status == 400
        assert request_on(running, FIRST).status == 200


def request_on(running: RunningGateway, header: bytes = b"") -> Any:
    """Send a request on a new connection."""
    with RawClient(running.port) as client:
        return request(client, header=header)
