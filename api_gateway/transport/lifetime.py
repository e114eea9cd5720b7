"""How long, and for how many requests, a connection to an upstream is used: settings, and what the upstream announces.

An upstream closes connections that have been idle for its own timeout. A request that is sent at that moment is lost,
and only a repeatable one can be sent again. So the gateway closes an idle connection first. `Keep-Alive: timeout=5,
max=100` in a response announces the timeout in seconds and the number of further requests (RFC 2068 section 19.7.1.1).
"""

import math
import re

IDLE_MARGIN = 1.0  # seconds before the announced timeout: the upstream's clock starts earlier, and a request travels
_SHARE_OF_MARGIN = 0.5  # of a timeout that is shorter than twice the margin
_MAX_VALUE = 128  # bytes; a longer value is ignored
_PARAMETER = re.compile(rb"(?:^|[\s,;])(timeout|max)\s*=\s*\"?([0-9]{1,9})(?:\.[0-9]*)?(?![0-9.])", re.IGNORECASE)


class ConnectionLifetime:
    """The limits of one connection: requests, age and idle time. Infinite values mean that there is no limit.

    `expires_at` is on the clock of the event loop; `idle_timeout` is in seconds; `requests_left` is the number of
    requests that may still be completed on the connection, including the current one.
    """

    __slots__ = ("_announced", "expires_at", "idle_timeout", "requests_left")

    def __init__(self, *, max_requests: float = math.inf, expires_at: float = math.inf) -> None:
        self.requests_left = max_requests
        self.expires_at = expires_at
        self.idle_timeout = math.inf
        self._announced = b""  # the last value of Keep-Alive

    def __repr__(self) -> str:
        return f"<ConnectionLifetime [{self.requests_left} requests, idle for {self.idle_timeout} s]>"

    def announce(self, value: bytes) -> None:
        """Apply the value of a response's `Keep-Alive` fields: the smallest numbers, and of a fraction the integer.

        Parameters that are not valid are ignored.
        """
        if value == self._announced or len(value) > _MAX_VALUE:
            return
        self._announced = value
        timeouts = []
        for name, digits in _PARAMETER.findall(value):
            number = int(digits)
            if name.lower() == b"timeout":
                timeouts.append(number)
            else:
                self.requests_left = min(self.requests_left, number + 1)
        if timeouts:
            timeout = min(timeouts)
            self.idle_timeout = timeout - min(IDLE_MARGIN, timeout * _SHARE_OF_MARGIN)

    def is_over(self, now: float) -> bool:
        """Return whether the connection must not be used for another request; call it once after each request."""
        self.requests_left -= 1
        return self.requests_left <= 0 or self.idle_timeout <= 0 or now >= self.expires_at

    def idle_until(self, idle_since: float, idle_timeout: float) -> float:
        """Return when a connection that has been idle since `idle_since` is closed, at most `idle_timeout` later."""
        return min(idle_since + min(idle_timeout, self.idle_timeout), self.expires_at)
