"""The values that every layer shares: quotas in nanoseconds, decisions, exchanges, and bodies."""

from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from api_gateway.admin.client_schema import TierChange
from api_gateway.models import NANOSECONDS, Body, Client, Decision, Exchange, Problem, Quota
from tests.cases import each

FREE = Quota.per_second("FREE", 1, 10)


@each(
    ("rate", "capacity", "emission_ns", "burst_ns"),
    [
        (1, 10, 1_000_000_000, 10_000_000_000),
        (3, 3, 333_333_334, 1_000_000_002),
        (0.1, 2, 10_000_000_000, 20_000_000_000),
        (1_000_000, 1, 1000, 1000),
    ],
)
def test_a_quota_has_its_times_in_nanoseconds(rate: float, capacity: int, emission_ns: int, burst_ns: int) -> None:
    quota = Quota.per_second("T", rate, capacity)
    assert (quota.emission_ns, quota.burst_ns) == (emission_ns, burst_ns)
    assert (quota.name, quota.rate, quota.capacity) == ("T", rate, capacity)


@given(st.floats(0.001, 1_000_000), st.integers(1, 10_000))
def test_rounding_makes_a_quota_stricter_by_less_than_a_nanosecond_a_token(rate: float, capacity: int) -> None:
    quota = Quota.per_second("T", rate, capacity)
    assert 0 <= quota.emission_ns - NANOSECONDS / Fraction(str(rate)) < 1
    assert quota.burst_ns == capacity * quota.emission_ns


@each(("rate", "capacity"), [(0, 1), (-1, 1), (float("nan"), 1), (1, 0), (1, -1)])
def test_a_quota_of_nothing_is_refused(rate: float, capacity: int) -> None:
    with pytest.raises(ValueError, match=f"quota 'T': .*{rate!r} and {capacity!r}"):
        Quota.per_second("T", rate, capacity)


@each(("cost", "nanoseconds"), [(0, 0), (1, 10**9), (2.5, 25 * 10**8), (0.1, 10**8), (1e-10, 1), (10, 10**10)])
def test_a_cost_is_exact_and_rounded_to_the_stricter_side(cost: float, nanoseconds: int) -> None:
    assert FREE.cost_ns(cost) == nanoseconds


def test_the_whole_capacity_costs_the_whole_budget() -> None:
    quota = Quota.per_second("T", 3, 7)
    assert quota.cost_ns(7) == quota.burst_ns


def test_a_quota_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        FREE.rate = 2  # type: ignore[misc]  # that it is refused is the test


@each(("wait_ns", "seconds"), [(0, None), (-1, None), (1_500_000_000, 1.5), (1, 1e-9)])
def test_a_decision_has_the_wait_in_seconds_where_waiting_helps(wait_ns: int, seconds: float | None) -> None:
    assert Decision("k", FREE, wait_ns == 0, 0, wait_ns, 0).retry_after == seconds


@each(
    ("source", "expected"),
    [("granted", True), ("registered", True), ("configured", True), ("default", False), ("address", False)],
)
def test_a_client_is_registered_if_an_operator_or_the_configuration_names_it(source: str, expected: bool) -> None:  # noqa: FBT001 - parametrised
    assert Client("a", "client:a", FREE, source).is_registered is expected  # type: ignore[arg-type]  # of the list above


def test_an_exchange_knows_how_long_it_and_its_upstream_took() -> None:
    exchange = Exchange("id", "GET", "/", "192.0.2.7", started=100.0)
    exchange.sent_at, exchange.head_at, exchange.finished = 100.5, 101.25, 102.0
    assert exchange.duration == 2.0
    assert exchange.upstream_duration == 0.75


@pytest.mark.parametrize("sent_at", [None, 100.5])
def test_an_upstream_that_gave_no_response_took_no_time(sent_at: float | None) -> None:
    assert Exchange("id", "GET", "/", "192.0.2.7", started=100.0, sent_at=sent_at).upstream_duration is None


def test_an_exchange_can_begin_at_any_time() -> None:
    exchange = Exchange("id", "GET", "/", "peer", started=0.0, sent_at=0.0, head_at=0.0)
    assert exchange.upstream_duration == 0.0


def test_an_exchange_has_no_room_for_other_fields() -> None:
    with pytest.raises(AttributeError):
        Exchange("id", "GET", "/", "peer", started=0.0).color = "red"  # type: ignore[attr-defined]  # the test


def below(cls: type[Body]) -> Iterator[type[Body]]:
    """Yield every body there is."""
    for child in cls.__subclasses__():
        yield child
        yield from below(child)


@each("cls", list(below(Body)))
def test_a_body_refuses_fields_it_does_not_know(cls: type[Body]) -> None:
    with pytest.raises(ValidationError) as caught:
        cls.model_validate({"nonsense": 1})
    assert ("extra_forbidden", ("nonsense",)) in [(error["type"], error["loc"]) for error in caught.value.errors()]


def test_the_body_of_a_tier_change_is_one_name() -> None:
    assert TierChange.model_validate_json('{"tier": "PREMIUM"}').tier == "PREMIUM"


@each("body", ["{}", '{"tier": 1}', '{"tier": null}', "[]", '{"tier": "FREE", "rate": 5}'])
def test_a_tier_change_of_another_shape_is_refused(body: str) -> None:
    with pytest.raises(ValidationError):
        TierChange.model_validate_json(body)


def test_a_problem_may_carry_more_than_is_listed() -> None:
    """RFC 9457 section 3.2: extension members."""
    fields = {"type": "about:blank", "title": "t", "status": 400, "detail": "d", "instance": "/", "reason": "r"}
    assert Problem.model_validate({**fields, "tier": "FREE"}).model_dump()["tier"] == "FREE"
