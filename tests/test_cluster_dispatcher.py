"""A cluster of three real nodes: what lies on one that fails is decided without it, and nothing else is."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from redis.crc import key_slot

from api_gateway.models import Decision, Quota
from api_gateway.redis_limiter import RedisLimiter
from tests.kit import eventually, soon
from tests.store_kit import SERVERS, StoreServer, asking, charge, free_port, gateways

SLOW = Quota.per_second("slow", 0.001, 100)
SLOTS = ((0, 5460), (5461, 10922), (10923, 16383))
DEADLINE = 0.2  # seconds
KEYS = [f"client-{number}" for number in range(24)]


@pytest.fixture(scope="module", params=SERVERS)
def cluster(request: pytest.FixtureRequest) -> Iterator[list[StoreServer]]:
    """Run three nodes that know each other, each with a third of the slots."""
    binary = SERVERS[request.param]
    if binary is None:
        pytest.skip(f"there is no {request.param} server on the PATH")
    ports = [free_port() for _ in range(6)]
    options = ["bind 127.0.0.1", "cluster-enabled yes", "cluster-require-full-coverage no", "cluster-node-timeout 500"]
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(StoreServer(binary, *options, f"cluster-port {bus}", port=port))
            for port, bus in zip(ports[:3], ports[3:], strict=True)
        ]
        for node, slots in zip(nodes, SLOTS, strict=True):
            node.command("CLUSTER", "ADDSLOTSRANGE", *map(str, slots))
            node.command("CLUSTER", "MEET", "127.0.0.1", str(ports[0]), str(ports[3]))
        for node in nodes:
            eventually(lambda: _knows_all(node), "the nodes know each other")  # noqa: B023 - called within the turn
        yield nodes


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
    limiter._hears_refunds = False  # so that the store is asked each time
    begun = time.monotonic()

    async def one(key: str) -> tuple[int, Decision, float]:
        decision = await asking(limiter, charge(SLOW, key=key))
        return place(limiter, key), decision, time.monotonic() - begun

    return await asyncio.gather(*map(one, KEYS))


def sources(seen: list[tuple[int, Decision, float]], *, on: set[int]) -> set[str]:
    return {decision.source for place, decision, _ in seen if place in on}


async def test_buckets_on_all_nodes_are_charged_by_the_store(cluster: list[StoreServer]) -> None:
    async with gateways(url_of(cluster[:1]), SLOW, count=2) as limiters:
        before = [node.admin.dbsize() for node in cluster]
        for turn in range(1, 4):
            seen = await decided(limiters[turn % 2])
            assert {place for place, *_ in seen} == {0, 1, 2}
            assert {decision.source for _, decision, _ in seen} == {"store"}
            assert {decision.remaining for _, decision, _ in seen} == {100 - turn}
        assert all(node.admin.dbsize() > size for node, size in zip(cluster, before, strict=True))
        assert [limiter.dispatcher.failures for limiter in limiters] == [0, 0]
        assert all(limiter.dispatcher.connections == 6 for limiter in limiters)


async def test_a_slot_that_moves_is_followed_and_the_store_decides_throughout(cluster: list[StoreServer]) -> None:
    """A refusal with MOVED proves that nothing was charged, so the question is asked again where it belongs."""
    ids = [node.command("CLUSTER", "MYID").split(b"\r\n")[1].decode() for node in cluster]
    async with gateways(url_of(cluster), SLOW) as (limiter,):
        key = next(key for key in KEYS if place(limiter, key) == 0)
        slot = str(key_slot(limiter.store_key(key).encode()))
        for old, new in ((0, 1), (1, 0)):
            cluster[old].admin.delete(limiter.store_key(key))  # a slot moves without its keys here
            for node in (cluster[new], cluster[old]):
                assert node.command("CLUSTER", "SETSLOT", slot, "NODE", ids[new]) == b"+OK\r\n"
            for remaining in (99, 98):
                limiter._hears_refunds = False  # so that the store is asked
                decision = await asking(limiter, charge(SLOW, key=key))
                assert (decision.source, decision.remaining) == ("store", remaining)
        assert limiter.dispatcher.failures == 0


@pytest.mark.parametrize("failure", ["hangs", "dies"])
async def test_a_node_that_fails_takes_its_own_buckets_with_it_and_no_others(
    cluster: list[StoreServer], failure: str
) -> None:
    """The others are decided by the store throughout; after three failures nobody waits for the node any more."""
    async with gateways(url_of(cluster), SLOW, deadline=DEADLINE) as (limiter,):
        await soon(lambda: limiter.dispatcher.connections == 6, "all lanes serve")
        lost, others = {2}, {0, 1}
        if failure == "hangs":
            cluster[2].pause()
        else:
            cluster[2].kill()
        try:
            for _ in range(4):
                seen = await decided(limiter)
                assert sources(seen, on=others) == {"store"}
                assert sources(seen, on=lost) == {"local_share"}
                assert max(took for *_, took in seen) < DEADLINE + 0.15
            assert limiter.state().mode == "local_share"
            assert limiter.dispatcher.is_usable
            begun = time.monotonic()
            while time.monotonic() < begun + 1.5:  # the cluster notices meanwhile, and connections are tried again
                seen = await decided(limiter)
                assert sources(seen, on=others) == {"store"}
                assert sources(seen, on=lost) == {"local_share"}
                assert max(took for *_, took in seen) < DEADLINE / 2
                await asyncio.sleep(0.05)
            names = {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}}
            assert {name for name in names if not name.startswith(("store ", "cluster nodes"))} == set()
        finally:
            cluster[2].resume() if failure == "hangs" else cluster[2].start()
        await soon(lambda: all(map(_knows_all, cluster)), "the cluster has it again")
        await soon(lambda: limiter.dispatcher.is_whole, "so has the gateway")
        seen = await decided(limiter)
        assert sources(seen, on=lost | others) == {"store"}
        assert limiter.mode == "store"
