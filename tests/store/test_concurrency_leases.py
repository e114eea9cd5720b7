"""Concurrency limits that workers share: the real script and the real slots, on a virtual clock.

Operations of one worker travel on two connections, so that they may be executed and answered in another order.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from api_gateway.limits.concurrency import ConcurrencyQuota, SlottedCharges, SlotUse
from api_gateway.limits.concurrency_leases import RENEWAL_INTERVAL, LeasedSlots
from api_gateway.limits.concurrency_ops import LEASE, LEASE_MS
from api_gateway.limits.periods import Calendar
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.limits.script_batcher import ScriptOp, _call
from api_gateway.limits.store_quota_limiter import StoreQuotaLimiter
from api_gateway.metrics import Recorder
from api_gateway.models import Charge, Client, ConcurrencySlot, Decision, Exchange, Quota, sharing_processes
from api_gateway.proxy.candidate_limits import CandidateLimits
from tests.cases import each
from tests.kit import turns
from tests.lua_store import MICROSECOND, LuaLimiter, LuaStore, Wire

NOW_US = 1_800_000_000_000_000
PLENTY = Quota.per_second("PLENTY", 1000, 100_000)
SCARCE = Quota.per_second("SCARCE", 0.001, 3)
SECOND = 1_000_000  # in microseconds


def slot(name: str, most: int, value: str = "acme") -> ConcurrencySlot:
    return ConcurrencySlot(f"limit:{name}:{value}", ConcurrencyQuota.of(name, most, name))


FIVE = slot("five", 5)


class Wires(Wire):
    """Two connections to the store: batches are executed, and their replies delivered, when the test says so."""

    def __init__(self, store: LuaStore) -> None:
        super().__init__(store)
        self.sent: list[tuple[list[ScriptOp], Any]] = []
        self.executed: list[tuple[list[ScriptOp], list[int]]] = []

    def submit(self, question: ScriptOp) -> None:
        self.waiting.append(question)

    def send(self) -> None:
        """Write a batch."""
        batch, self.waiting = [op for op in self.waiting if not op.is_over], []
        if batch:
            self.sent.append((batch, _call(batch)))

    def execute_one(self, index: int) -> None:
        """Have the store execute a batch that was sent."""
        batch, call = self.sent.pop(index)
        self.executed.append((batch, self.store.call(call.keys, *call.arguments)))

    def deliver_one(self, index: int) -> None:
        """Deliver the reply to a batch, also after its deadline."""
        batch, (clock_us, *values) = self.executed.pop(index)
        reply = iter(values)
        for op in batch:
            op.read(clock_us, reply)
            op.is_over = True
        assert not [*reply], "a reply has exactly the requested values"

    def time_out(self) -> None:
        """Let everything that is under way miss the deadline; it may be executed all the same."""
        under_way = [op for batch, _ in (*self.sent, *self.executed) for op in batch] + self.waiting
        self.waiting = []
        for op in under_way:
            if not op.is_over:
                op.is_over = True
                op.fail()

    def all_at_once(self) -> None:
        """Send, execute and deliver everything, in order, until nothing is left."""
        while self.waiting or self.sent or self.executed:
            self.send()
            while self.sent:
                self.execute_one(0)
            while self.executed:
                self.deliver_one(0)

    def cut(self) -> None:
        """Drop what has not been executed and all replies."""
        self.time_out()
        self.sent.clear()
        self.executed.clear()


class Worker:
    """A worker with a limiter, slots, and the requests that it has admitted."""

    def __init__(
        self,
        store: LuaStore,
        number: int,
        *,
        processes: int = 1,
        with_quotas: bool = False,
        is_divided: bool = False,
    ) -> None:
        self.store = store
        self.limiter = LuaLimiter(store, [PLENTY, SCARCE], processes=processes)
        self.limiter._session.is_divided = is_divided
        self.wire = Wires(store)
        self.limiter.batcher = self.wire
        self.charging: Any = self.limiter
        if with_quotas:
            self.charging = StoreQuotaLimiter(self.limiter, prefix="test", wall_clock=lambda: store.now_us / SECOND)
        self.in_flight: Counter[str] = Counter()
        self.slots = LeasedSlots(self.in_flight, self.limiter, worker=f"{number:016x}", prefix="test")
        self.open: list[Exchange] = []
        self.refused: list[Decision] = []
        self.asking = 0

    @property
    def now_ns(self) -> int:
        return self.store.now_us * MICROSECOND

    def ask(self, *slots: ConcurrencySlot, charges: Sequence[Charge] | None = None) -> Exchange:
        """Begin a request, as the stage does."""
        charges = [Charge("client:acme", PLENTY, PLENTY.cost_ns(1))] if charges is None else charges
        exchange = Exchange("", "GET", "/api/x", "192.0.2.7", self.now_ns / 1e9)
        slotted = SlottedCharges(charges, slots)
        refused = self.slots.refusal_by_all(slotted, self.charging, self.now_ns)
        if refused is not None:
            self.refused.append(refused)
            return exchange
        decision = self.charging.decide(slotted, self.now_ns)
        if decision is None:
            self.asking += 1
            self.slots.ask(exchange, self.charging, slotted, self.now_ns, lambda one: self._on(exchange, one))
        elif decision.allowed:
            self.slots.take(exchange, slots)
            self.open.append(exchange)
        else:
            self.refused.append(decision)
        return exchange

    def _on(self, exchange: Exchange, decision: Decision) -> None:
        self.asking -= 1
        exchange.decision = decision
        if not decision.allowed:
            self.refused.append(decision)
            assert not exchange.slots
        elif not exchange.finished:
            self.open.append(exchange)

    def end(self, exchange: Exchange) -> None:
        """End a request, also one for which the store is still asked."""
        exchange.finished = self.now_ns / 1e9
        self.slots.release(exchange)
        if exchange in self.open:
            self.open.remove(exchange)

    def admitted(self, count: int, *slots: ConcurrencySlot) -> int:
        """Begin so many requests, and return how many are admitted."""
        before = len(self.open)
        for _ in range(count):
            self.ask(*slots)
            self.wire.all_at_once()
        return len(self.open) - before

    def beat(self) -> None:
        """Renew the leases, as every `RENEWAL_INTERVAL`."""
        self.slots.note_beat()
        self.slots.renew([*self.slots.counters, *(self.slots.unconfirmed.keys() - self.slots.counters.keys())])


def total(worker: Worker, one: ConcurrencySlot = FIVE) -> int:
    """Return what the store counts."""
    reply = worker.store.call([worker.slots.lease_key(one.key)], "held", 1)
    return reply[1]


@pytest.fixture
def store() -> LuaStore:
    return LuaStore(NOW_US)


def test_workers_share_a_limit_exactly(store: LuaStore) -> None:
    one, two = Worker(store, 1), Worker(store, 2)
    assert (one.admitted(3, FIVE), two.admitted(9, FIVE), one.admitted(2, FIVE)) == (3, 2, 0)
    assert total(one) == 5
    two.end(two.open[0])
    two.wire.all_at_once()
    assert one.admitted(2, FIVE) == 1
    for worker in (one, two):
        for exchange in [*worker.open]:
            worker.end(exchange)
        worker.wire.all_at_once()
    assert total(one) == 0
    assert not one.slots.counters
    store.now_us += int(LEASE * SECOND) + SECOND
    store.sweep()
    assert not [key for key in store.values if ":slots:" in key]
    for worker in (one, two, one, two):
        worker.beat()
    assert not one.slots.epochs


def test_a_request_is_charged_and_counted_in_one_call_and_waits_for_nothing_else(store: LuaStore) -> None:
    worker = Worker(store, 1)
    worker.ask(FIVE, slot("other", 3))
    worker.wire.send()
    worker.wire.execute_one(0)
    worker.wire.deliver_one(0)
    assert len(worker.open) == 1
    assert worker.wire.waiting == []
    assert worker.wire.sent == []
    worker.ask(FIVE)
    worker.end(worker.open[0])
    worker.wire.send()
    assert len(worker.wire.sent) == 1, "the return of slots shares a call with what else there is"


def test_a_refusal_that_this_worker_alone_can_know_needs_no_call(store: LuaStore) -> None:
    worker = Worker(store, 1)
    assert worker.admitted(5, FIVE) == 5
    worker.ask(FIVE)
    assert not worker.wire.waiting
    assert worker.refused[-1].key == FIVE.key


def test_a_request_takes_everything_or_nothing(store: LuaStore) -> None:
    one, two = Worker(store, 1), Worker(store, 2)
    other = slot("other", 1)
    scarce = Charge("client:scarce", SCARCE, SCARCE.cost_ns(1))
    assert two.admitted(1, other) == 1
    one.ask(FIVE, other, charges=[scarce])
    one.wire.all_at_once()
    (refused,) = one.refused
    assert (refused.key, refused.source, [quota.policy for quota in refused.violated]) == (
        other.key,
        "store",
        ["other"],
    )
    assert total(one) == 0
    for _ in range(5):
        one.ask(FIVE, charges=[scarce])
        one.wire.all_at_once()
    assert len(one.open) == 3, "the refused request was not charged"
    assert one.refused[-1].key == "client:scarce"
    assert total(one) == 3, "requests without tokens take no slot"


@pytest.mark.parametrize("is_full", [False, True])
def test_quotas_buckets_and_slots_are_one_call(store: LuaStore, *, is_full: bool) -> None:
    monthly = PeriodQuota.of("monthly", 4, Calendar("month", ZoneInfo("UTC")), "monthly")
    worker = Worker(store, 1, with_quotas=True)
    charges = [
        Charge("client:acme", PLENTY, PLENTY.cost_ns(1)),
        Charge("limit:monthly:acme", monthly, monthly.cost_ns(1)),
    ]
    few = slot("few", 2) if is_full else FIVE
    for _ in range(7):
        worker.ask(few, charges=charges)
        worker.wire.all_at_once()
    assert len(worker.open) == (2 if is_full else 4)
    assert {decision.quota.policy for decision in worker.refused} == {"few" if is_full else "monthly"}
    assert total(worker, few) == len(worker.open)
    for exchange in [*worker.open]:
        worker.end(exchange)
        worker.wire.all_at_once()
    for _ in range(7):
        worker.ask(FIVE, charges=charges)
        worker.wire.all_at_once()
    assert len(worker.open) == (2 if is_full else 0), "refused requests were not charged to the quota"


@each("with_quotas", [False, True])
@each("asked", ["another worker", "the same", "the same on a cluster", "the same without the store"])
def test_a_refusal_for_lack_of_a_slot_names_the_limits_without_tokens(with_quotas: bool, asked: str) -> None:  # noqa: FBT001
    """By the reply that tells that no slot is free, by the last readings, or by the share."""
    store, is_divided = LuaStore(NOW_US), asked == "the same on a cluster"
    one, other = (Worker(store, number, with_quotas=with_quotas, is_divided=is_divided) for number in (1, 2))
    for worker in (one, other):
        worker.limiter._on_subscription(True)
    store.now_us += 1
    monthly = PeriodQuota.of("monthly", 3, Calendar("month", ZoneInfo("UTC")), "monthly")
    tokens = Charge("limit:monthly:acme", monthly, monthly.cost_ns(1))
    if not with_quotas:
        tokens = Charge("client:acme", SCARCE, SCARCE.cost_ns(1))
    charges = [Charge("client:plenty", PLENTY, PLENTY.cost_ns(1)), tokens]
    for number in range(3):
        one.ask(slot("two", 2), charges=charges)
        one.wire.all_at_once()
        if number == 0:
            one.end(one.open[0])
            one.wire.all_at_once()
    assert len(one.open) == 2
    asking = other if asked == "another worker" else one
    asking.wire.is_up = asked != "the same without the store"
    asking.ask(slot("two", 2), charges=charges)
    asking.wire.all_at_once()
    (refused,) = asking.refused
    assert [quota.policy for quota in refused.violated] == ["two", tokens.quota.policy]
    assert (refused.key, refused.quota) == (tokens.key, tokens.quota)
    assert refused.wait_ns > 900 * 10**9


def test_the_requests_of_a_killed_worker_count_until_its_lease_ends(store: LuaStore) -> None:
    one, two = Worker(store, 1), Worker(store, 2)
    assert (one.admitted(5, FIVE), two.admitted(1, FIVE)) == (5, 0)
    store.now_us += int((LEASE - 0.01) * SECOND)
    assert two.admitted(1, FIVE) == 0
    store.now_us += int(0.02 * SECOND)
    assert two.admitted(9, FIVE) == 5


def test_a_lease_is_renewed_while_its_requests_are_open(store: LuaStore) -> None:
    one, two = Worker(store, 1), Worker(store, 2)
    assert one.admitted(5, FIVE) == 5
    for _ in range(20):
        store.now_us += int(RENEWAL_INTERVAL * SECOND)
        one.beat()
        one.wire.all_at_once()
        store.sweep()
        assert two.admitted(1, FIVE) == 0
    assert total(one) == 5


def test_a_store_that_has_lost_everything_knows_it_again_after_a_renewal(store: LuaStore) -> None:
    one, two = Worker(store, 1), Worker(store, 2)
    assert one.admitted(4, FIVE) == 4
    store.values.clear()
    one.beat()
    one.wire.all_at_once()
    assert total(one) == 4
    assert two.admitted(3, FIVE) == 1
    store.values.clear()
    assert one.admitted(3, FIVE) == 1, "the worker's own requests are known again with its next one"
    assert total(one) == 5


def test_a_reply_that_is_lost_leaks_nothing(store: LuaStore) -> None:
    worker = Worker(store, 1)
    first, second = worker.ask(FIVE), worker.ask(FIVE)
    worker.wire.send()
    worker.wire.execute_one(0)
    worker.wire.is_up = False
    worker.wire.cut()
    assert (len(worker.open), total(worker)) == (2, 2), "the policy for outages admits them"
    worker.wire.is_up = True
    worker.beat()
    worker.wire.all_at_once()
    assert total(worker) == 2
    for exchange in (first, second):
        worker.end(exchange)
        worker.wire.send()
        worker.wire.cut()  # neither executed nor answered
    worker.beat()
    worker.wire.all_at_once()
    assert total(worker) == 0
    assert not worker.slots.unconfirmed


def test_a_request_that_ends_while_the_store_is_asked_leaks_nothing(store: LuaStore) -> None:
    worker = Worker(store, 1)
    exchange = worker.ask(FIVE)
    worker.wire.send()
    worker.end(exchange)
    worker.wire.all_at_once()
    assert (total(worker), worker.in_flight["five"]) == (0, 0)


@each("with_quotas", [False, True])
def test_what_a_share_admits_is_charged_if_a_late_reply_tells_that_no_slot_was_free(with_quotas: bool) -> None:  # noqa: FBT001
    """The bucket and the quota would have admitted the request, but the store has charged nothing."""
    store = LuaStore(NOW_US)
    one, other = Worker(store, 1, with_quotas=with_quotas), Worker(store, 2)
    assert other.admitted(5, FIVE) == 5
    quota = PeriodQuota.of("q", 100, Calendar("month", ZoneInfo("UTC")))
    charges = [Charge("b", SCARCE, SCARCE.cost_ns(1)), Charge("q:acme", quota, quota.cost_ns(1))][: 1 + with_quotas]
    one.ask(FIVE, charges=charges)
    one.wire.send()
    one.wire.execute_one(0)
    one.wire.time_out()
    assert len(one.open) == 1
    store.now_us += 1
    one.wire.deliver_one(0)
    assert one.limiter.store_key("b") not in store.values
    one.ask(charges=[replace(charge, increment_ns=0) for charge in charges])
    one.wire.all_at_once()
    assert one.limiter.store_key("b") in store.values
    if with_quotas:
        assert store.values[one.charging.counter_key("q:acme")][0].split()[3] == "1000"
        assert one.charging.owed == {}


def test_a_request_that_ends_before_its_lease_is_written_is_returned_once(store: LuaStore) -> None:
    """The operation that sets the lease has the number without it, so another one would return a slot of others."""
    worker = Worker(store, 1)
    first, _ = worker.ask(FIVE), worker.ask(FIVE)
    worker.wire.all_at_once()
    worker.slots.mark(FIVE.key)
    worker.end(first)
    worker.wire.all_at_once()
    assert total(worker) == worker.in_flight["five"] == 1


def test_a_request_that_ends_during_an_outage_is_returned_after_it(store: LuaStore) -> None:
    worker = Worker(store, 1)
    exchange = worker.ask(FIVE)
    worker.wire.all_at_once()
    worker.wire.is_up = False
    worker.end(exchange)
    worker.wire.is_up = True
    worker.beat()
    worker.wire.all_at_once()
    assert total(worker) == 0


def test_a_request_whose_lease_is_set_while_the_store_is_asked_counts(store: LuaStore) -> None:
    """The lease is set between the claim and its reply, to a number without the request."""
    worker = Worker(store, 1)
    worker.ask(FIVE)
    worker.wire.send()
    worker.wire.execute_one(0)
    worker.slots.mark(FIVE.key)
    worker.wire.all_at_once()
    assert total(worker) == worker.in_flight["five"] == 1


def test_a_claim_that_a_new_epoch_has_overtaken_begins_no_other(store: LuaStore) -> None:
    worker = Worker(store, 1)
    worker.ask(FIVE)
    worker.wire.send()
    worker.slots.mark(FIVE.key)
    epoch = worker.slots.epoch(FIVE.key)
    worker.wire.send()
    worker.wire.execute_one(1)  # the lease is set before the claim arrives, which is void
    worker.wire.deliver_one(0)
    worker.wire.all_at_once()
    assert total(worker) == worker.in_flight["five"] == 1
    assert worker.slots.epoch(FIVE.key) == epoch


def test_a_renewal_compares_the_number_of_requests_only_while_no_operation_is_under_way(store: LuaStore) -> None:
    """With a claim under way, the numbers differ although both are right."""
    worker = Worker(store, 1)
    worker.ask(FIVE)
    worker.wire.all_at_once()
    worker.ask(FIVE)
    worker.wire.send()
    worker.wire.execute_one(0)
    epoch = worker.slots.epoch(FIVE.key)
    worker.beat()
    worker.wire.all_at_once()
    assert (total(worker), worker.slots.epoch(FIVE.key)) == (2, epoch), "nothing has to be set"


def test_a_renewal_corrects_a_wrong_number_of_requests(store: LuaStore) -> None:
    worker = Worker(store, 1)
    worker.ask(FIVE)
    worker.wire.all_at_once()
    slots = worker.slots
    store.call([slots.lease_key(FIVE.key)], "return", slots.worker, LEASE_MS, 1, slots.epoch(FIVE.key))
    assert total(worker) == 0
    worker.beat()
    worker.wire.all_at_once()
    assert total(worker) == 1


def test_while_the_store_is_unavailable_each_worker_has_its_share(store: LuaStore) -> None:
    one, two = (Worker(store, number, processes=2) for number in (1, 2))
    assert one.admitted(3, FIVE) == 3
    for worker in (one, two):
        worker.wire.is_up = False
    assert (one.admitted(5, FIVE), two.admitted(5, FIVE)) == (0, 2)
    refused = (*one.refused, *two.refused)
    assert {(decision.source, sharing_processes(decision)) for decision in refused} == {("local_share", 2)}
    one.end(one.open[0])
    one.end(one.open[0])
    assert one.admitted(5, FIVE) == 1
    for worker in (one, two):
        worker.wire.is_up = True
        worker.beat()
        worker.wire.all_at_once()
    assert total(one) == 4
    assert (one.admitted(5, FIVE), two.admitted(5, FIVE)) == (1, 0)
    single = slot("single", 1)
    one.wire.is_up = False
    assert one.admitted(3, single) == 1, "a share is not less than one request"


def test_leases_that_end_during_an_outage_are_forgotten(store: LuaStore) -> None:
    worker = Worker(store, 1)
    assert worker.admitted(2, FIVE) == 2
    worker.wire.is_up = False
    for exchange in [*worker.open]:
        worker.end(exchange)
    assert worker.slots.unconfirmed
    for _ in range(int(LEASE / RENEWAL_INTERVAL) + 2):
        worker.beat()
    assert not worker.slots.unconfirmed
    assert not worker.slots.unwritten


def test_a_step_back_of_the_stores_clock_does_not_keep_a_killed_workers_requests(store: LuaStore) -> None:
    one, two = Worker(store, 1), Worker(store, 2)
    assert one.admitted(5, FIVE) == 5
    store.now_us -= 3600 * SECOND
    assert two.admitted(1, FIVE) == 0
    two.ask(FIVE)
    two.wire.all_at_once()
    store.now_us += int((LEASE + 1) * SECOND)
    assert two.admitted(5, FIVE) == 5


async def test_operators_see_the_requests_of_all_workers(store: LuaStore) -> None:
    one, two = (Worker(store, number, processes=2) for number in (1, 2))
    assert (one.admitted(2, FIVE), two.admitted(1, FIVE)) == (2, 1)
    other = slot("other", 1)
    looking = asyncio.create_task(two.slots.look([FIVE, other]))
    await turns()
    two.wire.all_at_once()
    assert list(await looking) == [SlotUse(FIVE, 3), SlotUse(other, 0)]
    looking = asyncio.create_task(two.slots.look([FIVE]))
    await turns()
    two.wire.cut()
    own = SlotUse(FIVE, 1, processes=2, share=2)
    assert list(await looking) == [own], "its own, if it gets no reply"
    two.wire.is_up = False
    (found,) = await two.slots.look([FIVE])
    assert (found, found.concurrent, found.is_free) == (own, 2, True), "while the store is unavailable"
    two.limiter.policy = "allow"
    (found,) = await two.slots.look([FIVE])
    assert (found.concurrent, found.processes) == (5, 2), "no share is applied"
    assert await two.slots.look([]) == []


def on_a_cluster(store: LuaStore, number: int, **options: Any) -> Worker:
    worker = Worker(store, number, is_divided=True, **options)
    worker.limiter.cache.is_trusted = False
    return worker


def test_on_a_cluster_a_request_takes_everything_or_nothing(store: LuaStore) -> None:
    """A missing slot charges nothing and returns the others; a refused charge returns all slots."""
    one, two = on_a_cluster(store, 1), on_a_cluster(store, 2)
    other = slot("other", 1)
    scarce = Charge("client:scarce", SCARCE, SCARCE.cost_ns(1))
    assert two.admitted(1, other) == 1
    held = store.values.copy()
    one.ask(FIVE, other, charges=[scarce])
    one.wire.all_at_once()
    (refused,) = one.refused
    assert (refused.source, [quota.policy for quota in refused.violated]) == ("store", ["other"])
    assert not [key for key in store.values.keys() - held.keys() if ":bucket:" in key], "no bucket was charged"
    assert (total(one), total(one, other), one.in_flight["five"]) == (0, 1, 0)
    assert not one.slots.ended, "what was not admitted has no duration"
    for _ in range(5):
        one.ask(FIVE, charges=[scarce])
        one.wire.all_at_once()
    assert (len(one.open), one.refused[-1].key) == (3, "client:scarce")
    assert (total(one), one.in_flight["five"]) == (3, 3), "requests without tokens return their slots"


def test_on_a_cluster_a_request_that_ends_between_its_slot_and_its_charge_costs_nothing(store: LuaStore) -> None:
    worker = on_a_cluster(store, 1)
    exchange = worker.ask(FIVE)
    worker.wire.send()
    worker.end(exchange)
    worker.wire.all_at_once()
    assert (total(worker), worker.in_flight["five"], worker.open) == (0, 0, [])
    assert not [key for key in store.values if ":bucket:" in key]


@pytest.mark.parametrize(("policy", "admitted"), [("local_share", 2), ("deny", 0), ("allow", 5)])
def test_on_a_cluster_the_policy_decides_on_slots_whose_server_does_not_respond(
    store: LuaStore, policy: Any, admitted: int
) -> None:
    worker = on_a_cluster(store, 1, processes=2)
    worker.limiter.policy = policy
    for _ in range(9):
        worker.ask(FIVE)
        worker.wire.send()
        worker.wire.cut()  # the server of the slot does not respond
        worker.wire.all_at_once()  # that of the bucket does
    assert len(worker.open) == admitted
    assert {one.source for one in worker.refused} == {"memory" if policy == "allow" else policy}
    for exchange in [*worker.open]:
        worker.end(exchange)
    worker.beat()
    worker.wire.all_at_once()
    assert (total(worker), worker.slots.unconfirmed) == (0, {})


class Trial:
    """A worker that evaluates a candidate of FIVE on requests that were decided on already."""

    def __init__(self, worker: Worker, most: int) -> None:
        self.worker = worker
        self.recorder = Recorder(["r"], ["up"], ["FREE"], [50], 0.0)
        self.candidate_limits = CandidateLimits(
            limiter=worker.charging,
            clock_ns=lambda: worker.now_ns,
            recorder=self.recorder,
            candidates={"five": ConcurrencyQuota.of("five candidate", most, "five")},
            routes=(),
            slots=worker.slots,
        )

    def request(self, *, is_allowed: bool = True, finished: float = 0.0) -> Exchange:
        client = Client("acme", "client:acme", replace(PLENTY, name="FREE"), "default")
        exchange = Exchange("", "GET", "/api/x", "192.0.2.7", self.worker.now_ns / 1e9, client)
        exchange.charges = SlottedCharges([Charge("client:acme", PLENTY, PLENTY.cost_ns(1))], (FIVE,))
        exchange.decision, exchange.finished = Decision("", FIVE.quota, is_allowed, 0, 0, 0), finished
        self.candidate_limits.observe(exchange)
        return exchange

    @property
    def counted(self) -> tuple[int, int]:
        return self.recorder.would_refuse["FREE"], self.recorder.would_allow["FREE"]


@pytest.mark.parametrize("is_divided", [False, True], ids=["one server", "cluster"])
def test_a_candidate_has_slots_that_workers_share_and_that_return_to_zero(
    store: LuaStore,
    is_divided: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    one, two = (Trial(Worker(store, number, is_divided=is_divided), 3) for number in (1, 2))
    begun = [(trial, trial.request()) for trial in (one, two, one, two, one)]
    for trial in (one, two):
        trial.worker.wire.all_at_once()
    assert one.counted[0] + two.counted[0] == 2
    candidate = slot("five candidate", 3)._replace(key=f"candidate:{FIVE.key}")
    assert (total(one.worker, candidate), total(one.worker)) == (3, 0), "the slots in force are others"
    for trial, exchange in begun:
        trial.worker.end(exchange)
        trial.worker.wire.all_at_once()
    assert total(one.worker, candidate) == 0
    assert +(one.worker.in_flight + two.worker.in_flight) == {}


@pytest.mark.parametrize("is_divided", [False, True], ids=["one server", "cluster"])
def test_a_candidate_is_decided_on_also_if_the_request_has_ended_meanwhile(
    store: LuaStore,
    is_divided: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """A request that was refused has ended, and a short one may have: neither counts as refused by the candidate."""
    trial = Trial(Worker(store, 1, is_divided=is_divided), 3)
    for is_allowed in (True, False):
        exchange = trial.request(is_allowed=is_allowed)
        trial.worker.end(exchange)
        trial.worker.wire.all_at_once()
        assert not exchange.slots
    assert trial.counted == (0, 1)
    assert +trial.worker.in_flight == {}


def test_a_candidate_is_decided_on_while_the_store_is_unavailable(store: LuaStore) -> None:
    trial = Trial(Worker(store, 1, processes=1), 2)
    trial.worker.wire.is_up = False
    begun = [trial.request() for _ in range(3)]
    assert (trial.counted[0], trial.worker.in_flight["five candidate"]) == (1, 2)
    for exchange in begun:
        trial.worker.end(exchange)
    ended = trial.request(finished=trial.worker.now_ns / 1e9)
    assert (ended.candidate is not None, ended.slots) == (True, ()), "a request that has ended keeps no slots"
    assert trial.worker.in_flight["five candidate"] == 0


FAILURES = ("late", "lost", "outage", "empty")


class Walk:
    """Three workers that do anything in any order, with failures of these kinds."""

    def __init__(self, seed: int, failures: tuple[str, ...]) -> None:
        self.is_divided = seed % 2 == 1
        self.choose = random.Random(seed)
        self.store = LuaStore(NOW_US)
        self.failures = failures
        self.slots = [FIVE, slot("two", 2), slot("many", 9)]
        self.workers = [self.worker(number, with_quotas=number == 2) for number in range(3)]
        self.numbers = iter(range(100, 10_000))
        self.full: Counter[str] = Counter()

    def worker(self, number: int, *, with_quotas: bool = False) -> Worker:
        """Return a new worker. Every other walk is on a cluster: each slot and each bucket is asked for alone."""
        return Worker(self.store, number, processes=3, with_quotas=with_quotas, is_divided=self.is_divided)

    def step(self) -> None:
        """Do one thing."""
        choose, worker = self.choose, self.choose.choice(self.workers)
        what = choose.random()
        if what < 0.3:
            worker.ask(*choose.sample(self.slots, choose.choice((1, 2, 3))))
        elif what < 0.5 and worker.open:
            worker.end(choose.choice(worker.open))
        elif what < 0.95:
            self.pass_on(worker.wire)
        elif what < 0.97:
            self.beat()
        elif self.failures and choose.random() < 0.5:
            self.fail(worker)

    def pass_on(self, wire: Wires) -> None:
        """Send, execute or deliver one batch, whichever it may be."""
        what = self.choose.randrange(3)
        if what == 0 and len(wire.sent) + len(wire.executed) < 2:
            wire.send()
        elif what == 1 and wire.sent:
            wire.execute_one(self.choose.randrange(len(wire.sent)))
        elif what == 2 and wire.executed:
            wire.deliver_one(self.choose.randrange(len(wire.executed)))

    def beat(self) -> None:
        """Let time pass, and all workers renew; without failures replies have arrived long before."""
        self.store.now_us += int(RENEWAL_INTERVAL * SECOND)
        for worker in self.workers:
            if not self.failures:
                worker.wire.all_at_once()
            worker.beat()

    def fail(self, worker: Worker) -> None:
        """Let something go wrong."""
        how = self.choose.choice(self.failures)
        if how == "late":
            worker.wire.time_out()
        elif how == "lost":
            worker.wire.cut()
        elif how == "outage":
            worker.wire.is_up = not worker.wire.is_up
            worker.wire.time_out()
        elif how == "killed":
            self.workers[self.workers.index(worker)] = self.worker(next(self.numbers))
        else:
            self.store.values.clear()

    def check(self) -> None:
        """Fail if more requests are in flight than a limit allows; after a failure they may be."""
        for one in self.slots if not self.failures else ():
            counted = sum(worker.slots.in_flight(one.key) for worker in self.workers)
            assert counted <= one.quota.capacity
            self.full[one.quota.policy] += counted == one.quota.capacity

    def finish(self) -> None:
        """Let leases of killed workers and of late operations end; then end all requests, and expect nothing left."""
        for worker in self.workers:
            worker.wire.is_up = True
            worker.wire.all_at_once()
        for _ in range(int(LEASE / RENEWAL_INTERVAL) + 1):
            self.store.now_us += int(RENEWAL_INTERVAL * SECOND)
            for worker in self.workers:
                worker.beat()
                worker.wire.all_at_once()
        for one in self.slots:
            assert total(self.workers[0], one) == sum(worker.slots.in_flight(one.key) for worker in self.workers)
        for worker in self.workers:
            for exchange in [*worker.open]:
                worker.end(exchange)
            for _ in range(3):
                worker.beat()
                worker.wire.all_at_once()
            slots = worker.slots
            assert [len(one) for one in (slots.counters, slots.epochs, slots.unconfirmed, slots.unwritten)] == [0] * 4
            assert worker.asking == 0
            assert not any(worker.in_flight.values())


@pytest.mark.parametrize("failures", [(), FAILURES, (*FAILURES, "killed")], ids=["healthy", "failures", "kills"])
@each("seed", range(12))
def test_a_random_walk_never_exceeds_a_limit_and_returns_to_zero(seed: int, failures: tuple[str, ...]) -> None:
    walk = Walk(seed, failures)
    for _ in range(1500):
        walk.step()
        walk.check()
    walk.finish()
    assert [total(walk.workers[0], one) for one in walk.slots] == [0, 0, 0]
    if not failures:
        assert min(walk.full["two"], walk.full["five"]) > 0, walk.full
