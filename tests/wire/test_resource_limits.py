"""One address cannot exhaust the gateway or an upstream: connections, request bodies, requests in flight, tunnels."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any, Self

import pytest

from api_gateway.admin import health_cache
from tests.kit import (
    PATIENCE,
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    eventually,
    in_front_of,
    reply,
)

ONE, OTHER, THIRD = "127.0.0.1", "127.0.0.2", "127.0.0.3"
ASKING = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: eA==", "Sec-WebSocket-Version: 13")
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"9\r\ndata: 1\n\n\r\n"
StartGateway = Callable[[dict[str, Any]], RunningGateway]


@pytest.fixture(autouse=True)
def _health_is_rendered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are seen without waiting for a second."""
    monkeypatch.setattr(health_cache, "MAX_AGE", 0.05)


class Address(RawClient):
    """A client at an address of its own."""

    def __init__(self, port: int, address: str = ONE) -> None:
        Wire.__init__(self, socket.create_connection(("127.0.0.1", port), PATIENCE, source_address=(address, 0)))


class Held:
    """Connections that are closed at the end."""

    def __init__(self, port: int, stack: ExitStack) -> None:
        self._port, self._stack = port, stack

    def __call__(self, address: str = ONE) -> Address:
        return self._stack.enter_context(Address(self._port, address))


def refused(answer: RawAnswer) -> str:
    """Return the detail of a refusal for want of places."""
    assert answer.status == 503
    assert answer.all("content-type") == [b"application/problem+json"]
    assert int(answer.all("retry-after")[0]) >= 1
    body = json.loads(answer.body)
    assert body["reason"] == "overloaded"
    detail: str = body["detail"]
    return detail


def resource(running: RunningGateway, name: str) -> dict[str, Any]:
    """Return how a resource stands, as operators see it."""
    found: list[dict[str, Any]] = ask(f"{running.url}/health").json()["resources"]
    return next(one for one in found if one["resource"] == name)


# Connections


@pytest.fixture
def eight(gateway: StartGateway, up: RawUpstream) -> RunningGateway:
    return gateway(in_front_of(up.url) | {"server": {"max_connections": 8, "drain_timeout": 1}})


def connections(running: RunningGateway) -> int:
    return running.server.connections.in_use


def test_an_address_gets_half_of_the_connections_and_another_one_is_still_served(eight: RunningGateway) -> None:
    with ExitStack() as stack:
        client = Held(eight.port, stack)
        held = [client() for _ in range(4)]
        assert [one.get().status for one in held] == [200] * 4
        for _ in range(2):
            surplus = client()
            detail = refused(surplus.get())
            assert "4 of 8 connections are in use, 4 of them by you" in detail
            assert surplus.is_closed()
        others = [client(OTHER), client(OTHER), client(THIRD)]
        assert [one.get().status for one in (*held, *others)] == [200] * 7
        assert "of them by you" in refused(client(OTHER).get())
    eventually(lambda: connections(eight) == 0, "every place is given back")
    assert eight.server.connections.refused == 3


def test_places_come_back_however_a_connection_ends(eight: RunningGateway, up: RawUpstream) -> None:
    """Closed, reset within a head, refused as malformed, upgraded, left during a response, refused as surplus."""
    go_on = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        if b"/api/ws" in request.line:
            wire.send(SWITCHED)
            return wire.fill()
        if b"/api/held" in request.line:
            go_on.wait(PATIENCE)
            return False
        return reply()(wire, request)

    up.behave = behave
    for _ in range(3):
        with ExitStack() as stack:
            client = Held(eight.port, stack)
            tunnel, held, malformed, partial = (client() for _ in range(4))
            surplus = client()
            tunnel.request(target="/api/ws", headers=ASKING)
            assert tunnel.read_until(b"\r\n\r\n") is not None
            held.request(target="/api/held")
            partial.send(b"GET /api/x HTTP/1.1\r\nHost: a\r\n")
            assert "by you" in refused(surplus.get())
            malformed.send(b"junk\r\n\r\n")
            assert malformed.answer().status == 400
            for one in (tunnel, held, partial, surplus):
                one.reset()
        eventually(lambda: connections(eight) == 0, "every place is given back")
    go_on.set()
    with Address(eight.port) as last:
        assert last.get().status == 200


