"""The retry decision: its table, the limits of its delays, and the budget over any period."""

import random
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api_gateway.resilience.retry import (
    NO_RETRY,
    FailedAttempt,
    RetryBudget,
    RetryDecider,
    RetryDenied,
    RetryPolicy,
    is_repeatable,
    max_delay,
    retry_after_of,
)
from tests.cases import each

POLICY = RetryPolicy(attempts=3, budget=0.2, base=0.025, cap=0.25, max_retry_after=1.0)
SAFE = FailedAttempt(attempts=1, is_sent=True, is_repeatable=True, is_replayable=True)
NOW = 1000.0


def retries(policy: RetryPolicy = POLICY) -> RetryDecider:
    return RetryDecider(policy, random.Random(1))


# The table


@each(
    ("failed", "expected"),
    [
        (SAFE, None),
        (replace(SAFE, attempts=2), None),
        (replace(SAFE, attempts=3), RetryDenied.ATTEMPTS),
        (replace(SAFE, is_repeatable=False), RetryDenied.METHOD),
        (replace(SAFE, is_repeatable=False, is_sent=False), None),
        (replace(SAFE, is_replayable=False), RetryDenied.BODY),
        (replace(SAFE, is_replayable=False, is_sent=False), RetryDenied.BODY),
        (replace(SAFE, is_recovering=True), RetryDenied.BREAKER),
        (replace(SAFE, is_recovering=True, is_elsewhere=True), RetryDenied.BREAKER),
        (replace(SAFE, retry_after=0.0), None),
        (replace(SAFE, retry_after=1.0), None),
        (replace(SAFE, retry_after=1.001), RetryDenied.RETRY_AFTER),
        (replace(SAFE, retry_after=NO_RETRY, is_elsewhere=True), RetryDenied.RETRY_AFTER),
        (replace(SAFE, left=0.25), None),
        (replace(SAFE, left=0.0), RetryDenied.DEADLINE),
        (replace(SAFE, left=0.0, is_elsewhere=True), RetryDenied.DEADLINE),
        (replace(SAFE, left=0.9, retry_after=0.9), RetryDenied.DEADLINE),
        (replace(SAFE, left=0.91, retry_after=0.9), None),
    ],
)
def test_the_table_of_decisions(failed: FailedAttempt, expected: RetryDenied | None) -> None:
    decision = retries().decide(failed, NOW)
    assert (decision if isinstance(decision, RetryDenied) else None) == expected


FAILURES = st.builds(
    FailedAttempt,
    attempts=st.integers(1, 5),
    is_sent=st.booleans(),
    is_repeatable=st.booleans(),
    is_replayable=st.booleans(),
    is_recovering=st.booleans(),
    is_elsewhere=st.booleans(),
    retry_after=st.none() | st.floats(0, 3),
    left=st.none() | st.floats(0, 3),
)


@given(FAILURES)
def test_a_retry_keeps_to_every_rule_whatever_comes_together(failed: FailedAttempt) -> None:
    pause = retries().decide(failed, NOW)
    if isinstance(pause, RetryDenied):
        return
    assert failed.attempts < POLICY.attempts
    assert failed.is_repeatable or not failed.is_sent
    assert failed.is_replayable
    assert not failed.is_recovering
    assert (failed.retry_after or 0.0) <= pause <= max(POLICY.max_retry_after, POLICY.cap)
    assert failed.left is None or pause < failed.left


@given(FAILURES)
def test_what_is_denied_takes_nothing_off_the_budget_and_what_is_not_takes_one(failed: FailedAttempt) -> None:
    ours = retries()
    is_denied = isinstance(ours.decide(failed, NOW), RetryDenied)
    assert spent(ours.budget) == (10 if is_denied else 9)


def test_a_budget_that_is_spent_denies() -> None:
    ours = retries()
    decisions = [ours.decide(SAFE, NOW) for _ in range(12)]
    assert decisions[10:] == [RetryDenied.BUDGET] * 2
    assert not any(isinstance(decision, RetryDenied) for decision in decisions[:10])


