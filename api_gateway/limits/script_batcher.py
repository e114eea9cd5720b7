"""Carries questions to the store: whatever waits goes out in one script call, without a timer that would collect it.

Requests never own a connection. They leave a question, and are answered by a callback; so one that is cancelled breaks
nothing, and many that come within one turn of the event loop share one write and one read. A question is sent once at
most: what may have been executed is never sent again. It is answered within the deadline, if need be with a failure.

A connection serves only after the store has answered on it within the deadline. Three failures in a row, or half of
twenty, open the breaker: then nothing is sent, and nothing waits, until the store has answered a trial in time.
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

CONNECTIONS = 2  # batches under way at once: one is answered while the next is written
MAX_BATCH = 128  # questions; a script call keeps the store from everything else
CONNECT_TIMEOUT = 1.0  # seconds; requests do not wait for it
MAX_SILENCE = 1.0  # seconds without a word from the store
MIN_RECONNECT_DELAY, MAX_RECONNECT_DELAY = 0.05, 1.0  # seconds between attempts to connect

STORE_BREAKER_POLICY = BreakerPolicy(
    failure_threshold=3, failure_rate=0.5, minimum_calls=20, window=10, recovery_timeout=1, half_open_max_calls=1
)


class ScriptOp(ABC):
    """What is asked of the script within a batch; see token_bucket.lua for the operations.

    `key` is one of its buckets: on a cluster all of them must lie where that one does.
    """

    __slots__ = ("expires", "is_over", "is_sent", "key")

    def __init__(self, key: str) -> None:
        self.key = key
        self.expires = 0.0
        self.is_sent = self.is_over = False

    @abstractmethod
    def write(self, call: ScriptCall) -> None:
        """Append its operations."""

    @abstractmethod
    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """Take its part of the reply, and act on it unless the question `is_over`."""

    @abstractmethod
    def fail(self) -> None:
        """Do without the store. If it `is_sent`, it may have been executed all the same."""


class ScriptBatcher:
    """Asks one store on behalf of one process."""

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
        """`deadline` is in seconds, from leaving the question to its answer. Any failure calls `on_trouble`.

        `node` is the server to ask, where the store has several.
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
        """True while a question has a chance of being answered in time."""
        return self.connections > 0 and self.breaker.state is State.CLOSED

    @property
    def is_whole(self) -> bool:
        """True while that holds for every question."""
        return self.is_usable

    async def start(self) -> None:
        """Connect, and go on connecting until `close`. Returns once the store has answered, or failed to do so."""
        self._loop = asyncio.get_running_loop()
        self._connection_tasks = [
            asyncio.create_task(self._run_connection(), name=f"store lane {n}") for n in range(CONNECTIONS)
        ]
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self._connected.wait()
        except TimeoutError:
            logger.warning("the store cannot be used yet: %s", self.last_error or "it does not answer")

    async def close(self) -> None:
        """Disconnect. What still waits is answered with a failure."""
        await cancel_and_wait(*self._connection_tasks)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fail_waiting()

    def submit(self, op: ScriptOp) -> None:
        """Have a question answered, or failed, within the deadline."""
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
        """Set idle lanes to work, at the end of the turn in which the questions came."""
        self._is_waking = False
        needed = math.ceil(len(self._waiting) / MAX_BATCH)
        while needed and self._idle:
            idle = self._idle.popleft()
            if not idle.done():  # or else its lane has just ended its rest by itself, and tries its connection out
                idle.set_result(None)
                needed -= 1

    def _expire(self) -> None:
        """Fail what is as old as it may get."""
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

    # Lanes

    async def _run_connection(self) -> None:
        """Keep one connection, and carry batches over it."""
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
                pause = MIN_RECONNECT_DELAY  # it has been counted where it happened
            except Exception:  # a defect of ours; the lane begins anew, or questions would wait for it for ever
                logger.exception("a connection to the store is given up")
                await asyncio.sleep(pause)
            finally:
                connection.abort()

    async def _serve(self, connection: ScriptConnection) -> None:
        """Carry batches, once the store has answered in time; returns by raising."""
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
                    await self._probe(connection)  # a connection that broke while idle shall not cost a request
        finally:
            self.connections -= 1
            if self._waiting:  # it was woken for them
                self._schedule_wake()

    async def _is_woken(self) -> bool:
        """Wait for questions, but not for ever; tell whether there are any."""
        idle = self._loop.create_future()
        self._idle.append(idle)
        try:
            async with asyncio.timeout(MAX_SILENCE):
                await idle
        except TimeoutError:
            return False
        finally:
            if idle in self._idle:  # nobody has woken it
                self._idle.remove(idle)
        return True

    async def _probe(self, connection: ScriptConnection) -> None:
        """Have the store answer to nothing in time: the breaker's probe, so that no request has to be it."""
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
        """Send a batch and hand out the replies."""
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
                "the store is %s: %s",
                "not used for now" if is_open else "in use again",
                moved.cause,
            )
            if is_open:
                self._fail_waiting()


def _groups(connection: ScriptConnection, ops: list[ScriptOp]) -> list[list[ScriptOp]]:
    """Put together what one call of the script can answer."""
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
    except Exception:  # a defect of whoever asked; the others have their answers coming
        logger.exception("an answer of the store could not be acted on")
    finally:
        op.is_over = True


def fail_op(op: ScriptOp) -> None:
    """Fail a question, unless it is over."""
    if op.is_over:
        return
    op.is_over = True
    try:
        op.fail()
    except Exception:  # as above
        logger.exception("a question to the store could not be given up")
