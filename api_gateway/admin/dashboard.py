"""The endpoints `/dashboard/events`, which the dashboard watches, and `/dashboard/problems`.

The page itself is a static file, see `pages`.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from api_gateway.admin.context import AdminContext, Lifecycle
from api_gateway.admin.dependencies import Guarded
from api_gateway.admin.feed import FRAME_SECONDS, Watcher, event
from api_gateway.admin.gate import OPERATOR, SERVER
from api_gateway.admin.openapi import PROBLEM, REFUSAL_RESPONSES, TOKEN
from api_gateway.errors import RateLimited
from api_gateway.models import Body
from api_gateway.reporting.problems import REFUSALS

MAX_WATCHERS = 50  # of one process
MAX_STREAM_SECONDS = 3600.0  # then the page connects again
_TURN = 0.25  # seconds between two checks whether the stream must end

router = APIRouter(tags=["operator"], responses=REFUSAL_RESPONSES, dependencies=[TOKEN])


class ProblemView(Body):
    """One problem: severity, sentence, and link to the page that shows its cause."""

    severity: Literal["warn", "fail"]
    text: str = Field(description="One sentence.")
    link: str = Field(description="The page of the dashboard that shows the cause, as the fragment of its URL.")


class ProblemsView(Body):
    """The problems that there are now."""

    status: Literal["pass", "warn", "fail"] = Field(description="The gravest severity; `pass` without a problem.")
    problems: list[ProblemView] = Field(description="The gravest first, at most 100.")


@router.get("/dashboard/problems", summary="What is wrong now", response_model=ProblemsView)
async def problems(context: Guarded) -> Response:
    """Return a sentence for each current problem of the gateway, its upstreams and its traffic.

    The status is for people: `fail` if any part fails. That of `/health` is `fail` only if all upstreams do.
    """
    frame = await context.feed.frame()
    return Response(
        f'{{"status":"{frame.status}","problems":{frame.problems}}}',
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )


@router.get(
    "/dashboard/events",
    summary="The state of all workers, as server-sent events",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {}}},
        429: {"description": "As many pages watch already as one process serves.", **PROBLEM},
    },
)
async def events(request: Request, context: Guarded) -> StreamingResponse:
    """Stream what the dashboard shows: the whole state, then every two seconds what has changed.

    Events: `hello` (operator, role, version), `overview`, `problems`, `points` (of the last hour), `upstreams`, `gone`
    (names of removed upstreams) and `frame`, the last event of each update. The stream ends when the gateway stops,
    when a reload changes the access rules, and after an hour; then a page connects again.
    """
    if context.feed.watchers >= MAX_WATCHERS:
        raise RateLimited(f"{MAX_WATCHERS} pages watch this process already, which is the limit.", retry_after=10)
    return StreamingResponse(
        _stream(request, context), media_type="text/event-stream", headers={"cache-control": "no-store"}
    )


async def _stream(request: Request, context: AdminContext) -> AsyncIterator[bytes]:
    operator, access = request.scope[OPERATOR], request.app.state.gate.access
    feed, watcher = context.feed, Watcher()
    end = context.clocks.monotonic() + MAX_STREAM_SECONDS
    feed.watchers += 1
    try:
        hello = {
            "operator": operator.name,
            "role": operator.role.value,
            "version": context.version,
            "refusals": sorted(REFUSALS),
        }
        yield event("hello", json.dumps(hello))
        while context.clocks.monotonic() < end:
            for one in watcher.events(await feed.frame()):
                yield one
            for _ in range(round(FRAME_SECONDS / _TURN)):
                if _must_end(request, context, access) or await request.is_disconnected():
                    return
                await asyncio.sleep(_TURN)
    finally:
        feed.watchers -= 1


def _must_end(request: Request, context: AdminContext, access: Any) -> bool:
    server = request.scope.get(SERVER)
    is_stopping = context.lifecycle is not Lifecycle.SERVING or (server is not None and server.is_stopping)
    return is_stopping or request.app.state.gate.access is not access
