"""The response bodies on upstreams, breakers, targets, stores and health."""

from typing import Literal

from pydantic import BaseModel, Field

from api_gateway.models import Body, BreakerMode, DecisionSource
from api_gateway.reporting.reload_schema import ConfigurationView


class OpeningView(Body):
    """When and why a breaker last opened."""

    at: str = Field(description="UTC, ISO 8601.")
    detail: str


class BreakerThresholds(Body):
    """The thresholds at which a breaker opens, and the settings of its recovery; durations in seconds."""

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


class ModeView(Body):
    """A breaker's mode. The other fields are set if an operator has set the mode."""

    mode: BreakerMode
    since: str | None = Field(default=None, description="UTC, ISO 8601.")
    until: str | None = Field(default=None, description="UTC, ISO 8601; null if it has no end.")
    comment: str = ""
    set_by: str | None = Field(default=None, description="The operator who set it: token and address.")


class ModeChanged(Body):
    """The result of a change of mode, which applies in this worker at once, in the others within a second."""

    name: str
    previous: ModeView
    current: ModeView


class BreakerView(Body):
    """One circuit breaker: `state` follows from the calls, `mode` is set by an operator."""

    state: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    since: str = Field(description="When the breaker entered this state, UTC, ISO 8601.")
    mode: BreakerMode
    override: ModeView | None = Field(description="The mode that an operator has set; null in mode auto.")
    consecutive_failures: int
    window_calls: int = Field(description="Recorded calls in the window.")
    window_failures: int
    window_failure_rate: float | None = Field(description="null while the window has no call.")
    window_slow_calls: int = Field(description="Calls in the window that took slow_call_duration or longer.")
    window_slow_call_rate: float | None = Field(description="null while the window has no call.")
    probes_in_flight: int
    failures_of_one_client: bool = Field(
        description="True while the failures of one client alone reach a threshold and other clients call, too: then"
        " the breaker does not open. A client is a registered client, or else an address."
    )
    ramp_ratio: float | None = Field(
        description="Admitted share of the request rate before the breaker opened, at least 10 requests per second;"
        " null if no ramp is in progress."
    )
    opened_total: int
    rejected_total: int
    slow_calls_total: int
    would_open_total: int = Field(description="Times the breaker would have opened, in mode observe.")
    would_reject_total: int = Field(description="Requests that would have been rejected, in mode observe.")
    next_probe_in_seconds: float | None = Field(description="Time until a probe is admitted; null unless OPEN.")
    last_opened: OpeningView | None
    thresholds: BreakerThresholds
    workers: dict[str, Literal["CLOSED", "OPEN", "HALF_OPEN"]] | None = Field(
        default=None, description="State in each worker if there are several; `state` is the worst of them."
    )


class ActiveView(Body):
    """The results of a target's health checks."""

    result: str = Field(description="Result of the last check: status or error.")
    at: str = Field(description="Time of the last check, UTC, ISO 8601.")
    passed: bool
    consecutive: int = Field(description="Number of consecutive checks with the same result as the last.")
    last_error: str | None
    last_error_at: str | None


class PassiveView(Body):
    """Outlier detection of a target, which has its own circuit breaker."""

    circuit_breaker: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    ejected: bool = Field(description="True while the target is ejected and receives no requests.")
    consecutive_failures: int
    last_opened: OpeningView | None
    next_probe_in_seconds: float | None = Field(description="Time until a probe is admitted; null unless OPEN.")
    ejections_total: int
    not_ejected_detail: str | None = Field(
        description="Why failures do not eject the target; null if nothing prevents ejection."
    )


class TargetHealthView(Body):
    """The health of a target, by health checks and by outlier detection."""

    healthy: bool | None = Field(description="Result of health checks; null before the first, or without checks.")
    active: ActiveView | None = Field(description="null before the first result of a health check.")
    passive: PassiveView | None = Field(description="null without outlier detection.")
    slow_start_ratio: float = Field(
        description="How often the target is a candidate, 0 to 1: less than 1 during its slow start."
    )


class BreakersView(Body):
    """All circuit breakers by upstream, and the health of the targets."""

    circuit_breakers: dict[str, BreakerView]
    modes_error: str | None = Field(
        default=None, description="Why the file of modes cannot be used; until it can, the modes stay unchanged."
    )
    targets: dict[str, dict[str, TargetHealthView]] = Field(
        default={}, description="By upstream and URL, or `name (URL)` if the name was resolved."
    )


class FailedCallView(Body):
    """A failed or slow call before a transition of a breaker."""

    at: str = Field(description="UTC, ISO 8601.")
    route: str | None
    detail: str = Field(description="Status or error of the call.")
    duration_seconds: float | None = Field(description="From sending to the response's head, or to the failure.")
    request_id: str | None


class TransitionRecordView(Body):
    """A transition of a breaker, with its cause."""

    at: str = Field(description="UTC, ISO 8601.")
    source: Literal["CLOSED", "OPEN", "HALF_OPEN"] = Field(alias="from")
    target: Literal["CLOSED", "OPEN", "HALF_OPEN"] = Field(alias="to")
    detail: str = Field(description="Cause of the transition.")
    mode: BreakerMode = Field(description="Mode at the transition; in mode observe nothing was rejected.")
    window_calls: int
    window_failures: int
    window_slow_calls: int
    last_failures: list[FailedCallView] = Field(
        description="Failed calls since the previous transition, newest first; at most 10."
    )
    next_probe_at: str | None = Field(description="UTC, ISO 8601; null unless the breaker opened.")
    worker: str | None = Field(default=None, description="Worker of the breaker if there are several.")
    target_url: str | None = Field(
        default=None, description="Target of the breaker; null for the breaker of the upstream."
    )


