"""Concurrency limits on a cluster of three real nodes: exact, and back to zero after any failure."""

import asyncio
import random
import time
from collections import Counter
from contextlib import AsyncExitStack
from functools import partial

import pytest
from redis.crc import key_slot

from api_gateway.limits import concurrency_leases, concurrency_ops, multi_node_claims
from api_gateway.limits.concurrency import ConcurrencyQuota, SlottedCharges
from api_gateway.limits.concurrency_leases import LeasedSlots
from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.models import ConcurrencySlot, Decision, Exchange, Quota
from tests.kit import soon
from tests.store.test_cluster_batcher import SLOTS, cluster, url_of
from tests.store_kit import CALM, StoreServer, charge, gateways

__all__ = ["cluster"]  # a fixture of this module, too

PLENTY = Quota.per_second("plenty", 1000, 1_000_000)
FEW = ConcurrencyQuota.of("few", 3, "few")
LEASE = 4.0  # seconds; longer than a busy machine keeps a worker from renewing


class ClusterWorker:
    """A worker with its slots, which are leased on any of the nodes, and renewed as in a gateway."""

    def __init__(self, limiter: RedisLimiter, number: int) -> None:
        self.in_flight: Counter[str] = Counter()
        self.limiter = limiter
        self.slots = LeasedSlots(self.in_flight, limiter, worker=f"{number:016x}", prefix="test")

    async def ask(self, *names: str) -> Exchange | None:
        """Begin a request with a slot for each name; None if it is refused."""
        slots = tuple([ConcurrencySlot(f"limit:few:{name}", FEW) for name in names])
        exchange, now_ns = Exchange("", "GET", "/", "", time.monotonic()), time.monotonic_ns()
        charges = SlottedCharges([charge(PLENTY, key=name) for name in names], slots)
        if self.slots.refusal(slots, now_ns) is not None:
            return None
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self.slots.ask(exchange, self.limiter, charges, now_ns, answer.set_result)
        decision = await answer
        assert bool(exchange.slots) is decision.allowed
        return exchange if decision.allowed else None

    def end(self, exchange: Exchange) -> None:
        exchange.finished = time.monotonic()
        self.slots.release(exchange)

    async def shown(self, *names: str) -> int:
        """Return the sum of the requests in flight, by the store."""
        uses = await self.slots.look([ConcurrencySlot(f"limit:few:{name}", FEW) for name in names])
        return sum(use.in_flight for use in uses)


def names_on_each_node(worker: ClusterWorker) -> list[str]:
    """Return four names of keys for each node, whose leases are on it."""
    names = [f"key-{number}" for number in range(200)]
    on = [[name for name in names if node_of(worker, name) == node] for node in range(3)]
    return [name for found in on for name in found[:4]]


def node_of(worker: ClusterWorker, name: str) -> int:
    slot = key_slot(worker.slots.lease_key(f"limit:few:{name}").encode())
    return next(number for number, (_, last) in enumerate(SLOTS) if slot <= last)


@pytest.fixture(autouse=True)
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency_leases, "LEASE", LEASE)
    monkeypatch.setattr(concurrency_leases, "RENEWAL_INTERVAL", LEASE / 5)
    for module in (concurrency_ops, multi_node_claims):
        monkeypatch.setattr(module, "LEASE_MS", round(LEASE * 1000))


async def test_slots_on_three_nodes_are_shared_exactly_and_return_to_zero(cluster: list[StoreServer]) -> None:
    """Two workers at random, then one that is gone without a word, then a node that hangs for a while."""
    choose = random.Random(16)
    async with AsyncExitStack() as stack:
        limiters = await stack.enter_async_context(gateways(url_of(cluster), PLENTY, count=2, deadline=CALM))
        impatient = await stack.enter_async_context(gateways(url_of(cluster), PLENTY, deadline=0.6))
        one, two, three = (ClusterWorker(limiter, number) for number, limiter in enumerate([*limiters, *impatient], 1))
        names = names_on_each_node(one)
        assert len(names) == 12
        for worker in (one, two, three):
            await worker.slots.start()
            stack.push_async_callback(worker.slots.close)
            await soon(partial(are_connected, worker), "all lanes serve")

        open_: Counter[str] = Counter()

        async def request() -> None:
            worker, wanted = choose.choice((one, two)), choose.sample(names, 2)
            exchange = await worker.ask(*wanted)
            if exchange is None:
                return
            open_.update(wanted)
            assert max(open_.values()) <= FEW.capacity
            await asyncio.sleep(choose.random() / 20)
            open_.subtract(wanted)
            worker.end(exchange)

        for _ in range(10):
            await asyncio.gather(*[request() for _ in range(40)])
        await become_zero(one, names)

        assert None not in [await two.ask(name) for name in names]
        await two.slots.close()  # killed: it neither renews nor returns
        assert await one.shown(*names) == len(names)
        await become_zero(one, names)

        held = [await three.ask(names[-1]) for _ in range(2)]
        cluster[2].pause()
        try:
            for exchange in held:
                assert exchange is not None
                three.end(exchange)  # the node is not told
            await soon(lambda: bool(three.slots.unconfirmed), "the worker knows that it is not confirmed")
        finally:
            cluster[2].resume()
        await become_zero(one, names)
        assert not three.slots.counters


def are_connected(worker: ClusterWorker) -> bool:
    return worker.limiter.batcher.connections == 6


async def become_zero(worker: ClusterWorker, names: list[str]) -> None:
    """Wait until the nodes count nothing, at most as long as a lease lasts and a busy machine takes."""
    end = time.monotonic() + LEASE + 60
    while found := await worker.shown(*names):
        assert time.monotonic() < end, found
        await asyncio.sleep(0.05)
