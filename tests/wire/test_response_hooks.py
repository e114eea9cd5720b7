"""What `on_response` of extensions sees: each response that a client gets from an upstream, once, and no other one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_gateway import GatewayConfig, create_app
from tests.kit import RawClient, RawRequest, RawUpstream, RunningGateway, Wire, case, reply

HOOKS = """
import asyncio

class Hooks:
    def __init__(self, options):
        self.seen = {}

    def on_response(self, request, response):
        seen = self.seen.setdefault(request.id, [])
        seen.append(f"{response.status} {response.upstream}")
        changes = {"X-Seen": ", ".join(seen), "X-Secret": None}
        return self.later(changes) if "later" in request.query else changes

    async def later(self, changes):
        await asyncio.sleep(0.01)
        return changes
"""
FAILURE, LIMITED = b"503 Service Unavailable", b"429 Too Many Requests"
both_ways = pytest.mark.parametrize("query", ["", "?later"])


@pytest.fixture(scope="module")
def spare() -> Iterator[RawUpstream]:
    server = RawUpstream(reply(b"spare"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def sections(shared: RawUpstream, spare: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("hooks")
    (folder / "hooks.py").write_text(HOOKS)
    retry = {"attempts": 3, "budget": 1, "statuses": [429, 503], "backoff": {"base": 0.01, "cap": 0.01}}
    never_opens = {"failure_threshold": 100_000, "minimum_calls": 100_000}
    return {
        "upstreams": {
            "up": {"targets": [{"url": shared.url}], "retry": retry, "circuit_breaker": never_opens},
            "spare": {"targets": [{"url": spare.url}]},
        },
        "routes": [
            {"name": "all", "path": "/api", "upstream": "up"},
            {"name": "small", "path": "/api/small", "upstream": "up", "compression": {"min_bytes": 1}},
            {"name": "spared", "path": "/api/spared", "upstream": "up", "fallback": {"upstream": "spare"}},
        ],
        "tiers": {"FREE": {"rate": 1000, "capacity": 100_000}},
        "extensions": [{"name": "hooks", "use": f"{folder}/hooks.py:Hooks", "budget": 60}],
    }


def in_turn(*behaviours: Any) -> Any:
    """Behave in one way after the other, and go on as in the last one."""
    left = list(behaviours)

    def behave(wire: Wire, request: RawRequest) -> Any:
        return (left.pop(0) if len(left) > 1 else left[0])(wire, request)

    return behave


def breaks(wire: Wire, _request: RawRequest) -> bool:
    wire.send(b"HTTP")
    return False


@both_ways
def test_the_response_of_each_request_is_seen_once_and_it_is_the_last_one(
    client: RawClient, up: RawUpstream, query: str
) -> None:
    failing, limited = reply(b"failing", status=FAILURE), reply(b"limited", status=LIMITED)
    for name, behave, path, status, seen, body in (
        ("no retry", reply(b"fine"), "/api/x", 200, b"200 up", b"fine"),
        ("a retry", in_turn(failing, reply(b"fine")), "/api/x", 200, b"200 up", b"fine"),
        ("a retry after an error", in_turn(breaks, reply(b"fine")), "/api/x", 200, b"200 up", b"fine"),
        ("retries used up", in_turn(failing, limited, failing), "/api/x", 503, b"503 up", b"failing"),
        ("a fallback", breaks, "/api/spared", 200, b"200 spare", b"spare"),
        ("a status that is not retried", reply(b"none", status=b"404 Not Found"), "/api/x", 404, b"404 up", b"none"),
    ):
        with case(name):
            up.behave = behave
            answer = client.get(path + query)
            assert (answer.status, answer.body, answer.all("x-seen")) == (status, body, [seen])
            assert client.get("/api/x").is_complete, "the connection is kept"


def sends(*pieces: bytes) -> Any:
    def behave(wire: Wire, _request: RawRequest) -> None:
        for piece in pieces:
            wire.send(piece)

    return behave


@both_ways
def test_what_a_hook_removes_comes_neither_before_nor_after_the_head(
    client: RawClient, up: RawUpstream, query: str
) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nX-Secret: 1\r\nX-Other: 1\r\n\r\n"
    chunked = b"HTTP/1.1 200 OK\r\nX-Secret: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
    end = b"0\r\nX-Secret: 1\r\nx_secret: 1\r\nX-Seen: forged\r\nX-Sum: 7\r\n\r\n"
    up.behave = sends(early, chunked, b"3\r\nabc\r\n", b"3\r\ndef\r\n" + end)
    client.request("GET", "/api/x" + query, ("TE: trailers", "Connection: TE"))
    interim, head, body = (client.read_until(b"\r\n\r\n") or b"" for _ in range(3))
    assert interim.startswith(b"HTTP/1.1 103 ")
    assert b"Link: </a>" in interim
    assert b"X-Other" not in interim
    assert head.count(b"X-Seen: 200 up\r\n") == 1
    assert body.endswith(b"def\r\n0\r\nX-Sum: 7\r\n\r\n"), "no other trailer"
    assert b"secret" not in (interim + head).lower()
    assert client.get("/api/x").is_complete, "the connection is kept"


@both_ways
def test_changes_of_a_hook_are_in_compressed_responses_too(client: RawClient, up: RawUpstream, query: str) -> None:
    for fields in ((), ((b"Vary", b"Origin"),), ((b"X-Odd", b" two blanks"),)):
        up.behave = reply(b"x" * 2000, headers=((b"Content-Type", b"text/plain"), (b"X-Secret", b"1"), *fields))
        client.request("GET", "/api/small" + query, ("Accept-Encoding: gzip",))
        answer = client.answer()
        assert answer.all("content-encoding") == [b"gzip"]
        assert (answer.all("x-seen"), answer.all("x-secret")) == ([b"200 up"], [])


def test_an_upstream_that_breaks_off_while_a_hook_is_awaited_breaks_off_the_response(
    client: RawClient, running: RunningGateway, up: RawUpstream
) -> None:
    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        return False

    up.behave = behave
    answer = client.get("/api/x?later")
    assert (answer.status, answer.is_complete) == (200, False)
    up.behave = reply(b"fine")
    with RawClient(running.port) as other:
        assert other.get("/api/x?later").body == b"fine"


async def test_the_last_response_is_seen_by_asgi_too(
    up: RawUpstream, sections: dict[str, Any], tmp_path: Path
) -> None:
    up.behave = in_turn(reply(b"failing", status=FAILURE), reply(b"fine", headers=((b"X-Secret", b"1"),)))
    config = GatewayConfig.model_validate(sections | {"state_dir": tmp_path, "log": {"access": False}})
    app = create_app(config)
    asgi = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway.test")
    async with app.router.lifespan_context(app), asgi as client:
        answer = await client.get("/api/x?later")
    assert (answer.text, answer.headers["x-seen"], "x-secret" in answer.headers) == ("fine", "200 up", False)
