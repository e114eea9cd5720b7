"""Several gateways on one real store: what they admit together, whatever becomes of the store meanwhile.

Budgets are half a second or a second here, so that windows, outages and recoveries fit into a short test.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import pytest
from redis.exceptions import RedisError

from api_gateway.errors import ChangeUnconfirmed
from api_gateway.limits import script_batcher
from api_gateway.limits.redis_limiter import HEARTBEAT_INTERVAL, PROCESS_COUNT_MEMORY, RedisLimiter
from api_gateway.models import NANOSECONDS, Decision, Quota
from api_gateway.storage.redis_session import MAX_QUIET
from tests.kit import FakeClock, soon
from tests.store_kit import (
    CALM,
    EPSILON,
    Lateness,
    Proxy,
    StoreServer,
    asking,
    at_decisions,
    burst_of,
    charge,
    gateways,
    hammer,
    limiter_of,
)

FAST = Quota.per_second("fast", 80, 40)  # half a second's budget
SLOW = Quota.per_second("slow", 0.001, 10)  # nothing worth mentioning is refilled during a test
SLOWER = Quota.per_second("slower", 0.0005, 10)  # twice the budget
DEADLINE = 0.06


@pytest.fixture(autouse=True)
def _quick_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt to connect to a store that does not reply is given up soon; there is always another one."""
    monkeypatch.setattr(script_batcher, "CONNECT_TIMEOUT", 0.5)


async def decided(limiter: RedisLimiter, cost: float = 1, quota: Quota = SLOW, key: str = "client") -> Decision:
    return await asking(limiter, charge(quota, cost, key))


async def serving(limiters: list[RedisLimiter]) -> None:
    await soon(
        lambda: all(one.batcher.connections == 2 and one.cache.is_trusted for one in limiters), "all are connected"
    )


async def told(limiter: RedisLimiter, key: str = "client") -> bool:
    """Have a gateway learn that a bucket is empty; return whether it remembers."""
    await decided(limiter, 0, key=key)
    refused = await decided(limiter, 10, key=key)
    assert not refused.allowed
    return (await decided(limiter, 10, key=key)).source == "deny_cache"


# A store that is well


async def test_together_they_admit_what_one_bucket_holds(store: StoreServer) -> None:
    """To the token, by the store's clock: no more in any window, and no less over all."""
    async with gateways(store.url, FAST, count=4) as limiters, Lateness() as lateness:
        await serving(limiters)
        seen = await hammer(limiters, charge(FAST), 1.2)
        assert {decision.source for *_, decision in seen} == {"store", "deny_cache"}
    made = at_decisions([one for one in seen if one[-1].allowed])
    assert burst_of(made, FAST.rate) <= FAST.capacity + 1e-6
    length = made[-1][0] - made[0][0]
    left = made[-1][2].remaining  # which nobody has asked for yet
    assert len(made) + left >= FAST.capacity + FAST.rate * (length - 0.1 - lateness.total)


async def test_a_batch_decides_as_one_after_the_other_would(store: StoreServer) -> None:
    async with gateways(store.url, SLOW, count=2) as limiters:
        await serving(limiters)
        for limiter in limiters:
            limiter.cache.is_trusted = False  # so that the store is asked each time
        answers = await asyncio.gather(*[decided(limiters[number % 2], 3) for number in range(6)])
        assert [answer.source for answer in answers] == ["store"] * 6
        assert sum(answer.allowed for answer in answers) == 3
        assert sorted(answer.remaining for answer in answers) == [1, 1, 1, 1, 4, 7]


# A store that is not. The bounds are those of the reference, section 5.2, as the burst beyond the rate.

Disturbance = Callable[[StoreServer], Awaitable[None]]


async def kill_and_restart(store: StoreServer) -> None:
    store.kill()
    await asyncio.sleep(0.6)
    store.start()


async def stop_and_go(store: StoreServer) -> None:
    store.pause()
    await asyncio.sleep(0.6)
    store.resume()


async def restart_at_once(store: StoreServer) -> None:
    store.kill()
    store.start()


async def pause_clients(store: StoreServer) -> None:
    store.admin.execute_command("CLIENT", "PAUSE", "600", "ALL")
    await asyncio.sleep(0.6)


