"""Outcomes of attempts, noted in their spans too: the reporter if tracing is on."""

import httpx

from api_gateway.errors import GatewayError, Reason
from api_gateway.models import Exchange
from api_gateway.proxy.attribution import NO_PROGRESS, ClientProgress
from api_gateway.proxy.deadline import Deadline
from api_gateway.proxy.outcome_reporter import OutcomeReporter
from api_gateway.upstreams.upstream import Attempt


class TracedOutcomes(OutcomeReporter):
    """Settles attempts as `OutcomeReporter` does, and records what became of each in the trace of the exchange."""

    def on_head(
        self, exchange: Exchange, attempt: Attempt, status: int, now: float, client: ClientProgress = NO_PROGRESS
    ) -> None:
        """Record the head of a response."""
        super().on_head(exchange, attempt, status, now, client)
        trace = exchange.trace
        if trace is not None and trace.attempts:
            last = trace.attempts[-1]
            last.status, last.head_at = status, now

    def on_failure(
        self, exchange: Exchange, attempt: Attempt, error: httpx.TransportError, client: ClientProgress = NO_PROGRESS
    ) -> GatewayError:
        """Settle an attempt without a response; return the translated error."""
        failure = super().on_failure(exchange, attempt, error, client)
        self._note_end(exchange, str(failure.reason))
        return failure

    def on_broken_body(
        self, exchange: Exchange, attempt: Attempt, error: Exception, client: ClientProgress = NO_PROGRESS
    ) -> GatewayError:
        """Settle an attempt whose response is incomplete; return the translated error."""
        failure = super().on_broken_body(exchange, attempt, error, client)
        self._note_end(exchange, str(failure.reason))
        return failure

    def on_overdue(
        self, exchange: Exchange, attempt: Attempt, deadline: Deadline, spent: float, client: ClientProgress
    ) -> None:
        """Settle an attempt that a deadline has ended."""
        super().on_overdue(exchange, attempt, deadline, spent, client)
        self._note_end(exchange, str(Reason.UPSTREAM_TIMEOUT))

    def _note_end(self, exchange: Exchange, reason: str) -> None:
        trace = exchange.trace
        if trace is not None and trace.attempts:
            last = trace.attempts[-1]
            last.error, last.ended = reason, self._clock()
