"""Requests whose replies are late or lost: what two gateways admit beside the store's script, on a virtual clock.

The requests are charged to two limits, so the store may refuse one that the local share admits. The first gateway's
replies are late or lost, or its requests do not arrive; the second one uses the store.
"""

import random
from collections.abc import Callable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from api_gateway.limits.quota_state import MICROSECONDS, PeriodQuota
from api_gateway.models import NANOSECONDS, Charge, Decision, Quota
from tests.cases import each
from tests.lua_store import LuaStore, Wire
from tests.store.test_quota_script import NOW, Machine, quota

SMALL = Quota.per_second("SMALL", 1, 10)
TEAM = Quota.per_second("TEAM", 0.01, 1000)
MONTH = quota(1000, "month")
HUGE = quota(1_000_000, "month")
BRISK = Quota.per_second("BRISK", 4, 40)

REPLIES: dict[str, Callable[[Wire], None]] = {
    "heard": Wire.respond,
    "late": Wire.deliver_late,
    "lost after execution": Wire.lose_replies,
    "lost before execution": Wire.drop,
}
MISSED = [reply for reply in REPLIES if reply != "heard"]


class Pair:
    """Two gateways with one store: `REPLIES` says what becomes of the replies to the first one."""

    def __init__(self, *quotas: Quota) -> None:
        self.store = LuaStore(NOW)
        self.quotas = quotas
        self.first, self.other = (Machine(self.store, quotas, processes=2) for _ in range(2))
        self.admitted: list[tuple[int, float]] = []  # microseconds and tokens of the second limit

    def ask(self, machine: Machine, costs: Sequence[float], reply: str = "heard") -> Decision:
        """Make a request that costs so many tokens of each limit."""
        charges = [
            Charge(f"{one.name}:a", one, one.cost_ns(cost)) for one, cost in zip(self.quotas, costs, strict=True)
        ]
        wire, heard = machine.buckets.wire, list[Decision]()
        decision = machine.limiter.decide(charges, machine.now_ns)
        if decision is None:
            wire.is_slow = True
            machine.limiter.decide_async(charges, machine.now_ns, heard.append)
            REPLIES[reply](wire)
            wire.is_slow = False
            (decision,) = heard
        if decision.allowed:
            self.admitted.append((self.store.now_us, costs[-1]))
        return decision

    def tokens(self) -> float:
        return sum(tokens for _, tokens in self.admitted)

    def burst(self, rate: float) -> float:
        """Return what a window holds beyond its refill at `rate`, at most, in tokens."""
        most = owed = at_us = 0.0
        for now_us, tokens in self.admitted:
            owed = max(owed - rate * (now_us - at_us) / MICROSECONDS, 0) + tokens
            most, at_us = max(most, owed), now_us
        return most

    def used(self) -> float:
        """Return the tokens of the second limit that the store holds as used, without a refill."""
        limit = self.quotas[-1]
        key = f"{limit.name}:a"
        if isinstance(limit, PeriodQuota):
            found = self.store._get(self.first.limiter.counter_key(key))
            return 0 if found is None else int(found.split()[3]) / 1000
        found = self.store._get(self.first.buckets.store_key(key))
        return 0 if found is None else (int(found.split()[0]) - self.first.now_ns) / limit.emission_ns


@each("limit", [MONTH, TEAM], ids=["quota", "bucket"])
@each("reply", MISSED)
def test_what_the_store_refuses_for_another_limit_stays_within_the_bound_when_its_reply_is_late_or_lost(
    limit: Quota, reply: str
) -> None:
    """Q + K/N·Q, and for a bucket C + r·d + K/N (C + r·d), however often it happens."""
    pair, rounds = Pair(SMALL, limit), 60
    for _ in range(rounds):
        pair.store.now_us += 10 * MICROSECONDS
        pair.ask(pair.first, (1, 1))
        while pair.ask(pair.other, (1, 1)).allowed:
            pass
        for _ in range(3):
            pair.ask(pair.first, (1, 50), reply)
        pair.ask(pair.first, (0, 0))
    refill = 0 if limit is MONTH else limit.rate * 10 * rounds
    assert pair.tokens() <= 1.5 * (limit.capacity + refill)
    if reply == "late":
        assert pair.tokens() <= limit.capacity + refill + 1, "it is charged afterwards"


@each("limits", [(SMALL, MONTH), (SMALL, TEAM), (HUGE, TEAM)], ids=["quota", "bucket", "bucket beside a quota"])
@each("reply", MISSED)
def test_reports_of_outages_that_are_late_or_lost_stay_within_the_bound(
    limits: tuple[Quota, Quota], reply: str
) -> None:
    """A share that has no tokens left gets none by another request to the store, whose reply has not its report."""
    pair, limit, rounds = Pair(*limits), limits[-1], 30
    wire = pair.first.buckets.wire
    for _ in range(rounds):
        pair.store.now_us += 10 * MICROSECONDS
        wire.is_up = False
        for _ in range(12):
            pair.ask(pair.first, (0, 50))
        wire.is_up = True
        pair.ask(pair.first, (0, 0), reply)
        pair.store.now_us += 1
        pair.ask(pair.first, (0, 0))
    refill = 0 if limit is MONTH else limit.rate * 10 * rounds
    assert 0.4 * limit.capacity <= pair.tokens() <= 1.5 * (limit.capacity + refill)


