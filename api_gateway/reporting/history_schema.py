"""The schemas of the history of requests."""

from typing import Literal

from pydantic import Field

from api_gateway.models import Body, ClientSource, DecisionSource


class RequestRecord(Body):
    """One of the last requests. It has no values of the query and of header fields."""

    number: int = Field(description="Order of the ends of requests.")
    time: str = Field(description="End of the request, UTC, ISO 8601.")
    request_id: str
    trace_id: str | None = Field(description="Id of its trace (W3C Trace Context); null if tracing is off.")
    result: Literal["success", "refusal", "error"]
    client_id: str | None = Field(description="null if the client was not identified.")
    client_address: str
    tier: str | None
    tier_source: ClientSource | None
    method: str
    path: str = Field(description="Without query; at most 2,000 characters.")
    status: int = Field(description="499 if the client disconnected before the response.")
    reason: str | None
    detail: str | None
    source: Literal["gateway", "upstream"] = Field(description="Origin of the response.")
    route: str | None
    upstream: str | None
    target: str | None
    attempts: int = Field(description="Attempts at upstreams.")
    fallback: str | None
    cost: float = Field(description="Tokens, after settlements.")
    duration_ms: float
    upstream_duration_ms: float | None = Field(description="From the last attempt to the head of its response.")
    bytes_received: int
    bytes_sent: int


class RequestsView(Body):
    """Some of the last requests of all workers, oldest first."""

    requests: list[RequestRecord]
    next: int = Field(description="`after` of the next page: requests that end later have higher numbers.")
    complete: bool = Field(description="False if a worker did not respond in time.")
    not_kept: int = Field(
        description="Requests of all clients since the start that the history had no place for. It grows between two"
        " responses by those that ended in the meantime."
    )


class SpendingRequest(Body):
    """A request that was charged to a limit before another one was refused."""

    number: int
    time: str
    request_id: str
    client_id: str | None
    method: str
    path: str
    status: int
    cost: float = Field(description="Tokens, after settlements.")
    tokens_before: float | None = Field(
        description="Tokens that were left when the request arrived; null if it was charged to the share of another"
        " process than the refused one."
    )


class SpentTokens(Body):
    """The requests that spent the tokens of a limit before it refused a request."""

    requests: list[SpendingRequest] = Field(
        description="Newest first, back to the one that found the limit full; at most 100."
    )
    complete: bool = Field(description="False if some are not in the history, not any more, or not shown.")
    missing_tokens: float = Field(
        description="Tokens that were spent between these requests by others that the history had no place for."
    )


class LimitDecided(Body):
    """One limit, and what was decided on its state. Figures that are no longer known are null."""

    limit: str
    capacity: float | None = Field(
        description="Tokens; null for concurrency limits, which have none. Of a share: capacity / `processes`."
    )
    refill_per_second: float | None = Field(description="null for calendar quotas and concurrency limits.")
    cost: float
    allowed: bool
    tokens_before: float | None = Field(
        description="null for concurrency limits, and if the decision does not state it: the policies `deny` and"
        " `allow` look at no tokens, and some refusals only at those of the limits that refuse."
    )
    tokens_after: float | None
    confirmed: bool = Field(
        description="False if the store was unavailable: then the state decided on is that in the gateway's memory, or"
        " none by the policies `deny` and `allow`. On a cluster, false for all limits if one was not confirmed."
    )
    retry_after_seconds: float | None = Field(description="null if it allows the request, or never would.")
    processes: int | None = Field(
        description="While the store is unavailable, by `local_share`: the number of processes that share the limit."
        " Capacity, refill and tokens are then those of the share of one. null: they are those of the whole limit."
    )
    concurrent: int | None = Field(
        description="Requests in flight that a concurrency limit allows. How many there were is not kept."
    )
    spent_by: SpentTokens | None = Field(
        description="Of a limit of tokens that refused the request; null by the policy `deny`, which looks at none."
    )


class RequestDecision(Body):
    """The decision of the rate limiter."""

    allowed: bool
    limit: str = Field(description="The limit that refuses longest, or has tokens for the fewest such requests.")
    source: DecisionSource
    retry_after_seconds: float | None = Field(description="null if the request was allowed, or never would be.")


class AttemptMade(Body):
    """One attempt at an upstream. Times are from the arrival of the request."""

    upstream: str | None
    target: str | None
    started_after_ms: float
    duration_ms: float = Field(description="To the head of the response, or to the failure.")
    status: int | None
    failure: str | None = Field(description="Reason why it has no response, or not a complete one.")
    detail: str | None


class CostSettled(Body):
    """A change of the cost after the decision."""

    after_ms: float = Field(description="From the arrival of the request.")
    cost_before: float
    cost_after: float


class ExplainedRequest(RequestRecord):
    """A request as the gateway decided on it, and its result."""

    decision: RequestDecision | None = Field(description="null if the request ended before it was charged.")
    limits: list[LimitDecided]
    upstream_attempts: list[AttemptMade]
    settlements: list[CostSettled]


class ExplainedRequests(Body):
    """The requests with an id, newest first: clients may choose ids, and use one several times."""

    requests: list[ExplainedRequest]
    complete: bool = Field(description="False if a worker did not respond in time.")
