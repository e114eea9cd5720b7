"""The request to the upstream: header fields, body, deadline and interim responses, the same for each attempt."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx

from api_gateway.http1.asgi import FIELDS, Scope, ServerExtension
from api_gateway.http1.fast_parser import pairs_of
from api_gateway.http1.forwarded import forwarding_fields, replaced_fields
from api_gateway.http1.headers import (
    BODILESS,
    REQUEST_TIMEOUT,
    Fields,
    forwardable_interim,
    forwardable_trailers,
    framing,
    rewrite_request,
)
from api_gateway.http1.via import Via
from api_gateway.models import Exchange, HeaderList
from api_gateway.observability.trace_context import without_trace_fields
from api_gateway.proxy.admission import RequestPlan
from api_gateway.proxy.request_body import StreamedBody
from api_gateway.proxy.url_rewriting import FORWARDED_PREFIX, Authorities
from api_gateway.resilience.fair_shares import holder_of
from api_gateway.transport.request import NO_BODY, LeanRequest, NoBody
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream_client import UpstreamClient

_NO_LENGTH = frozenset({204})
_MAX_HOP_DIGITS = 9  # of Max-Forwards; a longer value is ignored


class UpstreamRequest:
    """The request to the upstream, which `render` adapts to the target of an attempt; also a `ResponseListener`."""

    __slots__ = (
        "_facts",
        "_never_trailing",
        "_protected",
        "_scope",
        "_via",
        "authorities",
        "body",
        "content_cost",
        "deadline",
        "expects_continue",
        "extension",
        "fields",
        "framing",
        "headers",
        "target",
        "timer",
        "upgrade",
        "url_rewriter",
        "waited_before_head",
    )

    def __init__(
        self,
        plan: RequestPlan,
        scope: Scope,
        extension: ServerExtension | None,
        protected: frozenset[bytes],
        never_trailing: frozenset[bytes],
        via: Via,
    ) -> None:
        self._scope = scope
        self._never_trailing = never_trailing
        self._facts = plan.facts
        self._protected = protected
        self._via = via
        self.extension = extension
        self.target = plan.target
        self.fields: Fields = scope[FIELDS]
        self.framing = framing(self.fields)
        self.body: StreamedBody | NoBody = NO_BODY
        self.content_cost = None if plan.route is None else plan.route.content_cost
        self.url_rewriter = None if plan.route is None else plan.route.url_rewriter
        self.authorities = Authorities(())  # of the last attempt
        self.deadline = plan.deadline
        self.waited_before_head = 0.0  # seconds for which the attempt has waited for the client to send
        self.timer: asyncio.Timeout | None = None  # of the deadline, while it runs
        self.headers: HeaderList = scope["headers"] if extension is None else extension.headers
        withheld = plan.facts.forged
        if plan.facts.credentials and (plan.route is None or not plan.route.forward_credentials):
            withheld = withheld + plan.facts.credentials
        if withheld:
            self.headers = _without(self.headers, withheld)
        if plan.exchange.trace is not None:
            self.headers = without_trace_fields(self.headers)
        if plan.exchange.credential is not None and plan.exchange.credential.fields:
            self.headers = [*self.headers, *plan.exchange.credential.fields]
        self.expects_continue = b"expect" in self.fields and self.fields[b"expect"][0].lower() == b"100-continue"
        self.upgrade = extension is not None and extension.upgrade == b"websocket" and self.framing is None

    def __repr__(self) -> str:
        return f"<UpstreamRequest {self._scope['method']} {self.target!r} [{self.body!r}]>"

    def must_not_forward(self) -> bool:
        """Tell whether `Max-Forwards` is 0; decrement it otherwise (RFC 9110 section 7.6.2). Invalid values pass."""
        hops = self.fields[b"max-forwards"][0]
        if not hops.isdigit() or len(hops) > _MAX_HOP_DIGITS:
            return False
        left = b"%d" % (int(hops) - 1)
        self.headers = [(name, left if name.lower() == b"max-forwards" else value) for name, value in self.headers]
        return int(hops) == 0

    @property
    def is_overdue(self) -> bool:
        """True once the deadline has passed and the task is being cancelled for that."""
        return self.timer is not None and self.timer.expired()

    @property
    def accepts_trailers(self) -> bool:
        """True if the client accepts trailers (RFC 9110 section 6.5.1), and its response can be chunked."""
        return (
            self.extension is not None
            and self._scope["method"] != "HEAD"
            and self._scope["http_version"] != "1.0"
            and any(b"trailers" in value.lower() for value in self.fields.get(b"te", ()))
        )

    @property
    def lengthless(self) -> frozenset[int]:
        """Statuses whose responses get no Content-Length: 204; with servers other than the gateway's own also 304."""
        return _NO_LENGTH if self.extension is not None else BODILESS

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """Forward an interim response (RFC 9110 section 15.2)."""
        if self.extension is not None:
            self.extension.send_interim(status, reason, forwardable_interim(headers, self._via.field("1.1")))

    def trailers(self) -> HeaderList:
        """Return the request's trailer fields that are forwarded."""
        return [] if self.extension is None else forwardable_trailers(self.extension.trailers, self._never_trailing)

    def continue_body(self) -> None:
        """Go on receiving the body from the client after the response is complete, see `ResponseListener`."""
        if self.extension is not None:
            self.extension.continue_body()

    def discard_body(self) -> None:
        """Let the server discard the rest of the body."""
        if self.extension is not None:
            self.extension.discard_body()

    def on_writable(self) -> None:
        """Do nothing: the task that sends the body waits by itself."""

    def _limits(self, upstream_client: UpstreamClient, now: float) -> Mapping[str, float]:
        """Return the timeouts of an attempt; connecting may take half of the remaining time, which allows a retry.

        A client's own deadline does not shorten it: a short one would make each target appear unreachable.
        """
        if self.deadline is None or self.deadline.is_of_client:
            return upstream_client.limits
        half = self.deadline.remaining(now) / 2
        return {**upstream_client.limits, "connect": min(upstream_client.limits["connect"], half)}

    @property
    def _client_host(self) -> bytes:
        """The `Host` of the client, empty if there is none."""
        return self.fields.get(b"host", (b"",))[0]

    def set_authorities(self, upstream_client: UpstreamClient, target: Target) -> None:
        """Set the hosts by which the upstream may refer to itself in a response of `target`."""
        if self.url_rewriter is not None:
            self.authorities = Authorities.of(upstream_client, target, self._client_host)

    def render(self, exchange: Exchange, upstream_client: UpstreamClient, target: Target, now: float) -> httpx.Request:
        """Return the request for one target, with its timeouts and the remaining time at `now`."""
        origin = upstream_client.origins[target]
        scope, facts = self._scope, self._facts
        headers = rewrite_request(
            self.headers,
            self.fields,
            host=upstream_client.host_of(target, self._client_host),
            forwarding=forwarding_fields(
                self.fields,
                peer=scope["client"][0] if scope.get("client") else "unknown",
                scheme=scope["scheme"],
                is_trusted=facts.is_trusted,
                forwarding=facts.forwarding,
                reported=facts.reported,
            ),
            replaced=replaced_fields(facts.forwarding, facts.is_trusted),
            request_id=exchange.id.encode(),
            via=self._via.field(scope["http_version"]),
            protected=self._protected,
        )
        self.set_authorities(upstream_client, target)
        if self.url_rewriter is not None and self.url_rewriter.prefix:
            headers.insert(1, (FORWARDED_PREFIX, self.url_rewriter.prefix))
        if b"expect" in self.fields:
            if self.extension is None:  # the server sends 100 (Continue) itself
                headers = [pair for pair in headers if pair[0].lower() != b"expect"]
            elif self.expects_continue:
                self.extension.defer_continue()
        if self.deadline is not None and self.deadline.is_forwarded:
            headers.append((REQUEST_TIMEOUT, self.deadline.header_value(now)))
        if exchange.trace is not None:
            headers += pairs_of(exchange.trace.fields())
        extensions: dict[str, Any] = {
            "target": self.target,
            "timeout": self._limits(upstream_client, now),
            "hooks": self,
            "holder": holder_of(exchange.client, exchange.peer),
        }
        if not upstream_client.is_native:
            return origin.plain_request(exchange.method, headers, self.target, stream=self.body, extensions=extensions)
        if self.upgrade and self.extension is not None:
            headers += [(b"connection", b"Upgrade"), (b"upgrade", self.extension.upgrade)]
        return LeanRequest(exchange.method, origin, headers, self.body, self.framing, extensions)


def raw_target(scope: Scope) -> bytes:
    """Return path and query from the ASGI scope, for servers other than the gateway's own."""
    query: bytes = scope["query_string"]
    path: bytes = scope["raw_path"]
    return path + b"?" + query if query else path


def _without(headers: HeaderList, withheld: HeaderList) -> HeaderList:
    """Return header fields without those of `withheld`, whose values have no surrounding white space."""
    removed = {(name.lower(), value) for name, value in withheld}
    return [(name, value) for name, value in headers if (name.lower(), value.strip(b" \t")) not in removed]
