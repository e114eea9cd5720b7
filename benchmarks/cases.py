"""The cases of the comparison: what is requested, what a correct response is, and what the peer is configured for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.upstream import CHUNKED, SIZES, SMALL, UPLOADED

CLIENT = "bench"
CLIENTS = 10_000  # of the case `names`

# Features of a configuration, beside what every peer has: see `benchmarks.peers`.
TIMEOUT, LOG, BALANCED, LIMITED, TLS, FALLBACK = "timeout", "log", "balanced", "limited", "tls", "fallback"
CORS = "cors"

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
_NAMES_LUA = f"""
local number = 0
request = function()
  number = number % {CLIENTS} + 1
  wrk.headers["X-Client-ID"] = "client-" .. number
  return wrk.format()
end
"""


@dataclass(frozen=True)
class Case:
    """One case. `path` is below /api; `sent` bytes of body make it a POST; `body` is the expected one, decoded.

    `needs` are the features of the peer's configuration, `lua` is a part of wrk's script. A `status` that is not 200
    is expected after a few requests with 200 at most.
    """

    title: str
    path: str = "small"
    sent: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    lua: str = ""
    status: int = 200
    body: bytes | None = SMALL
    connections: int = 64
    closes: bool = False
    is_split: bool = False
    needs: frozenset[str] = frozenset()

    @property
    def method(self) -> str:
        """The method of the requests."""
        return "POST" if self.sent else "GET"

    @property
    def least(self) -> int:
        """The least number of bytes of a response that is not compressed, 0 if unknown."""
        return 0 if self.body is None or "Accept-Encoding" in self.headers else len(self.body)

    @property
    def script(self) -> str:
        """The script for wrk, empty if it needs none."""
        post = f'wrk.method = "POST"\nwrk.body = string.rep("x", {self.sent})\n' if self.sent else ""
        return post + self.lua


_GZIP = {"Accept-Encoding": "gzip"}
ORIGIN = "https://shop.example"

CASES = {
    "small": Case("GET of 190 bytes, 64 keep-alive connections"),
    "varied": Case(
        "GET of 190 bytes as browsers and tracing send it: ten header lines, one of them never the same twice",
        headers=_VARIED,
        lua=_VARIED_LUA,
    ),
    "names": Case("GET of 190 bytes, 10,000 client names by turns", lua=_NAMES_LUA),
    "10k": Case("GET of 10 KB, 64 keep-alive connections", path="10k", body=bytes(SIZES["10k"])),
    "1m": Case("GET of 1 MB, 64 keep-alive connections", path="1m", body=bytes(SIZES["1m"])),
    "chunked": Case(
        "GET of 1 KB that the upstream compresses: gzip, of unknown length",
        path="chunked",
        headers=_GZIP,
        body=CHUNKED,
    ),
    "post": Case("POST of 1 KB, to which the upstream responds at once", sent=1024),
    "post64k": Case("POST of 64 KB", path="upload", sent=65_536, body=UPLOADED),
    "segments": Case(
        "POST of 1 KB, head and body in separate segments", path="upload", sent=1024, body=UPLOADED, is_split=True
    ),
    "upload": Case(
        "POST of 10 MB, 8 keep-alive connections",
        path="upload",
        sent=10_485_760,
        body=UPLOADED,
        connections=8,  # with 64, too many would be incomplete at the end
    ),
    "new": Case(
        "GET of 190 bytes, 64 clients, a new connection for each request",
        headers={"Connection": "close"},
        closes=True,
    ),
    "timeout": Case("GET of 190 bytes on a route with a timeout of 30 s", needs=frozenset({TIMEOUT})),
    "logged": Case("GET of 190 bytes, JSON access log to a file", needs=frozenset({LOG})),
    "balanced": Case(
        "GET of 190 bytes from 3 targets: least requests, health checks, concurrency limit",
        needs=frozenset({BALANCED}),
    ),
    "tls-upstream": Case("GET of 190 bytes from an upstream with TLS", needs=frozenset({TLS})),
    "cors": Case(
        "GET of 190 bytes by a page of an allowed origin", headers={"Origin": ORIGIN}, needs=frozenset({CORS})
    ),
    "refused": Case("GET that the rate limit refuses (429)", status=429, body=None, needs=frozenset({LIMITED})),
    "combined": Case(
        "POST of 1 KB, gzip response, timeout, access log and fallback",
        path="chunked",
        sent=1024,
        headers=_GZIP,
        body=CHUNKED,
        needs=frozenset({TIMEOUT, LOG, FALLBACK}),
    ),
}
# Measured in another way; see `benchmarks.load` and `benchmarks.memory`.
TITLES = {
    **{name: case.title for name, case in CASES.items()},
    "latency": "Added latency at 500 requests per second, in microseconds",
    "memory": "Resident memory in MB",
    "idle": "Resident memory with 10,000 idle connections",
    "active": "Resident memory with 1,000 requests that the upstream holds",
}
NEW_PROCESS = ("memory", "idle", "active")  # measured in a process that has allocated little yet, and once
BASIC = frozenset(name for name, case in CASES.items() if not case.needs) | {"latency", "memory"}


def needs_of(name: str) -> frozenset[str]:
    """Return the features that a case needs of the configuration."""
    return CASES[name].needs if name in CASES else frozenset()
