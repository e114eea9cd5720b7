"""The section of an upstream as Python code builds it, `api_gateway.Upstream`: type checkers accept URLs as targets.

pydantic declares the arguments by the types of the fields, and a field whose type were a union would have to be
distinguished wherever it is read.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from api_gateway.settings.upstreams import (
    CircuitBreakerSection,
    ConcurrencySection,
    HealthCheckSection,
    PoolSection,
    RetrySection,
    TargetSection,
    TimeoutsSection,
    TlsSection,
    UpstreamSection,
)


class TypedUpstream(UpstreamSection):
    """An upstream of a `GatewayConfig`: its targets, as URLs or as `Target`, and how they are used."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            targets: Sequence[str | TargetSection],
            host_header: str = ...,
            dns_refresh_interval: float | None = ...,
            balance: Literal["round_robin", "least_requests", "hash"] = ...,
            hash_on: str = ...,
            slow_start: float = ...,
            timeouts: TimeoutsSection = ...,
            pool: PoolSection = ...,
            tls: TlsSection = ...,
            http2: bool = ...,
            health_check: HealthCheckSection | None = ...,
            circuit_breaker: CircuitBreakerSection = ...,
            retry: RetrySection = ...,
            concurrency: ConcurrencySection | None = ...,
        ) -> None: ...