async def kill_clients(store: StoreServer) -> None:
    store.admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


async def flush_scripts(store: StoreServer) -> None:
    for _ in range(20):
        store.admin.script_flush()
        await asyncio.sleep(0.03)


async def kill_for_good(store: StoreServer) -> None:
    store.kill()


DISTURBANCES: dict[str, tuple[Disturbance, int]] = {
    # C healthy; C more for every transition to or from the share; C more where the store has forgotten.
    "SCRIPT FLUSH": (flush_scripts, 1),
    "kill": (kill_for_good, 2),
    "SIGSTOP and SIGCONT": (stop_and_go, 3),
    "CLIENT PAUSE": (pause_clients, 3),
    "CLIENT KILL": (kill_clients, 3),
    "restart empty": (restart_at_once, 4),
    "kill and restart empty": (kill_and_restart, 4),
}


@pytest.mark.parametrize(("disturb", "bursts"), DISTURBANCES.values(), ids=DISTURBANCES)
async def test_limits_and_deadline_hold_whatever_happens_to_the_store(
    store: StoreServer, disturb: Disturbance, bursts: int
) -> None:
    # A store that always replies is never given up: with the long deadline on a busy machine neither.
    deadline = CALM if bursts == 1 else DEADLINE
    async with gateways(store.url, FAST, count=3, deadline=deadline, processes=3) as limiters, Lateness() as lateness:
        await serving(limiters)
        hammering = asyncio.create_task(hammer(limiters, charge(FAST), 1.4))
        await asyncio.sleep(0.3)
        await disturb(store)
        seen = await hammering
        sources = {decision.source for *_, decision in seen}
    assert burst_of(seen, FAST.rate) <= bursts * FAST.capacity
    assert sum(decision.allowed for *_, decision in seen) >= FAST.capacity / 2  # something is admitted all the time
    assert lateness.longest(seen) < deadline + EPSILON
    if bursts == 1:
        assert sources <= {"store", "deny_cache"}
    elif disturb is not kill_clients:
        assert "local_share" in sources


async def test_within_an_outage_they_admit_one_bucket_together(store: StoreServer) -> None:
    store.kill()
    async with gateways(store.url, FAST, count=4, deadline=CALM, processes=4) as limiters, Lateness() as lateness:
        seen = await hammer(limiters, charge(FAST), 0.6, pause=0)
        assert {decision.source for *_, decision in seen} == {"local_share"}
        assert 0.8 * FAST.capacity <= burst_of(at_decisions(seen), FAST.rate) <= FAST.capacity + 1e-6
        assert lateness.longest(seen) < EPSILON  # nobody waits for the deadline


async def test_what_costs_much_stays_possible_in_an_outage(store: StoreServer) -> None:
    """With N * c above C the limit is N * c."""
    store.kill()
    async with gateways(store.url, FAST, count=4, processes=4) as limiters:
        seen = await hammer(limiters, charge(FAST, 30), 0.45)
        assert all(any(decision.allowed for *_, decision in seen) for _ in limiters)
        assert 0.9 * 30 * 4 <= burst_of(seen, 30 * 4 / 0.5, cost=30) <= 30 * 4


async def test_a_gateway_that_cannot_reach_the_store_has_its_share_and_no_more(store: StoreServer) -> None:
    """One of three: C + (1/3) * C, less than twice the limit."""
    async with Proxy(store) as proxy:
        async with (
            gateways(store.url, FAST, count=2, processes=3) as connected,
            gateways(proxy.url, FAST, deadline=DEADLINE, processes=3) as cut_off,
        ):
            limiters = connected + cut_off
            await serving(limiters)
            proxy.is_deaf = True
            while cut_off[0].batcher.is_usable:
                await decided(cut_off[0], 0, FAST)
                await asyncio.sleep(0.01)
            seen = await hammer(limiters, charge(FAST), 1.0)
            admitted = {decision.source for *_, decision in seen if decision.allowed}
            assert admitted == {"store", "local_share"}
        assert burst_of(seen, FAST.rate * 4 / 3) <= FAST.capacity * 4 / 3


