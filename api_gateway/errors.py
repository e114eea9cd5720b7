"""The errors of the gateway. Each has a status, a reason, and whether a retry is safe.

    GatewayError
    ├── RequestRefused      the request cannot be served: 4xx
    │   ├── BadRequest, ClientIdInvalid, InvalidValue
    │   ├── Unauthorized, Forbidden
    │   ├── CredentialsRequired, CredentialsInvalid, CredentialsRepeated, CredentialsInsufficient
    │   ├── CertificateRequired
    │   ├── NoRoute, MethodNotAllowed
    │   ├── BodyTooLarge, HeadersTooLarge, LengthRequired, RequestTimeout
    │   ├── RateLimited, ConcurrencyExceeded
    │   └── CostExceedsCapacity, AddressDenied
    ├── Unavailable         no attempt was made: 503
    │   ├── CircuitOpen, NoHealthyUpstream, Draining, IssuerUnavailable
    │   ├── StoreUnavailable
    │   │   └── ChangeUnconfirmed   the change of an operator may have been made
    │   └── Overloaded
    │       └── LoadShed    refused to protect the upstream or the gateway
    ├── UpstreamFailed      an attempt failed: 502, 504
    │   ├── UpstreamConnectError, UpstreamReset, UpstreamProtocolError
    │   └── UpstreamTimeout
    │       └── UpstreamConnectTimeout
    ├── LoopDetected        the request has passed this gateway before: 508
    ├── InternalError       a defect of the gateway: 500
    └── ClientDisconnected  the client has disconnected: 499 in the log

Errors are not sent or logged here; `problem` renders the problem details (RFC 9457). Long because it is one tree.
"""

import math
from collections.abc import Iterator, Mapping
from enum import StrEnum
from http import HTTPStatus
from typing import Any, ClassVar

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
REDUCED_CAPACITY = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


CHALLENGE = 'Bearer realm="api-gateway"'  # of WWW-Authenticate (RFC 6750 section 3)

# Exit codes
STARTUP_FAILED = 3  # the same as uvicorn's
DRAIN_INCOMPLETE = 4  # exchanges were aborted at the end of the drain
BLOCKED = 5  # the watchdog ended the process because its event loop was blocked


class Reason(StrEnum):
    """The closed list of reasons: the same word in problem details, access log, metrics and documentation."""

    RATE_LIMITED = "rate_limited"
    CONCURRENCY_EXCEEDED = "concurrency_exceeded"
    COST_EXCEEDS_CAPACITY = "cost_exceeds_capacity"
    ADDRESS_DENIED = "address_denied"
    CIRCUIT_OPEN = "circuit_open"
    NO_HEALTHY_UPSTREAM = "no_healthy_upstream"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    STORE_UNAVAILABLE = "store_unavailable"
    ISSUER_UNAVAILABLE = "issuer_unavailable"
    UPSTREAM_CONNECT_ERROR = "upstream_connect_error"
    UPSTREAM_RESET = "upstream_reset"
    UPSTREAM_PROTOCOL_ERROR = "upstream_protocol_error"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    NO_ROUTE = "no_route"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    CLIENT_ID_INVALID = "client_id_invalid"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    CREDENTIALS_REQUIRED = "credentials_required"
    CREDENTIALS_INVALID = "credentials_invalid"
    CREDENTIALS_INSUFFICIENT = "credentials_insufficient"
    CERTIFICATE_REQUIRED = "certificate_required"
    BODY_TOO_LARGE = "body_too_large"
    HEADERS_TOO_LARGE = "headers_too_large"
    LENGTH_REQUIRED = "length_required"
    REQUEST_TIMEOUT = "request_timeout"
    BAD_REQUEST = "bad_request"
    INVALID_VALUE = "invalid_value"
    CONFLICT = "conflict"
    LOOP_DETECTED = "loop_detected"
    INTERNAL_ERROR = "internal_error"
    EXTENSION_FAILED = "extension_failed"
    CLIENT_DISCONNECTED = "client_disconnected"


class GatewayError(Exception):
    """An error for which the gateway generates the response.

    `retry_after` is seconds, not rounded; None if waiting does not help. `headers` are added to the response, `extra`
    to the problem details. `is_retry_safe`: no part of the request has reached an upstream. How an error counts for
    the circuit breakers is in `proxy.attribution`.
    """

    status: ClassVar[int] = 500
    reason: ClassVar[Reason] = Reason.INTERNAL_ERROR
    problem_type: ClassVar[str] = "about:blank"
    is_retry_safe: ClassVar[bool] = False

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
        self.headers = dict(headers) if headers else {}
        self._extra = dict(extra) if extra else {}
        if retry_after is not None:
            seconds = math.ceil(retry_after)
            self.headers["retry-after"] = str(seconds) if seconds > 1 else "1"

    @property
    def extra(self) -> dict[str, Any]:
        """Extension members of the problem details."""
        return self._extra


