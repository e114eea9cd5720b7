"""Mirroring on real connections: what a copy has, and that nothing that becomes of it reaches the client."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_gateway import GatewayConfig, create_app
from api_gateway.proxy.mirroring import MIRROR_RESULTS
from tests.kit import (
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    case,
    eventually,
    in_front_of,
    refusing_url,
    reply,
    running_gateway,
    soon,
)

HOOKS = """
class Hooks:
    def __init__(self, options):
        pass

    async def on_response(self, request, response):
        return {"X-Hooked": "yes"}
"""
MANY = 3  # copies in flight at most


class Mirrored:
    """A gateway with the route `all`, whose requests are copied for `mirror`."""

    def __init__(self, running: RunningGateway, mirror: RawUpstream) -> None:
        self.running = running
        self.mirror = mirror

    def count(self, result: str, route: str = "all") -> int:
        return int(self.running.live.recorder.mirrored[route, result])

    def counts(self, route: str = "all") -> dict[str, int]:
        return {result: count for result in MIRROR_RESULTS if (count := self.count(result, route))}

    def in_flight(self) -> int:
        return int(self.running.live.recorder.mirrored_in_flight["all"])


def with_mirrors(up: str, mirror: str, **settings: Any) -> dict[str, Any]:
    sections = in_front_of(up)
    for name in ("next", "dead"):
        sections["upstreams"][name] = {
            "targets": [{"url": mirror if name == "next" else refusing_url()}],
            "circuit_breaker": {"failure_threshold": 1},
        }
    limits = {"max_in_flight": MANY, "max_body_bytes": 1000, "max_response_bytes": 10_000, "timeout": 0.5, **settings}
    sections["routes"] = [
        {"name": "all", "path": "/api", "upstream": "up", "mirror": {"upstream": "next", **limits}},
        {"name": "dead", "path": "/api/dead", "upstream": "up", "mirror": {"upstream": "dead"}},
        {"name": "none", "path": "/api/none", "upstream": "up"},
        {"name": "never", "path": "/api/never", "upstream": "up", "mirror": {"upstream": "next", "share": 0}},
        {
            "name": "asked",
            "path": "/api/asked",
            "upstream": "up",
            "request_headers": {"set": {"X-Route": "asked"}},
            "rewrite": {"prefix": "/v2"},
            "mirror": {"upstream": "next", "credentials": True, "remove": ["X-Private"]},
        },
    ]
    return sections


@pytest.fixture(scope="module")
def mirror() -> Iterator[RawUpstream]:
    server = RawUpstream()
    yield server
    server.close()


@pytest.fixture(scope="module")
def sections(shared: RawUpstream, mirror: RawUpstream) -> dict[str, Any]:
    return with_mirrors(shared.url, mirror.url)


@pytest.fixture
def mirrored(running: RunningGateway, mirror: RawUpstream) -> Iterator[Mirrored]:
    mirror.behave, mirror.reads_body = reply(), True
    mirror.requests.clear()
    found = Mirrored(running, mirror)
    running.live.recorder.mirrored.clear()
    yield found
    eventually(lambda: found.in_flight() == 0, "all copies have ended")


def test_a_copy_is_the_request_without_credentials(
    client: RawClient, up: RawUpstream, mirrored: Mirrored, mirror: RawUpstream
) -> None:
    secret = ("Authorization: Bearer s3", "Cookie: a=s3", "X-API-Key: s3", "X-Private: s3")
    chunked = b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    for number, (framing, body) in enumerate(
        (
            (b"\r\n", b""),
            (b"Content-Length: 5\r\n\r\nabcde", b"abcde"),
            (chunked, b"abcde"),
            (b"X-Odd:  two blanks\r\nContent-Length: 5\r\n\r\nabcde", b"abcde"),
            (b"Content-Length: 0\r\n\r\n", b""),
        )
    ):
        for path, shown in ((f"/api/x?n={number}", b"/api/x"), (f"/api/asked/x?n={number}", b"/v2/x")):
            with case(path, framing):
                up.requests.clear()
                mirror.requests.clear()
                lines = "".join(f"{line}\r\n" for line in ("Host: gateway.test", "X-Plain: p", *secret))
                head = f"PUT {path} HTTP/1.1\r\n{lines}".encode() + framing
                client.send(head[:-2])
                client.send(head[-2:])
                assert client.answer().body == b"ok"
                eventually(lambda: bool(mirror.requests) and mirror.requests[0].is_complete, "the copy arrives")
                sent, copy = up.requests[0], mirror.requests[0]
                assert copy.line == sent.line == b"PUT %b?n=%d HTTP/1.1" % (shown, number)
                assert copy.body == sent.body == body
                assert not copy.all("transfer-encoding")
                for name in ("X-Plain", "X-Request-ID", "X-Route", "Via", "X-Forwarded-For"):
                    assert copy.all(name) == sent.all(name)
                assert sent.all("cookie") == [b"a=s3"]
                if shown == b"/api/x":
                    assert b"Bearer" not in copy.head
                    assert copy.all("x-private") == [b"s3"]
                    assert not copy.all("cookie") + copy.all("authorization") + copy.all("x-api-key")
                else:
                    assert copy.all("cookie") + copy.all("authorization") == [b"a=s3", b"Bearer s3"]
                    assert not copy.all("x-private")
    eventually(lambda: mirrored.counts() == {"2xx": 5} == mirrored.counts("asked"), "each copy is counted")


def has_come(mirrored: Mirrored, result: str, route: str, before: int) -> bool:
    return mirrored.count(result, route) == before + 1


def breaks(wire: Wire, _request: RawRequest) -> bool:
    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    return False


def garbage(wire: Wire, _request: RawRequest) -> bool:
    wire.send(b"\x00\x01 not HTTP\r\n\r\n")
    return False


def endless(wire: Wire, _request: RawRequest) -> None:
    wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        wire.send(b"1000\r\n%b\r\n" % (b"x" * 4096))


def test_what_the_mirror_does_is_counted_and_changes_nothing_else(
    client: RawClient, up: RawUpstream, mirrored: Mirrored, mirror: RawUpstream
) -> None:
    recorder = mirrored.running.live.recorder
    before = recorder.attempt_results["up"]["2xx"]
    for name, behave, result in (
        ("refuses", reply(status=b"503 Service Unavailable"), "5xx"),
        ("breaks off", breaks, "error"),
        ("is no server of HTTP", garbage, "error"),
        ("sends without end", endless, "response_too_large"),
        ("works", reply(), "2xx"),
    ):
        with case(name):
            mirror.behave = behave
            for _ in range(2):
                had = mirrored.count(result)
                assert (client.get("/api/x").status, len(up.requests)) == (200, 1)
                up.requests.clear()
                eventually(partial(has_come, mirrored, result, "all", had), "the copy is counted")
    for _ in range(3):
        had = mirrored.count("error", "dead")
        assert client.get("/api/dead").status == 200
        eventually(partial(has_come, mirrored, "error", "dead", had), "the copy is counted")
    assert client.get("/api/none").status == client.get("/api/never").status == 200
    assert mirrored.counts("none") == mirrored.counts("never") == {}
    assert recorder.attempt_results["up"]["2xx"] == before + 15
    assert not recorder.attempt_results["next"] + recorder.attempt_results["dead"]
    for upstream in ("up", "next", "dead"):
        assert mirrored.running.live.upstreams[upstream].breaker.state.value == "CLOSED"
        assert sum(target.in_flight for target in mirrored.running.live.upstreams[upstream].targets) == 0


def test_responses_do_not_wait_for_a_mirror_that_hangs_and_further_copies_are_dropped(
    client: RawClient, mirrored: Mirrored, mirror: RawUpstream
) -> None:
    released = threading.Event()
    mirror.behave = lambda _wire, _request: released.wait(30)
    for _ in range(MANY + 5):
        assert client.get("/api/x").status == 200, "while all copies hang"
    taken = mirrored.count("busy")
    assert taken > 0
    eventually(lambda: mirrored.count("timeout") == MANY + 5 - taken, "copies that hang end by the timeout")
    released.set()


def test_a_request_with_a_large_body_is_not_copied(
    client: RawClient, up: RawUpstream, mirrored: Mirrored, mirror: RawUpstream
) -> None:
    body = b"x" * 300_000
    client.send(b"PUT /api/x HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert client.answer().status == 200
    client.send(b"PUT /api/x HTTP/1.1\r\nHost: gateway.test\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(3):
        client.send(b"%x\r\n%b\r\n" % (len(body), body))
    client.send(b"0\r\n\r\n")
    assert client.answer().status == 200
    assert [len(request.body) for request in up.requests] == [300_000, 900_000]
    assert (mirrored.counts(), mirror.requests) == ({"body_too_large": 2}, [])


def test_a_copy_ends_with_a_request_whose_body_never_arrives(
    running: RunningGateway, up: RawUpstream, mirrored: Mirrored, mirror: RawUpstream
) -> None:
    with RawClient(running.port) as leaving:
        leaving.send(b"PUT /api/x HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 9\r\n\r\nabc")
        eventually(lambda: mirrored.in_flight() == 1, "the body is collected")
    eventually(lambda: mirrored.counts() == {"incomplete": 1}, "the copy is dropped")
    up.reads_body = False
    with RawClient(running.port) as early:
        early.send(b"PUT /api/x HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 9\r\n\r\nabc")
        assert early.answer().status == 200, "a response before the body is complete"
        eventually(lambda: mirrored.counts() == {"incomplete": 2}, "the copy is dropped")
    assert not mirror.requests


def test_a_gateway_with_extensions_mirrors_too_and_stops_without_waiting_for_copies(
    shared: RawUpstream, up: RawUpstream, mirror: RawUpstream, tmp_path: Path
) -> None:
    (tmp_path / "hooks.py").write_text(HOOKS)
    released = threading.Event()
    mirror.behave = lambda _wire, _request: released.wait(60)
    mirror.requests.clear()
    sections = with_mirrors(shared.url, mirror.url, timeout=3_600) | {
        "extensions": [{"name": "hooks", "use": f"{tmp_path}/hooks.py:Hooks", "budget": 60}]
    }
    with running_gateway(sections, tmp_path / "state") as gateway, RawClient(gateway.port) as client:
        found = Mirrored(gateway, mirror)
        recorder = gateway.live.recorder
        for _ in range(MANY):
            assert client.get("/api/x").all("x-hooked") == [b"yes"]
        eventually(lambda: len(mirror.requests) == MANY, "the copies arrive")
        assert found.in_flight() == MANY
    assert (recorder.mirrored["all", "cancelled"], recorder.mirrored_in_flight["all"]) == (MANY, 0)
    released.set()


async def test_copies_in_flight_survive_a_reload_that_removes_their_mirror(
    shared: RawUpstream, up: RawUpstream, mirror: RawUpstream, tmp_path: Path
) -> None:
    released = threading.Event()

    def hold(wire: Wire, request: RawRequest) -> None:
        assert released.wait(60)
        reply()(wire, request)

    mirror.behave = hold
    mirror.requests.clear()
    without = in_front_of(shared.url)
    with_one = in_front_of(shared.url)
    with_one["upstreams"]["next"] = {"targets": [{"url": mirror.url}]}
    with_one["routes"][0]["mirror"] = {"upstream": "next", "timeout": 60}
    common = {"state_dir": tmp_path, "log": {"access": False}}
    configs = [GatewayConfig.model_validate(one | common) for one in (with_one, without, with_one)]
    app = create_app(configs.pop(0), read=lambda: configs.pop(0))
    async with app.router.lifespan_context(app):
        recorder, reload = app.state.gateway.recorder, app.state.admin_context.aggregator.reload
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway.test") as client:
            assert [(await client.post("/api/x", content=b"abc")).status_code for _ in range(2)] == [200, 200]
            await soon(lambda: len(mirror.requests) == 2, "the copies arrive")
            assert not (await reload("test")).problems
            assert (await client.get("/api/x")).status_code == 200
            assert recorder.mirrored_in_flight["all"] == 2
            released.set()
            await soon(lambda: recorder.mirrored["all", "2xx"] == 2, "the copies end")
            assert not (await reload("test")).problems
            assert (await client.get("/api/x")).status_code == 200
            await soon(lambda: recorder.mirrored["all", "2xx"] == 3, "copies are made again")
    assert [request.body for request in mirror.requests] == [b"abc", b"abc", b""]
    assert recorder.mirrored_in_flight["all"] == 0
