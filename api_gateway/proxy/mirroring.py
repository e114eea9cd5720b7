"""Mirroring: copies of a route's requests for another upstream. No request waits for a copy; `Mirrors` counts copies.

A copy takes no part in retries, breakers, outlier detection, adaptive limits and latencies, not even in those of the
upstream that gets it: the upstream selects a healthy target within its concurrency limit, and no outcome is recorded.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import httpx

from api_gateway.errors import Unavailable
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.http1.methods import IDEMPOTENT
from api_gateway.models import Clock
from api_gateway.proxy.edited_lines import EditedLinesCache
from api_gateway.proxy.head_editing import HeaderEdits
from api_gateway.transport.discarded_response import DiscardedResponse
from api_gateway.transport.pool import StaleConnection
from api_gateway.transport.upstream_call import UpstreamCall
from api_gateway.upstreams.upstream import Attempt
from api_gateway.upstreams.upstream_client import UpstreamClient

logger = logging.getLogger(__name__)

# The results of a copy other than the class of the status of a complete response.
BUSY, BODY_TOO_LARGE, INCOMPLETE, UNAVAILABLE = "busy", "body_too_large", "incomplete", "unavailable"
BROKEN_OFF, TIMED_OUT, RESPONSE_TOO_LARGE, CANCELLED = "error", "timeout", "response_too_large", "cancelled"
_STATUSES = ("0xx", "1xx", "2xx", "3xx", "4xx", "5xx")
MIRROR_RESULTS = (
    *_STATUSES[2:],
    *(BUSY, BODY_TOO_LARGE, INCOMPLETE, UNAVAILABLE, BROKEN_OFF, TIMED_OUT, RESPONSE_TOO_LARGE, CANCELLED),
)

# Framing is written anew, because the body of a copy is complete. A tunnel and interim responses are not for copies.
_CLOCK_STEP = 0.001  # seconds by which the event loop may call early
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

    def kept_lines(self, lines: bytes, facts: EditedLinesCache) -> bytes:
        """Return the header lines of a request that a copy has; they are kept with `facts`, see `HeadEditor`."""
        editor, known, kept = facts.edited
        if editor is not self or known is not lines:
            kept = self.edits.kept_lines(lines)
            facts.edited = self, lines, kept
        return kept

    @staticmethod
    def edits_of(removed: frozenset[bytes], *, keeps_credentials: bool) -> HeaderEdits:
        """Return the edits of a copy: they remove framing, credentials unless kept, and `removed` (lower case)."""
        return HeaderEdits(removed | _FRAMING | (frozenset() if keeps_credentials else CREDENTIAL_FIELDS))


class CopiedHead(NamedTuple):
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
        self._sent: dict[SentCopy, None] = {}  # in their order
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf  # the time of the timer

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
        """Send a copy: at once on an idle connection, else in a task that opens one."""
        client, head, now = copy.client, copy.head, self._clock()
        try:
            attempt = client.upstream.acquire(now, head.key, is_safe=head.method in IDEMPOTENT)
        except Unavailable:
            self.end(copy, UNAVAILABLE)
            return
        message = head.message(client.host_of(attempt.target, head.host), len(copy.body) if has_body else None)
        sent = SentCopy(self, copy, attempt, message + copy.body, now + copy.mirroring.timeout)
        self._sent[sent] = None
        if sent.end_at < self._due:
            self._watch(sent.end_at, now)
        sent.begin()

    def ended(self, sent: "SentCopy", result: str) -> None:
        """Count a copy that was sent, and return its place at the upstream."""
        del self._sent[sent]
        sent.attempt.release(self._clock())
        self.end(sent.copy, result)

    def end(self, copy: RequestCopy, result: str) -> None:
        """Count a copy that has ended."""
        self._in_flight[copy.route] -= 1
        self._observe(copy.route, result)

    async def close(self) -> None:
        """Abort all copies, and wait until their tasks have ended."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [sent.task for sent in self._sent if sent.task is not None]
        for sent in list(self._sent):
            sent.end(CANCELLED)
        await cancel_and_wait(*tasks)

    def _watch(self, end_at: float, now: float) -> None:
        """Look for copies that take too long at `end_at`, the first time at which one may."""
        if self._timer is not None:
            self._timer.cancel()
        self._due = end_at
        self._timer = asyncio.get_running_loop().call_later(end_at - now, self._break_off)

    def _break_off(self) -> None:
        """End the copies that take too long. One timer serves all, because nearly all copies end long before it."""
        self._timer, self._due = None, math.inf
        now = self._clock() + _CLOCK_STEP
        for sent in [one for one in self._sent if one.end_at <= now]:
            sent.end(TIMED_OUT)
        if self._sent:
            self._watch(min(one.end_at for one in self._sent), self._clock())


class SentCopy:
    """A copy from its sending to its end. `end` has an effect once; `task` opens a connection, if none was idle."""

    def __init__(self, mirrors: Mirrors, copy: RequestCopy, attempt: Attempt, message: bytes, end_at: float) -> None:
        """`end_at` is the time on the clock of `mirrors` at which it is broken off."""
        self.copy = copy
        self.attempt = attempt
        self.end_at = end_at
        self.task: asyncio.Task[None] | None = None
        self._message = message
        self._mirrors: Mirrors | None = mirrors
        self._response: DiscardedResponse | None = None

    def __repr__(self) -> str:
        return f"<SentCopy {self.copy!r} [{self._response}]>"

    def begin(self) -> None:
        """Send it, or begin to open a connection for it."""
        idle = self.copy.client.idle_connection(self.attempt.target, None)
        if idle is None:
            self._connect()
        else:
            self._start(idle)

    def end(self, result: str) -> None:
        """Release the connection, and count the copy."""
        mirrors, self._mirrors = self._mirrors, None
        if mirrors is None:
            return
        if self.task is not None:
            self.task.cancel()
        if self._response is not None:
            self._response.close()
        mirrors.ended(self, result)

    def _connect(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._send_anew(), name="mirrored request")

    async def _send_anew(self) -> None:
        client, target = self.copy.client, self.attempt.target
        try:
            connection = await client.connection(target, None, client.timeouts["connect"], _ignore, is_fresh=True)
        except httpx.TransportError as error:
            self.task = None
            self.end(_result_of(error))
            return
        self.task = None
        if self._mirrors is None:  # the cancellation came too late
            connection.close()
        else:
            self._start(connection)

    def _start(self, connection: UpstreamCall) -> None:
        copy = self.copy
        self._response = response = DiscardedResponse(
            connection, copy.head.method, copy.client.timeouts, copy.mirroring.max_response_bytes, self._on_end
        )
        try:
            connection.start(response, self._message)
        except Exception:  # what becomes of a copy must not reach the request that is copied
            logger.exception("route %s: a request could not be copied", copy.route)
            self.end(BROKEN_OFF)

    def _on_end(self, response: DiscardedResponse) -> None:
        error = response.error
        response.error = None
        if error is None:
            self.end(RESPONSE_TOO_LARGE if response.is_too_large else _STATUSES[response.status // 100])
        elif isinstance(error, StaleConnection) and self.copy.head.method in IDEMPOTENT and self._mirrors is not None:
            response.close()
            self._connect()  # of a new connection, which is never stale
        else:
            self.end(_result_of(error))


def _result_of(error: Exception) -> str:
    return TIMED_OUT if isinstance(error, httpx.TimeoutException) else BROKEN_OFF


def _ignore() -> None:
    """Take no note of a connection that is being opened."""
