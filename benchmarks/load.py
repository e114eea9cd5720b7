"""Load: wrk for throughput, and an open loop at a fixed rate for latency.

wrk waits for a response before it sends the next request, so a slow server reduces its own load. The open loop sends
each request when it is due, on another connection if necessary, and measures from that time. It is one thread with
select(2), whose timeouts are in microseconds; those of asyncio are in milliseconds.
"""

import contextlib
import gzip
import http.client
import json
import math
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httptools

from benchmarks.cases import CASES, CLIENT, Case
from benchmarks.processes import cpu_seconds, pinned
from benchmarks.upstream import SMALL

ROOT = Path(__file__).parent.parent
_PATIENCE = 60.0
_MAX_ALLOWED = 50  # requests until a limit refuses
_REFUSED_SHARE = 0.99  # of the requests of a case whose requests are refused
_OK = range(200, 300)
_FIRST_ERROR = 400
_SUMMARY = re.compile(r"(\d+) requests in ([\d.]+)(us|ms|s|m), ([\d.]+)([KMGT]?)B read")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Driven:
    """Results of wrk: responses, seconds, and bytes read (rounded as wrk prints them)."""

    requests: int
    seconds: float
    read: float


class Failed(Exception):
    """A run without valid results: wrong responses, errors, or a rate that was not reached."""


def parse_wrk(output: str, size: int, *, is_refused: bool = False) -> Driven:
    """Parse wrk's summary. Raises Failed if a response was not 2xx or 3xx or too short, or after errors.

    `is_refused`: nearly all responses must be neither 2xx nor 3xx instead.
    """
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    if problems := re.findall("Socket errors.*" if is_refused else "(?:Non-2xx|Socket errors).*", output):
        raise Failed("; ".join(problem.strip() for problem in problems))
    found = _SUMMARY.search(output)
    if found is None:
        raise Failed(f"unexpected output of wrk: {output.strip()!r}")
    driven = Driven(int(found[1]), float(found[2]) * _SECONDS[found[3]], float(found[4]) * _BYTES[found[5]])
    if not driven.requests:
        raise Failed("no response: wrk received no response")
    if is_refused and (refused is None or int(refused[1]) < _REFUSED_SHARE * driven.requests):
        raise Failed(f"{refused[1] if refused else 0} of {driven.requests} requests were refused")
    if driven.read < 0.99 * size * driven.requests:  # wrk prints three digits
        raise Failed(f"{driven.requests} responses of {size} bytes in only {driven.read:.0f} bytes")
    return driven


def drive(port: int, name: str, *, core: int, seconds: float, connections: int | None = None) -> Driven:
    """Drive one case from a core, with as many connections as it has by default. Raises Failed."""
    case = CASES[name]
    count = case.connections if connections is None else connections
    if case.is_split:
        return _drive_segments(port, core=core, seconds=seconds, connections=count)
    return drive_case(port, case, core=core, seconds=seconds, connections=count)


def drive_case(port: int, case: Case, *, core: int, seconds: float, connections: int) -> Driven:
    """Run wrk from a core. Raises Failed."""
    options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={_PATIENCE:.0f}s"]
    for name, value in {"X-Client-ID": CLIENT, **case.headers}.items():
        options += ["-H", f"{name}: {value}"]
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        if case.script:
            script.write(case.script)
            script.flush()
            options += ["-s", script.name]
        output = _output(["wrk", *options, f"http://127.0.0.1:{port}/api/{case.path}"], core)
    return parse_wrk(output, case.least, is_refused=case.status >= _FIRST_ERROR)


def alternating_costs(
    gateways: Mapping[str, tuple[int, int]],
    cases: Mapping[str, Case],
    runs: Sequence[tuple[str, str]],
    *,
    core: int,
    seconds: float,
    rounds: int,
) -> dict[str, list[float]]:
    """Return the CPU time of a request in microseconds in each round, by "case: gateway". Raises Failed.

    `gateways` are process ids and ports by name; `runs` are pairs of a gateway and a case, which follow one another in
    each round, forwards and backwards by turns. A round before the others is for warming up.
    """
    found: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, case in runs if number % 2 else reversed(runs):
            pid, port = gateways[name]
            began = cpu_seconds(pid)
            driven = drive_case(port, cases[case], core=core, seconds=seconds, connections=16)
            if number:
                spent = (cpu_seconds(pid) - began) / driven.requests * 1e6
                found.setdefault(f"{case}: {name}", []).append(spent)
    return found


def _drive_segments(port: int, *, core: int, seconds: float, connections: int) -> Driven:
    command = [sys.executable, "-m", "benchmarks.segments", str(port), str(seconds), str(connections)]
    found = json.loads(_output(command, core))
    if found["failures"]:
        raise Failed("; ".join(found["failures"]))
    if not found["requests"]:
        raise Failed("no response")
    return Driven(found["requests"], found["seconds"], found["read"])