def test_health_warns_of_connections_that_are_nearly_exhausted_and_probes_are_served(eight: RunningGateway) -> None:
    with ExitStack() as stack:
        client = Held(eight.port, stack)
        for address, count in ((ONE, 4), (OTHER, 2), (THIRD, 1), ("127.0.0.4", 1)):
            for _ in range(count):
                assert client(address).get().status == 200
        assert connections(eight) == 8
        late = client("127.0.0.5")
        assert "all 8 connections are in use" in refused(late.get())
        assert late.is_closed()
        for path in ("/healthz", "/readyz"):
            probe = client("127.0.0.5")
            assert probe.get(path).status == 200
            assert probe.is_closed()
    with ExitStack() as stack:
        client = Held(eight.port, stack)
        eventually(lambda: connections(eight) == 0, "every place is given back")
        held = [client() for _ in range(4)] + [client(OTHER), client(OTHER)]
        assert [one.get().status for one in held] == [200] * 6
        body = ask(f"{eight.url}/metrics?format=prometheus", headers={"Connection": "close"})
        assert body.status == 503  # this address has its share
        health = client(THIRD)
        health.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        shown = json.loads(health.answer().body)
        assert shown["status"] == "warn"
        assert shown["resources"][0] == {
            "resource": "connections",
            "upstream": None,
            "limit": 8,
            "in_use": 7,
            "refused": 4,
            "status": "warn",
        }
    eventually(lambda: connections(eight) == 0, "every place is given back")
    eventually(lambda: ask(f"{eight.url}/health").json()["status"] == "pass", "it is over")
    text = ask(f"{eight.url}/metrics?format=prometheus").body.decode()
    assert 'gateway_resource_refusals_total{resource="connections",upstream=""} 4.0\n' in text
    assert 'gateway_resource_used_ratio{resource="connections",upstream=""} 0.125\n' in text


def test_connections_of_a_trusted_proxy_are_not_those_of_one_address(gateway: StartGateway, up: RawUpstream) -> None:
    server = {"max_connections": 8, "trusted_proxies": [ONE], "drain_timeout": 1}
    running = gateway(in_front_of(up.url) | {"server": server})
    with ExitStack() as stack:
        client = Held(running.port, stack)
        assert [client(OTHER).get().status for _ in range(2)] == [200] * 2
        assert [client().get().status for _ in range(6)] == [200] * 6
        assert "all 8 connections are in use" in refused(client().get())


def test_connections_beyond_all_limits_are_closed_at_once(eight: RunningGateway) -> None:
    """Those that wait to be refused are bounded too, and one address has no more than half of them."""
    with ExitStack() as stack:
        client = Held(eight.port, stack)
        silent = [client() for _ in range(4 + 32)]
        eventually(lambda: eight.server.connections.refused == 32, "they are surplus")
        assert client().is_closed()
        assert "by you" not in refused(many(client, eight))
        assert all(one.is_closed() for one in silent[4:])  # nothing was said within the time for it


def many(client: Held, running: RunningGateway) -> RawAnswer:
    """Fill all places, then ask from yet another address."""
    for address, count in ((OTHER, 2), (THIRD, 1), ("127.0.0.4", 1)):
        for _ in range(count):
            assert client(address).get().status == 200
    assert connections(running) == 8
    return client("127.0.0.5").get()


# Request bodies


SLOW = {"min_body_rate": 1000, "min_body_rate_grace": 0.5, "drain_timeout": 1}


@pytest.fixture
def strict(gateway: StartGateway, up: RawUpstream) -> RunningGateway:
    sections = in_front_of(up.url) | {"server": SLOW}
    sections["routes"] = [
        {"name": "all", "path": "/api", "upstream": "up"},
        {"name": "free", "path": "/api/free", "upstream": "up", "min_body_rate": 0},
        {"name": "slower", "path": "/api/slower", "upstream": "up", "min_body_rate": 10},
    ]
    return gateway(sections)


