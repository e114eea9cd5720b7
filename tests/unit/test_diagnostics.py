"""An error in the configuration is reported with its source, key and value, and never with a secret."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api_gateway.config import load_config, read_config
from api_gateway.settings.diagnostics import ConfigError, SettingsFile, Sources
from api_gateway.settings.suggestions import nearest
from api_gateway.settings.yaml_file import read_yaml
from tests.cases import each

SECRET = "hunter2-hunter2"


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., list[str]]:
    """Return the lines that a file of this text is refused with, its name cut off their beginnings."""

    def load(text: str, overrides: dict[str, Any] | None = None) -> list[str]:
        path = tmp_path / "gateway.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return [line.removeprefix(f"{path}") for line in caught.value.problems]

    return load


Refused = Callable[..., list[str]]


# The file


def test_a_message_names_the_line_of_the_value(refused: Refused) -> None:
    lines = refused("server:\n  host: '::'\n  port: many\nmetrics:\n  percentiles:\n    - 50\n    - 100\n")
    assert [line.partition(" ")[0] for line in lines] == [":3:", ":7:"]
    assert "server.port: " in lines[0]
    assert "metrics.percentiles[1]: " in lines[1]


def test_a_missing_key_is_reported_at_the_line_of_its_section(refused: Refused) -> None:
    assert refused("\nroutes:\n  - respond: {}\n    path: /api/a\n") == [":3: routes[0].name: is missing"]


def test_the_line_is_found_whatever_the_case_of_a_tier(refused: Refused) -> None:
    (line,) = refused("tiers:\n\n  Free:\n    rate: 0\n")
    assert line.startswith(":4: tiers.FREE.rate: ")


def test_a_key_given_twice_is_refused_with_its_second_line(refused: Refused) -> None:
    """YAML parsers let the second win in silence."""
    text = "server:\n  port: 1\n  port: 2\nroutes:\n  - {name: a, name: b}\nserver: {}\n"
    assert refused(text) == [
        ":3: server.port: given twice",
        ":5: routes[0].name: given twice",
        ":6: server: given twice",
        ":5: routes[0].path: is missing",
    ]


@pytest.mark.parametrize("text", ["server: {port: 1", "a: b: c", "x: *nowhere", "a: !!python/name:os.system x"])
def test_what_is_not_yaml_is_refused(refused: Refused, text: str) -> None:
    (line,) = refused(f"server: {{}}\n{text}")
    assert ": not YAML: " in line
    assert re.search(r"^:2:|line 2\b", line)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1, 2", ":2: not YAML: expected ',' or ']', but got '<stream end>'"),
        ('admin: {token: "hunter2" x', ":1: not YAML: expected ',' or '}', but got '<scalar>'"),
        ("a: !hunter2 x", ":1: not YAML: could not determine a constructor for the tag '...'"),
        ("a: *hunter2", ":1: not YAML: found undefined alias '...'"),
    ],
)
def test_what_yaml_expected_is_shown_and_no_text_of_the_file(refused: Refused, text: str, expected: str) -> None:
    assert refused(f"{text}\n") == [expected]


@pytest.mark.parametrize(("text", "kind"), [("- a", "list"), ("words", "str"), ("7", "int")])
def test_a_file_that_holds_no_sections_is_refused(refused: Refused, text: str, kind: str) -> None:
    assert refused(text) == [f": must contain sections, got {kind}"]


def test_a_key_that_is_no_text_is_refused(refused: Refused) -> None:
    """YAML reads `on:` as true and `8000:` as a number."""
    assert refused("server: {}\n8000: x\n")[0] == ":2: [8000]: is not text; put the key in quotes"


def test_a_value_that_holds_itself_is_refused(refused: Refused) -> None:
    assert refused("server: &a {port: *a}\n")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_an_empty_file_configures_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_yaml(path) == SettingsFile(path, {}, {})
    (line,) = problems_of(path)
    assert line.startswith(f"{path}: configures nothing, so the demo services would start")


def test_a_file_without_upstreams_starts_the_demo_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    said: list[str] = []
    path.write_text("tiers: {FREE: {rate: 2, capacity: 4}}\n", encoding="utf-8")
    assert read_config(path, warn=said.append).config.is_demo
    (line,) = said
    assert line.startswith(f"{path}: configures no upstream and no route, so the demo services are the upstreams;")
    path.write_text("upstreams: {a: 'http://127.0.0.1:1'}\n", encoding="utf-8")
    assert not read_config(path, warn=said.append).config.is_demo
    assert len(said) == 1


def problems_of(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return caught.value.problems


def test_a_file_that_does_not_exist_is_reported_as_such(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.problems == [f"{path}: cannot be read: No such file or directory"]


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)


def test_a_file_that_is_not_utf8_is_reported_as_such(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_bytes(b"state_dir: \xff\n")
    with pytest.raises(ConfigError, match=r"cannot be read: .*utf-8"):
        read_yaml(path)


# Where a value was set


@pytest.mark.parametrize("variable", ["GATEWAY_SERVER__PORT", "gateway_server__port"])
def test_a_wrong_value_of_the_environment_is_reported_as_such(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "many")
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert caught.value.problems[0].startswith("environment GATEWAY_SERVER__PORT: server.port: ")
    assert caught.value.problems[0].endswith("got 'many'")


def test_a_wrong_value_of_the_env_file_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GATEWAY_SERVER__PORT=many\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^environment GATEWAY_SERVER__PORT: server\.port: .*'many'$"):
        load_config()


def test_a_setting_of_the_env_file_that_cannot_be_read_is_a_mistake_and_is_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would be skipped: a token with one quote is not a token."""
    text = f'other words\nGATEWAY_SERVER__PORT=9000\n\nGATEWAY_ADMIN__TOKEN="{SECRET}\n'
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert caught.value.problems == [".env:4: cannot be read; write NAME=value, with both quotes or none"]
    assert caplog.text == ""