@each(
    ("method", "key", "expected"),
    [
        ("GET", (), True),
        ("HEAD", (), True),
        ("OPTIONS", (), True),
        ("PUT", (), True),
        ("DELETE", (), True),
        ("POST", (), False),
        ("PATCH", (), False),
        ("POST", (b'"7f3a"',), True),
        ("PATCH", (b"7f3a",), True),
        ("POST", (b"",), False),
    ],
)
def test_a_request_is_repeatable_by_its_method_or_its_key(
    method: str, key: tuple[bytes, ...], *, expected: bool
) -> None:
    assert is_repeatable(method, {b"idempotency-key": key} if key else {}) is expected


# The pause


@given(st.integers(1, 10_000), st.floats(0, 10), st.floats(0, 10), st.integers())
@example(1, 0.025, 0.25, 0)
def test_the_delay_is_between_zero_and_a_maximum_that_doubles_up_to_its_cap(
    attempts: int, base: float, cap: float, seed: int
) -> None:
    policy = RetryPolicy(attempts=attempts + 1, budget=1, base=base, cap=cap)
    pause = RetryDecider(policy, random.Random(seed)).decide(replace(SAFE, attempts=attempts), NOW)
    assert not isinstance(pause, RetryDenied)
    assert 0 <= pause <= max_delay(policy, attempts) <= cap
    assert max_delay(policy, attempts) <= max_delay(policy, attempts + 1)


def test_the_limits_of_the_default_delays() -> None:
    assert [max_delay(POLICY, attempts) for attempts in (1, 2, 3, 4, 5, 6)] == [0.025, 0.05, 0.1, 0.2, 0.25, 0.25]


def test_the_whole_range_is_used_so_that_clients_do_not_come_back_together() -> None:
    policy = replace(POLICY, budget=1.0)
    source = random.Random(2)
    pauses = [RetryDecider(policy, source).decide(SAFE, NOW) for _ in range(2000)]
    tenths = [sum(1 for pause in pauses if tenth <= float(pause) / 0.0025 < tenth + 1) for tenth in range(10)]
    assert min(tenths) > 120


def test_the_first_retry_on_another_target_goes_at_once_and_no_other() -> None:
    """The pause spares a target that has failed; this one has not."""
    assert retries().decide(replace(SAFE, is_elsewhere=True), NOW) == 0.0
    assert retries().decide(replace(SAFE, is_elsewhere=True, attempts=2), NOW) > 0.0  # type: ignore[operator]  # a pause
    assert retries().decide(SAFE, NOW) > 0.0  # type: ignore[operator]  # as above


def test_what_the_upstream_asks_for_is_waited_for_in_full_on_any_target() -> None:
    assert retries().decide(replace(SAFE, retry_after=0.5), NOW) == 0.5
    assert retries().decide(replace(SAFE, retry_after=0.5, is_elsewhere=True), NOW) == 0.5


DATE = b"Wed, 21 Oct 2015 07:28:00 GMT"
LATER = b"Wed, 21 Oct 2015 07:28:30 GMT"


