"""`--check` tries what a start would try, and names all mistakes at once: where, what, and what to write instead."""

import socket
from pathlib import Path
from typing import Any

import pytest

from api_gateway.cli import main
from api_gateway.config import load_config
from api_gateway.process.config_watch import ConfigSource
from api_gateway.settings.diagnostics import ConfigError
from tests.kit import RawClient, RawUpstream
from tests.processes import config_file, process

MANY = """\
server:
  port: many
store:
  url: redis://cache:port
upstreams:
  users:
    targets: [{url: "http://127.0.0.1:9001"}]
  orders: 5
routes:
  - {name: a, path: /api/a, upstream: user}
  - {name: b, path: "/api/b/{id}", upstream: users, cost: -1}
  - {name: c, path: /api/c, upstream: orders, fallback: {upstream: nowhere}}
default_tier: GOLD
clients:
  acme: {tier: SILVER}
server: {}
"""


@pytest.fixture
def refused(tmp_path: Path) -> Any:
    """Return the lines that a file of this text is refused with, its name cut off."""

    def load(text: str) -> list[str]:
        path = tmp_path / "gateway.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        return [line.removeprefix(str(path)) for line in caught.value.problems]

    return load


def checked(tmp_path: Path, text: str, *arguments: str) -> tuple[int, list[str], str]:
    """Return the exit code of `--check`, its lines on standard error without the file's name, and its output."""
    path = tmp_path / "gateway.yaml"
    path.write_text(text, encoding="utf-8")
    with process("-m", "api_gateway", "--check", "--config", str(path), *arguments, cwd=tmp_path) as running:
        code = running.popen.wait(60)
    return code, [line.replace(f"{path}:", ":") for line in running.errors.splitlines()], running.output


# All at once


def test_all_errors_are_reported_in_one_run_with_their_lines(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_SERVER__WORKERS", "x")
    monkeypatch.setenv("GATEWAY_LOG", "{")
    lines = refused(MANY)
    for start in (
        ":16: server: given twice",
        "environment GATEWAY_LOG: log: must be JSON",
        "environment GATEWAY_SERVER__WORKERS: server.workers: must be a whole number, got 'x'",
        ":4: store.url: has a port that is not a number",
        ":8: upstreams.orders: must be a section of keys and values, such as {targets: ...} or",
        ":10: routes[0] (a).upstream: no such upstream, got 'user'; did you mean 'users'?",
        ":11: routes[1].cost: must be greater than or equal to 0, got -1",
        ":11: routes[1] (b).path: a placeholder or pattern is compared literally",
        ":12: routes[2] (c).fallback.upstream: no such upstream, got 'nowhere'",
        ":13: default_tier: no such tier, got 'GOLD'; the tiers are FREE",
        ":15: clients.acme.tier: no such tier, got 'SILVER'",
    ):
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)
    assert len(lines) == 11, "a mistake brings no further ones"


@pytest.mark.parametrize(
    "mistake",
    [
        "admin: {tokens: {x: {role: root}}}",
        "admin: {tokens: {x: {role: root, token_file: /nowhere}, y: {}}}",
        "admin: {tokens: {x: 5}}",
        "address_limit: {exempt: [5]}",
        "tiers: {FREE: {candidate: {}}}",
        "upstreams: {users: {targets: []}}",
        "upstreams: {users: {targets: [{}]}}",
        "upstreams: {users: {targets: [5]}}",
        "upstreams: {users: {targets: [{url: 'http://127.0.0.1:9001'}], concurrency: {limit: many}}}",
        "routes: [{name: a, path: /api/a, upstream: users, fallback: {}}]",
        "routes: [{name: a, path: /api/a, upstream: users, fallback: {status: 999}}]",
        "routes: [{name: a, path: /api/a, upstream: users, costs: [{}]}]",
        "routes: [{name: a, path: /api/a, upstream: users, costs: [5], methods: []}]",
        "routes: [{}]",
    ],
)
def test_a_section_that_cannot_be_used_hides_no_mistake_elsewhere(refused: Any, mistake: str) -> None:
    upstreams = "" if mistake.startswith("upstreams") else "upstreams: {users: {targets: [{url: 'http://a:1'}]}}\n"
    lines = refused(f"default_tier: GOLD\n{upstreams}{mistake}\n")
    assert sum(line.startswith(":1: default_tier: no such tier, got 'GOLD'") for line in lines) == 1, lines
    assert len(lines) > 1


