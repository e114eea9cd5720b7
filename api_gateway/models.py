"""The vocabulary every layer shares: plain values of one request, and the bodies of the operator's answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

HeaderList = list[tuple[bytes, bytes]]
Clock = Callable[[], float]  # monotonic seconds

NANOSECONDS = 1_000_000_000

# What a decision rests on: buckets in this process, in the shared store, what the store said before of a bucket that
# must still be empty, or, while the store cannot be used, the policy for that.
Source = Literal["memory", "store", "deny_cache", "local_share", "deny", "allow"]

BreakerMode = Literal["auto", "observe", "forced_closed", "forced_open"]

# Where a client's tier comes from: a grant, a registration by the API, the configuration, or nowhere.
ClientSource = Literal["granted", "registered", "configured", "default", "address"]


@dataclass(frozen=True, slots=True)
class Quota:
    """The terms of one token bucket, with its times worked out in integer nanoseconds.

    `rate` is tokens per second, `capacity` tokens. `emission_ns` is the time one token takes to refill, rounded up,
    so that rounding can only make the limit stricter (by less than 1 ns a token). `burst_ns` is the time an empty
    bucket takes to refill: the whole budget of the bucket, expressed as time.
    """

    name: str
    rate: float
    capacity: int
    emission_ns: int
    burst_ns: int

    @classmethod
    def per_second(cls, name: str, rate: float, capacity: int) -> "Quota":
        """Build the quota of `rate` tokens per second and `capacity` tokens; both must be positive."""
        if not 0 < rate < math.inf or capacity <= 0:
            raise ValueError(f"quota {name!r}: rate and capacity must be > 0, got {rate!r} and {capacity!r}")
        emission_ns = math.ceil(NANOSECONDS / Fraction(str(rate)))
        return cls(name, rate, capacity, emission_ns, capacity * emission_ns)

    def cost_ns(self, cost: float) -> int:
        """Return what `cost` tokens (fractions allowed, >= 0) take off the budget, in nanoseconds."""
        return _cost_ns(self.emission_ns, cost)


@lru_cache(maxsize=4096)
def _cost_ns(emission_ns: int, cost: float) -> int:
    """Work out `Quota.cost_ns`: fractions take their time, and there are few costs."""
    return math.ceil(Fraction(str(cost)) * emission_ns)


@dataclass(slots=True)
class Charge:
    """One bucket that a request draws on: `increment_ns` from the budget of `key` under `quota`.

    Where something is settled after the fact, less than 0 gives back.
    """

    key: str
    quota: Quota
    increment_ns: int


@dataclass(slots=True)
class Decision:
    """What the limiter says of one request, about the bucket that binds.

    `remaining` is whole tokens left after the decision. `wait_ns` is 0 when allowed, else the exact time until the
    same request passes, or -1 when it never can because it costs more than `quota.capacity`. `reset_ns` is the time
    until the bucket is full. `at_ns` is when it was decided, on the clock of the buckets, and `others_ns` the times
    until the request's other buckets are full, if it was charged to several: what `settle` needs to know.
    """

    key: str
    quota: Quota
    allowed: bool
    remaining: int
    wait_ns: int
    reset_ns: int
    at_ns: int = field(default=0, compare=False)
    others_ns: tuple[int, ...] = field(default=(), compare=False)
    source: Source = "memory"

    @property
    def retry_after(self) -> float | None:
        """Seconds until the same request passes, not rounded down to whole ones; None when it passed or never can."""
        if self.wait_ns <= 0:
            return None
        whole, rest_ns = divmod(self.wait_ns, NANOSECONDS)
        seconds = self.wait_ns / NANOSECONDS
        return (
            math.nextafter(whole, math.inf) if rest_ns and seconds == whole else seconds
        )  # months: doubles are coarse


@dataclass(frozen=True, slots=True)
class Client:
    """Who is asking. `key` names its bucket; `source` says where its tier comes from."""

    id: str
    key: str
    quota: Quota
    source: ClientSource

    @property
    def is_registered(self) -> bool:
        """True when an operator vouches for this id, by the API or by the configuration."""
        return self.source in ("granted", "registered", "configured")


@dataclass(frozen=True, slots=True)
class LimiterState:
    """What decisions rest on now, and how the shared store has fared, if there is one.

    `processes` is how many gateways share a bucket while the store cannot be used; `questions` were answered by the
    store in so many `batches`, and `failures` are batches that were not, and attempts to connect. `evicted_keys` are
    those the store has thrown out for want of memory since it began, buckets or not.
    """

    mode: Source = "memory"
    processes: int = 1
    batches: int = 0
    questions: int = 0
    failures: int = 0
    last_error: str | None = None
    evicted_keys: int = 0
    warning: str | None = None

    @property
    def is_whole(self) -> bool:
        """True while limits are exact, and nothing is known that will make them otherwise."""
        return self.mode in ("memory", "store") and self.warning is None


class Outcome(Enum):
    """What a try on an upstream says about that upstream."""

    SUCCESS = "success"
    FAILURE = "failure"
    IGNORED = "ignored"  # the client left, or the request itself was at fault (4xx)


@dataclass(slots=True)
class Exchange:
    """The record of one request, filled from left to right; log and metrics are derived from it alone.

    Times are monotonic seconds. `status` is what the client was sent, 499 if it left before. `source` says who made
    the answer. `answer_headers` are the gateway's own and go on whatever answer is sent. `charges` are what `decision`
    was made on, `trial` the same of a candidate beside it. `has_reached` says that some of the request may have
    reached an upstream that then failed, `is_shed` that it was refused because too much was under way. `retried` are
    the causes of the tries that were repeated, `fallback` who answered in the place of the route's upstream, with
    `reason` and `detail` of why.
    """

    id: str
    method: str
    path: str
    peer: str
    started: float
    client: Client | None = None
    route: str | None = None
    upstream: str | None = None
    target: str | None = None
    cost: float = 0.0
    decision: Decision | None = None
    attempts: int = 0
    sent_at: float | None = None
    head_at: float | None = None
    status: int = 0
    source: Literal["gateway", "upstream"] = "gateway"
    reason: str | None = None
    detail: str | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    finished: float = 0.0
    answer_headers: HeaderList = field(default_factory=list)
    charges: Sequence[Charge] = ()
    trial: tuple[Sequence[Charge], Decision] | None = None
    has_reached: bool = False
    retried: tuple[str, ...] = ()
    fallback: str | None = None
    is_shed: bool = False

    @property
    def client_key(self) -> str:
        """The key of the client's bucket; empty before the client is known."""
        return self.client.key if self.client is not None else ""

    @property
    def duration(self) -> float:
        """Seconds from the request's arrival to the end of its answer."""
        return self.finished - self.started

    @property
    def upstream_duration(self) -> float | None:
        """Seconds the upstream took from the last try to its answer's head; None if it gave none."""
        return None if self.sent_at is None or self.head_at is None else self.head_at - self.sent_at


