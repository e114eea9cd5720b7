"""The bodies of `POST /explain`: a described request, and the explanation with all figures behind it."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from api_gateway.admin.client_schema import SharingProcesses, SharingWorkers, TierView
from api_gateway.admin.request_schema import RequestBody
from api_gateway.ip_addresses import parse_address
from api_gateway.models import Body, ClientSource, DecisionSource, Instant


class DescribedCertificate(RequestBody):
    """A certificate of the client's connection, by the names that can be a client id; null: none of the kind."""

    uri: str | None = Field(default=None, description="First alternative name of the kind URI.")
    dns: str | None = Field(default=None, description="First alternative name of the kind DNS.")
    email: str | None = Field(default=None, description="First alternative name of the kind email.")
    common_name: str | None = Field(default=None, description="Common name of the subject.", examples=["Jane Doe"])
    subject: str | None = Field(default=None, description="The whole subject.", examples=["CN=Jane Doe,O=Example"])
    not_after: Instant | None = Field(default=None, description="End of its validity; null: it is valid.")


def _address(text: str) -> str:
    try:
        parse_address(text)
    except ValueError:
        raise ValueError("must be an IPv4 or IPv6 address") from None
    return text


class ExplainRequest(RequestBody):
    """The body of POST /explain: the request to explain, by default a GET from this machine."""

    client_id: str | None = Field(description="Value of the header that names clients; null if it is absent.")
    key_id: str | None = Field(
        default=None, description="Id of an API key, as if the request had that key; null: it has none."
    )
    method: str = Field(
        default="GET",
        max_length=255,
        pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$",
        description="A token; upper and lower case differ (RFC 9110 section 9.1).",
    )
    path: str = Field(
        max_length=65_536,
        pattern=r"^/[\x21-\x7e]*$",
        description="Path and query as in the request line.",
        examples=["/api/users"],
    )
    host: str = Field(default="", max_length=255, description="Value of Host, for routes that require one.")
    address: Annotated[str, Field(max_length=64), AfterValidator(_address)] = Field(
        default="127.0.0.1", description="Address of the peer."
    )
    forwarded: str | None = Field(
        default=None,
        max_length=8_192,
        pattern=r"^[\x20-\x7e]*$",
        description="Value of the field in which trusted proxies report clients: `server.forwarded.read`.",
        examples=["203.0.113.9, 10.0.0.2"],
    )
    headers: dict[str, Annotated[str, Field(max_length=8_192, pattern=r"^[\x20-\x7e]*$")]] = Field(
        default={},
        description="Header fields that limits count by, or that routes depend on.",
        examples=[{"X-Tenant": "acme"}],
    )
    organisation: str | None = Field(default=None, description="That of the request's token, for limits.")
    claims: dict[str, str] = Field(default={}, description="Claims of the request's token by path, for limits.")
    certificate: DescribedCertificate | None = Field(
        default=None, description="As if TLS had verified this certificate on the connection; null: it has none."
    )


class AddressExplained(Body):
    """The client's address, and the hop that it came from."""

    address: str
    field: Literal["x-forwarded-for", "forwarded"] | None = Field(
        description="The field that reports it; null if it is the peer of the connection."
    )
    position: int | None = Field(description="Number of the element in that field, from the right, beginning with 1.")
    reported_by: str | None = Field(description="Address of the trusted proxy that wrote the element.")
    detail: str


class ClientExplained(Body):
    """The client that the request has, how it was identified, and its tier."""

    id: str
    tier_source: ClientSource
    detail: str = Field(description="How the client was identified, and the source of its tier.")
    registered: bool = Field(description="True if the client is registered, configured or has a grant.")
    proved_by: str | None = Field(description="Source that proves the id, such as `api_key`; null: nothing does.")
    verified_only: bool = Field(description="True if a credential must prove the id; else anyone can claim it.")
    address_limited: bool = Field(
        description="True if the address limit applies too: not for registered clients and exempt addresses."
    )
    tier: TierView


class RouteExplained(Body):
    """The route of the request, and its cost in tokens."""

    name: str
    path: str
    match: str = Field(default="prefix", description="How the path is compared: prefix, exact or template.")
    host: str | None = Field(default=None, description="The host of the route; null: any.")
    conditions: list[str] = Field(default=[], description="What the request must have besides host, path and method.")
    upstream: str | None = Field(description="The upstream for this client; null if the route responds itself.")
    destination: str = Field(
        description="What responds, in words: the upstream, or the status of the route's own response, and where a"
        " redirect of this request leads."
    )
    cost: float
    cost_source: str = Field(
        description="`route`, the rule of the route that sets the cost, `extension`, or another reading of an"
        " unusual path."
    )


class PassedOver(Body):
    """A route for the host and path of the request that precedes its route and does not match."""

    name: str
    detail: str = Field(description="The conditions that do not hold, or the methods that it takes.")


