"""Sections of upstreams: targets, timeouts, pools, health checks, circuit breakers, retries and limits."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from api_gateway.settings.setting_types import (
    HASH_ON,
    Duration,
    FilePath,
    HostHeader,
    OriginUrl,
    Rate,
    RetriedStatus,
    Seconds,
    Section,
    Shorthand,
    Size,
    StatusRange,
    WholePath,
)

_URL = {"type": "string", "pattern": "^[Hh][Tt][Tt][Pp][Ss]?://"}
_EXAMPLE = "http://127.0.0.1:9001"


class TargetSection(Section):
    """One address of an upstream; or its URL alone."""

    shorthand: ClassVar[Shorthand | None] = Shorthand(lambda url: {"url": url}, _URL, _EXAMPLE)

    url: OriginUrl = Field(description="http://host:port or https://host:port.")
    weight: int = Field(
        default=1,
        ge=1,
        le=100,
        description="The share of the requests, in proportion to the weights of the other targets.",
    )


class TimeoutsSection(Section):
    """Timeouts in seconds: to connect, until the response's head, between parts of a body, for the whole exchange.

    `total` None: no limit. `tunnel` is how long a tunnel may be without a byte in either direction.
    """

    connect: Seconds = Field(default=2, description="To connect.")
    response: Seconds = Field(default=30, description="Until the head of the response.")
    idle: Seconds = Field(default=60, description="Between two parts of a body.")
    total: Seconds | None = Field(default=None, description="For the whole exchange. None: no limit.")
    tunnel: Seconds = Field(default=3600, description="How long a tunnel may be without a byte in either direction.")


class PoolSection(Section):
    """Limits of the connections to each target; tunnels are counted separately from requests.

    `idle_timeout` is shorter than the 5 seconds after which Node.js, uvicorn, Hypercorn and Apache close an idle
    connection: a request sent at that moment is lost. gunicorn closes after 2 seconds.
    """

    max_connections: int = Field(default=512, ge=1, description="Connections to each target.")
    max_tunnels: int = Field(default=4096, ge=1, description="WebSockets and event streams at once.")
    idle_timeout: Seconds = Field(
        default=4, description="Seconds; less if the upstream announces less by Keep-Alive: timeout."
    )
    max_requests: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Requests for which a connection is used."
    )
    max_age: Seconds | None = Field(default=None, description="Seconds after which a connection is not used again.")


class HealthCheckSection(Section):
    """Health checks of every target, with times in seconds. A check succeeds if its status is in `statuses`."""

    path: WholePath = Field(default="/health", description="The path that is requested.")
    interval: Seconds = Field(default=5, description="The time between two checks.")
    timeout: Seconds = Field(default=2, description="The longest time of a check.")
    healthy_threshold: int = Field(
        default=2, ge=1, description="Consecutive successes after which a target gets requests again."
    )
    unhealthy_threshold: int = Field(
        default=3, ge=1, description="Consecutive failures after which a target gets none."
    )
    statuses: list[StatusRange] = Field(
        default=["200-399"], min_length=1, description="Statuses of success, such as 204 or 200-399."
    )


class CircuitBreakerSection(Section):
    """When the upstream's circuit breaker opens and how it recovers; durations in seconds, see `BreakerPolicy`.

    `slow_call_duration` and `slow_call_rate` must be set together. `window_calls` selects a window of that many calls
    instead of `window` seconds. `jitter` is the share of the open time by which a breaker may stay open longer.
    """

    failure_threshold: int = Field(default=5, ge=1, description="Consecutive failures that open the breaker.")
    failure_rate: float = Field(
        default=0.5, gt=0, le=1, description="The share of failed calls in the window that opens it."
    )
    slow_call_duration: Seconds | None = Field(
        default=None,
        description="How long the head of a response takes at least in a slow call. None: no call is slow.",
    )
    slow_call_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="The share of slow calls in the window that opens it."
    )
    minimum_calls: int = Field(default=20, ge=1, description="Calls in the window without which no share opens it.")
    window: Seconds = Field(default=30, description="The length of the window.")
    window_calls: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        default=None, description="Instead of a time: the window is this many last calls."
    )
    recovery_timeout: Seconds = Field(
        default=30,
        description="How long it stays open before a probe is admitted.",
    )
    max_recovery_timeout: Seconds | None = Field(
        default=None, description="Double the time with each consecutive opening, up to this. None: do not."
    )
    jitter: float = Field(
        default=0.1, ge=0, le=1, description="The share of the open time by which it may stay open longer."
    )
    half_open_max_calls: int = Field(default=1, ge=1, description="Concurrent probes.")
    ramp: Duration = Field(
        default=10, ge=0, le=3600, description="Seconds until all traffic is admitted again; 0: at once."
    )
    per_target: bool = Field(
        default=True, description="Outlier detection: a breaker for each target beside the upstream's."
    )
    max_ejected_ratio: float = Field(
        default=0.5, ge=0, le=1, description="The largest share of ejected targets, rounded down."
    )


class BackoffSection(Section):
    """Backoff in seconds: the longest delay before the first retry, doubled for each further one, up to `cap`."""

    base: Duration = Field(default=0.025, ge=0, le=60, description="The longest delay before the first retry.")
    cap: Duration = Field(default=0.25, ge=0, le=60, description="The longest delay before any retry.")


class RetrySection(Section):
    """Attempts per request, the retry budget as a share of live requests (0: no retries), and what is retried."""

    attempts: int = Field(default=2, ge=1, le=10, description="Attempts for a request, the first included.")
    budget: float = Field(default=0.2, ge=0, le=1, description="Retries as a share of live requests. 0: none.")
    min_retries_per_second: Rate = Field(
        default=1, ge=0, le=1000, description="Retries that are permitted in addition to the budget."
    )
    backoff: BackoffSection = BackoffSection.defaults()
    max_retry_after: Duration = Field(
        default=1, ge=0, le=60, description="Seconds. If the upstream's Retry-After is longer, there is no retry."
    )
    statuses: list[RetriedStatus] = Field(
        default=[502, 503, 504], description="Statuses of responses that are retried."
    )
    max_body_bytes: Size = Field(
        default=65_536, ge=0, le=16_777_216, description="The longest request body that is kept for a retry."
    )


class AdaptiveSection(Section):
    """An adaptive limit: it keeps the latency near `tolerance` times the latency without a queue."""

    min_limit: int = Field(default=10, ge=1, le=1_000_000, description="The limit is never below this.")
    max_limit: int = Field(default=1000, ge=1, le=1_000_000, description="The limit is never above this.")
    tolerance: float = Field(
        default=1.4, ge=1.1, le=10, description="How many times the latency without a queue is accepted."
    )


class ConcurrencySection(Section):
    """The maximum of requests in flight at the upstream, for each process: a fixed limit, or an adaptive one."""

    limit: int | None = Field(default=None, ge=1, le=1_000_000, description="A fixed limit.")
    adaptive: AdaptiveSection | None = None


class TlsSection(Section):
    """PEM files for https targets: the trusted authorities instead of the system's, and the client certificate."""

    ca_file: FilePath | None = Field(default=None, description="Trusted authorities, instead of the system's.")
    cert_file: FilePath | None = Field(default=None, description="The client certificate.")
    key_file: FilePath | None = Field(default=None, description="The key of the client certificate.")