def test_a_wrong_value_within_a_json_variable_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_SERVER", '{"port": "many"}')
    with pytest.raises(ConfigError, match=r"^environment GATEWAY_SERVER: server\.port: .*'many'$"):
        load_config()


def test_a_wrong_value_of_the_command_line_is_reported_as_such(refused: Refused) -> None:
    (line,) = refused("server: {port: 1}", {"server": {"port": -1}})
    assert line.startswith("command line: server.port: ")
    assert line.endswith("got -1")


def test_a_variable_that_holds_only_other_values_is_not_blamed(
    monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setenv("GATEWAY_SERVER", '{"host": "::"}')
    (line,) = refused("server:\n  port: many\n")
    assert line.startswith(":2: server.port: ")


SOURCES = Sources(
    {"server": {"port": 1}, "log": {"access": False}},
    "GATEWAY_",
    {"GATEWAY_SERVER__PORT": "2", "GATEWAY_SERVER__HOST": "::", "GATEWAY_ROUTES": '[{"name": 1}]'},
    SettingsFile(
        Path("g.yaml"),
        {},
        {
            ("server",): "g.yaml:1",
            ("server", "host"): "g.yaml:2",
            ("clients",): "g.yaml:3",
            ("clients", "acme"): "g.yaml:4",
        },
    ),
)


@each(
    ("place", "origin"),
    [
        (("server", "port"), "command line: "),
        (("log", "access"), "command line: "),
        (("server", "host"), "environment GATEWAY_SERVER__HOST: "),
        (("routes", "0", "name"), "environment GATEWAY_ROUTES: "),
        (("clients", "ACME", "tier"), "g.yaml:4: "),
        (("clients", "other"), "g.yaml:3: "),
        (("metrics",), ""),
    ],
)
def test_the_origin_of_a_value_is_the_source_of_highest_precedence(place: tuple[str, ...], origin: str) -> None:
    assert SOURCES.origin(place) == origin


def test_a_rule_between_sections_names_its_places_itself(refused: Refused) -> None:
    lines = refused("default_tier: GOLD\nclients: {acme: {tier: SILVER}}\n")
    assert [line.split(": ")[:2] for line in lines] == [[":1", "default_tier"], [":2", "clients.acme.tier"]]


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("rotes: []", ["rotes", "'routes'"]),
        ("routes: [{pth: /api}]", ["routes[0].pth", "'path'"]),
        ("upstreams: {users: {health_check: {pth: /}}}", ["upstreams.users.health_check.pth", "'path'"]),
        ("clients: {acme: {zzz: 1}}", ["clients.acme.zzz", "tier"]),
    ],
)
def test_an_unknown_key_is_reported_with_the_keys_known_at_its_place(
    refused: Refused, text: str, telling: list[str]
) -> None:
    assert any(all(part in line for part in (*telling, ": unknown key")) for line in refused(text))


