"""A cluster of three real nodes: buckets of a failed node are decided without it, all others by their nodes."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from redis.crc import key_slot

from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.models import Decision, Quota
from tests.kit import eventually, free_port, soon
from tests.store_kit import CALM, SERVERS, StoreServer, asking, charge, gateways

SLOW = Quota.per_second("slow", 0.001, 100)
SLOTS = ((0, 5460), (5461, 10922), (10923, 16383))
DEADLINE = 0.6  # seconds, which a busy machine does not miss
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


async def test_a_slot_that_moves_is_followed_and_the_store_decides_throughout(cluster: list[StoreServer]) -> None:
    """A refusal with MOVED proves that nothing was charged, so the question is asked again where it belongs."""
    async with gateways(url_of(cluster), SLOW) as (limiter,):
        key = next(key for key in KEYS if place(limiter, key) == 0)
        slot = str(key_slot(limiter.store_key(key).encode()))
        for old, new in ((0, 1), (1, 0)):
            cluster[old].admin.delete(limiter.store_key(key))  # a slot moves without its keys here
            for node in (cluster[new], cluster[old]):
                assert node.command("CLUSTER", "SETSLOT", slot, "NODE", id_of(cluster[new])) == b"+OK\r\n"
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
            assert min(took for _, took in seen) < DEADLINE / 4
        finally:
            cluster[2].resume()
        await soon(lambda: limiter.batcher.is_whole, "it is back")
        assert (await without_the_last_node(limiter))[0] == {"store"}
        assert limiter.state().decision_source == "store"


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