@each("limit", [MONTH, TEAM], ids=["quota", "bucket"])
@each("is_refused", [False, True])
def test_a_late_reply_tells_whether_the_store_is_still_to_be_charged(limit: Quota, is_refused: bool) -> None:  # noqa: FBT001
    """To the token: what the store charged is not charged again, what it refused is charged with the next request."""
    pair = Pair(SMALL, limit)
    assert pair.ask(pair.first, (1, 1)).allowed
    if is_refused:
        assert pair.ask(pair.other, (8.5, 20)).allowed
    late = pair.ask(pair.first, (1, 50), "late")
    assert (late.allowed, late.source) == (True, "local_share")
    pair.store.now_us += 1
    before = pair.tokens() - (50 if is_refused else 0)
    assert abs(pair.used() - before) < 0.001
    pair.ask(pair.first, (0, 0))
    assert abs(pair.used() - pair.tokens()) < 0.001
    pair.store.now_us += 1
    pair.ask(pair.first, (0, 0))
    assert abs(pair.used() - pair.tokens()) < 0.001
    assert pair.first.limiter.owed == {}
    assert not pair.first.buckets.fallback.has_debts


@each("reply", MISSED)
def test_the_late_or_lost_reply_to_a_request_that_the_share_refused_too_changes_no_later_charge(reply: str) -> None:
    pair = Pair(SMALL, MONTH)
    assert pair.ask(pair.first, (1, 900)).allowed
    assert not pair.ask(pair.first, (1, 60), reply).allowed
    charged = 960 if reply != "lost before execution" else 900
    assert pair.used() == charged
    pair.ask(pair.first, (0, 0))
    assert pair.used() == charged
    assert pair.first.limiter.owed == {}


def test_what_no_reply_tells_of_counts_against_the_share_until_the_period_ends() -> None:
    """It is not charged again, as the store may have charged it."""
    pair = Pair(SMALL, MONTH)
    pair.ask(pair.first, (1, 1))
    assert pair.ask(pair.first, (1, 300), "lost after execution").allowed
    pair.ask(pair.first, (0, 0))
    assert pair.used() == 301
    pair.first.buckets.wire.is_up = False
    assert not pair.ask(pair.first, (1, 50)).allowed, "half of 699, less 300"
    assert pair.ask(pair.first, (1, 49)).allowed
    pair.first.buckets.wire.is_up = True
    for _ in range(3):
        pair.ask(pair.first, (0, 0))
        assert pair.used() == 350, "the outage is reported, once"
    pair.store.now_us += 86_400 * MICROSECONDS
    pair.first.buckets.wire.is_up = False
    assert pair.ask(pair.first, (1, 400)).allowed


def test_a_settlement_that_the_store_does_not_get_is_charged_afterwards() -> None:
    """As a bucket's; one that it may have got is not charged again."""
    pair = Pair(SMALL, MONTH)
    machine, wire = pair.first, pair.first.buckets.wire
    for expected, lose in ((50, Wire.lose), (100, Wire.lose_replies)):
        decision = pair.ask(machine, (1, 10))
        wire.is_slow = True
        changes = [Charge("SMALL:a", SMALL, 0), Charge("month:a", MONTH, MONTH.cost_ns(40))]
        machine.limiter.settle(changes, decision, machine.now_ns)
        lose(wire)
        wire.is_slow = False
        pair.ask(machine, (0, 0))
        assert pair.used() == expected


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_no_order_of_replies_exceeds_the_bound(seed: int) -> None:
    """One of two gateways has them: C + r·d + (C + r·d)/2 in any window of a bucket, Q + Q/2 of a quota."""
    source = random.Random(seed)
    month = quota(40, "month")
    for limit in (BRISK, month):
        pair = Pair(SMALL, limit)
        for _ in range(60):
            pair.store.now_us += source.choice((1, 1000, MICROSECONDS, 5 * MICROSECONDS))
            for _ in range(source.randrange(12)):
                pair.ask(pair.other, (1, source.choice((0, 1, 1))))
            for _ in range(source.randrange(6)):
                reply = source.choice([*REPLIES])
                pair.ask(pair.first, (source.choice((0, 0.5, 1)), source.choice((0, 1, 5))), reply)
        rate = BRISK.rate if limit is BRISK else 0
        assert pair.burst(1.5 * rate) <= 1.5 * 40 + 1e-6 * NANOSECONDS / BRISK.emission_ns
