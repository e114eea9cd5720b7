"""A request on its way upstream: its body as it arrives, the client's leaving meanwhile, and how it is rendered."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx

from api_gateway.http1.asgi import DEADLINE, FIELDS, Scope, ServerExtension
from api_gateway.http1.headers import (
    BODILESS,
    REQUEST_TIMEOUT,
    Fields,
    forwardable_interim,
    forwardable_trailers,
    framing,
    rewrite_request,
)
from api_gateway.models import Exchange, HeaderList
from api_gateway.proxy.deadline import Deadline
from api_gateway.proxy.request_body import StreamedBody
from api_gateway.resilience.fair_shares import holder_of
from api_gateway.transport.request import NO_BODY, LeanRequest, NoBody
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream_client import UpstreamClient

_NO_LENGTH = frozenset({204})
_MAX_HOP_DIGITS = 9  # of Max-Forwards; one that says more says nothing


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
        extension: ServerExtension | None,
        target: bytes,
        is_trusted: bool,  # noqa: FBT001 - one of these is made for every request
        protected: frozenset[bytes],
    ) -> None:
        self._scope = scope
        self._is_trusted = is_trusted
        self._protected = protected
        self.link = extension
        self.target = target
        self.fields: Fields = scope[FIELDS]
        self.framing = framing(self.fields)
        self.body: StreamedBody | NoBody = NO_BODY
        self.deadline: Deadline | None = scope.get(DEADLINE)
        self.timer: asyncio.Timeout | None = None  # of the deadline, while it runs
        self.headers: HeaderList = scope["headers"] if extension is None else extension.headers
        self.expects_continue = b"expect" in self.fields and self.fields[b"expect"][0].lower() == b"100-continue"
        self.upgrade = extension is not None and extension.upgrade == b"websocket" and self.framing is None

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
            self.link.send_interim(status, reason, forwardable_interim(headers))

    def trailers(self) -> HeaderList:
        """Return the trailers that came behind the body."""
        return [] if self.link is None else forwardable_trailers(self.link.trailers, self._protected)

    def _limits(self, upstream_client: UpstreamClient, now: float) -> Mapping[str, float]:
        """Return the time limits of a try: connecting takes half of what is left at most, so that another can follow.

        Of a client's own deadline that would make every host look as slow as the client is impatient.
        """
        if self.deadline is None or not self.deadline.is_upstream_fault:
            return upstream_client.limits
        half = self.deadline.remaining(now) / 2
        return {**upstream_client.limits, "connect": min(upstream_client.limits["connect"], half)}

    def render(self, exchange: Exchange, upstream_client: UpstreamClient, target: Target, now: float) -> httpx.Request:
        """Return the request for one target, with what is left of its time."""
        origin = upstream_client.origins[target]
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
            "timeout": self._limits(upstream_client, now),
            "hooks": self,
            "holder": holder_of(exchange.client, exchange.peer),
        }
        if not upstream_client.is_native:
            return origin.plain_request(exchange.method, headers, self.target, stream=self.body, extensions=extensions)
        if self.upgrade and self.link is not None:
            headers += [(b"connection", b"Upgrade"), (b"upgrade", self.link.upgrade)]
        return LeanRequest(exchange.method, origin, headers, self.body, self.framing, extensions)


def spelt_target(scope: Scope) -> bytes:
    """Return path and query as another server than ours tells them."""
    query: bytes = scope["query_string"]
    path: bytes = scope["raw_path"]
    return path + b"?" + query if query else path
