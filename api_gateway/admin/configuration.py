"""The endpoint `/reload`."""

from fastapi import APIRouter, Request

from api_gateway.admin.audit_log import AuditAction
from api_gateway.admin.context import Audited, Guarded, who
from api_gateway.admin.openapi import PROBLEM, REFUSAL_RESPONSES, TOKEN
from api_gateway.admin.reload_views import reload_view
from api_gateway.reload.outcome import ReloadResult
from api_gateway.reporting.reload_schema import Reloaded

router = APIRouter(tags=["operator"], responses=REFUSAL_RESPONSES, dependencies=[TOKEN])


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
    if outcome.result is ReloadResult.SUCCESS:
        changes = [change for change in outcome.changes if not change.is_secret]
        views = ({change.setting: getattr(change, when) for change in changes} for when in ("old", "new"))
        await audit(AuditAction.CONFIGURATION_RELOADED, None, *views)
    return reload_view(outcome)