class UpstreamSection(Section):
    """An upstream, or the URL of its only target.

    `http2` requires the package h2, and targets that offer HTTP/2: there is no fall-back to HTTP/1.1.
    """

    shorthand: ClassVar[Shorthand | None] = Shorthand(lambda url: {"targets": [{"url": url}]}, _URL, _EXAMPLE)

    targets: list[TargetSection] = Field(
        min_length=1, description="The addresses of the upstream: each a section or a URL."
    )
    host_header: HostHeader = Field(
        default="target",
        description="The Host that the upstream gets: target (of the URL), client (as received), or a host itself.",
    )
    dns_refresh_interval: Annotated[Duration, Field(ge=1, le=86_400)] | None = Field(
        default=None, description="Seconds between resolutions of the targets' names."
    )
    balance: Literal["round_robin", "least_requests", "hash"] = Field(
        default="round_robin", description="How a target is selected for a request."
    )
    hash_on: str = Field(
        default="client",
        pattern=HASH_ON,
        description="The key of `balance: hash`: client, or header:X-Name.",
    )
    slow_start: Duration = Field(
        default=10,
        ge=0,
        le=86_400,
        description="Seconds until a target that returned to service has its full share; 0: at once.",
    )
    timeouts: TimeoutsSection = TimeoutsSection.defaults()
    pool: PoolSection = PoolSection.defaults()
    tls: TlsSection = TlsSection.defaults()
    http2: bool = Field(default=False, description="Whether targets get HTTP/2, which all must offer by TLS.")
    health_check: HealthCheckSection | None = None
    circuit_breaker: CircuitBreakerSection = CircuitBreakerSection.defaults()
    retry: RetrySection = RetrySection.defaults()
    concurrency: ConcurrencySection | None = None

    @property
    def uses_http2(self) -> bool:
        """True if `http2` has an effect: it needs TLS, by which a target offers HTTP/2."""
        return self.http2 and all(target.url.startswith("https:") for target in self.targets)