# Bodies of the operator's endpoints


class Body(BaseModel):
    """Base of all bodies: unknown fields are refused rather than ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Problem(BaseModel):
    """Problem details, RFC 9457."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [{"status": 403, "reason": "forbidden"}]})

    type: str
    title: str
    status: int
    detail: str
    instance: str
    reason: str


class TierChange(Body):
    """The body of POST /clients/{id}/tier."""

    tier: str = Field(description="Name of a configured tier, in any case.", examples=["PREMIUM"])


class GrantRequest(Body):
    """The body of POST /clients/{id}/grants: a tier, and either until when or for how long."""

    tier: str = Field(description="Name of a configured tier, in any case.", examples=["PREMIUM"])
    until: AwareDatetime | None = Field(
        default=None, description="When it ends, ISO 8601 with its offset.", examples=["2026-12-01T00:00:00Z"]
    )
    duration: float | None = Field(default=None, alias="for", description="Seconds it lasts.", gt=0, le=3_200_000_000)


class TierView(Body):
    """A tier and its terms."""

    name: str
    rate: float = Field(description="Tokens refilled per second.")
    capacity: int = Field(description="Tokens a full bucket holds.")


class BucketView(Body):
    """A client's bucket at this moment."""

    tokens: float = Field(description="Tokens in the bucket now.")
    capacity: int
    full_in: float = Field(description="Seconds until the bucket is full.")


