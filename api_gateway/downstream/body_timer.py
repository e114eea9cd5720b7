"""The time within which a request body must arrive: the next piece of it, and its minimum rate.

Each received byte adds 1/rate seconds of credit. The next piece is due before the credit is used up, and within
`idle_timeout` at most. Credit is limited to the greater of `idle_timeout` and `body_grace`, so that a fast beginning
does not excuse a slow rest. Times are passed as arguments, on the clock of the event loop.
"""

from api_gateway.downstream.connection_limits import ConnectionLimits
from api_gateway.errors import RequestTimeout
from api_gateway.http1.asgi import BodyReceiver


class BodyTimer:
    """Computes when the next piece of a body is due. The credit of a body is kept in its request.

    `received` is the number of bytes since the deadline was last set, which the owner counts.
    """

    __slots__ = ("_limits", "_paused_at", "received")

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self.received = 0
        self._paused_at = 0.0

    def __repr__(self) -> str:
        return f"<BodyTimer [{self.received} bytes since the deadline was set]>"

    def seconds_left(self, request: BodyReceiver, now: float) -> float:
        """Return the time within which the next piece is due, and update the request's credit."""
        limits = self._limits
        received, self.received = self.received, 0
        rate = self._rate(request)
        if not rate or request.awaits_continue:  # no minimum rate, or the client still awaits 100 (Continue)
            request.body_due = None
            return limits.idle_timeout
        credit = now + limits.body_grace if request.body_due is None else request.body_credit
        most = max(limits.idle_timeout, limits.body_grace)
        request.body_credit = credit = min(credit + received / rate, now + most)
        request.body_due = due = min(credit, now + limits.idle_timeout)
        return due - now

    def pause(self, now: float) -> None:
        """Note that reading has been paused."""
        self._paused_at = now

    def resume(self, request: BodyReceiver, now: float) -> float | None:
        """Extend the deadline by the time of the pause; return the seconds left, or None without a minimum rate."""
        if request.body_due is None:
            return None
        pause = now - self._paused_at
        request.body_credit += pause
        request.body_due += pause
        return request.body_due - now

    def lateness(self, request: BodyReceiver) -> RequestTimeout:
        """Return the error for a body that is overdue."""
        if request.body_due is None or request.body_due < request.body_credit:
            return RequestTimeout(f"No part of the body arrived within {self._limits.idle_timeout:g} s.")
        return RequestTimeout(f"The body arrived more slowly than {self._rate(request):g} bytes per second.")

    def _rate(self, request: BodyReceiver) -> float:
        return self._limits.body_rate if request.body_rate is None else request.body_rate
