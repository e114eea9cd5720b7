"""The bodies of `POST /explain`: a question, and every figure its answer rests on."""

from typing import Literal

from pydantic import Field

from api_gateway.models import Body, ClientSource, DecisionSource, RequestBody, TierView


class ExplainRequest(RequestBody):
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
    tier_source: ClientSource
    detail: str = Field(description="What names it, and where its tier comes from.")
    registered: bool = Field(description="True if an operator vouches for it.")
    address_limited: bool = Field(
        description="True if its address is limited too: not for a registered client, nor for an exempt address."
    )
    tier: TierView


class RouteExplained(Body):
    """The route, and what the request costs."""

    name: str
    path: str
    upstream: str
    cost: float
    cost_source: str = Field(description="`route`, or the rule of the route that says what it costs.")


class BucketExplained(Body):
    """One bucket that the request draws on, as it is now."""

    key: str
    policy: str = Field(description="The name of its quota in RateLimit and RateLimit-Policy.")
    tokens: float = Field(description="Tokens now; below 0 while it owes what was settled later.")
    capacity: int
    cost: float
    allowed: bool = Field(description="True if the bucket holds the cost now.")
    retry_after_seconds: float | None = Field(description="Time until this request passes; 0 now, null never.")
    reset_after_seconds: float = Field(description="Time until the bucket is full.")


class UpstreamExplained(Body):
    """Where the request would go."""

    name: str
    circuit_breaker: Literal["CLOSED", "OPEN", "HALF_OPEN"]
    next_probe_in_seconds: float | None = Field(description="Time until a probe is admitted; null unless OPEN.")
    targets: int = Field(description="Number of its targets.")
    healthy_targets: int = Field(description="Targets that pass their health checks.")
    unchecked_targets: int = Field(description="Targets without the result of a health check; they get requests.")
    concurrency: "ConcurrencyExplained | None" = Field(description="null if the upstream has no limit.")


class ConcurrencyExplained(Body):
    """What may be under way at the upstream, and what is, in the worker that was asked."""

    limit: float
    tier_limit: int = Field(description="Requests of this tier are admitted while fewer are under way.")
    in_flight: int
    allowed: bool


class LagExplained(Body):
    """How late the event loop of the worker runs that was asked."""

    lag_seconds: float
    shed_ratio: float = Field(description="Share of this tier's requests that is refused for it now, 0 to 1.")


class FallbackExplained(Body):
    """What answers if the upstream cannot."""

    name: str = Field(description="`static`, or the upstream that is asked instead.")
    status: int | None = Field(description="Of the static answer; null where an upstream gives it.")
    used: bool = Field(description="True if it would answer now, because the upstream would not be tried.")


class Verdict(Body):
    """What would come of the request: `status` and `reason` are those of the answer the gateway would make itself.

    Where a fallback would answer, `reason` is why, and `status` the static answer's.
    """

    outcome: Literal["allowed", "limited", "exceeds_capacity", "refused", "fallback"]
    status: int | None
    reason: str | None
    retry_after_seconds: float | None = Field(description="Time until it passes, as far as that is known.")
    detail: str


class Explanation(Body):
    """The answer to a question, and every figure it rests on."""

    result: Verdict
    client: ClientExplained
    route: RouteExplained | None
    buckets: list[BucketExplained]
    limiting_bucket: str = Field(
        description="Key of the bucket that refuses longest, or takes the fewest such requests more."
    )
    candidate: BucketExplained | None = Field(description="The bucket that is tried beside them; it limits nobody.")
    upstream: UpstreamExplained | None
    fallback: FallbackExplained | None
    event_loop: LagExplained
    decision_source: DecisionSource = Field(description="What the figures rest on.")
