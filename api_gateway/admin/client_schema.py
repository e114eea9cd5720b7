"""The bodies of the endpoints at `/clients`, except those of `/clients/{id}/keys`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field

from api_gateway.admin.request_schema import RequestBody
from api_gateway.models import (
    NANOSECONDS,
    Body,
    ClientSource,
    Decision,
    Instant,
    Quota,
    processes_of,
    sharing_processes,
)

SharingProcesses = Annotated[
    int | None,
    Field(
        description="While the store is unavailable: the number of processes that share the limit. Tokens and capacity"
        " are then those of the share of the worker that responds. null: they are those of the whole limit."
    ),
]
SharingWorkers = Annotated[
    int | None,
    Field(
        description="While the store is unavailable: the number of processes that share the limit. The requests in"
        " flight are then those of the worker that responds, and by `local_share` the maximum is that of its share."
        " null: they are those of all workers."
    ),
]


class TierChange(RequestBody):
    """The body of POST /clients/{id}/tier."""

    tier: str = Field(description="Name of a configured tier, in any case.", examples=["PREMIUM"])


class GrantRequest(RequestBody):
    """The body of POST /clients/{id}/grants: a tier, and either its end or its duration."""

    tier: str = Field(description="Name of a configured tier, in any case.", examples=["PREMIUM"])
    until: Instant | None = Field(
        default=None, description="End of the grant, ISO 8601 with UTC offset.", examples=["2026-12-01T00:00:00Z"]
    )
    duration_seconds: float | None = Field(default=None, description="Duration of the grant.", gt=0, le=3_200_000_000)


class TierView(Body):
    """A tier with its quota."""

    name: str
    rate: float = Field(description="Tokens added per second.")
    capacity: int = Field(description="Maximum number of tokens in a bucket.")


def tokens_of(quota: Quota, reset_ns: int, processes: int | None = None) -> float:
    """Return the tokens in a bucket that is full in `reset_ns`; of a share of it, if so many `processes` share it."""
    return round((quota.burst_ns - reset_ns) / quota.emission_ns / (processes or 1), 3)


class BucketView(Body):
    """The current state of a client's bucket."""

    tokens: float = Field(description="Tokens in the bucket now.")
    capacity: int | float = Field(description="Tokens; of a share: capacity / `processes`.")
    processes: SharingProcesses = None
    reset_after_seconds: float = Field(description="Time until the bucket is full.")

    @classmethod
    def of(cls, quota: Quota, decision: Decision, **others: Any) -> Self:
        """Return the view of a bucket by its decision on cost 0; `others` are further members."""
        processes = processes_of(decision)
        return cls(
            tokens=tokens_of(quota, decision.reset_ns, processes),
            capacity=quota.capacity if processes == 1 else round(quota.capacity / processes, 6),
            processes=sharing_processes(decision),
            reset_after_seconds=round(decision.reset_ns / NANOSECONDS, 3),
            **others,
        )


class LimitBucketView(BucketView):
    """The current state of a client's bucket of a limit."""

    limit: str
    route: str | None = Field(description="null unless the limit counts by client and route.")


class SlotView(Body):
    """The requests of a client that are in flight, as a concurrency limit counts them."""

    limit: str
    route: str | None = Field(description="null unless the limit counts by client and route.")
    in_flight: int
    concurrent: int = Field(description="Maximum number of requests in flight.")
    processes: SharingWorkers = None


class GrantView(Body):
    """A grant in force: its tier, its end, and the tier afterwards."""

    tier: str
    until: str = Field(description="UTC, ISO 8601; each gateway ends the grant by its own clock.")
    tier_after: str = Field(description="Name of the client's tier after the grant.")


class ClientView(Body):
    """A client, its tier and its bucket."""

    client_id: str
    tier: TierView
    tier_source: Literal["granted", "registered", "configured", "default"] = Field(
        description="Source of the tier: a grant, a registration by this API, the configuration, or the default."
    )
    grant: GrantView | None
    verified_only: bool = Field(description="True if a credential must prove the id; else anyone can claim it.")
    confirmed: bool = Field(
        description="False if the client store is unavailable: then the values are those in this gateway's memory."
    )
    bucket: BucketView
    limits: list[LimitBucketView] = Field(
        default=[], description="Buckets of limits that count by client, or by client and route."
    )
    concurrency: list[SlotView] = Field(
        default=[], description="Concurrency limits that count by client, or by client and route."
    )


class TierChanged(Body):
    """The result of a change of tier. The bucket keeps its filled fraction."""

    client_id: str
    previous: TierView
    current: TierView
    tokens_before: float
    tokens_after: float
    processes: int | None = Field(
        default=None,
        exclude_if=lambda processes: processes is None,
        description="While the store is unavailable: the number of processes that share the limit. The tokens are then"
        " those of the share of the worker that responds. Absent: they are those of the whole limit.",
    )
    persisted: bool = Field(description="True if the change is stored and survives a restart.")
    effective: Literal["immediately"] = "immediately"


class GrantChanged(TierChanged):
    """The result of a grant or of its end. The bucket keeps its filled fraction."""

    until: str | None = Field(description="End of the grant, UTC, ISO 8601; null if there is none.")


class LimitReset(Body):
    """The result of filling a client's bucket of a limit."""

    limit: str
    route: str | None
    tokens_before: float
    tokens_after: float
    processes: SharingProcesses = None


class BucketReset(Body):
    """The result of filling a client's buckets."""

    client_id: str
    tier: TierView
    tokens_before: float
    tokens_after: float
    processes: SharingProcesses = None
    limits: list[LimitReset] = Field(
        default=[], description="Buckets of limits that count by client, or by client and route."
    )


class HeavyClient(Body):
    """A client with its counts. A true count is at most the count shown, and at least that minus its error bound."""

    client_id: str
    tier_source: ClientSource
    tier: str
    limited: int
    limited_error_bound: int
    requests: int
    requests_error_bound: int
    bare: int = Field(
        description="Requests that claimed the client's id without a credential, although the client has or needs one."
    )
    bare_error_bound: int


class RegisteredClient(Body):
    """A registered client, and its tier."""

    client_id: str
    tier: str
    tier_source: ClientSource
    grant_until: str | None = Field(description="End of the grant, UTC, ISO 8601; null without a grant in force.")
    keys: int = Field(description="API keys created by this API.")
    verified_only: bool


class RegisteredClients(Body):
    """A page of all registered clients: those of the configuration, then those that only the client store has."""

    clients: list[RegisteredClient]
    next: str | None = Field(description="`after` of the next page; null: this is the last one.")


class HeavyClients(Body):
    """The heaviest clients, highest count first."""

    sort: Literal["limited", "requests", "bare"]
    clients: list[HeavyClient]
