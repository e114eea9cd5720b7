"""What every failure of an upstream comes to, for client, breaker, metrics and access log, and in what time.

Each fault meets a plain GET, which uses the fast path, and a POST with a chunked body, which uses the ASGI path;
some meet a POST of which the client has sent half, or one that is more than fits on the way. All faults that meet
one kind of request happen at once, each at an upstream of its own, as many of them wait for a timeout.
Afterwards the gateway holds no more than before, and serves.
"""

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import SHUT_RDWR
from threading import Thread
from typing import Any

import pytest

from tests.faulty import (
    CHUNKED,
    COUNTED,
    HEAD,
    INTERIM,
    UNTIL_CLOSE,
    WHOLE,
    Fault,
    FaultyUpstream,
    Listening,
    repeats,
    says,
    shuts_its_side,
)
from tests.kit import RawAnswer, RawClient, eventually
from tests.kit import case as named
from tests.processes import Running, process

# The kinds of upstreams. Each has at most one short timeout, in seconds: what is not about that timeout never depends
# on how busy the machine is.
CONNECT, RESPONSE, IDLE, RENEWED = "connect", "response", "idle", "renewed"
PATIENT = "patient"
LONG = 60.0
TIMEOUTS: dict[str, dict[str, float]] = {
    PATIENT: {},
    CONNECT: {"connect": 0.3},
    RESPONSE: {"response": 1.0},
    IDLE: {"idle": 1.0},
    RENEWED: {"idle": 2.0},  # shorter than a body that keeps coming, much longer than each pause in it
}
SLACK = 15.0  # seconds a busy machine may add
WAYS = ("GET", "POST")
BODIES = {
    "GET": b"",
    "POST": b"4\r\ndata\r\n0\r\n\r\n",
    "half": b"4\r\ndata\r\n",
    "flood": (b"100000\r\n%b\r\n" % bytes(0x100000)) * 32 + b"0\r\n\r\n",  # more than the kernel holds
}
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors are counted in /proc")


@dataclass(frozen=True)
class Row:
    """What one fault comes to. `reason` is None for a response of the upstream's own, passed on."""

    fault: Fault
    status: int
    reason: str | None
    outcome: str  # of the try, in the metrics
    breaker: str  # failure, success or ignored
    upstream: str = PATIENT
    breaks_off: bool = False
    ways: tuple[str, ...] = WAYS

    @property
    def lasts(self) -> float:
        """Seconds that the request takes at least: the short timeout of the upstream, 0 if it has none."""
        return sum(TIMEOUTS[self.upstream].values())


def fails(name: str, behave: Any, status: int, reason: str, upstream: str = PATIENT) -> Row:
    """Return the row of a fault before the response's head."""
    return Row(Fault(name, behave), status, reason, reason, "failure", upstream)


def breaks_off(name: str, behave: Any, reason: str, upstream: str = PATIENT) -> Row:
    """Return the row of a fault behind the head: the client has seen a status, and sees that the body is not all."""
    return Row(Fault(name, behave), 200, reason, "2xx", "failure", upstream, breaks_off=True)


def passes(name: str, behave: Any, status: int, breaker: str, upstream: str = PATIENT) -> Row:
    """Return the row of a response that is passed on as it is."""
    return Row(Fault(name, behave), status, None, f"{status // 100}xx", breaker, upstream)


def unread(name: str, behave: Any) -> Fault:
    """Return a fault that shows as soon as the request's head is there."""
    return Fault(name, behave, reads_body=False)


