"""Pictures of the dashboard for the documentation: `python -m benchmarks.screenshots`, and of all: `--all --folder X`.

Needs Chromium on the PATH and the package `playwright` (extra `interop`). A gateway with a dozen upstreams runs on
loopback, gets requests of some clients, loses a target, and is photographed: each page in light, some in dark and at
360 pixels. The hour before is simulated, as nobody wants to wait for it.
"""

import argparse
import contextlib
import http.server
import importlib.util
import json
import math
import random
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from api_gateway.admin.locality import LoopbackRule
from api_gateway.config import load_config
from api_gateway.metrics import Recorder
from api_gateway.models import Client, Decision, Exchange, Quota
from api_gateway.process.server import GatewayServer
from api_gateway.reporting.traffic_history import HISTORY_POINTS, POINT_SECONDS, TrafficHistory

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FOLDER = Path(__file__).parents[1] / "docs" / "images"
WIDE, NARROW = {"width": 1440, "height": 940}, {"width": 360, "height": 800}
TOKEN = "the-token-of-the-pictures"  # noqa: S105 - of this gateway alone
# Name, page, theme, viewport.
PICTURES: list[tuple[str, str, str, Mapping[str, int]]] = [
    ("overview", "#/", "light", WIDE),
    ("overview-dark", "#/", "dark", WIDE),
    ("overview-narrow", "#/", "light", NARROW),
    ("upstreams", "#/upstreams/orders", "light", WIDE),
    ("upstreams-dark", "#/upstreams/orders", "dark", WIDE),
    ("upstreams-narrow", "#/upstreams/orders", "light", NARROW),
    ("clients", "#/clients/acme", "light", WIDE),
    ("clients-dark", "#/clients/acme", "dark", WIDE),
    ("clients-narrow", "#/clients/acme", "dark", NARROW),
    ("explain", "#/explain", "light", WIDE),
    ("explain-dark", "#/explain", "dark", WIDE),
    ("explain-narrow", "#/explain", "light", NARROW),
    ("configuration", "#/configuration", "light", WIDE),
    ("configuration-dark", "#/configuration", "dark", WIDE),
    ("configuration-narrow", "#/configuration", "dark", NARROW),
    ("api", "docs", "light", WIDE),
]
SHOWN = ("overview", "upstreams-dark", "clients", "explain-narrow", "configuration", "api")  # in the documentation
OUTAGE, BURST = range(228, 244), range(120, 160)  # points of the simulated hour
SERVICES = ("accounts", "billing", "catalogue", "images", "inventory", "mail", "orders", "search", "shipping", "users")
CLIENTS = {"acme": 9, "globex": 5, "initech": 3, "umbrella": 2, "hooli": 2, "stark": 1, "wayne": 1}  # shares


