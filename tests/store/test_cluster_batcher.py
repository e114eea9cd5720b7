"""A cluster of three real nodes: buckets of a failed node are decided without it, all others by their nodes."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from zoneinfo import ZoneInfo

import pytest
from redis.crc import key_slot

from api_gateway.limits.periods import Calendar
from api_gateway.limits.quota_state import UNITS_PER_TOKEN, PeriodQuota
from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.limits.store_quota_limiter import StoreQuotaLimiter
from api_gateway.models import Charge, Decision, Quota
from tests.kit import eventually, free_port, soon
from tests.store_kit import CALM, SERVERS, StoreServer, asking, charge, gateways

SLOW = Quota.per_second("slow", 0.001, 100)
SLOTS = ((0, 5460), (5461, 10922), (10923, 16383))
DEADLINE = 1.5  # seconds, which a busy machine does not miss
KEYS = [f"client-{number}" for number in range(24)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[StoreServer]]:
    """Run three nodes, each with a third of the slots, and a replica of the last that does not take over by itself."""
    binary = SERVERS["valkey"] or SERVERS["redis"]
    assert binary is not None, "the extras bring a server"
    options = [
        "bind 127.0.0.1",
        "cluster-enabled yes",
        "cluster-require-full-coverage no",
        "cluster-node-timeout 10000",
    ]
    options += ["cluster-replica-no-failover yes", "repl-diskless-sync-delay 0"]
    with ExitStack() as stack:
        buses = [free_port() for _ in range(4)]
        nodes = [
            stack.enter_context(StoreServer(binary, *options, f"cluster-port {bus}", port=free_port()))
            for bus in buses
        ]
        for node in nodes:
            node.command("CLUSTER", "MEET", "127.0.0.1", str(nodes[0].port), str(buses[0]))
        for node, slots in zip(nodes, SLOTS, strict=False):
            node.command("CLUSTER", "ADDSLOTSRANGE", *map(str, slots))
        replicate = "CLUSTER", "REPLICATE", id_of(nodes[2])
        eventually(lambda: nodes[3].command(*replicate) == b"+OK\r\n", "the replica knows whom to follow")
        eventually(lambda: all(map(_knows_all, nodes)), "the nodes know each other")
        eventually(lambda: nodes[3].admin.info("replication")["master_link_status"] == "up", "it replicates")
        yield nodes


def id_of(node: StoreServer) -> str:
    return node.command("CLUSTER", "MYID").split(b"\r\n")[1].decode()


def _knows_all(node: StoreServer) -> bool:
    told = node.command("CLUSTER", "INFO")
    return b"cluster_state:ok" in told and b"cluster_slots_ok:16384" in told


def url_of(nodes: list[StoreServer]) -> str:
    return f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in nodes)}"


def place(limiter: RedisLimiter, key: str) -> int:
    """Return the number of the node that a bucket lies on."""
    slot = key_slot(limiter.store_key(key).encode())
    return next(number for number, (_, last) in enumerate(SLOTS) if slot <= last)


async def decided(limiter: RedisLimiter) -> list[tuple[int, Decision, float]]:
    """Ask for one token of every bucket at once; return where it lies, the decision, and how long it took."""
    limiter.cache.is_trusted = False  # so that the store is asked each time
    begun = time.monotonic()

    async def one(key: str) -> tuple[int, Decision, float]:
        decision = await asking(limiter, charge(SLOW, key=key))
        return place(limiter, key), decision, time.monotonic() - begun

    return await asyncio.gather(*map(one, KEYS))


async def test_buckets_on_all_nodes_are_charged_by_the_store(cluster: list[StoreServer]) -> None:
    async with gateways(url_of(cluster[:1]), SLOW, count=2) as limiters:
        before = [node.admin.dbsize() for node in cluster[:3]]
        for turn in range(1, 4):
            seen = await decided(limiters[turn % 2])
            assert {place for place, *_ in seen} == {0, 1, 2}
            assert {decision.source for _, decision, _ in seen} == {"store"}
            assert {decision.remaining for _, decision, _ in seen} == {100 - turn}
        assert all(node.admin.dbsize() > size for node, size in zip(cluster, before, strict=False))
        assert [limiter.batcher.failures for limiter in limiters] == [0, 0]
        assert await limiters[0]._session.evictions() == (0, None)
        assert all(limiter.batcher.connections == 6 for limiter in limiters)


FEW = PeriodQuota.of("few", 5, Calendar("month", ZoneInfo("UTC")))
MANY = PeriodQuota.of("many", 9, Calendar("day", ZoneInfo("UTC")))


def charges_of(number: int) -> list[Charge]:
    """Return the charges of a request: two buckets and two counters, which are on any of the nodes."""
    keys = (("client", SLOW), ("peer", SLOW), ("few", FEW), ("many", MANY))
    return [charge(quota, key=f"{name}-{number}") for name, quota in keys]


async def test_quotas_and_buckets_on_several_nodes_are_charged_all_or_none(cluster: list[StoreServer]) -> None:
    """Two gateways at the same time admit no more than a quota; what was refused is given back everywhere."""
    async with gateways(url_of(cluster), SLOW, count=2) as limiters:
        machines = [StoreQuotaLimiter(one, prefix="test", wall_clock=time.time) for one in limiters]
        for one in limiters:
            one.cache.is_trusted = False
        numbers = range(8)
        spread = {key_slot(machines[0].counter_key(f"few-{number}").encode()) // 5462 for number in numbers}
        assert len(spread) > 1, "the counters are on several nodes"
        for number in numbers:
            asked = [asking(machines[turn % 2], *charges_of(number)) for turn in range(12)]
            found = await asyncio.gather(*asked)
            assert {decision.source for decision in found} == {"store"}
            admitted = sum(decision.allowed for decision in found)
            assert 0 < admitted <= 5
            await counts_become(machines[0], number, admitted)
            for turn in range(5 - admitted):  # those that others had hindered
                assert (await asking(machines[turn % 2], *charges_of(number))).allowed
            refused = await asking(machines[1], *charges_of(number))
            assert (refused.allowed, refused.quota, refused.violated) == (False, FEW, (FEW,))
            assert refused.wait_ns > 0
            await counts_become(machines[0], number, 5)


async def counts_become(machine: StoreQuotaLimiter, number: int, charged: int) -> None:
    """Wait until so many requests are charged to both counters, as refunds come after the decision.

    Buckets may get a part only of refunds that the node executes in one call with other charges (see `Refunds`).
    """
    found: list[int] = []
    for _ in range(500):
        counters = [await machine.counter(f"{one.name}-{number}", one) for one in (FEW, MANY)]
        found = [counter.count.used // UNITS_PER_TOKEN for counter, _ in counters if counter is not None]
        if found == [charged] * 2:
            break
        await asyncio.sleep(0.01)
    assert found == [charged] * 2
    free = [charge(SLOW, 0, key=f"{name}-{number}") for name in ("client", "peer")]
    assert all(charged <= 100 - one.remaining <= 13 for one in await machine.inspect(free, time.monotonic_ns()))


async def test_a_request_that_a_bucket_refuses_is_not_charged_to_a_quota(cluster: list[StoreServer]) -> None:
    async with gateways(url_of(cluster), SLOW) as (limiter,):
        machine = StoreQuotaLimiter(limiter, prefix="test", wall_clock=time.time)
        limiter.cache.is_trusted = False
        dear = [charge(SLOW, 60, key="dear"), charge(MANY, key="dear-many")]
        assert (await asking(machine, *dear)).allowed
        refused = await asking(machine, *dear)
        assert (refused.allowed, refused.quota) == (False, SLOW)
        counter, _ = await machine.counter("dear-many", MANY)
        assert counter is not None
        assert counter.count.used == UNITS_PER_TOKEN
        after = machine.settle(
            [charge(SLOW, -10, key="dear"), charge(MANY, 2, key="dear-many")],
            await asking(machine, charge(SLOW, 1, key="dear"), charge(MANY, key="dear-many")),
            time.monotonic_ns(),
        )
        assert (after.quota.name, after.remaining) == ("many", 5)


async def test_a_slot_that_moves_is_followed_and_the_store_decides_throughout(cluster: list[StoreServer]) -> None:
    """A refusal with MOVED proves that nothing was charged, so the question is asked again where it belongs."""
    async with gateways(url_of(cluster), SLOW) as (limiter,):
        key = next(key for key in KEYS if place(limiter, key) == 0)
        slot = str(key_slot(limiter.store_key(key).encode()))
        for old, new in ((0, 1), (1, 0)):
            cluster[old].admin.delete(limiter.store_key(key))  # a slot moves without its keys here
            # A node that imports a slot gets a newer epoch with it; else its claim is as old as that of the other.
            for node, claim, holder in ((new, "IMPORTING", old), (new, "NODE", new), (old, "NODE", new)):
                told = cluster[node].command("CLUSTER", "SETSLOT", slot, claim, id_of(cluster[holder]))
                assert told == b"+OK\r\n"
            for remaining in (99, 98):
                limiter.cache.is_trusted = False  # so that the store is asked
                decision = await asking(limiter, charge(SLOW, key=key))
                assert (decision.source, decision.remaining) == ("store", remaining)
        assert limiter.batcher.failures == 0


async def test_a_node_that_hangs_takes_its_own_buckets_with_it_and_no_others(cluster: list[StoreServer]) -> None:
    """Its first three questions wait for the deadline, the next for nothing; the other nodes are asked throughout."""
    async with gateways(url_of(cluster), SLOW, deadline=DEADLINE) as (limiter,):
        await soon(lambda: limiter.batcher.connections == 6, "all lanes serve")
        cluster[2].pause()
        try:
            while limiter.batcher.is_whole:
                assert (await without_the_last_node(limiter))[0] == {"local_share"}
            assert limiter.state().decision_source == "local_share"
            assert limiter.batcher.is_usable
            seen = [await without_the_last_node(limiter) for _ in range(10)]
            assert [sources for sources, _ in seen] == [{"local_share"}] * 10
            assert min(took for _, took in seen) < DEADLINE / 2
        finally:
            cluster[2].resume()
        await soon(lambda: limiter.batcher.is_whole, "it is back")
        assert (await without_the_last_node(limiter))[0] == {"store"}
        assert limiter.state().decision_source == "store"


async def test_a_quota_on_a_node_that_hangs_is_decided_without_it(cluster: list[StoreServer]) -> None:
    """By the share of what was left, which is charged when the node is back, once."""
    ample = PeriodQuota.of("ample", 1000, Calendar("month", ZoneInfo("UTC")))
    async with gateways(url_of(cluster), SLOW, deadline=DEADLINE) as (limiter,):
        machine = StoreQuotaLimiter(limiter, prefix="test", wall_clock=time.time)
        limiter.cache.is_trusted = False
        names = [f"hang-{number}" for number in range(200)]
        counted = next(one for one in names if SLOTS[2][0] <= key_slot(machine.counter_key(one).encode()))
        bucket = next(one for one in names if place(limiter, one) == 0)
        charges = [charge(SLOW, key=bucket), charge(ample, key=counted)]
        assert (await asking(machine, *charges)).source == "store"
        cluster[2].pause()
        try:
            found = [await asking(machine, *charges) for _ in range(5)]
        finally:
            cluster[2].resume()
        assert {(decision.allowed, decision.source) for decision in found} == {(True, "local_share")}
        await soon(lambda: limiter.batcher.is_whole, "the node is connected again")
        assert (await asking(machine, *charges)).source == "store"
        counter, _ = await machine.counter(counted, ample)
        assert counter is not None
        assert counter.count.used == 7 * UNITS_PER_TOKEN


async def test_a_node_that_dies_does_so_too_until_its_replica_takes_over(cluster: list[StoreServer]) -> None:
    """This ends the cluster as it was, so it is the last of the tests."""
    for node in cluster:
        node.admin.config_set("cluster-node-timeout", "500")
    cluster[3].admin.config_set("cluster-replica-no-failover", "no")
    async with gateways(url_of(cluster), SLOW, deadline=CALM) as (limiter,):  # servers write to the disk meanwhile
        await soon(lambda: limiter.batcher.connections == 6, "all lanes serve")
        cluster[2].kill()
        sources, took = await without_the_last_node(limiter)
        assert (sources, took < CALM / 2) == ({"local_share"}, True)
        await soon(lambda: not limiter.batcher.is_whole, "both lanes know")
        while not limiter.batcher.is_whole:
            assert (await without_the_last_node(limiter))[0] <= {"local_share", "store"}
            await asyncio.sleep(0.02)
        assert (await without_the_last_node(limiter))[0] == {"store"}
        assert limiter.state().decision_source == "store"


async def without_the_last_node(limiter: RedisLimiter) -> tuple[set[str], float]:
    """Ask for every bucket. The store decides those on two nodes; return what decides the rest, and its time."""
    seen = await decided(limiter)
    assert {decision.source for place, decision, _ in seen if place < 2} == {"store"}
    rest = [(decision.source, took) for place, decision, took in seen if place == 2]
    return {source for source, _ in rest}, max(took for _, took in rest)