def test_no_message_has_the_name_of_a_class(refused: Any) -> None:
    text = "\n".join(refused("upstreams: []\nroutes: {}\ntiers: [a]\nclients: 5\nserver: x\nlog: [1]\nmetrics:\n"))
    assert "Section" not in text
    assert "instance" not in text
    assert "dictionary" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "log:\n",
            ":1: log: has no value; must be a section of keys and values, such as {level: ...}",
        ),
        ("routes: []\n", ":1: routes: is empty; leave it out for one route to each upstream, got []"),
        ("upstreams: {}\n", ":1: upstreams: is empty; leave it out for the demo services, got {}"),
        ("routes:\n- {name: on, path: /api, upstream: x}\n", ":2: routes[0].name: must be text; put it in quotes, as"),
        ("clients:\n  7: {tier: FREE}\n", ":2: clients[7]: is not text; put the key in quotes"),
        (
            "server:\n\tport: 1\n",
            ":2: not YAML: found character '\\t' that cannot start any token; indent with",
        ),
        ("upstreams: {u: {targets: [9001]}}\n", ":1: upstreams.u.targets[0]: must be a section of keys and"),
        ("tiers: {bad name: {rate: 1, capacity: 1}}\n", ":1: tiers.BAD NAME: must be 1 to 64 letters, digits"),
    ],
)
def test_what_yaml_makes_of_a_value_is_reported_with_what_to_write(refused: Any, text: str, expected: str) -> None:
    assert any(line.startswith(expected) for line in refused(text)), refused(text)


# What never matches


def route_problem(**keys: Any) -> str:
    route = {"name": "a", "path": "/api/a", "upstream": "up", **keys}
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"upstreams": {"up": {"targets": [{"url": "http://h"}]}}, "routes": [route]})
    (line,) = caught.value.problems
    return line.removeprefix("command line: routes[0] (a).")


@pytest.mark.parametrize(
    ("path", "instead"),
    [
        ("/api/a/*", "write '/api/a'"),
        ("/api/{id}/x", "write '/api'"),
        ("/api/:id", "write '/api'"),
        ("/api/<id>", "write '/api'"),
        (r"/api/a/\d+", "write '/api/a'"),
        ("/api/[ab]", "write '/api'"),
        ("/api/a$", "write '/api'"),
        ("/api/a/../b", "write '/api/b'"),
        ("/api/./b", "write '/api/b'"),
        ("/api//b", "write '/api/b'"),
        ("/api/%41", "write '/api/A'"),
        ("/api/a ", "begins or ends with a space"),
        ("/api/a;v=1/b", "write '/api/a/b'"),
        ("/api/a./b", "write '/api/a/b'"),
        ("/api/.../b", "write '/api/b'"),
        ("/api/%2e%2e/api/x", "write '/api/x'"),
        ("/api/a/%7Bid%7D", "write '/api/a'"),
        ("/api/a%00b", "compared decoded"),
        ("/metrics", "overlaps the operator endpoint /metrics: set admin.listen"),
        ("/clients/x", "overlaps the operator endpoint /clients: set admin.listen"),
        ("/", "overlaps the operator endpoint /health: set admin.listen"),
    ],
)
def test_a_path_that_never_matches_is_refused_with_what_to_write(path: str, instead: str) -> None:
    line = route_problem(path=path)
    assert line.startswith("path: ")
    assert instead in line
    assert line.endswith(f"got {path!r}")


@pytest.mark.parametrize("path", ["/health/*", "/*", "/{id}", "/..", "/metrics//y", "/%6detrics"])
def test_no_path_is_suggested_that_would_be_refused(path: str) -> None:
    line = route_problem(path=path)
    assert "write" not in line
    assert "where operator endpoints are" in line


@pytest.mark.parametrize("path", ["/api/a.b", "/api/a-b_c~d", "/api/caf\u00e9", "/api/a(b)", "/api/100%", "/api/a:b"])
def test_a_path_that_matches_is_accepted(path: str) -> None:
    route = {"name": "a", "path": path, "upstream": "up"}
    assert load_config(None, {"upstreams": {"up": {"targets": [{"url": "http://h"}]}}, "routes": [route]})


