"""A failed attempt is retried if that is safe: before the first byte of a response, within attempts and budget."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from api_gateway.resilience.retry import RetryBudget
from tests.cases import each
from tests.kit import (
    PATIENCE,
    Behaviour,
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    eventually,
    reply,
)
from tests.kit import ask as exposition

NEVER_OPENS = {"failure_threshold": 100_000, "minimum_calls": 100_000}
RESERVE = int(RetryBudget.RESERVE)
KEPT = 10_000  # bytes of a body


@pytest.fixture(scope="module")
def pair() -> Iterator[RawUpstream]:
    """The second target of `pair`, which is well."""
    server = RawUpstream(reply(b"other"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def sections(shared: RawUpstream, pair: RawUpstream) -> dict[str, Any]:
    """One upstream for each policy, all of them the same server, reached below a path of their name."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refused = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def section(attempts: int, budget: float, *urls: str, **breaker: float) -> dict[str, Any]:
        return {
            "targets": [{"url": url} for url in urls or (shared.url,)],
            "balance": "round_robin",
            "retry": {"attempts": attempts, "budget": budget, "min_retries_per_second": 0, "max_body_bytes": KEPT},
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
        "floored": section(10, 0.01)
        | {"retry": {"attempts": 10, "budget": 0.01, "min_retries_per_second": 20, "backoff": {"base": 0}}},
        "choosy": section(2, 1) | {"retry": {"attempts": 2, "budget": 1, "statuses": [429, 500]}},
        "pausing": section(2, 1) | {"retry": {"attempts": 2, "budget": 1, "backoff": {"base": 1, "cap": 1}}},
        "pair": section(2, 1, shared.url, pair.url)
        | {"retry": {"attempts": 2, "budget": 1, "backoff": {"base": 60, "cap": 60}}},
        "probing": section(2, 1, failure_threshold=1, recovery_timeout=0.1),
        "scarce": section(3, 1) | {"pool": {"max_connections": 1}, "timeouts": {"connect": 0.2}},
        "refused": section(2, 1, refused),
    }
    return {
        "upstreams": upstreams,
        "routes": [{"name": name, "path": f"/api/{name}", "upstream": name} for name in upstreams],
        "tiers": {"FREE": {"rate": 1000, "capacity": 100_000}},
    }


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


def ask(gateway: RunningGateway, method: str, target: str, body: bytes = b"", *headers: str) -> RawAnswer:
    with RawClient(gateway.port) as client:
        client.request(method, target, (*headers, *((f"Content-Length: {len(body)}",) if body else ())), body)
        return client.answer(method)


def tries(gateway: RunningGateway, upstream: str) -> Callable[[], dict[str, int]]:
    """Return what counts the attempts since now, by outcome."""
    before = dict(gateway.live.recorder.attempt_results[upstream])

    def since() -> dict[str, int]:
        now = gateway.live.recorder.attempt_results[upstream]
        return {
            outcome: count - before.get(outcome, 0) for outcome, count in now.items() if count > before.get(outcome, 0)
        }

    return since


@pytest.mark.parametrize(("method", "body"), [("GET", b""), ("POST", b""), ("POST", b"data"), ("PATCH", b"data")])
def test_a_target_that_refuses_is_passed_over(
    running: RunningGateway, up: RawUpstream, method: str, body: bytes
) -> None:
    """Nothing was sent, so any request may be; whichever target has its turn, every client is served, once."""
    made = tries(running, "half")
    for _ in range(4):
        assert ask(running, method, "/api/half", body).status == 200
    assert [request.body for request in up.requests] == [body] * 4
    assert made()["2xx"] == 4
    assert 1 <= made()["upstream_connect_error"] <= 4


def test_every_attempt_is_counted_where_all_are_refused(running: RunningGateway) -> None:
    made = tries(running, "refused")
    assert ask(running, "POST", "/api/refused", b"data").status == 502
    assert made() == {"upstream_connect_error": 2}


@each("failing", FAILURES)
@each("method", ["GET", "HEAD", "DELETE"])
def test_an_idempotent_request_that_fails_before_the_head_is_repeated(
    running: RunningGateway, up: RawUpstream, method: str, failing: Behaviour
) -> None:
    up.behave = first(failing)
    up.requests.clear()
    assert ask(running, method, "/api/twice").status == 200
    assert len(up.requests) == 2
    assert up.requests[0].head == up.requests[1].head