@each(
    ("given", "dates", "expected"),
    [
        ((), (), None),
        ((b"0",), (), 0.0),
        ((b"120",), (), 120.0),
        ((b"9999999999",), (), None),
        ((b"soon",), (), None),
        ((b"-1",), (), None),
        ((b"1.5",), (), None),
        ((b"1", b"2"), (), NO_RETRY),
        ((LATER,), (DATE,), 30.0),
        ((DATE,), (LATER,), 0.0),
        ((LATER,), (), NO_RETRY),
        ((LATER,), (b"now",), NO_RETRY),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date_relative_to_the_date_of_the_response(
    given: tuple[bytes, ...], dates: tuple[bytes, ...], expected: float | None
) -> None:
    fields = {name: values for name, values in ((b"retry-after", given), (b"date", dates)) if values}
    assert retry_after_of(fields) == expected


# The budget


def spent(budget: RetryBudget, now: float = NOW) -> int:
    """Take every retry there is; return how many."""
    count = 0
    while budget.withdraw(now):
        count += 1
    return count


def test_a_quiet_service_may_retry_ten_times() -> None:
    assert spent(RetryBudget(0.2)) == 10


@each(("share", "requests", "retries"), [(0.25, 3, 0), (0.25, 4, 1), (0.5, 7, 3), (1, 5, 5)])
def test_retries_are_a_share_of_requests(share: float, requests: int, retries: int) -> None:
    budget = RetryBudget(share)
    spent(budget)
    for _ in range(requests):
        budget.deposit(NOW)
    assert spent(budget) == retries


def test_the_reserve_does_not_grow_beyond_ten() -> None:
    budget = RetryBudget(0.5, floor=5)
    spent(budget)
    for _ in range(1000):
        budget.deposit(NOW)
    assert spent(budget, NOW + 1000) == 10


def test_what_a_busy_service_keeps_is_its_share_of_ten_seconds_and_no_longer_than_it_is_busy() -> None:
    """A target of a hundred requests a second that hangs for a second shows a hundred failures at once."""
    budget = RetryBudget(0.2)
    for request in range(20 * 300):
        budget.deposit(NOW + request / 300)
    assert spent(budget, NOW + 20) == pytest.approx(0.2 * 10 * 300, rel=0.02)
    for request in range(20 * 300):
        budget.deposit(NOW + 20 + request / 300)
    assert spent(budget, NOW + 60) == 10, "nothing came for twenty seconds"


@each(("floor", "seconds", "retries"), [(1, 0.9, 0), (1, 1, 1), (1, 3.5, 3), (0.5, 3, 1), (0, 99, 0)])
def test_the_floor_is_so_many_retries_a_second(floor: float, seconds: float, retries: int) -> None:
    budget = RetryBudget(0.2, floor)
    spent(budget)
    assert spent(budget, NOW + seconds) == retries


def test_a_budget_of_nothing_allows_no_retry_whatever_the_floor() -> None:
    budget = RetryBudget(0, floor=5)
    for _ in range(1000):
        budget.deposit(NOW)
    assert spent(budget) == spent(budget, NOW + 1000) == 0


def test_a_clock_that_stands_or_steps_back_gives_nothing() -> None:
    budget = RetryBudget(0.2, floor=1)
    spent(budget)
    assert spent(budget, NOW - 5) == spent(budget, NOW) == 0


@given(
    share=st.floats(0, 1),
    floor=st.floats(0, 5),
    steps=st.lists(st.tuples(st.sampled_from(("request", "retry", "wait")), st.floats(0, 20)), max_size=200),
)
@example(share=0.2, floor=1.0, steps=[("retry", 0.0)] * 12 + [("wait", 20.0)] + [("retry", 0.0)] * 12)
def test_over_any_run_retries_are_at_most_share_and_floor_and_reserve(
    share: float, floor: float, steps: list[tuple[str, float]]
) -> None:
    budget, now, requests, made = RetryBudget(share, floor), NOW, 0, 0
    for step, seconds in steps:
        if step == "request":
            budget.deposit(now)
            requests += 1
        elif step == "retry":
            made += budget.withdraw(now)
        else:
            now += seconds
        assert made <= share * requests + floor * (now - NOW) + RetryBudget.RESERVE + 1e-6


# How they show themselves


def test_reprs_show_the_state() -> None:
    budget = RetryBudget(0.5)
    budget.withdraw()
    budget.deposit(NOW)
    assert repr(budget) == "<RetryBudget [9.5 retries left]>"
    assert repr(retries()) == "<RetryDecider of 3 attempts <RetryBudget [10.0 retries left]>>"