class GrantView(Body):
    """A tier that a client has for a while."""

    tier: str
    until: str = Field(description="UTC, ISO 8601, by the clock of each gateway's machine.")
    then: str = Field(description="Name of the tier that the client returns to.")


class ClientView(Body):
    """A client, its tier and its bucket."""

    client_id: str
    tier: TierView
    source: Literal["granted", "registered", "configured", "default"] = Field(
        description="Where the tier comes from: a grant, a registration by this API, the configuration, or nowhere"
        " (the default tier)."
    )
    grant: GrantView | None
    confirmed: bool = Field(
        description="False if the store could not be asked: then this is what this gateway goes by meanwhile."
    )
    bucket: BucketView


class TierChanged(Body):
    """What a change of tier did. The bucket keeps its filled fraction."""

    client_id: str
    previous: TierView
    current: TierView
    tokens_before: float
    tokens_after: float
    persisted: bool = Field(description="True once the change survives a restart.")
    effective: Literal["immediately"] = "immediately"


class GrantChanged(TierChanged):
    """What a grant, or its end, did. The bucket keeps its filled fraction."""

    until: str | None = Field(description="When the client's grant ends, UTC, ISO 8601; None if it has none.")


class BucketReset(Body):
    """What refilling a client's bucket did."""

    client_id: str
    tier: TierView
    tokens_before: float
    tokens_after: float


class OpeningView(Body):
    """Why a breaker last opened."""

    at: str = Field(description="UTC, ISO 8601.")
    cause: str


class BreakerThresholds(Body):
    """When a breaker opens and how it recovers; durations in seconds."""

    failure_threshold: int
    failure_rate: float
    slow_call_duration: float | None
    slow_call_rate: float | None
    minimum_calls: int
    window: float
    window_calls: int | None
    recovery_timeout: float
    max_recovery_timeout: float | None
    jitter: float
    half_open_max_calls: int
    ramp: float


class ModeChange(Body):
    """The body of POST /circuit-breakers/{name}: the mode, for how many seconds (null: until changed), and why."""

    mode: BreakerMode = Field(description="`auto` takes back what was set before.", examples=["forced_open"])
    seconds: float | None = Field(default=None, gt=0, le=3_200_000_000, examples=[600])
    reason: str = Field(default="", max_length=500, examples=["the database is being moved"])


class ModeView(Body):
    """A breaker's mode, and of one that an operator has set when, until when, why and by whom."""

    mode: BreakerMode
    since: str | None = Field(default=None, description="UTC, ISO 8601.")
    until: str | None = Field(default=None, description="UTC, ISO 8601; null until it is changed.")
    reason: str = ""
    who: str | None = Field(default=None, description="Where the request came from that set it.")


class ModeChanged(Body):
    """What a change of mode did. This worker follows at once, the others within a second."""

    name: str
    previous: ModeView
    current: ModeView


class BreakerView(Body):
    """One circuit breaker. `state` is what it makes of the calls, `mode` what an operator makes of it."""

    state: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    since: str = Field(description="When it entered this state, UTC, ISO 8601.")
    mode: BreakerMode
    override: ModeView | None = Field(description="What an operator has set; null in mode auto.")
    consecutive_failures: int
    window_calls: int = Field(description="Counted calls inside the window.")
    window_failures: int
    window_failure_rate: float | None = Field(description="None while the window holds no call.")
    window_slow: int = Field(description="Calls inside the window that took slow_call_duration or longer.")
    window_slow_rate: float | None = Field(description="None while the window holds no call.")
    probes_in_flight: int
    ramp_share: float | None = Field(
        description="Share of the rate before it opened that is admitted, and 10 a second at least; null unless it has"
        " just closed."
    )
    opened_total: int
    rejected_total: int
    slow_total: int
    would_open_total: int = Field(description="Times it would have opened, in mode observe.")
    would_reject_total: int = Field(description="Requests it would have refused, in mode observe.")
    next_probe_in: float | None = Field(description="Seconds until a probe is let through; None unless OPEN.")
    last_opened: OpeningView | None
    thresholds: BreakerThresholds
    workers: dict[str, Literal["CLOSED", "OPEN", "HALF_OPEN"]] | None = Field(
        default=None, description="The state in each worker, where several serve; `state` is the worst of them."
    )