class RequestRefused(GatewayError):
    """The request cannot be served; the client must change it or wait."""

    status = 400
    reason = Reason.BAD_REQUEST


class BadRequest(RequestRefused):
    """The request is malformed, or so ambiguous that servers may interpret it differently."""


class ClientIdInvalid(RequestRefused):
    """The client id is not 1 to 128 visible ASCII characters, or was sent more than once."""

    reason = Reason.CLIENT_ID_INVALID


class InvalidValue(RequestRefused):
    """The request for an operator endpoint has an invalid body, or a `Content-Type` other than JSON."""

    status = 422
    reason = Reason.INVALID_VALUE


class Conflict(RequestRefused):
    """The request for an operator endpoint conflicts with a change that was made before."""

    status = 409
    reason = Reason.CONFLICT


class Unauthorized(RequestRefused):
    """The request for an operator endpoint has no valid token."""

    status = 401
    reason = Reason.UNAUTHORIZED


class Forbidden(RequestRefused):
    """The caller of an operator endpoint lacks the role, is not an operator, or is a page of another origin."""

    status = 403
    reason = Reason.FORBIDDEN


class CredentialsRequired(RequestRefused):
    """The request has no credential, and its client id alone does not identify it."""

    status = 401
    reason = Reason.CREDENTIALS_REQUIRED

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"www-authenticate": CHALLENGE})


class CredentialsInvalid(RequestRefused):
    """The request has a credential that is not valid, or no longer valid."""

    status = 401
    reason = Reason.CREDENTIALS_INVALID

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"www-authenticate": f'{CHALLENGE}, error="invalid_token"'})


class CredentialsRepeated(RequestRefused):
    """The request has several credentials of one kind, or repeats the field with its credential.

    RFC 6750 section 3.1 calls this an invalid request, whether or not the credentials are valid.
    """

    status = 400
    reason = Reason.BAD_REQUEST

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"www-authenticate": f'{CHALLENGE}, error="invalid_request"'})


class CredentialsInsufficient(RequestRefused):
    """The credential of the request is valid, but not for its route."""

    status = 403
    reason = Reason.CREDENTIALS_INSUFFICIENT


class CertificateRequired(RequestRefused):
    """The route requires a certificate of the client, and the connection has none."""

    status = 403
    reason = Reason.CERTIFICATE_REQUIRED


class NoRoute(RequestRefused):
    """No route matches host and path, or no endpoint has the path."""

    status = 404
    reason = Reason.NO_ROUTE


class MethodNotAllowed(RequestRefused):
    """The path has a route or endpoint, but not for this method."""

    status = 405
    reason = Reason.METHOD_NOT_ALLOWED


class BodyTooLarge(RequestRefused):
    """The request body exceeds `server.max_body_bytes`, or 64 KiB for an operator endpoint."""

    status = 413
    reason = Reason.BODY_TOO_LARGE


class HeadersTooLarge(RequestRefused):
    """The head of the request exceeds `max_header_bytes` or `max_header_lines` of the server or the route."""

    status = 431
    reason = Reason.HEADERS_TOO_LARGE


class LengthRequired(RequestRefused):
    """The server cannot tell the trailers of a chunked request from its header fields."""

    status = 411
    reason = Reason.LENGTH_REQUIRED


class RequestTimeout(RequestRefused):
    """The request head took longer than `server.header_timeout` to arrive."""

    status = 408
    reason = Reason.REQUEST_TIMEOUT


class RateLimited(RequestRefused):
    """The bucket has too few tokens for the request now."""

    status = 429
    reason = Reason.RATE_LIMITED
    problem_type = QUOTA_EXCEEDED


class ConcurrencyExceeded(RequestRefused):
    """As many requests as a limit allows are in flight; `retry_after` is an estimate."""

    status = 429
    reason = Reason.CONCURRENCY_EXCEEDED
    problem_type = QUOTA_EXCEEDED


class CostExceedsCapacity(RequestRefused):
    """The request costs more than the capacity of the bucket; waiting does not help."""

    status = 403
    reason = Reason.COST_EXCEEDS_CAPACITY


