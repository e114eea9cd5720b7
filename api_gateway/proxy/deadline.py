"""The deadline of a request: where it comes from, its error message, and the value forwarded to the upstream.

Pure. One deadline covers the whole exchange: the limiter's store, connecting, all attempts, the delays between them,
and the complete response.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from api_gateway.errors import BadRequest, UpstreamConnectTimeout, UpstreamTimeout
from api_gateway.models import Exchange
from api_gateway.proxy.route_table import Route

_DECIMAL = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_SHOWN = 7  # characters of an invalid value; more could be a credential in the wrong place


@dataclass(slots=True)
class Deadline:
    """A deadline: `at` in monotonic seconds, `seconds` from the request's arrival, `source` of the timeout.

    `is_forwarded`: the client or the route has set a timeout, so the remaining time is forwarded to the upstream.
    """

    at: float
    seconds: float
    source: Literal["client", "route", "upstream"]
    name: str  # of the route or the upstream
    is_forwarded: bool

    @property
    def is_of_client(self) -> bool:
        """True for a client's own timeout, which never counts as a failure of the upstream."""
        return self.source == "client"

    def remaining(self, now: float) -> float:
        """Return the remaining seconds, at least 0."""
        return max(0.0, self.at - now)

    def header_value(self, now: float) -> bytes:
        """Return the value of `X-Request-Timeout`: remaining seconds, rounded down to 1 ms, at least 0.001."""
        return b"%.3f" % (max(1, int(self.remaining(now) * 1000)) / 1000)

    def message(self) -> str:
        """Return the `detail` of the error after the deadline has passed."""
        origin = {
            "client": "the client's X-Request-Timeout",
            "route": f"the timeout of route '{self.name}'",
            "upstream": f"timeouts.total of upstream '{self.name}'",
        }
        return f"No complete response within {self.seconds:g} s, {origin[self.source]}."


def deadline_of(route: Route, total: float | None, given: Sequence[bytes], started: float) -> Deadline | None:
    """Return the deadline of a request that arrived at `started`, or None if no timeout applies.

    `given` are the values of `X-Request-Timeout`. A timeout of the route replaces the upstream's `total`. A shorter
    timeout of the client replaces both. Raises BadRequest if the client's timeout is invalid.
    """
    asked = _requested_seconds(given) if given else None
    seconds = total if route.timeout is None else route.timeout
    is_passed_on = asked is not None or route.timeout is not None
    if asked is not None and (seconds is None or asked < seconds):
        return Deadline(started + asked, asked, "client", "", is_passed_on)
    if seconds is None:
        return None
    if route.timeout is None:
        return Deadline(started + seconds, seconds, "upstream", route.upstream, is_passed_on)
    return Deadline(started + seconds, seconds, "route", route.name, is_passed_on)


def deadline_error(exchange: Exchange, deadline: Deadline) -> UpstreamTimeout:
    """Return the error of a request whose deadline has passed.

    Its class determines the refund: the charge is refunded if nothing was sent; with a client's own deadline, only if
    no connection was begun.
    """
    has_cost = exchange.has_reached or (exchange.has_begun and deadline.is_of_client)
    kind = UpstreamTimeout if has_cost else UpstreamConnectTimeout
    return kind(deadline.message(), extra={"deadline_source": deadline.source})


def _requested_seconds(given: Sequence[bytes]) -> float:
    """Return the value of `X-Request-Timeout` in seconds. Raises BadRequest."""
    if len(given) == 1 and _DECIMAL.fullmatch(given[0]) is not None and float(given[0]) > 0:
        return float(given[0])
    whole = b", ".join(given)
    shown = repr(whole.decode("latin-1")) if len(whole) <= _SHOWN else f"{len(whole)} characters"
    raise BadRequest(f"X-Request-Timeout must be one decimal number of seconds above 0, got {shown}.")
