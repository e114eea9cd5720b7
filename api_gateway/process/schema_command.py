"""The command `api-gateway schema`: prints the JSON Schema of configuration files."""

from collections.abc import Sequence
from importlib import import_module

from api_gateway.system.command_line import CommandParser


def run_schema(arguments: Sequence[str]) -> int:
    """Run `api-gateway schema` with these arguments; return the exit code."""
    parser = CommandParser(
        prog="api-gateway schema",
        description="Print the JSON Schema (draft 2020-12) of configuration files. An editor uses it if the first line"
        " of a file is: # yaml-language-server: $schema=gateway.schema.json",
    )
    parser.parse_args(arguments)
    print(import_module("api_gateway.process.schema_text").schema_text(), end="")  # so that `--help` is fast
    return 0
