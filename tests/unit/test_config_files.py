"""Configuration files: TOML beside YAML, variables in values, and files of teams that are included."""

import asyncio
import itertools
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api_gateway.config import LoadedConfig, load_config, read_config
from api_gateway.process.config_watch import ConfigSource, ConfigWatch, contents_of
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.toml_file import toml_lines
from api_gateway.settings.yaml_file import read_yaml
from tests.config_kit import UPSTREAM, Write, refused, writer
from tests.kit import soon


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return writer(tmp_path)


def read(path: Path) -> LoadedConfig:
    return read_config(path)


# TOML

TOML = """# comment = [
default_tier = "BASIC" # "
admin.listen = '127.0.0.1:9901'
[server]
port = 8001
trusted_proxies = [ # a ]
  "10.0.0.0/8", "::1",

]
forwarded.read = "x-forwarded-for"
[upstreams]
"users" = { targets = [{ url = "http://127.0.0.1:9001", weight = 2 },
  "http://127.0.0.1:9002" ] }
[upstreams.orders]
targets = ["http://127.0.0.1:9003"]
[[routes]]
name = "users"
path = "/api/users"
upstream = "users"
[routes.fallback]
status = 200
body = \"\"\"
[not]
a = "table" \\"\"\" \"\"\"
[[routes]]
name = "orders"
path = "/api/orders"
upstream = 'orders'
[[routes.costs]]
cost = 2
methods = ["POST"]
[[routes.costs]]
cost = 3
path = "/api/orders/x"
"""


def places(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*place, str(key))
        yield from places(inner, (*place, str(key)))


def test_a_file_in_toml_says_the_same_as_one_in_yaml(write: Write) -> None:
    config = load_config(write(TOML, "gateway.toml"))
    assert (config.server.port, config.default_tier, config.admin.listen) == (8001, "BASIC", "127.0.0.1:9901")
    assert [target.url for target in config.upstreams["users"].targets] == [
        "http://127.0.0.1:9001",
        "http://127.0.0.1:9002",
    ]
    assert [rule.cost for rule in config.routes[1].costs] == [2, 3]


def test_every_value_of_a_toml_file_has_its_line() -> None:
    lines = dict(toml_lines(TOML))
    assert lines.keys() == set(places(tomllib.loads(TOML)))
    texts = TOML.splitlines()
    for place, line in lines.items():
        if not place[-1].isdigit():
            assert place[-1] in texts[line - 1], place
    assert texts[lines[("server", "trusted_proxies", "1")] - 1].strip().startswith('"10.0.0.0/8"')
    assert texts[lines[("upstreams", "users", "targets", "1")] - 1].strip().startswith('"http://127.0.0.1:9002"')
    assert lines[("routes", "1")] > lines[("routes", "0", "fallback", "body")]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[server]\nport = 70000\n", "gateway.toml:2: server.port: must be less than or equal to 65535, got 70000"),
        ("[server]\n\nprot = 1\n", "gateway.toml:3: server.prot: unknown key; did you mean 'port'?"),
        ("[server\n", "gateway.toml:1: not TOML: expected ']' at the end of a table declaration"),
        ("a = 1\na = 2\n", "gateway.toml:2: not TOML: cannot overwrite a value"),
        ("[admin]\ntoken = correct-horse\n", "gateway.toml:2: not TOML: invalid value"),
        ("a = {correct-horse = 1, correct-horse = 2}", "gateway.toml:1: not TOML: duplicate inline table key '...'"),
        ("a = ", "gateway.toml: not TOML: invalid value"),
    ],
)
def test_a_mistake_in_toml_has_its_line_and_quotes_no_text(text: str, line: str, write: Write) -> None:
    assert refused(write(text, "gateway.toml")) == [line]


# Variables


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PORT": "8001",
        "HOST": "users",
        "EMPTY": "",
        "ACCESS": "no",
        "TOKEN": "correct-horse",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.usefixtures("variables")
def test_variables_are_replaced_in_values(write: Write) -> None:
    path = write(
        "server: {port: '${PORT}', via: 'a-${UNSET:-b}${EMPTY:-c}'}\nlog: {access: '${ACCESS}'}\n"
        "admin: {token: '${TOKEN}'}\nupstreams: {users: 'http://${HOST}:${PORT}'}\n"
        "webhook: {url: 'https://example.com/$${UNSET}/$PORT/$$'}\n"
    )
    with pytest.raises(ConfigError, match="needs a secret"):
        load_config(path)
    path.write_text(path.read_text().replace("/$$'", f"/$$', secret: {'a' * 40}"))
    config = load_config(path)
    assert (config.server.port, config.server.via, config.log.access) == (8001, "a-bc", False)
    assert config.upstreams["users"].targets[0].url == "http://users:8001"
    assert config.webhook.url == "https://example.com/${UNSET}/$PORT/$$"
    assert config.admin.token is not None
    assert config.admin.token.get_secret_value() == "correct-horse"