class Drip(threading.Thread):
    """Sends a piece every now and then, until it is stopped or the connection ends."""

    def __init__(self, client: RawClient, piece: bytes = b"x", pause: float = 0.05) -> None:
        super().__init__()
        self._client, self._piece, self._pause = client, piece, pause
        self._is_over = threading.Event()

    def run(self) -> None:
        with suppress(OSError):
            while not self._is_over.wait(self._pause):
                self._client.sock.sendall(self._piece)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()


def too_slow(answer: RawAnswer) -> None:
    assert answer.status == 408
    assert answer.all("connection") == [b"close"]
    body = json.loads(answer.body)
    assert body["reason"] == "request_timeout"
    assert "The body arrived more slowly than 1000 bytes per second" in body["detail"]


def under_way(running: RunningGateway) -> int:
    upstream = running.live.upstreams["up"]
    return int(sum(target.in_flight for target in upstream.targets))


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_that_drips_is_a_408_and_no_failure_of_the_upstream(strict: RunningGateway, framing: str) -> None:
    """However often a byte of it comes; what frames the chunks does not count."""
    framed = ("Transfer-Encoding: chunked",) if framing == "chunked" else ("Content-Length: 9999",)
    piece = b"1;extension=xxxxxxxxxxxxxxxx\r\nx\r\n" if framing == "chunked" else b"x"
    with ExitStack() as stack:
        clients = [stack.enter_context(Address(strict.port)) for _ in range(6)]  # more than the breaker bears
        for client in clients:
            client.request("POST", "/api/x", framed)
            stack.enter_context(Drip(client, piece))
        for client in clients:
            too_slow(client.answer())
    eventually(lambda: under_way(strict) == 0, "nothing is under way")
    assert strict.live.upstreams["up"].breaker.consecutive_failures == 0
    assert ask(f"{strict.url}/api/x").status == 200


def test_a_body_within_the_rate_of_its_route_may_take_its_time(strict: RunningGateway) -> None:
    """The pieces come at five times the rate, or at any where there is none."""
    pieces = {"/api/x": bytes(500), "/api/slower": bytes(5), "/api/free": b"x"}
    with ExitStack() as stack:
        clients = {path: stack.enter_context(Address(strict.port)) for path in pieces}
        for path, client in clients.items():
            client.request("POST", path, (f"Content-Length: {10 * len(pieces[path])}",))
        for _ in range(10):
            for path, client in clients.items():
                client.send(pieces[path])
            time.sleep(0.1)
        assert {path: client.answer().status for path, client in clients.items()} == dict.fromkeys(pieces, 200)


def test_what_was_sent_fast_excuses_no_slow_rest(gateway: StartGateway, up: RawUpstream) -> None:
    """A megabyte is worth a thousand seconds at that rate; only the idle timeout's worth of it counts."""
    running = gateway(in_front_of(up.url) | {"server": {**SLOW, "idle_timeout": 1}})
    with Address(running.port) as client:
        client.request("POST", "/api/x", ("Content-Length: 9999999",), bytes(1_000_000))
        began = time.monotonic()
        with Drip(client):
            too_slow(client.answer())
        assert time.monotonic() - began < PATIENCE


def test_the_body_rate_applies_only_while_the_gateway_reads(gateway: StartGateway, up: RawUpstream) -> None:
    """The upstream takes its time to read the body; what the client cannot send meanwhile is not its delay.

    What one read holds is worth a quarter of a second at this rate, so a pause that counted would not be made up for.
    """
    server = {"min_body_rate": 1_000_000, "min_body_rate_grace": 1, "idle_timeout": 1, "drain_timeout": 1}
    running = gateway(in_front_of(up.url) | {"server": server})
    up.reads_body = False
    up.behave = slow_reader(3.0)
    with Address(running.port) as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        size = 32 * 1024 * 1024
        client.request("POST", "/api/x", (f"Content-Length: {size}",))
        client.send(bytes(size))
        assert client.answer().status == 200


def slow_reader(pause: float) -> Callable[[Wire, RawRequest], bool]:
    """Return a behaviour that begins to read the body late."""

    def behave(wire: Wire, request: RawRequest) -> bool:
        time.sleep(pause)
        left = int(request.all("content-length")[0])
        while left and (wire.buffer or wire.fill()):
            left -= len(wire.buffer)
            wire.buffer = b""
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        return False

    return behave


