"""The values that all layers share: quotas, decisions and exchanges, and the bases of bodies of operator endpoints.

Long because these values have nothing in common but their use by all layers.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict

HeaderList = list[tuple[bytes, bytes]]
Clock = Callable[[], float]  # monotonic seconds

NANOSECONDS = 1_000_000_000

KEY_PREFIX = "agw_"  # of API keys, see `clients.api_keys`

# Source of a decision: buckets in this process; the store; the cache of refusals that are certain by the store's last
# reading; or, while the store is unavailable, the policy for outages.
DecisionSource = Literal["memory", "store", "deny_cache", "local_share", "deny", "allow"]
WITHOUT_STORE: frozenset[DecisionSource] = frozenset({"local_share", "deny", "allow"})  # while it is unavailable

BreakerMode = Literal["auto", "observe", "forced_closed", "forced_open"]

# Source of a client's tier: a grant, a registration by the API, the configuration, the token that proves a client
# without any of these, or the default (id or address).
ClientSource = Literal["granted", "registered", "configured", "credential", "default", "address"]


@dataclass(frozen=True, slots=True)
class Quota:
    """Rate and capacity of a token bucket, with its times in integer nanoseconds.

    `rate` is tokens per second, `capacity` tokens. `name` is different for each quota of a configuration; `policy` is
    the name of the limit in responses, which the quotas of several tiers in one limit share. `emission_ns` is the
    refill time of one token, rounded up, so that rounding makes the limit stricter (by less than 1 ns per token).
    `burst_ns`, the budget, is the refill time of an empty bucket.
    """

    is_calendar: ClassVar[bool] = False  # True: an allowance in each period of a calendar, instead of a bucket

    name: str
    rate: float
    capacity: int
    emission_ns: int
    burst_ns: int
    policy: str = ""

    def __post_init__(self) -> None:
        if not self.policy:
            object.__setattr__(self, "policy", self.name.lower())

    @classmethod
    def per_second(cls, name: str, rate: float, capacity: int, policy: str = "") -> "Quota":
        """Return the quota of `rate` tokens per second and `capacity` tokens; ValueError unless both are > 0."""
        if not 0 < rate < math.inf or capacity <= 0:
            raise ValueError(f"quota {name!r}: rate and capacity must be > 0, got {rate!r} and {capacity!r}")
        emission_ns = math.ceil(NANOSECONDS / Fraction(str(rate)))
        return cls(name, rate, capacity, emission_ns, capacity * emission_ns, policy)

    def cost_ns(self, cost: float) -> int:
        """Return the refill time of `cost` tokens (>= 0, fractions allowed) in nanoseconds, rounded up."""
        return _cost_ns(self.emission_ns, cost)


@lru_cache(maxsize=4096)
def _cost_ns(emission_ns: int, cost: float) -> int:
    """Compute `Quota.cost_ns`; cached, because fractions are slow and different costs are few."""
    return math.ceil(Fraction(str(cost)) * emission_ns)


@dataclass(slots=True)
class Charge:
    """One bucket that a request is charged to: its key and quota, and the cost as refill time.

    In a cost settlement, an `increment_ns` below 0 is a refund. `own_cost` is the cost in tokens if it is that of the
    limit, whatever the request costs; None if it is that of the request. `is_unverified`: anyone could have invented
    the key, because it has the id of a client that is not registered, an address, or the value of a header field.
    """

    key: str
    quota: Quota
    increment_ns: int
    own_cost: float | None = None
    is_unverified: bool = False


class ConcurrencySlot(NamedTuple):
    """One of the requests that a concurrency limit allows in flight: of which key, and the limit's quota."""

    key: str
    quota: Quota


class AttemptFailure(NamedTuple):
    """An attempt that has failed, from `started` to `ended` in monotonic seconds.

    `status` is that of its response, if there was one; else `failure` is the reason and `detail` the error.
    """

    upstream: str
    target: str
    started: float
    ended: float
    status: int | None
    failure: str | None
    detail: str


class Notice(NamedTuple):
    """A client has reached a share of its allowance in the current period of a calendar quota.

    `policy` names the quota in responses. `remaining` are whole tokens, and `seconds` the time until the period ends.
    """

    policy: str
    share: float
    remaining: int
    seconds: int


