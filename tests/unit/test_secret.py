"""Secrets come from a setting or from a file, and no error shows them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from api_gateway.config import GatewayConfig, load_config
from api_gateway.reload.serialization import deserialized, serialized
from api_gateway.settings.diagnostics import ConfigError

TOKEN = "correct-horse-battery"
URL = f"redis://user:{TOKEN}@cache:6379/0"


def problems(sections: dict[str, Any]) -> list[str]:
    """Return the lines that these sections are refused with."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, sections)
    return caught.value.problems


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", "\n\n"])
def test_a_file_gives_the_secret_without_the_end_of_its_line(tmp_path: Path, ending: str) -> None:
    (tmp_path / "token").write_bytes(TOKEN.encode() + ending.encode())
    token = load_config(None, {"admin": {"token_file": str(tmp_path / "token")}}).admin.token
    assert token is not None
    assert token.get_secret_value() == TOKEN


def test_the_file_is_read_anew_whenever_the_configuration_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "token"
    found = []
    for text in (TOKEN, TOKEN * 2):
        path.write_text(text)
        token = load_config(None, {"admin": {"token_file": str(path)}}).admin.token
        found.append(token and token.get_secret_value())
    assert found == [TOKEN, TOKEN * 2]


def test_the_store_s_url_may_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text(URL + "\n")
    config = load_config(None, {"store": {"url_file": str(tmp_path / "url")}})
    assert config.store.url.get_secret_value() == URL
    assert config.store.is_shared


def test_the_variable_of_a_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setenv("GATEWAY_ADMIN__TOKEN_FILE", str(tmp_path / "token"))
    token = load_config().admin.token
    assert token is not None
    assert token.get_secret_value() == TOKEN


def bad_files(folder: Path) -> dict[str, Path]:
    """Return files that hold no secret, by what is said of each."""
    contents = {
        "is empty": b"\n",
        "is too large": b"x" * 70_000,
        "must contain one line": f"{TOKEN}\n{TOKEN}".encode(),
        "is not UTF-8": b"\xff" + TOKEN.encode(),
        "must have at least 8 characters": b"short",
    }
    found = {"no such file": folder / "missing", "is a folder": folder, "is not a regular file": folder / "pipe"}
    os.mkfifo(folder / "pipe")
    for number, (cause, content) in enumerate(contents.items()):
        found[cause] = folder / f"file-{number}"
        found[cause].write_bytes(content)
    return found


def test_a_file_that_holds_no_secret_is_named_with_its_setting(tmp_path: Path) -> None:
    for cause, path in bad_files(tmp_path).items():
        config = tmp_path / "gateway.yaml"
        config.write_text(f"admin:\n  token_file: {path}\n")
        with pytest.raises(ConfigError) as caught:
            load_config(config)
        (line,) = caught.value.problems
        assert line.startswith(f"{config}:2: admin.token_file: "), line
        assert cause in line
        assert str(path) in line
        assert TOKEN not in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0)
    (line,) = problems({"admin": {"token_file": str(tmp_path / "token")}})
    assert "permission denied" in line


def test_a_mistake_in_a_url_from_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text(f"redis://:{TOKEN}")
    (line,) = problems({"store": {"url_file": str(tmp_path / "url")}})
    assert line == f"command line: store.url_file: must name a host, read from '{tmp_path / 'url'}'"


def test_a_secret_and_its_file_are_not_given_together(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (line,) = problems({"admin": {"token": TOKEN, "token_file": str(tmp_path / "token")}})
    assert line == "command line: admin.token_file: token and token_file are both given; keep one of them"


def test_a_url_and_its_file_are_not_given_together(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("redis://elsewhere")
    (line,) = problems({"store": {"url": "redis://here", "url_file": str(tmp_path / "url")}})
    assert line == "command line: store.url_file: url and url_file are both given; keep one of them"


def test_a_secret_that_is_no_text_is_not_shown() -> None:
    assert problems({"admin": {"token": 123456789}}) == ["command line: admin.token: must be text; put it in quotes"]


def test_a_configuration_shows_no_secret() -> None:
    config = load_config(None, {"admin": {"token": TOKEN}, "store": {"url": URL}})
    shown = f"{config} {config!r} {config.model_dump()} {config.model_dump_json()} {config.store!r} {vars(config)}"
    assert TOKEN not in shown


def test_an_error_of_the_library_itself_shows_no_secret() -> None:
    """As when a program builds the configuration by itself."""
    with pytest.raises(ValueError, match="store") as caught:
        GatewayConfig.model_validate({"store": {"url": URL + "/1/2"}, "admin": {"token": [TOKEN]}})
    assert TOKEN not in str(caught.value)


def test_workers_get_the_secrets_and_not_the_files(tmp_path: Path) -> None:
    """They are not what the files have become meanwhile."""
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "url").write_text(URL)
    sections = {"admin": {"token_file": str(tmp_path / "token")}, "store": {"url_file": str(tmp_path / "url")}}
    config = load_config(None, sections)
    (tmp_path / "token").unlink()
    (tmp_path / "url").write_text("redis://elsewhere")
    arrived = deserialized(json.loads(json.dumps(serialized(config, {}))))
    assert arrived == config
    assert arrived.store.url.get_secret_value() == URL
