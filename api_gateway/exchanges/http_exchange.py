"""One request, from its admission to its response: the order of its phases.

The tables are in `proxy.exchange`; the halves of an exchange are `attempting_exchange` and `relaying_exchange`.
"""

from functools import partial
from typing import Any

from api_gateway.errors import GatewayError, Unavailable, UpstreamFailed
from api_gateway.exchanges.attempting_exchange import AttemptingExchange
from api_gateway.exchanges.exchange_body import ExchangeBody
from api_gateway.exchanges.exchange_life import FirstFailure, body_too_large
from api_gateway.exchanges.response_head import static_response
from api_gateway.models import NANOSECONDS, Outcome
from api_gateway.proxy.admission import StageResponse, Wait
from api_gateway.proxy.deadline import Deadline, deadline_error
from api_gateway.proxy.exchange import (
    ASK,
    BREAK,
    EXCHANGING,
    FALL_BACK,
    NONE,
    PAUSED,
    REFUSE,
    REPLY,
    SELECT,
    SELECTING,
    IllegalEvent,
)
from api_gateway.proxy.failure_record import note_failure, note_shed
from api_gateway.proxy.fallback import Fallback, add_failure, applies
from api_gateway.proxy.route_table import Route
from api_gateway.upstreams.upstream_client import UpstreamClient