class HistoryView(Body):
    """The last transitions of a breaker and of the breakers of its targets, newest first."""

    name: str
    history: list[TransitionRecordView]


class NameView(Body):
    """A host name whose addresses are the targets."""

    host: str
    port: int
    addresses: list[str] = Field(description="Empty before the first result; until then the name is the target.")
    queried_at: str | None = Field(description="Time of the last DNS query, UTC, ISO 8601.")
    error: str | None = Field(description="Why the last query failed; the previous addresses are kept.")


class TargetView(Body):
    """One target of an upstream."""

    url: str
    healthy: bool | None = Field(description="Result of health checks; null before the first, or without checks.")
    in_flight: int
    configured_url: str | None = Field(default=None, description="The URL whose host was resolved to this address.")
    active: ActiveView | None = None
    passive: PassiveView | None = None
    slow_start_ratio: float = 1.0
    response_seconds: float | None = Field(
        default=None,
        description="Mean time to the head of the last responses, about a hundred; null before the first.",
    )


class UpstreamView(Body):
    """Health of an upstream.

    `pass`: all targets are in rotation, all names are resolved, and the breaker is CLOSED. `fail`: no target is
    healthy, or the breaker rejects all requests. Otherwise `warn`.
    """

    status: Literal["pass", "warn", "fail"]
    circuit_breaker: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    targets: list[TargetView]
    dns_names: list[NameView] | None = None
    concurrency: "ConcurrencyView"


class ConcurrencyView(Body):
    """Requests in flight at an upstream and their limit, summed over all workers."""

    limit: float | None = Field(description="Maximum number of requests in flight; null: no limit.")
    in_flight: int = Field(
        description="Requests in flight; without a limit WebSockets and event streams are included."
    )
    shed: int = Field(description="Requests refused because of the limit since the start.")


class LagView(Body):
    """Event loop lag: the highest of the workers."""

    lag_seconds: float = Field(description="Median of the last samples.")
    shed: int = Field(description="Requests refused because of the lag since the start.")


class ResourceView(Body):
    """A limited resource with fair shares: a client or address uses at most as much of it as is still free."""

    resource: str = Field(description="`connections` of clients; `requests` or `tunnels` of an upstream.")
    upstream: str | None
    limit: int = Field(description="Sum over all workers and targets.")
    in_use: int
    refused: int = Field(description="Requests or connections refused since the start.")
    status: Literal["pass", "warn"] = Field(description="`warn` while the resource is nearly exhausted.")


class StoreView(Body):
    """The source of rate limit decisions, and the figures of the store.

    With `memory` and `store` the limits are exact; the other sources apply while the store is unavailable.
    """

    decision_source: DecisionSource
    gateway_processes: int = Field(
        description="Number of gateway processes among which limits are divided while the store is unavailable."
    )
    calls: int = Field(description="Calls with a response in time.")
    operations: int = Field(description="Decisions and settlements in these calls.")
    failures: int = Field(description="Calls without a response in time, and failed attempts to connect.")
    last_error: str | None
    evicted_keys: int = Field(description="Keys that the store has evicted for lack of memory since its start.")
    warning: str | None = Field(description="Condition of the store that makes limits inexact; null if there is none.")


class ClientStoreView(Body):
    """The client store. With an error, the last known tiers apply and clients cannot be changed."""

    status: Literal["pass", "warn"]
    error: str | None


class StateView(Body):
    """The state that is written in the background. `warn`: the last write of a kind failed, which has the cause."""

    status: Literal["pass", "warn"]
    errors: dict[str, str]


class CertificateView(Body):
    """A certificate of the listener for clients."""

    file: str
    name: str = Field(description="Its first name.")
    not_after: str = Field(description="UTC, ISO 8601.")


class TlsView(Body):
    """The certificates in force. `warn`: one expires soon or has, or changed files could not be used."""

    status: Literal["pass", "warn"]
    certificates: list[CertificateView]
    problems: list[str]


class IssuerView(Body):
    """The keys of an issuer of tokens. `warn`: the last fetch failed; without a key its tokens get 503."""

    status: Literal["pass", "warn"]
    keys: int = Field(description="Keys in use; of several workers, the fewest.")
    fetched_at: str | None = Field(description="Time of the last successful fetch, UTC, ISO 8601; null before it.")
    error: str | None = Field(description="Why the last fetch failed; null after a success.")


class HealthView(BaseModel):
    """Overall health. All but `status` is for operators only."""

    status: Literal["pass", "warn", "fail"]
    version: str | None = None
    uptime_seconds: float | None = None
    upstreams: dict[str, UpstreamView] | None = None
    store: StoreView | None = None
    client_store: ClientStoreView | None = None
    state: StateView | None = None
    tls: TlsView | None = None
    issuers: dict[str, IssuerView] | None = Field(default=None, description="By name; null if tokens are no source.")
    event_loop: LagView | None = None
    configuration: ConfigurationView | None = None
    resources: list[ResourceView] | None = None
