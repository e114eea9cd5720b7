"""The commands `config` and `init`: origins of values, differences, and first files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api_gateway.admin.settings_view import settings_of
from api_gateway.config import load_config
from api_gateway.process.config_command import run_config
from api_gateway.process.init_command import run_init
from api_gateway.process.running_settings import difference
from api_gateway.settings.openapi_routes import read_openapi
from tests.cases import each

Write = Callable[..., str]
FILE = """server: {port: '${PORT:-8001}'}
upstreams:
  users: http://127.0.0.1:9001
  orders: {targets: [http://127.0.0.1:9002], timeouts: {connect: 3s}}
routes:
- {name: users, path: /api/users, upstream: users}
- {name: orders, path: /api/orders, upstream: orders}
admin: {token: correct-horse-battery}
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str, name: str = "gateway.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return written


def rows(output: str) -> dict[str, tuple[str, str]]:
    """Return value and origin by setting."""
    parts = (re.split(r"  +", line) for line in output.splitlines()[1:])
    return {setting: (value, origin) for setting, value, origin in parts}


def test_show_names_the_origin_of_each_value_and_no_secret(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(FILE)
    monkeypatch.setenv("PORT", "8002")
    monkeypatch.setenv("GATEWAY_SERVER__IDLE_TIMEOUT", "1m")
    assert run_config(["show", "--config", path, "--workers", "2"]) == 0
    found = rows(text := capsys.readouterr().out)
    assert found["server.port"] == ("8002", f"{path}:1 (${{PORT}})")
    assert found["server.workers"] == ("2", "command line")
    assert found["server.idle_timeout"] == ("60.0", "environment GATEWAY_SERVER__IDLE_TIMEOUT")
    assert found["upstreams.orders.timeouts.connect"] == ("3.0", f"{path}:4")
    assert found["upstreams.users.targets[0].url"] == ('"http://127.0.0.1:9001"', f"{path}:3")
    assert "upstreams.users.targets[0].weight" not in found
    assert found["admin.token"] == ("(secret)", f"{path}:8")
    assert "correct-horse" not in text
    assert "server.drain_timeout" not in found
    assert run_config(["show", "--config", path, "--all"]) == 0
    assert rows(capsys.readouterr().out)["server.drain_timeout"] == ("30", "default")


def test_show_as_json_has_the_same(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(FILE)
    assert run_config(["show", "--config", path, "--json"]) == 0
    text = capsys.readouterr().out
    found = {one["setting"]: one for one in json.loads(text)}
    assert found["server.port"]["value"] == 8001
    assert found["admin.token"] == {
        "setting": "admin.token",
        "value": None,
        "secret": True,
        "default": False,
        "origin": f"{path}:8",
    }
    assert "correct-horse" not in text


def test_diff_says_what_a_reload_applies_and_what_needs_a_restart(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write(FILE)
    changed = FILE.replace("8001", "8003").replace("connect: 3s", "connect: 5s").replace("battery", "staple")
    new = write(
        changed.replace("- {name: users", "- {name: more, path: /api/more, upstream: users}\n- {name: users"), "b"
    )
    assert run_config(["diff", old, new]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "server.port: 8001 -> 8003; needs a restart" in lines
    assert "upstreams.orders.timeouts.connect: 3.0 -> 5.0; applied by a reload" in lines
    assert "admin.token: (secret) -> (secret); applied by a reload" in lines
    assert any(line.startswith("routes.more: null -> ") for line in lines)
    assert lines[-1] == "Settings that differ: 4. Applied by a reload: 3. Needing a restart: server.port."
    assert "correct-horse" not in text
    assert run_config(["diff", old, new, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["needs_restart"] == ["server.port"]
    assert {one["setting"]: one["secret"] for one in found["changes"]}["admin.token"] is True
    assert run_config(["diff", old, old]) == 0
    assert capsys.readouterr().out == "No setting differs.\n"


def test_the_settings_of_a_running_gateway_are_compared_by_name(write: Write) -> None:
    old = load_config(write(FILE))
    changed = FILE.replace("8001", "8003").replace("path: /api/orders", "path: /api/sales")
    changed = changed.replace("- {name: users", "- {name: more, path: /api/more, upstream: users}\n- {name: users")
    new = load_config(write(changed, "new.yaml"))
    running = [one.model_dump(mode="json") for one in settings_of(old, with_defaults=True)]
    found = difference(running, settings_of(new, with_defaults=True))
    changes = {one.setting: (one.old, one.new) for one in found.changes}
    assert changes["server.port"] == (8001, 8003)
    assert changes["routes.orders.path"] == ("/api/orders", "/api/sales")
    assert changes["routes.more.path"] == (None, "/api/more")
    assert not [name for name in changes if name.startswith("routes.users")], "its index differs, not its settings"
    assert found.needs_restart == ["server.port"]
    assert found.secrets == ["admin.token"]


@each(
    ("arguments", "code"),
    [(["diff", "a"], 2), (["diff", "a", "b", "c"], 2), (["diff", "--url", "http://a", "b", "c"], 2)],
)
def test_a_difference_is_between_two(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        run_config(arguments)
    assert ended.value.code == code


def test_an_invalid_file_ends_every_command_with_its_lines(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    path = write("server: {port: x}")
    for arguments in (["show", "--config", path], ["check", "--config", path], ["diff", path, path]):
        assert run_config(arguments) == 3
        assert f"{path}:1: server.port: must be a whole number, got 'x'" in capfd.readouterr().err


# First files


def test_init_writes_a_file_that_loads_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gateway.yaml"
    arguments = [str(path), "--upstream", "users=http://127.0.0.1:9001", "--upstream", "a.b=https://b.example"]
    assert run_init(arguments) == 0
    config = load_config(path)
    assert {name: one.targets[0].url for name, one in config.upstreams.items()} == {
        "users": "http://127.0.0.1:9001",
        "a.b": "https://b.example",
    }
    before = path.read_text()
    assert before.startswith("# yaml-language-server: $schema=")
    assert run_init([str(path)]) == 1
    assert run_init([str(tmp_path / "gateway.toml")]) == 1, "it would be YAML, which a start does not read there"
    assert not (tmp_path / "gateway.toml").exists()
    assert "exists already" in capsys.readouterr().err
    assert path.read_text() == before


def test_every_setting_that_the_comments_of_a_first_file_show_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    assert run_init([str(path)]) == 0
    lines = path.read_text().splitlines()
    commented = [re.sub(r"^( *)# ( *(?:[\w']+:|- \{).*)$", r"\1\2", line) for line in lines if "$schema" not in line]
    text = "\n".join(line for line in commented if "Check this" not in line and "completion" not in line)
    (tmp_path / "gateway-token").write_text("a-token-of-operators\n")
    path.write_text(text.replace("/run/secrets", str(tmp_path)))
    config = load_config(path)
    assert set(config.upstreams) == {"users", "orders"}
    assert config.tiers["PREMIUM"].rate == 20
    assert config.server.workers == 2
    assert config.store.is_shared


DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "Shop API"},
    "servers": [{"url": "https://shop.example.com/v1"}],
    "paths": {
        "/orders": {"get": {"operationId": "listOrders"}, "post": {"summary": "Create\n an \x1b[31morder"}},
        "/orders/{id}": {"get": {}, "delete": {}, "parameters": []},
        "/users/{id}/avatar": {"put": {"operationId": "setAvatar"}},
        "/{anything}": {"get": {}},
        "x-note": "no path",
    },
}


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_the_paths_and_methods_of_an_openapi_document_become_routes(form: str, tmp_path: Path) -> None:
    document, path = tmp_path / f"openapi.{form}", tmp_path / "gateway.yaml"
    text = json.dumps(DOCUMENT)
    document.write_text(text if form == "json" else f"# A comment: so this is YAML\n{text}")
    assert run_init([str(path), "--from-openapi", str(document)]) == 0
    config = load_config(path)
    assert config.upstreams["shop-api"].targets[0].url == "https://shop.example.com"
    assert {route.path: (route.methods, route.strip_prefix) for route in config.routes} == {
        "/api/v1/orders": (["GET", "POST", "DELETE"], "/api"),
        "/api/v1/users": (["PUT"], "/api"),
        "/api/v1": (["GET"], "/api"),
    }
    written = path.read_text()
    assert "# GET /v1/orders: listOrders" in written
    assert "\x1b" not in written
    assert written.count("    # cost: 1\n") == 3


@pytest.mark.parametrize(
    ("server", "url", "path"),
    [
        (
            {
                "url": "https://{host}.example.com/{base}",
                "variables": {"host": {"default": "a"}, "base": {"default": "v1"}},
            },
            "https://a.example.com",
            "/api/v1/files",
        ),
        ({"url": "https://{host}/v1"}, None, "/api/v1/files"),
        ({"url": "https://[{host}/v1"}, None, "/api/files"),
        ({"url": "https://a/{base}"}, "https://a", "/api"),
    ],
)
def test_a_server_with_variables_keeps_its_base_path(
    server: dict[str, Any], url: str | None, path: str, tmp_path: Path
) -> None:
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps({**DOCUMENT, "servers": [server], "paths": {"/files/{id}": {"get": {}}}}))
    found = read_openapi(document)
    assert (found.url, [route.path for route in found.routes]) == (url, [path])


def test_segments_that_no_route_can_have_end_its_path(tmp_path: Path) -> None:
    document, path = tmp_path / "openapi.json", tmp_path / "gateway.yaml"
    paths: dict[str, Any] = {
        "/x/*": {"get": {}},
        "/y/:id/z": {"get": {}},
        "/z/a?b=1": {"get": {}},
        "/q/a%20b": {"get": {}},
    }
    document.write_text(json.dumps({**DOCUMENT, "paths": paths}))
    assert run_init([str(path), "--from-openapi", str(document)]) == 0
    assert [route.path for route in load_config(path).routes] == [f"/api/v1/{name}" for name in "xyzq"]


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"swagger": "2.0"}, "must be an OpenAPI 3 document, with openapi: 3.x at its top"),
        ({"openapi": "3.0.0", "paths": {}}, "has no paths with operations"),
        ([], "must be an OpenAPI 3 document, with openapi: 3.x at its top"),
        (
            {**DOCUMENT, "servers": [{"url": "/v1"}]},
            "names no server with a whole URL; add --upstream shop-api=http://host",
        ),
        ({**DOCUMENT, "servers": [{"url": "https://u:p@a"}]}, "names no server with a whole URL; add --upstream"),
    ],
)
def test_a_document_that_cannot_be_used_writes_nothing(
    document: Any, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    assert run_init([str(tmp_path / "out.yaml"), "--from-openapi", str(tmp_path / "openapi.json")]) == 1
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out.yaml").exists()


def test_an_upstream_of_init_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, problem in (
        ("users", "--upstream: must be NAME=URL"),
        (
            "users=ftp://a",
            "out.yaml: upstreams.users.targets[0].url: must be http://host[:port] or https://host[:port]",
        ),
        ("a b=http://a", "must be 1 to 64 letters"),
    ):
        assert run_init([str(tmp_path / "out.yaml"), "--upstream", given]) == 1
        assert problem in capsys.readouterr().err
        assert not (tmp_path / "out.yaml").exists()