def _output(command: Sequence[str], core: int) -> str:
    """Return the output of a load generator, run on a core. Raises Failed."""
    with pinned(core):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    if done.returncode:
        raise Failed(f"{command[0]} exited with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def verify(port: int, name: str) -> None:
    """Send one request of a case and check the whole response; several if they must be refused. Raises Failed."""
    case = CASES.get(name, CASES["small"])
    for _ in range(_MAX_ALLOWED):
        status, body, is_closed = _exchange(port, case)
        if status == case.status or case.status in _OK:
            break
    if status != case.status or (case.body is not None and body != case.body):
        raise Failed(f"{name}: status {status} with {len(body)} bytes, not {case.status} with {len(case.body or b'')}")
    if is_closed != case.closes:
        raise Failed(f"{name}: the connection is {'closed' if is_closed else 'kept'}")


def _exchange(port: int, case: Case) -> tuple[int, bytes, bool]:
    """Send one request; return status and decoded body of the response, and whether the connection is closed."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)) as connection:
        headers = {"X-Client-ID": CLIENT, **case.headers}
        connection.request(case.method, f"/api/{case.path}", b"x" * case.sent or None, headers)
        try:
            answer = connection.getresponse()
            body = answer.read()
        except http.client.HTTPException as error:
            raise Failed(f"{case.path}: {error!r}") from error
    if answer.headers.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
    return answer.status, body, answer.will_close


def await_ready(port: int, patience: float = 15.0, case: Case | None = None) -> None:
    """Wait until a server that listens also responds to a case, as some load their routes later. Raises Failed.

    The case is `small` unless another one is given.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            _verify_ready(port, CASES["small"] if case is None else case)
        except (Failed, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _verify_ready(port: int, case: Case) -> None:
    """Raise Failed unless the server responds as to a case, or as one that limits this client."""
    status, body, _ = _exchange(port, case)
    is_as_expected = status in (*_OK, case.status) and case.body in (None, body)
    if status != CASES["refused"].status and not is_as_expected:
        raise Failed(f"{case.title}: status {status} with {len(body)} bytes, not 200 with {len(case.body or b'')}")


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile of sorted values; `share` is within 0 to 1."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Answer:
    """Parses sequential responses, and counts the bytes of their bodies."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.length = 0
        self.done = False

    def append(self, received: bytes) -> None:
        """Parse received bytes; the first ones after a complete response begin the next one."""
        if self.done:
            self.length, self.done = 0, False
        try:
            self._parser.feed_data(received)
        except httptools.HttpParserError as error:
            raise Failed(f"not an HTTP response: {error}") from error

    @property
    def status(self) -> int:
        """The status of the last response."""
        code: int = self._parser.get_status_code()
        return code

    def check(self, size: int) -> None:
        """Raise Failed unless the status is 2xx and the body has this size."""
        if self.status not in _OK or self.length != size:
            raise Failed(f"status {self.status} with {self.length} bytes, not 200 with {size}")

    def on_body(self, body: bytes) -> None:
        """Count the bytes; called by the parser."""
        self.length += len(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.done = True


class Client:
    """One keep-alive connection with at most one small request in flight."""

    request = f"GET /api/small HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Client-ID: {CLIENT}\r\n\r\n".encode()

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), _PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answer = Answer()
        self.due = 0.0

    def fileno(self) -> int:
        """Return the descriptor for select(2)."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def send(self, due: float) -> None:
        """Send the request that is due at `due`."""
        self.due = due
        self._socket.sendall(self.request)

    def receive(self) -> bool:
        """Parse received bytes; return whether the response is complete. Raises Failed if it is not as expected."""
        received = self.read()
        if not received:
            raise Failed("the connection was closed before the response")
        self._answer.append(received)
        if self._answer.done:
            self.check(self._answer)
        return self._answer.done

    def read(self) -> bytes:
        """Return what has been received."""
        return self._socket.recv(65_536)

    def check(self, answer: Answer) -> None:
        """Raise Failed if a response is not as expected."""
        answer.check(len(SMALL))

    def ask(self) -> None:
        """Send a request and wait for its response."""
        self.send(0.0)
        while not self.receive():
            pass


def latencies(port: int, *, core: int, rate: float, seconds: float, most: int = 500) -> list[float]:
    """Send `rate` small requests per second; return the sorted times from due to complete response, in seconds.

    Raises Failed if more than `most` requests are in flight: then the rate is not sustained.
    """
    with pinned(core), contextlib.closing(OpenLoop(partial(Client, port), most)) as loop:
        loop.warm_up()
        loop.run(rate, seconds)
    return sorted(loop.measured)


class OpenLoop:
    """An open loop: connections to one server, busy or idle, and the measured times in seconds."""

    def __init__(self, connect: Callable[[], Client], most: int = 500) -> None:
        self._connect = connect
        self._most = most
        self._idle: list[Client] = []
        self._busy: set[Client] = set()
        self.measured: list[float] = []

    def __repr__(self) -> str:
        return f"<OpenLoop [{len(self._busy)} unanswered, {len(self._idle)} idle, {len(self.measured)} measured]>"

    def close(self) -> None:
        """Close all connections."""
        for client in (*self._idle, *self._busy):
            client.close()

    def warm_up(self, connections: int = 8) -> None:
        """Open some connections and send one request on each."""
        for _ in range(connections):
            self._idle.append(self._connect())
            self._idle[-1].ask()

    def run(self, rate: float, seconds: float) -> None:
        """Send at a fixed rate for `seconds`, and wait for the responses. Raises Failed."""
        start, total = time.perf_counter() + 0.01, round(rate * seconds)
        for number in range(total):
            due = start + number / rate
            while (wait := due - time.perf_counter()) > 0:
                self.receive(wait)
            if not self.send(due):
                raise Failed(f"does not hold {rate:g} requests/s")
        while len(self.measured) < total:
            if not self.receive(_PATIENCE):
                raise Failed(f"{total - len(self.measured)} requests had no response within {_PATIENCE:g} s")

    def send(self, due: float) -> bool:
        """Send a request that is due at `due` on an idle connection; return False if too many are in flight."""
        if len(self._busy) >= self._most:
            return False
        client = self._idle.pop() if self._idle else self._connect()
        self._busy.add(client)
        client.send(due)
        return True

    def receive(self, wait: float) -> bool:
        """Process what is received within `wait` seconds; return whether there was anything."""
        readable = select.select(self._busy, (), (), wait)[0]
        for client in readable:
            if client.receive():
                self.measured.append(time.perf_counter() - client.due)
                self._busy.remove(client)
                self._idle.append(client)
        return bool(readable)