RESET, TIMEOUT, GARBLED = "upstream_reset", "upstream_timeout", "upstream_protocol_error"
REFUSED = "upstream_connect_error"
DRIPS = (*[b"1\r\nx\r\n"] * 10, b"0\r\n\r\n")
REFUSAL = b"HTTP/1.1 413 Too much\r\nContent-Length: 2\r\n\r\nno"
TABLE = (
    # While connecting
    Row(Fault("refuses", listening=Listening.REFUSES), 502, REFUSED, REFUSED, "failure"),
    Row(Fault("has a full backlog", listening=Listening.IS_FULL), 504, TIMEOUT, TIMEOUT, "failure", CONNECT),
    # Before the head
    fails("never answers", says(then="stalls"), 504, TIMEOUT, RESPONSE),
    fails("hangs up without a word", says(then="ends"), 502, RESET),
    fails("resets without a word", says(then="resets"), 502, RESET),
    fails("ends within the head", says(HEAD[:9], then="ends"), 502, RESET),
    fails("resets within the head", says(HEAD, then="resets"), 502, RESET),
    fails("stalls within the head", says(HEAD, then="stalls"), 504, TIMEOUT, RESPONSE),
    fails("drips its head", repeats(b"X", 0.02, after=HEAD), 504, TIMEOUT, RESPONSE),
    fails("only ever gives hints", repeats(INTERIM, 0.02), 504, TIMEOUT, RESPONSE),
    fails("floods with hints", repeats(INTERIM * 100, 0), 502, GARBLED),
    fails("shuts its side at once", shuts_its_side(), 502, RESET),
    fails("speaks another protocol", says(b"SSH-2.0-OpenSSH_9.2\r\n"), 502, GARBLED),
    fails("sends a head of 80 KB", says(HEAD + b"X-Big: %b\r\n\r\n" % (b"x" * 80_000)), 502, GARBLED),
    fails("sends a head that never ends", repeats(b"X-Big: x\r\n" * 1000, 0, after=HEAD), 502, GARBLED),
    fails("tells two lengths", says(HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok"), 502, GARBLED),
    fails("tells a length that is none", says(HEAD + b"Content-Length: -2\r\n\r\nok"), 502, GARBLED),
    fails("switches protocols unasked", says(b"HTTP/1.1 101 Go\r\nUpgrade: x\r\n\r\n"), 502, GARBLED),
    fails("says more than it told", says(WHOLE + b"more"), 502, GARBLED),
    fails("answers twice", says(WHOLE * 2), 502, GARBLED),
    # Within the body
    breaks_off("ends within a counted body", says(COUNTED, then="ends"), RESET),
    breaks_off("ends within a chunked body", says(CHUNKED, then="ends"), RESET),
    breaks_off("resets within a counted body", says(COUNTED, then="resets"), RESET),
    breaks_off("resets within a chunked body", says(CHUNKED, then="resets"), RESET),
    breaks_off("resets within a body until its close", says(UNTIL_CLOSE, then="resets"), RESET),
    breaks_off("stalls within a counted body", says(COUNTED, then="stalls"), TIMEOUT, IDLE),
    breaks_off("stalls within a chunked body", says(CHUNKED, then="stalls"), TIMEOUT, IDLE),
    breaks_off("stalls within a body until its close", says(UNTIL_CLOSE, then="stalls"), TIMEOUT, IDLE),
    breaks_off("shuts its side within a body", shuts_its_side(COUNTED), RESET),
    breaks_off("sends garbage for a chunk", says(CHUNKED, b"oops\r\n"), GARBLED),
    breaks_off("sends more than it told, later", says(COUNTED, b"-done and more"), GARBLED),
    # No fault of the connection
    passes("sends trailers of 80 KB", says(CHUNKED, b"0\r\nX-Big: %b\r\n\r\n" % (b"x" * 80_000)), 200, "success"),
    passes("is broken", says(b"HTTP/1.1 500 Broken\r\nContent-Length: 2\r\n\r\nno"), 500, "failure"),
    passes("is unavailable", says(b"HTTP/1.1 503 Later\r\nContent-Length: 2\r\n\r\nno"), 503, "failure"),
    passes("knows nothing", says(b"HTTP/1.1 404 Unknown\r\nContent-Length: 2\r\n\r\nno"), 404, "success"),
    passes("drips a body", says(COUNTED, b"-done", every=0.1), 200, "success"),
    passes("drips a long body", says(CHUNKED, *DRIPS, every=0.25), 200, "success", RENEWED),
    passes("ends a body by its close", says(UNTIL_CLOSE, then="ends"), 200, "success"),
    passes("shuts its side behind an answer", shuts_its_side(WHOLE), 200, "success"),
    # While the request is still being sent
    Row(unread("answers early", says(WHOLE, then="stalls")), 200, None, "2xx", "success", ways=("half",)),
    Row(unread("refuses early", says(REFUSAL, then="stalls")), 413, None, "4xx", "success", ways=("half", "flood")),
    Row(unread("ends early", says(then="ends")), 502, RESET, RESET, "ignored", ways=("half", "flood")),
    Row(unread("resets early", says(then="resets")), 502, RESET, RESET, "ignored", ways=("half", "flood")),
    Row(unread("stops reading", says(then="stalls")), 504, TIMEOUT, TIMEOUT, "failure", IDLE, ways=("flood",)),
)


def send_what_goes(client: RawClient, method: str, path: str, headers: tuple[str, ...], body: bytes) -> None:
    """Send a request, or as much of it as is taken."""
    with suppress(OSError):
        client.request(method, path, headers, body)


@dataclass
class Case:
    """A fault that meets a kind of request, at an upstream of its own."""

    row: Row
    way: str
    name: str  # of the upstream, and of the request
    server: FaultyUpstream


@dataclass
class Result:
    """What the client has of a request, and in how many seconds."""

    answer: RawAnswer
    lasted: float


@dataclass
class Scene:
    """A gateway in a process of its own, with the upstreams of all cases."""

    running: Running
    cases: list[Case]
    pool: ThreadPoolExecutor
    descriptors: int = 0  # it holds at rest, one connection to each of its upstreams among them

    def send(self, way: str, upstream: str, request_id: str = "good") -> RawAnswer:
        """Make one request on a connection of its own."""
        with RawClient(self.running.port) as client:
            framing = ("Transfer-Encoding: chunked",) if BODIES[way] else ()
            method = "POST" if framing else "GET"
            headers = (f"X-Request-ID: {request_id}", *framing)
            path = f"/api/{upstream}"
            sender = Thread(target=send_what_goes, args=(client, method, path, headers, BODIES[way]))
            sender.start()
            answer = client.answer()
            with suppress(OSError):
                client.sock.shutdown(SHUT_RDWR)  # ends a sending that goes on
            sender.join()
            return answer

    def play(self, case: Case) -> Result:
        """Make the request of a case, and measure its time."""
        begun = time.monotonic()
        answer = self.send(case.way, case.name, case.name)
        return Result(answer, time.monotonic() - begun)

    def is_served(self, upstream: str) -> bool:
        """Return whether requests of both ways are served, which a short timeout may prevent on a busy machine."""
        return [self.send(way, upstream).status for way in WAYS] == [200, 200]

    def serves(self, case: Case) -> None:
        """Wait until the gateway serves by an upstream."""
        eventually(partial(self.is_served, case.name), f"upstream '{case.name}' serves")

    def rest(self) -> None:
        """Wait until the gateway serves by all its upstreams, so that it has a connection to each."""
        for _ in self.pool.map(self.serves, self.cases):
            pass

    def tries(self) -> dict[str, Counter[str]]:
        """Return the attempts so far by upstream and outcome."""
        text = self.running.ask("/metrics?format=prometheus").body.decode()
        found: defaultdict[str, Counter[str]] = defaultdict(Counter)
        pattern = r'gateway_upstream_requests_total\{result="(\w+)",upstream="([\w-]+)"\} (\d+)'
        for outcome, upstream, count in re.findall(pattern, text):
            found[upstream][outcome] = int(count)
        return found

    def breakers(self) -> dict[str, tuple[int, int]]:
        """Return the calls that counted for each breaker so far, and the failures among them."""
        views = self.running.ask("/circuit-breakers").json()["circuit_breakers"]
        return {name: (view["window_calls"], view["window_failures"]) for name, view in views.items()}

    def log_of(self, request_id: str) -> dict[str, Any]:
        """Return the line of the access log."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found.extend(line for line in self.running.logged if line["request_id"] == request_id)
            return bool(found)

        eventually(is_there, "the request is logged")
        return found[0]

    def in_flight(self) -> int:
        """Return the requests it says are under way."""
        answer = self.running.ask("/metrics", headers={"Accept": "application/json"})
        found: int = answer.json()["requests"]["in_flight"]
        return found

    def in_use(self, resource: str) -> int:
        """Return how much is in use of a resource that `/health` shows."""
        found: list[dict[str, Any]] = self.running.ask("/health").json()["resources"]
        return sum(one["in_use"] for one in found if one["resource"] == resource)

    def connections(self) -> int:
        """Count its open connections to clients: those established, and those that only the client has closed."""
        lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        port = f":{self.running.port:04X}"
        return sum(1 for _, local, _, state, *_ in lines if local.endswith(port) and state in ("01", "08"))

    def open_descriptors(self) -> int:
        """Count what the process holds open."""
        return sum(1 for _ in Path(f"/proc/{self.running.popen.pid}/fd").iterdir())


def cases_of_table() -> list[Case]:
    """Return all cases, whose servers have been started."""
    pairs = [(row, way) for row in TABLE for way in row.ways]
    names = [re.sub(r"\W+", "-", f"{row.fault.name} {way}") for row, way in pairs]
    return [Case(row, way, name, FaultyUpstream()) for (row, way), name in zip(pairs, names, strict=True)]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("faults")
    cases = cases_of_table()
    sections = {
        "upstreams": {
            case.name: {
                "targets": [{"url": case.server.url}],
                "timeouts": {"connect": LONG, "response": LONG, "idle": LONG} | TIMEOUTS[case.row.upstream],
                "pool": {"max_connections": 2, "idle_timeout": 3600},  # so that one that leaks is missed at once
                "circuit_breaker": {"failure_threshold": 10_000, "minimum_calls": 10_000, "window": 3600},
                "retry": {"attempts": 1},
            }
            for case in cases
        },
        "routes": [{"name": case.name, "path": f"/api/{case.name}", "upstream": case.name} for case in cases],
        "tiers": {"FREE": {"rate": 1000, "capacity": 100_000}},
        "server": {"max_event_loop_lag": None},  # on a busy machine it is late, and would shed requests
    }
    file = folder / "gateway.yaml"
    file.write_text(json.dumps(sections))
    with (
        process("-m", "api_gateway", "--port", "0", "--config", str(file), cwd=folder) as running,
        ThreadPoolExecutor(len(cases)) as pool,
    ):
        found = Scene(running, cases, pool)
        found.rest()
        assert found.in_flight() == 0
        eventually(lambda: found.connections() == 0, "it has closed all connections of clients")
        found.descriptors = found.open_descriptors()
        yield found
        assert running.terminate() == 0
        assert "Traceback" not in running.errors, running.errors
    for case in cases:
        case.server.close()


@pytest.mark.parametrize("way", BODIES)
def test_faults_reach_all_they_concern_and_leave_nothing_behind(scene: Scene, way: str) -> None:
    cases = [case for case in scene.cases if case.way == way]
    tries, breakers = scene.tries(), scene.breakers()
    with ExitStack() as stack:
        for case in cases:
            stack.enter_context(case.server.failing(case.row.fault))
        deaf = sum(case.row.fault.listening is not Listening.ACCEPTS for case in cases)
        eventually(lambda: scene.open_descriptors() <= scene.descriptors - deaf, "the connections it had are gone")
        results = list(scene.pool.map(scene.play, cases))
        lines = [scene.log_of(case.name) for case in cases]
    eventually(lambda: scene.in_use("requests") == 0, "no rest of a body is being sent")
    tries_after, breakers_after = scene.tries(), scene.breakers()
    for case, result, line in zip(cases, results, lines, strict=True):
        with named(case.name):
            check(case.row, result, line)
            assert tries_after[case.name] - tries[case.name] == Counter({case.row.outcome: 1})
            more = {"failure": (1, 1), "success": (1, 0), "ignored": (0, 0)}[case.row.breaker]
            calls, failures = breakers[case.name]
            assert breakers_after[case.name] == (calls + more[0], failures + more[1])
    scene.rest()  # also by other upstreams, as the servers close connections that are not used for a while
    assert scene.in_flight() == 0
    eventually(lambda: scene.open_descriptors() == scene.descriptors, "as many descriptors as before")


def check(row: Row, result: Result, line: dict[str, Any]) -> None:
    """Compare what the client and the access log have with the row of the table."""
    answer = result.answer
    assert (answer.status, answer.is_complete) == (row.status, not row.breaks_off)
    if row.reason is not None and not row.breaks_off:
        assert json.loads(answer.body)["reason"] == row.reason
    assert row.lasts * 0.9 <= result.lasted < row.lasts + SLACK
    assert (line["status"], line["reason"]) == (row.status, row.reason)
    assert line["source"] == ("gateway" if row.reason is not None and not row.breaks_off else "upstream")