@pytest.mark.parametrize(
    ("host", "instead"),
    [
        ("a.*.example.com", "only *. at the beginning is a pattern"),
        ("*", "leave host out"),
        ("", "leave host out"),
        ("host:8080", "write 'host'"),
        ("https://example.com/x", "write 'example.com'"),
        ("https://example.com:443", "write 'example.com'"),
        ("example.com/x", "write 'example.com'"),
        ("::1", "write '[::1]'"),
        ("[::1]:80", "write '[::1]'"),
        ("b\u00fccher.example", "write 'xn--bcher-kva.example'"),
        ("a..b", "must be a host name"),
        ("exa mple", "must be a host name"),
    ],
)
def test_a_host_that_never_matches_is_refused_with_what_to_write(host: str, instead: str) -> None:
    line = route_problem(host=host)
    assert line.startswith("host: ")
    assert instead in line


def test_methods_and_costs_that_never_match_are_refused() -> None:
    assert route_problem(methods=["trace"]).startswith("methods[0]: is never proxied")
    assert route_problem(costs=[{"path": "/api/b", "cost": 1}]).startswith("costs[0].path: never matches: it must be")
    costs = [{"methods": ["PUT"], "cost": 1}]
    assert route_problem(methods=["GET"], costs=costs).startswith("costs[0].methods: never match: the route takes GET")


