"""Named operator tokens in the configuration: from values, files and the environment, and the same in every worker."""

import json
from pathlib import Path
from typing import Any

import pytest

from api_gateway.admin.operators import Operator, Role
from api_gateway.assembly.access import operator_access
from api_gateway.config import GatewayConfig, load_config
from api_gateway.reload.serialization import deserialized, serialized
from api_gateway.settings.diagnostics import ConfigError
from tests.cases import each

SECRET = "a-canary-of-a-secret"


def found(config: GatewayConfig, token: str) -> Operator | None:
    return operator_access(config).tokens.find(token.encode())


def mistake(admin: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"admin": admin})
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_every_token_identifies_its_operator_in_every_worker(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    tokens = {"reader": {"token_file": str(file)}, "alice": {"role": "operate", "token": "alice-may-operate"}}
    config = load_config(None, {"state_dir": tmp_path, "admin": {"token": SECRET, "tokens": tokens}})
    worker = deserialized(json.loads(json.dumps(serialized(config, {}))))
    for one in (config, worker):
        assert found(one, SECRET) == Operator("admin", Role.OPERATE)
        assert found(one, "from-a-file") == Operator("reader", Role.READ)
        assert found(one, "alice-may-operate") == Operator("alice", Role.OPERATE)
        assert found(one, "wrong") is None
        assert SECRET not in repr(operator_access(one))


def test_a_token_file_is_read_whenever_the_configuration_is(tmp_path: Path) -> None:
    file = tmp_path / "token"
    sections = {"state_dir": tmp_path, "admin": {"tokens": {"reader": {"token_file": str(file)}}}}
    file.write_text("the-first-one")
    assert found(load_config(None, sections), "the-first-one") is not None
    file.write_text("the-second-one")
    config = load_config(None, sections)
    assert (found(config, "the-first-one"), found(config, "the-second-one")) == (None, Operator("reader", Role.READ))


def test_tokens_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GATEWAY_ADMIN__TOKENS__PROMETHEUS__TOKEN", "from-the-environment")
    config = load_config(None, {"state_dir": tmp_path})
    assert found(config, "from-the-environment") == Operator("prometheus", Role.READ)


@each(
    ("admin", "words"),
    [
        ({"tokens": {"reader": {}}}, ["admin.tokens.reader", "needs a token or a token_file"]),
        ({"tokens": {"reader": {"token": "short"}}}, ["admin.tokens.reader.token", "at least 8 characters"]),
        (
            {"tokens": {"reader": {"token": SECRET, "role": "admin"}}},
            ["admin.tokens.reader.role", "must be one of read, operate"],
        ),
        ({"tokens": {"rea der": {"token": SECRET}}}, ["admin.tokens", "rea der"]),
        ({"tokens": {"reader": {"token_file": "/nowhere/token"}}}, ["admin.tokens.reader.token", "/nowhere/token"]),
        (
            {"tokens": {"a": {"token": SECRET}, "b": {"token": SECRET}}},
            ["admin.tokens.b", "is the same token as admin.tokens.a"],
        ),
        (
            {"token": SECRET, "tokens": {"b": {"token": SECRET}}},
            ["admin.tokens.b", "is the same token as admin.token"],
        ),
    ],
)
def test_a_mistake_names_the_token_and_never_shows_it(admin: dict[str, Any], words: list[str]) -> None:
    line = mistake(admin)
    assert all(word in line for word in words), line
