"""Fallbacks: the replacement response of a route, and the failures for which it is used. Pure."""

from dataclasses import dataclass

from api_gateway.errors import GatewayError, Reason
from api_gateway.http1.headers import BODILESS
from api_gateway.models import CorsFields, HeaderList
from api_gateway.proxy.cors import with_cors_fields

STATIC = "static"  # the name of a static fallback in `X-Gateway-Fallback`, log and metrics

# Refusals before anything is sent, and failures of an attempt, for which a fallback may respond.
_REFUSED = frozenset({Reason.NO_HEALTHY_UPSTREAM, Reason.CIRCUIT_OPEN, Reason.OVERLOADED})
_FAILED = frozenset({Reason.UPSTREAM_CONNECT_ERROR, Reason.UPSTREAM_RESET, Reason.UPSTREAM_TIMEOUT})


@dataclass(frozen=True, slots=True)
class Fallback:
    """A fallback: another upstream if `upstream` is set, else a static response. Fallbacks are not chained."""

    upstream: str | None = None
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""

    @property
    def name(self) -> str:
        """The name in `X-Gateway-Fallback`, log and metrics: the upstream's, or `static`."""
        return self.upstream or STATIC

    def fields(self, cors: CorsFields | None) -> HeaderList:
        """Return the header fields of the static response, with Content-Type, Content-Length and those of CORS."""
        headers = [*self.headers]
        if self.body and not any(name.lower() == b"content-type" for name, _ in headers):
            headers.append((b"content-type", b"text/plain; charset=utf-8"))
        if self.status not in BODILESS:
            headers.append((b"content-length", b"%d" % len(self.body)))
        return with_cors_fields(cors, headers)


def add_failure(first: GatewayError, second: GatewayError) -> None:
    """Append to the detail of `first` that its fallback failed with `second`."""
    first.detail += f" The fallback failed too: {second.detail}"


def applies(fallback: Fallback, error: GatewayError, *, is_repeatable: bool, is_replayable: bool) -> bool:
    """Return whether `fallback` responds to a request that failed with `error` before any response byte was sent.

    It responds if the request was refused, failed before it was sent, or is repeatable. Otherwise the request may have
    taken effect, and the client must receive the error. Another upstream also needs the body to be kept.
    """
    if fallback.upstream is not None and not is_replayable:
        return False
    return error.reason in _REFUSED or (error.reason in _FAILED and (error.is_retry_safe or is_repeatable))
