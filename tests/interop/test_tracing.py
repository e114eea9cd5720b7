"""One trace across three proxies: an Envoy in front of the gateway, the gateway, and an Envoy behind it."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.interop.test_load_balancers import started
from tests.kit import RawUpstream, ask, eventually, free_port, in_front_of, reply, running_gateway
from tests.trace_kit import CLIENT, SERVER, Collector, ReceivedSpan, collector

pytestmark = pytest.mark.interop

ENVOY = "type.googleapis.com/envoy.extensions"


def cluster(name: str, port: int) -> dict[str, Any]:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    return {
        "name": name,
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": endpoints},
    }


def configuration(name: str, port: int, target: int, exports_to: int) -> dict[str, Any]:
    """Return the configuration of an Envoy that traces all requests, and has a span for each attempt."""
    otlp = {"uri": f"http://127.0.0.1:{exports_to}/v1/traces", "cluster": "collector", "timeout": "5s"}
    tracer = {
        "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
        "http_service": {"http_uri": otlp},
        "service_name": name,
    }
    manager = {
        "@type": f"{ENVOY}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "clients",
        "codec_type": "HTTP1",
        "tracing": {
            "provider": {"name": "envoy.tracers.opentelemetry", "typed_config": tracer},
            "spawn_upstream_span": True,
        },
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "up"}}],
                }
            ]
        },
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{ENVOY}.filters.http.router.v3.Router"}}],
    }
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    filters = [{"name": "http", "typed_config": manager}]
    return {
        "static_resources": {
            "listeners": [{"address": address, "filter_chains": [{"filters": filters}]}],
            "clusters": [cluster("up", target), cluster("collector", exports_to)],
        }
    }


@contextmanager
def envoy(folder: Path, name: str, target: int, exports_to: int) -> Iterator[int]:
    """Run an Envoy in front of a port; yield its own."""
    port, path = free_port(), folder / f"{name}.json"
    path.write_text(json.dumps(configuration(name, port, target, exports_to)))
    with started(["envoy", "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "error"], port):
        yield port


def span_of(received: Collector, service: str, kind: int) -> ReceivedSpan:
    """Return the only span of a service of a kind."""
    (found,) = [one for one in received.spans if (one.resource["service.name"], one.kind) == (service, kind)]
    return found


def test_three_proxies_have_one_trace(tmp_path: Path) -> None:
    up = RawUpstream(reply(b"fine"))
    with collector() as received:
        exports_to = int(received.url.rpartition(":")[2])
        with envoy(tmp_path, "behind", up.port, exports_to) as behind:
            sections = in_front_of(f"http://127.0.0.1:{behind}") | {
                "tracing": {"enabled": True, "endpoint": received.url, "service_name": "gateway"}
            }
            with (
                running_gateway(sections, tmp_path / "state") as running,
                envoy(tmp_path, "before", running.port, exports_to) as before,
            ):
                assert ask(f"http://127.0.0.1:{before}/api/x").status == 200
                eventually(lambda: len(received.spans) >= 6, "all three export two spans")
        order = [
            span_of(received, name, kind) for name in ("before", "gateway", "behind") for kind in (SERVER, CLIENT)
        ]
    up.close()
    assert len({span.trace_id for span in order}) == 1
    for parent, child in itertools.pairwise(order):
        assert child.parent_id == parent.span_id, (parent, child)
    assert order[0].parent_id == ""
    (arrived,) = up.requests[0].all("traceparent")
    assert arrived.decode() == f"00-{order[0].trace_id}-{order[-1].span_id}-01"


def test_the_decision_of_the_first_proxy_holds(tmp_path: Path) -> None:
    """A client that has not sampled: neither Envoy nor the gateway exports, and the flag arrives."""
    up = RawUpstream(reply(b"fine"))
    unsampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    with collector() as received:
        exports_to = int(received.url.rpartition(":")[2])
        settings = {"enabled": True, "endpoint": received.url}
        with (
            running_gateway(in_front_of(up.url) | {"tracing": settings}, tmp_path / "state") as running,
            envoy(tmp_path, "before", running.port, exports_to) as before,
        ):
            assert ask(f"http://127.0.0.1:{before}/api/x", headers={"traceparent": unsampled}).status == 200
    up.close()
    assert not received.spans
    (arrived,) = up.requests[0].all("traceparent")
    assert arrived.startswith(b"00-0af7651916cd43dd8448eb211c80319c-")
    assert arrived.endswith(b"-00")
