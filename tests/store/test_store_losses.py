"""What a store may lose, and what is admitted because of it: the bounds of docs/limits.md, on real servers.

A bucket that nothing refills during a test shows the loss to the token, one that refills the bound of any window.
"""

import asyncio
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.limits.script_batcher import CONNECTIONS
from api_gateway.models import NANOSECONDS, Decision, Quota
from tests.kit import RawUpstream, RunningGateway, ask, eventually, free_port, in_front_of, soon
from tests.store_kit import SERVERS, StoreServer, asking, burst_of, charge, gateways, hammer

SLOW = Quota.per_second("slow", 0.001, 10)  # nothing worth mentioning is refilled during a test
FAST = Quota.per_second("fast", 80, 40)  # half a second's budget
BRISK = Quota.per_second("brisk", 4, 40)  # whose bucket the store keeps for as long as a busy machine needs


async def spent(limiter: RedisLimiter, quota: Quota = SLOW, at_most: int = 100) -> int:
    """Take tokens one by one until the store refuses, or `at_most`; return how many it gave."""
    for count in range(at_most):
        decision = await asking(limiter, charge(quota))
        assert decision.source in ("store", "deny_cache")
        if not decision.allowed:
            return count
    return at_most


async def refuses_for_its_budget_at_most(limiter: RedisLimiter) -> None:
    refused = await asking(limiter, charge(BRISK))
    assert not refused.allowed
    assert refused.wait_ns <= BRISK.burst_ns
    await asyncio.sleep(refused.wait_ns / NANOSECONDS)
    assert (await asking(limiter, charge(BRISK))).allowed


async def answering(limiter: RedisLimiter) -> None:
    """Look on, charging nothing, until the store answers on both lanes again."""
    answered = 0
    while answered < 2 * CONNECTIONS:
        decision = await asking(limiter, charge(SLOW, 0, "nobody"))
        answered = answered + 1 if decision.source == "store" else 0
        await asyncio.sleep(0.01)


async def hammered(limiters: list[RedisLimiter], is_over: asyncio.Event) -> list[tuple[float, float, Decision]]:
    """Have gateways ask for one bucket all the time, and a while longer."""
    seen: list[tuple[float, float, Decision]] = []
    while not is_over.is_set():
        seen += await hammer(limiters, charge(FAST, key="other"), 0.2)
    return seen + await hammer(limiters, charge(FAST, key="other"), 0.3)


# A fail-over


async def test_a_fail_over_gives_back_what_the_replica_had_not_heard_of_and_no_more(binary: str) -> None:
    """C + r * d + min(C, what was spent in between); and with the share meanwhile, C for each move to and from it."""
    port, other, watcher = free_port(), free_port(), free_port()
    replica_of = ["bind 127.0.0.1", f"replicaof 127.0.0.1 {port}"]
    watching = [f"sentinel monitor main 127.0.0.1 {port} 1", "sentinel down-after-milliseconds main 300"]
    diskless = "repl-diskless-sync-delay 0"
    with (
        StoreServer(binary, "bind 127.0.0.1", diskless, port=port) as primary,
        StoreServer(binary, *replica_of, port=other) as replica,
        ExitStack() as stack,
    ):
        await soon(lambda: replica.admin.info("replication")["master_link_status"] == "up", "it replicates")
        # Only now: it asks a primary for its replicas at once, and then every ten seconds.
        sentinel = stack.enter_context(
            StoreServer(binary, "bind 127.0.0.1", *watching, port=watcher, mode=("--sentinel",))
        )
        await soon(lambda: b"slaves=1" in sentinel.command("INFO", "sentinel"), "the sentinel knows of the replica")
        url = f"redis+sentinel://127.0.0.1:{watcher}/main"
        async with (
            gateways(url, SLOW) as (calm,),
            gateways(url, FAST, count=2, deadline=0.06, processes=2) as hasty,
        ):
            assert await spent(calm, at_most=4) == 4
            assert primary.admin.wait(1, 2000) == 1
            replica.admin.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))  # the link breaks
            is_over = asyncio.Event()
            hammering = asyncio.create_task(hammered(hasty, is_over))
            assert await spent(calm, at_most=3) == 3
            await asyncio.sleep(0.3)
            primary.kill()
            await soon(lambda: replica.admin.info("replication")["role"] == "master", "the replica takes over")
            await answering(calm)
            assert await spent(calm) == 10 - 4  # the 3 in between are forgotten: 13 in all
            is_over.set()
            seen = await hammering
        sources = [decision.source for *_, decision in seen]
        assert {"store", "local_share"} <= set(sources)
        assert burst_of(seen, FAST.rate) <= FAST.capacity * (1 + 2 + 1)


