"""The page on the configuration: its files load, and its commands run."""

import re
from pathlib import Path

import pytest

from api_gateway.config import load_config
from api_gateway.settings.diagnostics import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()


def blocks(language: str, heading: str) -> list[str]:
    """Return the blocks of a language below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


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
    main, team = blocks("yaml", "Files of teams")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "orders.yaml").write_text(team)
    (tmp_path / "gateway.yaml").write_text(main)
    config = load_config(tmp_path / "gateway.yaml")
    assert set(config.upstreams) == {"users", "orders"}
    assert [limit.name for limit in config.limits] == ["orders-rate"]
