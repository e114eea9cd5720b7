"""The page on the configuration: its files load, and its commands run."""

import io
import json
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from api_gateway import cli
from api_gateway.config import load_config
from api_gateway.settings.deprecations import DEPRECATED
from api_gateway.settings.diagnostics import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()


def blocks(language: str, heading: str) -> list[str]:
    """Return the blocks of a language below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder, in their order, after the files that they use."""
    monkeypatch.chdir(tmp_path)
    document = {"openapi": "3.1.0", "servers": [{"url": "http://127.0.0.1:1"}], "paths": {"/orders": {"get": {}}}}
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "new.yaml").write_text("upstreams: {users: http://127.0.0.1:9009}")
    run = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
    assert len(run) == 6
    for line in run:
        command, _, output = line.partition(" > ")
        program, *arguments = shlex.split(command)
        assert program == "api-gateway"
        with redirect_stdout(io.StringIO()) as printed:
            assert cli.main(arguments) == 0, line
        if output:
            (tmp_path / output).write_text(printed.getvalue())
    assert json.loads((tmp_path / "gateway.schema.json").read_text())["title"]
    assert [route.path for route in load_config("shop.yaml").routes] == ["/api/orders"]


def test_the_deprecations_of_the_page_are_those_of_the_code() -> None:
    section = PAGE.split("\n## Deprecated settings\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `.+` \| ([\d.]+) \| ([\d.]+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert rows == [(one.since, one.removed_in, one.new or one.instead) for one in DEPRECATED]


def test_the_file_in_toml_loads(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text(blocks("toml", "Files")[0])
    assert [route.path for route in load_config(tmp_path / "gateway.toml").routes] == ["/api/users"]


def test_the_message_about_a_variable_is_the_one_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORT", raising=False)
    path = tmp_path / "gateway.yaml"
    path.write_text("upstreams: {users: http://a}\nserver:\n  port: ${PORT}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).replace(f"{tmp_path}/", "") + "\n" == blocks("text", "Variables")[0]


def test_the_file_of_a_team_is_added_to_the_main_one(tmp_path: Path) -> None:
    main, team, owning = blocks("yaml", "Files of teams")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "orders.yaml").write_text(team)
    (tmp_path / "gateway.yaml").write_text(main)
    config = load_config(tmp_path / "gateway.yaml")
    assert set(config.upstreams) == {"users", "orders"}
    assert [limit.name for limit in config.limits] == ["orders-rate"]
    (tmp_path / "conf.d" / "refunds.yaml").write_text(
        "upstreams: {refunds: http://a}\nroutes: [{name: refunds, path: /api/orders/refunds, upstream: refunds}]\n"
    )
    with pytest.raises(ConfigError, match="overlaps '/api/orders' of the route 'orders'"):
        load_config(tmp_path / "gateway.yaml")
    (tmp_path / "gateway.yaml").write_text(owning)
    assert [route.name for route in load_config(tmp_path / "gateway.yaml").routes] == ["website", "refunds", "orders"]