class ActiveView(Body):
    """What the health checks of a target have found."""

    result: str = Field(description="What the last check found.")
    at: str = Field(description="When that was, UTC, ISO 8601.")
    good: bool
    consecutive: int = Field(description="Results alike in a row: good ones, or bad ones.")
    last_error: str | None
    last_error_at: str | None


class PassiveView(Body):
    """What live requests have shown of a target: its own circuit breaker."""

    breaker: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    ejected: bool = Field(description="True while it gets no request for it.")
    consecutive_failures: int
    last_opened: OpeningView | None
    next_probe_in: float | None = Field(description="Seconds until a request tries it again; None unless OPEN.")
    ejections_total: int
    kept: str | None = Field(description="Why failures do not eject it; None if nothing keeps it.")


class VerdictView(Body):
    """Both verdicts on a target."""

    healthy: bool
    active: ActiveView | None = Field(description="None while no health check has come back.")
    passive: PassiveView | None = Field(description="None where the target has no breaker of its own.")
    share: float = Field(description="How often it is a candidate, 0 to 1: less than 1 while it starts slowly.")


class BreakersView(Body):
    """Every circuit breaker, by upstream, and the verdicts on the targets."""

    circuit_breakers: dict[str, BreakerView]
    modes_error: str | None = Field(
        default=None, description="Why the file of modes cannot be used; while it cannot, modes stay as they are."
    )
    targets: dict[str, dict[str, VerdictView]] = Field(
        default={}, description="By upstream and URL; where a name is resolved, by `name (URL)`."
    )


class FailedCallView(Body):
    """A call that failed or was slow, shortly before a breaker moved."""

    at: str = Field(description="UTC, ISO 8601.")
    route: str | None
    detail: str = Field(description="Its status or error.")
    duration: float | None = Field(description="Seconds from sending to the answer's head, or to the failure.")
    request_id: str | None


class FlightRecordView(Body):
    """A move of a breaker and what led to it."""

    at: str = Field(description="UTC, ISO 8601.")
    source: Literal["CLOSED", "OPEN", "HALF_OPEN"] = Field(alias="from")
    target: Literal["CLOSED", "OPEN", "HALF_OPEN"] = Field(alias="to")
    cause: str
    mode: BreakerMode = Field(description="In mode observe nothing was refused.")
    window_calls: int
    window_failures: int
    window_slow: int
    last_failures: list[FailedCallView] = Field(description="Since the move before, the newest first; at most 10.")
    next_probe_at: str | None = Field(description="UTC, ISO 8601; null unless it opened.")
    worker: str | None = Field(default=None, description="Whose breaker it was, where several serve.")
    target_url: str | None = Field(
        default=None, description="The target whose breaker it was; null for the upstream's own."
    )


class HistoryView(Body):
    """The last moves of a breaker and of those of its targets, the newest first."""

    name: str
    history: list[FlightRecordView]


class NameView(Body):
    """A name whose addresses are the targets."""

    host: str
    port: int
    addresses: list[str] = Field(description="Empty until it was resolved: then the name itself is the target.")
    asked_at: str | None = Field(description="UTC, ISO 8601.")
    error: str | None = Field(description="Why the last question failed; what was known before is kept.")


