"""No credential is shown, whatever becomes of the request or command that has it: all output and state is searched.

`test_canary` does the same for the settings that hold secrets.
"""

import base64
import hmac
import json
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import quote

import pytest

from api_gateway.clients.api_keys import digest_of, new_key
from api_gateway.models import KEY_PREFIX
from tests.kit import PATIENCE, RawRequest, RawUpstream, Wire, ask, eventually
from tests.processes import START, Running, process
from tests.tls_kit import Authority

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
FAILURES = tuple(f"/api/up/{name}" for name in ("500", "reset", "invalid", "fail"))
PATHS = ("/api/up/x", *FAILURES, "/api/dead/x", "/api/secure/x", "/nowhere")
FAILING = """
class Failing:
    def __init__(self, options):
        pass

    def on_request(self, request):
        if request.path.endswith("/fail"):
            raise LookupError("the extension fails")
"""
HAVE_DIGESTS = ("file clients.sqlite3", "GET /configuration", "config show")  # the store, and settings
JSON = {"Content-Type": "application/json"}


def behave(wire: Wire, request: RawRequest) -> bool:
    """Respond, or fail as the path says."""
    if b"/silent" in request.line:
        wire.read_until(b"never")
    if b"/reset" in request.line:
        return False
    invalid = b"HTTP/1.1 2x0 no status\r\n\r\n"
    failing = {b"/500": b"HTTP/1.1 500 Failed\r\nContent-Length: 0\r\n\r\n", b"/invalid": invalid}
    wire.send(next((answer for part, answer in failing.items() if part in request.line), HEAD))
    return b"/invalid" not in request.line


class Quoting(BaseHTTPRequestHandler):
    """A collector of traces and events that refuses them, and quotes the request as it does."""

    received: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append(str(self.headers))
        body = str(self.headers).encode()
        self.send_response(400, "Refused")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the signature is the library's
        pass


@contextmanager
def quoting_collector() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Quoting) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def token_of(secret: str, algorithm: str = "HS256", **claims: Any) -> str:
    """Return a token; its client is not a secret."""
    now = int(time.time())
    given = {"iss": "https://issuer.test", "aud": "api", "sub": "user", "iat": now, "exp": now + 3600, **claims}
    parts = [json.dumps({"alg": algorithm, "typ": "JWT"}), json.dumps(given)]
    signed = ".".join(base64.urlsafe_b64encode(part.encode()).rstrip(b"=").decode() for part in parts)
    signature = hmac.new(secret.encode(), signed.encode(), "sha256").digest()
    return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


class Secrets:
    """Everything that must not be shown, by name."""

    def __init__(self) -> None:
        self.operator, self.reader, self.stranger = (secrets.token_hex(24) for _ in range(3))
        self.hmac, self.collector, self.password = (secrets.token_hex(24) for _ in range(3))
        self.webhook = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
        self.configured, self.wrong = (new_key(secrets.token_bytes(32)) for _ in range(2))
        self.malformed = f"{KEY_PREFIX}{secrets.token_hex(30)}"
        self.private: list[str] = []  # lines of private keys
        self.shown: list[str] = []  # each once, in the response that creates it
        claim = {"email": f"{secrets.token_hex(10)}@user.test"}
        self.valid = token_of(self.hmac, **claim)
        self.forged, self.unsigned = token_of("x" * 32, **claim), token_of("x" * 32, "none", **claim)
        self.expired = token_of(self.hmac, exp=int(time.time()) - 3600, iat=int(time.time()) - 7200, **claim)

    @property
    def keys(self) -> list[str]:
        return [self.configured, self.wrong, self.malformed, *self.shown]

    @property
    def tokens(self) -> list[str]:
        return [self.valid, self.forged, self.unsigned, self.expired]

    def forms(self) -> Iterator[str]:
        """Yield each form in which one could be shown."""
        plain = [self.operator, self.reader, self.stranger, self.hmac, self.collector, self.password, self.webhook]
        plain += self.private
        parts = [part for token in self.tokens for part in token.split(".")[1:]]
        for secret in (*plain, *self.keys, *parts):
            bare = secret.removeprefix(KEY_PREFIX)[4:32]  # also a part of it
            yield bare
            yield secret.encode().hex()[8:56]
            yield "".join(f"%{byte:02X}" for byte in bare.encode()[:12])
            for before in (b"", b"-", b"--"):
                encoded = base64.b64encode(before + secret.encode()).decode()
                yield encoded[8:40]
        for key in (self.configured, *self.shown):
            yield digest_of(key.encode())


