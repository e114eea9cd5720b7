"""The sections of upstreams: targets, timeouts, pools, health checks, circuit breakers, retries and limits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from api_gateway.settings.setting_types import (
    HASH_ON,
    OriginUrl,
    RetriedStatus,
    Seconds,
    Section,
    StatusRange,
    WholePath,
)

LONGEST_RECOVERY = 300  # seconds a breaker stays open at most, unless it is told otherwise


class TargetSection(Section):
    """One address of an upstream."""

    url: OriginUrl
    weight: int = Field(default=1, ge=1, le=100)


class TimeoutsSection(Section):
    """Seconds: to connect, until the answer's head, between pieces of a body, and for all of it (null: no limit).

    `tunnel` is how long a WebSocket may be silent both ways.
    """

    connect: Seconds = 2
    response: Seconds = 30
    idle: Seconds = 60
    total: Seconds | None = None
    tunnel: Seconds = 3600


class PoolSection(Section):
    """Connections to each target: those of requests, and beside them those of WebSockets and event streams."""

    max_connections: int = Field(default=512, ge=1)
    max_tunnels: int = Field(default=4096, ge=1, description="WebSockets and event streams at once.")
    idle_timeout: Seconds = 60


class HealthCheckSection(Section):
    """Active checks of every target. A status that is one of `statuses` is a good result."""

    path: WholePath = "/health"
    interval: Seconds = 5
    timeout: Seconds = 2
    healthy_threshold: int = Field(default=2, ge=1)
    unhealthy_threshold: int = Field(default=3, ge=1)
    statuses: list[StatusRange] = Field(default=["200-399"], min_length=1)


class CircuitBreakerSection(Section):
    """When the upstream's breaker opens and how it recovers; durations in seconds.

    `slow_call_duration` and `slow_call_rate` come together. `window_calls` counts the last so many calls instead of
    those of `window`. `jitter` is the share of its open time by which a breaker may stay open longer.
    """

    failure_threshold: int = Field(default=5, ge=1)
    failure_rate: float = Field(default=0.5, gt=0, le=1)
    slow_call_duration: Seconds | None = None
    slow_call_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    minimum_calls: int = Field(default=20, ge=1)
    window: Seconds = 30
    window_calls: Annotated[int, Field(ge=1, le=100_000)] | None = None
    recovery_timeout: Seconds = 30
    max_recovery_timeout: Seconds = LONGEST_RECOVERY
    jitter: float = Field(default=0.1, ge=0, le=1)
    half_open_max_calls: int = Field(default=1, ge=1)
    ramp: float = Field(default=10, ge=0, le=3600, description="Seconds until all traffic is back; 0 is at once.")
    per_target: bool = Field(default=True, description="A breaker of each target beside the upstream's own.")
    max_ejected_ratio: float = Field(default=0.5, ge=0, le=1, description="Share of the targets, rounded down.")

    @model_validator(mode="before")
    @classmethod
    def _reach(cls, given: Any) -> Any:
        """Let the longest recovery be no shorter than the first, unless both are given."""
        first = given.get("recovery_timeout") if isinstance(given, Mapping) else None
        if isinstance(first, int | float) and first > LONGEST_RECOVERY and "max_recovery_timeout" not in given:
            return {**given, "max_recovery_timeout": first}
        return given


class BackoffSection(Section):
    """Seconds of the longest pause before the second try, doubled with each one after it, and its bound."""

    base: float = Field(default=0.025, ge=0, le=60)
    cap: float = Field(default=0.25, ge=0, le=60)


class RetrySection(Section):
    """Tries per request in all, retries as a share of live requests (0: none), and what is tried again."""

    attempts: int = Field(default=2, ge=1, le=10)
    budget: float = Field(default=0.2, ge=0, le=1)
    min_retries_per_second: float = Field(
        default=1, ge=0, le=1000, description="Retries that are allowed in addition to the budget."
    )
    backoff: BackoffSection = BackoffSection()
    max_retry_after: float = Field(
        default=1, ge=0, le=60, description="An upstream that asks for a longer wait is not asked again."
    )
    statuses: list[RetriedStatus] = Field(default=[502, 503, 504])
    max_body_bytes: int = Field(default=65_536, ge=0, le=16_777_216, description="Kept of a body, to send it again.")


class AdaptiveSection(Section):
    """A limit found from the upstream's latency, which is held near `tolerance` times what it is without a queue."""

    min_limit: int = Field(default=10, ge=1, le=1_000_000)
    max_limit: int = Field(default=1000, ge=1, le=1_000_000)
    tolerance: float = Field(default=1.4, ge=1.1, le=10)


class ConcurrencySection(Section):
    """What each gateway process may have under way at the upstream at once: a fixed limit, or one that adapts."""

    limit: int | None = Field(default=None, ge=1, le=1_000_000)
    adaptive: AdaptiveSection | None = None


class TlsSection(Section):
    """PEM files for https targets: whom to trust instead of the system's store, and what to show of ourselves."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


class UpstreamSection(Section):
    """A service behind the gateway. `http2` speaks HTTP/2 to https targets that offer it (needs the package h2)."""

    targets: list[TargetSection] = Field(min_length=1)
    dns_refresh_interval: float | None = Field(
        default=None, ge=1, le=86_400, description="Seconds after which the names of targets are resolved anew."
    )
    balance: Literal["round_robin", "least_requests", "hash"] = "round_robin"
    hash_on: str = Field(
        default="client",
        pattern=HASH_ON,
        description="What `balance: hash` goes by: client, or header:X-Name.",
    )
    slow_start: float = Field(
        default=10, ge=0, le=86_400, description="Seconds over which a target that returns gets its full share."
    )
    timeouts: TimeoutsSection = TimeoutsSection()
    pool: PoolSection = PoolSection()
    tls: TlsSection = TlsSection()
    http2: bool = False
    health_check: HealthCheckSection | None = None
    circuit_breaker: CircuitBreakerSection = CircuitBreakerSection()
    retry: RetrySection = RetrySection()
    concurrency: ConcurrencySection | None = None
