"""The endpoints `/configuration` and `/reload`."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api_gateway.admin.audit_log import AuditAction
from api_gateway.admin.dependencies import Audited, Guarded, who
from api_gateway.admin.openapi import PROBLEM, REFUSAL_RESPONSES, TOKEN, rendered
from api_gateway.admin.reload_views import record_view, reload_view
from api_gateway.admin.settings_view import settings_of
from api_gateway.admin.utc_times import wall_time
from api_gateway.reload.outcome import ReloadResult
from api_gateway.reporting.reload_schema import ConfigurationInForce, Reloaded

router = APIRouter(tags=["operator"], responses=REFUSAL_RESPONSES, dependencies=[TOKEN])


@router.get("/configuration", summary="The configuration in force", response_model=ConfigurationInForce)
async def configuration(
    context: Guarded,
    defaults: Annotated[bool, Query(description="Include settings with their default values.")] = False,  # noqa: FBT002 - a query parameter
) -> Response:
    """Return the settings in force with the place where each was set, and the last reloads. Secrets are not shown."""
    state = (await context.aggregator.gather()).configuration
    settings = await asyncio.to_thread(settings_of, context.configuration, with_defaults=defaults)
    return rendered(
        ConfigurationInForce(
            loaded_at=wall_time(state.loaded_at),
            errors=list(state.problems),
            settings=settings,
            reloads=list(map(record_view, state.recent)),
        )
    )


@router.post(
    "/reload",
    summary="Reload the configuration",
    responses={
        422: {"description": "The configuration is invalid; the previous one stays in force.", **PROBLEM},
        500: {"description": "Applying the configuration failed; the previous one stays in force.", **PROBLEM},
        503: {"description": "The gateway is draining, or its workers are being restarted.", **PROBLEM},
    },
)
async def reload(request: Request, context: Guarded, audit: Audited) -> Reloaded:
    """Read the configuration again and apply it in every worker, or change nothing.

    Requests, streams and connections continue; buckets, breakers and counts stay. The response lists the changed
    settings, and those that take effect only after a restart.
    """
    outcome = await context.aggregator.reload(f"POST /reload by {who(request)}")
    if outcome.result is ReloadResult.SUCCESS and outcome.changes:
        views = (
            {one.setting: f"the {when} secret" if one.is_secret else getattr(one, when) for one in outcome.changes}
            for when in ("old", "new")
        )
        await audit(AuditAction.CONFIGURATION_RELOADED, None, *views)
    return reload_view(outcome)
