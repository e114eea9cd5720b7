"""The windows of a breaker: ten slices of time, or the last calls, compared with a plain log of the calls."""

from hypothesis import given
from hypothesis import strategies as st

from api_gateway.resilience.call_windows import Counts, CountWindow, TimeWindow

NOW = 1000.0


def test_a_window_of_time_forgets_a_slice_at_a_time() -> None:
    window = TimeWindow(10)
    for second in range(10):
        window.record(NOW + second, is_failure=second < 5, is_slow=second == 3)
    assert [window.counts(NOW + second) for second in (9.9, 10, 12, 15, 18.9, 19)] == [
        (10, 5, 1),
        (9, 4, 1),
        (7, 2, 1),
        (4, 0, 0),
        (1, 0, 0),
        (0, 0, 0),
    ]
    window.record(NOW + 10, is_failure=True)
    assert window.counts(NOW + 10) == (10, 5, 1)
    window.clear()
    assert window.counts(NOW + 10) == (0, 0, 0)


def test_counts_do_not_depend_on_the_value_of_the_clock() -> None:
    window = TimeWindow(10)
    assert window.counts(0) == (0, 0, 0)
    window.record(0, is_failure=True)
    assert [window.counts(now) for now in (0, 9.9, 10)] == [(1, 1, 0), (1, 1, 0), (0, 0, 0)]


CALLS = st.lists(st.tuples(st.sampled_from((0.0, 0.5, 3.0, 20.0)), st.booleans(), st.booleans()), max_size=60)


@given(CALLS, st.integers(1, 12))
def test_a_window_of_calls_holds_the_last_ones_however_old(calls: list[tuple[float, bool, bool]], size: int) -> None:
    window, now = CountWindow(size), NOW
    for place, (pause, is_failure, is_slow) in enumerate(calls, 1):
        now += pause
        window.record(now, is_failure=is_failure, is_slow=is_slow)
        last = calls[max(0, place - size) : place]
        assert window.counts(now + 1e6) == Counts(len(last), sum(bad for _, bad, _ in last), sum(s for *_, s in last))
    window.clear()
    assert window.counts(now) == (0, 0, 0)


@given(CALLS)
def test_a_window_of_time_holds_this_tenth_of_it_and_the_nine_before(calls: list[tuple[float, bool, bool]]) -> None:
    window, now, log = TimeWindow(10), NOW, list[tuple[float, bool, bool]]()
    for pause, is_failure, is_slow in calls:
        now += pause
        window.record(now, is_failure=is_failure, is_slow=is_slow)
        log.append((now, is_failure, is_slow))
        live = [call for call in log if int(now) - int(call[0]) < 10]
        assert window.counts(now) == Counts(len(live), sum(bad for _, bad, _ in live), sum(s for *_, s in live))
