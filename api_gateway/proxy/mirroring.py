"""Mirroring: copies of a route's requests for another upstream. No request waits for a copy; `Mirrors` counts copies.

A copy takes no part in retries, breakers, outlier detection, adaptive limits and latencies, not even in those of the
upstream that gets it: the upstream selects a healthy target within its concurrency limit, and no outcome is recorded.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from api_gateway.errors import Unavailable
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.http1.methods import IDEMPOTENT
from api_gateway.models import Clock
from api_gateway.proxy.head_editing import HeaderEdits
from api_gateway.transport.discarded_response import DiscardedResponse
from api_gateway.transport.pool import StaleConnection
from api_gateway.transport.upstream_call import UpstreamCall
from api_gateway.upstreams.upstream_client import UpstreamClient

# What becomes of a copy, besides the class of the status of a complete response.
BUSY, BODY_TOO_LARGE, INCOMPLETE, UNAVAILABLE = "busy", "body_too_large", "incomplete", "unavailable"
BROKEN_OFF, TIMED_OUT, RESPONSE_TOO_LARGE, CANCELLED = "error", "timeout", "response_too_large", "cancelled"
_STATUSES = ("0xx", "1xx", "2xx", "3xx", "4xx", "5xx")
MIRROR_RESULTS = (
    *_STATUSES[2:],
    *(BUSY, BODY_TOO_LARGE, INCOMPLETE, UNAVAILABLE, BROKEN_OFF, TIMED_OUT, RESPONSE_TOO_LARGE, CANCELLED),
)

# Framing is written anew, as the body of a copy is complete. A tunnel and interim responses are not for copies.
_FRAMING = frozenset(
    {b"content-length", b"transfer-encoding", b"te", b"trailer", b"expect", b"upgrade", b"connection"}
)
CREDENTIAL_FIELDS = frozenset(
    {b"authorization", b"proxy-authorization", b"cookie", b"x-api-key", b"api-key", b"apikey", b"x-apikey"}
    | {b"x-auth-token", b"x-access-token", b"x-csrf-token", b"x-xsrf-token", b"x-amz-security-token"}
)


@dataclass(frozen=True, slots=True)
class Mirroring:
    """Which requests of a route are copied, and the limits of copies: sizes in bytes, `timeout` in seconds."""

    upstream: str
    share: float
    max_in_flight: int
    max_body_bytes: int
    max_response_bytes: int
    timeout: float
    keeps_credentials: bool
    edits: HeaderEdits

    @staticmethod
    def edits_of(removed: frozenset[bytes], *, keeps_credentials: bool) -> HeaderEdits:
        """Return what a copy loses: framing, credentials unless they are kept, and `removed` (lower case)."""
        return HeaderEdits(removed | _FRAMING | (frozenset() if keeps_credentials else CREDENTIAL_FIELDS))


@dataclass(frozen=True, slots=True)
class CopiedHead:
    """The head of a copy. `fields` are lines with a line break before each; `host` is that of the client."""

    method: str
    target: bytes
    host: bytes
    fields: bytes
    key: str  # for load balancing

    def message(self, host: bytes, length: int | None) -> bytes:
        """Return the head for a target; `length` None: there is no body."""
        framing = b"" if length is None else b"\r\ncontent-length: %d" % length
        line = b"%b %b HTTP/1.1" % (self.method.encode(), self.target)
        return b"%b\r\nhost: %b%b%b\r\n\r\n" % (line, host, self.fields, framing)


class RequestCopy:
    """The copy of one request while its body arrives.

    States: arriving, ended (sent or dropped). It is in flight from its creation on; `complete` and `drop` end the
    arrival, and only the first call of either counts.
    """

    def __init__(
        self, mirrors: "Mirrors", route: str, mirroring: Mirroring, client: UpstreamClient, head: CopiedHead
    ) -> None:
        self.route = route
        self.mirroring = mirroring
        self.client = client
        self.head = head
        self.body = bytearray()
        self._mirrors: Mirrors | None = mirrors

    def __repr__(self) -> str:
        return f"<RequestCopy {self.head.method} of {self.route!r} [{len(self.body)} bytes]>"

    def add(self, piece: bytes) -> None:
        """Take a piece of the body; drop the copy if the body is too large."""
        if self._mirrors is None:
            return
        if len(self.body) + len(piece) > self.mirroring.max_body_bytes:
            self.drop(BODY_TOO_LARGE)
            return
        self.body += piece

    def complete(self, *, has_body: bool) -> None:
        """Send the copy."""
        mirrors, self._mirrors = self._mirrors, None
        if mirrors is not None:
            mirrors.send(self, has_body=has_body)

    def drop(self, result: str) -> None:
        """End the copy unsent."""
        mirrors, self._mirrors = self._mirrors, None
        self.body.clear()
        if mirrors is not None:
            mirrors.end(self, result)


class Mirrors:
    """The copies in flight of a process, under all its configurations. To be closed before the upstreams."""

    def __init__(
        self, *, clock: Clock, draw: Callable[[], float], observe: Callable[[str, str], None], in_flight: Counter[str]
    ) -> None:
        """`draw` returns random numbers from 0 to 1. `observe` is called with route and result at a copy's end.

        `in_flight` has the copies in flight by route.
        """
        self._clock = clock
        self._draw = draw
        self._observe = observe
        self._in_flight = in_flight
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Mirrors [{self._in_flight.total()} in flight]>"

    def admits(self, route: str, mirroring: Mirroring, length: int | None) -> bool:
        """Decide whether a request is copied; `length` is that of its body, None if unknown."""
        if mirroring.share < 1 and self._draw() >= mirroring.share:
            return False
        if length is not None and length > mirroring.max_body_bytes:
            self._observe(route, BODY_TOO_LARGE)
            return False
        if self._in_flight[route] >= mirroring.max_in_flight:
            self._observe(route, BUSY)
            return False
        return True

    def begin(self, route: str, mirroring: Mirroring, client: UpstreamClient, head: CopiedHead) -> RequestCopy:
        """Return a copy, whose body may follow; `admits` was true."""
        self._in_flight[route] += 1
        return RequestCopy(self, route, mirroring, client, head)

    def send(self, copy: RequestCopy, *, has_body: bool) -> None:
        """Send a copy in a task of its own."""
        task = asyncio.get_running_loop().create_task(self._send(copy, has_body=has_body), name="mirrored request")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def end(self, copy: RequestCopy, result: str) -> None:
        """Count a copy that has ended."""
        self._in_flight[copy.route] -= 1
        self._observe(copy.route, result)

    async def close(self) -> None:
        """Cancel all copies and wait until they have ended."""
        await cancel_and_wait(*self._tasks)

    async def _send(self, copy: RequestCopy, *, has_body: bool) -> None:
        result = BROKEN_OFF
        try:
            async with asyncio.timeout(copy.mirroring.timeout):
                result = await self._result(copy, has_body=has_body)
        except (TimeoutError, httpx.TimeoutException):
            result = TIMED_OUT
        except httpx.TransportError:
            result = BROKEN_OFF
        except asyncio.CancelledError:
            result = CANCELLED
            raise
        finally:
            self.end(copy, result)

    async def _result(self, copy: RequestCopy, *, has_body: bool) -> str:
        client, head = copy.client, copy.head
        try:
            attempt = client.upstream.acquire(self._clock(), head.key, is_safe=head.method in IDEMPOTENT)
        except Unavailable:
            return UNAVAILABLE
        target = attempt.target
        try:
            message = head.message(client.host_of(target, head.host), len(copy.body) if has_body else None)
            idle = client.idle_connection(target, None)
            if idle is not None:
                try:
                    return await _exchange(idle, copy, message)
                except StaleConnection:
                    if head.method not in IDEMPOTENT:
                        raise
            connection = await client.connection(target, None, client.limits["connect"], _ignore, is_fresh=True)
            return await _exchange(connection, copy, message)
        finally:
            attempt.release(self._clock())


async def _exchange(connection: UpstreamCall, copy: RequestCopy, message: bytes) -> str:
    """Send a copy on a connection, and return its result. Raises httpx.TransportError."""
    response = DiscardedResponse(connection, copy.head.method, copy.client.limits, copy.mirroring.max_response_bytes)
    try:
        connection.start(response, message + copy.body)
        await response.ended
        error = response.error
        if error is not None:
            response.error = None  # a raised error refers to frames that refer to this: a cycle
            raise error
        return RESPONSE_TOO_LARGE if response.is_too_large else _STATUSES[response.status // 100]
    finally:
        response.close()


def _ignore() -> None:
    """Take no note of a connection that is being opened."""
