"""The bodies of what the operator is shown of upstreams, their breakers and targets, and of what limits rest on."""

from typing import Literal

from pydantic import BaseModel, Field

from api_gateway.models import Body, BreakerMode, DecisionSource, RequestBody
from api_gateway.reporting.reload_schema import ConfigurationView


class OpeningView(Body):
    """Why a breaker last opened."""

    at: str = Field(description="UTC, ISO 8601.")
    detail: str


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


class ModeChange(RequestBody):
    """The body of POST /circuit-breakers/{name}: the mode, for how long (null: until changed), and a comment."""

    mode: BreakerMode = Field(description="`auto` takes back what was set before.", examples=["forced_open"])
    duration_seconds: float | None = Field(default=None, gt=0, le=3_200_000_000, examples=[600])
    comment: str = Field(default="", max_length=500, examples=["the database is being moved"])


class ModeView(Body):
    """A breaker's mode, and of one that an operator has set when, until when, why and by whom."""

    mode: BreakerMode
    since: str | None = Field(default=None, description="UTC, ISO 8601.")
    until: str | None = Field(default=None, description="UTC, ISO 8601; null until it is changed.")
    comment: str = ""
    set_by: str | None = Field(default=None, description="The operator who set it: token and address.")


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
    window_slow_calls: int = Field(description="Calls inside the window that took slow_call_duration or longer.")
    window_slow_call_rate: float | None = Field(description="None while the window holds no call.")
    probes_in_flight: int
    failures_of_one_client: bool = Field(
        description="True while a threshold is reached by the failures of one client alone, and others call too: that"
        " does not open it. A client is one that is registered, or else an address."
    )
    ramp_ratio: float | None = Field(
        description="Share of the rate before it opened that is admitted, and 10 a second at least; null unless it has"
        " just closed."
    )
    opened_total: int
    rejected_total: int
    slow_calls_total: int
    would_open_total: int = Field(description="Times it would have opened, in mode observe.")
    would_reject_total: int = Field(description="Requests it would have refused, in mode observe.")
    next_probe_in_seconds: float | None = Field(description="Time until a probe is admitted; null unless OPEN.")
    last_opened: OpeningView | None
    thresholds: BreakerThresholds
    workers: dict[str, Literal["CLOSED", "OPEN", "HALF_OPEN"]] | None = Field(
        default=None, description="The state in each worker, where several serve; `state` is the worst of them."
    )


class ActiveView(Body):
    """What the health checks of a target have found."""

    result: str = Field(description="What the last check found.")
    at: str = Field(description="When that was, UTC, ISO 8601.")
    passed: bool
    consecutive: int = Field(description="Results alike in a row: good ones, or bad ones.")
    last_error: str | None
    last_error_at: str | None


class PassiveView(Body):
    """What live requests have shown of a target: its own circuit breaker."""

    circuit_breaker: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    ejected: bool = Field(description="True while it gets no request for it.")
    consecutive_failures: int
    last_opened: OpeningView | None
    next_probe_in_seconds: float | None = Field(description="Time until a request tries it again; null unless OPEN.")
    ejections_total: int
    not_ejected_detail: str | None = Field(
        description="Why its failures do not eject it; null if nothing prevents it."
    )


class VerdictView(Body):
    """Both verdicts on a target."""

    healthy: bool | None = Field(description="What health checks say; null while none has come back, or none is set.")
    active: ActiveView | None = Field(description="None while no health check has come back.")
    passive: PassiveView | None = Field(description="None where the target has no breaker of its own.")
    slow_start_ratio: float = Field(
        description="How often the target is a candidate, 0 to 1: less than 1 during its slow start."
    )


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
    duration_seconds: float | None = Field(description="From sending to the response's head, or to the failure.")
    request_id: str | None