@pytest.mark.parametrize("host", ["Example.ORG", "example.org.", "EXAMPLE.org:80", "example.org.:8080"])
def test_hosts_are_the_same_in_any_case_with_any_port_and_with_a_trailing_dot(gateway: Any, host: str) -> None:
    upstream = RawUpstream()
    routes = [{"name": "a", "path": "/api/a", "upstream": "up", "host": "Example.org."}]
    running = gateway({"upstreams": {"up": {"targets": [{"url": upstream.url}]}}, "routes": routes})
    with RawClient(running.port) as client:
        client.send(f"GET /api/a HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert client.answer().status == 200
        client.send(b"GET /api/a HTTP/1.1\r\nHost: other.org\r\n\r\n")
        assert client.answer().status == 404
    upstream.close()


# What a start would try


def test_all_errors_of_a_start_are_reported_together(tmp_path: Path, certificates: Path) -> None:
    one, other = certificates / "here", certificates / "other"
    (tmp_path / "empty.pem").write_text("")
    (tmp_path / "file").write_text("")
    code, errors, _ = checked(
        tmp_path,
        f"""\
server: {{host: nowhere.invalid}}
state_dir: {tmp_path}/file/state
store:
  url: "rediss://cache?ca_file=missing.pem"
  clients: sqlite
upstreams:
  a:
    targets: [{{url: "https://a"}}]
    tls: {{ca_file: missing.pem, cert_file: {one}.pem, key_file: missing.key}}
  b:
    targets: [{{url: "https://b"}}]
    tls: {{ca_file: empty.pem, cert_file: {one}.pem, key_file: {other}.key}}
  c:
    targets: [{{url: "https://c"}}]
    tls: {{key_file: {one}.key}}
  d:
    targets: [{{url: "https://d"}}]
    tls: {{cert_file: {one}.pem}}
""",
    )
    assert code == 3
    for start in (
        ":1: server.host: the host cannot be resolved: ",
        f":2: state_dir: '{tmp_path}/file' is not a folder, got ",
        ":4: store.url: ca_file: cannot be read: no such file or directory, got 'missing.pem'",
        ":9: upstreams.a.tls.ca_file: cannot be read: no such file or directory, got 'missing.pem'",
        ":9: upstreams.a.tls.key_file: cannot be read: no such file or directory, got 'missing.key'",
        ":12: upstreams.b.tls.ca_file: contains no PEM certificate",
        f":12: upstreams.b.tls.key_file: does not belong to '{one}.pem', got '{other}.key'",
        ":15: upstreams.c.tls.key_file: needs the cert_file that it belongs to",
        ":18: upstreams.d.tls.cert_file: contains no private key; name the file of its key in 'key_file', got ",
    ):
        assert sum(line.startswith(start) for line in errors) == 1, (start, errors)


def test_http2_needs_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("upstreams:\n  up:\n    targets: [{url: 'https://127.0.0.1:9'}]\n    http2: true\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["--check", "--config", str(path)]) == 3
    assert f"{path}:4: upstreams.up.http2: needs the package h2: pip install" in capfd.readouterr().err


def test_a_port_in_use_is_a_warning_as_the_gateway_itself_may_use_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        text = f"server:\n  port: {port}\nupstreams: {{up: {{targets: [{{url: 'http://h'}}]}}}}\n"
        code, errors, output = checked(tmp_path, text)
    assert code == 0
    warning, read, state = errors
    assert warning.startswith("warning: :2: server.port: is in use; the start fails until the other program has ended")
    assert "The configuration is valid: 1 route," in output
    assert read == f"Read: {tmp_path / 'gateway.yaml'}."
    assert state.startswith(f"State is kept in {tmp_path}")


def test_what_is_allowed_and_not_meant_is_a_warning(tmp_path: Path) -> None:
    code, errors, _ = checked(
        tmp_path,
        """\
server: {port: 0}
upstreams:
  used: {targets: [{url: "http://h"}], tls: {ca_file: x.pem}}
  idle: {targets: [{url: "http://h"}]}
routes:
  - name: a
    path: /api/a
    upstream: used
    costs:
      - {cost: 2}
      - {methods: [GET], cost: 1}
""",
    )
    assert code == 0
    assert errors[:-2] == [
        "warning: :3: upstreams.used.tls: has no effect without an https target",
        "warning: :4: upstreams.idle: no route uses this upstream",
        "warning: :11: routes[0] (a).costs[1]: is never applied: costs[0] before it matches all of its requests",
    ]


def test_an_empty_file_is_no_demo(tmp_path: Path) -> None:
    code, errors, _ = checked(tmp_path, "# nothing yet\n")
    assert code == 3
    assert "configures nothing, so the demo services would start" in errors[0]


def test_a_start_names_all_files_that_it_cannot_use(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "upstreams:\n"
        "  a: {targets: [{url: 'https://a'}], tls: {ca_file: no-a.pem}}\n"
        "  b: {targets: [{url: 'https://b'}], tls: {ca_file: no-b.pem}}\n"
    )
    with process("-m", "api_gateway", "--port", "0", "--config", str(path), cwd=tmp_path) as running:
        assert running.popen.wait(60) == 3
    assert [line.partition(": cannot")[0] for line in running.errors.splitlines()] == [
        f"{path}:2: upstreams.a.tls.ca_file",
        f"{path}:3: upstreams.b.tls.ca_file",
    ]


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("GATEWAY_PORT", "; did you mean 'GATEWAY_SERVER__PORT'?"),
        ("GATEWAY_SERVER_PORT", "; did you mean 'GATEWAY_SERVER__PORT'?"),
        ("GATEWAY_SERVR__PORT", "; did you mean 'GATEWAY_SERVER__PORT'?"),
        ("GATEWAY_TIER", "; did you mean 'GATEWAY_TIERS'?"),
        ("GATEWAY_CONFIG_", "; did you mean 'GATEWAY_CONFIG'?"),
        ("GATEWAY_QQQQQQQQQQQQQQQQQQ", ""),
    ],
)
def test_a_variable_that_is_no_setting_is_named_with_the_nearest_that_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    hint: str,
) -> None:
    """It is not among what was read, and one that the command line overrides is not either."""
    path = config_file(tmp_path, "http://127.0.0.1:9")
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("GATEWAY_SERVER__PORT", "1")
    monkeypatch.setenv("GATEWAY_SERVER__WORKERS", "1")
    monkeypatch.setenv("GATEWAY_CONFIG", path)
    source = ConfigSource(None, {"server": {"port": 0}})
    assert source.load().sources.names == ["command line", "environment GATEWAY_SERVER__WORKERS", path]
    source.load()
    assert [one.getMessage() for one in caplog.records] == [
        f"environment: {variable} is not a setting and is ignored{hint}"
    ]


def test_it_tells_which_ids_anyone_can_claim(tmp_path: Path) -> None:
    digest = "sha256:" + "0" * 64
    clients = f"clients: {{acme: {{tier: PREMIUM}}, initech: {{keys: {{one: {{digest: '{digest}'}}}}}}}}"
    path = config_file(tmp_path, "http://127.0.0.1:9", clients)
    with process("-m", "api_gateway", "--check", "--config", path, cwd=tmp_path) as running:
        assert running.exit_code() == 0
    assert "Anyone who sends X-Client-ID can claim 1 of 2 configured clients: acme.\n" in running.errors
