"""A failed try is repeated where that is safe: before the answer's first byte, within attempts and budget."""

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from api_gateway.retry import RetryBudget
from tests.kit import (
    Behaviour,
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    eventually,
    reply,
    running_gateway,
)

NEVER_OPENS = {"failure_threshold": 100_000, "minimum_calls": 100_000}
RESERVE = int(RetryBudget.RESERVE)
KEPT = 10_000  # bytes of a body


@pytest.fixture(scope="module")
def shared() -> Iterator[RawUpstream]:
    server = RawUpstream()
    yield server
    server.close()


@pytest.fixture(scope="module")
def plain(shared: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """One upstream for each policy, all of them the same server, reached below a path of their name."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refused = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def section(attempts: int, budget: float, *urls: str, **breaker: float) -> dict[str, Any]:
        return {
            "targets": [{"url": url} for url in urls or (shared.url,)],
            "balance": "round_robin",
            "retry": {"attempts": attempts, "budget": budget, "floor": 0, "max_body_bytes": KEPT},
            "circuit_breaker": NEVER_OPENS | breaker,
            "timeouts": {"connect": 1, "response": 0.3, "idle": 0.3},
        }

    upstreams = {
        "once": section(1, 1),
        "twice": section(2, 1),
        "thrice": section(3, 1),
        "unfunded": section(5, 0),
        "funded": section(10, 0.01),
        "settling": section(2, 1),
        "opening": section(5, 1, failure_threshold=2),
        "half": section(2, 1, refused, shared.url),
        "refused": section(2, 1, refused),
    }
    sections = {
        "upstreams": upstreams,
        "routes": [{"name": name, "path": f"/api/{name}", "upstream": name} for name in upstreams],
        "tiers": {"FREE": {"rate": 1000, "capacity": 100_000}},
    }
    with running_gateway(sections, tmp_path_factory.mktemp("state")) as gateway:
        yield gateway


@pytest.fixture
def up(shared: RawUpstream) -> RawUpstream:
    shared.behave = reply()
    shared.requests.clear()
    return shared


def dies(wire: Wire, _request: RawRequest) -> bool:
    """End the connection within the head, so that it cannot pass for one that was closed while idle."""
    wire.send(b"HTTP")
    return False


def is_reset(wire: Wire, _request: RawRequest) -> bool:
    wire.send(b"HTTP")
    wire.reset()
    return False


def is_garbled(wire: Wire, _request: RawRequest) -> bool:
    wire.send(b"garbage\r\n\r\n")
    return False


def is_silent(wire: Wire, _request: RawRequest) -> bool:
    wire.is_closed()
    return False


unavailable = reply(b"not now", b"503 Service Unavailable", ((b"X-From", b"upstream"),))


FAILURES: tuple[Behaviour, ...] = (dies, is_reset, is_garbled, is_silent)


def first(failing: Behaviour, times: int = 1) -> Behaviour:
    """Fail so many times, then answer."""
    left = [times]

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        left[0] -= 1
        return (failing if left[0] >= 0 else reply())(wire, request)

    return behave


def ask(gateway: RunningGateway, method: str, target: str, body: bytes = b"") -> RawAnswer:
    with RawClient(gateway.port) as client:
        client.request(method, target, (f"Content-Length: {len(body)}",) if body else (), body)
        return client.answer(method)


def tries(gateway: RunningGateway, upstream: str) -> Callable[[], dict[str, int]]:
    """Return what counts the tries since now, by outcome."""
    before = dict(gateway.console.recorder.outcomes[upstream])

    def since() -> dict[str, int]:
        now = gateway.console.recorder.outcomes[upstream]
        return {
            outcome: count - before.get(outcome, 0) for outcome, count in now.items() if count > before.get(outcome, 0)
        }

    return since


@pytest.mark.parametrize(("method", "body"), [("GET", b""), ("POST", b""), ("POST", b"data"), ("PATCH", b"data")])
def test_a_target_that_refuses_is_passed_over(
    plain: RunningGateway, up: RawUpstream, method: str, body: bytes
) -> None:
    """Nothing was sent, so any request may be; whichever target has its turn, every client is served, once."""
    made = tries(plain, "half")
    for _ in range(4):
        assert ask(plain, method, "/api/half", body).status == 200
    assert [request.body for request in up.requests] == [body] * 4
    assert made()["2xx"] == 4
    assert 1 <= made()["upstream_connect_error"] <= 4


def test_every_try_is_counted_where_all_are_refused(plain: RunningGateway) -> None:
    made = tries(plain, "refused")
    assert ask(plain, "POST", "/api/refused", b"data").status == 502
    assert made() == {"upstream_connect_error": 2}


@pytest.mark.parametrize("failing", FAILURES)
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
def test_an_idempotent_request_that_fails_before_the_head_is_repeated(
    plain: RunningGateway, up: RawUpstream, method: str, failing: Behaviour
) -> None:
    up.behave = first(failing)
    assert ask(plain, method, "/api/twice").status == 200
    assert len(up.requests) == 2
    assert up.requests[0].head == up.requests[1].head


@pytest.mark.parametrize("failing", FAILURES)
@pytest.mark.parametrize(("method", "body"), [("POST", b""), ("POST", b"data"), ("PATCH", b"data")])
def test_a_request_that_may_have_had_its_effect_is_not_repeated(
    plain: RunningGateway, up: RawUpstream, method: str, body: bytes, failing: Behaviour
) -> None:
    up.behave = first(failing)
    assert ask(plain, method, "/api/twice", body).status in (502, 504)
    assert len(up.requests) == 1


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize(("size", "is_kept"), [(4, True), (KEPT, True), (KEPT + 1, False), (50 * KEPT, False)])
@pytest.mark.parametrize("failing", [dies, is_garbled, is_silent, unavailable])
def test_a_body_is_sent_again_if_it_was_kept_whole(
    plain: RunningGateway, up: RawUpstream, framing: str, size: int, failing: Behaviour, *, is_kept: bool
) -> None:
    """What is larger is streamed and gone, so even PUT cannot be repeated then."""
    up.behave = first(failing)
    body = bytes(number % 251 for number in range(size))
    with RawClient(plain.port) as client:
        if framing == "length":
            client.request("PUT", "/api/twice", (f"Content-Length: {size}",), body)
        else:
            half = size // 2
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]))
            client.request("PUT", "/api/twice", ("Transfer-Encoding: chunked",), chunks + b"0\r\n\r\n")
        status = client.answer().status
    assert [request.body for request in up.requests] == [body] * (2 if is_kept else 1)
    assert (status == 200) is is_kept


def test_a_body_that_is_still_coming_is_sent_again_from_its_start(plain: RunningGateway, up: RawUpstream) -> None:
    """An upstream may fail before it has read all of it; the rest goes on to the next."""
    up.reads_body = False
    bodies: list[bytes] = []

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        if not bodies:
            bodies.append(wire.read_exactly(4))
            return dies(wire, request)
        bodies.append(wire.read_exactly(8))
        return reply()(wire, request)

    up.behave = behave
    try:
        with RawClient(plain.port) as client:
            client.request("PUT", "/api/twice", ("Content-Length: 8",), b"half")
            eventually(lambda: len(up.requests) == 2, "it is tried again")
            client.send(b"half")
            assert client.answer().status == 200
    finally:
        up.reads_body = True
    assert bodies == [b"half", b"halfhalf"]


@pytest.mark.parametrize(
    "beginning",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ],
)
def test_nothing_is_repeated_after_the_head(plain: RunningGateway, up: RawUpstream, beginning: bytes) -> None:
    def breaks_off(wire: Wire, _request: RawRequest) -> bool:
        wire.send(beginning)
        return False

    up.behave = first(breaks_off)
    answer = ask(plain, "GET", "/api/twice")
    assert (answer.status, answer.is_complete) == (200, False)
    assert len(up.requests) == 1


@pytest.mark.parametrize("status", [b"500 Internal Server Error", b"404 Not Found", b"429 Too Many Requests"])
def test_an_answer_is_an_answer(plain: RunningGateway, up: RawUpstream, status: bytes) -> None:
    """Whatever its status says, it is the upstream's word and goes to the client, unless it is one of `statuses`."""
    up.behave = reply(b"no", status)
    answer = ask(plain, "GET", "/api/twice")
    assert (answer.status, answer.body) == (int(status[:3]), b"no")
    assert len(up.requests) == 1


@pytest.mark.parametrize(("name", "attempts"), [("once", 1), ("twice", 2), ("thrice", 3)])
def test_a_request_is_tried_no_more_often_than_configured(
    plain: RunningGateway, up: RawUpstream, name: str, attempts: int
) -> None:
    """The answer tells of the last failure."""
    made = tries(plain, name)
    up.behave = dies
    answer = ask(plain, "GET", f"/api/{name}")
    assert answer.status == 502
    assert b'"upstream_reset"' in answer.body
    assert len(up.requests) == attempts
    assert made() == {"upstream_reset": attempts}


def test_without_a_budget_nothing_is_repeated(plain: RunningGateway, up: RawUpstream) -> None:
    up.behave = dies
    assert ask(plain, "GET", "/api/unfunded").status == 502
    assert len(up.requests) == 1


def test_retries_end_with_their_budget(plain: RunningGateway, up: RawUpstream) -> None:
    """During an outage the load on the upstream grows by the reserve and the share, not by the attempts."""
    up.behave = dies
    for _ in range(15):
        assert ask(plain, "GET", "/api/funded").status == 502
    assert len(up.requests) == 15 + RESERVE


def test_every_try_tells_the_breaker_its_own_outcome(plain: RunningGateway, up: RawUpstream) -> None:
    up.behave = first(dies)
    assert ask(plain, "GET", "/api/settling").status == 200
    breaker = plain.console.upstreams["settling"].breaker
    assert breaker.window_totals(time.monotonic()) == (2, 1)
    assert breaker.consecutive_failures == 0


def test_a_breaker_that_opens_between_tries_ends_them(plain: RunningGateway, up: RawUpstream) -> None:
    """The client is told what failed, not that the breaker is now open; the next client is told that."""
    up.behave = dies
    answer = ask(plain, "GET", "/api/opening")
    assert (answer.status, len(up.requests)) == (502, 2)
    assert plain.console.upstreams["opening"].breaker.state == "OPEN"
    assert ask(plain, "GET", "/api/opening").status == 503
    assert len(up.requests) == 2


def test_no_target_stays_held(plain: RunningGateway, up: RawUpstream) -> None:
    up.behave = first(dies, times=2)
    for _ in range(3):
        ask(plain, "GET", "/api/thrice")
    assert [target.in_flight for target in plain.console.upstreams["thrice"].targets] == [0]