def test_a_client_that_waits_for_100_continue_is_not_held_to_the_rate(strict: RunningGateway, up: RawUpstream) -> None:
    def behave(wire: Wire, request: RawRequest) -> bool:
        time.sleep(1)  # twice the grace
        wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        wire.read_body(request.headers)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        return False

    up.reads_body, up.behave = False, behave
    with Address(strict.port) as client:
        client.request("POST", "/api/x", ("Content-Length: 2", "Expect: 100-continue"))
        assert (client.read_until(b"\r\n\r\n") or b"").startswith(b"HTTP/1.1 100 ")
        client.send(b"ok")
        assert client.answer().status == 200


# Requests to an upstream


class Gate(RawUpstream):
    """An upstream that lets requests to /api/held wait until it may go on; others it answers at once."""

    def __init__(self) -> None:
        super().__init__(self._act)
        self.go_on = threading.Event()

    def _act(self, wire: Wire, request: RawRequest) -> bool:
        if b"/held" in request.line:
            self.go_on.wait(PATIENCE)
        elif b"/ws" in request.line:
            wire.send(SWITCHED)
            while wire.fill():
                pass
            return False
        elif b"/events" in request.line:
            wire.send(STREAM + EVENT)
            while wire.fill():
                pass
            return False
        reply()(wire, request)
        return True


@pytest.fixture
def gate() -> Iterator[Gate]:
    server = Gate()
    yield server
    server.go_on.set()
    server.close()


def narrow(gate: Gate, *, server: dict[str, Any] | None = None, **pool: int) -> dict[str, Any]:
    sections = in_front_of(gate.url, pool=pool, timeouts={"connect": 0.4}) | {
        "server": {"drain_timeout": 0.3, **(server or {})}
    }
    return sections | {"clients": {"acme": {"tier": "FREE"}, "other": {"tier": "FREE"}}}


def shares(running: RunningGateway) -> tuple[int, int]:
    """Return the connections in use for requests, and for tunnels."""
    found = running.server._app.state.gateway.upstream_clients["up"].resources()
    return (found[0].in_use, found[1].in_use) if found else (0, 0)


def all_given_back(running: RunningGateway) -> None:
    eventually(lambda: shares(running) == (0, 0), "every place is given back")


WAYS = {"fast path": (), "general parser": ("X-Request-Timeout: 30",), "with a body": ("Content-Length: 2",)}


def send(client: RawClient, path: str, headers: tuple[str, ...] = ()) -> None:
    """Send a request, with two bytes of body if it says so."""
    has_body = any(line.startswith("Content-Length") for line in headers)
    client.request("POST" if has_body else "GET", path, headers, b"ok" if has_body else b"")


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("one", [(), ("X-Client-ID: acme",), ("X-Client-ID: invented",)], ids=str)
def test_one_address_or_client_holds_half_of_the_connections_to_an_upstream(
    gateway: StartGateway, gate: Gate, way: tuple[str, ...], one: tuple[str, ...]
) -> None:
    running = gateway(narrow(gate, max_connections=4))
    others = [(OTHER, ()), (ONE, ("X-Client-ID: other",)), *([(ONE, ())] if "X-Client-ID: acme" in one else [])]
    with ExitStack() as stack:
        client = Held(running.port, stack)
        assert client().get("/api/x", one).status == 200  # there is a connection, so the fast path is open
        held = [client(), client()]
        for holding in held:
            send(holding, "/api/held", (*one, *way))
        eventually(lambda: shares(running)[0] == 2, "they are under way")
        surplus = [client(), client()]  # which wait together
        for asking in surplus:
            send(asking, "/api/x", (*one, *way))
        for asking in surplus:
            detail = refused(asking.answer())
            assert detail.startswith("Upstream 'up': 2 of 4 connections to it are in use, 2 of them by you")
        for address, headers in others:
            asking = client(address)
            send(asking, "/api/x", (*headers, *way))
            assert asking.answer().status == 200
        gate.go_on.set()
        assert [holding.answer().status for holding in held] == [200, 200]
        assert client().get("/api/x", one).status == 200
    all_given_back(running)
    eventually(lambda: resource(running, "requests")["refused"] == 2, "it is shown")