# Memory


def evict(store: StoreServer, key: str) -> None:
    """Fill the store until it throws a bucket out."""
    store.admin.config_set("maxmemory-policy", "allkeys-lru")
    store.admin.config_set("maxmemory", store.admin.info("memory")["used_memory"] + 200_000)
    for number in range(5_000):
        store.admin.set(f"other:{number}", "x" * 1_000)
        if not store.admin.exists(key):
            break
    assert not store.admin.exists(key)


async def test_an_evicted_bucket_is_full_once_more(store: StoreServer) -> None:
    """C + r * d + (C - level)."""
    async with gateways(store.url, SLOW) as (limiter,):
        assert await spent(limiter, at_most=7) == 7
        evict(store, limiter.store_key("client"))
        store.admin.config_set("maxmemory", 0)  # else the new bucket may be thrown out, too
        assert await spent(limiter) == 10  # 7 more than the 3 that were left
        assert await spent(limiter) == 0


def test_a_store_that_evicts_is_a_warning_in_the_log_at_health_and_in_the_metrics(
    store: StoreServer,
    upstream: Callable[..., RawUpstream],
    gateway: Callable[..., RunningGateway],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("api_gateway.limits.redis_limiter.HEARTBEAT_INTERVAL", 0.05)
    running = gateway(in_front_of(upstream().url) | {"store": {"url": store.url, "decision_timeout": 0.5}})

    def health() -> dict[str, Any]:
        answer: dict[str, Any] = ask(f"{running.url}/health").json()
        return answer

    eventually(lambda: health()["status"] == "pass", "all is well")
    assert (health()["store"]["warning"], health()["store"]["evicted_keys"]) == (None, 0)
    evict(store, "other:0")
    eventually(lambda: health()["store"]["evicted_keys"] > 0, "evictions are known")
    assert health()["status"] == "warn"
    assert "allkeys-lru" in health()["store"]["warning"]
    text = ask(f"{running.url}/metrics?format=prometheus").body.decode()
    (line,) = [line for line in text.splitlines() if line.startswith("gateway_store_evicted_keys_total ")]
    assert float(line.split()[1]) > 0
    assert caplog.text.count("the store has maxmemory-policy allkeys-lru") == 1
    store.admin.config_set("maxmemory", 0)  # it is full, and would now refuse writes
    store.admin.config_set("maxmemory-policy", "noeviction")
    eventually(lambda: health()["store"]["warning"] is None, "it is mended")


@pytest.mark.parametrize(
    ("refuse", "accept", "word"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), "maxmemory"),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), "read only"),
    ],
    ids=["OOM", "READONLY"],
)
def test_a_store_that_refuses_writes_is_a_warning_in_the_log_and_at_health(
    store: StoreServer,
    upstream: Callable[..., RawUpstream],
    gateway: Callable[..., RunningGateway],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refuse: tuple[str, ...],
    accept: tuple[str, ...],
    word: str,
) -> None:
    """Without a request, and although it answers: reads go on."""
    monkeypatch.setattr("api_gateway.limits.redis_limiter.HEARTBEAT_INTERVAL", 0.05)
    running = gateway(in_front_of(upstream().url) | {"store": {"url": store.url, "decision_timeout": 0.5}})

    def health() -> dict[str, Any]:
        answer: dict[str, Any] = ask(f"{running.url}/health").json()
        return answer

    eventually(lambda: health()["status"] == "pass", "all is well")
    store.admin.execute_command(*refuse)
    eventually(lambda: health()["status"] == "warn", "it is noticed")
    eventually(lambda: word in (health()["store"]["warning"] or ""), "the refusal is shown")
    assert health()["store"]["decision_source"] == "local_share", "what decisions rest on now"
    assert caplog.text.count("the store refuses writes") == 1
    store.admin.execute_command(*accept)
    eventually(lambda: health()["status"] == "pass", "it is mended")
    assert (health()["store"]["warning"], health()["store"]["decision_source"]) == (None, "store")
    assert caplog.text.count("the store accepts writes again") == 1


