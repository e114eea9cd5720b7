"""Batches of operations for the store: all waiting operations are sent in one script call, without a delay.

Requests do not own connections. They submit an operation and get the result by a callback, so a cancelled request has
no effect on others, and operations of one turn of the event loop share one write and one read. An operation is sent at
most once, because it may have been executed. It completes within the deadline, if necessary with a failure.

A connection is used only after the store has responded on it within the deadline. Three consecutive failures, or half
of twenty, open the circuit breaker: then nothing is sent and nothing waits until a probe has succeeded.
"""

import asyncio
import logging
import math
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator

from api_gateway.circuit_breaker import CircuitBreaker, Ticket
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Clock, Outcome
from api_gateway.resilience.breaker_policy import BreakerPolicy, State
from api_gateway.storage.redis_session import Script, ScriptCall, ScriptConnection, StoreError, StoreSession

logger = logging.getLogger(__name__)

CONNECTIONS = 2  # each with one batch at a time, so that one is processed while the next is written
MAX_BATCH = 128  # operations; the store executes nothing else during a script call
CONNECT_TIMEOUT = 1.0  # seconds; requests do not wait for it
MAX_SILENCE = 1.0  # seconds after which an idle connection is probed
# Seconds between attempts to connect. Short, as well as the breaker's, because gateways that find the store available
# again at different times admit more than the limit together: see docs/limits.md, "K of N".
MIN_RECONNECT_DELAY, MAX_RECONNECT_DELAY = 0.05, 0.25

STORE_BREAKER_POLICY = BreakerPolicy(
    failure_threshold=3, failure_rate=0.5, minimum_calls=20, window=10, recovery_timeout=0.5, half_open_max_calls=1
)


class ScriptOp(ABC):
    """One or more operations of token_bucket.lua that are sent together in a batch.

    `key` is the key of one of its buckets; on a cluster all of them must be in the same slot. States: waiting, sent
    (`is_sent`), over (`is_over`: completed or failed, from either state).
    """

    __slots__ = ("expires", "is_over", "is_sent", "key")

    def __init__(self, key: str) -> None:
        self.key = key
        self.expires = 0.0
        self.is_sent = self.is_over = False

    def __repr__(self) -> str:
        state = "over" if self.is_over else "sent" if self.is_sent else "waiting"
        return f"<{type(self).__name__} [{state}]>"

    @abstractmethod
    def write(self, call: ScriptCall) -> None:
        """Append keys and arguments to a call."""

    @abstractmethod
    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """Consume its part of the reply, and complete unless `is_over`. `clock_us` is the store's time."""

    @abstractmethod
    def fail(self) -> None:
        """Complete without the store. If `is_sent`, the store may have executed the operation."""