@each("failing", FAILURES)
@each(("method", "body"), [("POST", b""), ("POST", b"data"), ("PATCH", b"data")])
def test_a_request_that_may_have_had_its_effect_is_not_repeated(
    running: RunningGateway, up: RawUpstream, method: str, body: bytes, failing: Behaviour
) -> None:
    up.behave = first(failing)
    up.requests.clear()
    assert ask(running, method, "/api/twice", body).status in (502, 504)
    assert len(up.requests) == 1


@each("framing", ["length", "chunked"])
@each(("size", "is_kept"), [(4, True), (KEPT, True), (KEPT + 1, False), (50 * KEPT, False)])
@each("failing", [dies, is_garbled, is_silent, unavailable])
def test_a_body_is_sent_again_if_it_was_kept_whole(
    running: RunningGateway, up: RawUpstream, framing: str, size: int, failing: Behaviour, *, is_kept: bool
) -> None:
    """What is larger is streamed and gone, so even PUT cannot be repeated then."""
    up.behave = first(failing)
    up.requests.clear()
    body = bytes(number % 251 for number in range(size))
    with RawClient(running.port) as client:
        if framing == "length":
            client.request("PUT", "/api/twice", (f"Content-Length: {size}",), body)
        else:
            half = size // 2
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]))
            client.request("PUT", "/api/twice", ("Transfer-Encoding: chunked",), chunks + b"0\r\n\r\n")
        status = client.answer().status
    assert [request.body for request in up.requests] == [body] * (2 if is_kept else 1)
    assert (status == 200) is is_kept


def test_a_body_that_is_still_coming_is_sent_again_from_its_start(running: RunningGateway, up: RawUpstream) -> None:
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
        with RawClient(running.port) as client:
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
def test_nothing_is_repeated_after_the_head(running: RunningGateway, up: RawUpstream, beginning: bytes) -> None:
    def breaks_off(wire: Wire, _request: RawRequest) -> bool:
        wire.send(beginning)
        return False

    up.behave = first(breaks_off)
    answer = ask(running, "GET", "/api/twice")
    assert (answer.status, answer.is_complete) == (200, False)
    assert len(up.requests) == 1


@pytest.mark.parametrize("status", [b"500 Internal Server Error", b"404 Not Found", b"429 Too Many Requests"])
def test_a_response_with_another_status_is_not_retried(
    running: RunningGateway, up: RawUpstream, status: bytes
) -> None:
    """Whatever its status says, it is the upstream's word and goes to the client, unless it is one of `statuses`."""
    up.behave = reply(b"no", status)
    answer = ask(running, "GET", "/api/twice")
    assert (answer.status, answer.body) == (int(status[:3]), b"no")
    assert len(up.requests) == 1


@pytest.mark.parametrize(("name", "attempts"), [("once", 1), ("twice", 2), ("thrice", 3)])
def test_a_request_is_tried_no_more_often_than_configured(
    running: RunningGateway, up: RawUpstream, name: str, attempts: int
) -> None:
    """The response names the last failure."""
    made = tries(running, name)
    up.behave = dies
    answer = ask(running, "GET", f"/api/{name}")
    assert answer.status == 502
    assert b'"upstream_reset"' in answer.body
    assert len(up.requests) == attempts
    assert made() == {"upstream_reset": attempts}


def test_without_a_budget_nothing_is_repeated(running: RunningGateway, up: RawUpstream) -> None:
    up.behave = dies
    assert ask(running, "GET", "/api/unfunded").status == 502
    assert len(up.requests) == 1


def test_retries_end_with_their_budget(running: RunningGateway, up: RawUpstream) -> None:
    """During an outage the load on the upstream grows by the reserve and the share, not by the attempts."""
    up.behave = dies
    for _ in range(15):
        assert ask(running, "GET", "/api/funded").status == 502
    assert len(up.requests) == 15 + RESERVE


