"""Deprecated settings are read as those in their place, with a warning that names place and versions."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from api_gateway import config
from api_gateway.config import GatewayConfig, load_config, read_config
from api_gateway.settings.deprecations import DEPRECATED, Deprecation, renamed
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.file_schema import file_schema

FAKES = (
    Deprecation(("server", "listen_port"), "0.0.1", "9.0", new="port"),
    Deprecation(("routes", "*", "price"), "0.0.1", "9.0", new="cost"),
    Deprecation(("log", "level"), "0.0.1", "9.0", value="warning", instead="write error"),
)
FILE = """server: {listen_port: 8001}
log: {level: warning}
upstreams: {users: http://127.0.0.1:9001}
routes:
- {name: a, path: /api/a, upstream: users, price: 2}
- {name: b, path: /api/b, upstream: users, cost: 3}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config, "DEPRECATED", FAKES)
    path = tmp_path / "gateway.yaml"
    path.write_text(FILE)
    return path


def test_a_deprecated_key_works_and_is_named_with_place_and_versions(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_SERVER__LISTEN_PORT", "8002")
    warnings: list[str] = []
    found = read_config(file, warn=warnings.append).config
    assert (found.server.port, found.log.level) == (8002, "warning")
    assert [route.cost for route in found.routes] == [2, 3]
    until = "deprecated since 0.0.1 and removed in 9.0"
    assert warnings == [
        f"{file}:1: server.listen_port: is {until}; write server.port",
        f"{file}:5: routes[0].price: is {until}; write routes[0].cost",
        f"{file}:2: log.level: the value 'warning' is {until}; write error",
        f"environment GATEWAY_SERVER__LISTEN_PORT: server.listen_port: is {until}; write server.port",
    ]


def test_both_keys_are_an_error(file: Path) -> None:
    file.write_text(FILE.replace("cost: 3", "cost: 3, price: 3"))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    (line,) = caught.value.problems
    assert line == (
        f"{file}:6: routes[1].price: is deprecated since 0.0.1 and removed in 9.0, and routes[1].cost is set too;"
        " keep cost only"
    )


def test_the_schema_accepts_deprecated_keys_and_marks_them() -> None:
    schema = file_schema(GatewayConfig, "", FAKES)
    values: dict[str, Any] = {
        "server": {"listen_port": 8001},
        "routes": [{"name": "a", "path": "/", "upstream": "b", "price": 1}],
    }
    jsonschema.Draft202012Validator(schema).validate(values)
    assert schema["$defs"]["ServerSection"]["properties"]["listen_port"]["deprecated"] is True
    assert not jsonschema.Draft202012Validator(file_schema(GatewayConfig, "")).is_valid(values)


def test_what_is_not_deprecated_stays_the_same_object() -> None:
    values = {"server": {"port": 1}}
    assert renamed(values, FAKES).values["server"] is values["server"]


def test_every_entry_names_a_setting_that_exists_and_both_versions() -> None:
    schema = file_schema(GatewayConfig, "", DEPRECATED)
    assert schema
    for one in DEPRECATED:
        assert one.since < one.removed_in
        assert one.new is not None or one.instead