class ScriptBatcher:
    """Sends the operations of one process to one server.

    Usable while a connection has passed its probe and the breaker is CLOSED; otherwise operations that are submitted
    wait for a connection until their deadline.
    """

    def __init__(
        self,
        session: StoreSession,
        script: Script,
        *,
        deadline: float,
        clock: Clock,
        source: random.Random,
        on_error: Callable[[], None],
        node: str = "",
    ) -> None:
        """`deadline` is the time in seconds from submission to completion. `on_error` is called after each failure.

        `node` is the name of the server on a cluster.
        """
        self.deadline = deadline
        self._session = session
        self._node = node
        self._script = script
        self._clock = clock
        self._source = source
        self._on_error = on_error
        self._waiting: deque[ScriptOp] = deque()
        self._open: deque[ScriptOp] = deque()  # waiting or sent, in order
        self._idle: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._is_waking = False
        self._connection_tasks: list[asyncio.Task[None]] = []
        self._connected = asyncio.Event()
        self.connections = 0
        self.breaker = CircuitBreaker(STORE_BREAKER_POLICY, clock())
        self.calls = self.operations = self.failures = 0
        self.last_error: str | None = None

    def __repr__(self) -> str:
        return f"<ScriptBatcher [{self.connections} connections, {len(self._waiting)} waiting, {self.breaker.state}]>"

    @property
    def is_usable(self) -> bool:
        """True while operations are sent: there is a connection, and the breaker is CLOSED."""
        return self.connections > 0 and self.breaker.state is State.CLOSED

    @property
    def is_whole(self) -> bool:
        """The same as `is_usable`; a cluster distinguishes the two."""
        return self.is_usable

    async def start(self) -> None:
        """Connect, and reconnect until `close`. Returns when the store has responded, or after `CONNECT_TIMEOUT`."""
        self._loop = asyncio.get_running_loop()
        self._connection_tasks = [
            asyncio.create_task(self._run_connection(), name=f"store connection {n}") for n in range(CONNECTIONS)
        ]
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self._connected.wait()
        except TimeoutError:
            logger.warning("store not available yet: %s", self.last_error or "no response")

    async def close(self) -> None:
        """Disconnect; pending operations fail."""
        await cancel_and_wait(*self._connection_tasks)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fail_waiting()

    def submit(self, op: ScriptOp) -> None:
        """Send an operation; it completes or fails within the deadline."""
        op.expires = self._loop.time() + self.deadline
        self._waiting.append(op)
        self._open.append(op)
        if self._timer is None:
            self._timer = self._loop.call_at(op.expires, self._expire)
        self._schedule_wake()

    def _schedule_wake(self) -> None:
        if self._idle and not self._is_waking:
            self._is_waking = True
            self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        """Wake idle connections, at the end of the turn of the event loop in which operations were submitted."""
        self._is_waking = False
        needed = math.ceil(len(self._waiting) / MAX_BATCH)
        while needed and self._idle:
            idle = self._idle.popleft()
            if not idle.done():  # else the connection has just timed out and is being probed
                idle.set_result(None)
                needed -= 1

    def _expire(self) -> None:
        """Fail the operations whose deadline has passed."""
        self._timer = None
        now = self._loop.time()
        while self._open and (self._open[0].is_over or self._open[0].expires <= now):
            fail_op(self._open.popleft())
        if self._open:
            self._timer = self._loop.call_at(self._open[0].expires, self._expire)

    def _fail_waiting(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for op in waiting:
            fail_op(op)

    # Connections

    async def _run_connection(self) -> None:
        """Keep one connection open, and send batches on it, until cancelled."""
        pause = MIN_RECONNECT_DELAY
        while True:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    connection = await self._session.script_connection(self._script, self._node)
            except StoreError as error:
                self._count(self.breaker.admit(self._clock()), Outcome.FAILURE, error)
                await asyncio.sleep(pause * self._source.uniform(0.5, 1.5))
                pause = min(2 * pause, MAX_RECONNECT_DELAY)
                continue
            try:
                await self._serve(connection)
            except StoreError:
                pause = MIN_RECONNECT_DELAY  # the failure has been counted already
            except Exception:  # a defect; reconnect, or operations would wait for this connection for ever
                logger.exception("connection to the store closed after an unexpected error")
                await asyncio.sleep(pause)
            finally:
                connection.abort()

    async def _serve(self, connection: ScriptConnection) -> None:
        """Send batches after a successful probe. Ends only by raising."""
        await self._probe(connection)
        self.connections += 1
        self._connected.set()
        try:
            while True:
                if self.breaker.state is not State.CLOSED:
                    await self._probe(connection)
                while self._waiting:
                    await self._send_batch(connection)
                if not await self._is_woken():
                    await self._probe(connection)  # so that no request is sent on a connection that broke while idle
        finally:
            self.connections -= 1
            if self._waiting:  # this connection was woken for them
                self._schedule_wake()

    async def _is_woken(self) -> bool:
        """Wait for operations, at most `MAX_SILENCE` seconds; return whether there are any."""
        idle = self._loop.create_future()
        self._idle.append(idle)
        try:
            async with asyncio.timeout(MAX_SILENCE):
                await idle
        except TimeoutError:
            return False
        finally:
            if idle in self._idle:  # not woken
                self._idle.remove(idle)
        return True

    async def _probe(self, connection: ScriptConnection) -> None:
        """Send an empty call, with the deadline, as the breaker's probe, so that no request is used as one."""
        while True:
            ticket = self.breaker.admit(self._clock())
            if ticket is not None:
                break
            await asyncio.sleep(max(self.breaker.retry_after(self._clock()), self.deadline))
        try:
            async with asyncio.timeout(self.deadline):
                await connection.run([ScriptCall()])
        except StoreError as error:
            self._count(ticket, Outcome.FAILURE, error)
            raise
        self._count(ticket, Outcome.SUCCESS, None)

    async def _send_batch(self, connection: ScriptConnection) -> None:
        """Send a batch and distribute the replies."""
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
        groups = _groups(connection, [op for op in batch if not op.is_over])
        if not groups:
            return
        ticket = self.breaker.admit(self._clock())
        replies = None
        try:
            async with asyncio.timeout_at(batch[-1].expires):
                replies = await connection.run([_call(group) for group in groups])
        except StoreError as error:
            self._count(ticket, Outcome.FAILURE, error)
            raise
        finally:
            if replies is None:
                for op in batch:
                    fail_op(op)
        self._count(ticket, Outcome.SUCCESS, None)
        self.calls += 1
        self.operations += len(batch)
        for group, reply in zip(groups, replies, strict=True):
            values = iter(reply)
            clock_us = next(values)
            for op in group:
                _read(op, clock_us, values)

    def _count(self, ticket: Ticket | None, outcome: Outcome, error: BaseException | None) -> None:
        detail = "" if error is None else str(error) or type(error).__name__
        if error is not None:
            self.failures += 1
            self.last_error = detail
            self._on_error()
        if ticket is None:
            return
        moved = self.breaker.settle(ticket, outcome, self._clock(), detail)
        if moved is not None:
            is_open = moved.target is State.OPEN
            logger.log(
                logging.WARNING if is_open else logging.INFO,
                "store %s: %s",
                "unavailable, circuit breaker open" if is_open else "available again",
                moved.cause,
            )
            if is_open:
                self._fail_waiting()


def _groups(connection: ScriptConnection, ops: list[ScriptOp]) -> list[list[ScriptOp]]:
    """Group operations into script calls: on a cluster by slot, else all together."""
    if not connection.is_divided:
        return [ops] if ops else []
    groups: dict[int, list[ScriptOp]] = {}
    for op in ops:
        groups.setdefault(connection.slot(op.key), []).append(op)
    return list(groups.values())


def _call(ops: list[ScriptOp]) -> ScriptCall:
    call = ScriptCall()
    for op in ops:
        op.write(call)
        op.is_sent = True
    return call


def _read(op: ScriptOp, clock_us: int, values: Iterator[int]) -> None:
    try:
        op.read(clock_us, values)
    except Exception:  # a defect of this operation must not affect the others
        logger.exception("processing a reply of the store failed")
    finally:
        op.is_over = True


def fail_op(op: ScriptOp) -> None:
    """Fail an operation, unless it is over."""
    if op.is_over:
        return
    op.is_over = True
    try:
        op.fail()
    except Exception:  # as in `_read`
        logger.exception("failing an operation of the store raised an error")