def test_what_exceeds_a_share_waits_its_turn(gateway: StartGateway, gate: Gate) -> None:
    """So one client with many short requests at once gets all of them answered, on its share of the connections."""
    running = gateway(
        narrow(gate, max_connections=4)
        | {"upstreams": {"up": {"targets": [{"url": gate.url}], "pool": {"max_connections": 4}}}}
    )
    with ExitStack() as stack:
        client = Held(running.port, stack)
        clients = [client() for _ in range(24)]
        for _ in range(3):
            for one in clients:
                one.request()
            assert [one.answer().status for one in clients] == [200] * 24
    all_given_back(running)


def test_the_holder_that_waits_longest_is_not_the_only_one_served(gateway: StartGateway, gate: Gate) -> None:
    """Principals take turns: many requests of one do not delay another's by more than one."""
    running = gateway(narrow(gate, max_connections=1) | {})
    with ExitStack() as stack:
        client = Held(running.port, stack)
        holding = client(THIRD)
        holding.request(target="/api/held")
        eventually(lambda: shares(running)[0] == 1, "it is under way")
        many, other = [client() for _ in range(6)], client(OTHER)
        for one in many:
            one.request(target="/api/many")
        other.request(target="/api/other")
        pool = next(iter(running.server._app.state.gateway.upstream_clients["up"].transport._pools.values()))
        eventually(lambda: sum(map(len, pool._waiters.values())) == 7, "they wait")
        gate.go_on.set()
        assert other.answer().status == 200
        lines = [request.line for request in gate.requests]
        assert lines.index(b"GET /api/other HTTP/1.1") <= 2
        assert [one.answer().status for one in many] == [200] * 6
    all_given_back(running)


def test_clients_behind_a_trusted_proxy_have_their_own_shares(gateway: StartGateway, gate: Gate) -> None:
    """Of IPv6 a /64 is one address, wherever in it a request comes from."""
    running = gateway(narrow(gate, max_connections=4, server={"trusted_proxies": [ONE]}))
    with ExitStack() as stack:
        client = Held(running.port, stack)
        for last in ("1", "ffff:1"):
            client().request(target="/api/held", headers=(f"X-Forwarded-For: 2001:db8:0:1::{last}",))
        eventually(lambda: shares(running)[0] == 2, "they are under way")
        assert "2 of them by you" in refused(client().get("/api/x", ("X-Forwarded-For: 2001:db8:0:1::2",)))
        assert client().get("/api/x", ("X-Forwarded-For: 2001:db8:0:2::1",)).status == 200
        assert client().get("/api/x", ("X-Forwarded-For: 192.0.2.1",)).status == 200
        gate.go_on.set()


def test_a_share_comes_back_however_a_request_ends(gateway: StartGateway, gate: Gate, up: RawUpstream) -> None:
    """Left by its client, failed, refused while it waited, cut off by the upstream."""
    running = gateway(narrow(gate, max_connections=4))
    for _ in range(3):
        with ExitStack() as stack:
            client = Held(running.port, stack)
            held, waiting = [client(), client()], [client() for _ in range(3)]
            for number, one in enumerate((*held, *waiting)):
                send(one, "/api/held", list(WAYS.values())[number % 3])
            eventually(lambda: shares(running)[0] == 2, "they are under way")
            for one in (waiting[0], *held):
                one.reset()
            gate.go_on.set()
        all_given_back(running)
        gate.go_on.clear()
    with Address(running.port) as last:
        assert last.get().status == 200


# Tunnels and event streams


