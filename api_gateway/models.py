"""The vocabulary every layer shares: plain values of one request, and the bodies that speak of clients."""

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
DecisionSource = Literal["memory", "store", "deny_cache", "local_share", "deny", "allow"]

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
    source: DecisionSource = "memory"

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

    `gateway_processes` is how many share a bucket while the store cannot be used; the store executed `operations` in
    so many `calls`, and `failures` are calls without a response in time, and attempts to connect. `evicted_keys` are
    those the store has evicted for lack of memory since it began, buckets or not.
    """

    decision_source: DecisionSource = "memory"
    gateway_processes: int = 1
    calls: int = 0
    operations: int = 0
    failures: int = 0
    last_error: str | None = None
    evicted_keys: int = 0
    warning: str | None = None

    @property
    def is_whole(self) -> bool:
        """True while limits are exact, and nothing is known that will make them otherwise."""
        return self.decision_source in ("memory", "store") and self.warning is None


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
    reached an upstream that then failed, `has_begun` that a connection was opened for it, or the attempt to, `shed_by`
    who had too much under way (None: this gateway). `retried` are the causes of the tries that were repeated,
    `fallback` who answered in the place of the route's upstream, with `reason` and `detail` of why.
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
    response_headers: HeaderList = field(default_factory=list)
    charges: Sequence[Charge] = ()
    trial: tuple[Sequence[Charge], Decision] | None = None
    has_reached: bool = False
    has_begun: bool = False
    retried: tuple[str, ...] = ()
    fallback: str | None = None
    shed_by: tuple[str | None, ...] = ()

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


class RequestBody(Body):
    """Base of the bodies that operators send. The limit on text is what makes lone surrogates a mistake, too."""

    model_config = ConfigDict(str_max_length=65_536)


class TierChange(RequestBody):
    """The body of POST /clients/{id}/tier."""

    tier: str = Field(description="Name of a configured tier, in any case.", examples=["PREMIUM"])


class GrantRequest(RequestBody):
    """The body of POST /clients/{id}/grants: a tier, and either until when or for how long."""

    tier: str = Field(description="Name of a configured tier, in any case.", examples=["PREMIUM"])
    until: AwareDatetime | None = Field(
        default=None, description="When it ends, ISO 8601 with its offset.", examples=["2026-12-01T00:00:00Z"]
    )
    duration_seconds: float | None = Field(default=None, description="How long it lasts.", gt=0, le=3_200_000_000)


class TierView(Body):
    """A tier and its terms."""

    name: str
    rate: float = Field(description="Tokens refilled per second.")
    capacity: int = Field(description="Tokens a full bucket holds.")


class BucketView(Body):
    """A client's bucket at this moment."""

    tokens: float = Field(description="Tokens in the bucket now.")
    capacity: int
    reset_after_seconds: float = Field(description="Time until the bucket is full.")


class GrantView(Body):
    """A tier that a client has for a while."""

    tier: str
    until: str = Field(description="UTC, ISO 8601, by the clock of each gateway's machine.")
    tier_after: str = Field(description="Name of the tier that the client returns to.")


class ClientView(Body):
    """A client, its tier and its bucket."""

    client_id: str
    tier: TierView
    tier_source: Literal["granted", "registered", "configured", "default"] = Field(
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


class HeavyClient(Body):
    """A client and how often it came; each true count lies between the count less its error bound, and the count."""

    client_id: str
    tier_source: ClientSource
    tier: str
    limited: int
    limited_error_bound: int
    requests: int
    requests_error_bound: int


class HeavyClients(Body):
    """The heaviest clients, the heaviest first."""

    sort: Literal["limited", "requests"]
    clients: list[HeavyClient]