class AddressDenied(RequestRefused):
    """The address rules refuse the client's address."""

    status = 403
    reason = Reason.ADDRESS_DENIED


class Unavailable(GatewayError):
    """The request cannot be served now; no attempt was made."""

    status = 503
    is_retry_safe = True
    problem_type = REDUCED_CAPACITY


class CircuitOpen(Unavailable):
    """The upstream's circuit breaker rejects the request."""

    reason = Reason.CIRCUIT_OPEN


class NoHealthyUpstream(Unavailable):
    """Every target of the upstream fails its health checks."""

    reason = Reason.NO_HEALTHY_UPSTREAM


class Overloaded(Unavailable):
    """No connection to the upstream was available in time, or no descriptor or port to open one."""

    reason = Reason.OVERLOADED


class LoadShed(Overloaded):
    """Too many requests are in flight at the upstream or in the gateway; lower tiers are refused first."""


class Draining(Unavailable):
    """The gateway is starting or stopping."""

    reason = Reason.DRAINING


class StoreUnavailable(Unavailable):
    """The store is unavailable: a change was not confirmed, or the policy `deny` refuses all requests."""

    reason = Reason.STORE_UNAVAILABLE


class ChangeUnconfirmed(StoreUnavailable):
    """A change by an operator was not confirmed, and may have been made. The message says so."""

    def __init__(self, detail: str = "", *, retry_after: float | None = None) -> None:
        detail = detail or "The change may or may not have been made: no response from the store."
        super().__init__(detail, retry_after=retry_after)


class IssuerUnavailable(Unavailable):
    """The keys of the issuer of the request's token cannot be obtained."""

    reason = Reason.ISSUER_UNAVAILABLE


class UpstreamFailed(GatewayError):
    """An attempt ended without a usable response."""

    status = 502
    reason = Reason.UPSTREAM_RESET


class UpstreamConnectError(UpstreamFailed):
    """No connection to the target could be made; nothing was sent."""

    reason = Reason.UPSTREAM_CONNECT_ERROR
    is_retry_safe = True


class UpstreamReset(UpstreamFailed):
    """The connection ended before the response was complete."""

    reason = Reason.UPSTREAM_RESET


class UpstreamProtocolError(UpstreamFailed):
    """The response violates HTTP."""

    reason = Reason.UPSTREAM_PROTOCOL_ERROR


class UpstreamTimeout(UpstreamFailed):
    """A timeout or the deadline of the exchange expired during the attempt."""

    status = 504
    reason = Reason.UPSTREAM_TIMEOUT


class UpstreamConnectTimeout(UpstreamTimeout):
    """Connecting exceeded its timeout; nothing was sent."""

    is_retry_safe = True


class LoopDetected(GatewayError):
    """The request has passed this gateway before: an upstream leads back to it."""

    status = 508
    reason = Reason.LOOP_DETECTED


class InternalError(GatewayError):
    """A defect of the gateway."""


class ExtensionFailed(GatewayError):
    """A hook of an extension has failed, and its policy is to refuse the request."""

    reason = Reason.EXTENSION_FAILED


class ClientDisconnected(GatewayError):
    """The client disconnected before its response was complete. Never sent, and no failure of an upstream."""

    status = 499
    reason = Reason.CLIENT_DISCONNECTED


class ResponseIncomplete(Exception):
    """The rest of a response that has begun is missing; raised to the server, which closes the connection."""


def not_started() -> Draining:
    """Return the error for requests before the lifespan, which frameworks do not run for a mounted application."""
    return Draining(
        "The gateway has not started. If it is mounted in another application, that application must run its lifespan:"
        " see docs/embedding.md.",
        retry_after=1,
    )


def problem(error: GatewayError, *, instance: str, request_id: str | None = None) -> dict[str, Any]:
    """Return the problem details of `error` (RFC 9457 section 3).

    For the type `about:blank`, `title` is the status phrase (section 4.2.1). `reason`, `request_id`,
    `retry_after_seconds` and the members of `error.extra` are extension members.
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
    """The gateway cannot start, or a configuration cannot be applied; the message has the cause."""


def causes(error: BaseException | None, *, with_context: bool = True) -> Iterator[BaseException]:
    """Yield an error and its chain of causes; of a group, the first error. Circular chains end.

    `with_context`: the context of an error without an explicit cause counts as its cause.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        else:
            error = error.__cause__ or (error.__context__ if with_context else None)
