"""Everything the gateway can say no with; each error knows its status, its reason and whether a retry is safe.

    GatewayError
    ├── RequestRefused      the request itself: 4xx
    │   ├── BadRequest, ClientIdInvalid, InvalidValue
    │   ├── Unauthorized, Forbidden
    │   ├── NoRoute, MethodNotAllowed
    │   ├── BodyTooLarge, HeadersTooLarge, RequestTimeout
    │   └── RateLimited, CostExceedsCapacity
    ├── Unavailable         the gateway declines to try: 503
    │   ├── CircuitOpen, NoHealthyUpstream, Draining, StoreUnavailable
    │   └── Overloaded
    │       └── Shed        more is under way than can be served well
    ├── UpstreamFailed      it tried and the upstream failed: 502, 504
    │   └── UpstreamConnectError, UpstreamReset, UpstreamProtocolError, UpstreamTimeout
    ├── InternalError       a defect of the gateway: 500
    └── ClientDisconnected  nobody is left to answer: 499 in the log

Nothing here sends or logs; `problem` only renders the body of RFC 9457.
"""

import math
from collections.abc import Iterator, Mapping
from enum import StrEnum
from http import HTTPStatus
from typing import Any, ClassVar

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
REDUCED_CAPACITY = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


# Exit codes
STARTUP_FAILED = 3  # uvicorn's own for it
DRAIN_INCOMPLETE = 4  # not everything was answered in the time to drain
BLOCKED = 5  # the event loop did not turn any more


class Reason(StrEnum):
    """The closed list of causes, the same word in body, log, metric and documentation."""

    RATE_LIMITED = "rate_limited"
    COST_EXCEEDS_CAPACITY = "cost_exceeds_capacity"
    CIRCUIT_OPEN = "circuit_open"
    NO_HEALTHY_UPSTREAM = "no_healthy_upstream"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    STORE_UNAVAILABLE = "store_unavailable"
    UPSTREAM_CONNECT_ERROR = "upstream_connect_error"
    UPSTREAM_RESET = "upstream_reset"
    UPSTREAM_PROTOCOL_ERROR = "upstream_protocol_error"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    NO_ROUTE = "no_route"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    CLIENT_ID_INVALID = "client_id_invalid"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    BODY_TOO_LARGE = "body_too_large"
    HEADERS_TOO_LARGE = "headers_too_large"
    REQUEST_TIMEOUT = "request_timeout"
    BAD_REQUEST = "bad_request"
    INVALID_VALUE = "invalid_value"
    INTERNAL_ERROR = "internal_error"
    CLIENT_DISCONNECTED = "client_disconnected"


class Fault(StrEnum):
    """Who is at fault for an error.

    TARGET is at fault where no connection to it could be made, which no client can bring about; for an UPSTREAM's
    fault a request may have been the cause. Where several may be, it is NOBODY's.
    """

    CLIENT = "client"
    UPSTREAM = "upstream"
    TARGET = "target"
    GATEWAY = "gateway"
    NOBODY = "nobody"


class GatewayError(Exception):
    """An answer the gateway makes by itself.

    `retry_after` is in seconds, as exact as it is known, or None where waiting cannot help. `headers` go on the
    answer, `extra` into its problem body. `is_retry_safe` says that nothing of the request reached an upstream,
    `fault` who is at fault unless more is known (see `proxy.faults.fault_of`).
    """

    status: ClassVar[int] = 500
    reason: ClassVar[Reason] = Reason.INTERNAL_ERROR
    problem_type: ClassVar[str] = "about:blank"
    is_retry_safe: ClassVar[bool] = False
    fault: ClassVar[Fault] = Fault.GATEWAY

    def __init__(
        self,
        detail: str,
        *,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))


class RequestRefused(GatewayError):
    """The request cannot be served as it is."""

    status = 400
    reason = Reason.BAD_REQUEST
    fault = Fault.CLIENT


class BadRequest(RequestRefused):
    """The request is malformed."""


class ClientIdInvalid(RequestRefused):
    """The client's identifier is not 1 to 128 visible ASCII characters, or was sent twice."""

    reason = Reason.CLIENT_ID_INVALID


class InvalidValue(RequestRefused):
    """The body of an operator endpoint names something unusable, or is not JSON by its `Content-Type`."""

    status = 422
    reason = Reason.INVALID_VALUE


class Unauthorized(RequestRefused):
    """An operator endpoint was called without a valid token."""

    status = 401
    reason = Reason.UNAUTHORIZED


class Forbidden(RequestRefused):
    """An operator endpoint was called by somebody who may not do that, or by a page of another origin."""

    status = 403
    reason = Reason.FORBIDDEN


class NoRoute(RequestRefused):
    """No route matches host and path."""

    status = 404
    reason = Reason.NO_ROUTE


class MethodNotAllowed(RequestRefused):
    """The path has a route, but not for this method."""

    status = 405
    reason = Reason.METHOD_NOT_ALLOWED


