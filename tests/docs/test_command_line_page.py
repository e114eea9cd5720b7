"""The page on the command line: its commands run, and its exit codes and options are those of the code."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from api_gateway.cli import COMMANDS, main
from api_gateway.process import operator_client, top_command, view_commands
from tests.kit import RawUpstream, ask, reply
from tests.processes import config_file, process

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
RUN = re.findall(r"^api-gateway (.+)$", re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)[0], flags=re.MULTILINE)


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    up = RawUpstream(reply(b"fine"))
    extra = "routes: [{name: users, path: /api/users, upstream: up}]\ntiers: {FREE: {rate: 0.001, capacity: 1}}"
    path = config_file(tmp_path, up.url, extra)
    expected = {
        "limits": "tiers.FREE",
        "breakers": "CLOSED",
        "clients --sort requests": "acme",
        "clients acme": "acme: FREE",
        "explain --path /api/users/1 --client acme": "limited",
        "tail --no-follow --status 4xx": "429  GET  /api/users/1",
        "top --count 1": "requests/s",
    }
    assert set(RUN) == set(expected)
    with process("-m", "api_gateway", "--config", path, "--port", "0", cwd=tmp_path) as running:
        for _ in range(3):
            ask(f"{running.url}/api/users/1", headers={"X-Client-ID": "acme"})
        (place := tmp_path / "commands").mkdir()
        for command, part in expected.items():
            options = ("--config", path, "--url", running.url)
            arguments = [*shlex.split(command), *options]
            variables = {"XDG_STATE_HOME": str(tmp_path / "xdg-state")}
            with process("-m", "api_gateway", *arguments, cwd=place, **variables) as one:
                assert one.exit_code() == 0, one.errors
                assert part in one.output, command
    up.close()


def test_the_exit_codes_of_the_page_are_those_of_the_code() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, flags=re.MULTILINE)}
    own = {operator_client.FAILED, operator_client.NOT_REACHED, operator_client.NOT_AUTHORIZED}
    assert codes == {0, 2, operator_client.INTERRUPTED} | own


def with_commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return a parser and those of its commands."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(inner for action in actions for one in action.choices.values() for inner in with_commands(one))]


def test_the_help_of_each_command_and_option_describes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[argparse.ArgumentParser] = []
    parse = argparse.ArgumentParser.parse_known_args

    def noting(self: argparse.ArgumentParser, *arguments: Any) -> Any:
        found.extend(with_commands(self))
        return parse(self, *arguments)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", noting)
    for command in ([], *([name] for name in COMMANDS if not COMMANDS[name].gets_name), ["tail"]):
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--help"])
    programs = {parser.prog for parser in found}
    assert {"api-gateway", "api-gateway keys rotate", "api-gateway config diff"} < programs
    assert {prog.split()[1] for prog in programs if " " in prog} == set(COMMANDS)
    for parser in found:
        assert re.fullmatch(r"[A-Z].+[.]|.+schema[.]json", parser.description or "", flags=re.DOTALL), parser.prog
        actions = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
        assert not [action.dest for action in actions if not re.match(r"\w", action.help or "")], parser.prog


def test_each_command_and_option_of_the_page_exists() -> None:
    parsers = [one for parser in (view_commands._parser(), top_command._parser()) for one in with_commands(parser)]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= known
    shown = set(re.findall(r"^\| `(\w+)", PAGE, flags=re.MULTILINE))
    assert shown | {"config", "doctor", "init", "keys", "replay", "schema", "version"} == set(COMMANDS)