class Upstream(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """An upstream that responds after a few milliseconds, and fails while `is_failing`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.is_failing = False
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """Say nothing of connections that the gateway has ended."""

    @property
    def url(self) -> str:
        """The URL of this upstream."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        upstream = self.server
        assert isinstance(upstream, Upstream)  # noqa: S101 - it creates the handlers
        time.sleep(random.lognormvariate(math.log(0.004), 0.5))
        body = b"{}"
        self.send_response(503 if upstream.is_failing and self.path != "/healthz" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def sections(urls: list[str]) -> dict[str, Any]:
    """Return the configuration of the gateway in the pictures."""
    upstreams: dict[str, Any] = {}
    for number, name in enumerate(SERVICES):
        targets = [{"url": urls[(number + offset) % len(urls)]} for offset in range(3 if name != "orders" else 1)]
        upstreams[name] = {"targets": targets, "circuit_breaker": {"failure_threshold": 5, "recovery_timeout": 60}}
        upstreams[name]["health_check"] = {"path": "/healthz", "interval": 2}
    upstreams["orders"]["targets"] = [{"url": urls[-1]}]
    upstreams["search"]["concurrency"] = {"limit": 200}
    return {
        "server": {"port": 0, "max_event_loop_lag": None},
        "admin": {"tokens": {"alice": {"role": "operate", "token": TOKEN}}},
        "tiers": {
            "FREE": {"rate": 2, "capacity": 20},
            "BASIC": {"rate": 1.5, "capacity": 12},
            "PREMIUM": {"rate": 20, "capacity": 200},
        },
        "clients": {"acme": {"tier": "PREMIUM"}, "globex": {"tier": "BASIC"}, "initech": {"tier": "BASIC"}},
        "limits": [
            {"name": "burst", "key": "client", "rate": 8, "capacity": 60},
            {"name": "monthly", "key": "client", "quota": 100_000, "period": "month"},
        ],
        "upstreams": upstreams,
        "log": {"access": False},
    }


def simulated_hour(now: float) -> TrafficHistory:
    """Return a history of an hour that ends at `now`, in seconds since the epoch."""
    source, history = random.Random(7), TrafficHistory()  # noqa: S311 - no secret
    quotas = {name: Quota.per_second(name, 1, 1) for name in ("FREE", "BASIC", "PREMIUM", "ENTERPRISE")}
    recorder = Recorder(SERVICES, SERVICES, quotas, (50, 90, 99), 0.0)
    for number in range(HISTORY_POINTS):
        at = number * POINT_SECONDS
        level = 31 + 7 * math.sin(number / 46) + 3 * math.sin(number / 9) + source.gauss(0, 0.9)
        outage = number in OUTAGE
        for _ in range(round(level * POINT_SECONDS)):
            tier = source.choices(list(quotas), (5, 3, 4, 1))[0]
            client = Client(tier, tier, quotas[tier], "registered")
            exchange = Exchange("", "GET", "/", "", at, client=client, route=source.choice(SERVICES))
            draw = source.random()
            exchange.status, exchange.source = 200, "upstream"
            if draw < (0.17 if number in BURST else 0.03):
                exchange.status, exchange.source, exchange.reason = 429, "gateway", "rate_limited"
                exchange.decision = Decision(tier, quotas[tier], allowed=False, remaining=0, wait_ns=1, reset_ns=1)
            elif draw < (0.4 if outage else 0.05):
                reason = source.choice(("upstream_timeout", "circuit_open", "upstream_connect_error"))
                exchange.status, exchange.source, exchange.reason = 503, "gateway", reason
            else:
                exchange.sent_at = at
            exchange.finished = at + source.lognormvariate(math.log(0.018 if not outage else 0.05), 0.55)
            recorder.observe(exchange)
        history.sample([recorder], at + POINT_SECONDS, now - (HISTORY_POINTS - number) * POINT_SECONDS)
    return history


class Gateway:
    """A gateway in a thread, with its upstreams and a history."""

    def __init__(self, folder: Path) -> None:
        self.upstreams = [Upstream() for _ in range(4)]
        self.file = folder / "gateway.yaml"
        self.write()
        overrides = {"state_dir": str(folder / "state")}
        config = load_config(self.file, overrides)
        self.server = GatewayServer(config, read=lambda: load_config(self.file, overrides), locality=LoopbackRule())
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def write(self, **changed: Any) -> None:
        """Write the configuration, which is JSON and so YAML."""
        values = sections([one.url for one in self.upstreams]) | changed
        self.file.write_text(json.dumps(values, indent=2))

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> int:
        """Send a request; return its status."""
        content = None if body is None else json.dumps(body).encode()
        fields = {"Authorization": f"Bearer {TOKEN}"} if not path.startswith("/api") else {}
        fields |= {"Content-Type": "application/json"} if content else {}
        request = urllib.request.Request(self.url + path, content, fields | headers, method=method)  # noqa: S310 - http
        try:
            with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 - http
                status: int = response.status
                return status
        except urllib.error.HTTPError as error:
            return error.code

    def close(self) -> None:
        """Stop the gateway and the upstreams."""
        self.server.should_exit = True
        self._thread.join()
        for one in self.upstreams:
            one.shutdown()
            one.server_close()


@contextlib.contextmanager
def traffic(gateway: Gateway) -> Iterator[None]:
    """Send some forty requests a second within this block."""
    stop = threading.Event()

    def send(number: int) -> None:
        source = random.Random(number)  # noqa: S311 - no secret
        while not stop.wait(0.16):
            client = source.choices(list(CLIENTS), list(CLIENTS.values()))[0]
            service = source.choice([*SERVICES, *SERVICES, "nowhere"]) if number else "orders"
            gateway.ask(f"/api/{service}/{source.randrange(900)}", **{"X-Client-ID": client})

    threads = [threading.Thread(target=send, args=(number,)) for number in range(7)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def prepare(gateway: Gateway) -> None:
    """Bring the gateway into the state of the pictures."""
    for name, tier in (("umbrella", "ENTERPRISE"), ("hooli", "PREMIUM")):
        gateway.ask(f"/clients/{name}/tier", "POST", {"tier": tier})
    gateway.ask("/clients/acme/grants", "POST", {"tier": "ENTERPRISE", "duration_seconds": 86_400})
    for label in ("production", "continuous integration"):
        gateway.ask("/clients/acme/keys", "POST", {"label": label, "verified_only": False})
    gateway.write(metrics={"percentiles": [50, 90, 99]}, usage={"retention_days": 400})
    gateway.ask("/reload", "POST")
    mode = {"mode": "forced_closed", "duration_seconds": 1800, "comment": "the mail relay is being moved"}
    gateway.ask("/circuit-breakers/mail", "POST", mode)
    gateway.upstreams[-1].is_failing = True


def photograph(gateway: Gateway, folder: Path, chosen: Collection[str]) -> None:
    """Take the pictures."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - an extra

    errors: list[str] = []
    executable = next(path for name in BROWSERS if (path := shutil.which(name)))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for name, page_path, theme, size in PICTURES:
            if name not in chosen:
                continue
            context = browser.new_context(
                viewport=size, color_scheme=theme, device_scale_factor=2 if size is NARROW else 1
            )
            page = context.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.add_init_script(f"sessionStorage.setItem('gateway-operator-token', '{TOKEN}')")
            page.goto(f"{gateway.url}/{page_path if page_path == 'docs' else 'dashboard' + page_path}")
            page.wait_for_timeout(2500)
            if name.startswith("explain"):
                page.get_by_label("Path and query").fill("/api/orders/17?fields=total")
                page.get_by_label("Client id").first.fill("acme")
                page.get_by_role("button", name="Explain", exact=True).click()
                page.wait_for_timeout(600)
            if name == "api":
                page.locator("summary", has_text="/circuit-breakers/{name}").first.click()
            page.screenshot(path=folder / f"{name}.png")
            context.close()
        browser.close()
    if errors:
        sys.exit("\n".join(errors))


def main() -> None:
    """Take the pictures, and make the files small."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--all", action="store_true", help="also pictures that no page of the documentation shows")
    parser.add_argument("--only", default="", help="only pictures whose name has this text")
    parser.add_argument("--seconds", type=float, default=20, help="of traffic before the first picture")
    given = parser.parse_args()
    if importlib.util.find_spec("playwright") is None or not any(map(shutil.which, BROWSERS)):
        parser.error("needs Chromium on the PATH, and the package playwright")
    names = [name for name, *_ in PICTURES if given.only in name and (given.all or name in SHOWN)]
    pictures = given.folder.resolve()
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # pictures show relative paths
        gateway = Gateway(Path())
        try:
            prepare(gateway)
            with traffic(gateway):
                time.sleep(given.seconds)
                history: TrafficHistory = gateway.server._app.state.traffic_history  # noqa: SLF001 - nothing else fills it
                history.restore(simulated_hour(time.time()).points)
                photograph(gateway, pictures, names)
        finally:
            gateway.close()
    for name in names:
        picture = pictures / f"{name}.png"
        if shutil.which("pngquant"):
            command = ["pngquant", "--force", "--skip-if-larger", "--ext", ".png", "128", str(picture)]
            subprocess.run(command, check=False)  # noqa: S603 - a fixed program


if __name__ == "__main__":
    main()