def basic(user: str, password: str = "") -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def fields_with(key: str) -> list[dict[str, str]]:
    """Return header fields with a key where it belongs, and where it does not."""
    schemes = (
        f"Bearer {key}",
        basic(key),
        basic("user", key),
        f"Token {key}",
        f"Bearer\t{key}",
        f'Bearer "{key}"',
        key,
    )
    elsewhere = (
        "X-Client-ID",
        "X-Request-ID",
        "X_API_Key",
        "Cookie",
        "Referer",
        "User-Agent",
        "Origin",
        "traceparent",
    )
    others = ("X-Forwarded-For", "X-Request-Timeout", "Expect", "Proxy-Authorization")
    return [
        {"X-API-Key": key},
        {"X-API-Key": f"{key}x"},
        *({"Authorization": value} for value in schemes),
        *({name: key} for name in (*elsewhere, *others)),
    ]


def malformed_requests(secret: str) -> list[bytes]:
    """Return requests that the gateway refuses before it knows what they are."""
    key = secret.encode()
    field = b"Host: a\r\nX-API-Key: " + key
    return [
        b"GET /api/up/x HTTP/1.1\r\nHost: a\r\nX-API-Key " + key + b"\r\n\r\n",
        b"GET /api/" + key + b" HTTP/9.9\r\nHost: a\r\n\r\n",
        b"GET /api/up/x HTTP/1.1\r\n" + field + b"\0\r\n\r\n",
        key + b" /api/up/x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /api/up/x HTTP/1.1\r\n" + field * 2_000 + b"\r\n\r\n",
        b"GET /api/up/x HTTP/1.1\r\n" + field + b"\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /api/up/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: " + key + b"\r\n\r\n",
        b"GET /api/up/x HTTP/1.1\r\nHost: " + key + b"\r\nHost: " + key + b"\r\n\r\n",
        b"POST /api/up/x HTTP/1.1\r\n" + field + b"\r\nTransfer-Encoding: chunked\r\n\r\nzz" + key + b"\r\n",
    ]


# Requests with a secret ($) at places where nothing of it is shown, whatever its form; | is the end of a line.
ANY_SECRET = (
    *(f"$ {path} HTTP/1.1|Host: a||" for path in ("/api/up/x", "/api/up/500", "/api/got/x", "/", "*")),
    *(
        f"GET {form} HTTP/1.1|Host: a||"
        for form in ("http://u:$@a/", "http://u:$@a:b/", "http:///?$", "http://$/", "/api/up/x?$=$")
    ),
    *(f"GET /api/up/x{end}|Host: a||" for end in ("#$ HTTP/1.1", " HTTP/$", " $", " $ HTTP/1.1")),
    "CONNECT $:443 HTTP/1.1|Host: a||",
    *(f"GET /api/up/x HTTP/1.1|Host: a|{line}||" for line in ("$: 1", "$ : 1", "$", " $", ":$", "a: 1|\t$")),
    *(f"GET /api/up/x HTTP/1.1|Host: {host}||" for host in ("$", "u:$@a", "a:$", "a/$", "a?$")),
    *(
        f"GET /api/up/x HTTP/1.1|Host: a|{name}: $||"
        for name in (
            *("Content-Length", "Expect", "Connection", "TE", "Upgrade", "Forwarded", "X-Forwarded-Host", "Range"),
            *("X-Forwarded-Proto", "traceparent", "tracestate", "X-Request-Timeout", "Content-Type", "Cookie", "Via"),
            *("Accept-Encoding", "Max-Forwards", "Proxy-Authorization", "Sec-WebSocket-Key", "Idempotency-Key"),
        )
    ),
    *(
        f"GET /api/up/x HTTP/1.1|Host: a|Connection: Upgrade|Upgrade: websocket|{fields}||"
        for fields in ("Sec-WebSocket-Version: $", "Sec-WebSocket-Version: 13|Sec-WebSocket-Protocol: $")
    ),
    *(
        f"OPTIONS /api/up/x HTTP/1.1|Host: a|Origin: https://a.test|Access-Control-Request-{name}: $||"
        for name in ("Method", "Headers")
    ),
    *(
        f"POST /api/up/x HTTP/1.1|Host: a|Transfer-Encoding: chunked||{body}"
        for body in (
            *("1;$=1|x|0||", '1;a="$"|x|0||', "1|$|", "$|"),
            *(f"1|x|0|{late}||" for late in ("X: $", "$: 1", "$", "$ :", "Content-Length: $")),
        )
    ),
)


