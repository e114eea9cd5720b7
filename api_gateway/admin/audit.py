"""The endpoint `/audit`."""

from typing import Annotated

from fastapi import APIRouter, Query

from api_gateway.admin.audit_log import AuditView
from api_gateway.admin.dependencies import Guarded
from api_gateway.admin.openapi import PROBLEM, REFUSAL_RESPONSES, TOKEN

router = APIRouter(tags=["operator"], responses=REFUSAL_RESPONSES, dependencies=[TOKEN])


@router.get(
    "/audit",
    summary="The last changes by operators",
    responses={503: {"description": "The file of the audit log cannot be read.", **PROBLEM}},
)
async def audit(context: Guarded, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> AuditView:
    """Return the last changes, newest first: who made them, when and from where, and what was in force before.

    The log is a file in `state_dir`, which covers all workers of this gateway and its previous runs.
    """
    return AuditView(entries=await context.audit.last(limit))