# Secrets


@pytest.mark.parametrize(
    "text",
    [
        "admin: {token: [%s]}",
        "admin: {token: {is: %s}}",
        "admin: %s",
        "admin: [%s]",
        "admin: {tokn: %s}",
        "admin: {token: %s, token: %s}",
        "admin: {token: '%s",
        "admin: {token: %s",
        "admin: {token: %s: x}",
        "admin: {token: *%s}",
        "admin: {token: !%s x}",
    ],
)
def test_a_mistake_about_the_token_does_not_show_it(refused: Refused, text: str) -> None:
    lines = refused(text.replace("%s", SECRET))
    assert lines
    assert SECRET not in "\n".join(lines)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GATEWAY_ADMIN__TOKEN", SECRET[:7]),
        ("GATEWAY_ADMIN", SECRET[:7]),
        ("GATEWAY_ADMIN", f'"{SECRET[:7]}"'),
        ("GATEWAY_ADMIN", f'{{"token": ["{SECRET[:7]}"]}}'),
        ("GATEWAY_ADMIN", f'{{"token": "{SECRET[:7]}'),
    ],
)
def test_a_mistake_about_the_token_in_the_environment_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert "admin" in str(caught.value).lower()
    assert SECRET[:7] not in str(caught.value)


def test_a_token_that_is_too_short_says_how_long_it_must_be(refused: Refused) -> None:
    (line,) = refused("admin:\n  token: short\n")
    assert line.startswith(":2: admin.token: ")
    assert "at least 8" in line


# Suggestions


@each(("word", "suggestion"), [("prot", "; did you mean 'port'?"), ("hots", "; did you mean 'host'?"), ("zzz", "")])
def test_the_nearest_known_word_is_suggested_if_any_is_near(word: str, suggestion: str) -> None:
    assert nearest(word, ["host", "port", "workers"]) == suggestion


def test_nothing_is_suggested_of_nothing() -> None:
    assert nearest("port", []) == ""


# YAML's own means


def test_sections_may_be_shared_by_anchors_and_merged(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "upstreams:\n"
        "  a: &a {targets: [{url: 'http://127.0.0.1:1'}], balance: hash, timeouts: &t {connect: 1}}\n"
        "  b: {<<: *a, targets: [{url: 'http://127.0.0.1:2'}]}\n"
        "  c: {targets: [{url: 'http://127.0.0.1:3'}], timeouts: *t}\n",
        encoding="utf-8",
    )
    upstreams = load_config(path).upstreams
    assert [(one.targets[0].url[-1], one.balance, one.timeouts.connect) for one in upstreams.values()] == [
        ("1", "hash", 1),
        ("2", "hash", 1),
        ("3", "round_robin", 1),
    ]


def test_without_any_folder_for_the_state_the_line_says_what_to_set_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HOME", "XDG_STATE_HOME", "STATE_DIRECTORY", "GATEWAY_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as caught:
        load_config()
    (line,) = caught.value.problems
    assert line.endswith("set state_dir (GATEWAY_STATE_DIR), such as /var/lib/api-gateway")


def test_an_empty_host_is_not_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_SERVER__HOST", "")
    with pytest.raises(ConfigError, match=r"^environment GATEWAY_SERVER__HOST: server\.host: must name an address"):
        load_config()


@pytest.mark.parametrize(
    ("given", "instead"), [("10.0.0.1/8", "10.0.0.0/8"), ("fe80::1/64", "fe80::/64"), ("0:0::1/127", "::/127")]
)
def test_a_network_with_bits_behind_its_prefix_is_refused_with_what_to_write(
    refused: Refused, given: str, instead: str
) -> None:
    (line,) = refused(f"server: {{trusted_proxies: ['{given}']}}\n")
    assert f"has bits set after its prefix: write {instead}, or the address alone, got '{given}'" in line