@dataclass(slots=True)
class Decision:
    """The result of the limiter for one request: that of its tightest bucket, or of the one that refuses longest.

    The tightest bucket is the one that has tokens for the fewest further such requests. `remaining` is the number of
    whole tokens after the decision. `wait_ns` is 0 if allowed, else the exact time until the same request would be
    allowed, or -1 if it never would because it costs more than `quota.capacity`. `reset_ns` is the time until the
    bucket is full. `settle` needs `at_ns`, the time of the decision on the clock of the buckets, and `debts_ns`, the
    times until each charged bucket is full; it is empty for one bucket, and `reset_ns` is its time. `violated` are the
    quotas of all buckets that refuse, if there are several buckets. `wall_us`, in microseconds since the epoch, is the
    time that decided which calendar period it was; only counters of this process set it. `processes` is set of a
    decision on a share of the limits alone: so many processes share them. Its times are those of whole buckets, to
    which that many times the cost is charged (`share_increment`). `left` is what each counter of a calendar quota has
    left, in thousandths of a token, in the order of the charges; only decisions on counters have it.
    """

    key: str
    quota: Quota
    allowed: bool
    remaining: int
    wait_ns: int
    reset_ns: int
    at_ns: int = field(default=0, compare=False)
    debts_ns: tuple[int, ...] = field(default=(), compare=False)
    source: DecisionSource = "memory"
    violated: tuple[Quota, ...] = ()
    notices: tuple[Notice, ...] = ()
    wall_us: int = field(init=False, repr=False, compare=False)
    processes: int = field(init=False, repr=False, compare=False)
    left: tuple[int, ...] = field(init=False, repr=False, compare=False)

    @property
    def retry_after(self) -> float | None:
        """Seconds until the same request would be allowed, never too few; None if it is allowed or never would be."""
        if self.wait_ns <= 0:
            return None
        if self.wait_ns < _EXACT_NS:
            return self.wait_ns / NANOSECONDS
        whole, rest_ns = divmod(self.wait_ns, NANOSECONDS)
        seconds = self.wait_ns / NANOSECONDS
        return (
            math.nextafter(whole, math.inf) if rest_ns and seconds == whole else seconds
        )  # for waits of months, a double may have lost the nanoseconds


def processes_of(decision: Decision) -> int:
    """Return how many processes share the limits of a decision; 1 if it is on the whole limits."""
    return sharing_processes(decision) or 1


def sharing_processes(decision: Decision) -> int | None:
    """Return how many processes share the limits of a decision on a share, also if it is 1; None of another one."""
    processes: int | None = getattr(decision, "processes", None)
    return processes


def share_increment(increment_ns: int, burst_ns: int, processes: int) -> int:
    """Return the charge to a whole bucket that corresponds to a charge to one of `processes` shares.

    A cost that exceeds the capacity of a share is charged as that capacity; one that exceeds the bucket's is never
    allowed, and is not changed.
    """
    if increment_ns > burst_ns:
        return increment_ns
    return max(min(increment_ns * processes, burst_ns), -burst_ns)


_EXACT_NS = 1 << 51  # 26 days; below it, a double of seconds differs for each nanosecond


@dataclass(frozen=True, slots=True)
class Client:
    """The client of a request. `key` is the key of its bucket, `source` the source of its tier.

    `has_keys`: API keys were created for the client. `is_verified_only`: a credential must prove its id.
    """

    id: str
    key: str
    quota: Quota
    source: ClientSource
    has_keys: bool = False
    is_verified_only: bool = False

    @property
    def is_registered(self) -> bool:
        """True if the id has a grant or keys, is registered by the API or the configuration, or proved by a token."""
        return self.source in ("granted", "registered", "configured", "credential") or self.has_keys


class Credential(Protocol):
    """The credential that proved the id of a client, as the record of an exchange needs it."""

    organisation: str | None  # the client's organisation, if the credential states one
    fields: HeaderList  # that upstreams receive