@pytest.mark.parametrize(("path", "asking"), [("/api/ws", ASKING), ("/api/events", ())], ids=["tunnels", "streams"])
def test_what_has_no_end_of_its_own_is_bounded_apart_from_requests(
    gateway: StartGateway, gate: Gate, path: str, asking: tuple[str, ...]
) -> None:
    """Each address may open as many as are free; requests have all of the pool to themselves."""
    running = gateway(narrow(gate, max_connections=1, max_tunnels=4))
    for _ in range(2):
        with ExitStack() as stack:
            client = Held(running.port, stack)

            def opened(address: str, client: Held = client) -> Address:
                found = client(address)
                found.request(target=path, headers=asking)
                assert (found.read_until(b"\r\n\r\n") or b"").split(b" ")[1] in (b"101", b"200")
                return found

            held = [opened(ONE), opened(ONE)]
            assert shares(running) == (0, 2)
            surplus = client()
            surplus.request(target=path, headers=asking)
            detail = refused(surplus.answer())
            assert "2 of 4 WebSockets and event streams are in use, 2 of them by you" in detail
            held.append(opened(OTHER))
            held.append(opened(THIRD))
            assert client().get().status == 200
            eventually(lambda: ask(f"{running.url}/health").json()["status"] == "warn", "it is shown")
            assert resource(running, "tunnels")["status"] == "warn"
            for one in held[:2]:
                one.reset()
            eventually(lambda: shares(running) == (0, 2), "their places are given back")
            opened(ONE).reset()
        all_given_back(running)
    eventually(lambda: resource(running, "tunnels")["refused"] == 2, "it is shown")


def test_an_event_stream_for_which_there_is_no_place_is_charged_for(gateway: StartGateway, gate: Gate) -> None:
    """The upstream has answered it, so it is not free; a handshake is refused before it is sent, and free."""
    running = gateway(
        narrow(gate, max_connections=4, max_tunnels=1) | {"tiers": {"FREE": {"rate": 0.001, "capacity": 100}}}
    )
    with ExitStack() as stack:
        client = Held(running.port, stack)
        holding = client()
        holding.request(target="/api/events", headers=("X-Client-ID: acme",))
        assert holding.read_until(b"\r\n\r\n") is not None
        assert client().get("/api/events", ("X-Client-ID: other",)).all("x-ratelimit-remaining") == [b"99"]
        surplus = client()
        surplus.request(target="/api/ws", headers=(*ASKING, "X-Client-ID: other"))
        assert surplus.answer().all("x-ratelimit-remaining") == [b"99"]
        assert [request.line.split()[1] for request in gate.requests] == [b"/api/events"] * 2
    all_given_back(running)


def test_560_idle_websockets_and_560_dripping_bodies_leave_room_for_others(gateway: StartGateway, gate: Gate) -> None:
    """With no setting made but the grace, for the test's sake."""
    running = gateway(in_front_of(gate.url) | {"server": {"min_body_rate_grace": 1, "drain_timeout": 1}})
    with ExitStack() as stack:
        client = Held(running.port, stack)
        for _ in range(560):
            one = client()
            one.request(target="/api/ws", headers=(*ASKING, "X-Client-ID: one"))
            assert (one.read_until(b"\r\n\r\n") or b"").startswith(b"HTTP/1.1 101")
        assert client(OTHER).get().status == 200
        dripping = [client() for _ in range(560)]
        for one in dripping:
            one.request("POST", "/api/x", ("Content-Length: 1000",), b"x")
        assert client(OTHER).get().status == 200
        assert {one.answer().status for one in dripping} <= {408, 503}
    eventually(lambda: shares(running) == (0, 0), "every place is given back")
    assert running.live.upstreams["up"].breaker.consecutive_failures == 0


def test_a_drain_gives_everything_back(gateway: StartGateway, gate: Gate) -> None:
    running = gateway(narrow(gate, max_connections=4, max_tunnels=4))
    with ExitStack() as stack:
        client = Held(running.port, stack)
        for path, headers in (("/api/ws", ASKING), ("/api/events", ()), ("/api/held", ())):
            one = client()
            one.request(target=path, headers=headers)
            if path != "/api/held":
                assert one.read_until(b"\r\n\r\n") is not None
        eventually(lambda: shares(running) == (1, 2), "they are under way")
        services = running.server._app.state.gateway.upstream_clients
        running.stop()
    assert [found.in_use for found in services["up"].resources()] == [0, 0]
    assert running.server.connections.in_use == 0