@pytest.mark.parametrize("policy", ["noeviction", "volatile-ttl"])
async def test_a_policy_that_forgives_least_is_no_warning(
    store: StoreServer, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api_gateway.limits.redis_limiter.HEARTBEAT_INTERVAL", 0.02)
    store.admin.config_set("maxmemory", 10**9)
    store.admin.config_set("maxmemory-policy", policy)
    async with gateways(store.url, SLOW) as (limiter,):
        for _ in range(3):
            beats = int(store.admin.info("commandstats").get("cmdstat_info", {"calls": 0})["calls"])
            await soon(lambda: len(limiter._process_counts) > 0, "it has beaten")
            await asyncio.sleep(0.05)
            assert limiter.state().warning is None
        assert beats > 3  # it has asked


# The store's clock


class SteppingServer(StoreServer):
    """A server whose clock can be stepped while it runs. It is the server's only: gateways have their own."""

    def __init__(self, binary: str, faketime: str) -> None:
        shown = subprocess.run([faketime, "-f", "+0", "env"], capture_output=True, text=True, check=True).stdout
        (preload,) = [line for line in shown.splitlines() if line.startswith("LD_PRELOAD=")]
        variables = {"LD_PRELOAD": preload.partition("=")[2], "FAKETIME_NO_CACHE": "1"}
        super().__init__(binary, variables=variables | {"FAKETIME_DONT_FAKE_MONOTONIC": "1"})
        self._clock = self.directory / "clock"
        self._clock.write_text("+0\n")
        self._environment["FAKETIME_TIMESTAMP_FILE"] = str(self._clock)

    def step(self, seconds: int) -> None:
        """Be so many seconds ahead of the true time; return when it is."""
        self._clock.write_text(f"{seconds:+d}\n")
        eventually(lambda: abs(self.admin.time()[0] - time.time() - seconds) < 2, "the clock steps")


@pytest.fixture
def stepped() -> Iterator[SteppingServer]:
    """A server with such a clock: Valkey, for a Redis on jemalloc does not start under libfaketime."""
    faketime, binary = shutil.which("faketime"), SERVERS["valkey"]
    if faketime is None or binary is None:
        pytest.skip("no faketime (apt install faketime) to step a server's clock with, or no Valkey")
    with SteppingServer(binary, faketime) as server:
        yield server


@pytest.mark.parametrize(("seconds", "more"), [(3_000, 3), (100_000, 8)], ids=["r*x", "C"])
async def test_a_step_ahead_refills_that_much_sooner_once(stepped: SteppingServer, seconds: int, more: int) -> None:
    """min(C, r * x), and no more than was spent."""
    async with gateways(stepped.url, SLOW) as (limiter,):
        assert await spent(limiter, at_most=8) == 8
        stepped.step(seconds)
        assert await spent(limiter) == 2 + more


async def test_a_step_back_gives_nothing_more_and_refuses_for_the_budget_at_most(
    stepped: SteppingServer,
) -> None:
    async with gateways(stepped.url, BRISK) as (limiter,):
        assert await spent(limiter, BRISK, at_most=30) == 30
        stepped.step(-1_000)
        await refuses_for_its_budget_at_most(limiter)


# The same for want of such a clock: what a bucket holds is moved against the clock instead. To the script, which knows
# no time but the server's, that is the same; what the step does to the server itself is not shown.


def move(store: StoreServer, key: str, seconds: int) -> None:
    """Leave a bucket as a step of the clock by so much would find it."""
    tat_ns, budget_ns = map(int, store.admin.get(key).split())
    expires_ms = round(time.time() * 1000) + store.admin.pttl(key)
    store.admin.set(key, f"{tat_ns - seconds * NANOSECONDS} {budget_ns}", pxat=expires_ms - seconds * 1000)


@pytest.mark.parametrize(("seconds", "more"), [(3_000, 3), (100_000, 8)], ids=["r*x", "C"])
async def test_a_bucket_as_after_a_step_ahead_has_refilled_that_much_sooner(
    store: StoreServer, seconds: int, more: int
) -> None:
    async with gateways(store.url, SLOW) as (limiter,):
        assert await spent(limiter, at_most=8) == 8
        move(store, limiter.store_key("client"), seconds)
        assert await spent(limiter) == 2 + more


async def test_a_bucket_as_after_a_step_back_gives_nothing_more_and_refuses_for_its_budget_at_most(
    store: StoreServer,
) -> None:
    async with gateways(store.url, BRISK) as (limiter,):
        assert await spent(limiter, BRISK, at_most=30) == 30
        move(store, limiter.store_key("client"), -1_000)
        await refuses_for_its_budget_at_most(limiter)
