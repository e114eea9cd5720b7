"""The endpoints of the history of requests: `/history` and `/explain/{request_id}`."""

import json
from operator import itemgetter
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import AfterValidator

from api_gateway.admin.context import AdminContext
from api_gateway.admin.dependencies import Guarded
from api_gateway.admin.history_queries import MAX_FOUND, STATUS, Members
from api_gateway.admin.openapi import PROBLEM, REFUSAL_RESPONSES, TOKEN
from api_gateway.admin.spent_tokens import spent_by
from api_gateway.admin.utc_times import wall_time
from api_gateway.errors import NoRoute, Reason
from api_gateway.http1.request_paths import unescaped
from api_gateway.observability.request_history import HistoryLimits
from api_gateway.observability.request_record import REQUEST_RESULTS
from api_gateway.printable_text import counted
from api_gateway.reporting.history_schema import ExplainedRequests, RequestsView
from api_gateway.reporting.worker_channel import QueryResults

router = APIRouter(tags=["operator"], dependencies=[TOKEN])

_DISABLED: dict[int | str, dict[str, Any]] = {404: {"description": "`history.enabled` is false.", **PROBLEM}}
_UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: {"description": "The history has no request with this id, or `history.enabled` is false.", **PROBLEM}
}
_OF_ONE_PROCESS = (
    " It is the history of one process: processes that another server starts, as uvicorn does with --workers, and"
    " gateways on other machines have their own."
)


def _checked_status(text: str) -> str:
    if STATUS.fullmatch(text) is None:
        raise ValueError("must be a status such as 429, or a class such as 4xx")
    return text


@router.get(
    "/history",
    summary="The last requests",
    response_model=RequestsView,
    responses={**REFUSAL_RESPONSES, **_DISABLED},
)
async def recent_requests(
    context: Guarded,
    after: Annotated[int | None, Query(ge=0, description="Only requests with higher numbers.")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    status: Annotated[
        Annotated[str, AfterValidator(_checked_status)] | None, Query(description="A status, or a class such as 4xx.")
    ] = None,
    client: Annotated[str | None, Query(description="Only of this client id.")] = None,
    reason: Annotated[Reason | None, Query(description="Only with this reason.")] = None,
    route: Annotated[str | None, Query(description="Only of this route.")] = None,
    result: Literal["success", "refusal", "error"] | None = None,
) -> Response:
    """Return the last requests of all workers, oldest first; with `after` the first ones that ended after that one.

    To follow the requests, ask again with `after` set to `next`: no request is shown twice, and none is left out as
    long as the history has it.
    """
    _limits(context)
    query = {"kind": "list", "after": after, "limit": limit, "status": status, "client_id": client}
    query |= {"reason": reason, "route": route, "result": result}
    results = await context.aggregator.query(query)
    until = min(one["until"] for one in results.values)
    rows = _rows(results, "number")
    rows = [row for row in rows if row["number"] <= until]  # the others are among those of the next page
    if after is None:
        rows = rows[-limit:]
    elif len(rows) > limit or any(len(one["requests"]) == limit for one in results.values):
        until = _last_complete(results, limit, until)
        rows = [row for row in rows if row["number"] <= until][:limit]
        until = rows[-1]["number"] if len(rows) == limit else until
    not_kept = sum(one["not_kept"] for one in results.values)
    return _json({"requests": rows, "next": until, "complete": results.is_complete, "not_kept": not_kept})


@router.get(
    "/explain/{request_id:path}",
    summary="What was decided about a request, and what happened to it",
    response_model=ExplainedRequests,
    responses={**REFUSAL_RESPONSES, **_UNKNOWN},
)
async def explain_request(request_id: str, context: Guarded) -> Response:
    """Return one of the last requests by its id, which is in `X-Request-ID` and in the problem details.

    It has the state of each limit at the decision; of a limit that refused, the requests that had spent its tokens;
    and each attempt at an upstream.
    """
    limits = _limits(context)
    results = await context.aggregator.query({"kind": "find", "id": unescaped(request_id)})
    rows = sorted((row for one in results.values for row in one["requests"]), key=itemgetter("number"), reverse=True)
    if not rows:
        raise _unknown(request_id, limits, results, is_alone=not context.aggregator.worker)
    is_complete = results.is_complete
    for row in rows[:MAX_FOUND]:
        keys, buckets, started = row.pop("_keys"), row.pop("_buckets"), row.pop("_started")
        for index, key in keys.items():
            spent = await context.aggregator.query({"kind": "spent", "key": key, "started": started})
            found = spent_by([each for one in spent.values for each in one["requests"]], buckets[index])
            row["limits"][int(index)]["spent_by"] = found | {"complete": found["complete"] and spent.is_complete}
            is_complete = is_complete and spent.is_complete
    return _json({"requests": rows[:MAX_FOUND], "complete": is_complete})


def _limits(context: AdminContext) -> HistoryLimits:
    """Return the limits of the history. Raises NoRoute if it is disabled."""
    limits = context.history.limits
    if not (limits.successes or limits.refusals or limits.errors):
        raise NoRoute("There is no history of requests: history.enabled is false.")
    return limits


def _rows(results: QueryResults, order: str) -> list[Members]:
    """Return the requests of all workers, sorted by a member."""
    return sorted((row for one in results.values for row in one["requests"]), key=itemgetter(order))


def _last_complete(results: QueryResults, limit: int, until: int) -> int:
    """Return the number up to which no worker has left out a request: a full page ends with its last one."""
    full: list[int] = [one["requests"][-1]["number"] for one in results.values if len(one["requests"]) == limit]
    return min([until, *full])


def _in_words(numbers: list[int]) -> str:
    """Return numbers of requests by outcome as a part of a sentence."""
    successes, refusals, errors = numbers
    return (
        f"{counted(successes, 'success', 'successes')}, {counted(refusals, 'refusal')} and {counted(errors, 'error')}"
    )


def _unknown(request_id: str, limits: HistoryLimits, results: QueryResults, *, is_alone: bool) -> NoRoute:
    kept, not_kept = (
        [sum(one[member][name] for one in results.values) for name in REQUEST_RESULTS]
        for member in ("kept", "not_kept")
    )
    oldest = min((one["oldest"] for one in results.values if one["oldest"] is not None), default=None)
    since = "it is empty" if oldest is None else f"the oldest ended at {wall_time(oldest)}"
    left_out = ""
    if any(not_kept):
        rates = "{:g}, {:g} and {:g}".format(*limits.per_second)
        left_out = (
            f" {_in_words(not_kept)} since the start were not kept, because too many ended at once: a worker keeps"
            f" {rates} of them each second, after a burst, and prefers clients with few requests."
        )
    return NoRoute(
        f"The history has no request with the id {unescaped(request_id)[:200]!r}. It has"
        f" {_in_words(kept)}; {since}.{left_out} Each worker keeps at most {limits.successes},"
        f" {limits.refusals} and {limits.errors} of them, for {limits.max_age:g} s at most"
        " (section history of the configuration)."
        f"{_OF_ONE_PROCESS if is_alone else ''}"
    )


def _json(view: Members) -> Response:
    return Response(
        json.dumps(view, separators=(",", ":")), media_type="application/json", headers={"cache-control": "no-store"}
    )
