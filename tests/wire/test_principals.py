"""Whose failures open a circuit breaker: those of several principals, or of one that is alone with the upstream."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.circuit_breaker import PROBE_HEAD_START, CircuitBreaker, Ticket
from api_gateway.models import Client, Outcome, Quota
from api_gateway.resilience.breaker_policy import BreakerPolicy, State
from api_gateway.resilience.fair_shares import principal_of
from api_gateway.resilience.principals import RecentPrincipals
from tests.cases import each
from tests.kit import RawClient, RawRequest, RawUpstream, RunningGateway, Wire, ask, eventually, in_front_of, reply

NOW = 1000.0
WINDOW = 10.0
FREE = Quota.per_second("FREE", 1, 10)
StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]


@each(
    ("source", "address", "principal"),
    [
        ("registered", "192.0.2.1", "client:c"),
        ("granted", "192.0.2.1", "client:c"),
        ("configured", "192.0.2.1", "client:c"),
        ("default", "192.0.2.1", "192.0.2.1"),
        ("address", "192.0.2.1", "192.0.2.1"),
        ("default", "::ffff:192.0.2.1", "192.0.2.1"),
        ("default", "2001:db8::1", "2001:db8::/64"),
        ("default", "2001:db8::ffff:1", "2001:db8::/64"),
    ],
)
def test_a_principal_is_a_registered_client_or_an_address(source: Any, address: str, principal: str) -> None:
    assert principal_of(Client("c", "client:c", FREE, source), address) == principal


# The rule, against a model that keeps everything


@dataclass(frozen=True)
class Call:
    """A call of a principal (None: a failure that no client can have caused), so many seconds after the one before."""

    pause: float
    principal: str | None
    is_failure: bool


calls = st.lists(
    st.builds(
        Call,
        st.sampled_from([0.25, 1.0, 4.0, 11.0]),
        st.sampled_from(["a", "b", "c", None]),
        st.booleans(),
    ).filter(lambda call: call.principal is not None or call.is_failure),
    max_size=40,
)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from("abc")), max_size=30))
def test_callers_know_exactly_when_another_than_the_last_one_called(found: list[tuple[float, str]]) -> None:
    callers, now, log = RecentPrincipals(), NOW, list[tuple[str, float]]()
    for pause, principal in found:
        now += pause
        callers.note(principal, now)
        log.append((principal, now))
        others = [at for other, at in log if other != principal]
        for moment in (now - 5, now - 1, now):
            assert callers.has_several_since(moment) == any(at >= moment for at in others)


@given(calls)
def test_the_streak_opens_it_if_several_failed_or_one_is_alone_and_in_no_other_case(found: list[Call]) -> None:
    """With a threshold of 3 and no rule on shares; until it opens for the first time."""
    policy = BreakerPolicy(failure_threshold=3, minimum_calls=1_000_000, window=WINDOW)
    breaker, now = CircuitBreaker(policy, NOW), NOW
    log: list[tuple[float, Call]] = []
    for call in found:
        now += call.pause
        ticket = breaker.admit(now)
        assert ticket is not None
        outcome = Outcome.FAILURE if call.is_failure else Outcome.SUCCESS
        breaker.settle(ticket, outcome, now, principal=call.principal)
        log.append((now, call))
        streak = []
        for _, one in reversed(log):
            if not one.is_failure:
                break
            streak.append(one.principal)
        recent = {one.principal for at, one in log if at >= now - WINDOW} - {None}
        current = next((one.principal for _, one in reversed(log) if one.principal is not None), None)
        is_alone = recent <= {current}
        is_shared = None in streak or len(set(streak)) > 1
        must_open = call.is_failure and len(streak) >= 3 and (is_shared or is_alone)
        assert (breaker.state is State.OPEN) == must_open
        if must_open:
            return


@given(
    st.lists(st.tuples(st.floats(0.1, 3), st.sampled_from("ab"), st.booleans()), max_size=30),
    st.floats(0.1, 3),
)
def test_an_upstream_that_only_fails_opens_it_within_the_window_and_the_threshold_of_one_clients_calls(
    before: list[tuple[float, str, bool]], pause: float
) -> None:
    """Whoever used it before: the bound for the one client that still does is `window` and the calls it takes."""
    policy = BreakerPolicy(failure_threshold=3, minimum_calls=1_000_000, window=WINDOW)
    breaker, now = CircuitBreaker(policy, NOW), NOW

    def call(principal: str, outcome: Outcome) -> None:
        ticket = breaker.admit(now)
        if ticket is not None:
            breaker.settle(ticket, outcome, now, principal=principal)

    for gap, principal, is_failure in before:
        now += gap
        call(principal, Outcome.FAILURE if is_failure else Outcome.SUCCESS)
    broken_at = now
    while breaker.state is not State.OPEN:
        assert now - broken_at <= WINDOW + 3 * pause + pause
        now += pause
        call("a", Outcome.FAILURE)


def breaker_with(**policy: Any) -> CircuitBreaker:
    return CircuitBreaker(
        BreakerPolicy(**{"failure_threshold": 3, "minimum_calls": 4, "window": WINDOW, **policy}), NOW
    )


def settle(breaker: CircuitBreaker, outcome: Outcome, principal: str | None, now: float, *, took: float = 0.0) -> None:
    ticket = breaker.admit(now)
    assert ticket is not None
    breaker.settle(ticket, outcome, now, principal=principal, duration=took)


FAILURE, SUCCESS = Outcome.FAILURE, Outcome.SUCCESS


@pytest.mark.parametrize("size", [None, 8])
def test_a_share_of_failures_opens_it_only_if_several_failed_where_several_call(size: int | None) -> None:
    breaker = breaker_with(failure_threshold=1000, window_calls=size)
    settle(breaker, SUCCESS, "b", NOW)
    for second in range(1, 6):
        settle(breaker, FAILURE, "a", NOW + second)
    assert str(breaker.state) == "CLOSED"
    assert breaker.has_one_failing_principal(NOW + 5)
    settle(breaker, FAILURE, "b", NOW + 6)
    assert str(breaker.state) == "OPEN"


def test_a_share_of_failures_of_a_client_that_is_alone_opens_it() -> None:
    breaker = breaker_with(failure_threshold=1000)
    settle(breaker, SUCCESS, "b", NOW)
    for second in (11, 12, 13):
        settle(breaker, FAILURE, "a", NOW + second)
    assert str(breaker.state) == "CLOSED", "too few calls"
    settle(breaker, FAILURE, "a", NOW + 14)
    assert str(breaker.state) == "OPEN"


def test_slow_calls_of_one_client_do_not_open_it_for_others() -> None:
    breaker = breaker_with(slow_call_duration=1, slow_call_rate=0.5)
    settle(breaker, SUCCESS, "b", NOW)
    for second in range(1, 6):
        settle(breaker, SUCCESS, "a", NOW + second, took=2)
    assert str(breaker.state) == "CLOSED"
    settle(breaker, SUCCESS, "b", NOW + 6, took=2)
    assert str(breaker.state) == "OPEN"


def test_a_failure_that_no_client_can_have_caused_counts_whoever_calls() -> None:
    """As one to connect: the one client that still calls need not wait for the window to pass."""
    breaker = breaker_with(minimum_calls=1000)
    settle(breaker, SUCCESS, "b", NOW)
    settle(breaker, SUCCESS, "a", NOW)
    states = []
    for _ in range(3):
        settle(breaker, FAILURE, None, NOW + 1)
        states.append(str(breaker.state))
    assert states == ["CLOSED", "CLOSED", "OPEN"]


def test_ignored_calls_show_that_the_upstream_is_used() -> None:
    breaker = breaker_with()
    settle(breaker, Outcome.IGNORED, "b", NOW)
    for _ in range(5):
        settle(breaker, FAILURE, "a", NOW + 1)
    assert str(breaker.state) == "CLOSED"


def test_without_principals_every_call_is_one_clients() -> None:
    """As those to the store of the limits are."""
    breaker = breaker_with()
    for _ in range(3):
        ticket = breaker.admit(NOW)
        assert ticket is not None
        breaker.settle(ticket, FAILURE, NOW)
    assert str(breaker.state) == "OPEN"


# Probes


def probed_by_a(probes: int = 1) -> tuple[CircuitBreaker, Ticket]:
    """Return a breaker that was opened at NOW, and the ticket of the probe that "a" has at NOW + 30."""
    policy = BreakerPolicy(failure_threshold=1, recovery_timeout=30, half_open_max_calls=probes)
    breaker = CircuitBreaker(policy, NOW)
    settle(breaker, Outcome.FAILURE, "a", NOW)
    ticket = breaker.admit(NOW + 30, principal="a")
    assert ticket is not None
    return breaker, ticket


def failed_by(breaker: CircuitBreaker, ticket: Ticket, principal: str | None) -> float:
    """Let a probe fail; return when the next one is due."""
    breaker.settle(ticket, Outcome.FAILURE, NOW + 30, principal=principal)
    due = breaker.next_probe_at()
    assert due is not None
    return due


def test_after_a_failed_probe_its_client_leaves_the_next_one_to_others_for_a_moment() -> None:
    breaker, ticket = probed_by_a()
    due = failed_by(breaker, ticket, "a")
    assert breaker.admit(due - 20, principal="b") is None
    assert breaker.admit(due, principal="a") is None
    assert breaker.admit(due + PROBE_HEAD_START - 0.1, principal="a") is None
    assert breaker.admit(due + PROBE_HEAD_START, principal="a") is not None


def test_a_client_whose_probe_failed_is_not_before_another_that_has_asked() -> None:
    breaker, ticket = probed_by_a()
    due = failed_by(breaker, ticket, "a")
    assert breaker.admit(due - 20, principal="b") is None
    assert breaker.admit(due, principal="a") is None
    assert breaker.admit(due, principal="b") is not None


def test_after_an_ignored_probe_its_client_leaves_the_next_one_to_others_too() -> None:
    breaker, ticket = probed_by_a()
    assert breaker.admit(NOW + 31, principal="b") is None
    breaker.settle(ticket, Outcome.IGNORED, NOW + 32, principal="a")
    assert breaker.admit(NOW + 32, principal="a") is None
    assert breaker.admit(NOW + 32, principal="b") is not None


def test_after_a_lost_probe_its_client_leaves_the_next_one_to_others_too() -> None:
    breaker, _ = probed_by_a()
    assert breaker.admit(NOW + 31, principal="b") is None
    assert breaker.admit(NOW + 60, principal="a") is None
    assert breaker.admit(NOW + 60, principal="b") is not None


def test_a_client_that_is_alone_makes_every_probe() -> None:
    breaker, ticket = probed_by_a()
    assert breaker.admit(failed_by(breaker, ticket, "a"), principal="a") is not None


@pytest.mark.parametrize("principal", ["a", None], ids=["a success", "a failure that no client can have caused"])
def test_a_probe_that_does_not_speak_against_its_client_may_be_followed_by_another_of_it(
    principal: str | None,
) -> None:
    breaker, ticket = probed_by_a(probes=2)
    other = breaker.admit(NOW + 31, principal="b")
    assert other is not None
    if principal is None:
        due = failed_by(breaker, ticket, None)
    else:
        due = NOW + 32
        breaker.settle(other, Outcome.IGNORED, due, principal="b")
        breaker.settle(ticket, Outcome.SUCCESS, due, principal="a")
    assert breaker.admit(due, principal="a") is not None


# On the wire

WAYS = {"fast path": (), "general parser": ("X-Odd:  two blanks",)}
both_ways = pytest.mark.parametrize("way", WAYS)


def fails_on_request(wire: Wire, request: RawRequest) -> bool | None:
    fails = b"/bad" in request.line
    return reply(b"x", b"500 Oops" if fails else b"200 OK")(wire, request)


def sections(*urls: str, **options: Any) -> dict[str, Any]:
    breaker = {"failure_threshold": 3, "minimum_calls": 1000, "jitter": 0, "recovery_timeout": 60}
    found = in_front_of(*urls, **{"circuit_breaker": breaker, **options})
    known = {name: {"tier": "FREE"} for name in ("acme", "umbrella")}
    return found | {"clients": known, "server": {"trusted_proxies": ["127.0.0.1"]}}


def send(running: RunningGateway, way: str, path: str, *, name: str = "", address: str = "") -> int:
    headers = [f"X-Client-ID: {name}"] if name else []
    headers += [f"X-Forwarded-For: {address}"] if address else []
    with RawClient(running.port) as client:
        return client.get(path, (*headers, *WAYS[way])).status


def state(running: RunningGateway) -> str:
    return str(running.live.upstreams["up"].breaker.state)


@both_ways
@pytest.mark.parametrize(
    ("attacker", "other"),
    [
        ({"name": "acme"}, {"name": "umbrella"}),
        ({"address": "192.0.2.1"}, {"name": "umbrella"}),
        ({"address": "192.0.2.1"}, {"address": "192.0.2.2"}),
        ({"address": "192.0.2.1", "name": "{}"}, {"address": "192.0.2.2"}),
        ({"address": "2001:db8::{}"}, {"address": "2001:db8:0:1::1"}),
        ({"address": "192.0.2.1", "name": "acme"}, {"address": "192.0.2.1", "name": "umbrella"}),
    ],
    ids=["clients", "address, client", "addresses", "invented names", "one /64", "clients behind one address"],
)
def test_one_client_that_provokes_errors_opens_no_breaker_that_others_use(
    gateway: StartGateway, upstream: StartUpstream, way: str, attacker: dict[str, str], other: dict[str, str]
) -> None:
    running = gateway(sections(upstream(fails_on_request).url))
    assert send(running, way, "/api/good", **other) == 200
    for number in range(1, 8):
        one = {key: value.format(number) for key, value in attacker.items()}
        assert send(running, way, "/api/bad", **one) == 500
    assert state(running) == "CLOSED"
    shown = ask(f"{running.url}/circuit-breakers").json()["circuit_breakers"]["up"]
    assert (shown["consecutive_failures"], shown["failures_of_one_client"]) == (7, True)
    assert send(running, way, "/api/bad", **other) == 500, "it fails for another one too"
    assert state(running) == "OPEN"
    shown = ask(f"{running.url}/circuit-breakers").json()["circuit_breakers"]["up"]
    assert shown["failures_of_one_client"] is False


@both_ways
def test_one_client_whose_probes_fail_does_not_keep_a_breaker_open_that_others_wait_for(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    """However often it asks, and however soon."""
    policy = {"failure_threshold": 2, "jitter": 0, "recovery_timeout": 0.2, "max_recovery_timeout": 0.2, "ramp": 0}
    running = gateway(sections(upstream(fails_on_request).url, circuit_breaker=policy))
    for address in ("192.0.2.1", "192.0.2.2"):
        assert send(running, way, "/api/bad", address=address) == 500
    assert state(running) == "OPEN"
    eventually(lambda: send(running, way, "/api/bad", address="192.0.2.1") == 500, "its probe fails")
    answers: list[tuple[int, int]] = []

    def is_served() -> bool:
        answers.append((send(running, way, "/api/bad", address="192.0.2.1"), send(running, way, "/api/good")))
        return answers[-1][1] == 200

    eventually(is_served, "the other one is served")
    assert {attacker for attacker, _ in answers[1:]} <= {503}


@both_ways
def test_one_client_alone_opens_it_whatever_it_calls_itself(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    running = gateway(sections(upstream(fails_on_request).url))
    assert [send(running, way, "/api/bad", name=f"invented-{number}") for number in range(4)] == [500, 500, 500, 503]


@both_ways
def test_a_target_that_refuses_connections_opens_it_for_one_of_two_clients(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    """No client can have caused that, so nobody waits for the other's use to be forgotten."""
    up = upstream(reply(headers=((b"Connection", b"close"),)))
    running = gateway(sections(up.url, retry={"attempts": 1}))
    assert send(running, way, "/api/x", name="umbrella") == 200
    assert send(running, way, "/api/x", name="acme") == 200
    up.close()
    assert [send(running, way, "/api/x", name="acme") for _ in range(4)] == [502, 502, 502, 503]


@both_ways
def test_one_client_ejects_no_target_that_others_use(gateway: StartGateway, upstream: StartUpstream, way: str) -> None:
    ups = [upstream(fails_on_request), upstream(fails_on_request)]
    running = gateway(sections(*(up.url for up in ups), retry={"attempts": 1}))
    assert [send(running, way, "/api/good", name="umbrella") for _ in range(2)] == [200, 200]
    assert [send(running, way, "/api/bad", name="acme") for _ in range(12)] == [500] * 12
    targets = running.live.upstreams["up"].targets
    assert [str(target.breaker.state) for target in targets] == ["CLOSED", "CLOSED"]
    assert [send(running, way, "/api/bad", name="umbrella") for _ in range(2)] == [500, 500]
    eventually(lambda: any(target.ejections_total for target in targets), "one is ejected")
