"""Load: wrk for throughput, and an open loop at a fixed rate for latency.

wrk waits for a response before it sends the next request, so a slow server reduces its own load. The open loop sends
each request when it is due, on another connection if necessary, and measures from that time. It is one thread with
select(2), whose timeouts are in microseconds; those of asyncio are in milliseconds.
"""

import contextlib
import http.client
import math
import re
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import httptools

from benchmarks.processes import pinned
from benchmarks.upstream import SIZES, SMALL, UPLOADED

CLIENT = "bench"
UPLOAD_BYTES = 10_485_760
_PATIENCE = 60.0
_OK = range(200, 300)
_SUMMARY = re.compile(r"(\d+) requests in ([\d.]+)(us|ms|s|m), ([\d.]+)([KMGT]?)B read")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_VARIED = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0",
    "Accept": "application/json, text/plain, */*",
    "Accept-Language": "en-GB,en;q=0.7,de;q=0.3",
    "Accept-Encoding": "gzip, deflate, br, zstd",
    "Referer": "https://shop.example/orders/1234",
    "Origin": "https://shop.example",
    "Authorization": f"Bearer {'x' * 64}",
}
_VARIED_LUA = """
local number = 0
request = function()
  number = number + 1
  wrk.headers["traceparent"] = string.format("00-%032x-%016x-01", number, number)
  return wrk.format()
end
"""
_UPLOAD_LUA = f'wrk.method = "POST"\nwrk.body = string.rep("x", {UPLOAD_BYTES})\n'
_SCRIPTS = {"upload": _UPLOAD_LUA, "varied": _VARIED_LUA}
_HEADERS = {"new": {"Connection": "close"}, "varied": _VARIED}


@dataclass(frozen=True)
class Driven:
    """Results of wrk: responses, seconds, and bytes read (rounded as wrk prints them)."""

    requests: int
    seconds: float
    read: float


class Failed(Exception):
    """A run without valid results: wrong responses, errors, or a rate that was not reached."""


def parse_wrk(output: str, size: int) -> Driven:
    """Parse wrk's summary. Raises Failed if a response was not 2xx or 3xx or too short, or after errors."""
    if problems := re.findall(r"(?:Non-2xx|Socket errors).*", output):
        raise Failed("; ".join(problem.strip() for problem in problems))
    found = _SUMMARY.search(output)
    if found is None:
        raise Failed(f"unexpected output of wrk: {output.strip()!r}")
    driven = Driven(int(found[1]), float(found[2]) * _SECONDS[found[3]], float(found[4]) * _BYTES[found[5]])
    if not driven.requests:
        raise Failed("no response: wrk received no response")
    if driven.read < 0.99 * size * driven.requests:  # wrk prints three digits
        raise Failed(f"{driven.requests} responses of {size} bytes in only {driven.read:.0f} bytes")
    return driven


def drive(port: int, case: str, *, core: int, seconds: float, connections: int) -> Driven:
    """Run wrk from a core against one case. Raises Failed."""
    path, size = ("upload", len(UPLOADED)) if case == "upload" else (case if case in SIZES else "small", 0)
    options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={_PATIENCE:.0f}s"]
    headers = ["-H", f"X-Client-ID: {CLIENT}"]
    for name, value in _HEADERS.get(case, {}).items():
        headers += ["-H", f"{name}: {value}"]
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        if case in _SCRIPTS:
            script.write(_SCRIPTS[case])
            script.flush()
            options += ["-s", script.name]
        with pinned(core):
            done = subprocess.run(  # noqa: S603 - fixed arguments
                ["wrk", *options, *headers, f"http://127.0.0.1:{port}/api/{path}"],
                capture_output=True,
                text=True,
                check=False,
            )
    if done.returncode:
        raise Failed(f"wrk exited with {done.returncode}: {done.stderr.strip()}")
    return parse_wrk(done.stdout, size or SIZES[path])


def verify(port: int, case: str) -> None:
    """Send one request and check the whole response. Raises Failed."""
    path = case if case == "upload" or case in SIZES else "small"
    upload = b"x" * UPLOAD_BYTES if case == "upload" else None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    with contextlib.closing(connection):
        headers = {"X-Client-ID": CLIENT, **({"Connection": "close"} if case == "new" else {})}
        connection.request("POST" if upload else "GET", f"/api/{path}", upload, headers)
        try:
            answer = connection.getresponse()
            body = answer.read()
        except http.client.HTTPException as error:
            raise Failed(f"{path}: {error!r}") from error
    expected = {"small": SMALL, "upload": UPLOADED}.get(path) or bytes(SIZES[path])
    if answer.status not in _OK or body != expected:
        raise Failed(f"{path}: status {answer.status} with {len(body)} bytes, not 200 with {len(expected)}")
    if answer.will_close != (case == "new"):
        raise Failed(f"{path}: the connection is {'closed' if answer.will_close else 'kept'}")


def await_ready(port: int, patience: float = 15.0) -> None:
    """Wait until a server that listens also responds, as some load their routes later. Raises Failed."""
    deadline = time.monotonic() + patience
    while True:
        try:
            verify(port, "small")
        except (Failed, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


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
        received = self._socket.recv(65_536)
        if not received:
            raise Failed("the connection was closed before the response")
        self._answer.append(received)
        if self._answer.done:
            self.check(self._answer)
        return self._answer.done

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
