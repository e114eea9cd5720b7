"""Refunds in any order, beside a queue of charges that is refilled from its front, on a virtual clock.

The queue is exact: a refund takes what is left of its charge out of the queue, wherever it stands. The bucket then
owes what it would owe if the rest alone had been charged.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api_gateway.models import NANOSECONDS, Charge, Decision, Quota
from tests.cases import each
from tests.lua_store import MICROSECOND
from tests.store.test_limiter_invariants import BACKENDS, START, Fleet, Make, both, patient

SECOND = NANOSECONDS
MILLISECOND = SECOND // 1000
TWENTY = Quota.per_second("TWENTY", 2, 20)  # fills in 10 s
TOKEN = TWENTY.emission_ns


class Queue:
    """What is left of each charge, in the order of the charges."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.at_ns = 0

    def refill(self, now_ns: int) -> None:
        gap_ns, self.at_ns = now_ns - self.at_ns, now_ns
        for number in self.left:
            taken_ns = min(gap_ns, self.left[number])
            self.left[number] -= taken_ns
            gap_ns -= taken_ns

    def owed(self, now_ns: int) -> int:
        self.refill(now_ns)
        return sum(self.left.values())

    def give_back(self, number: int, most_ns: int, now_ns: int) -> None:
        self.refill(now_ns)
        self.left[number] -= min(most_ns, self.left[number])


steps = st.lists(
    st.tuples(
        st.sampled_from(("charge", "charge", "refund", "refund")),
        st.sampled_from((1, MILLISECOND)) | st.integers(1, 3 * SECOND),  # since the step before
        st.sampled_from((1, 1, 2, 5)),
        st.sampled_from((1, 1, Fraction(1, 2))),  # how much of it is refunded
        st.integers(0, 10),  # which of the open charges, or which gateway
    ),
    min_size=3,
    max_size=40,
)
LATEST_FIRST: list[Any] = [
    (kind, 1, 5, 1, which) for kind, which in [("charge", 0)] * 2 + [("refund", 1), ("refund", 0)]
]


def refunds_of(charges: Sequence[Charge], share: Fraction | int = 1) -> list[Charge]:
    return [Charge(one.key, one.quota, -int(one.increment_ns * share)) for one in charges]


