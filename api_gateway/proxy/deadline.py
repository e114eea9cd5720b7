"""The deadline of a request: which one holds, what it says when it has passed, and what is passed on of it.

Pure. One deadline covers all that happens for a request: the limiter's store, a connection, every try, the pauses
between them, and the whole answer.
"""

import re
from dataclasses import dataclass
from typing import Literal

from api_gateway.errors import BadRequest
from api_gateway.http1.headers import REQUEST_TIMEOUT, Fields
from api_gateway.proxy.route_table import Route

_DECIMAL = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_SHOWN = 40  # bytes of a value that are quoted


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at` is monotonic seconds, `seconds` how long that was from the request's arrival, `source` who set it.

    `is_passed_on`: the client or the route has one, so the upstream is told what is left.
    """

    at: float
    seconds: float
    source: Literal["client", "route", "upstream"]
    name: str  # of the route or the upstream
    is_passed_on: bool

    @property
    def is_upstream_fault(self) -> bool:
        """True if its passing is a failure of the upstream. A client may be as impatient as it likes."""
        return self.source != "client"

    def remaining(self, now: float) -> float:
        """Return the seconds that are left, 0 at least."""
        return max(0.0, self.at - now)

    def header_value(self, now: float) -> bytes:
        """Return what is left as `X-Request-Timeout` says it: rounded down to the millisecond, but never 0."""
        return b"%.3f" % (max(1, int(self.remaining(now) * 1000)) / 1000)

    def message(self) -> str:
        """Return what is told when it has passed."""
        what = {
            "client": "the X-Request-Timeout the client has set",
            "route": f"the timeout of route '{self.name}'",
            "upstream": f"timeouts.total of upstream '{self.name}'",
        }
        return f"No complete answer within {self.seconds:g} s, {what[self.source]}."


def deadline_of(route: Route, total: float | None, fields: Fields, started: float) -> Deadline | None:
    """Return the deadline of a request that arrived at `started`, or None if it has none.

    The route's own timeout takes the place of the upstream's `total`; what the client asks for counts if it is less.
    Raises BadRequest.
    """
    asked = _asked(fields) if REQUEST_TIMEOUT in fields else None
    seconds = total if route.timeout is None else route.timeout
    is_passed_on = asked is not None or route.timeout is not None
    if asked is not None and (seconds is None or asked < seconds):
        return Deadline(started + asked, asked, "client", "", is_passed_on)
    if seconds is None:
        return None
    if route.timeout is None:
        return Deadline(started + seconds, seconds, "upstream", route.upstream, is_passed_on)
    return Deadline(started + seconds, seconds, "route", route.name, is_passed_on)


def _asked(fields: Fields) -> float:
    """Return the seconds a client asks for."""
    given = fields[REQUEST_TIMEOUT]
    if len(given) == 1 and _DECIMAL.fullmatch(given[0]) is not None and float(given[0]) > 0:
        return float(given[0])
    shown = ", ".join(value[:_SHOWN].decode("latin-1") for value in given)
    raise BadRequest(f"X-Request-Timeout must be one decimal number of seconds above 0, got {shown!r}.")