def test_every_attempt_reports_its_own_outcome_to_the_breaker(running: RunningGateway, up: RawUpstream) -> None:
    up.behave = first(dies)
    assert ask(running, "GET", "/api/settling").status == 200
    breaker = running.live.upstreams["settling"].breaker
    assert breaker.window_counts(time.monotonic())[:2] == (2, 1)
    assert breaker.consecutive_failures == 0


def test_a_breaker_that_opens_between_attempts_ends_them(running: RunningGateway, up: RawUpstream) -> None:
    """The client gets what failed, not that the breaker is now open; the next client gets that."""
    up.behave = dies
    answer = ask(running, "GET", "/api/opening")
    assert (answer.status, len(up.requests)) == (502, 2)
    assert running.live.upstreams["opening"].breaker.state == "OPEN"
    assert ask(running, "GET", "/api/opening").status == 503
    assert len(up.requests) == 2


def test_no_target_stays_held(running: RunningGateway, up: RawUpstream) -> None:
    up.behave = first(dies, times=2)
    for _ in range(3):
        ask(running, "GET", "/api/thrice")
    assert [target.in_flight for target in running.live.upstreams["thrice"].targets] == [0]


def test_a_response_that_comes_before_the_whole_body_is_passed_on(running: RunningGateway, up: RawUpstream) -> None:
    """The rest of the body still goes to who gave it, and would be lost to another attempt."""
    up.reads_body = False
    up.behave = unavailable
    try:
        with RawClient(running.port) as client:
            client.request("PUT", "/api/twice", ("Content-Length: 8",), b"half")
            assert client.answer().status == 503
    finally:
        up.reads_body = True
    assert len(up.requests) == 1


# Answers that are tried again


@pytest.mark.parametrize("status", [b"502 Bad Gateway", b"503 Service Unavailable", b"504 Gateway Timeout"])
def test_a_response_with_one_of_the_statuses_is_retried(
    running: RunningGateway, up: RawUpstream, status: bytes
) -> None:
    up.behave = first(reply(b"no", status))
    answer = ask(running, "GET", "/api/twice")
    assert (answer.status, answer.body) == (200, b"ok")
    assert len(up.requests) == 2


def test_the_statuses_are_configured(running: RunningGateway, up: RawUpstream) -> None:
    for status, tries in ((b"429 Slow down", 2), (b"500 Oops", 2), (b"503 Not now", 1)):
        up.requests.clear()
        up.behave = reply(b"no", status)
        assert ask(running, "GET", "/api/choosy").status == int(status[:3])
        assert len(up.requests) == tries


@pytest.mark.parametrize("name", ["once", "unfunded", "twice"])
def test_the_last_response_is_passed_on_as_it_came(running: RunningGateway, up: RawUpstream, name: str) -> None:
    """When no attempt is left, or none is paid for; the gateway puts no words of its own in its place."""
    up.behave = unavailable
    answer = ask(running, "GET", f"/api/{name}")
    assert (answer.status, answer.body, answer.all("x-from")) == (503, b"not now", [b"upstream"])
    assert len(up.requests) == (2 if name == "twice" else 1)


@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_a_key_makes_a_request_repeatable(running: RunningGateway, up: RawUpstream, method: str) -> None:
    """By it the upstream knows the request again, so it must be there both times."""
    for failing in (dies, unavailable):
        up.requests.clear()
        up.behave = first(failing)
        assert ask(running, method, "/api/twice", b"data", "Idempotency-Key: 7f3a").status == 200
        assert [request.all("idempotency-key") for request in up.requests] == [[b"7f3a"]] * 2


# When


@pytest.mark.parametrize(("asked", "tries"), [(b"0", 2), (b"1", 2), (b"2", 1), (b"Thu, 01 Jan 2099 00:00:00 GMT", 1)])
def test_what_the_upstream_asks_for_is_waited_for_or_it_is_not_asked_again(
    running: RunningGateway, up: RawUpstream, asked: bytes, tries: int
) -> None:
    up.behave = first(reply(b"no", b"503 Not now", ((b"Retry-After", asked),)))
    began = time.monotonic()
    answer = ask(running, "GET", "/api/twice")
    took = time.monotonic() - began
    assert len(up.requests) == tries
    assert answer.status == (200 if tries == 2 else 503)
    assert (took >= 1) is (asked == b"1")
    assert tries == 2 or answer.all("retry-after") == [asked]


