"""The endpoints `/usage`, for operators, and `/usage/me`, for clients."""

import csv
import io
import json
from calendar import monthrange
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from api_gateway.admin.context import AdminContext
from api_gateway.admin.dependencies import Guarded, Open
from api_gateway.admin.openapi import PROBLEM, REFUSAL_RESPONSES, TOKEN
from api_gateway.clients.api_keys import has_key
from api_gateway.errors import InvalidValue, NoRoute, StoreUnavailable
from api_gateway.http1.headers import fields_of
from api_gateway.reporting.usage_schema import UsageView
from api_gateway.usage.counts import name_of
from api_gateway.usage.ledger import TooManyRows, UsageLedger, UsageQuestion

GROUPS = ("client", "route", "day")
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "'")
_EPOCH = date(1970, 1, 1)
_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"description": "`usage.enabled` is false.", **PROBLEM},
    422: {"description": "A parameter is invalid, or the result would have too many rows.", **PROBLEM},
    503: {"description": "The file with the usage cannot be read.", **PROBLEM},
}

router = APIRouter(tags=["operator"])


class UsageFormat(StrEnum):
    """The formats of usage: one JSON value, a line of JSON for each row, or a table."""

    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


_TYPES = {
    UsageFormat.JSON: "application/json",
    UsageFormat.JSONL: "application/jsonl",
    UsageFormat.CSV: "text/csv; charset=utf-8; header=present",
}


class _Period:
    """The days of a question: from one to another, or a month; by default this month."""

    def __init__(
        self,
        context: Open,
        first: Annotated[date | None, Query(alias="from", description="First day, UTC.")] = None,
        last: Annotated[date | None, Query(alias="to", description="Last day, UTC; included.")] = None,
        month: Annotated[
            str | None, Query(pattern=r"^[1-9][0-9]{3}-(0[1-9]|1[0-2])$", description="Instead of both: a month.")
        ] = None,
    ) -> None:
        """Raises InvalidValue if the parameters contradict each other."""
        today = datetime.fromtimestamp(context.clocks.wall(), UTC).date()
        if month is not None:
            if first is not None or last is not None:
                raise InvalidValue("month: cannot be combined with from and to.")
            first = date.fromisoformat(f"{month}-01")
            last = first.replace(day=monthrange(first.year, first.month)[1])
        self.first, self.last = first or (last or today).replace(day=1), last or today
        if self.first > self.last:
            raise InvalidValue(f"from: must not be after to, got {self.first} and {self.last}.")


Period = Annotated[_Period, Depends(_Period)]
By = Annotated[str, Query(description="Any of client, route and day, separated by commas.", examples=["route,day"])]
Format = Annotated[UsageFormat | None, Query(description="By default as Accept says: text/csv, or JSON.")]
RowLimit = Annotated[int, Query(ge=1, le=100_000, description="The most rows; more are an error.")]


@router.get(
    "/usage",
    summary="What clients have used, by client, route and day",
    response_model=UsageView,
    responses={**REFUSAL_RESPONSES, **_ERRORS},
    dependencies=[TOKEN],
)
async def usage(
    request: Request,
    context: Guarded,
    period: Period,
    by: By = "client",
    client: Annotated[str | None, Query(description="Only of this client.")] = None,
    format: Format = None,  # noqa: A002 - the name of the query parameter
    limit: RowLimit = 10_000,
) -> Response:
    """Return the sums of a period: JSON, JSON lines or CSV. Each machine has the usage of its own processes."""
    if client is not None and has_key(client.encode()):
        raise InvalidValue("query.client: must be a client id, got an API key.")
    question = _question(period, _groups(by, GROUPS), client, limit)
    return await _answer(request, _ledger(context), question, period, format)


@router.get(
    "/usage/me",
    tags=["client"],
    summary="A client's own usage, by route and day",
    response_model=UsageView,
    responses={
        401: {"description": "The credential is missing or not valid.", **PROBLEM},
        429: {"description": "Too many requests of this address.", **PROBLEM},
        **_ERRORS,
    },
)
async def own_usage(
    request: Request,
    context: Open,
    period: Period,
    by: By = "route,day",
    format: Format = None,  # noqa: A002 - the name of the query parameter
    limit: RowLimit = 10_000,
) -> Response:
    """Return the usage of the client that the request identifies, as proxied requests do."""
    ledger = _ledger(context)
    groups = _groups(by, ("route", "day"))
    peer = request.client.host if request.client is not None else "unknown"
    fields = fields_of(request.scope["headers"])
    client = await context.explainer.client_of(peer, fields, request.scope["http_version"])
    return await _answer(request, ledger, _question(period, groups, name_of(client), limit), period, format)


def _ledger(context: AdminContext) -> UsageLedger:
    if context.usage is None:
        raise NoRoute("The usage of clients is not counted: usage.enabled is false.")
    return context.usage


def _groups(by: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the columns to group by. Raises InvalidValue."""
    groups = tuple(part.strip() for part in by.split(",") if part.strip())
    for name in groups:
        if name not in allowed or groups.count(name) > 1:
            raise InvalidValue(f"by: must be some of {', '.join(allowed)}, each once, got {by[:100]!r}.")
    return groups


def _question(period: _Period, by: Sequence[str], client: str | None, limit: int) -> UsageQuestion:
    return UsageQuestion(by, (period.first - _EPOCH).days, (period.last - _EPOCH).days, client, limit)


async def _answer(
    request: Request, ledger: UsageLedger, question: UsageQuestion, period: _Period, given: UsageFormat | None
) -> Response:
    try:
        rows = await ledger.ask(question)
    except TooManyRows:
        raise InvalidValue(
            f"limit: the result has more than {question.limit} rows; narrow the period, name a client, group by less,"
            " or raise the limit."
        ) from None
    except OSError as error:
        raise StoreUnavailable(f"The usage cannot be read: {error}.", retry_after=1) from error
    for row in rows:
        if "day" in row:
            row["day"] = (_EPOCH + timedelta(days=row["day"])).isoformat()
    chosen = given or _accepted(request.headers.get("accept", ""))
    if chosen is UsageFormat.CSV:
        body = _csv(rows, question.by)
    elif chosen is UsageFormat.JSONL:
        body = "".join(f"{json.dumps(row)}\n" for row in rows)
    else:
        total = await ledger.ask(UsageQuestion((), question.first_day, question.last_day, question.client, 1))
        named = {"from": period.first.isoformat(), "to": period.last.isoformat(), "client": question.client}
        body = json.dumps({**named, "by": list(question.by), "total": total[0], "rows": rows})
    return Response(body, media_type=_TYPES[chosen], headers={"cache-control": "no-store"})


def _accepted(accept: str) -> UsageFormat:
    if "text/csv" in accept:
        return UsageFormat.CSV
    return UsageFormat.JSONL if "jsonl" in accept or "ndjson" in accept else UsageFormat.JSON


def _csv(rows: Sequence[dict[str, Any]], by: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*by, *(name for name in UsageView.counted())])
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) if isinstance(value, str) else value for name, value in row.items()})
    return text.getvalue()


def _cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula: with ' in front if it begins like one, or with '.

    A reader that removes one ' from the beginning gets the original text.
    """
    return f"'{text}" if text.startswith(_FORMULAS) else text