class TransitionRecordView(Body):
    """A move of a breaker and what led to it."""

    at: str = Field(description="UTC, ISO 8601.")
    source: Literal["CLOSED", "OPEN", "HALF_OPEN"] = Field(alias="from")
    target: Literal["CLOSED", "OPEN", "HALF_OPEN"] = Field(alias="to")
    detail: str = Field(description="What led to it.")
    mode: BreakerMode = Field(description="In mode observe nothing was refused.")
    window_calls: int
    window_failures: int
    window_slow_calls: int
    last_failures: list[FailedCallView] = Field(description="Since the move before, the newest first; at most 10.")
    next_probe_at: str | None = Field(description="UTC, ISO 8601; null unless it opened.")
    worker: str | None = Field(default=None, description="Whose breaker it was, where several serve.")
    target_url: str | None = Field(
        default=None, description="The target whose breaker it was; null for the upstream's own."
    )


class HistoryView(Body):
    """The last moves of a breaker and of those of its targets, the newest first."""

    name: str
    history: list[TransitionRecordView]


class NameView(Body):
    """A name whose addresses are the targets."""

    host: str
    port: int
    addresses: list[str] = Field(description="Empty until it was resolved: then the name itself is the target.")
    queried_at: str | None = Field(description="When DNS was queried last, UTC, ISO 8601.")
    error: str | None = Field(description="Why the last query failed; the addresses known before are kept.")


class TargetView(Body):
    """One target of an upstream."""

    url: str
    healthy: bool | None = Field(description="What health checks say; null while none has come back, or none is set.")
    in_flight: int
    configured_url: str | None = Field(default=None, description="The URL whose host was resolved to this address.")
    active: ActiveView | None = None
    passive: PassiveView | None = None
    slow_start_ratio: float = 1.0


class UpstreamView(Body):
    """Health of an upstream: pass while every target is in rotation, fail when none is healthy or its breaker open."""

    status: Literal["pass", "warn", "fail"]
    circuit_breaker: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    targets: list[TargetView]
    dns_names: list[NameView] | None = None
    concurrency: "ConcurrencyView"


class ConcurrencyView(Body):
    """What is under way at an upstream, and what may be, in all workers."""

    limit: float | None = Field(description="Requests that may be under way at once; null is no limit.")
    in_flight: int = Field(description="Requests under way; without a limit WebSockets and event streams too.")
    shed: int = Field(description="Requests refused for it since the start.")


class LagView(Body):
    """How late the event loop runs: the worst worker's."""

    lag_seconds: float = Field(description="Median of the last samples.")
    shed: int = Field(description="Requests refused for it since the start.")


class ResourceView(Body):
    """A bounded resource of which an address or client may hold as much as is still free."""

    resource: str = Field(description="`connections` of clients; `requests` or `tunnels` of an upstream.")
    upstream: str | None
    limit: int = Field(description="All workers and targets together.")
    in_use: int
    rejected: int = Field(description="What got no place since the start.")
    status: Literal["pass", "warn"] = Field(description="`warn` while it is nearly exhausted.")


class StoreView(Body):
    """What the limits rest on now. `memory` and `store` are exact, all else is the policy for a store that is away."""

    decision_source: DecisionSource
    gateway_processes: int = Field(description="Gateway processes that share a bucket while the store cannot be used.")
    calls: int = Field(description="Calls that the store answered in time.")
    operations: int = Field(description="Decisions and settlements in these calls.")
    failures: int = Field(description="Calls without a response in time, and failed attempts to connect.")
    last_error: str | None
    evicted_keys: int = Field(description="Keys the store has evicted for lack of memory since it started.")
    warning: str | None = Field(description="What about the store makes limits inexact, if anything does.")


class ClientStoreView(Body):
    """Whether registered clients can be read and changed. While they cannot, tiers stay as they were last known."""

    status: Literal["pass", "warn"]
    error: str | None


class HealthView(BaseModel):
    """Overall health. From elsewhere than the operator's place only `status` is shown."""

    status: Literal["pass", "warn", "fail"]
    version: str | None = None
    uptime_seconds: float | None = None
    upstreams: dict[str, UpstreamView] | None = None
    store: StoreView | None = None
    client_store: ClientStoreView | None = None
    event_loop: LagView | None = None
    configuration: ConfigurationView | None = None
    resources: list[ResourceView] | None = None
