"""The endpoint `/reload`."""

from fastapi import APIRouter, Request

from api_gateway.admin.context import Guarded, who
from api_gateway.admin.openapi import PROBLEM, REFUSAL_RESPONSES, TOKEN
from api_gateway.admin.reload_views import reload_view
from api_gateway.reporting.reload_schema import Reloaded

router = APIRouter(tags=["operator"], responses=REFUSAL_RESPONSES, dependencies=[TOKEN])


@router.post(
    "/reload",
    summary="Reload the configuration",
    responses={
        422: {"description": "The configuration is wrong; the one before stays in force.", **PROBLEM},
        500: {"description": "It could not be put into force; the one before stays in force.", **PROBLEM},
        503: {"description": "The gateway drains, or its workers are being restarted.", **PROBLEM},
    },
)
async def reload(request: Request, context: Guarded) -> Reloaded:
    """Read the configuration anew and put it into force in every worker, or change nothing.

    Requests, streams and connections go on; buckets, breakers and counts stay. The response names what has changed,
    and what of it needs a restart.
    """
    outcome = await context.aggregator.reload(f"POST /reload by {who(request)}")
    return reload_view(outcome)
