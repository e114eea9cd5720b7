"""The batcher on a real store: one reply for each operation, in time, whatever fails or is cancelled."""

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from api_gateway.limits import script_batcher
from api_gateway.limits.redis_limiter import TOKEN_BUCKET_SCRIPT
from api_gateway.limits.script_batcher import CONNECTIONS, MAX_BATCH, ScriptBatcher, ScriptOp
from api_gateway.resilience.breaker_policy import State
from api_gateway.storage.redis_session import Script, ScriptCall, StoreSession
from tests.kit import soon
from tests.store_kit import CALM, EPSILON, SERVERS, Lateness, Proxy, StoreServer

# Echoes what was asked, and counts it: a reply that goes astray shows itself.
ECHO = Script("""
local time = redis.call('TIME')
local reply = {time[1] * 1000000 + time[2]}
for at = 1, #ARGV do
  redis.call('INCR', KEYS[1])
  reply[#reply + 1] = tonumber(ARGV[at])
end
return reply
""")


class Echo(ScriptOp):
    """Asks for a number."""

    def __init__(self, number: int, key: str = "count") -> None:
        super().__init__(key)
        self.number = number
        self.begun = time.monotonic()
        self.took: float | None = None
        self.heard: int | None = None
        self.answers = 0
        self.is_failed = False

    def write(self, call: ScriptCall) -> None:
        call.number(self.key)
        call.arguments.append(self.number)

    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        heard = next(reply)
        if not self.is_over:
            self.heard = heard
            self._note()

    def fail(self) -> None:
        self.is_failed = True
        self._note()

    def _note(self) -> None:
        self.took = time.monotonic() - self.begun
        self.answers += 1

    @property
    def is_answered_rightly(self) -> bool:
        return self.answers == 1 and self.heard == self.number


@asynccontextmanager
async def dispatching(url: str, *, script: Script = ECHO, deadline: float = CALM) -> AsyncIterator[ScriptBatcher]:
    session = StoreSession(url, timeout=1)
    troubles: list[None] = []
    dispatcher = ScriptBatcher(
        session,
        script,
        deadline=deadline,
        clock=time.monotonic,
        source=random.Random(1),
        on_error=lambda: troubles.append(None),
    )
    await dispatcher.start()
    try:
        yield dispatcher
        assert all(not lane.done() for lane in dispatcher._connection_tasks), "a lane has died"
        assert len(troubles) == dispatcher.failures
    finally:
        await dispatcher.close()
        await session.close()


def ask(dispatcher: ScriptBatcher, count: int, first: int = 0) -> list[Echo]:
    asked = [Echo(number) for number in range(first, first + count)]
    for question in asked:
        dispatcher.submit(question)
    return asked


async def answered(asked: list[Echo]) -> None:
    await soon(lambda: all(question.answers for question in asked), "all are answered")


def longest(asked: list[Echo], lateness: Lateness) -> float:
    """Return the longest time of an operation in seconds, less the lag of the loop meanwhile."""
    return max(
        lateness.without(question.begun, math.inf if question.took is None else question.took) for question in asked
    )


def lanes_idle(dispatcher: ScriptBatcher) -> int:
    return sum(not idle.done() for idle in dispatcher._idle)


# Batches


async def test_operations_of_one_turn_share_a_call(store: StoreServer) -> None:
    async with dispatching(store.url) as dispatcher:
        before = dispatcher.calls
        asked = ask(dispatcher, 10)
        await answered(asked)
        assert dispatcher.calls == before + 1
        assert all(question.is_answered_rightly for question in asked)


async def test_a_call_has_a_maximum_of_operations_and_the_rest_go_in_the_next(store: StoreServer) -> None:
    async with dispatching(store.url) as dispatcher:
        asked = ask(dispatcher, 5 * MAX_BATCH + 1)
        await answered(asked)
        assert all(question.is_answered_rightly for question in asked)
        assert dispatcher.calls == 6
        assert int(store.admin.get("count") or 0) == len(asked)


async def test_there_are_two_connections_and_no_more(store: StoreServer) -> None:
    async with dispatching(store.url) as dispatcher:
        await soon(lambda: dispatcher.connections == CONNECTIONS, "both lanes serve")
        for _ in range(50):
            await answered(ask(dispatcher, 7))
        assert len(store.connections()) == CONNECTIONS
    assert store.connections() == []


