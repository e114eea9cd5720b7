"""Reports the outcomes of attempts to the circuit breakers, the adaptive limit, the metrics and the log."""

from collections.abc import Callable

import httpx

from api_gateway.errors import Fault, GatewayError, Overloaded, UpstreamTimeout
from api_gateway.models import Clock, Exchange, Outcome
from api_gateway.proxy.faults import NO_PROGRESS, OUTCOME_OF_FAULT, ClientProgress, fault_of, fault_of_status
from api_gateway.resilience.breaker_history import Transition
from api_gateway.transport.error_mapping import translate
from api_gateway.transport.local_resources import ExhaustionLog, LocalResourcesExhausted
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Attempt, SlowResponse

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
        """Record the head of a response; an error status settles the attempt at once."""
        assert exchange.sent_at is not None  # noqa: S101 - a response implies a request
        exchange.head_at = now
        took = now - exchange.sent_at
        self._observe_attempt(attempt.upstream.name, _CLASSES[status // 100], took, now)
        if status >= 500:  # noqa: PLR2004 - the class of server errors
            self._settle_failure(exchange, attempt, fault_of_status(status, client), now, f"status {status}", now)
            return
        if attempt.upstream.limit is not None:  # server errors are excluded: they may be immediate
            attempt.upstream.limit.observe(took, now)
        if status >= 400:  # noqa: PLR2004 - the class of client errors
            self.settle(attempt, Outcome.IGNORED, now)
        elif took >= attempt.upstream.breaker.slow_after:
            attempt.slow = SlowResponse(took, exchange.route or "", exchange.id)

    def on_failure(
        self, exchange: Exchange, attempt: Attempt, error: httpx.TransportError, client: ClientProgress = NO_PROGRESS
    ) -> GatewayError:
        """Settle an attempt without a response; return the translated error."""
        upstream, now = attempt.upstream.name, self._clock()
        failure = translate(error, upstream)
        self._observe_attempt(upstream, failure.reason, None, now)
        fault = fault_of(failure, client)
        if isinstance(failure, UpstreamTimeout) and fault is Fault.UPSTREAM:
            _observe_missing_head(exchange, attempt, now)
        if isinstance(failure, Overloaded) and (exhaustion := _exhaustion(error)) is not None:
            self._exhaustion_log.note(upstream, exhaustion, now)
        self._settle_failure(exchange, attempt, fault, now, failure.reason, now)
        return failure

    def on_broken_body(
        self, exchange: Exchange, attempt: Attempt, error: Exception, client: ClientProgress = NO_PROGRESS
    ) -> GatewayError:
        """Settle an attempt whose response is incomplete; return the translated error."""
        failure = translate(error, attempt.upstream.name)
        failure.__cause__ = error
        head_at = exchange.head_at or exchange.started
        fault = fault_of(failure, client)
        self._settle_failure(exchange, attempt, fault, self._clock(), f"{failure.reason} within the body", head_at)
        return failure

    def on_overdue(self, exchange: Exchange, attempt: Attempt, fault: Fault) -> None:
        """Settle an attempt that the deadline has ended as a failure, if the upstream is at fault."""
        if fault is not Fault.UPSTREAM:
            return
        now, reason = self._clock(), UpstreamTimeout.reason.value
        if exchange.head_at is None:
            self._observe_attempt(attempt.upstream.name, reason, None, now)
            _observe_missing_head(exchange, attempt, now)
        self._settle_failure(exchange, attempt, fault, now, f"{reason} (deadline)", now)

    def settle_success(self, attempt: Attempt) -> None:
        """Settle an attempt as a success."""
        self.settle(attempt, Outcome.SUCCESS, self._clock())

    def settle(self, attempt: Attempt, outcome: Outcome, now: float, detail: str = "") -> None:
        """Settle an attempt and report the transitions that its outcome causes. `now` is monotonic seconds."""
        self._report(attempt, attempt.settle(outcome, now, detail))

    def _settle_failure(
        self, exchange: Exchange, attempt: Attempt, fault: Fault, now: float, detail: str, until: float
    ) -> None:
        """Settle a failed attempt by its fault; its duration ends at `until`: at the head, or at the failure."""
        took = until - (exchange.sent_at or until)
        if fault is Fault.TARGET:
            attempt.principal = None  # a failure to connect is independent of the client
        transition = attempt.settle(
            OUTCOME_OF_FAULT[fault], now, detail, duration=took, route=exchange.route or "", request_id=exchange.id
        )
        self._report(attempt, transition)

    def _report(self, attempt: Attempt, transition: Transition | None) -> None:
        if transition is not None:
            self._on_transition(attempt.upstream.name, transition)
        if attempt.target_transition is not None:
            self._on_target_transition(attempt.upstream.name, attempt.target, attempt.target_transition)


def _exhaustion(error: BaseException) -> LocalResourcesExhausted | None:
    """Return the LocalResourcesExhausted error that is, or caused, `error`; None if there is none."""
    return next((found for found in (error, error.__cause__) if isinstance(found, LocalResourcesExhausted)), None)


def _observe_missing_head(exchange: Exchange, attempt: Attempt, now: float) -> None:
    """Report the time spent without a response to the adaptive limit, as a lower bound of the latency."""
    if attempt.upstream.limit is not None and exchange.sent_at is not None:
        attempt.upstream.limit.observe(now - exchange.sent_at, now)
