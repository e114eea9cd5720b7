"""The view behind `/health`."""

from dataclasses import asdict
from typing import Literal

from api_gateway.admin.reload_views import configuration_view
from api_gateway.admin.utc_times import wall_time
from api_gateway.admin.views import issuer_views, upstream_view
from api_gateway.eventloop.steps import each, run_in_steps
from api_gateway.metrics import GATEWAY
from api_gateway.reporting.metrics_view import concurrency_view
from api_gateway.reporting.tls_snapshot import TlsSnapshot
from api_gateway.reporting.upstream_schema import (
    CertificateView,
    ClientStoreView,
    HealthView,
    LagView,
    ResourceView,
    StateView,
    StoreView,
    TlsView,
)
from api_gateway.reporting.worker_channel import Aggregator
from api_gateway.resilience.fair_shares import ResourceState
from api_gateway.system.clocks import Clocks


async def health_view(aggregator: Aggregator, clocks: Clocks, version: str) -> HealthView:
    """Return the health of the gateway, its upstreams and stores.

    Status `fail`: all upstreams fail. `warn`: an upstream has a status other than `pass`, limits are not exact, the
    client store has an error, state could not be written, the last reload failed, a certificate expires or could not
    be loaded, the keys of an issuer cannot be fetched, or a resource is short.
    """
    snapshot = await aggregator.gather()
    now = clocks.now()
    unwritten = {name: error for name, error in snapshot.unwritten.items() if error is not None}
    views = each(
        snapshot.upstreams.items(),
        lambda name, upstream: upstream_view(upstream, now, concurrency_view(snapshot.recorder, name, upstream)),
    )
    upstreams = await run_in_steps(views)
    words = {view.status for view in upstreams.values()}
    status: Literal["pass", "warn", "fail"] = "warn" if words & {"warn", "fail"} else "pass"
    if words == {"fail"}:
        status = "fail"
    elif (
        not snapshot.limiter.is_whole
        or snapshot.client_store_error is not None
        or unwritten
        or snapshot.configuration.problems
        or snapshot.tls.problems
        or any(issuer.status == "warn" for issuer in snapshot.issuers.values())
        or any(resource.status == "warn" for resource in snapshot.resources)
    ):
        status = "warn"
    uptime = round(clocks.monotonic() - snapshot.recorder.started, 3)
    return HealthView(
        status=status,
        version=version,
        uptime_seconds=uptime,
        upstreams=upstreams,
        store=StoreView(**asdict(snapshot.limiter)),
        client_store=ClientStoreView(
            status="pass" if snapshot.client_store_error is None else "warn", error=snapshot.client_store_error
        ),
        state=StateView(status="warn" if unwritten else "pass", errors=unwritten),
        configuration=configuration_view(snapshot.configuration),
        tls=tls_view(snapshot.tls),
        issuers=issuer_views(snapshot.issuers, now) or None,
        event_loop=LagView(lag_seconds=round(snapshot.lag, 6), shed=snapshot.recorder.shed[GATEWAY].total()),
        resources=[_resource_view(resource) for resource in snapshot.resources],
    )


def tls_view(tls: TlsSnapshot) -> TlsView | None:
    """Return the certificates; None without TLS."""
    if not tls.certificates:
        return None
    certificates = [
        CertificateView(file=one.file, name=one.name, not_after=wall_time(one.not_after)) for one in tls.certificates
    ]
    return TlsView(status="warn" if tls.problems else "pass", certificates=certificates, problems=list(tls.problems))


def _resource_view(resource: ResourceState) -> ResourceView:
    return ResourceView(
        resource=resource.resource,
        upstream=resource.upstream,
        limit=resource.limit,
        in_use=resource.in_use,
        refused=resource.refused,
        status=resource.status,
    )
