"""A request on its way upstream: its body as it arrives, the client's leaving meanwhile, and how it is rendered."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import httpx

from api_gateway.deadline import Deadline
from api_gateway.errors import BodyTooLarge, ClientDisconnected
from api_gateway.headers import (
    REQUEST_TIMEOUT,
    Fields,
    forwardable_interim,
    forwardable_trailers,
    framing,
    rewrite_request,
)
from api_gateway.heads import BODILESS
from api_gateway.link import ServerExtension
from api_gateway.models import Exchange, HeaderList
from api_gateway.outgoing import NO_BODY, LeanRequest, NoBody
from api_gateway.service import UpstreamClient
from api_gateway.shares import holder_of
from api_gateway.targets import Target

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

FIELDS = "gateway.fields"  # the key of the scope under which the request's headers lie by name
DEADLINE = "gateway.deadline"  # and its deadline, if it has one
LEFT = "The client left before its answer was complete."
PATIENCE = 0.05  # seconds an upstream may take before we also watch for the client's leaving
_NO_LENGTH = frozenset({204})
_MAX_HOP_DIGITS = 9  # of Max-Forwards; one that says more says nothing


class RequestBody(httpx.AsyncByteStream):
    """The client's body, piece by piece as it arrives; raises BodyTooLarge and ClientDisconnected.

    The first `keep` bytes are kept, so that it can be sent from its start again; one that has more of them cannot.
    """

    def __init__(self, receive: Receive, limit: int, exchange: Exchange, keep: int = 0) -> None:
        self._receive = receive
        self._limit = limit
        self._exchange = exchange
        self._keep = keep
        self._kept: list[bytes] = []
        self.is_started = False
        self.is_finished = False
        self._waited = 0.0  # seconds, for pieces that have come
        self._awaited_since: float | None = None  # the next piece

    @property
    def is_awaited(self) -> bool:
        """True while the next piece is waited for; also after that was ended by the failure of an attempt."""
        return self._awaited_since is not None

    @property
    def waited(self) -> float:
        """Seconds for which the attempt has waited for the client to send."""
        if self._awaited_since is None:
            return self._waited
        return self._waited + asyncio.get_running_loop().time() - self._awaited_since

    @property
    def is_kept(self) -> bool:
        """True while it can be sent from its start."""
        return not self.is_started or self._exchange.bytes_in <= self._keep

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield what was kept, then what the client sends."""
        if not self.is_kept:
            raise RuntimeError("a body that was not kept cannot be sent again")
        self.is_started = True
        self._waited, self._awaited_since = 0.0, None
        for piece in tuple(self._kept):
            yield piece
        clock = asyncio.get_running_loop().time
        while not self.is_finished:
            self._awaited_since = since = clock()
            message = await self._receive()
            self._waited, self._awaited_since = self._waited + clock() - since, None
            if message["type"] == "http.disconnect":
                raise ClientDisconnected("The client left while sending.")
            piece = message.get("body", b"")
            self._exchange.bytes_in += len(piece)
            if self._exchange.bytes_in > self._limit:
                raise body_too_large(self._limit)
            self.is_finished = not message.get("more_body", False)
            if piece:
                self._hold(piece)
                yield piece

    def _hold(self, piece: bytes) -> None:
        if self._exchange.bytes_in <= self._keep:
            self._kept.append(piece)
        else:
            self._kept.clear()


class SentBody(NoBody):
    """The body of a request that has been sent whole already; `kept` is None if it cannot be once more."""

    is_started = True

    def __init__(self, kept: bytes | None) -> None:
        self._kept = kept
        self.is_kept = kept is not None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield it again."""
        if self._kept:
            yield self._kept


class LeavingWatch:
    """Turns the cancellation by which our own server tells that the client has left into ClientDisconnected.

    Used as `with`. Raises it at once if the client has left before.
    """

    def __init__(self, link: ServerExtension) -> None:
        self._link = link

    def __enter__(self) -> None:
        """Ask to be told."""
        if self._link.is_disconnected:
            raise ClientDisconnected(LEFT)
        self._link.on_leaving = self._link.task.cancel

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop being told."""
        self._link.on_leaving = None
        if kind is asyncio.CancelledError and self._link.is_disconnected and self._link.task.uncancel() == 0:
            raise ClientDisconnected(LEFT) from error


class DisconnectWatch:
    """Ends the current task once the client has left, before a server that does not tell so by itself.

    It asks after `PATIENCE` only: most answers are faster. Used as `with`; what the task was doing is cancelled, and
    leaves the block as ClientDisconnected.
    """

    def __init__(self, receive: Receive, body: RequestBody | NoBody) -> None:
        self._receive = receive
        self._body = body
        self._has_left = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        """Start the clock."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine that runs is in a task
        self._task = task
        self._timer = loop.call_later(PATIENCE, self._start, loop)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop looking; turn our own cancellation into ClientDisconnected."""
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._has_left:
            if kind is asyncio.CancelledError and self._task.uncancel() == 0:
                raise ClientDisconnected(LEFT) from error
            self._task.uncancel()

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._body.is_finished:
            self._watcher = loop.create_task(self._watch())
        else:  # the body's own reading notices a client that leaves
            self._timer = loop.call_later(PATIENCE, self._start, loop)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":  # noqa: ASYNC110 - the server tells, when asked
            await asyncio.sleep(PATIENCE)  # it, or a middleware, may repeat that the body is complete
        self._has_left = True
        self._task.cancel()


