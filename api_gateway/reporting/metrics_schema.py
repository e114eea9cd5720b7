"""The bodies of the metrics, as they are shown to people."""

from typing import Literal

from pydantic import Field

from api_gateway.models import Body, BreakerMode
from api_gateway.reporting.upstream_schema import ConcurrencyView, StoreView


class LatencyWindow(Body):
    """Percentiles over one window, in milliseconds, each within 1 % of the true value."""

    count: int
    mean_ms: float | None
    percentiles_ms: dict[str, float | None] = Field(examples=[{"p50": 1.2, "p99": 9.8}])


class LatencySeries(Body):
    """The same series over three windows; the sliding ones move in steps of 5 s."""

    last_60s: LatencyWindow
    last_5m: LatencyWindow
    since_start: LatencyWindow


class LatencyView(Body):
    """Latency of requests that reached an upstream: by route to the answer's end, by upstream to its head."""

    overall: LatencySeries
    routes: dict[str, LatencySeries]
    upstreams: dict[str, LatencySeries]


class RateWindow(Body):
    """Requests and the shares that failed or were limited, over one window."""

    requests: int
    requests_per_second: float
    gateway_errors: int = Field(description="5xx answers made by the gateway.")
    upstream_errors: int = Field(description="5xx answers made by an upstream.")
    limited: int = Field(description="429 answers made by the gateway.")
    error_rate: float = Field(description="Share of 5xx answers, 0 to 1.")
    limited_rate: float = Field(description="Share of requests limited, 0 to 1.")


class RateSeries(Body):
    """The same rates over three windows."""

    last_60s: RateWindow
    last_5m: RateWindow
    since_start: RateWindow


class RequestCounts(Body):
    """Requests since the start. Requests still running are in `in_flight` only."""

    total: int
    in_flight: int
    by_route: dict[str, int]
    by_status: dict[str, int]
    by_tier: dict[str, int]


class LimiterView(Body):
    """The rate limiter's figures."""

    allowed: dict[str, int] = Field(description="Decisions by tier.")
    limited: dict[str, int] = Field(description="Decisions by tier.")
    would_limit: dict[str, int] = Field(description="Allowed requests that a candidate would limit, by tier.")
    would_allow: dict[str, int] = Field(description="Limited requests that a candidate would allow, by tier.")
    settlements: dict[str, int] = Field(
        description="Costs settled after the decision: more charged, given back, or told in a way nobody can read."
    )
    buckets: int = Field(description="Buckets in memory; full ones are forgotten.")
    max_buckets: int
    overflow_decisions: int = Field(description="Decisions made on a shared bucket because the table was full.")
    decisions_by_source: dict[str, int] = Field(
        description="Decisions by what they rest on: memory, store, deny_cache, …"
    )
    store: "StoreView"


class BreakerCounts(Body):
    """A breaker's figures."""

    state: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    mode: BreakerMode
    opened_total: int
    rejected_total: int
    slow_calls_total: int
    would_open_total: int
    would_reject_total: int


class OverloadView(Body):
    """What was refused because too much was under way, and how much is."""

    event_loop_lag_seconds: float = Field(description="How late the event loop runs.")
    upstreams: dict[str, ConcurrencyView]
    shed: dict[str, dict[str, int]] = Field(description="By upstream and tier; `_gateway` is the gateway itself.")


class OutputView(Body):
    """What was lost of the gateway's own output, by stream: `stdout` (access log) and `stderr` (log)."""

    dropped_lines: dict[str, int] = Field(description="Lines not written: the queue was full, or writing failed.")
    write_errors: dict[str, int] = Field(description="Writes that failed, such as on a full disk or a closed pipe.")


class MetricsView(Body):
    """Everything counted since the start, for people; Prometheus reads the same URL as text."""

    uptime_seconds: float
    requests: RequestCounts
    rates: RateSeries
    route_rates: dict[str, RateSeries]
    latency: LatencyView
    upstream_outcomes: dict[str, dict[str, int]]
    retries: dict[str, dict[str, int]] = Field(
        description="Repeated attempts, by upstream and the reason of the failure before."
    )
    retries_denied: dict[str, dict[str, int]] = Field(
        description="Failed attempts that were not repeated, by upstream and reason."
    )
    fallbacks: dict[str, dict[str, int]] = Field(description="Fallbacks used, by route and reason of the failure.")
    rejections: dict[str, int] = Field(description="Answers made by the gateway, by reason.")
    operator_rejections: dict[str, int] = Field(
        description="Rejected requests to operator endpoints, by reason: missing_token, invalid_token,"
        " insufficient_role, cross_site."
    )
    rate_limiter: LimiterView
    circuit_breakers: dict[str, BreakerCounts]
    overload: OverloadView
    output: OutputView
