"""The endpoints `/healthz`, `/readyz` and `/health`. The gate answers them from memory; here they are described."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from api_gateway.admin.context import Lifecycle, Open
from api_gateway.admin.openapi import PROBLEM
from api_gateway.reporting.upstream_schema import HealthView

router = APIRouter(tags=["health"])


@router.get("/healthz", response_class=PlainTextResponse, summary="Liveness")
async def healthz() -> str:
    """Answer 200 while the event loop turns."""
    return "ok\n"


@router.get(
    "/readyz",
    response_class=PlainTextResponse,
    summary="Readiness",
    responses={503: {"description": "Starting or draining.", "content": {"text/plain": {}}}},
)
async def readyz(context: Open) -> Response:
    """Answer 200 while serving. Upstreams that are down do not make the gateway unready."""
    is_serving = context.lifecycle is Lifecycle.SERVING
    return PlainTextResponse(f"{context.lifecycle}\n", status_code=200 if is_serving else 503)


@router.get(
    "/health",
    summary="Health of the gateway and its upstreams",
    response_model=HealthView,
    responses={429: {"description": "Asked too often.", **PROBLEM}},
)
async def health(context: Open) -> Response:
    """Answer 200 while the gateway itself serves; to anybody but an operator, the status word only."""
    return Response(await context.health.status_only(), media_type="application/json")
