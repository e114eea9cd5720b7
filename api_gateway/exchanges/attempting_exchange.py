"""The sending half of an exchange: its attempts, from the connection to the retry."""

import httpx

from api_gateway.errors import GatewayError, UpstreamFailed
from api_gateway.exchanges.exchange_body import ExchangeBody
from api_gateway.exchanges.relaying_exchange import RelayingExchange
from api_gateway.http1.fast_parser import pairs_of, remove_lines
from api_gateway.http1.headers import (
    REQUEST_TIMEOUT,
    fields_of,
)
from api_gateway.http1.methods import IDEMPOTENT
from api_gateway.proxy.attribution import NO_PROGRESS, outcome_of_abort
from api_gateway.proxy.exchange import (
    CONNECT,
    EXCHANGING,
    FINAL,
    RESUME,
    RETRY,
)
from api_gateway.resilience.retry import RetryDenied, retry_after_of
from api_gateway.transport.pool import StaleConnection
from api_gateway.transport.response import NO_LISTENER, UpstreamResponse
from api_gateway.transport.upstream_call import UpstreamCall
from api_gateway.upstreams.upstream import Attempt
from api_gateway.upstreams.upstream_client import UpstreamClient

_MAX_COPIED = 16_384  # bytes of a request body for which copying is cheaper than a write of several pieces