class BodyTooLarge(RequestRefused):
    """The request body exceeds `server.max_body_bytes`."""

    status = 413
    reason = Reason.BODY_TOO_LARGE


class HeadersTooLarge(RequestRefused):
    """The request's head exceeds `server.max_header_bytes`."""

    status = 431
    reason = Reason.HEADERS_TOO_LARGE


class RequestTimeout(RequestRefused):
    """The request's head took longer than `server.header_timeout` to arrive."""

    status = 408
    reason = Reason.REQUEST_TIMEOUT


class RateLimited(RequestRefused):
    """The bucket does not hold the request's cost now."""

    status = 429
    reason = Reason.RATE_LIMITED
    problem_type = QUOTA_EXCEEDED


class CostExceedsCapacity(RequestRefused):
    """The request costs more than the bucket can ever hold; waiting cannot help."""

    status = 403
    reason = Reason.COST_EXCEEDS_CAPACITY


class Unavailable(GatewayError):
    """The gateway declines to try now."""

    status = 503
    is_retry_safe = True
    problem_type = REDUCED_CAPACITY


class CircuitOpen(Unavailable):
    """The upstream's circuit breaker lets no request through."""

    reason = Reason.CIRCUIT_OPEN


class NoHealthyUpstream(Unavailable):
    """Every target of the upstream fails its health checks."""

    reason = Reason.NO_HEALTHY_UPSTREAM


class Overloaded(Unavailable):
    """No connection to the upstream came free in time, or this process lacks a descriptor or a port to open one."""

    reason = Reason.OVERLOADED


class LoadShed(Overloaded):
    """More is under way than the upstream, or the gateway itself, can serve well; lower tiers are refused first."""


class Draining(Unavailable):
    """The gateway is starting or stopping."""

    reason = Reason.DRAINING


class StoreUnavailable(Unavailable):
    """The store did not take a change, which was therefore not made; or it does not answer, and nothing may pass."""

    reason = Reason.STORE_UNAVAILABLE


class UpstreamFailed(GatewayError):
    """The upstream was tried and gave no usable answer."""

    status = 502
    reason = Reason.UPSTREAM_RESET
    fault = Fault.UPSTREAM


class UpstreamConnectError(UpstreamFailed):
    """No connection could be made."""

    reason = Reason.UPSTREAM_CONNECT_ERROR
    is_retry_safe = True
    fault = Fault.TARGET


class UpstreamReset(UpstreamFailed):
    """The connection broke before the answer was complete."""

    reason = Reason.UPSTREAM_RESET


class UpstreamProtocolError(UpstreamFailed):
    """The answer was not HTTP."""

    reason = Reason.UPSTREAM_PROTOCOL_ERROR


class UpstreamTimeout(UpstreamFailed):
    """The upstream was silent for longer than it may be."""

    status = 504
    reason = Reason.UPSTREAM_TIMEOUT


class UpstreamConnectTimeout(UpstreamTimeout):
    """Connecting took longer than it may; nothing was sent."""

    is_retry_safe = True
    fault = Fault.TARGET


class InternalError(GatewayError):
    """A defect of the gateway itself."""


class ClientDisconnected(GatewayError):
    """The client left before its answer was complete. Never sent; blames no upstream."""

    status = 499
    reason = Reason.CLIENT_DISCONNECTED
    fault = Fault.CLIENT


def not_started() -> Draining:
    """Return the error before the lifespan has begun, which frameworks do not run for a mounted application."""
    return Draining(
        "The gateway has not started. An application it is mounted in must run its lifespan: see docs/embedding.md.",
        retry_after=1,
    )


def problem(error: GatewayError, *, instance: str, request_id: str | None = None) -> dict[str, Any]:
    """Return the problem details object of RFC 9457 section 3 for `error`.

    `title` names the problem type; for `about:blank` that is the status phrase (section 4.2.1). `reason` and
    `request_id` are extension members, as is everything in `error.extra`.
    """
    titles = {
        QUOTA_EXCEEDED: "Request cannot be satisfied as assigned quota has been exceeded",
        REDUCED_CAPACITY: "Request cannot be satisfied due to temporary server capacity constraints",
    }
    body: dict[str, Any] = {
        "type": error.problem_type,
        "title": titles.get(error.problem_type) or HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.detail,
        "instance": instance,
        "reason": error.reason.value,
    }
    if request_id is not None:
        body["request_id"] = request_id
    if error.retry_after is not None:
        body["retry_after_seconds"] = math.ceil(error.retry_after * 1000) / 1000
    return body | error.extra


class StartupError(Exception):
    """The gateway cannot start; the message says why."""


def causes(error: BaseException | None, *, with_context: bool = True) -> Iterator[BaseException]:
    """Yield an error and what led to it, of a group the first one. Chains of exceptions may be circular.

    `with_context`: an error without a stated cause was led to by the one that was being handled when it came up.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        else:
            error = error.__cause__ or (error.__context__ if with_context else None)