@both
@given(script=steps)
@example(script=LATEST_FIRST)
@settings(patient, max_examples=100)
def test_each_refund_is_of_its_own_charge_whatever_the_order(make: Make, script: list[Any]) -> None:
    """To the nanosecond. A request that is open for long gets all of it back that has not been refilled."""
    backend, queue, now_ns = make([TWENTY]), Queue(), START
    open_: list[tuple[int, list[Charge], Decision]] = []
    for number, (kind, gap_ns, cost, share, which) in enumerate(script):
        now_ns += -(-gap_ns // backend.tick_ns) * backend.tick_ns
        if kind == "charge":
            charges = [Charge("a", TWENTY, cost * TOKEN)]
            decision = backend.decide(charges, now_ns)
            if decision.allowed:
                queue.refill(now_ns)
                queue.left[number] = cost * TOKEN
                open_.append((number, charges, decision))
        elif open_:
            charged, charges, decision = open_.pop(which % len(open_))
            backend.settle(refunds_of(charges, share), decision, now_ns)
            queue.give_back(charged, int(charges[0].increment_ns * share), now_ns)
        assert backend.decide([Charge("a", TWENTY, 0)], now_ns).reset_ns == queue.owed(now_ns)


@pytest.mark.parametrize("make", BACKENDS.values(), ids=BACKENDS)
def test_a_long_request_is_refunded_whatever_shorter_ones_were_refunded_meanwhile(make: Make) -> None:
    """A thousand of them, of which thirty-two are noted one by one."""
    backend, now_ns = make([TWENTY]), START
    long = [Charge("a", TWENTY, 19 * TOKEN)]
    decision = backend.decide(long, now_ns)
    for _ in range(1000):
        now_ns += MICROSECOND
        short = [Charge("a", TWENTY, TOKEN // 2)]
        other = backend.decide(short, now_ns)
        assert other.allowed
        now_ns += MICROSECOND
        backend.settle(refunds_of(short), other, now_ns)
    backend.settle(refunds_of(long), decision, now_ns)
    assert backend.decide([Charge("a", TWENTY, 0)], now_ns).reset_ns == 0


# Several gateways


class Admitted(NamedTuple):
    """A charge that can be refunded."""

    gateway: int
    charge: Charge
    decision: Decision
    event: int  # its place among the events


class Shared:
    """Gateways on one store, with the events of an exact bucket that knows from the start what will be refunded."""

    def __init__(self, count: int) -> None:
        self.fleet = Fleet([0] * count, [TWENTY])
        for limiter in self.fleet.limiters:
            limiter.wire.is_slow = False
        self.events: list[list[int]] = []  # time, and nanoseconds without what was refunded
        self.open: list[Admitted] = []

    def ask(self, gateway: int, cost: int) -> bool:
        charge = Charge("client", TWENTY, cost * TOKEN)
        decision = self.fleet.limiters[gateway].decided([charge], self.fleet.clock_ns(gateway))
        self.fleet.publish()
        if decision.allowed and cost:
            self.open.append(Admitted(gateway, charge, decision, len(self.events)))
            self.events.append([self.fleet.passed_ns, charge.increment_ns])
        return decision.allowed

    def refund(self, which: int) -> None:
        one = self.open.pop(which % len(self.open))
        limiter = self.fleet.limiters[one.gateway]
        limiter.settle(refunds_of([one.charge]), one.decision, self.fleet.clock_ns(one.gateway))
        if not limiter.wire.is_up:
            limiter.wire.lose()
        self.fleet.publish()
        self.events[one.event][1] = 0

    def set_up(self, *, is_up: bool) -> None:
        if not is_up:  # all know what the bucket owes
            for gateway in range(len(self.fleet.limiters)):
                self.ask(gateway, 0)
        for limiter in self.fleet.limiters:
            limiter.wire.is_up = is_up
            limiter.wire.is_slow = not is_up
            limiter._on_subscription(is_up)
        self.fleet.pass_time(MICROSECOND)
        if is_up:
            for gateway in range(len(self.fleet.limiters)):
                self.ask(gateway, 0)

    def least_ns(self) -> int:
        """Return what a bucket owes that was charged for what was not refunded."""
        full_ns = 0
        for at_ns, cost_ns in self.events:
            full_ns = max(full_ns, at_ns) + cost_ns
        return max(full_ns - self.fleet.passed_ns, 0)

    def owed(self) -> int:
        return self.fleet.owed(Charge("client", TWENTY, 0))


@given(count=st.integers(1, 3), script=steps)
@example(count=2, script=LATEST_FIRST)
@settings(patient, max_examples=100)
def test_gateways_refund_what_they_charged_and_hear_of_the_others(count: int, script: list[Any]) -> None:
    """They agree with the exact bucket to the nanosecond. A gateway ignores the notification of its own refund."""
    shared, queue = Shared(count), Queue()
    for kind, gap_ns, cost, _, which in script:
        shared.fleet.pass_time(-(-gap_ns // MICROSECOND) * MICROSECOND)
        now_ns = shared.fleet.passed_ns
        queue.refill(now_ns)
        if kind == "charge":
            if shared.ask(which % count, cost):
                queue.left[shared.open[-1].event] = cost * TOKEN
        elif shared.open:
            one = shared.open[which % len(shared.open)]
            shared.refund(which)
            queue.give_back(one.event, one.charge.increment_ns, now_ns)
        assert shared.owed() == queue.owed(now_ns)


happenings = st.one_of(
    *[st.tuples(st.just("charge"), st.integers(0, 3), st.sampled_from((1, 1, 2, 5)))] * 3,
    *[st.tuples(st.just("refund"), st.integers(0, 9), st.just(0))] * 3,
    st.tuples(st.just("pass"), st.sampled_from((MILLISECOND, SECOND // 2, SECOND, 3 * SECOND)), st.just(0)),
    st.tuples(st.just("outage"), st.booleans(), st.just(0)),
)


@given(count=st.sampled_from((1, 2, 4)), script=st.lists(happenings, min_size=10, max_size=60))
@example(  # what the first outage admitted has been reported and refilled when it is refunded in the second
    count=2,
    script=[
        ("outage", False, 0),
        ("charge", 0, 5),
        ("outage", True, 0),
        ("pass", 3 * SECOND, 0),
        ("outage", False, 0),
        ("charge", 0, 5),
        ("refund", 0, 0),
    ],
)
@example(  # refilled when it is refunded, unlike what was charged after it
    count=1,
    script=[("outage", False, 0), ("charge", 0, 1), ("pass", SECOND // 2, 0), ("charge", 0, 5), ("refund", 0, 0)],
)
@settings(patient, max_examples=200)
def test_no_order_of_charges_refunds_and_outages_leaves_more_than_had_the_rest_alone_been_charged(
    count: int, script: list[tuple[str, int, int]]
) -> None:
    shared, is_up = Shared(count), True
    for kind, value, cost in script:
        shared.fleet.pass_time(MICROSECOND)
        if kind == "charge":
            shared.ask(value % count, cost)
        elif kind == "refund":
            if shared.open:
                shared.refund(value)
        elif kind == "pass":
            shared.fleet.pass_time(value)
        elif bool(value) != is_up:
            is_up = bool(value)
            shared.set_up(is_up=is_up)
        if is_up:
            assert shared.owed() >= shared.least_ns()
    if not is_up:
        shared.set_up(is_up=True)
    assert shared.owed() >= shared.least_ns()


@each("order", [(0, 0, 0), (2, 1, 0), (1, 1, 0)], ids=["first first", "last first", "mixed"])
def test_what_is_refunded_before_the_store_returns_is_never_reported(order: Sequence[int]) -> None:
    """In any order of the refunds: nothing is owed for requests that cost nothing."""
    shared = Shared(2)
    shared.set_up(is_up=False)
    assert [shared.ask(0, 2) for _ in range(4)] == [True] * 4
    for which in order:
        shared.fleet.pass_time(MILLISECOND)
        shared.refund(which)
    shared.set_up(is_up=True)
    assert shared.owed() == pytest.approx(2 * TOKEN, abs=10 * MILLISECOND)


def test_what_an_earlier_outage_admitted_makes_no_room_in_a_later_one() -> None:
    """It was reported, and has been refilled there: a refund would make room in the share for other requests."""
    shared = Shared(2)
    shared.set_up(is_up=False)
    assert shared.ask(0, 5)
    shared.set_up(is_up=True)
    shared.fleet.pass_time(3 * SECOND)
    shared.set_up(is_up=False)
    assert [shared.ask(0, 5) for _ in range(3)] == [True, True, False]  # its half of 20
    shared.refund(0)
    assert not shared.ask(0, 1)
    shared.refund(0)
    assert shared.ask(0, 5), "one of this outage does"


@pytest.mark.parametrize("is_sent", [False, True], ids=["not sent", "sent, and not replied to"])
def test_what_a_settlement_could_not_charge_is_charged_after_the_outage(is_sent: bool) -> None:  # noqa: FBT001
    """Once: also if the store has executed it."""
    shared = Shared(1)
    (limiter,) = shared.fleet.limiters
    shared.ask(0, 1)
    limiter.wire.is_slow = True
    one = shared.open[0]
    limiter.settle([Charge("client", TWENTY, 6 * TOKEN)], one.decision, shared.fleet.clock_ns(0))
    if is_sent:
        limiter.wire.execute()
    limiter.wire.lose()
    shared.set_up(is_up=True)
    assert shared.owed() == pytest.approx(7 * TOKEN, abs=10 * MILLISECOND)


def test_a_refund_that_was_not_sent_makes_no_later_one_smaller() -> None:
    shared = Shared(1)
    (limiter,) = shared.fleet.limiters
    shared.ask(0, 5)
    shared.fleet.pass_time(MILLISECOND)
    shared.ask(0, 5)
    limiter.wire.is_slow = True
    shared.refund(0)
    limiter.wire.lose()
    limiter.wire.is_slow = False
    shared.fleet.pass_time(3 * SECOND)  # the first is refilled, and a part of the second
    shared.refund(0)
    assert shared.owed() == 0