class UpstreamRequest:
    """What is sent upstream, the same for every try but for the target; also the hooks of the transport."""

    __slots__ = (
        "_is_trusted",
        "_protected",
        "_scope",
        "body",
        "deadline",
        "expects_continue",
        "fields",
        "framing",
        "headers",
        "link",
        "target",
        "timer",
        "upgrade",
    )

    def __init__(
        self,
        scope: Scope,
        link: ServerExtension | None,
        target: bytes,
        is_trusted: bool,  # noqa: FBT001 - one of these is made for every request
        protected: frozenset[bytes],
    ) -> None:
        self._scope = scope
        self._is_trusted = is_trusted
        self._protected = protected
        self.link = link
        self.target = target
        self.fields: Fields = scope[FIELDS]
        self.framing = framing(self.fields)
        self.body: RequestBody | NoBody = NO_BODY
        self.deadline: Deadline | None = scope.get(DEADLINE)
        self.timer: asyncio.Timeout | None = None  # of the deadline, while it runs
        self.headers: HeaderList = scope["headers"] if link is None else link.headers
        self.expects_continue = b"expect" in self.fields and self.fields[b"expect"][0].lower() == b"100-continue"
        self.upgrade = link is not None and link.upgrade == b"websocket" and self.framing is None

    def ends_here(self) -> bool:
        """Tell whether `Max-Forwards` forbids another hop; take one off otherwise."""
        hops = self.fields[b"max-forwards"][0]
        if not hops.isdigit() or len(hops) > _MAX_HOP_DIGITS:
            return False
        left = b"%d" % (int(hops) - 1)
        self.headers = [(name, left if name.lower() == b"max-forwards" else value) for name, value in self.headers]
        return int(hops) == 0

    @property
    def is_overdue(self) -> bool:
        """True while its task is being cancelled because its deadline has passed."""
        return self.timer is not None and self.timer.expired()

    @property
    def takes_trailers(self) -> bool:
        """True if the client said that it reads trailers (RFC 9110 section 6.5.1), and gets an answer with chunks."""
        return (
            self.link is not None
            and self._scope["method"] != "HEAD"
            and self._scope["http_version"] != "1.0"
            and any(b"trailers" in value.lower() for value in self.fields.get(b"te", ()))
        )

    @property
    def lengthless(self) -> frozenset[int]:
        """The statuses whose answers may announce no length: 204, and before another server than ours 304 too."""
        return _NO_LENGTH if self.link is not None else BODILESS

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """Pass on an interim answer (RFC 9110 section 15.2)."""
        if self.link is not None:
            self.link.inform(status, reason, forwardable_interim(headers))

    def trailers(self) -> HeaderList:
        """Return the trailers that came behind the body."""
        return [] if self.link is None else forwardable_trailers(self.link.trailers, self._protected)

    def _limits(self, service: UpstreamClient, now: float) -> Mapping[str, float]:
        """Return the time limits of a try: connecting takes half of what is left at most, so that another can follow.

        Of a client's own deadline that would make every host look as slow as the client is impatient.
        """
        if self.deadline is None or not self.deadline.is_upstream_fault:
            return service.limits
        half = self.deadline.remaining(now) / 2
        return {**service.limits, "connect": min(service.limits["connect"], half)}

    def render(self, exchange: Exchange, service: UpstreamClient, target: Target, now: float) -> httpx.Request:
        """Return the request for one target, with what is left of its time."""
        origin = service.origins[target]
        scope = self._scope
        headers = rewrite_request(
            self.headers,
            self.fields,
            host=origin.netloc,
            peer=scope["client"][0] if scope.get("client") else "unknown",
            scheme=scope["scheme"],
            request_id=exchange.id.encode(),
            version=scope["http_version"],
            is_trusted=self._is_trusted,
            protected=self._protected,
        )
        if b"expect" in self.fields:
            if self.link is None:  # its server asks for the body by itself
                headers = [pair for pair in headers if pair[0].lower() != b"expect"]
            elif self.expects_continue:
                self.link.defer_continue()
        if self.deadline is not None and self.deadline.is_passed_on:
            headers.append((REQUEST_TIMEOUT, self.deadline.header_value(now)))
        extensions: dict[str, Any] = {
            "target": self.target,
            "timeout": self._limits(service, now),
            "hooks": self,
            "holder": holder_of(exchange.client, exchange.peer),
        }
        if not service.is_native:
            return origin.plain_request(exchange.method, headers, self.target, stream=self.body, extensions=extensions)
        if self.upgrade and self.link is not None:
            headers += [(b"connection", b"Upgrade"), (b"upgrade", self.link.upgrade)]
        return LeanRequest(exchange.method, origin, headers, self.body, self.framing, extensions)


def spelt_target(scope: Scope) -> bytes:
    """Return path and query as another server than ours tells them."""
    query: bytes = scope["query_string"]
    path: bytes = scope["raw_path"]
    return path + b"?" + query if query else path


def body_too_large(limit: int) -> BodyTooLarge:
    """Return the refusal of a body; the connection is closed, as the rest of it may still come."""
    return BodyTooLarge(f"The body is larger than {limit} bytes.", headers={"connection": "close"})