async def test_replies_lost_after_execution_charge_once(store: StoreServer) -> None:
    """Every decision is charged to the store once at most, and again only to the share of who did not hear."""
    async with Proxy(store) as proxy, gateways(proxy.url, SLOW, deadline=DEADLINE, processes=5) as (limiter,):
        await serving([limiter])
        proxy.loses_replies = True
        lost = [await decided(limiter) for _ in range(2)]
        assert [decision.source for decision in lost] == ["local_share"] * 2
        async with gateways(store.url, SLOW) as (other,):
            while (await decided(other, 0)).remaining == SLOW.capacity:  # a busy store executes the calls later
                pass
            assert (await decided(other, 0)).remaining in (8, 9)


async def test_a_slow_store_counts_as_unavailable(store: StoreServer) -> None:
    async with (
        Proxy(store) as proxy,
        gateways(proxy.url, FAST, deadline=0.4) as (limiter,),
        Lateness() as lateness,
    ):
        await serving([limiter])
        proxy.delay = 0.02
        assert (await decided(limiter, 1, FAST)).source == "store"
        proxy.delay = 2
        seen = await hammer([limiter], charge(FAST, 0.1), 1.5)
        assert lateness.longest(seen) < 0.4 + EPSILON
        quick = [came - begun for begun, came, decision in seen if decision.source == "local_share"]
        assert min(quick[-5:]) < 0.2  # the breaker is open


# Without the store


async def cut_off(limiter: RedisLimiter, proxy: Proxy) -> None:
    """Have a gateway notice that its store is gone, without charging anything."""
    proxy.is_deaf = True
    proxy.cut()
    while limiter.batcher.is_usable:
        await decided(limiter, 0, key="nobody")
        await asyncio.sleep(0.01)


async def restored(limiter: RedisLimiter, proxy: Proxy) -> None:
    """Have a gateway find its store again, without waiting for what it sent meanwhile."""
    proxy.is_deaf = False
    proxy.cut()
    await soon(lambda: limiter.batcher.is_usable, "it is back")


async def test_what_was_admitted_alone_is_charged_once_when_the_store_is_back(store: StoreServer) -> None:
    async with (
        Proxy(store) as proxy,
        gateways(proxy.url, SLOW, deadline=0.5) as (limiter,),
        gateways(store.url, SLOW) as (witness,),
    ):
        await serving([limiter, witness])
        assert (await decided(limiter, 2)).remaining == 8
        await cut_off(limiter, proxy)
        assert [(await decided(limiter, 3)).allowed for _ in range(3)] == [True, True, False]
        assert (await decided(witness, 0)).remaining == 8
        await restored(limiter, proxy)
        assert (await decided(limiter, 0)).remaining == 2
        assert (await decided(limiter, 0)).remaining == 2
        assert (await decided(witness, 0)).remaining == 2
        assert not limiter.fallback.has_debts


async def test_what_was_admitted_beyond_the_limit_meanwhile_is_owed(store: StoreServer) -> None:
    """A bucket goes into debt, as after a settlement: the client waits for what it had twice."""
    async with (
        Proxy(store) as proxy,
        gateways(proxy.url, SLOW, deadline=0.5) as (limiter,),
        gateways(store.url, SLOW) as (witness,),
    ):
        await serving([limiter, witness])
        await cut_off(limiter, proxy)
        assert (await decided(limiter, 8)).source == "local_share"
        assert (await decided(witness, 7)).allowed
        await restored(limiter, proxy)
        looked = await decided(limiter, 0)
        assert looked.remaining == 0
        assert looked.reset_ns / SLOW.emission_ns == pytest.approx(15, abs=0.01)


