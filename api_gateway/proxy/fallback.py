"""Fallbacks: what answers in the place of a route's upstream, and for which failures it does. Pure."""

from dataclasses import dataclass

from api_gateway.errors import GatewayError, Reason
from api_gateway.http1.headers import BODILESS
from api_gateway.models import HeaderList

STATIC = "static"  # the word for an answer that no upstream gave

# What refused a request before anything was sent, and what a try can fail with so that another service may help.
_REFUSED = frozenset({Reason.NO_HEALTHY_UPSTREAM, Reason.CIRCUIT_OPEN, Reason.OVERLOADED})
_FAILED = frozenset({Reason.UPSTREAM_CONNECT_ERROR, Reason.UPSTREAM_RESET, Reason.UPSTREAM_TIMEOUT})


@dataclass(frozen=True, slots=True)
class Fallback:
    """Another upstream if `upstream` names one, else an answer of our own. A fallback has none itself."""

    upstream: str | None = None
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""

    @property
    def name(self) -> str:
        """What `X-Gateway-Fallback`, log and metrics call it."""
        return self.upstream or STATIC

    def fields(self) -> HeaderList:
        """Return the headers of the static answer, with its length."""
        headers = [*self.headers]
        if self.body and not any(name.lower() == b"content-type" for name, _ in headers):
            headers.append((b"content-type", b"text/plain; charset=utf-8"))
        if self.status not in BODILESS:
            headers.append((b"content-length", b"%d" % len(self.body)))
        return headers


def add_failure(first: GatewayError, second: GatewayError) -> None:
    """Have `first`, which a fallback was to make good, say that this has failed with `second`."""
    first.detail += f" Its fallback cannot answer either: {second.detail}"


def applies(fallback: Fallback, error: GatewayError, *, is_repeatable: bool, is_kept: bool) -> bool:
    """Tell whether `fallback` answers a request that ended with `error` before any byte was sent to the client.

    It does for one that was refused, or failed unsent. One that was sent must be repeatable, whoever answers: a
    client that may have had its effect is told so. Another upstream needs the body, too.
    """
    if fallback.upstream is not None and not is_kept:
        return False
    return error.reason in _REFUSED or (error.reason in _FAILED and (error.is_retry_safe or is_repeatable))
