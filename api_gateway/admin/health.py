"""The endpoints `/healthz`, `/readyz` and `/health`. The gate serves them; these functions describe them."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from api_gateway.admin.context import Lifecycle
from api_gateway.admin.dependencies import Open
from api_gateway.admin.openapi import PROBLEM
from api_gateway.reporting.upstream_schema import HealthView

router = APIRouter(tags=["health"])


@router.get("/healthz", response_class=PlainTextResponse, summary="Liveness")
async def healthz() -> str:
    """Return 200 while the event loop runs."""
    return "ok\n"


@router.get(
    "/readyz",
    response_class=PlainTextResponse,
    summary="Readiness",
    responses={503: {"description": "Starting or draining.", "content": {"text/plain": {}}}},
)
async def readyz(context: Open) -> Response:
    """Return 200 while the gateway accepts requests, regardless of the health of upstreams; else 503."""
    is_serving = context.lifecycle is Lifecycle.SERVING
    return PlainTextResponse(f"{context.lifecycle}\n", status_code=200 if is_serving else 503)


@router.get(
    "/health",
    summary="Health of the gateway and its upstreams",
    response_model=HealthView,
    responses={429: {"description": "Too many requests of this address or operator.", **PROBLEM}},
)
async def health(context: Open) -> Response:
    """Return 200 with the health as `status`, and all details for operators; others get the status only."""
    return Response(await context.health.status_only(), media_type="application/json")
