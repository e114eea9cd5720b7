"""A parser of command lines. Its errors name unknown options without their values, which may be secrets."""

import argparse
from collections.abc import Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """Names what is unknown without its value. Options are not abbreviated: `--token` is not `--token-file`."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **settings})
        self._commands: Any = None  # the subparsers, of a private class of argparse

    def add_command(self, name: str, summary: str, *, description: str | None = None) -> "CommandParser":
        """Add a command and return its parser, whose help describes it: by the summary, unless more is to be said."""
        if self._commands is None:
            self._commands = self.add_subparsers(metavar="command", required=True)
        words = description or f"{summary[0].upper()}{summary[1:]}."
        command: CommandParser = self._commands.add_parser(name, help=summary, description=words)
        return command

    def parse_args(  # type: ignore[override]  # without the overloads of argparse
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse the arguments; exit with a message if there are unknown ones."""
        options, unknown = self.parse_known_args(args, namespace)
        names = [one.partition("=")[0] for one in unknown if one.startswith("--")]
        if names:
            self.error(f"unknown: {', '.join(names)}; see --help")
        if unknown:
            self.error("there are more arguments than the command has; see --help")
        return options
