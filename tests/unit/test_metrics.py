"""Counters, percentiles with a limited error, sliding windows, and Prometheus text."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from platform import python_version
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.errors import Reason, UpstreamFailed
from api_gateway.eventloop.steps import run_at_once
from api_gateway.metrics import DURATION_BOUNDS, Recorder
from api_gateway.models import Client, Decision, Exchange, LimiterState, Outcome, Quota
from api_gateway.observability.label_counter import LabelCounter
from api_gateway.observability.latency_series import Tally, bucket_of, percentile
from api_gateway.reporting.metrics_schema import RateWindow
from api_gateway.reporting.metrics_view import latency_view, metrics_view
from api_gateway.reporting.prometheus import MAX_DETAILED, PrometheusExposition
from api_gateway.reporting.snapshot import UpstreamSnapshot, WorkerSnapshot
from api_gateway.resilience.breaker_policy import BreakerPolicy, Mode
from api_gateway.system.build import variant
from api_gateway.upstreams.load_balancing import round_robin
from api_gateway.upstreams.outlier_detection import OutlierDetector
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Upstream
from tests.cases import each

START = 1000.0
TIERS = {name: Quota.per_second(name, 1, 10) for name in ("FREE", "PREMIUM")}
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
DURATION = st.floats(1e-6, 100)

STATES = ("closed", "open", "half_open")
RESULTS = {
    *("2xx", "3xx", "4xx", "5xx"),
    *(cls.reason.value for cls in UpstreamFailed.__subclasses__()),
    Reason.OVERLOADED.value,
}


def recorder_of(percentiles: Sequence[float] = (50, 90, 95, 99)) -> Recorder:
    return Recorder(["users", "orders"], ["people", "shop"], TIERS, percentiles, START)


def ended(at: float = START, seconds: float | None = 0.01, *, allowed: bool | None = True, **fields: Any) -> Exchange:
    """Return an exchange that finished at a time; without `seconds` it never reached an upstream."""
    client = Client("acme", "client:acme", TIERS[fields.pop("tier", "FREE")], "default")
    answer: dict[str, Any] = {"status": 200, "source": "upstream", "route": "users"}
    exchange = Exchange("id", fields.pop("method", "GET"), "/api/users", "192.0.2.7", at - (seconds or 0.0), client)
    exchange.finished = at
    exchange.sent_at = None if seconds is None else exchange.started
    if allowed is not None:
        exchange.decision = Decision(client.key, client.quota, allowed, 0, 0 if allowed else 1, 0)
    for name, value in (answer | fields).items():
        setattr(exchange, name, value)
    return exchange


def people(policy: BreakerPolicy | None = None) -> Upstream:
    targets = [Target("http://127.0.0.1:9001"), Target("http://127.0.0.1:9002", is_healthy=False)]
    for target in targets:
        target.checks.note(START, is_good=target.is_healthy, finding="status")
    return Upstream("people", targets, CircuitBreaker(policy or BreakerPolicy(), START), round_robin)


def exposition_of(recorder: Recorder, *upstreams: Upstream) -> PrometheusExposition:
    reports = {one.name: UpstreamSnapshot.of(one, START) for one in upstreams or (people(),)}
    return PrometheusExposition(WorkerSnapshot("", recorder, reports, buckets=7), "1.2.3")


def families(exposition: PrometheusExposition, accept: str = "text/plain") -> Iterator[Metric]:
    """Scrape, as Prometheus would."""
    text, content_type = run_at_once(exposition.render(accept))
    is_open = content_type.startswith("application/openmetrics-text")
    parse = openmetrics.text_string_to_metric_families if is_open else text_string_to_metric_families
    yield from parse(text.decode())


Samples = dict[str, float]


def samples(exposition: PrometheusExposition, accept: str = "text/plain") -> Samples:
    """Return every series by its spelling, labels sorted by name."""
    found: Samples = {}
    for family in families(exposition, accept):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}"
            assert name not in found
            found[name] = sample.value
    return found


# Percentiles


def nearest_rank(values: list[float], percent: float) -> float:
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def assert_within_bound(values: list[float], percent: float) -> None:
    found = percentile(Counter(map(bucket_of, values)), percent)
    assert found == pytest.approx(nearest_rank(values, percent), rel=0.01 + 1e-9, abs=0)


@given(
    st.one_of(
        st.lists(DURATION, min_size=1),
        st.lists(st.floats(-6, 2).map(lambda exponent: 10.0**exponent), min_size=1),
        st.lists(st.sampled_from([1e-6, 1e-3, 0.25, 0.2501, 30.0, 100.0]), min_size=1),
    ),
    st.one_of(st.sampled_from([50, 90, 95, 99, 99.9]), st.floats(0.1, 99.99)),
)
@example([1e-6], 50)
@example([100.0], 99)
@example([1.0, 1.0000001], 50)
def test_a_percentile_is_within_one_percent_of_the_nearest_rank(values: list[float], percent: float) -> None:
    assert_within_bound(values, percent)


DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "uniform": lambda source: source.uniform(1e-6, 100),
    "log-uniform": lambda source: 10 ** source.uniform(-6, 2),
    "exponential": lambda source: min(max(source.expovariate(100), 1e-6), 100),
    "log-normal": lambda source: min(max(source.lognormvariate(-5, 2), 1e-6), 100),
    "pareto": lambda source: min(0.001 * source.paretovariate(1.1), 100),
    "two clusters": lambda source: source.gauss(0.002, 1e-5) if source.random() < 0.95 else source.uniform(29, 31),
    "constant": lambda source: 0.0123,
}


@each("draw", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
@each("percent", [0.1, 50, 90, 95, 99, 99.9])
def test_percentiles_of_many_values_stay_within_one_percent(
    draw: Callable[[random.Random], float], percent: float
) -> None:
    source = random.Random(7)
    assert_within_bound([draw(source) for _ in range(5000)], percent)


def test_nothing_has_no_percentile() -> None:
    assert percentile({}, 50) is None
    assert run_at_once(latency_view(recorder_of(), START)).overall.since_start.model_dump() == {
        "count": 0,
        "mean_ms": None,
        "percentiles_ms": {"p50": None, "p90": None, "p95": None, "p99": None},
    }


@each("seconds", [0.0, -1.0, 1e-9])
def test_what_is_too_short_to_measure_counts_as_a_microsecond(seconds: float) -> None:
    assert bucket_of(seconds) == bucket_of(1e-6)


def test_a_longer_duration_never_lies_in_a_lower_bucket() -> None:
    buckets = [bucket_of(1e-6 * 1.003**step) for step in range(6200)]
    assert buckets == sorted(buckets)
    assert len(set(buckets)) < 1000  # a microsecond to 100 s: what a series holds at most


def test_percentiles_are_as_configured() -> None:
    recorder = recorder_of([25, 99.9])
    for milliseconds in range(1, 1001):
        recorder.observe(ended(seconds=milliseconds / 1000))
    found = run_at_once(latency_view(recorder, START)).overall.last_60s.percentiles_ms
    assert found == {"p25": pytest.approx(250, rel=0.011), "p99.9": pytest.approx(999, rel=0.011)}


# Merging


@given(st.lists(st.lists(DURATION)))
def test_merged_tallies_are_the_tally_of_all(parts: list[list[float]]) -> None:
    merged, together = Tally(), Tally()
    for part in parts:
        tally = Tally()
        for seconds in part:
            for one in (tally, together):
                one.time(seconds)
                one.count(ended(status=503, source="gateway"))
        merged.add(tally)
    assert merged.buckets == together.buckets
    assert merged.total_seconds == pytest.approx(together.total_seconds)
    assert (merged.requests, merged.gateway_errors) == (together.requests, together.gateway_errors)


@each(
    ("field", "exchange"),
    [
        ("gateway_errors", ended(status=503, source="gateway")),
        ("upstream_errors", ended(status=503)),
        ("limited", ended(status=429, source="gateway", reason="rate_limited")),
    ],
)
def test_merging_adds_every_count(field: str, exchange: Exchange) -> None:
    one, other = Tally(), Tally()
    one.count(exchange)
    other.count(exchange)
    one.add(other)
    assert (one.requests, getattr(one, field)) == (2, 2)


def test_overall_is_all_routes_together() -> None:
    recorder = recorder_of()
    for route, seconds in (("users", 0.1), ("users", 0.2), ("orders", 0.9)):
        recorder.observe(ended(route=route, seconds=seconds))
    view = run_at_once(latency_view(recorder, START))
    assert view.overall.since_start.count == 3
    assert view.overall.since_start.mean_ms == pytest.approx(400)
    assert {name: series.since_start.count for name, series in view.routes.items()} == {"users": 2, "orders": 1}


# Windows


@given(st.floats(1000, 1e6), st.floats(0, 400))
@example(1000.0, 55.0)
@example(1000.0, 60.0)
@example(1004.999, 55.0)
@example(1000.0, 295.0)
@example(1000.0, 300.0)
def test_a_window_forgets_what_is_older_and_holds_what_is_five_seconds_younger(at: float, age: float) -> None:
    recorder = recorder_of()
    recorder.observe(ended(at))
    recorder.observe_attempt("people", "2xx", 0.01, at)
    now = at + age
    latency, rates = (
        run_at_once(latency_view(recorder, now)),
        run_at_once(
            metrics_view(recorder, now, {}, buckets=0, bucket_limit=1, overflowed=0, limiter=LimiterState())
        ).rates,
    )
    for series in (latency.overall, latency.routes["users"], latency.upstreams["people"]):
        for span, count in ((60, series.last_60s.count), (300, series.last_5m.count)):
            if now >= at + span:
                assert count == 0
            elif age <= span - 5:
                assert count == 1
        assert series.since_start.count == 1
    assert (rates.last_60s.requests, rates.last_5m.requests) == (
        latency.overall.last_60s.count,
        latency.overall.last_5m.count,
    )


def test_a_window_can_be_filled_again_after_it_was_forgotten() -> None:
    recorder = recorder_of()
    for turn in range(3):
        recorder.observe(ended(START + 300 * turn))
    latency = run_at_once(latency_view(recorder, START + 600)).overall
    assert (latency.last_60s.count, latency.last_5m.count, latency.since_start.count) == (1, 1, 3)


def rates_at(recorder: Recorder, now: float) -> dict[str, RateWindow]:
    rates = run_at_once(
        metrics_view(recorder, now, {}, buckets=0, bucket_limit=1, overflowed=0, limiter=LimiterState())
    ).rates
    return {"last_60s": rates.last_60s, "last_5m": rates.last_5m, "since_start": rates.since_start}


@each("now", [START + 7.5, START + 60, START + 64.9, START + 300, START + 602.5, START + 900])
def test_a_steady_rate_is_shown_exactly_at_any_moment(now: float) -> None:
    recorder = recorder_of()
    for tick in range(1, int((now - START) * 10) + 1):
        recorder.observe(ended(START + tick / 10))
    for name, window in rates_at(recorder, now).items():
        assert window.requests_per_second == pytest.approx(10, rel=0.02), name


def test_a_rate_can_be_asked_for_at_the_very_start() -> None:
    assert [window.requests_per_second for window in rates_at(recorder_of(), START).values()] == [0, 0, 0]


# One exchange


@each(
    ("exchange", "gateway_errors", "upstream_errors", "limited"),
    [
        (ended(), 0, 0, 0),
        (ended(status=404), 0, 0, 0),
        (ended(status=429), 0, 0, 0),  # the upstream's own limit
        (ended(status=429, source="gateway", reason="rate_limited", allowed=False, seconds=None), 0, 0, 1),
        (ended(status=403, source="gateway", reason="cost_exceeds_capacity", allowed=False, seconds=None), 0, 0, 0),
        (ended(status=404, source="gateway", reason="no_route", allowed=None, seconds=None, route=None), 0, 0, 0),
        (ended(status=503, source="gateway", reason="circuit_open", seconds=None), 1, 0, 0),
        (ended(status=504, source="gateway", reason="upstream_timeout"), 1, 0, 0),
        (ended(status=500, source="gateway", reason="internal_error", allowed=None, seconds=None), 1, 0, 0),
        (ended(status=502), 0, 1, 0),
        (ended(status=499, source="gateway", reason="client_disconnected"), 0, 0, 0),
    ],
)
def test_an_exchange_counts_once_in_everything_it_is(
    exchange: Exchange, gateway_errors: int, upstream_errors: int, limited: int
) -> None:
    recorder = recorder_of()
    recorder.observe(exchange)
    view = run_at_once(
        metrics_view(recorder, START + 1, {}, buckets=0, bucket_limit=1, overflowed=0, limiter=LimiterState())
    )
    for window in (view.rates.last_60s, view.rates.last_5m, view.rates.since_start):
        assert window.model_dump(exclude={"requests_per_second"}) == {
            "requests": 1,
            "gateway_errors": gateway_errors,
            "upstream_errors": upstream_errors,
            "limited": limited,
            "error_rate": gateway_errors + upstream_errors,
            "limited_rate": limited,
        }
    route = exchange.route or "_none"
    assert view.route_rates[route].since_start.requests == 1
    assert view.requests.by_route == {route: 1}
    assert view.requests.by_status == {str(exchange.status): 1}
    assert view.requests.by_tier == {"FREE": 1}
    assert view.refusals == ({exchange.reason: 1} if exchange.reason else {})
    assert view.latency.overall.since_start.count == (exchange.sent_at is not None)
    decision = exchange.decision
    assert view.rate_limiter.allowed == {"FREE": int(decision is not None and decision.allowed), "PREMIUM": 0}
    assert view.rate_limiter.limited == {"FREE": int(decision is not None and not decision.allowed), "PREMIUM": 0}


def test_an_exchange_that_ended_before_its_client_was_known_has_no_tier() -> None:
    recorder = recorder_of()
    refused = ended(status=400, source="gateway", reason="client_id_invalid", allowed=None, seconds=None)
    refused.client = refused.route = None
    recorder.observe(refused)
    assert recorder.requests == {("_none", "GET", 400, "gateway", "_none"): 1}


def test_rates_are_shares_of_all_requests() -> None:
    recorder = recorder_of()
    for exchange in (
        *(ended() for _ in range(5)),
        *(ended(status=429, source="gateway", reason="rate_limited", allowed=False) for _ in range(3)),
        ended(status=500),
        ended(status=503, source="gateway", reason="circuit_open"),
    ):
        recorder.observe(exchange)
    window = rates_at(recorder, START + 1)["since_start"]
    assert (window.error_rate, window.limited_rate) == (0.2, 0.3)


def test_an_attempt_counts_its_result_and_its_time_if_there_was_a_response() -> None:
    recorder = recorder_of()
    recorder.observe_attempt("people", "2xx", 0.2, START)
    recorder.observe_attempt("people", "upstream_timeout", None, START)
    view = run_at_once(
        metrics_view(recorder, START, {}, buckets=0, bucket_limit=1, overflowed=0, limiter=LimiterState())
    )
    tried = {name: count for name, count in view.upstream_results["people"].items() if count}
    assert tried == {"2xx": 1, "upstream_timeout": 1}
    assert not any(view.upstream_results["shop"].values())
    assert view.latency.upstreams["people"].last_60s.count == 1
    assert view.latency.upstreams["people"].last_60s.mean_ms == 200
    assert view.latency.upstreams["shop"].last_60s.count == 0


def test_a_snapshot_shows_the_live_figures_and_is_json() -> None:
    recorder = recorder_of()
    recorder.in_flight = 3
    upstream = people(BreakerPolicy(failure_threshold=1))
    trip(upstream)
    upstream.breaker.admit(START)
    view = run_at_once(
        metrics_view(
            recorder,
            START + 12.5,
            {"people": UpstreamSnapshot.of(upstream, START)},
            buckets=4,
            bucket_limit=9,
            overflowed=2,
            limiter=LimiterState(),
        )
    )
    assert (view.uptime_seconds, view.requests.in_flight, view.requests.total) == (12.5, 3, 0)
    limiter = view.rate_limiter
    assert (limiter.buckets, limiter.max_buckets, limiter.overflow_decisions) == (4, 9, 2)
    assert view.circuit_breakers["people"].model_dump() == {
        "state": "OPEN",
        "mode": "auto",
        "opened_total": 1,
        "rejected_total": 1,
        "slow_calls_total": 0,
        "would_open_total": 0,
        "would_reject_total": 0,
    }
    assert json.loads(view.model_dump_json())["latency"]["overall"]["last_60s"]["count"] == 0


def trip(upstream: Upstream) -> None:
    """Open the breaker of an upstream that opens after one failure."""
    lease = upstream.acquire(START, "")
    lease.settle(Outcome.FAILURE, START, "status 500")
    lease.release(START)


def test_a_recorder_shows_its_state() -> None:
    recorder = recorder_of()
    recorder.in_flight = 2
    recorder.observe(ended())
    assert repr(recorder) == "<Recorder [1 requests, 2 in flight]>"


# What bounds memory


def test_clients_paths_and_methods_add_no_series() -> None:
    recorder = recorder_of()
    exposition = exposition_of(recorder)
    recorder.observe(ended(method="BREW"))
    before = len(samples(exposition))
    for number in range(10_000):
        exchange = ended(START + number / 100, method=f"M{number}")
        exchange.client = Client(f"client-{number}", f"client:{number}", TIERS["FREE"], "default")
        exchange.path, exchange.id, exchange.client_address = (
            f"/api/users/{number}",
            f"id-{number}",
            f"2001:db8::{number:x}",
        )
        exchange.detail = f"detail {number}"
        recorder.observe(exchange)
    assert len(samples(exposition)) == before
    assert recorder.requests == {("users", "_other", 200, "upstream", "FREE"): 10_001}


@each("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_known_methods_have_their_own_label(method: str) -> None:
    recorder = recorder_of()
    recorder.observe(ended(method=method))
    assert [key[1] for key in recorder.requests] == [method]


@each("method", ["get", "TRACE", "PROPFIND", "x" * 1000])
def test_other_methods_share_one_label(method: str) -> None:
    recorder = recorder_of()
    recorder.observe(ended(method=method))
    assert [key[1] for key in recorder.requests] == ["_other"]


# Prometheus


def test_a_target_that_no_check_has_asked_has_no_series_of_its_health() -> None:
    upstream = Upstream("people", [Target("http://a")], CircuitBreaker(BreakerPolicy(), START), round_robin)
    assert not [name for name in samples(exposition_of(recorder_of(), upstream)) if "gateway_upstream_healthy" in name]


@each("accept", ["", "*/*", "text/plain", "text/plain; version=0.0.4"])
def test_plain_text_is_the_default(accept: str) -> None:
    text, content_type = run_at_once(exposition_of(recorder_of()).render(accept))
    assert content_type.startswith("text/plain; version=")
    assert b"# EOF" not in text


def test_openmetrics_comes_where_it_is_asked_for() -> None:
    text, content_type = run_at_once(exposition_of(recorder_of()).render(OPENMETRICS))
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


@pytest.fixture
def busy() -> PrometheusExposition:
    """An exposition after some traffic."""
    recorder = recorder_of()
    for seconds in (0.002, 0.004, 0.02, 0.3, 0.3, 20.0):
        recorder.observe(ended(seconds=seconds, bytes_in=100, bytes_out=2000))
        recorder.observe_attempt("people", "2xx", seconds / 2, START)
    recorder.observe(ended(status=429, source="gateway", reason="rate_limited", allowed=False, seconds=None))
    recorder.observe_attempt("people", "upstream_reset", None, START)
    recorder.in_flight = 2
    return exposition_of(recorder)


@pytest.mark.parametrize("accept", ["text/plain", OPENMETRICS])
def test_the_text_says_what_was_counted(busy: PrometheusExposition, accept: str) -> None:
    found = samples(busy, accept)
    expected = {
        "gateway_http_requests_total{code=200,method=GET,route=users,source=upstream,tier=FREE}": 6,
        "gateway_http_requests_total{code=429,method=GET,route=users,source=gateway,tier=FREE}": 1,
        "gateway_http_requests_in_flight{}": 2,
        "gateway_rate_limit_decisions_total{decision=allowed,tier=FREE}": 6,
        "gateway_rate_limit_decisions_total{decision=limited,tier=FREE}": 1,
        "gateway_rate_limit_buckets{}": 7,
        "gateway_refusals_total{reason=rate_limited}": 1,
        "gateway_upstream_requests_total{result=2xx,upstream=people}": 6,
        "gateway_upstream_requests_total{result=upstream_reset,upstream=people}": 1,
        "gateway_upstream_healthy{target=http://127.0.0.1:9001,upstream=people}": 1,
        "gateway_upstream_healthy{target=http://127.0.0.1:9002,upstream=people}": 0,
        f"gateway_build_info{{python={python_version()},variant={variant()},version=1.2.3}}": 1,
        "gateway_http_request_body_bytes_total{route=users}": 6 * 100,
        "gateway_http_response_body_bytes_total{route=users}": 6 * 2000,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_every_family_says_what_it_is(busy: PrometheusExposition) -> None:
    for accept in ("text/plain", OPENMETRICS):
        for family in families(busy, accept):
            assert family.documentation
            assert family.type != "unknown"
            assert family.name.startswith(("gateway_", "process_"))


@pytest.mark.parametrize("accept", ["text/plain", OPENMETRICS])
@pytest.mark.parametrize(
    ("name", "label", "total"),
    [
        ("gateway_http_request_duration_seconds", "route=users", 20.626),
        ("gateway_upstream_request_duration_seconds", "upstream=people", 10.313),
    ],
)
def test_the_buckets_of_a_histogram_are_cumulative(
    busy: PrometheusExposition, accept: str, name: str, label: str, total: float
) -> None:
    found = samples(busy, accept)
    buckets = {
        float(series.partition("le=")[2].partition(",")[0].rstrip("}")): value
        for series, value in found.items()
        if series.startswith(f"{name}_bucket") and label in series
    }
    assert sorted(buckets) == [*DURATION_BOUNDS, math.inf]
    counts = [buckets[bound] for bound in sorted(buckets)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (2, 6)
    assert found[f"{name}_count{{{label}}}"] == 6
    assert found[f"{name}_sum{{{label}}}"] == pytest.approx(total)


@each("bound", DURATION_BOUNDS)
def test_a_histogram_bucket_is_right_to_one_percent(bound: float) -> None:
    recorder = recorder_of()
    for factor in (0.985, 1.015):
        recorder.observe(ended(seconds=bound * factor))
    found = samples(exposition_of(recorder))
    assert found[f"gateway_http_request_duration_seconds_bucket{{le={bound},route=users}}"] == 1


def test_every_series_known_from_the_configuration_exists_at_zero_from_the_start() -> None:
    """Without its zero, `increase()` misses the first event of a series, and an alert on it stays silent."""
    found = samples(exposition_of(recorder_of()))
    expected = [
        *(
            f"gateway_rate_limit_decisions_total{{decision={decision},tier={tier}}}"
            for decision in ("allowed", "limited")
            for tier in TIERS
        ),
        *(f"gateway_refusals_total{{reason={reason}}}" for reason in Reason),
        *(
            f"gateway_upstream_requests_total{{result={result},upstream={name}}}"
            for result in RESULTS
            for name in ("people", "shop")
        ),
        *(f"gateway_http_request_duration_seconds_count{{route={route}}}" for route in ("users", "orders")),
        *(f"gateway_upstream_request_duration_seconds_count{{upstream={name}}}" for name in ("people", "shop")),
        "gateway_circuit_breaker_opened_total{upstream=people}",
        "gateway_circuit_breaker_rejected_total{upstream=people}",
        "gateway_circuit_breaker_slow_calls_total{upstream=people}",
        "gateway_circuit_breaker_would_open_total{upstream=people}",
        "gateway_circuit_breaker_would_reject_total{upstream=people}",
        "gateway_http_requests_in_flight{}",
    ]
    assert {name: found.get(name) for name in expected} == dict.fromkeys(expected, 0)


@each("result", ["1xx", "6xx", "9xx"])
def test_a_result_that_nobody_foresaw_is_counted_all_the_same(result: str) -> None:
    """An upstream may send any three digits as its status."""
    recorder = recorder_of()
    recorder.observe_attempt("people", result, 0.1, START)
    found = samples(exposition_of(recorder))
    tries = [value for name, value in found.items() if name.startswith("gateway_upstream_requests_total")]
    assert sum(tries) == 1


def test_the_state_of_a_breaker_is_one_of_three() -> None:
    upstream = people(BreakerPolicy(failure_threshold=1, recovery_timeout=30))

    def state() -> list[float]:
        found = samples(exposition_of(recorder_of(), upstream))
        return [found[f"gateway_circuit_breaker_state{{state={state},upstream=people}}"] for state in STATES]

    assert state() == [1, 0, 0]
    trip(upstream)
    assert state() == [0, 1, 0]
    upstream.breaker.advance(START + 30)
    assert state() == [0, 0, 1]
    opened = samples(exposition_of(recorder_of(), upstream))["gateway_circuit_breaker_opened_total{upstream=people}"]
    assert opened == 1


def test_the_series_of_a_target_end_with_it() -> None:
    upstream = people()
    upstream.targets[1].is_healthy, upstream.targets[0].ejections_total = True, 3
    outliers = OutlierDetector(make_breaker=lambda now: CircuitBreaker(BreakerPolicy(failure_threshold=1), now))
    upstream = Upstream("people", upstream.targets, upstream.breaker, round_robin, outliers=outliers)
    first, second = upstream.targets
    lease = upstream.acquire(START, "", tried=[second])
    lease.settle(Outcome.FAILURE, START)
    found = samples(exposition_of(recorder_of(), upstream))
    for name, values in (("ejected", (1, 0)), ("ejections_total", (4, 0)), ("healthy", (1, 1))):
        for target, value in zip((first, second), values, strict=True):
            assert found[f"gateway_upstream_{name}{{target={target.url},upstream=people}}"] == value
    upstream.set_targets([second], START)
    left = samples(exposition_of(recorder_of(), upstream))
    assert not [series for series in left if first.url in series]
    assert [series for series in left if second.url in series]


def test_the_mode_of_a_breaker_is_one_of_four_and_what_it_would_have_done_is_counted() -> None:
    upstream = people(BreakerPolicy(failure_threshold=1, slow_call_duration=1, slow_call_rate=1))
    for mode in Mode:
        upstream.breaker.set_mode(mode, START)
        found = samples(exposition_of(recorder_of(), upstream))
        modes = {other: found[f"gateway_circuit_breaker_mode{{mode={other},upstream=people}}"] for other in Mode}
        assert modes == {other: other is mode for other in Mode}
    upstream.breaker.set_mode(Mode.OBSERVE, START)
    upstream.acquire(START, "").settle(Outcome.FAILURE, START, "status 500", duration=2)
    upstream.acquire(START, "").release(START)
    found = samples(exposition_of(recorder_of(), upstream))
    assert {
        key: found[f"gateway_circuit_breaker_{key}_total{{upstream=people}}"]
        for key in ("opened", "rejected", "slow_calls", "would_open", "would_reject")
    } == {"opened": 0, "rejected": 0, "slow_calls": 1, "would_open": 1, "would_reject": 1}


def test_counters_never_fall(busy: PrometheusExposition) -> None:
    before = samples(busy)
    busy._recorder.observe(ended(START + 1000))
    after = samples(busy)
    counters = [name for name in before if name.partition("{")[0].endswith(("_total", "_count", "_bucket"))]
    assert counters
    assert [name for name in counters if after[name] < before[name]] == []


def many(names: Sequence[str] = ("people",)) -> Recorder:
    """Return a recorder with more routes than have all series from the start."""
    return Recorder([f"route-{number}" for number in range(MAX_DETAILED)], names, TIERS, [50], START)


def test_of_many_routes_series_at_zero_are_omitted_but_not_the_health_of_a_target() -> None:
    recorder, upstream = many(), people(BreakerPolicy(failure_threshold=1))

    def labelled() -> Samples:
        found = samples(exposition_of(recorder, upstream))
        return {name: value for name, value in found.items() if "people" in name or "route-" in name}

    assert labelled() == {
        "gateway_upstream_healthy{target=http://127.0.0.1:9001,upstream=people}": 1,
        "gateway_upstream_healthy{target=http://127.0.0.1:9002,upstream=people}": 0,
        "gateway_circuit_breaker_state{state=closed,upstream=people}": 1,
    }
    trip(upstream)
    upstream.breaker.set_mode(Mode.OBSERVE, START)
    recorder.observe(ended(route="route-1", seconds=0.2))
    recorder.observe_attempt("people", "5xx", 0.2, START)
    found = labelled()
    assert {name: value for name, value in found.items() if "healthy" not in name and "_seconds" not in name} == {
        "gateway_circuit_breaker_mode{mode=observe,upstream=people}": 1,
        "gateway_circuit_breaker_opened_total{upstream=people}": 1,
        "gateway_circuit_breaker_state{state=open,upstream=people}": 1,
        "gateway_http_requests_total{code=200,method=GET,route=route-1,source=upstream,tier=FREE}": 1,
        "gateway_upstream_requests_total{result=5xx,upstream=people}": 1,
    }
    bounds = {
        (name.partition("_request_")[0], float(name.partition("le=")[2].partition(",")[0].rstrip("}"))): value
        for name, value in found.items()
        if "_seconds_bucket" in name
    }
    assert bounds == {
        ("gateway_http", 0.1): 0,
        ("gateway_http", 2.5): 1,
        ("gateway_http", math.inf): 1,
        ("gateway_upstream", math.inf): 1,
    }


def test_few_and_many_routes_have_the_same_families() -> None:
    few, much = (
        {family.name: family.type for family in families(exposition_of(recorder))}
        for recorder in (recorder_of(), many())
    )
    assert few == much


def test_odd_names_are_escaped() -> None:
    upstream = Upstream('a"\\\n', [], CircuitBreaker(BreakerPolicy(), START), round_robin)
    recorder = Recorder([], [upstream.name], {}, [50], START)
    recorder.observe_attempt(upstream.name, "2xx", 0.1, START)
    found = samples(exposition_of(recorder, upstream))
    assert found[f"gateway_circuit_breaker_opened_total{{upstream={upstream.name}}}"] == 0


def test_a_label_counter_counts_as_a_counter_does() -> None:
    """An absent label counts 0 and stays absent; to delete it is an error, unlike with `Counter`."""
    counts: Counter[str] = LabelCounter(a=1)
    counts["a"] += 1
    counts["b"] += 2
    assert counts == Counter(a=2, b=2)
    assert counts.total() == 4
    assert counts["c"] == 0
    assert "c" not in counts
    del counts["a"]
    with pytest.raises(KeyError):
        del counts["a"]
