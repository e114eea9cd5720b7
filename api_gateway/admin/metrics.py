"""The endpoints `/metrics` and `/metrics/latency`."""

from enum import StrEnum
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from api_gateway.admin.context import Guarded
from api_gateway.admin.openapi import REFUSALS, TOKEN, rendered
from api_gateway.eventloop.pacing import paced
from api_gateway.reporting.metrics_schema import LatencyView, MetricsView
from api_gateway.reporting.metrics_view import latency_view, metrics_view
from api_gateway.reporting.prometheus import PrometheusExposition

router = APIRouter(tags=["operator"], responses=REFUSALS, dependencies=[TOKEN])


class MetricsFormat(StrEnum):
    """The two ways to show the metrics."""

    JSON = "json"
    PROMETHEUS = "prometheus"


@router.get(
    "/metrics",
    summary="All metrics, for people and for Prometheus",
    response_model=MetricsView,
    responses={200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}},
)
async def metrics(
    request: Request,
    console: Guarded,
    format: Annotated[MetricsFormat | None, Query()] = None,  # noqa: A002 - the public name
) -> Any:
    """Answer JSON, or exposition text where `?format=prometheus` or `Accept` asks for it."""
    report = await console.aggregator.gather()
    accept = request.headers.get("accept", "")
    asks_text = "application/openmetrics-text" in accept or "text/plain" in accept
    if format is MetricsFormat.PROMETHEUS or (format is None and asks_text):
        exposition = PrometheusExposition(
            report.recorder,
            report.upstreams,
            report.limiter,
            report.buckets,
            console.version,
            report.lag,
            report.tasks,
            report.resources,
            report.configuration,
        )
        body, content_type = await paced(exposition.render(accept))
        return Response(body, headers={"content-type": content_type})
    view = metrics_view(
        report.recorder,
        console.clocks.monotonic(),
        report.upstreams,
        buckets=report.buckets,
        bucket_limit=report.bucket_limit,
        overflowed=report.overflowed,
        limiter=report.limiter,
        lag=report.lag,
    )
    return rendered(await paced(view))


@router.get("/metrics/latency", summary="Latency percentiles", response_model=LatencyView)
async def latency(console: Guarded) -> Response:
    """Answer the percentiles over the last minute, the last five minutes and since the start."""
    report = await console.aggregator.gather()
    return rendered(await paced(latency_view(report.recorder, console.clocks.monotonic())))