class TargetView(Body):
    """One target of an upstream."""

    url: str
    healthy: bool
    in_flight: int
    checked: bool = Field(description="False when no health check is configured, so nothing is known.")
    last_check: str | None = Field(description="What the last health check found.")
    name: str | None = Field(default=None, description="The URL whose host stands for this address.")
    active: ActiveView | None = None
    passive: PassiveView | None = None
    share: float = 1.0


class UpstreamView(Body):
    """Health of an upstream: pass while every target is in rotation, fail when none is healthy or its breaker open."""

    status: Literal["pass", "warn", "fail"]
    breaker: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    targets: list[TargetView]
    names: list[NameView] | None = None
    concurrency: "ConcurrencyView"


class ConcurrencyView(Body):
    """What is under way at an upstream, and what may be, in all workers."""

    limit: float | None = Field(description="Requests that may be under way at once; null is no limit.")
    in_flight: int = Field(description="Requests, streams and tunnels under way.")
    shed: int = Field(description="Requests refused for it since the start.")


class LagView(Body):
    """How late the event loop runs: the worst worker's."""

    seconds: float = Field(description="Median of the last samples.")
    shed: int = Field(description="Requests refused for it since the start.")


class StoreView(Body):
    """What the limits rest on now. `memory` and `store` are exact, all else is the policy for a store that is away."""

    mode: Source
    processes: int = Field(description="Gateways that share a bucket while the store cannot be used.")
    batches: int = Field(description="Calls that the store answered in time.")
    questions: int = Field(description="Decisions and settlements in them.")
    failures: int = Field(description="Calls that it did not answer in time, and attempts to connect.")
    last_error: str | None
    evicted_keys: int = Field(description="Keys the store has thrown out for want of memory, since it began.")
    warning: str | None = Field(description="What about the store makes limits inexact, if anything does.")


class ClientStoreView(Body):
    """Whether registered clients can be read and changed. While they cannot, tiers stay as they were last known."""

    status: Literal["pass", "warn"]
    error: str | None


class HealthView(BaseModel):
    """Overall health. From elsewhere than the operator's place only `status` is shown."""

    status: Literal["pass", "warn", "fail"]
    version: str | None = None
    uptime: float | None = Field(default=None, description="Seconds since the start.")
    upstreams: dict[str, UpstreamView] | None = None
    limits: StoreView | None = None
    clients: ClientStoreView | None = None
    event_loop: LagView | None = None


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
    bucket_limit: int
    overflowed: int = Field(description="Decisions made on a shared bucket because the table was full.")
    sources: dict[str, int] = Field(description="Decisions by what they rest on: memory, store, deny_cache, …")
    store: "StoreView"


class BreakerCounts(Body):
    """A breaker's figures."""

    state: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    mode: BreakerMode
    opened_total: int
    rejected_total: int
    slow_total: int
    would_open_total: int
    would_reject_total: int


class OverloadView(Body):
    """What was refused because too much was under way, and how much is."""

    event_loop_lag: float = Field(description="Seconds by which the event loop runs late.")
    upstreams: dict[str, ConcurrencyView]
    shed: dict[str, dict[str, int]] = Field(description="By upstream and tier; `_gateway` is the gateway itself.")


class MetricsView(Body):
    """Everything counted since the start, for people; Prometheus reads the same URL as text."""

    uptime: float
    requests: RequestCounts
    rates: RateSeries
    route_rates: dict[str, RateSeries]
    latency: LatencyView
    upstream_outcomes: dict[str, dict[str, int]]
    retries: dict[str, dict[str, int]] = Field(
        description="Repeated tries, by upstream and what the last failed with."
    )
    retries_denied: dict[str, dict[str, int]] = Field(
        description="Failed tries that were not repeated, by upstream and why."
    )
    fallbacks: dict[str, dict[str, int]] = Field(description="Fallbacks used, by route and reason of the failure.")
    rejections: dict[str, int] = Field(description="Answers made by the gateway, by reason.")
    rate_limiter: LimiterView
    circuit_breakers: dict[str, BreakerCounts]
    overload: OverloadView