class AttemptingExchange(RelayingExchange):
    """Makes attempts on one upstream until one has a response, or none is left."""

    def _start(self, upstream_client: UpstreamClient, attempt: Attempt, now: float) -> None:
        """Begin an attempt: send the request on an idle connection, or open one."""
        self._note_attempt(attempt, now)
        connection = upstream_client.idle_connection(attempt.target, self.plan.principal)
        if connection is None:
            self._begin_to_connect(upstream_client, attempt, now)
        else:
            self._send(connection, upstream_client, attempt, now)

    def _note_attempt(self, attempt: Attempt, now: float) -> None:
        exchange = self.exchange
        exchange.target, exchange.sent_at = attempt.target.url, now
        exchange.attempts += 1
        trace = exchange.trace
        if trace is not None:
            if trace.attempt is not None:
                trace.next_attempt()
            upstream = attempt.upstream
            trace.attempt = upstream.name, attempt.target.url, self.plan.target, upstream.breaker.state, now

    def _key(self, upstream_client: UpstreamClient) -> str:
        """Return the key for load balancing."""
        if upstream_client.hash_header is None:
            return self.exchange.client_key
        return upstream_client.hash_key(fields_of(pairs_of(self.plan.headers.received)), self.exchange)

    def _begin_to_connect(self, upstream_client: UpstreamClient, attempt: Attempt, now: float) -> None:
        self.move(CONNECT)
        self.is_pending = True
        self.task = self._client.loop.create_task(self._connect(upstream_client, attempt, now))

    async def _connect(self, upstream_client: UpstreamClient, attempt: Attempt, now: float) -> None:
        """Open or await a connection, and send the request.

        Connecting may take half of the time that a deadline leaves, which allows a retry; a client's own deadline does
        not shorten it, because it would make each target appear unreachable.
        """
        deadline, seconds, generation = self.plan.deadline, upstream_client.timeouts["connect"], self.generation
        if deadline is not None and not deadline.is_of_client:
            seconds = min(seconds, deadline.remaining(now) / 2)
        try:
            connection = await self._acquire(upstream_client, attempt, seconds)
        except Exception as error:  # noqa: BLE001 - any other than these is a defect, which is recorded
            if generation != self.generation:
                return
            self.task = None
            if isinstance(error, httpx.TransportError):
                self.is_sent = self.is_repeated
                self._fail(_second_failure(error) if self.is_repeated else error.with_traceback(None))
            else:
                self._refuse(self._context.record.internal_error(self.exchange, error))
            return
        if generation != self.generation:  # the exchange has ended, and the cancellation came too late
            connection.close()
            return
        self.task = None
        self._send(connection, upstream_client, attempt, self._context.clock())

    async def _acquire(self, upstream_client: UpstreamClient, attempt: Attempt, seconds: float) -> UpstreamCall:
        """Open or await a connection. Raises httpx.TransportError."""
        return await upstream_client.connection(
            attempt.target, self.plan.principal, seconds, self._on_connect, is_fresh=self.is_repeated
        )

    def _on_connect(self) -> None:
        """Note that a connection is being opened, which matters for the refund."""
        self.exchange.has_begun = True

    def _send(self, connection: UpstreamCall, upstream_client: UpstreamClient, attempt: Attempt, now: float) -> None:
        """Send the request on a connection."""
        plan, exchange, upload = self.plan, self.exchange, self.upload
        route, deadline = plan.route, plan.deadline
        host, identity = upstream_client.hosts[attempt.target], exchange.id.encode()
        if not host:
            host = upstream_client.host_of(attempt.target, self.plan.facts.host_field)
        sent = self.plan.headers.sent
        if route is not None and route.url_rewriter is not None:
            host += route.url_rewriter.request_line
            sent = route.url_rewriter.edited(sent, plan.facts, exchange, plan.raw_target)
            if upload is not None:
                upload.editor = route.url_rewriter
        if plan.facts.claim is not None:
            host += self._credential_lines()
        if deadline is not None and deadline.is_forwarded:
            identity += b"\r\n%b: %b" % (REQUEST_TIMEOUT, deadline.header_value(now))
        if exchange.trace is not None:
            identity += exchange.trace.fields
        self.connection = connection
        self.phase = EXCHANGING
        head = b"%b %b HTTP/1.1\r\nhost: %b%bx-request-id: %b\r\n\r\n" % (
            exchange.method.encode(),
            plan.target,
            host,
            sent,
            identity,
        )
        if upload is None:
            connection.start(self, head)
        else:
            self._send_with_body(connection, upload, head)

    def _credential_lines(self) -> bytes:
        """Return the header lines for the upstream of a request with a credential, each after a line break.

        They are what the credential states about the client, if the configuration names header fields for it, and the
        credential itself, if the route forwards it.
        """
        facts, route = self.plan.facts, self.plan.route
        lines = b"" if facts.proof is None else facts.proof.lines
        if facts.credentials and route is not None and route.forward_credentials:
            lines += b"\r\n%b" % facts.credential_lines
        return lines

    def _send_with_body(self, connection: UpstreamCall, upload: ExchangeBody, head: bytes) -> None:
        """Send a head and what has arrived of the body.

        The expectation of 100 (Continue) goes upstream only while the client waits for it.
        """
        expectation = self.plan.facts.expectation
        if expectation and upload.awaits_continue and not connection.abilities.interim:
            upload.send_continue()
        if expectation and not upload.awaits_continue:
            head = remove_lines(head, expectation)
        self.exchange.bytes_in = size = upload.received
        pieces = upload.begin(connection)
        request = [head, *pieces] if size > _MAX_COPIED else [head + b"".join(pieces)]
        if upload.is_complete:
            connection.start(self, *request)
        else:
            self.listener = upload
            connection.begin(self, request, upload.left, gathers=upload.is_parsed)
            self._pace_body(upload)

    # Retries

    def _fail(self, error: Exception) -> None:
        """End an attempt without a response; retry, fall back, or respond with its error."""
        exchange, attempt, router = self.exchange, self.attempt, self._context.router
        assert attempt is not None  # noqa: S101 - set before sending
        self.close()
        if not isinstance(error, httpx.TransportError):  # a defect of another transport than the gateway's own
            self.is_sent = True
            self._refuse(self._context.record.internal_error(exchange, error))
            return
        client_progress = NO_PROGRESS
        if self.upload is not None:
            client_progress = self._note_progress(self.upload)
            self.upload.end_attempt()
        elif isinstance(error, StaleConnection) and exchange.method in IDEMPOTENT and not self.is_repeated:
            self._forget()
            self.is_repeated = True
            client = router.upstream_clients[attempt.upstream.name]
            self._begin_to_connect(client, attempt, self._context.clock())
            return
        self.error = None
        failure = router.outcomes.on_failure(exchange, attempt, error, client_progress)
        failure.__cause__ = error
        exchange.has_begun |= self.is_sent
        exchange.has_reached |= self.is_sent and not failure.is_retry_safe
        if isinstance(failure, UpstreamFailed):
            delay = self._retry_delay(attempt, is_sent=not failure.is_retry_safe)
            if delay is not None:
                exchange.has_reached |= not failure.is_retry_safe
                self._back_off(attempt, delay, failure.reason.value, failure)
                return
        final = self._after(failure)
        if final is not None:
            self._refuse(final)

    def _retries(self, attempt: Attempt, now: float) -> bool:
        """Prepare a retry after a response with a status that is retried; return False if it is denied."""
        delay = self._retry_delay(attempt, is_sent=True, retry_after=retry_after_of(self.fields))
        if delay is None:
            return False
        self.exchange.has_reached = True
        self._context.router.outcomes.settle(attempt, outcome_of_abort(has_head=True), now)
        self._back_off(attempt, delay, str(self.status), None)
        return True

    def _retry_delay(self, attempt: Attempt, *, is_sent: bool, retry_after: float | None = None) -> float | None:
        router = self._context.router
        upstream_client, upload = router.upstream_clients[attempt.upstream.name], self.upload
        self.tried += (attempt.target,)
        # While the rest of a body is still sent to the first target, a retry after a response could lose it.
        return router.retry_delay(
            upstream_client,
            attempt,
            self.tried,
            is_sent=is_sent,
            is_repeatable=self._is_repeatable,
            is_replayable=upload is None
            or (upload.is_replayable and (upload.is_complete or not self.is_head_complete)),
            retry_after=retry_after,
            deadline=self.plan.deadline,
        )

    def _back_off(self, attempt: Attempt, delay: float, cause: str, failure: GatewayError | None) -> None:
        """Wait before a retry. The result of the last attempt is kept, because it may be final."""
        self.move(RETRY)
        self.is_pending = True
        self.attempt, self._last_attempt = None, attempt
        attempt.release(self._context.clock())
        self.cause, self.failure = cause, failure
        if failure is None:
            self.last = UpstreamResponse.continuing(self, NO_LISTENER)
        self.delay = self._client.loop.call_later(delay, self._on_delay, self.generation)

    def _on_delay(self, generation: int) -> None:
        """Begin the retry; if no target is available for it, the result of the last attempt is final."""
        if generation != self.generation or self._last_attempt is None:
            return
        self.delay = None
        self.move(RESUME)
        plan, exchange, router = self.plan, self.exchange, self._context.router
        upstream_client = router.upstream_clients[self._last_attempt.upstream.name]
        now = self._context.clock()
        last, failure, name = self.last, self.failure, upstream_client.upstream.name
        self.last = self.failure = None
        is_safe = self._is_repeatable
        attempt = router.next_attempt(
            upstream_client, self._key(upstream_client), self.tried, is_safe=is_safe, principal=plan.principal
        )
        if attempt is None:
            router.on_denial(name, RetryDenied.UNAVAILABLE)
            self._settle_for(last, failure, now)
            return
        exchange.retried += (self.cause,)
        router.on_retry(name, self.cause)
        if last is not None:
            last.close()
        self._forget()
        exchange.head_at = None
        self.attempt = attempt
        self._start(upstream_client, attempt, now)

    def _settle_for(self, last: UpstreamResponse | None, failure: GatewayError | None, now: float) -> None:
        """Respond with the result of the last attempt."""
        if failure is not None:
            final = self._after(failure)
            if final is not None:
                self._refuse(final)
        elif last is not None and self._last_attempt is not None:
            self.move(FINAL)
            self._forget()
            self.take_over(last)
            if self._write_head(self._last_attempt):
                self._go_on(now)


def _second_failure(error: httpx.TransportError) -> httpx.ReadError:
    """Return the error of a request that could not be sent again: not a ConnectError, because it was sent before."""
    failure = httpx.ReadError(f"{StaleConnection()}; second attempt: {error}")
    failure.__cause__ = error.with_traceback(None)
    return failure
