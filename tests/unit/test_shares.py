"""Fair shares of a limited resource: one principal alone gets half at most, and everything is returned."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from api_gateway.models import Client, Quota
from api_gateway.resilience.fair_shares import (
    MAX_CONNECTIONS,
    MIN_CONNECTIONS,
    FairShares,
    ResourceState,
    default_connections,
    merge_states,
    principal_of,
)
from tests.cases import each

QUOTA = Quota.per_second("FREE", 1, 10)


def fill(shares: FairShares, principal: str | None) -> int:
    """Take as much as the principal may have; return how much that was."""
    taken = 0
    while shares.admits(principal):
        shares.acquire(principal)
        taken += 1
    return taken


@given(st.integers(1, 10_000))
def test_one_alone_gets_half_and_the_next_half_of_the_rest(total: int) -> None:
    shares = FairShares(total)
    assert fill(shares, "one") == (total + 1) // 2
    rest = total - shares.in_use
    assert fill(shares, "other") == (rest + 1) // 2


@given(st.integers(1, 200), st.integers(1, 12))
def test_holders_that_take_turns_end_up_with_equal_shares(total: int, count: int) -> None:
    """With n of them that is 1/(n + 1) of the total each, and as much is left for a newcomer."""
    shares = FairShares(total)
    names = [str(number) for number in range(count)]
    while any(shares.admits(name) for name in names):
        for name in names:
            if shares.admits(name):
                shares.acquire(name)
    held = [shares.held(name) for name in names]
    assert max(held) - min(held) <= 1
    assert max(held) <= -(-total // (min(count, total) + 1)) or count >= total
    assert shares.admits("newcomer") is (shares.in_use < total)


@given(st.integers(1, 500))
def test_slots_without_a_holder_count_towards_the_total_only(total: int) -> None:
    shares = FairShares(total)
    assert fill(shares, None) == total
    assert not shares.admits("somebody")


class Principals(RuleBasedStateMachine):
    """Any sequence of taking and giving back, beside a plain list of who holds what."""

    places = Bundle("places")

    def __init__(self) -> None:
        super().__init__()
        self.shares = FairShares(9)
        self.model: list[str | None] = []

    @rule(target=places, principal=st.sampled_from(["a", "b", "c", "d", None]))
    def take(self, principal: str | None) -> object:
        free = 9 - len(self.model)
        may = free > 0 if principal is None else self.model.count(principal) < free
        assert self.shares.admits(principal) is may
        if not may:
            assert not self.shares.try_acquire(principal)
            return "refused"
        if len(self.model) % 2:
            self.shares.acquire(principal)
        else:
            assert self.shares.try_acquire(principal)
        self.model.append(principal)
        return principal

    @precondition(lambda self: self.model)
    @rule(place=consumes(places))
    def give_back(self, place: str | None) -> None:
        if place != "refused":
            self.shares.release(place)
            self.model.remove(place)

    @invariant()
    def the_table_is_exact_and_bounded(self) -> None:
        assert self.shares.in_use == len(self.model) <= 9
        principals = {principal for principal in self.model if principal is not None}
        assert self.shares._held == {principal: self.model.count(principal) for principal in principals}


TestPrincipals = Principals.TestCase


@each(
    ("client", "address", "principal"),
    [
        (Client("acme", "client:acme", QUOTA, "configured"), "10.0.0.1", "client:acme"),
        (Client("acme", "client:acme", QUOTA, "registered"), "10.0.0.1", "client:acme"),
        (Client("acme", "client:acme", QUOTA, "granted"), "10.0.0.1", "client:acme"),
        (Client("invented", "client:invented", QUOTA, "default"), "10.0.0.1", "10.0.0.1"),
        (None, "10.0.0.1", "10.0.0.1"),
        (None, "::ffff:10.0.0.1", "10.0.0.1"),
        (None, "2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        (None, "2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        (None, "2001:db8:1:3::1", "2001:db8:1:3::/64"),
        (None, "unix", None),
        (None, "unknown", None),
        (Client("acme", "client:acme", QUOTA, "configured"), "unix", "client:acme"),
    ],
)
def test_a_registered_client_has_a_share_of_its_own_and_all_others_their_addresses(
    client: Client | None, address: str, principal: str | None
) -> None:
    """An invented id gets nobody another share, nor does another address of the same /64."""
    assert principal_of(client, address) == principal


@each(
    ("descriptors", "connections"),
    [(0, MIN_CONNECTIONS), (1024, 384), (20_256, 10_000), (1_048_576, MAX_CONNECTIONS)],
)
def test_the_default_leaves_each_connection_one_to_an_upstream(descriptors: int, connections: int) -> None:
    assert default_connections(descriptors) == connections


def test_a_refusal_says_what_was_exceeded() -> None:
    shares = FairShares(4)
    fill(shares, "one")
    assert shares.refusal("one", "connections") == (
        "2 of 4 connections are in use, 2 of them by you, and one client can use at most as many as are free"
    )
    fill(shares, None)
    assert shares.refusal("one", "connections") == "all 4 connections are in use"


def test_the_workers_states_add_up_and_a_resource_that_is_nearly_exhausted_is_a_warning() -> None:
    one, other = FairShares(10), FairShares(10)
    fill(one, None)
    for _ in range(5):
        other.acquire(None)
    other.refused = 3
    first, second = ResourceState.of("connections", [one]), ResourceState.of("connections", [other])
    assert (first.status, second.status) == ("warn", "pass")
    tunnels = ResourceState.of("tunnels", [FairShares(2), FairShares(3)], "up")
    merged = merge_states([first, tunnels, second])
    assert merged == [ResourceState("connections", None, 20, 15, 3, fullest=1.0), tunnels]
    assert (merged[0].used_ratio, merged[0].status) == (1.0, "warn"), "the first worker refuses"
    assert ResourceState("connections", None, 20, 16, 3).status == "warn"
    assert ResourceState("connections", None, 0, 0, 3).status == "pass"