class Question(Body):
    """A request that has not been made, and about which `POST /explain` is asked."""

    client_id: str | None = Field(description="What would name the client; null for a client that gives no name.")
    method: str = Field(default="GET", pattern=r"^[A-Z][A-Z-]{0,31}$")
    path: str = Field(
        max_length=65_536,
        pattern=r"^/[\x21-\x7e]*$",
        description="Path and query as they go over the wire.",
        examples=["/api/users"],
    )
    host: str = Field(default="", max_length=255, description="The request's Host, for routes that ask for one.")
    address: str = Field(default="127.0.0.1", max_length=64, description="The address that connects.")


class ClientExplained(Body):
    """Who the client is taken for."""

    id: str
    source: ClientSource
    why: str = Field(description="What names it, and where its tier comes from.")
    registered: bool = Field(description="True if an operator vouches for it; else its address is limited too.")
    tier: TierView


class RouteExplained(Body):
    """The route, and what the request costs."""

    name: str
    path: str
    upstream: str
    cost: float
    cost_from: str = Field(description="`route`, or the rule of the route that says what it costs.")


class BucketExplained(Body):
    """One bucket that the request draws on, as it is now."""

    key: str
    policy: str = Field(description="The name of its quota in RateLimit and RateLimit-Policy.")
    tokens: float = Field(description="Tokens now; below 0 while it owes what was settled later.")
    capacity: int
    cost: float
    passes: bool
    wait: float | None = Field(description="Seconds until this request passes; 0 now, null never.")
    full_in: float = Field(description="Seconds until the bucket is full.")


class UpstreamExplained(Body):
    """Where the request would go."""

    name: str
    breaker: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    next_probe_in: float | None = Field(description="Seconds until a probe is let through; null unless OPEN.")
    healthy: int = Field(description="Targets that pass their health checks, or have none.")
    targets: int
    concurrency: "ConcurrencyExplained | None" = Field(description="null if the upstream has no limit.")


class ConcurrencyExplained(Body):
    """What may be under way at the upstream, and what is, in the worker that was asked."""

    limit: float
    bound: int = Field(description="Requests of this tier are admitted while fewer are under way.")
    in_flight: int
    admits: bool


class LagExplained(Body):
    """How late the event loop of the worker runs that was asked."""

    seconds: float
    shed_share: float = Field(description="Share of this tier's requests that is refused for it now, 0 to 1.")


class FallbackExplained(Body):
    """What answers if the upstream cannot."""

    name: str = Field(description="`static`, or the upstream that is asked instead.")
    status: int | None = Field(description="Of the static answer; null where an upstream gives it.")
    used: bool = Field(description="True if it would answer now, because the upstream would not be tried.")


class Verdict(Body):
    """What would come of the request: `status` and `reason` are those of the answer the gateway would make itself.

    Where a fallback would answer, `reason` is why, and `status` the static answer's.
    """

    outcome: Literal["allowed", "limited", "never", "refused", "fallback"]
    status: int | None
    reason: str | None
    retry_after: float | None = Field(description="Seconds until it passes, as far as that is known.")
    words: str


class Explanation(Body):
    """The answer to a question, and every figure it rests on."""

    verdict: Verdict
    client: ClientExplained
    route: RouteExplained | None
    buckets: list[BucketExplained]
    binding: str = Field(description="Key of the bucket that refuses longest, or takes the fewest such requests more.")
    candidate: BucketExplained | None = Field(description="The bucket that is tried beside them; it limits nobody.")
    upstream: UpstreamExplained | None
    fallback: FallbackExplained | None
    event_loop: LagExplained
    limiter: Source = Field(description="What the figures rest on.")


class HeavyClient(Body):
    """A client and how often it came; each true count lies between the count less its error, and the count."""

    client_id: str
    source: ClientSource
    tier: str
    limited: int
    limited_error: int
    requests: int
    requests_error: int


class HeavyClients(Body):
    """The heaviest clients, the heaviest first."""

    sort: Literal["limited", "requests"]
    clients: list[HeavyClient]