class BucketExplained(Body):
    """The current state of one bucket from which the request takes tokens."""

    key: str
    policy: str = Field(description="Name of the quota in RateLimit and RateLimit-Policy.")
    tokens: float = Field(description="Tokens now; negative after a cost settlement that exceeded them.")
    capacity: int | float = Field(description="Tokens; of a share: capacity / `processes`.")
    processes: SharingProcesses = None
    cost: float
    allowed: bool = Field(description="True if the bucket has enough tokens now.")
    retry_after_seconds: float | None = Field(
        description="Time until the bucket allows this request; 0: now, null: never."
    )
    reset_after_seconds: float = Field(description="Time until the bucket is full.")


class SlotExplained(Body):
    """The requests in flight that a concurrency limit counts together with this one."""

    key: str
    policy: str = Field(description="Name of the limit.")
    in_flight: int
    concurrent: int = Field(description="Maximum number of requests in flight.")
    processes: SharingWorkers = None
    allowed: bool = Field(description="True if the limit admits another request now.")


class LimitExplained(Body):
    """A limit that does not apply to the request."""

    name: str
    detail: str = Field(description="Why it does not apply.")


class UpstreamExplained(Body):
    """The upstream: breaker, targets and concurrency in the worker that responds."""

    name: str
    circuit_breaker: Literal["CLOSED", "OPEN", "HALF_OPEN"] = Field(
        description="State of its breaker in the worker that responds, which decides."
    )
    workers: dict[str, Literal["CLOSED", "OPEN", "HALF_OPEN"]] | None = Field(
        default=None, description="State in each worker if there are several; they decide by their own."
    )
    next_probe_in_seconds: float | None = Field(description="Time until a probe is admitted; null unless OPEN.")
    targets: int = Field(description="Number of targets.")
    healthy_targets: int = Field(description="Number of targets that pass their health checks.")
    unchecked_targets: int = Field(
        description="Number of targets without a health check result yet; they receive requests."
    )
    concurrency: "ConcurrencyExplained | None" = Field(description="null if the upstream has no concurrency limit.")


class ConcurrencyExplained(Body):
    """The concurrency limit of the upstream, and its requests in flight, in the worker that responds."""

    limit: float
    tier_limit: int = Field(description="Requests of this tier are admitted while fewer are in flight.")
    in_flight: int
    allowed: bool


class LagExplained(Body):
    """The event loop lag of the worker that responds."""

    lag_seconds: float
    shed_ratio: float = Field(description="Share of this tier's requests that load shedding refuses now, 0 to 1.")


class FallbackExplained(Body):
    """The fallback, and whether it would respond now."""

    name: str = Field(description="`static`, or the name of the other upstream.")
    status: int | None = Field(description="Status of the static response; null if the fallback is an upstream.")
    used: bool = Field(description="True if the fallback would be used now, because the upstream is not available.")


class ExplainedResult(Body):
    """The decision. `status` and `reason` are those of the response that the gateway would generate, else null.

    A route with a static response or a redirect has the decision `allowed` with the status of that response. With
    decision `fallback`, `reason` is why the fallback is used, and `status` that of a static fallback.
    """

    decision: Literal["allowed", "limited", "exceeds_capacity", "refused", "fallback"]
    status: int | None
    reason: str | None
    retry_after_seconds: float | None = Field(description="Time until the request would be allowed, if known.")
    detail: str


class ExtensionExplained(Body):
    """The result of a hook of an extension for the described request."""

    extension: str
    hook: Literal["identify", "cost", "on_request", "on_response"]
    result: str = Field(description="The result, or why the hook was not called.")


class Explanation(Body):
    """The response of `POST /explain`."""

    result: ExplainedResult
    worker: str | None = Field(
        default=None,
        description="Number of the worker that responds, if there are several. Breaker, concurrency of the upstream,"
        " load and, while the store is unavailable, the limits are its own; another worker may decide otherwise.",
    )
    address: AddressExplained
    client: ClientExplained
    route: RouteExplained | None
    routes_passed_over: list[PassedOver] = Field(
        default=[], description="Routes for its host and path that come before its route, by precedence."
    )
    buckets: list[BucketExplained]
    limiting_bucket: str = Field(
        description="Key of the bucket that refuses longest or, if all allow, has tokens for the fewest such requests."
    )
    concurrency: list[SlotExplained] = Field(default=[], description="Concurrency limits that apply to the request.")
    limits_not_applied: list[LimitExplained] = Field(default=[], description="Other limits of the configuration.")
    candidate: BucketExplained | None = Field(description="Bucket of the candidate limits; it refuses nothing.")
    candidate_concurrency: list[SlotExplained] = Field(
        default=[], description="The concurrency limits with their candidates, which refuse nothing."
    )
    upstream: UpstreamExplained | None
    fallback: FallbackExplained | None
    event_loop: LagExplained
    decision_source: DecisionSource = Field(description="Source of the bucket figures.")
    extensions: list[ExtensionExplained] = Field(default=[], description="What extensions say about the request.")
