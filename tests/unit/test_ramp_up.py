"""The ramp after a breaker has closed: a growing share, a minimum rate, and a limit that holds for any period."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.resilience.ramp_up import MIN_RATE, RampUp
from api_gateway.resilience.rate_meter import RateMeter
from tests.cases import each

NOW = 1000.0


def take(ramp: RampUp, now: float) -> bool:
    """Take a call if it is admitted, and return whether it was."""
    is_admitted = ramp.wait(now) == 0
    if is_admitted:
        ramp.take(now)
    return is_admitted


def passed(ramp: RampUp, *, per_second: int, seconds: float) -> list[float]:
    """Return when calls passed of those that came at a steady rate from NOW on."""
    times = [NOW + number / per_second for number in range(int(per_second * seconds))]
    return [now for now in times if take(ramp, now)]


def test_the_share_grows_from_nothing_to_all() -> None:
    ramp = RampUp(1000, 10, NOW)
    assert [ramp.share(NOW + second) for second in (0, 2.5, 5, 10, 99)] == [0, 0.25, 0.5, 1, 1]
    assert [ramp.is_over(NOW + second) for second in (0, 9.9, 10)] == [False, False, True]


def test_a_burst_is_limited_to_a_growing_rate() -> None:
    times = passed(RampUp(1000, 10, NOW), per_second=2000, seconds=10)
    by_second = [sum(int(now - NOW) == second for now in times) for second in range(10)]
    assert by_second[0] < 80
    assert all(abs(count - 1000 * (second + 0.5) / 10) < 25 for second, count in enumerate(by_second) if second)


@each("rate", [0, 1, 9, 100])
def test_a_low_rate_is_not_limited(rate: float) -> None:
    """Ten at once, as a page that loads, and ten a second from then on."""
    ramp = RampUp(rate, 10, NOW)
    assert all(take(ramp, NOW) for _ in range(int(MIN_RATE)))
    assert not take(ramp, NOW)
    assert all(take(ramp, NOW + number / MIN_RATE) for number in range(1, 100))


def test_it_says_when_the_next_call_passes() -> None:
    ramp = RampUp(0, 10, NOW)
    assert ramp.wait(NOW) == 0
    while take(ramp, NOW):
        pass
    assert ramp.wait(NOW) == pytest.approx(0.1)
    assert not take(ramp, NOW + 0.099)
    assert take(ramp, NOW + 0.1)


@given(
    rate=st.sampled_from((0.0, 5.0, 50.0, 1000.0)),
    length=st.sampled_from((0.5, 10.0)),
    pauses=st.lists(st.sampled_from((0.0, 0.001, 0.01, 0.1, 1.0)), min_size=1, max_size=200),
)
def test_within_any_stretch_no_more_pass_than_the_rate_admits_and_one_seconds_worth(
    rate: float, length: float, pauses: list[float]
) -> None:
    ramp, now, times = RampUp(rate, length, NOW), NOW, list[float]()
    for pause in pauses:
        now += pause
        if take(ramp, now):
            times.append(now)
    for first, start in enumerate(times):
        for last, end in enumerate(times[first:], first):
            assert last - first + 1 <= ramp.between(start, end) + ramp.limit(start) + 1e-6


@given(st.sampled_from((0.0, 5.0, 50.0, 1000.0)), st.floats(0, 10), st.floats(0, 10))
def test_what_the_rate_admits_is_the_sum_of_its_limits(rate: float, one: float, other: float) -> None:
    ramp, (start, end) = RampUp(rate, 10, NOW), sorted((one, other))
    steps = 2000
    width = (end - start) / steps
    summed = sum(ramp.limit(NOW + start + (step + 0.5) * width) * width for step in range(steps))
    assert ramp.between(NOW + start, NOW + end) == pytest.approx(summed, rel=1e-3, abs=1e-3)


# The rate before


def metered(times: list[float]) -> RateMeter:
    meter = RateMeter()
    for now in times:
        meter.count += 1
        if now >= meter.due:
            meter.mark(now)
    return meter


@each("rate", [1, 20, 500])
def test_a_steady_rate_is_measured_exactly(rate: int) -> None:
    meter = metered([NOW + number / rate for number in range(30 * rate)])
    assert meter.rate(NOW + 30) == pytest.approx(rate, rel=0.15)


def test_calls_longer_than_ten_seconds_ago_say_nothing() -> None:
    meter = metered([NOW + number / 100 for number in range(1000)])
    assert meter.rate(NOW + 21) == 0
    assert RateMeter().rate(NOW) == 0


def test_a_few_calls_at_once_are_not_limited() -> None:
    assert metered([NOW, NOW, NOW]).rate(NOW) == 3