def test_variables_may_stand_in_the_env_file(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("Backend=http://127.0.0.1:9001\n")
    assert load_config(write("upstreams: {users: '${Backend}'}")).upstreams["users"].targets[0].url.endswith(":9001")


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            f"{UPSTREAM}server:\n  port: ${{UNSET}}\n",
            ["gateway.yaml:3: server.port: the variable UNSET is not set; set it, or write ${UNSET:-default}"],
        ),
        (
            f"{UPSTREAM}admin: {{token_file: '${{UNSET}}/token'}}\n",
            ["gateway.yaml:2: admin.token_file: the variable UNSET is not set; set it, or write ${UNSET:-default}"],
        ),
        (
            "upstreams: {users: '${UNSET}'}\nroutes: [{name: a, path: /api/a, upstream: user}]\n",
            [
                "gateway.yaml:1: upstreams.users: the variable UNSET is not set; set it, or write ${UNSET:-default}",
                "gateway.yaml:2: routes[0] (a).upstream: no such upstream, got 'user'",
            ],
        ),
        (
            f"{UPSTREAM}server: {{via: 'a${{1b}}'}}\n",
            [
                (
                    "gateway.yaml:2: server.via: has '${' without a variable; write ${NAME} or ${NAME:-default},"
                    " or $${ for the text itself"
                )
            ],
        ),
        (
            f"{UPSTREAM}server: {{port: '1${{TOKEN}}'}}\n",
            ["gateway.yaml:2: server.port: must be a whole number, got a value from ${TOKEN}"],
        ),
        (
            f"{UPSTREAM}routes: [{{name: a, path: /api/a, upstream: '${{TOKEN}}x'}}]\n",
            [
                "gateway.yaml:2: routes[0] (a).upstream: no such upstream, got a value from ${TOKEN}",
            ],
        ),
        (
            f"{UPSTREAM}routes: [{{name: a, path: '/api/${{TOKEN}}'}}]\n",
            [
                "gateway.yaml:2: routes[0]: must have one of upstream, upstreams, respond and redirect; it has none",
            ],
        ),
    ],
)
def test_a_variable_that_cannot_be_used_is_named_and_no_value_is_shown(
    text: str, lines: list[str], write: Write
) -> None:
    assert refused(write(text)) == lines


@pytest.mark.usefixtures("variables")
def test_the_origin_of_a_value_names_its_variables_and_that_of_a_secret_its_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("correct-horse\n")
    path = write(f"{UPSTREAM}server: {{port: '${{PORT}}'}}\nadmin:\n  token_file: {tmp_path / 'token'}\n")
    origins = read(path).config.origins
    assert origins[("server", "port")] == f"{path}:2 (${{PORT}})"
    assert origins[("admin", "token")] == f"{path}:4"