async def test_a_debt_is_reported_without_a_further_request(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the next heartbeat: the client may continue with another gateway."""
    monkeypatch.setattr("api_gateway.limits.redis_limiter.HEARTBEAT_INTERVAL", 0.05)
    async with (
        Proxy(store) as proxy,
        gateways(proxy.url, SLOW, deadline=0.5, timeout=0.5) as (limiter,),
        gateways(store.url, SLOW) as (witness,),
    ):
        await serving([limiter, witness])
        await cut_off(limiter, proxy)
        for number in range(300):  # more than one batch
            assert (await decided(limiter, 4, key=f"client-{number}")).source == "local_share"
        await restored(limiter, proxy)
        await soon(lambda: not limiter.fallback.has_debts, "all is reported and confirmed")
        assert {(await decided(witness, 0, key=f"client-{number}")).remaining for number in range(300)} == {6}


async def test_the_share_begins_from_what_the_store_last_said(store: StoreServer) -> None:
    async with Proxy(store) as proxy, gateways(proxy.url, SLOW, deadline=0.5) as (limiter,):
        await serving([limiter])
        assert (await decided(limiter, 9)).allowed
        await cut_off(limiter, proxy)
        assert [(await decided(limiter, 1)).allowed for _ in range(2)] == [True, False]


@pytest.mark.parametrize("policy", ["deny", "allow"])
async def test_the_other_policies_are_followed_to_the_letter(
    store: StoreServer, policy: Literal["deny", "allow"]
) -> None:
    async with (
        Proxy(store) as proxy,
        gateways(proxy.url, SLOW, deadline=0.5, policy=policy) as (limiter,),
    ):
        await serving([limiter])
        assert limiter.batcher.is_usable
        await cut_off(limiter, proxy)
        assert limiter.mode == policy
        answers = [await decided(limiter, 4) for _ in range(5)]
        assert {(answer.allowed, answer.source) for answer in answers} == {(policy == "allow", policy)}
        await restored(limiter, proxy)
        assert (await decided(limiter, 0)).remaining == (0 if policy == "allow" else 10)


async def test_peeking_costs_nothing_with_the_store_or_without(store: StoreServer) -> None:
    async with Proxy(store) as proxy, gateways(proxy.url, SLOW, deadline=0.5) as (limiter,):
        await serving([limiter])
        await decided(limiter, 4)
        asked = [charge(SLOW, 7), charge(SLOW, 7, "other")]
        for _ in range(2):
            seen = await limiter.inspect(asked, time.monotonic_ns())
            assert [(one.allowed, one.remaining) for one in seen] == [(False, 6), (True, 3)]
        await cut_off(limiter, proxy)
        for _ in range(2):
            seen = await limiter.inspect(asked, time.monotonic_ns())
            assert [(one.allowed, one.source) for one in seen] == [(False, "local_share"), (True, "local_share")]
        assert store.admin.dbsize() == 2  # the bucket and the processes


# What one gateway does is heard of by the others


async def test_a_refill_reaches_the_deny_caches_of_others(store: StoreServer) -> None:
    async with gateways(store.url, SLOW, count=2) as limiters:
        await serving(limiters)
        await decided(limiters[0], 10)
        assert [await told(limiter) for limiter in limiters] == [True, True]
        limiters[1].fallback.lose([charge(SLOW, 1)], time.monotonic_ns())
        await limiters[0].refill("client")
        assert (await decided(limiters[0], 0)).remaining == 10
        await soon(lambda: len(limiters[1].fallback) == 0, "nothing counts against its share")
        await soon(lambda: limiters[1].decide([charge(SLOW, 10)], time.monotonic_ns()) is None, "it is heard of")
        assert (await decided(limiters[1], 10)).allowed


async def test_a_refund_reaches_the_deny_caches_of_others(store: StoreServer) -> None:
    async with gateways(store.url, SLOW, count=2) as limiters:
        await serving(limiters)
        decision = await decided(limiters[0], 10)
        assert await told(limiters[1])
        limiters[0].settle([charge_of(-10)], decision, time.monotonic_ns())
        await soon(lambda: limiters[1].decide([charge(SLOW, 10)], time.monotonic_ns()) is None, "it is heard of")
        assert (await decided(limiters[1], 10)).allowed


def charge_of(cost: int, key: str = "client") -> Any:
    """Return a charge that may give back."""
    given = charge(SLOW, abs(cost), key)
    given.increment_ns *= -1 if cost < 0 else 1
    return given


async def test_a_refund_in_an_outage_of_the_listener_is_not_missed(store: StoreServer) -> None:
    """While nothing is heard, nothing is refused from memory; what was remembered before is not trusted after."""
    async with gateways(store.url, SLOW, count=2) as limiters:
        await serving(limiters)
        await decided(limiters[0], 10)
        assert await told(limiters[1])
        store.admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await soon(lambda: not limiters[1].cache.is_trusted, "it is noticed")
        assert (await decided(limiters[1], 10)).source == "store"
        await limiters[0].refill("client")
        assert (await decided(limiters[1], 10)).allowed
        await serving(limiters)
        assert (await decided(limiters[1], 0)).source == "store"


async def test_a_subscription_that_ends_silently_is_detected(store: StoreServer) -> None:
    """No other connection fails. For 2 * MAX_QUIET at most a refill is missed, and then nothing told before counts."""
    async with Proxy(store) as proxy, gateways(proxy.url, SLOW) as (deafened,), gateways(store.url, SLOW) as (other,):
        await serving([deafened, other])
        before = deafened.batcher.failures  # an attempt to connect may have taken too long
        await decided(deafened, 10)
        assert await told(deafened)
        async with Lateness() as lateness:
            assert proxy.lose_subscriptions() == 1
            await other.refill("client")
            found_out = await soon(lambda: not deafened.cache.is_trusted, "it is found out")
        assert found_out - lateness.total < 2 * MAX_QUIET + EPSILON
        assert (await decided(deafened, 10)).allowed
        await serving([deafened])
        assert await told(deafened)
        assert deafened.batcher.failures == before


async def test_a_subscription_with_nothing_to_hear_lasts(store: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_gateway.storage.redis_session.MAX_QUIET", 0.4)
    async with gateways(store.url, SLOW) as (limiter,):
        await serving([limiter])
        await decided(limiter, 10)
        assert await told(limiter)
        (before,) = store.connections("pubsub")
        await asyncio.sleep(1)  # two times that
        assert [one["id"] for one in store.connections("pubsub")] == [before["id"]]
        assert (await decided(limiter, 10)).source == "deny_cache"


async def test_an_invalid_message_on_the_channel_ends_no_subscription(store: StoreServer) -> None:
    async with gateways(store.url, SLOW) as (limiter,):
        await serving([limiter])
        await decided(limiter, 10)
        store.admin.publish(limiter.channel, b"\xff\xfe")
        store.admin.publish(limiter.channel, b"")
        await asyncio.sleep(0.1)
        assert limiter.cache.is_trusted
        assert await told(limiter)


@pytest.mark.parametrize("policy", ["local_share"])
async def test_a_refill_without_the_store_says_so(store: StoreServer, policy: str) -> None:
    async with gateways(store.url, SLOW) as (limiter,):
        store.kill()
        with pytest.raises(ChangeUnconfirmed, match="may or may not have been made"):
            await limiter.refill("client")


async def test_a_bucket_that_came_back_from_a_shorter_budget_is_not_refused_from_memory(store: StoreServer) -> None:
    """It has refilled faster meanwhile: what was said of it before is true no more, for no gateway."""
    brisk = Quota.per_second("brisk", 50, 10)
    long = Quota.per_second("long", 0.5, 10)
    async with gateways(store.url, brisk, long, count=2) as limiters:
        await serving(limiters)
        assert (await decided(limiters[0], 10, long)).allowed
        for limiter in limiters:
            assert not (await decided(limiter, 5, long)).allowed
        await limiters[0].move("client", long, brisk, time.monotonic_ns())
        await decided(limiters[0], 0, brisk)
        await asyncio.sleep(0.25)
        await limiters[0].move("client", brisk, long, time.monotonic_ns())
        answers = [await decided(limiter, 4, long) for limiter in limiters]
        assert [answer.source for answer in answers] == ["store", "store"]
        assert [answer.allowed for answer in answers] == [True, True]


# Settling


async def test_settlements_are_sent_to_the_store(store: StoreServer) -> None:
    async with gateways(store.url, SLOW, count=2) as limiters:
        await serving(limiters)
        decision = await decided(limiters[0], 3)
        after = limiters[0].settle([charge_of(4)], decision, time.monotonic_ns())
        assert (after.remaining, after.source) == (3, "store")
        assert (await decided(limiters[0], 0)).remaining == 3
        again = limiters[0].settle([charge_of(-2)], after, time.monotonic_ns())
        assert again.remaining == 5
        await decided(limiters[0], 0)
        assert (await decided(limiters[1], 0)).remaining == 5


async def test_what_owes_after_settling_refuses_until_it_has_paid(store: StoreServer) -> None:
    quota = Quota.per_second("brisk", 10, 2)
    async with gateways(store.url, quota) as (limiter,):
        await serving([limiter])
        decision = await decided(limiter, 1, quota)
        later = charge(quota, 50)
        limiter.settle([later], decision, time.monotonic_ns())
        looked = await decided(limiter, 1, quota)
        assert not looked.allowed
        assert 0.2 < looked.wait_ns / NANOSECONDS <= 0.3  # one budget beyond empty, and the cost
        await asyncio.sleep(looked.wait_ns / NANOSECONDS)
        assert (await decided(limiter, 1, quota)).allowed


async def test_what_the_share_decided_is_settled_with_the_share(store: StoreServer) -> None:
    async with (
        Proxy(store) as proxy,
        gateways(proxy.url, SLOW, deadline=0.5) as (limiter,),
    ):
        await serving([limiter])
        await cut_off(limiter, proxy)
        decision = await decided(limiter, 6)
        assert decision.source == "local_share"
        assert limiter.settle([charge_of(-4)], decision, time.monotonic_ns()).remaining == 8
        await restored(limiter, proxy)
        assert (await decided(limiter, 0)).remaining == 8
        limiter.settle([charge_of(3)], decision, time.monotonic_ns())  # it was told already, and there is more
        assert (await decided(limiter, 0)).remaining == 5


# What others may have left in the store


GARBAGE: dict[str, Callable[[StoreServer, str], object]] = {
    "words": lambda store, key: store.admin.set(key, "garbage"),
    "nothing": lambda store, key: store.admin.set(key, ""),
    "bytes": lambda store, key: store.admin.set(key, b"\xff\x00\n"),
    "a number": lambda store, key: store.admin.set(key, "12"),
    "no budget": lambda store, key: store.admin.set(key, f"{time.time_ns() + 10**12} 0"),
    "a budget beyond all numbers": lambda store, key: store.admin.set(key, f"{time.time_ns() + 10**12} {'9' * 400}"),
    "a time beyond all numbers": lambda store, key: store.admin.set(key, f"{'9' * 400} {SLOW.burst_ns}"),
    "minus": lambda store, key: store.admin.set(key, f"-{time.time_ns()} {SLOW.burst_ns}"),
    "a list": lambda store, key: store.admin.rpush(key, "garbage"),
    "a hash": lambda store, key: store.admin.hset(key, "garbage", "1"),
    "a far time": lambda store, key: store.admin.set(key, f"{time.time_ns() + 10**18} {SLOW.burst_ns}"),
}


@pytest.mark.parametrize("spoil", GARBAGE.values(), ids=GARBAGE)
async def test_a_bucket_that_cannot_be_read_is_empty_and_heals(
    store: StoreServer, spoil: Callable[[StoreServer, str], object]
) -> None:
    """It costs nobody else anything, and is a bucket again with the first look."""
    quota = Quota.per_second("brisk", 20, 10)
    async with gateways(store.url, quota, SLOW) as (limiter,):
        await serving([limiter])
        before = limiter.batcher.failures  # an attempt to connect may have taken too long
        spoil(store, limiter.store_key("client"))
        spoiled, other = await asyncio.gather(decided(limiter, 1, quota), decided(limiter, 1, SLOW, "other"))
        assert (other.allowed, other.remaining, other.source) == (True, 9, "store")
        assert (spoiled.allowed, spoiled.remaining, spoiled.source) == (False, 0, "store")
        await asyncio.sleep(0.06)
        assert (await decided(limiter, 1, quota)).allowed
        assert limiter.batcher.failures == before
        assert 0 < store.admin.pttl(limiter.store_key("client")) <= 501


async def test_a_full_store_counts_as_unavailable(store: StoreServer) -> None:
    async with gateways(store.url, SLOW, policy="local_share") as (limiter,):
        await serving([limiter])
        store.admin.config_set("maxmemory", "1")
        assert (await decided(limiter, 1)).source == "local_share"
        store.admin.config_set("maxmemory", "0")
        await soon(lambda: limiter.batcher.is_usable, "it is used again")
        assert (await decided(limiter, 0)).source == "store"


async def test_a_read_only_store_counts_as_unavailable(store: StoreServer) -> None:
    async with gateways(store.url, SLOW) as (limiter,):
        await serving([limiter])
        store.admin.execute_command("REPLICAOF", "127.0.0.1", "1")
        assert (await decided(limiter, 1)).source == "local_share"
        store.admin.execute_command("REPLICAOF", "NO", "ONE")
        await soon(lambda: limiter.batcher.is_usable, "it is used again")
        assert (await decided(limiter, 0)).source == "store"


async def test_every_key_it_leaves_expires(store: StoreServer) -> None:
    async with gateways(store.url, SLOW, FAST) as (limiter,):
        await serving([limiter])
        await decided(limiter, 3)
        await decided(limiter, 3, FAST, "other")
        await asking(limiter, charge(SLOW, 2, "a"), charge(FAST, 2, "b"))
        await soon(lambda: store.admin.exists("test:processes"), "the heartbeat has been there")
        assert all(store.admin.pttl(key) != -1 for key in store.admin.scan_iter())
        left = store.admin.pttl(limiter.store_key("client"))
        assert 2_900_000 < left <= 3_000_001  # milliseconds, some of which have passed


async def test_keys_reveal_no_id_and_no_id_selects_a_slot(store: StoreServer) -> None:
    keys = ["a", "{a}", "{b}a", "a\0", "A", "a" * 65_536, "ä", ""]
    async with gateways(store.url, SLOW) as (limiter,):
        await serving([limiter])
        for cost, key in enumerate(keys, 1):
            assert (await decided(limiter, cost, key=key)).remaining == 10 - cost
        for cost, key in enumerate(keys, 1):
            assert (await decided(limiter, 0, key=key)).remaining == 10 - cost
        names = [limiter.store_key(key) for key in keys]
        assert len(set(names)) == len(keys)
        assert {len(name) for name in names} == {len(names[0])}
        assert not any("{" in name for name in names)


# How many there are


async def test_gateways_count_each_other(store: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_gateway.limits.redis_limiter.HEARTBEAT_INTERVAL", 0.05)
    async with gateways(store.url, SLOW, count=3) as limiters:
        await soon(lambda: all(limiter.fallback.processes == 3 for limiter in limiters), "all know of all")
    assert HEARTBEAT_INTERVAL == 2.0


async def test_the_most_there_were_within_an_hour_count(clock: FakeClock) -> None:
    one = limiter_of("unix:///nowhere", SLOW, processes=2)
    assert one.fallback.processes == 2
    one.note_processes(1, clock())
    assert one.fallback.processes == 2
    one.note_processes(5, clock.advance(10))
    one.note_processes(3, clock.advance(10))
    assert one.fallback.processes == 5
    one.note_processes(3, clock.advance(PROCESS_COUNT_MEMORY - 10))
    assert one.fallback.processes == 5
    one.note_processes(1, clock.advance(1))
    assert one.fallback.processes == 3
    one.note_processes(1, clock.advance(PROCESS_COUNT_MEMORY + 1))
    assert one.fallback.processes == 2
    await one.close()


async def test_a_failed_heartbeat_is_sent_again(store: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_gateway.limits.redis_limiter.HEARTBEAT_INTERVAL", 0.02)
    store.kill()
    async with gateways(store.url, SLOW) as (limiter,):
        store.start()
        await soon(lambda: bool(limiter._process_counts), "it beats")


async def test_its_repr_shows_the_decision_source(store: StoreServer) -> None:
    async with gateways(store.url, SLOW) as (limiter,):
        await serving([limiter])
        await decided(limiter)
        assert repr(limiter) == "<RedisLimiter [store, 1 buckets cached]>"
        assert (len(limiter), limiter.bucket_limit) == (1, 10_000)
        with pytest.raises(RedisError):
            store.admin.execute_command("NO SUCH COMMAND")