class HttpExchange(AttemptingExchange):
    """One request, and the response to it: the actions that belong to the tables of `proxy.exchange`.

    This class has admission, the choice of the upstream, the deadline, and the fallback.
    """

    def wait(self, question: Wait) -> None:
        """Ask a question of admission, and continue when the reply arrives."""
        self._begin()
        self._ask(question)

    def refuse(self, error: GatewayError | StageResponse) -> None:
        """Refuse the request, whose body is incomplete."""
        self._begin()
        self._refuse(error)

    def _ask(self, question: Wait) -> None:
        self.move(ASK)
        self.is_pending = True
        question.ask(partial(self._on_reply, question, self.generation))

    def _on_reply(self, question: Wait, generation: int, reply: Any) -> None:
        if generation != self.generation:  # the exchange has ended meanwhile
            self._context.record.note_late_reply(self.exchange, reply)
            return
        self.generation += 1
        if not self._may(REPLY):
            return
        context = self._context
        try:
            result = context.admission.resume(self.plan, question, reply, context.clock_ns())
        except Exception as error:  # noqa: BLE001 - as in `FastPath.try_handle`
            result = context.record.internal_error(self.exchange, error)
        if isinstance(result, Wait):
            self._ask(result)
            return
        if result is None:
            try:
                result = self.forward()
            except Exception as error:  # noqa: BLE001 - likewise
                self.end_by_defect(error)
        if result is not None:
            self._refuse(result)

    def end_by_defect(self, error: Exception) -> None:
        """End an exchange that a defect has interrupted, so that it returns what it holds."""
        if self.is_strict and isinstance(error, IllegalEvent):
            raise error
        failure = self._context.record.internal_error(self.exchange, error)
        self.keep_alive = False
        self.close()
        self.refuse(failure)

    def forward(self) -> GatewayError | None:
        """Send an admitted request, on an idle connection if there is one.

        Returns the error with which the gateway responds: the upstream refuses the request, or its deadline is over.
        """
        self.phase = SELECTING
        plan = self.plan
        route, router = plan.route, self._context.router
        assert route is not None  # noqa: S101 - the request is admitted
        upstream_client = router.upstream_clients[route.upstream]
        exchange, now, deadline = self.exchange, plan.now_ns / NANOSECONDS, plan.deadline
        client = exchange.client
        assert client is not None  # noqa: S101 - as above
        key, timeouts = client.key, upstream_client.timeouts
        if not upstream_client.is_simple:
            timeouts = upstream_client.timeouts_within(route.response_timeout)
            self.compression = compression = route.compression
            self.coding = None if compression is None else compression.coding_for(plan.headers.received)
            self.is_watched = self.coding is not None or route.content_cost is not None
            key = self._key(upstream_client)
        exchange.upstream = route.upstream
        if self.upload is not None and self.upload.exceeds(route.max_body_bytes):
            return body_too_large(self.upload.limit)
        upstream_client.retries.budget.deposit(exchange.started)
        if deadline is not None and deadline.at <= now:
            return self._after(deadline_error(exchange, deadline))
        is_safe = self._is_repeatable
        try:
            self.attempt = attempt = upstream_client.upstream.acquire(
                now, key, priority=plan.priority, is_safe=is_safe, principal=plan.principal
            )
        except Unavailable as error:
            return self._after(error.with_traceback(None))
        self.timeouts = timeouts
        upload = self.upload
        if upload is None:
            self._client.begin_exchange(self)
        else:
            if is_safe:
                upload.keep(upstream_client.retries.policy.max_body_bytes)
            if upload.is_complete:
                self._client.begin_exchange(self)
            else:
                self._expect_body(upload, route)
        if deadline is not None:
            self._limit_time(deadline, now)
        self._start(upstream_client, attempt, now)
        return None

    def _limit_time(self, deadline: Deadline, now: float) -> None:
        """Start the timer of the deadline."""
        self.timer = self._client.loop.call_later(deadline.at - now, self._on_deadline, self.generation)
        self.is_pending = True

    def _expect_body(self, upload: ExchangeBody, route: Route) -> None:
        """Receive the rest of the body of an admitted request by the settings of its route."""
        if route.min_body_rate is not None:
            upload.body_rate = route.min_body_rate
        self._begin()
        self._pace_body(upload)

    # Fallbacks

    def _after(self, error: GatewayError) -> GatewayError | None:
        """Respond by the fallback of the route; return the error to respond with if there is none that applies."""
        route = self.plan.route
        if route is None or route.fallback is None or not isinstance(error, Unavailable | UpstreamFailed):
            return error
        if self.first_failure is not None:
            return self._after_both(self.first_failure, error)
        fallback, router = route.fallback, self._context.router
        if not self._applies(fallback, error):
            return error
        self.move(FALL_BACK)
        exchange = self.exchange
        note_failure(exchange, error)
        exchange.fallback = fallback.name
        router.on_fallback(exchange, error)
        exchange.has_reached |= not error.is_retry_safe
        if fallback.upstream is None:
            self._respond_static(fallback)
            return None
        return self._ask_fallback(router.upstream_clients[fallback.upstream], error)

    def _applies(self, fallback: Fallback, error: GatewayError) -> bool:
        """Return whether the fallback responds after an error."""
        deadline, upload = self.plan.deadline, self.upload
        if fallback.upstream is not None and deadline is not None and deadline.at <= self._context.clock():
            return False
        is_replayable = upload is None or upload.is_replayable
        return applies(fallback, error, is_repeatable=self._is_repeatable, is_replayable=is_replayable)

    def _respond_static(self, fallback: Fallback) -> None:
        """Respond with the static response of the route."""
        self.move(REFUSE)
        context, exchange = self._context, self.exchange
        self._end_persistence_if_withheld()
        self._begin()
        self._client.transport.write(static_response(fallback, exchange, context, keep_alive=self.keep_alive))
        self._end(context.clock(), Outcome.IGNORED, keep_alive=self.keep_alive)

    def _ask_fallback(self, upstream_client: UpstreamClient, error: GatewayError) -> GatewayError | None:
        """Begin the attempts on another upstream; return the error to respond with if none can be begun."""
        exchange, attempt, now = self.exchange, self.attempt, self._context.clock()
        self.first_failure = FirstFailure(error, exchange.upstream, exchange.target)
        self.attempt = self._last_attempt = None
        if attempt is not None:
            attempt.release(now)
        if self.upload is not None:
            self.upload.end_attempt()
        self._forget()
        self.tried, exchange.head_at = (), None
        self.move(SELECT)
        exchange.upstream = upstream_client.upstream.name
        upstream_client.retries.budget.deposit(exchange.started)
        plan, is_safe = self.plan, self._is_repeatable
        try:
            self.attempt = attempt = upstream_client.upstream.acquire(
                now,
                self._key(upstream_client),
                priority=plan.priority,
                is_safe=is_safe,
                principal=plan.principal,
            )
        except Unavailable as refusal:
            return self._after(refusal.with_traceback(None))
        self.timeouts = upstream_client.timeouts_within(None if plan.route is None else plan.route.response_timeout)
        self._begin()
        if self.timer is None and plan.deadline is not None:
            self._limit_time(plan.deadline, now)
        self._start(upstream_client, attempt, now)
        return None

    def _after_both(self, first: FirstFailure, second: GatewayError) -> GatewayError:
        """Return the error of the first upstream, after the fallback has failed too."""
        exchange = self.exchange
        note_shed(exchange, second)
        exchange.upstream, exchange.target, exchange.fallback = first.upstream, first.target, None
        exchange.has_reached |= not second.is_retry_safe
        add_failure(first.error, second)
        return first.error

    # The deadline

    def _on_deadline(self, generation: int) -> None:
        """Respond with the error of the deadline, or by the fallback; once the response has begun, close instead."""
        deadline, attempt = self.plan.deadline, self.attempt
        if generation != self.generation or deadline is None:
            return
        exchange, context = self.exchange, self._context
        deadline.at = min(deadline.at, context.clock())  # the event loop may call up to a millisecond early
        is_sent = self.phase == EXCHANGING
        if (
            is_sent and attempt is not None and self.response != PAUSED
        ):  # else the client is awaited, and the upstream has responded
            assert exchange.sent_at is not None  # noqa: S101 - set before sending
            client = self._client_progress()
            spent = context.clock() - exchange.sent_at - (client.waited - self.waited_before_head)
            context.router.outcomes.on_overdue(exchange, attempt, deadline, spent, client)
        if self.response != NONE:
            self.move(BREAK)
            context.record.note_failure(exchange, deadline_error(exchange, deadline))
            self._abort()
            return
        self.close()
        if is_sent:
            exchange.has_begun = exchange.has_reached = True
        error = self._after(deadline_error(exchange, deadline))
        if error is not None:
            self._refuse(error)