def test_another_target_is_tried_at_once_and_the_same_one_after_a_pause(
    running: RunningGateway, up: RawUpstream, pair: RawUpstream
) -> None:
    up.behave = dies
    times = []
    for _ in range(4):
        began = time.monotonic()
        assert ask(running, "GET", "/api/pair").body == b"other"
        times.append(time.monotonic() - began)
    assert max(times) < 1
    assert len(up.requests) >= 1
    up.behave = first(dies, times=3)
    pauses = []
    for _ in range(3):
        began = time.monotonic()
        assert ask(running, "GET", "/api/pausing").status in (200, 502)
        pauses.append(time.monotonic() - began)
    assert max(pauses) > 0.02


# Never


def test_a_probe_is_not_repeated_nor_anything_while_the_upstream_is_being_probed(
    running: RunningGateway, up: RawUpstream
) -> None:
    breaker = running.live.upstreams["probing"].breaker
    up.behave = unavailable
    assert ask(running, "GET", "/api/probing").status == 503
    assert breaker.state == "OPEN"
    up.requests.clear()
    time.sleep(0.15)
    answer = ask(running, "GET", "/api/probing")
    assert (answer.status, answer.body) == (503, b"not now")
    assert len(up.requests) == 1
    assert running.live.recorder.retries_denied["probing", "circuit_breaker"] >= 2


def test_a_request_that_found_no_connection_is_not_repeated(running: RunningGateway, up: RawUpstream) -> None:
    """What sheds load is not asked again; the client gets Retry-After."""
    made, gate = tries(running, "scarce"), threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        gate.wait(PATIENCE)
        reply()(wire, request)

    up.behave = behave
    with RawClient(running.port) as holder:
        holder.request("POST", "/api/scarce", ("Content-Length: 0",))
        eventually(lambda: len(up.requests) == 1, "the one connection is taken")
        answer = ask(running, "GET", "/api/scarce")
        gate.set()
        assert holder.answer().status == 200
    assert (answer.status, b'"overloaded"' in answer.body) == (503, True)
    assert made() == {"overloaded": 1, "2xx": 1}


# How many


def test_the_floor_lets_a_quiet_service_retry(running: RunningGateway, up: RawUpstream) -> None:
    """And no more than it says, whatever comes: share, floor and reserve are all there is."""
    up.behave = dies
    began = time.monotonic()
    for _ in range(15):
        assert ask(running, "GET", "/api/floored").status == 502
    time.sleep(0.2)
    for _ in range(5):
        ask(running, "GET", "/api/floored")
    seconds = time.monotonic() - began
    retries = len(up.requests) - 20
    assert RESERVE + 3 <= retries <= RESERVE + 0.01 * 20 + 20 * seconds


def test_retries_are_counted_by_cause_and_those_denied_by_why(running: RunningGateway, up: RawUpstream) -> None:
    recorder = running.live.recorder
    before = dict(recorder.retries), dict(recorder.retries_denied)
    up.behave = first(dies)
    assert ask(running, "GET", "/api/thrice").status == 200
    up.behave = first(unavailable)
    assert ask(running, "GET", "/api/thrice").status == 200
    up.behave = first(dies)
    assert ask(running, "POST", "/api/thrice").status == 502
    up.behave = dies
    assert ask(running, "GET", "/api/unfunded").status == 502

    def since(counts: dict[tuple[str, str], int], then: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
        return {key: count - then.get(key, 0) for key, count in counts.items() if count != then.get(key, 0)}

    assert since(recorder.retries, before[0]) == {("thrice", "upstream_reset"): 1, ("thrice", "503"): 1}
    assert since(recorder.retries_denied, before[1]) == {("thrice", "method"): 1, ("unfunded", "budget"): 1}
    text = exposition(f"{running.url}/metrics?format=prometheus").body.decode()
    assert 'gateway_upstream_retries_total{reason="503",upstream="thrice"}' in text
    assert 'gateway_upstream_retries_denied_total{reason="budget",upstream="unfunded"}' in text
    assert 'gateway_upstream_retries_denied_total{reason="retry_after",upstream="once"} 0.0' in text