class Listener:
    """Sends requests to a gateway, and keeps all that it and its commands say."""

    def __init__(self, running: Running, folder: Path, kept: Secrets) -> None:
        self.running, self.folder, self.kept = running, folder, kept
        self.said: dict[str, str] = {}
        self.ids: list[str] = []
        self.statuses: set[int] = set()

    def ask(self, path: str, headers: Mapping[str, str], method: str = "GET", body: bytes | None = None) -> Any:
        answer = ask(f"{self.running.url}{path}", headers=dict(headers), method=method, body=body)
        self.said[f"{len(self.said)} {method} {path}"] = f"{answer.body!r} {answer.headers}"
        self.statuses.add(answer.status)
        if "X-Request-ID" in answer.headers:
            self.ids.append(answer.headers["X-Request-ID"])
        return answer

    def create(self, path: str, headers: Mapping[str, str]) -> str:
        """Create a key; the only response that may show it is not kept. Return its id."""
        answer = ask(f"{self.running.url}{path}", method="POST", headers=dict(headers), body=b"{}").json()
        self.kept.shown.append(answer["key"])
        return str(answer["id"])

    def send(self, data: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self.running.port), PATIENCE) as sock, suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            received = b""
            while more := sock.recv(65_536):
                received += more
            self.said[f"{len(self.said)} sent {data[:20]!r}"] = received.decode("latin-1")

    def events(self, headers: Mapping[str, str]) -> None:
        """Keep the first event of the dashboard, which has the whole state."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        with socket.create_connection(("127.0.0.1", self.running.port), PATIENCE) as sock:
            sock.sendall(f"GET /dashboard/events HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
            received = b""
            while b"\r\n\r\n" not in received or received.count(b"\n\n") < 1:
                received += sock.recv(65_536)
        self.said["dashboard"] = received.decode("latin-1")

    def run(self, *arguments: str, **variables: str) -> None:
        """Keep what a command says."""
        (place := self.folder / f"command-{len(self.said)}").mkdir()
        with process("-m", "api_gateway", *arguments, cwd=place, **variables) as one:
            one.exit_code()
            self.said[f"{len(self.said)} {' '.join(arguments[:2])}"] = one.output + one.errors


def configuration(folder: Path, kept: Secrets, up: str, collector: str, log_format: str) -> Path:
    for name, secret in (("operator", kept.operator), ("hmac", kept.hmac)):
        (folder / name).write_text(secret)
        (folder / name).chmod(0o600)
    issuer = {"issuer": "https://issuer.test", "audiences": ["api"], "algorithms": ["HS256"]}
    issuer["secret_file"] = str(folder / "hmac")
    own, other = (Authority(folder, name).issue(name, "localhost") for name in ("own", "other"))
    kept.private = [line for pair in (own, other) for line in pair.key.read_text().splitlines()[1:-1]]
    (folder / "failing.py").write_text(FAILING)
    upstreams: dict[str, Any] = {
        name: {"targets": [{"url": url}], "retry": {"attempts": 2, "min_retries_per_second": 1000}}
        for name, url in (("up", up), ("dead", "http://127.0.0.1:9"))
    }
    client = {"cert_file": str(own.certificate), "key_file": str(own.key)}
    upstreams["silent"] = {"targets": [{"url": up}]}  # its breaker is closed
    upstreams["secure"] = {"targets": [{"url": "https://127.0.0.1:9"}], "tls": client}
    sections = {
        "admin": {
            "token_file": str(folder / "operator"),
            "tokens": {"reader": {"role": "read", "token": kept.reader}},
            "local": False,
        },
        "identity": {"sources": ["api_key", "jwt", "header", "address"], "jwt": {"issuers": {"one": issuer}}},
        "clients": {"acme": {"keys": {"laptop": {"digest": f"sha256:{digest_of(kept.configured.encode())}"}}}},
        "tiers": {"FREE": {"rate": 100_000, "capacity": 100_000}},
        "address_limit": {"rate": 100_000, "capacity": 100_000, "exempt": []},
        "tracing": {"enabled": True, "endpoint": collector, "client_attributes": True},
        "webhook": {"url": f"{collector}/events"},
        "log": {"level": "debug", "format": log_format},
        "usage": {"enabled": True},
        "extensions": [{"name": "failing", "use": f"{folder / 'failing.py'}:Failing"}],
        "upstreams": upstreams,
        "routes": [
            {"name": "up", "path": "/api/up", "upstream": "up"},
            {"name": "dead", "path": "/api/dead", "upstream": "dead"},
            {"name": "secure", "path": "/api/secure", "upstream": "secure"},
            {"name": "silent", "path": "/api/silent", "upstream": "silent"},
            {"name": "got", "path": "/api/got", "upstream": "up", "methods": ["GET"]},
        ],
        "state_dir": str(folder / "state"),
    }
    (folder / "gateway.yaml").write_text(json.dumps(sections))
    return folder / "gateway.yaml"


def misplace(listener: Listener, key: str, operator: dict[str, str]) -> None:
    """Send a key where an id, a name or a value belongs."""
    in_base64 = base64.b64encode(key.encode()).decode()
    named = (f"/clients/{key}", f"/clients/acme/keys/{key}", f"/explain/{key}", f"/circuit-breakers/{key}")
    asked = (f"/history?client={key}", f"/metrics?format={key}", f"/usage?client={key}")
    for path in (
        f"/api/up/{key}",
        f"/api/up/x?k={in_base64}",
        f"/{quote(key).replace('_', '%5F')}",
        *named,
        *asked,
    ):
        listener.ask(path, operator)
    for path, body in (
        ("/explain", {"path": f"/api/up/{key}", "client_id": key, "key_id": key}),
        ("/explain", {"path": "/api/up/x", "headers": {"X-API-Key": key}}),
        ("/clients/acme/keys", {"label": key}),
        ("/clients/acme/keys", {"routes": [key], "expires_at": key}),
        ("/clients/acme/tier", {"tier": key}),
        (f"/clients/acme/keys/{key}/rotate", {}),
    ):
        listener.ask(path, operator | JSON, "POST", json.dumps(body).encode())
    listener.ask("/clients/acme/keys", operator | JSON, "POST", key.encode())


def look(listener: Listener, operator: dict[str, str], reader: dict[str, str]) -> None:
    """Read everything that operators can read."""
    pages = ("/health", "/metrics", "/metrics?format=prometheus", "/circuit-breakers", "/history?limit=1000", "/audit")
    for path in (
        *pages,
        "/clients",
        "/clients/made",
        "/clients/made/keys",
        "/usage",
        "/limits/made",
        "/tiers",
        "/problems",
    ):
        for given in (operator, reader):
            listener.ask(path, given)
    for identifier in listener.ids[:: len(listener.ids) // 40]:
        listener.ask(f"/explain/{identifier}", operator)
    listener.events(operator)


def drive(listener: Listener, kept: Secrets) -> None:
    """Send every credential in every form to everything that may show it."""
    operator, reader = ({"Authorization": f"Bearer {secret}"} for secret in (kept.operator, kept.reader))
    first = listener.create("/clients/made/keys", operator | JSON)
    listener.create(f"/clients/made/keys/{first}/rotate", operator | JSON)
    fields = [each for key in kept.keys for each in fields_with(key)]
    fields += [{"Authorization": f"{scheme} {token}"} for scheme in ("Bearer", "JWT") for token in kept.tokens]
    fields += [{"Authorization": basic("user", kept.password)}, {"Authorization": f"Bearer {kept.stranger}"}, operator]
    for number, each in enumerate(fields):
        for path in (PATHS[number % len(PATHS)], PATHS[(number + 1) % len(PATHS)]):
            listener.ask(path, each)
    for key in kept.keys:
        misplace(listener, key, operator)
    for token in kept.tokens:
        listener.ask(f"/api/up/confirm/{token}", {})
        listener.ask(f"/nowhere/{token}?token={token}", {})
    for secret in (kept.configured, kept.valid):
        for data in malformed_requests(secret):
            listener.send(data)
    for template in ANY_SECRET:
        listener.send(template.replace("$", kept.password).replace("|", "\r\n").encode())
    look(listener, operator, reader)
    for secret in (kept.stranger, kept.configured, kept.valid):  # few, as an address may fail only so often
        listener.ask("/clients", {"Authorization": f"Bearer {secret}"})


def command(listener: Listener, config: Path, kept: Secrets, variables: Mapping[str, str]) -> None:
    """Run the commands that read the configuration, and those that ask the gateway."""
    own = ("--config", str(config))
    for reading in (["--check"], ["config", "show"], ["doctor"]):
        listener.run(*reading, *own, **variables)
    (log := config.parent / "access.log").write_text(listener.running.output)
    listener.run("replay", *own, str(log), "--jobs", "1", **variables)
    there = ("--url", listener.running.url, "--token-file", str(config.parent / "operator"))
    for asking in (
        ["explain", listener.ids[0]],
        ["explain", kept.configured],
        ["keys", "list", "made"],
        ["top", "--once"],
        ["top", "--once", "--json"],
        ["tail", "--no-follow", "--lines", "500"],
        ["config", "diff", str(config)],
    ):
        listener.run(*asking, *there)
    listener.run("keys", "revoke", "made", kept.wrong, *there)
    listener.run("keys", "list", "made", "--token", kept.operator, "--url", listener.running.url)
    listener.run("limits", "made", f"--tokn={kept.operator}", kept.reader)


def spoil_the_key_of_a_client_certificate(running: Running, config: Path) -> None:
    """Have it reloaded when it is the key of another certificate, and when it is not a key."""
    key, other = config.parent / "own.key", config.parent / "other.key"
    text = key.read_text()
    for number, spoiled in enumerate((other.read_text(), text.replace("M", "N"), text[: len(text) // 2]), 1):
        key.write_text(spoiled)
        running.signal(signal.SIGHUP)
        eventually(lambda count=number: running.errors.count("upstreams.secure.tls") >= count, "it is refused", START)  # type: ignore[misc]


def end_while_a_request_is_open(running: Running, up: RawUpstream, kept: Secrets, by: int) -> None:
    """End the process; by SIGPROF, as native code that does not return is ended, it writes all stacks."""
    with socket.create_connection(("127.0.0.1", running.port), PATIENCE) as sock:
        sock.sendall(f"GET /api/silent HTTP/1.1\r\nHost: a\r\nX-API-Key: {kept.configured}\r\n\r\n".encode())
        if by == signal.SIGPROF:
            eventually(lambda: any(b"/silent" in one.line for one in up.requests), "the upstream has the request")
            running.signal(by)
    if by != signal.SIGPROF:
        running.signal(by)
    running.exit_code()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_credential_is_shown_by_anything_that_handles_it(tmp_path: Path, log_format: str) -> None:
    kept = Secrets()
    variables = {
        "GATEWAY_WEBHOOK__SECRET": kept.webhook,
        "GATEWAY_TRACING__HEADERS": f"Authorization=Bearer%20{kept.collector}",
    }
    Quoting.received.clear()
    with ExitStack() as stack:
        up = stack.enter_context(closing(RawUpstream(behave)))
        collector = stack.enter_context(quoting_collector())
        config = configuration(tmp_path, kept, up.url, collector, log_format)
        (place := tmp_path / "place").mkdir()
        running = stack.enter_context(
            process("-m", "api_gateway", "--config", str(config), "--port", "0", cwd=place, **variables)
        )
        listener = Listener(running, tmp_path, kept)
        drive(listener, kept)
        command(listener, config, kept, variables)
        eventually(lambda: any(kept.collector in headers for headers in Quoting.received), "traces are sent", START)
        spoil_the_key_of_a_client_certificate(running, config)
        end_while_a_request_is_open(running, up, kept, signal.SIGPROF if log_format == "text" else signal.SIGTERM)
    if log_format == "text":
        assert "most recent call first" in running.errors, "all stacks are written"
    assert "LookupError" in running.errors, "the traceback of a failed extension is written"
    assert listener.statuses >= {200, 400, 401, 404, 422, 500, 502}, "requests succeed, and fail in many ways"
    listener.said |= {"output": running.output, "errors": running.errors}
    files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert files
    digests = {digest_of(key.encode()) for key in kept.keys}
    listener.said |= {f"file {path.name}": path.read_bytes().decode("latin-1") for path in files}
    found = {
        (where, text[max(0, text.index(form) - 200) : text.index(form) + 100])
        for form in kept.forms()
        for where, text in listener.said.items()
        if form in text and not (form in digests and any(place in where for place in HAVE_DIGESTS))
    }
    assert not found, sorted(found)[:10]
