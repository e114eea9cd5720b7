"""The endpoints `/metrics` and `/metrics/latency`."""

from enum import StrEnum
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from api_gateway.admin.dependencies import Guarded
from api_gateway.admin.openapi import REFUSAL_RESPONSES, TOKEN, rendered
from api_gateway.admin.views import issuer_views
from api_gateway.eventloop.steps import run_in_steps
from api_gateway.reporting.metrics_schema import LatencyView, MetricsView
from api_gateway.reporting.metrics_view import latency_view, metrics_view
from api_gateway.reporting.prometheus import PrometheusExposition

router = APIRouter(tags=["operator"], responses=REFUSAL_RESPONSES, dependencies=[TOKEN])


class MetricsFormat(StrEnum):
    """The formats of `/metrics`: JSON, or the text of Prometheus and OpenMetrics."""

    JSON = "json"
    PROMETHEUS = "prometheus"


@router.get(
    "/metrics",
    summary="All metrics, as JSON or for Prometheus",
    response_model=MetricsView,
    responses={200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}},
)
async def metrics(
    request: Request,
    context: Guarded,
    format: Annotated[MetricsFormat | None, Query()] = None,  # noqa: A002 - the name of the query parameter
) -> Any:
    """Return JSON, or the Prometheus text format if `?format=prometheus` or `Accept` requests it."""
    snapshot = await context.aggregator.gather()
    accept = request.headers.get("accept", "")
    asks_text = "application/openmetrics-text" in accept or "text/plain" in accept
    if format is MetricsFormat.PROMETHEUS or (format is None and asks_text):
        exposition = PrometheusExposition(snapshot, context.version)
        body, content_type = await run_in_steps(exposition.render(accept))
        return Response(body, headers={"content-type": content_type})
    view = metrics_view(
        snapshot.recorder,
        context.clocks.monotonic(),
        snapshot.upstreams,
        buckets=snapshot.buckets,
        bucket_limit=snapshot.bucket_limit,
        overflowed=snapshot.overflowed,
        limiter=snapshot.limiter,
        lag=snapshot.lag,
        issuers=issuer_views(snapshot.issuers, context.clocks.now()),
    )
    return rendered(await run_in_steps(view))


@router.get("/metrics/latency", summary="Latency percentiles", response_model=LatencyView)
async def latency(context: Guarded) -> Response:
    """Return the percentiles over the last minute, the last five minutes and since the start."""
    snapshot = await context.aggregator.gather()
    return rendered(await run_in_steps(latency_view(snapshot.recorder, context.clocks.monotonic())))