def test_a_secret_file_that_everyone_can_read_is_named_in_a_warning(write: Write, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("correct-horse\n")
    path = write(f"{UPSTREAM}admin: {{token_file: {token}}}\n")
    found: dict[int, list[str]] = {0o644: [], 0o640: [], 0o600: []}
    for mode, warnings in found.items():
        token.chmod(mode)
        read_config(path, warn=warnings.append)
    assert found == {
        0o644: [f"{token}: holds a secret that every user of this machine can read (mode 0644); chmod 600 it"],
        0o640: [],
        0o600: [],
    }


# Included files

TEAM = """upstreams: {orders: http://127.0.0.1:9002}
routes: [{name: orders, path: /api/orders, upstream: orders}]
limits: [{name: order-rate, rate: 1, capacity: 5, routes: [orders]}]
"""


def test_included_files_add_their_entries_in_the_order_of_their_names(write: Write) -> None:
    path = write(f"include: conf.d/*.yaml\n{UPSTREAM}limits: [{{name: all, rate: 1, capacity: 5}}]\n")
    write(TEAM, "conf.d/20.yaml")
    write("upstreams: {stock: http://127.0.0.1:9003}\n", "conf.d/10.yaml")
    write("not even YAML: [", "conf.d/.hidden.yaml")
    loaded = read(path)
    config = loaded.config
    assert list(config.upstreams) == ["users", "stock", "orders"]
    assert {route.name: route.path for route in config.routes} == {
        name: f"/api/{name}" for name in ("orders", "users", "stock")
    }, "an upstream has a route of its own if its file has none"
    assert [limit.name for limit in config.limits] == ["all", "order-rate"]
    assert config.origins[("limits", "1", "rate")] == f"{path.parent}/conf.d/20.yaml:3"
    assert loaded.sources.names == [str(path), *(f"{path.parent}/conf.d/{name}.yaml" for name in (10, 20))]


def test_a_file_may_be_in_another_format_and_named_without_wildcards(write: Write) -> None:
    write('[upstreams]\norders = "http://127.0.0.1:9002"\n', "orders.toml")
    assert set(load_config(write(f"include: [orders.toml]\n{UPSTREAM}")).upstreams) == {"users", "orders"}


@pytest.mark.parametrize(
    ("main", "team", "lines"),
    [
        (
            UPSTREAM,
            "upstreams:\n  users: http://127.0.0.1:1\n",
            ["conf.d/b.yaml:2: upstreams.users: is already set at gateway.yaml:2"],
        ),
        (
            UPSTREAM + "routes:\n- name: orders\n  path: /api/o\n  upstream: users\n",
            TEAM,
            ["conf.d/b.yaml:2: routes[0].name: 'orders' is already a name at gateway.yaml:4"],
        ),
        (
            UPSTREAM,
            TEAM + "server: {port: 1}\n",
            [
                (
                    "conf.d/b.yaml:4: server: an included file may only have limits, routes, upstreams; set it in"
                    " gateway.yaml"
                )
            ],
        ),
        (
            UPSTREAM,
            TEAM.replace("routes: [orders]}", "routes: [users]}"),
            [
                (
                    "conf.d/b.yaml:3: limits[0].routes: a limit of an included file must name routes of that file"
                    " (orders), got 'users'"
                )
            ],
        ),
        (
            UPSTREAM,
            TEAM.replace(", routes: [orders]}", "}"),
            [
                (
                    "conf.d/b.yaml:3: limits[0].routes: a limit of an included file must name routes of that file"
                    " (orders), got none"
                )
            ],
        ),
        (
            UPSTREAM,
            TEAM.replace("upstream: orders", "upstream: order"),
            ["conf.d/b.yaml:2: routes[0] (orders).upstream: no such upstream, got 'order'; did you mean 'orders'?"],
        ),
        (
            UPSTREAM,
            "upstreams: [\n",
            ["conf.d/b.yaml:2: not YAML: expected the node content, but found '<stream end>'"],
        ),
        (
            UPSTREAM,
            TEAM.replace("upstream: orders}", "upstream: orders, fallback: {status: 200, body: '${HOME:-x}'}}"),
            [
                (
                    "conf.d/b.yaml:2: routes[0].fallback.body: an included file cannot use variables; write the value,"
                    " or set it in the main file"
                )
            ],
        ),
        (UPSTREAM, "upstreams: 5\n", ["conf.d/b.yaml:1: upstreams: must have entries, got int"]),
    ],
)
def test_a_mistake_in_an_included_file_names_the_files_and_lines(
    main: str, team: str, lines: list[str], write: Write
) -> None:
    path = write(f"include: conf.d/*.yaml\n{main}")
    write(team, "conf.d/b.yaml")
    assert refused(path) == lines


def test_names_in_messages_are_no_escape_sequences(write: Write) -> None:
    write('"\\e[2Jkey\\nforged: line": 1\n', "conf.d/b.yaml")
    (line,) = refused(write(f"include: conf.d/*.yaml\n{UPSTREAM}"))
    assert line.isprintable()
    assert r"\x1b[2Jkey\nforged: line: an included file may only have" in line


def test_a_name_in_two_included_files_names_both(write: Write) -> None:
    path = write(f"include: ['conf.d/*.yaml']\n{UPSTREAM}")
    write("upstreams:\n  orders: http://127.0.0.1:1\n", "conf.d/a.yaml")
    write("upstreams: {orders: http://127.0.0.1:2}\n", "conf.d/b.yaml")
    assert refused(path) == [
        "conf.d/b.yaml:1: upstreams.orders: is already set at conf.d/a.yaml:2".replace(
            "conf.d/a", f"{path.parent}/conf.d/a"
        ).replace(f"{path.parent}/", "")
    ]


def test_a_file_that_is_named_must_exist_and_only_a_file_can_include(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused(write(f"{UPSTREAM}include:\n- nowhere.yaml\n")) == [
        "gateway.yaml:3: include[0]: no such file, got 'nowhere.yaml'"
    ]
    monkeypatch.setenv("GATEWAY_INCLUDE", '["conf.d/*.yaml"]')
    (line,) = refused(write(UPSTREAM))
    assert line == "environment GATEWAY_INCLUDE: include: only a configuration file can include others; set it there"


def test_a_watch_notices_files_that_are_added_changed_and_removed(write: Write) -> None:
    path = write(f"include: conf.d/*.yaml\n{UPSTREAM}")
    (path.parent / "conf.d").mkdir()
    source = ConfigSource(str(path), {})
    source.load()
    states = [contents_of(source.files)]
    team = write(TEAM, "conf.d/team.yaml")
    states.append(contents_of(source.files))
    assert set(source.load().config.upstreams) == {"users", "orders"}
    states.append(contents_of(source.files))
    team.write_text(TEAM.replace("9002", "9009"))
    states.append(contents_of(source.files))
    team.unlink()
    states.append(contents_of(source.files))
    assert all(one != other for one, other in itertools.pairwise(states))
    assert set(source.load().config.upstreams) == {"users"}


def test_an_include_that_matches_nothing_is_a_warning_and_without_its_folder_an_error(write: Write) -> None:
    """With the folder gone, a reload would drop the routes of all teams."""
    path = write(f"include: [conf.d/*.yaml, 'conf.d/[a-c]/**/*.yaml']\n{UPSTREAM}")
    warned: list[str] = []
    (path.parent / "conf.d").mkdir()
    assert set(read_config(path, warn=warned.append).config.upstreams) == {"users"}
    assert [line.removeprefix(f"{path.parent}/") for line in warned] == [
        "gateway.yaml:1: include[0]: no file matches, got 'conf.d/*.yaml'",
        "gateway.yaml:1: include[1]: no file matches, got 'conf.d/[a-c]/**/*.yaml'",
    ]
    write(TEAM, "conf.d/team.yaml")
    (path.parent / "conf.d/a").mkdir()
    write("upstreams: {}\n", "conf.d/a/team.yaml")
    source, warned = ConfigSource(str(path), {}), []
    assert set(read_config(path, warn=warned.append).config.upstreams) == {"users", "orders"}
    assert not warned
    source.load()
    shutil.rmtree(path.parent / "conf.d")
    with pytest.raises(ConfigError) as caught:
        source()
    assert [line.removeprefix(f"{path.parent}/") for line in caught.value.problems] == [
        f"gateway.yaml:1: include[{number}]: no such folder as 'conf.d', got {pattern!r}"
        for number, pattern in enumerate(["conf.d/*.yaml", "conf.d/[a-c]/**/*.yaml"])
    ]


async def test_a_watch_applies_what_has_changed_since_the_configuration_was_read(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the watch began, as while workers start; also a file that changed while it was read."""
    path = write(f"include: conf.d/*.yaml\n{UPSTREAM}")
    team = write(TEAM, "conf.d/team.yaml")
    reloads: list[LoadedConfig] = []

    async def reload() -> None:
        reloads.append(source.load())

    async def watched() -> None:
        watching = asyncio.create_task(ConfigWatch(source, reload, 0.01).run())
        await soon(lambda: len(reloads) > 0, "it is reloaded")
        watching.cancel()

    changes = (
        lambda: team.write_text(TEAM.replace("9002", "9009")),
        team.unlink,
        lambda: write(TEAM, "conf.d/z.yaml"),
    )
    for change in changes:
        source = ConfigSource(str(path), {})
        source.load()
        change()
        reloads.clear()
        await watched()
    source = ConfigSource(str(path), {})

    def slowly(*arguments: Any, **options: Any) -> Any:
        loaded = read_config(*arguments, **options)
        path.write_text(path.read_text().replace("9001", "9003"))
        return loaded

    monkeypatch.setattr("api_gateway.process.config_watch.read_config", slowly)
    source.load()
    monkeypatch.undo()
    reloads.clear()
    await watched()


def test_aliases_that_multiply_end_the_reading(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"bomb\.yaml:1: .*: the file has more than 200,000 values; aliases of"):
        read_yaml(tmp_path / "bomb.yaml")
