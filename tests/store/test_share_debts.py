"""What a client is admitted around an outage, beside one exact bucket that has seen all of it, on a virtual clock.

The script is the real text. "At its limit" is five times the rate, by all gateways in turn.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api_gateway.limits.share_debts import ShareDebts
from api_gateway.models import NANOSECONDS, Charge, Decision, Quota
from tests.lua_store import MICROSECOND
from tests.store.test_limiter_invariants import Fleet

SECOND = NANOSECONDS
MILLISECOND = SECOND // 1000
HOT = Quota.per_second("HOT", 20, 200)  # fills in 10 s
TWENTY = Quota.per_second("TWENTY", 2, 20)
STEP = 10 * MILLISECOND  # between two requests at five times the rate of HOT
BREAKER = 3  # calls without a reply before a gateway gives the store up


class Client:
    """One client of several gateways, beside one exact bucket that is charged for all that any of them admits."""

    def __init__(self, count: int, quota: Quota = HOT) -> None:
        self.fleet = Fleet([0] * count, [quota])
        for limiter in self.fleet.limiters:
            limiter.wire.is_slow = False
        self.quota = quota
        self.admitted: list[tuple[int, int]] = []  # when, and the cost in nanoseconds
        self.owed_ns = 0  # by the exact bucket, at `at_ns`
        self.at_ns = 0

    def exact_ns(self) -> int:
        self.owed_ns = max(self.owed_ns - (self.fleet.passed_ns - self.at_ns), 0)
        self.at_ns = self.fleet.passed_ns
        return self.owed_ns

    def ask(self, number: int, cost: float = 1, *, is_heard: bool = True) -> bool:
        """Send a request to a gateway; return whether it was admitted. Unless `is_heard` the reply is lost."""
        charge = Charge("client", self.quota, self.quota.cost_ns(cost))
        limiter, answers = self.fleet.limiters[number], list[Decision]()
        now_ns = self.fleet.clock_ns(number)
        decision = limiter.decide([charge], now_ns)
        if decision is None:
            limiter.wire.is_slow = not is_heard
            limiter.decide_async([charge], now_ns, answers.append)
            if not is_heard:
                limiter.wire.execute()
                limiter.wire.lose()
                limiter.wire.is_slow = False
            (decision,) = answers
        if decision.allowed:
            self.owed_ns = self.exact_ns() + charge.increment_ns
            self.admitted.append((self.fleet.passed_ns, charge.increment_ns))
        return decision.allowed

    def connect(self, number: int, *, is_up: bool) -> None:
        limiter = self.fleet.limiters[number]
        limiter.wire.is_up = is_up
        limiter._on_subscription(is_up)
        self.fleet.pass_time(MICROSECOND)  # what is asked at that instant itself would not be trusted

    def report(self) -> None:
        """Have all gateways with a store report, as with their heartbeats."""
        for number, limiter in enumerate(self.fleet.limiters):
            for charge in limiter.fallback.unreported(10):
                limiter.decide_async([charge], self.fleet.clock_ns(number), lambda _: None)

    def store_owes(self) -> int:
        return self.fleet.owed(Charge("client", self.quota, 0))

    def tokens(self) -> float:
        return sum(cost_ns for _, cost_ns in self.admitted) / self.quota.emission_ns

    def burst(self) -> float:
        """Return the largest burst: what a window held beyond its refill, at most, in tokens."""
        best = owed_ns = at_ns = 0
        for now_ns, cost_ns in self.admitted:
            owed_ns = max(owed_ns - (now_ns - at_ns), 0) + cost_ns
            best, at_ns = max(best, owed_ns), now_ns
        return best / self.quota.emission_ns


Schedule = Callable[[Client, float, int], bool]  # at that second, may this gateway use the store?


def at_its_limit(client: Client, seconds: float, is_up: Schedule, *, are_replies_lost: bool = False) -> int:
    """Send five times the rate to all gateways in turn, while they have the store as `is_up` says.

    Return the number of requests whose replies were lost.
    """
    count = len(client.fleet.limiters)
    has_store, lost, all_lost = [True] * count, [0] * count, 0
    for number in range(round(seconds * SECOND / STEP)):
        second = number * STEP / SECOND
        for gateway in range(count):
            reachable = is_up(client, second, gateway)
            if reachable and not has_store[gateway]:
                client.connect(gateway, is_up=True)
                has_store[gateway], lost[gateway] = True, 0
            elif not reachable and has_store[gateway] and (not are_replies_lost or lost[gateway] >= BREAKER):
                client.connect(gateway, is_up=False)
                has_store[gateway] = False
        gateway = number % count
        is_heard = is_up(client, second, gateway) or not has_store[gateway]
        client.ask(gateway, is_heard=is_heard)
        lost[gateway] += not is_heard
        all_lost += not is_heard
        client.fleet.pass_time(STEP)
    return all_lost


def down(*outages: tuple[float, float]) -> Schedule:
    """Return outages for all gateways at once, from and to these seconds."""
    return lambda _client, second, _gateway: not any(begin <= second < end for begin, end in outages)


def staggered(begin: float, end: float, apart: float) -> Schedule:
    """Return an outage that the gateways notice and leave `apart` seconds after each other."""
    return lambda _client, second, gateway: not begin + gateway * apart / 10 <= second < end + gateway * apart


def cut_off(gateways: Sequence[int], begin: float, end: float) -> Schedule:
    """Return an outage for some of the gateways."""
    return lambda _client, second, gateway: gateway not in gateways or not begin <= second < end


OUTAGES = {
    "10 s of 30": down((10, 20)),
    "shorter than the old debt lasts": down((10, 13)),
    "a tenth of a second": down((10, 10.1)),
    "longer than two budgets": down((4, 27)),
    "from the first second": down((0, 8)),
    "again and again, briefly": down(*[(second, second + 0.5) for second in range(2, 28)]),
    "again and again, longer": down((3, 9), (11, 19), (20, 26)),
    "left one after the other": staggered(10, 20, 0.3),
    "short, and left one after the other": staggered(10, 11, 0.3),
}


@pytest.mark.parametrize(
    ("count", "are_replies_lost"),
    [(1, False), (4, False), (4, True)],
    ids=["one gateway", "four gateways", "four gateways, replies lost after execution"],
)
@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
def test_a_client_at_its_limit_gets_no_more_by_an_outage(
    count: int,
    outage: Schedule,
    are_replies_lost: bool,  # noqa: FBT001 - a parameter
) -> None:
    """At most 2 % above C + r·d, and no less than 2 % below: the shares admit what one bucket would.

    It is not known whether the store has admitted a request whose reply was lost.
    """
    client = Client(count)
    unknown = at_its_limit(client, 30, outage, are_replies_lost=are_replies_lost)
    limit = HOT.capacity + HOT.rate * 30
    assert 0.98 * limit - unknown <= client.tokens() <= 1.02 * limit + unknown / 4


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("seconds", [0.5, 3, 10, 25])
def test_the_bucket_holds_what_one_bucket_would_that_has_seen_all(count: int, seconds: float) -> None:
    """To the nanosecond for each share, for a client at its limit; and no burst exceeds one bucket."""
    client = Client(count)
    at_its_limit(client, 12 + seconds, down((12, 99)))
    restore(client)
    apart_ns = client.store_owes() - client.exact_ns()
    old_readings_ns = count * 2 * HOT.emission_ns  # each gateway last asked for the bucket a few requests ago
    assert abs(apart_ns) <= old_readings_ns
    assert client.burst() <= HOT.capacity + old_readings_ns / HOT.emission_ns


@pytest.mark.parametrize("count", [2, 4])
def test_what_some_gateways_admitted_alone_is_owed_afterwards(count: int) -> None:
    """K of N cut off: K/N (C + r·d) in addition while it lasts, which the client then waits for."""
    client = Client(count)
    at_its_limit(client, 30, cut_off(range(count // 2), 10, 20))
    limit = HOT.capacity + HOT.rate * 30
    assert client.tokens() <= 1.02 * limit
    assert client.burst() <= HOT.capacity + (HOT.capacity + HOT.rate * 10) / 2


happenings = st.one_of(
    *[st.tuples(st.just("ask"), st.integers(0, 3), st.sampled_from((1, 1, 2, 5)))] * 4,
    st.tuples(
        st.just("pass"), st.sampled_from((0, MILLISECOND, SECOND // 2, SECOND, 3 * SECOND, 12 * SECOND)), st.just(0)
    ),
    st.tuples(st.just("outage"), st.booleans(), st.just(0)),
)


@given(count=st.sampled_from((1, 2, 4)), schedule=st.lists(happenings, min_size=10, max_size=60))
@settings(max_examples=100, deadline=None)
def test_the_store_never_owes_less_and_at_most_the_idle_shares_more(
    count: int, schedule: list[tuple[str, int, float]]
) -> None:
    """After any outages for all, by any use of the gateways, if all know the bucket when an outage begins.

    One bucket refills at the full rate, a share at 1/N of it: a client that used some shares only has the others'
    refill less, one capacity of a share for each that it used at most.
    """
    client, is_up, used = Client(count, TWENTY), True, set[int]()
    for kind, value, cost in schedule:
        if kind == "ask":
            if client.ask(value % count, cost) and not is_up:
                used.add(value % count)
        elif kind == "pass":
            client.fleet.pass_time(value)
        elif value and not is_up:
            restore(client)
            more_ns = client.store_owes() - client.exact_ns()
            assert 0 <= more_ns <= Fraction(len(used), count) * TWENTY.burst_ns + count
            client.owed_ns, used, is_up = client.store_owes(), set(), True
        elif not value and is_up:
            cut_all(client)
            is_up = False


def cut_all(client: Client) -> None:
    """Begin an outage of which every gateway knows what the bucket owes."""
    for number in range(len(client.fleet.limiters)):
        client.ask(number, 0)
    for number in range(len(client.fleet.limiters)):
        client.connect(number, is_up=False)


def restore(client: Client) -> None:
    """End an outage; every gateway reports."""
    for number in range(len(client.fleet.limiters)):
        client.connect(number, is_up=True)
    client.report()


def test_what_costs_more_than_a_share_is_owed_in_full() -> None:
    """A share admits it once from full, and all together more than a bucket; two capacities are owed at most."""
    client = Client(4, TWENTY)
    cut_all(client)
    assert [client.ask(number, 8) for number in range(4)] == [True] * 4
    restore(client)
    assert client.store_owes() == pytest.approx(32 * TWENTY.emission_ns, abs=MILLISECOND)
    cut_all(client)
    client.fleet.pass_time(40 * SECOND)
    assert [client.ask(number, 15) for number in range(4)] == [True] * 4
    restore(client)
    assert client.store_owes() == pytest.approx(40 * TWENTY.emission_ns, abs=MILLISECOND)


def test_a_client_that_used_nothing_of_its_share_owes_nothing_more() -> None:
    client = Client(4, TWENTY)
    client.ask(0, 12)
    cut_all(client)
    client.fleet.pass_time(2 * SECOND)
    assert not client.ask(0, 19)  # refused: its share has less
    client.fleet.pass_time(SECOND)
    restore(client)
    assert client.store_owes() == client.exact_ns()
    assert client.store_owes() == pytest.approx(3 * SECOND, abs=SECOND // 1000)  # 12 tokens are 6 s; 3 have passed


def test_a_share_begins_anew_from_the_store_after_an_outage() -> None:
    """An earlier share's debt is in the store's bucket already, and delays no later one."""
    client = Client(2, TWENTY)
    client.connect(0, is_up=False)
    assert [client.ask(0, 5) for _ in range(3)] == [True, True, False]  # its half of 20
    client.connect(0, is_up=True)
    client.ask(0, 0)
    assert client.store_owes() == pytest.approx(10 * TWENTY.emission_ns, abs=MILLISECOND)
    client.connect(0, is_up=False)
    assert [client.ask(0, 2) for _ in range(3)] == [True, True, False]  # its half of the 10 that are left


def test_a_refill_ends_what_gateways_admitted_without_the_store() -> None:
    """Those that the store reaches charge nothing of it, and begin their next share with a full bucket."""
    client = Client(2, TWENTY)
    client.ask(0, 10)
    for number in (0, 1):
        client.ask(number, 0)
        client.connect(number, is_up=False)
        assert client.ask(number, 5)
        client.connect(number, is_up=True)
    one, other = client.fleet.limiters
    coroutine = one.refill("client")
    with pytest.raises(StopIteration):
        coroutine.send(None)
    for _, message in client.fleet.store.told:
        other._on_refund(message)
    assert [limiter.fallback.has_debts for limiter in (one, other)] == [False, False]
    client.report()
    assert client.store_owes() == 0
    for number in (0, 1):
        client.connect(number, is_up=False)
        assert [client.ask(number, 5) for _ in range(3)] == [True, True, False], "its half of 20"


def test_a_report_whose_reply_is_lost_is_not_charged_twice() -> None:
    client = Client(2, TWENTY)
    client.connect(0, is_up=False)
    assert client.ask(0, 5)
    client.connect(0, is_up=True)
    client.ask(0, 0, is_heard=False)  # executed
    assert client.store_owes() == pytest.approx(5 * TWENTY.emission_ns, abs=MILLISECOND)
    client.ask(0, 0)
    assert client.store_owes() == pytest.approx(5 * TWENTY.emission_ns, abs=MILLISECOND)
    assert not client.fleet.limiters[0].fallback.has_debts


def test_a_request_whose_reply_was_lost_is_not_charged_again() -> None:
    """The store has executed it; what the share admits afterwards is charged, once."""
    client = Client(2, TWENTY)
    client.ask(0, 0)
    assert client.ask(0, 5, is_heard=False)
    client.connect(0, is_up=False)
    assert client.ask(0, 2)
    client.connect(0, is_up=True)
    client.ask(0, 0)
    assert client.store_owes() == pytest.approx(7 * TWENTY.emission_ns, abs=MILLISECOND)


def test_debts_follow_a_change_of_quota_and_of_the_number_of_gateways() -> None:
    """The filled fraction is kept, as that of a bucket is."""
    debts = ShareDebts(TWENTY.burst_ns, 10)
    debts.charge(Charge("a", TWENTY, 4 * SECOND), 0, 2, 100 * SECOND, is_held=False)
    slower = Quota.per_second("slower", 1, 20)
    assert debts.report(Charge("a", slower, 0), 2, 100 * SECOND) == 8 * SECOND
    debts.charge(Charge("b", TWENTY, 4 * SECOND), 0, 2, 100 * SECOND, is_held=False)
    assert debts.report(Charge("b", TWENTY, 0), 4, 100 * SECOND) == 4 * SECOND
    assert debts.report(Charge("b", TWENTY, 0), 4, 100 * SECOND) == 0


def test_repr() -> None:
    debts = ShareDebts(TWENTY.burst_ns, 10)
    debts.charge(Charge("a", TWENTY, SECOND), 0, 2, 100 * SECOND, is_held=False)
    assert repr(debts) == "<ShareDebts of 1 buckets>"