async def test_each_connection_is_idle_once_at_most(store: StoreServer) -> None:
    async with dispatching(store.url) as dispatcher:
        for number in range(200):
            asked = ask(dispatcher, number % 3 + 1)
            if number % 7:
                await answered(asked)
            assert len(dispatcher._idle) <= CONNECTIONS
        await answered(asked)
        await soon(lambda: lanes_idle(dispatcher) == CONNECTIONS == len(dispatcher._idle), "both rest")


async def test_nothing_is_kept_of_completed_operations(store: StoreServer) -> None:
    async with dispatching(store.url, deadline=0.2) as dispatcher:
        for _ in range(20):
            await answered(ask(dispatcher, 50))
        await soon(lambda: not dispatcher._open and not dispatcher._waiting, "all is forgotten")
        assert dispatcher._timer is None


# Scripts


async def test_a_script_the_store_has_forgotten_is_sent_again(store: StoreServer) -> None:
    async with dispatching(store.url) as dispatcher:
        for number in range(30):
            if number % 3 == 0:
                store.admin.script_flush()
            asked = ask(dispatcher, 3)
            await answered(asked)
            assert all(question.is_answered_rightly for question in asked)
        assert dispatcher.failures == 0
        assert int(store.admin.get("count") or 0) == 90


async def test_an_error_of_the_script_fails_its_operations_at_once(store: StoreServer) -> None:
    store.admin.lpush("count", "not a number")
    async with dispatching(store.url, deadline=5) as dispatcher:
        asked = ask(dispatcher, 3)
        await answered(asked)
        assert all(question.is_failed and question.took is not None and question.took < 1 for question in asked)
        store.admin.delete("count")
        await soon(lambda: dispatcher.is_usable, "it is used again")
        asked = ask(dispatcher, 3)
        await answered(asked)
        assert all(question.is_answered_rightly for question in asked)


# In time


async def start_down(store: StoreServer) -> None:
    store.kill()


async def stopped(store: StoreServer) -> None:
    store.pause()


async def paused(store: StoreServer) -> None:
    store.admin.execute_command("CLIENT", "PAUSE", "700", "ALL")


TROUBLES = {"killed": start_down, "stopped": stopped, "paused by a client": paused}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
async def test_no_operation_waits_longer_than_the_deadline(store: StoreServer, trouble: Any) -> None:
    """Whether it was under way, waited for a lane, or came while lanes reconnected."""
    async with dispatching(store.url, deadline=0.1) as dispatcher, Lateness() as lateness:
        asked = ask(dispatcher, 300)
        await trouble(store)
        for number in range(30):
            asked += ask(dispatcher, 3, first=1000 * number)
            await asyncio.sleep(0.01)
        await answered(asked)
        assert longest(asked, lateness) < 0.1 + EPSILON
        assert all(question.answers == 1 for question in asked)
        assert any(question.is_failed for question in asked)
        store.resume() if trouble is stopped else None