@dataclass(frozen=True, slots=True)
class LimiterState:
    """The current source of decisions, and the figures of the store if there is one.

    `gateway_processes` is the number of processes among which limits are divided while the store is unavailable. The
    store executed `operations` in `calls`; `failures` counts calls without a response in time, and failed attempts to
    connect. `evicted_keys` counts all keys that the store has evicted for lack of memory since its start. `warning`
    is a condition of the store that makes limits inexact.
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
        """True while limits are exact and there is no warning."""
        return self.decision_source in ("memory", "store") and self.warning is None


class Outcome(Enum):
    """How an attempt counts for the circuit breaker of its upstream."""

    SUCCESS = "success"
    FAILURE = "failure"
    IGNORED = "ignored"  # the client disconnected, or caused the error


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity, which makes it a cheap key
class CorsFields:
    """The CORS fields of a response, see `proxy.cors`.

    `pairs` are all of them, and `lines` the same in HTTP/1.1 format, each with its line break. `allowed` are those
    that decide about the origin, `exposed` the names that pages may read (None: none); `varies` is whether the
    response depends on the origin.
    """

    lines: bytes
    pairs: tuple[tuple[bytes, bytes], ...]
    allowed: tuple[tuple[bytes, bytes], ...]
    exposed: bytes | None
    varies: bool


@dataclass(frozen=True, slots=True)
class Settlement:
    """A change of the cost of an exchange, in tokens, at `at_ns` of the monotonic clock.

    `decision` and `charged` are decision and cost before the change.
    """

    at_ns: int
    number: int
    decision: Decision
    charged: float
    cost: float


# The beginning of an attempt, as its span has it: upstream, URL of the target, request target, state of the upstream's
# circuit breaker, and monotonic seconds. How it ended is in the record of the exchange. A tuple, because each traced
# request makes one.
AttemptTrace = tuple[str, str, bytes, Enum, float]

# Where the header line `traceparent`, after a line break, has its parts.
TRACE_ID, SPAN_ID, TRACE_FLAGS = slice(18, 50), slice(51, 67), slice(68, 70)


class Trace:
    """The trace context of an exchange (W3C Trace Context), and its attempts.

    `fields` are the header lines for the upstream of the current attempt, each after a line break: `traceparent`, and
    `tracestate` if the client has sent one, which is `state`. `parent_id` is the span of the client, empty if the
    trace begins here; `link` are trace and span of a client whose trace is not continued. `host`, `scheme` and
    `version` are those of the request. `attempt` is the current one, `earlier` have failed; `next_attempt` comes
    between. The exchange's own span gets its id when it is encoded.

    Not a dataclass: attributes that few traces need are defaults on the class, so an unsampled trace does not set
    them.
    """

    fields = b""
    is_sampled = False
    state = b""
    link: tuple[str, str] | None = None
    parent_id = ""
    host = ""
    scheme = "http"
    version = "1.1"
    attempt: AttemptTrace | None = None
    earlier: tuple[tuple[bytes, AttemptTrace], ...] = ()  # with `fields`

    def __repr__(self) -> str:
        return f"<Trace {self.trace_id} [{self.fields[TRACE_FLAGS].decode()}, {len(self.attempts())} attempts]>"

    @property
    def trace_id(self) -> str:
        """The id of the trace, in lower-case hexadecimal."""
        return self.fields[TRACE_ID].decode("ascii")

    def attempts(self) -> tuple[tuple[bytes, AttemptTrace], ...]:
        """Return all attempts, with the fields that they sent."""
        return self.earlier if self.attempt is None else (*self.earlier, (self.fields, self.attempt))

    def next_attempt(self) -> None:
        """End the current attempt: the next one has a span of its own."""
        self.earlier, fields = self.attempts(), self.fields
        self.attempt = None
        self.fields = fields[: SPAN_ID.start] + secrets.token_hex(8).encode() + fields[SPAN_ID.stop :]


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """The verified certificate of a client's connection.

    `names` are its names by kind: `uri`, `dns`, `email`, `common_name`, `subject`. `not_after` is in seconds since the
    epoch.
    """

    names: tuple[tuple[str, str], ...]
    not_after: float

    def first(self, kind: str) -> str | None:
        """Return the first name of a kind, None if there is none."""
        return next((name for known, name in self.names if known == kind), None)


@dataclass(slots=True)
class Exchange:
    """The record of one exchange; access log and metrics are derived from it alone.

    Times are monotonic seconds. Fields are set phase by phase: client, route, decision, attempts, response.
    `credential` is what proved the client's id, if anything (`proxy.identity_sources.Proof`).
    `status` is that of the response, 499 if the client disconnected before it; `source` is the origin of the response.
    `charges` are those of `decision`; `candidate` has charges and decision of the candidate limits. `has_begun`: a
    connection to an upstream was opened or attempted; `has_reached`: a part of the request may have reached an
    upstream that then failed. `shed_by` has the upstreams that refused because of load (None: the gateway). `retried`
    has the causes of retries. `fallback` is the fallback that responded instead of the route's upstream; `reason` and
    `detail` are then those of the upstream's failure. `cors` has the CORS fields of any response, None if the route
    has no policy. `number` is that of the decision (`observability.decision_numbers`), 0 if decisions are not
    numbered; `settlements` are changes of its cost, `failures` are the attempts that have failed, and
    `credential_check` is the charge of the address for the verification of a credential.
    """

    id: str
    method: str
    path: str
    client_address: str
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
    charges: Sequence[Charge] = ()
    candidate: tuple[Sequence[Charge], Decision] | None = None
    has_reached: bool = False
    has_begun: bool = False
    retried: tuple[str, ...] = ()
    fallback: str | None = None
    shed_by: tuple[str | None, ...] = ()
    cors: CorsFields | None = None
    credential: Credential | None = None
    number: int = 0
    settlements: tuple[Settlement, ...] = ()
    failures: tuple[AttemptFailure, ...] = ()
    credential_check: tuple[int, Decision] | None = None  # number and decision
    trace: Trace | None = None  # None if tracing is off
    slots: tuple[ConcurrencySlot, ...] = ()  # of concurrency limits, held until the end of the exchange

    @property
    def client_key(self) -> str:
        """Key of the client's bucket; empty before the client is identified."""
        return self.client.key if self.client is not None else ""

    @property
    def duration(self) -> float:
        """Seconds from the arrival of the request to the end of the response."""
        return self.finished - self.started

    @property
    def upstream_duration(self) -> float | None:
        """Seconds from the last attempt to the head of its response; None if there was none."""
        return None if self.sent_at is None or self.head_at is None else self.head_at - self.sent_at


# Bodies of the operator endpoints


class Body(BaseModel):
    """Base of all bodies. Immutable; unknown fields are an error."""

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


def _has_utc(time: datetime) -> datetime:
    if not _FIRST_TIME <= time <= _LAST_TIME:
        raise ValueError("must be from 1970-01-01T00:00:00Z to 9999-12-31T23:59:59Z")
    return time


_FIRST_TIME, _LAST_TIME = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
Instant = Annotated[AwareDatetime, AfterValidator(_has_utc)]  # can be shown in UTC, and as seconds since the epoch
