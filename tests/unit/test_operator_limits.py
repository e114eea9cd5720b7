"""The limits of operator requests, with a fake clock."""

import pytest

from api_gateway.admin.operator_limits import FAILURES, LOG_LINES, MAX_TRACKED_ADDRESSES, OPERATORS, OperatorLimits
from api_gateway.admin.operators import LOCAL, Operator, Role
from api_gateway.errors import RateLimited

SECOND = 1_000_000_000
ALICE, READER = Operator("alice", Role.OPERATE), Operator("prometheus", Role.READ)


class Nanoseconds:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 10 * SECOND

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def now() -> Nanoseconds:
    return Nanoseconds()


def test_an_operator_is_limited_alone_and_only_for_as_long_as_it_says(now: Nanoseconds) -> None:
    limits = OperatorLimits(now)
    for _ in range(OPERATORS.capacity):
        limits.charge_operator(ALICE)
    with pytest.raises(RateLimited) as caught:
        limits.charge_operator(ALICE)
    limits.charge_operator(READER)
    limits.charge_operator(LOCAL)
    assert caught.value.retry_after == pytest.approx(0.01)
    now.now += SECOND // 100
    limits.charge_operator(ALICE)


def test_a_token_named_local_is_not_counted_as_local(now: Nanoseconds) -> None:
    limits = OperatorLimits(now)
    for _ in range(OPERATORS.capacity):
        limits.charge_operator(Operator("local", Role.READ))
    limits.charge_operator(LOCAL)


@pytest.mark.parametrize(
    ("failing", "other", "are_one"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("unknown", "192.0.2.1", False),
    ],
)
def test_failures_are_counted_by_address(now: Nanoseconds, failing: str, other: str, are_one: bool) -> None:  # noqa: FBT001 - parametrised
    limits = OperatorLimits(now)
    for _ in range(FAILURES.capacity):
        limits.charge_failure(failing)
    with pytest.raises(RateLimited, match=f"Failed attempts of address '{failing}' exceed the limit of 50 at once"):
        limits.charge_failure(failing)
    if are_one:
        with pytest.raises(RateLimited):
            limits.charge_failure(other)
    else:
        limits.charge_failure(other)
    limits.charge_view(failing)  # which is counted apart
    limits.charge_operator(ALICE)


def test_many_addresses_take_bounded_memory_and_nothing_from_operators(now: Nanoseconds) -> None:
    limits = OperatorLimits(now)

    def fail(number: int) -> None:
        return limits.charge_failure(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")

    for number in range(3 * MAX_TRACKED_ADDRESSES):
        fail(number)
    assert len(limits._failures) <= MAX_TRACKED_ADDRESSES
    for _ in range(OPERATORS.capacity):
        limits.charge_operator(ALICE)


def test_the_log_has_a_bounded_number_of_lines_that_say_how_many_are_missing(now: Nanoseconds) -> None:
    limits = OperatorLimits(now)
    assert [limits.log_line() for _ in range(LOG_LINES.capacity)] == [0] * LOG_LINES.capacity
    assert [limits.log_line() for _ in range(7)] == [None] * 7
    now.now += 10 * SECOND
    assert [limits.log_line(), limits.log_line()] == [7, None]
    now.now += 10 * SECOND
    assert limits.log_line() == 1