async def test_a_start_without_the_store_is_no_failure(store: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script_batcher.CONNECT_TIMEOUT == 1.0
    monkeypatch.setattr(script_batcher, "CONNECT_TIMEOUT", 0.2)
    store.kill()
    begun = time.monotonic()
    async with Lateness() as lateness, dispatching(store.url, deadline=0.05) as dispatcher:
        assert lateness.without(begun, time.monotonic() - begun) < 0.2 + EPSILON
        assert not dispatcher.is_usable
        assert dispatcher.last_error
        asked = ask(dispatcher, 3)
        await answered(asked)
        assert all(question.is_failed for question in asked)
        assert longest(asked, lateness) < 0.05 + EPSILON
        store.start()
        await soon(lambda: dispatcher.is_usable, "it is used once it is there")
        asked = ask(dispatcher, 3)
        await answered(asked)
        assert all(question.is_answered_rightly for question in asked)


async def test_closing_fails_waiting_operations(store: StoreServer) -> None:
    async with dispatching(store.url, deadline=5) as dispatcher:
        store.pause()
        asked = ask(dispatcher, 300)
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(dispatcher.close())
        await answered(asked)
        assert all(question.is_failed and (question.took or 9) < 1 for question in asked)
        await closing
        store.resume()
        dispatcher._connection_tasks = []
        dispatcher.deadline = 0.01
        late = ask(dispatcher, 1)
        await answered(late)
        assert late[0].is_failed


# At most once


async def test_what_may_have_been_executed_is_not_sent_again(store: StoreServer) -> None:
    """The store executes everything, and none of its replies arrives."""
    async with Proxy(store) as proxy, dispatching(proxy.url) as dispatcher:
        await answered(ask(dispatcher, 5))
        await soon(lambda: dispatcher.connections == CONNECTIONS, "both lanes serve")
        proxy.loses_replies, dispatcher.deadline = True, 0.15
        asked = ask(dispatcher, 200, first=100)
        await answered(asked)
        assert all(question.is_failed for question in asked)
        proxy.loses_replies = False
        proxy.cut()
        await soon(lambda: dispatcher.is_usable, "it is used again")
        dispatcher.deadline = CALM  # not before, as the breaker's probes are that far apart
        fresh = ask(dispatcher, 5, first=1000)
        await answered(fresh)
        assert all(question.is_answered_rightly for question in fresh)
        sent = sum(question.is_sent for question in asked)
        assert 0 < sent <= 200
        assert int(store.admin.get("count") or 0) == 5 + sent + 5


async def test_a_late_reply_goes_to_no_other_operation(store: StoreServer) -> None:
    async with Proxy(store) as proxy, dispatching(proxy.url, deadline=0.1) as dispatcher:
        await answered(ask(dispatcher, 1))
        late: list[Echo] = []
        for number in range(8):
            proxy.delay = 0.13 if number % 2 else 0.0
            late += ask(dispatcher, 2, first=100 * number)
            await asyncio.sleep(0.06)
        await answered(late)
        proxy.delay = 0.0
        assert all(question.answers == 1 for question in late)
        assert all(question.is_failed or question.heard == question.number for question in late)
        assert any(question.is_failed for question in late)


# The breaker


async def test_the_breaker_opens_and_is_closed_by_a_probe_that_delays_no_operation(
    store: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Proxy(store) as proxy, dispatching(proxy.url, deadline=0.1) as dispatcher:
        await soon(lambda: dispatcher.connections == CONNECTIONS, "both lanes serve")
        proxy.is_deaf = True
        asked: list[Echo] = []
        while dispatcher.breaker.state is State.CLOSED:
            asked += ask(dispatcher, 1)
            await asyncio.sleep(0.02)
        opened_at = time.monotonic()
        assert not dispatcher.is_usable
        await answered(asked)
        await asyncio.sleep(0.1)
        proxy.is_deaf = False
        proxy.cut()
        before = dispatcher.operations
        await soon(lambda: dispatcher.is_usable, "a trial closes it")
        assert dispatcher.operations == before
        assert 0.4 < time.monotonic() - opened_at < 4
        fresh = ask(dispatcher, 3)
        await answered(fresh)
        assert all(question.is_answered_rightly for question in fresh)
    assert "store unavailable, circuit breaker open" in caplog.text
    assert "store available again" in caplog.text


async def test_a_connection_that_breaks_while_idle_fails_no_operation(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial after a silence finds it."""
    monkeypatch.setattr(script_batcher, "MAX_SILENCE", 0.1)
    async with dispatching(store.url) as dispatcher:
        await soon(lambda: dispatcher.connections == CONNECTIONS, "both lanes serve")
        store.admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await soon(lambda: dispatcher.failures >= CONNECTIONS, "they are found broken")
        await soon(lambda: dispatcher.connections == CONNECTIONS, "both serve again")
        asked = ask(dispatcher, 3)
        await answered(asked)
        assert all(question.is_answered_rightly for question in asked)


# Whoever leaves


async def test_connections_cut_at_random_mix_up_no_replies(store: StoreServer) -> None:
    """Nor do questions that give up: every one hears its own number, or that it failed, and once."""
    source = random.Random(7)
    async with Proxy(store) as proxy, dispatching(proxy.url, deadline=0.2) as dispatcher:
        asked: list[Echo] = []
        for number in range(150):
            asked += ask(dispatcher, source.randrange(1, 6), first=10 * number)
            match source.randrange(12):
                case 0:
                    proxy.cut()
                case 1:
                    proxy.delay = source.choice((0.0, 0.0, 0.01, 0.05))
                case 2:
                    for question in asked[-2:]:
                        question.is_over = True  # as after its deadline
                        question.answers = question.answers or 1
                        question.heard = question.heard if question.heard is not None else question.number
            await asyncio.sleep(0.004)
        await answered(asked)
        assert all(question.answers == 1 for question in asked)
        assert all(question.is_failed or question.heard == question.number for question in asked)
        proxy.delay = 0.0
        await soon(lambda: dispatcher.is_usable and dispatcher.connections == CONNECTIONS, "it goes on")
        await answered(ask(dispatcher, 3))
        assert len(store.connections()) <= CONNECTIONS


async def test_an_operation_that_arrives_as_a_pause_ends_is_sent(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one turn of the loop, the question first: the lane is woken, and has ended its rest by itself."""
    monkeypatch.setattr(script_batcher, "MAX_SILENCE", 0.05)
    async with dispatching(store.url) as dispatcher:
        for number in range(3):
            await soon(lambda: lanes_idle(dispatcher) == CONNECTIONS, "both rest")
            asked: list[Echo] = []
            asyncio.get_running_loop().call_later(0, lambda: asked.extend(ask(dispatcher, 1)))  # noqa: B023 - called within the turn
            time.sleep(0.06)  # noqa: ASYNC251 - the loop is kept busy, so that both are due at once
            await soon(lambda: bool(asked and asked[0].answers), "it is answered")  # noqa: B023 - as above
            assert asked[0].is_answered_rightly, number


# Errors of others


class Unruly(Echo):
    """Fails to take its response."""

    def _note(self) -> None:
        super()._note()
        raise ValueError("unruly")


@pytest.mark.parametrize("is_alive", [True, False])
async def test_a_reply_whose_receiver_fails_affects_no_other_operation(
    store: StoreServer, caplog: pytest.LogCaptureFixture, *, is_alive: bool
) -> None:
    async with dispatching(store.url, deadline=0.2) as dispatcher, Lateness() as lateness:
        if not is_alive:
            store.pause()
        for _ in range(3):
            asked = [Echo(1), Unruly(2), Echo(3)]
            for question in asked:
                dispatcher.submit(question)
            await answered(asked)
            assert [question.answers for question in asked] == [1, 1, 1]
            assert longest(asked, lateness) < 0.2 + EPSILON
        store.resume()
        await soon(lambda: dispatcher.is_usable, "it is used")
        dispatcher.deadline = CALM  # not before, as the breaker's probes are that far apart
        fresh = ask(dispatcher, 2)
        await answered(fresh)
        assert all(question.is_answered_rightly for question in fresh)
    assert "unruly" in caplog.text


async def test_an_unexpected_error_ends_no_connection(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with dispatching(store.url) as dispatcher:
        await soon(lambda: dispatcher.connections == CONNECTIONS, "both lanes serve")
        real = dispatcher._send_batch
        calls = []

        async def failing(carrier: Any) -> None:
            calls.append(carrier)
            if len(calls) <= CONNECTIONS:
                raise LookupError("nobody thought of it")
            await real(carrier)

        monkeypatch.setattr(dispatcher, "_send_batch", failing)
        asked = ask(dispatcher, 2)
        await soon(lambda: len(calls) > CONNECTIONS, "lanes go on")
        await answered(asked)
    assert "nobody thought of it" in caplog.text


# The limiter's own script finds its way through every server


async def test_the_script_of_the_limiter_is_known_to_every_server(store: StoreServer) -> None:
    async with dispatching(store.url, script=TOKEN_BUCKET_SCRIPT) as dispatcher:
        assert store.admin.script_exists(TOKEN_BUCKET_SCRIPT.sha) == [True]
        assert dispatcher.is_usable


def test_the_extras_bring_a_server() -> None:
    assert SERVERS["valkey"]
