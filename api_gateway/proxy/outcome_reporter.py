"""Reports the outcomes of attempts to the circuit breakers, the adaptive limit, the metrics and the log."""

from collections.abc import Callable

import httpx

from api_gateway.errors import GatewayError, Overloaded, UpstreamTimeout
from api_gateway.models import AttemptFailure, Clock, Exchange, Outcome
from api_gateway.proxy.attribution import (
    NO_PROGRESS,
    Cause,
    ClientProgress,
    ResponsibleParty,
    attribution,
    cause_of,
    cause_of_deadline,
    outcome_of_abort,
)
from api_gateway.proxy.deadline import Deadline
from api_gateway.resilience.breaker_history import Transition
from api_gateway.transport.error_mapping import translate
from api_gateway.transport.local_resources import ExhaustionLog, LocalResourcesExhausted
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Attempt, SlowResponse

_MAX_DETAIL = 500  # characters of an error that are recorded
_MIN_RETRIED = 429  # the lowest status that a retry policy can name
_CLASSES = tuple(f"{number}xx" for number in range(6))


class OutcomeReporter:
    """Settles attempts. Settling is idempotent: only the first outcome of an attempt counts."""

    def __init__(
        self,
        *,
        clock: Clock,
        observe_attempt: Callable[[str, str, float | None, float], None],
        on_transition: Callable[[str, Transition], None],
        on_target_transition: Callable[[str, Target, Transition], None],
    ) -> None:
        """Set the observers.

        `observe_attempt` is called once for each attempt with upstream, result, latency in seconds (None without a
        response) and time; `on_transition` and `on_target_transition` at transitions of an upstream's or a target's
        breaker.
        """
        self._clock = clock
        self._observe_attempt = observe_attempt
        self._on_transition = on_transition
        self._on_target_transition = on_target_transition
        self._exhaustion_log = ExhaustionLog()

    def on_head(
        self, exchange: Exchange, attempt: Attempt, status: int, now: float, client: ClientProgress = NO_PROGRESS
    ) -> None:
        """Record the head of a response; a server error settles the attempt at once."""
        assert exchange.sent_at is not None  # noqa: S101 - a response implies a request
        exchange.head_at = now
        took = now - exchange.sent_at
        if took < 0:  # the client's time, which is subtracted, is measured on the coarser clock of the event loop
            took, exchange.sent_at = 0.0, now
        self._observe_attempt(attempt.upstream.name, _CLASSES[status // 100], took, now)
        attempt.target.note_response(took)
        if status >= _MIN_RETRIED:
            _note(exchange, attempt, now, status=status)
            if status >= 500:  # noqa: PLR2004 - the class of server errors
                self._settle(exchange, attempt, Cause.SERVER_ERROR, client, now, f"status {status}")
                return
        if attempt.upstream.limit is not None:  # server errors are excluded: they may be immediate
            attempt.upstream.limit.observe(took, now)
        if took >= attempt.upstream.breaker.slow_after:
            attempt.slow = SlowResponse(took, exchange.route or "", exchange.id)

    def on_failure(
        self, exchange: Exchange, attempt: Attempt, error: httpx.TransportError, client: ClientProgress = NO_PROGRESS
    ) -> GatewayError:
        """Settle an attempt without a response; return the translated error."""
        upstream, now = attempt.upstream.name, self._clock()
        failure = translate(error, upstream)
        self._observe_attempt(upstream, failure.reason, None, now)
        if isinstance(failure, Overloaded) and (exhaustion := _exhaustion(error)) is not None:
            self._exhaustion_log.note(upstream, exhaustion, now)
        _note(exchange, attempt, now, failure.reason.value, str(error))
        cause = cause_of(failure)
        if self._settle(exchange, attempt, cause, client, now, failure.reason) and cause is Cause.TIMEOUT:
            _observe_missing_head(exchange, attempt, now)
        return failure

    def on_broken_body(
        self, exchange: Exchange, attempt: Attempt, error: Exception, client: ClientProgress = NO_PROGRESS
    ) -> GatewayError:
        """Settle an attempt whose response is incomplete; return the translated error."""
        failure = translate(error, attempt.upstream.name)
        failure.__cause__ = error
        detail, now = f"{failure.reason} within the body", self._clock()
        _note(exchange, attempt, now, failure.reason.value, f"within the body: {error}")
        self._settle(exchange, attempt, cause_of(failure), client, now, detail)
        return failure

    def on_overdue(
        self, exchange: Exchange, attempt: Attempt, deadline: Deadline, spent: float, client: ClientProgress
    ) -> None:
        """Settle an attempt that a deadline has ended, after the upstream has spent `spent` seconds on it."""
        now, reason = self._clock(), UpstreamTimeout.reason.value
        _note(exchange, attempt, now, reason, "the deadline of the request has passed")
        cause = cause_of_deadline(deadline, spent, client)
        if self._settle(exchange, attempt, cause, client, now, f"{reason} (deadline)") and exchange.head_at is None:
            self._observe_attempt(attempt.upstream.name, reason, None, now)
            _observe_missing_head(exchange, attempt, now)

    def settle_success(self, attempt: Attempt) -> None:
        """Settle an attempt as a success: its response is complete, or has begun and may have no end."""
        self.settle(attempt, Outcome.SUCCESS, self._clock())

    def settle(self, attempt: Attempt, outcome: Outcome, now: float) -> None:
        """Settle an attempt and report the transitions that its outcome causes. `now` is monotonic seconds."""
        self._report(attempt, attempt.settle(outcome, now))

    def release(self, exchange: Exchange, attempt: Attempt) -> None:
        """End an attempt. If it is still open, it was aborted: it counts if the head of its response has arrived."""
        now = self._clock()
        self.settle(attempt, outcome_of_abort(has_head=exchange.head_at is not None), now)
        attempt.release(now)

    def _settle(
        self, exchange: Exchange, attempt: Attempt, cause: Cause, client: ClientProgress, now: float, detail: str
    ) -> bool:
        """Settle an attempt by the table; return whether it counts as a failure.

        Its duration ends at the head of the response, or now if there is none.
        """
        head_at, sent_at = exchange.head_at, exchange.sent_at
        row = attribution(cause, has_head=head_at is not None, client=client)
        if row.party is ResponsibleParty.TARGET:
            attempt.principal = None  # no client can cause it
        took = 0.0 if sent_at is None else (now if head_at is None else head_at) - sent_at
        transition = attempt.settle(
            row.outcome, now, detail, duration=took, route=exchange.route or "", request_id=exchange.id
        )
        self._report(attempt, transition)
        return row.outcome is Outcome.FAILURE

    def _report(self, attempt: Attempt, transition: Transition | None) -> None:
        if transition is not None:
            self._on_transition(attempt.upstream.name, transition)
        if attempt.target_transition is not None:
            self._on_target_transition(attempt.upstream.name, attempt.target, attempt.target_transition)


def _exhaustion(error: BaseException) -> LocalResourcesExhausted | None:
    """Return the LocalResourcesExhausted error that is, or caused, `error`; None if there is none."""
    return next((found for found in (error, error.__cause__) if isinstance(found, LocalResourcesExhausted)), None)


def _note(
    exchange: Exchange,
    attempt: Attempt,
    now: float,
    failure: str | None = None,
    detail: str = "",
    *,
    status: int | None = None,
) -> None:
    """Record a failed attempt in its exchange; a later record of the same attempt replaces it."""
    started = now if exchange.sent_at is None else exchange.sent_at
    known = exchange.failures
    if known and known[-1].started == started and known[-1].target == attempt.target.url:
        status = known[-1].status if status is None else status
        known = known[:-1]
    row = AttemptFailure(
        attempt.upstream.name, attempt.target.url, started, now, status, failure, detail[:_MAX_DETAIL]
    )
    exchange.failures = (*known, row)


def _observe_missing_head(exchange: Exchange, attempt: Attempt, now: float) -> None:
    """Report the time spent without a response to the adaptive limit, as a lower bound of the latency."""
    if attempt.upstream.limit is not None and exchange.sent_at is not None:
        attempt.upstream.limit.observe(now - exchange.sent_at, now)
