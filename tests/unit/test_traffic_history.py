"""The history of traffic: a point for each ten seconds, from counters, for an hour, in limited memory."""

import pickle

import pytest

from api_gateway.errors import Reason
from api_gateway.metrics import Recorder
from api_gateway.models import Client, Exchange, Quota
from api_gateway.reporting.traffic_history import (
    HISTORY_POINTS,
    MAX_TIERS,
    OTHER_TIERS,
    POINT_SECONDS,
    SNAPSHOT_DELAY,
    TrafficHistory,
    seconds_to_next,
)
from tests.cases import each

START = 1000.0
FREE, PAID = Quota.per_second("FREE", 1, 10), Quota.per_second("PAID", 5, 50)


def recorder() -> Recorder:
    return Recorder(["a", "b"], ["up"], ["FREE", "PAID"], (50,), START)


def observe(
    to: Recorder, at: float, status: int = 200, reason: str | None = None, quota: Quota = FREE, seconds: float = 0.02
) -> None:
    exchange = Exchange("id", "GET", "/", "", at - seconds, Client("c", "c", quota, "default"), "a")
    exchange.status, exchange.reason, exchange.finished = status, reason, at
    exchange.source = "upstream" if reason is None else "gateway"
    exchange.sent_at = exchange.started if reason is None else None
    to.observe(exchange)


def test_a_point_has_what_was_counted_since_the_one_before() -> None:
    one, other, history = recorder(), recorder(), TrafficHistory()
    for _ in range(8):
        observe(one, START + 3, seconds=0.02)
    observe(other, START + 4, seconds=0.2, quota=PAID)
    observe(other, START + 4, 500)
    observe(one, START + 5, 429, "rate_limited")
    observe(one, START + 5, 503, "circuit_open")
    observe(one, START + 5, 499, "client_disconnected")
    one.unproxied_refusals.update({"credentials_invalid": 50, "overloaded": 50})  # of operator endpoints
    one.trace_spans.update({"exported": 9, "failed": 3, "rejected": 1})
    other.dropped_lines.update({"stdout": 2, "stderr": 5, "audit": 1})
    history.sample([one, other], START + 11.5, 1_800_000_000)
    (point,) = history.points
    assert point["at"] == 1_800_000_000
    assert point["seconds"] == POINT_SECONDS
    assert (point["requests"], point["refused"], point["errors"]) == (13, 1, 2)
    assert point["tiers"] == {"FREE": 12, "PAID": 1}
    assert point["kinds"] == {"rate_limited": 1, "circuit_open": 1, "upstream_5xx": 1}
    assert sum(point["kinds"].values()) == point["refused"] + point["errors"], "nothing else gives a false cause"
    assert point["lost"] == {"spans": 4, "lines": 7}
    assert point["p50"] == pytest.approx(20, rel=0.01)
    assert point["p99"] == pytest.approx(200, rel=0.01)

    observe(one, START + 14, seconds=0.5)
    history.sample([one, other], START + 21.5, 1_800_000_010)
    after = history.points[-1]
    assert (after["requests"], after["refused"], after["errors"], after["tiers"]) == (1, 0, 0, {"FREE": 1})
    assert after["p50"] == pytest.approx(500, rel=0.01), "only latencies of the slices since"
    assert (after["kinds"], after["lost"]) == ({}, {})

    history.sample([one, other], START + 31.5, 1_800_000_020)
    quiet = history.points[-1]
    assert (quiet["requests"], quiet["p50"], quiet["p99"]) == (0, None, None)


def test_counts_that_are_lost_with_a_killed_worker_are_not_negative() -> None:
    one, other, history = recorder(), recorder(), TrafficHistory()
    observe(one, START + 1)
    observe(one, START + 1, 429, "rate_limited")
    history.sample([one, other], START + 11.5, 1.0)
    history.sample([other], START + 21.5, 11.0)
    point = history.points[-1]
    assert (point["requests"], point["refused"], point["tiers"], point["kinds"]) == (0, 0, {}, {})


def test_an_hour_is_kept_in_less_than_a_megabyte_whatever_is_counted() -> None:
    history, source = TrafficHistory(), recorder()
    quotas = [Quota.per_second(f"TIER_OF_SOME_LENGTH_{number}", 1, 1) for number in range(40)]
    for number in range(HISTORY_POINTS + 40):
        at = START + number * POINT_SECONDS
        for quota in quotas:
            source.requests["a", "GET", 200, "upstream", quota.name] += 1_000_000
        for reason in Reason:
            source.reasons[reason.value, 503] += 1_000_000
        history.sample([source], at, 1_800_000_000 + number)
    points = history.points
    assert len(points) == HISTORY_POINTS
    assert points[-1]["at"] - points[0]["at"] == HISTORY_POINTS - 1
    assert len(points[-1]["tiers"]) == MAX_TIERS + 1
    assert points[-1]["tiers"][OTHER_TIERS] == 20 * 1_000_000
    assert len(pickle.dumps(points)) < 1_000_000


@each(("now", "due"), [(1000.0, 1001.5), (1001.5, 1011.5), (1001.4, 1011.5), (1000.4, 1001.5), (1009.0, 1011.5)])
def test_a_point_is_due_when_all_workers_have_reported_what_was_before(now: float, due: float) -> None:
    assert now + seconds_to_next(now) == pytest.approx(due)
    assert (due - SNAPSHOT_DELAY) % POINT_SECONDS == pytest.approx(0)
