"""The command `api-gateway schema`: prints the JSON Schema of configuration files."""

import argparse
import json
from collections.abc import Sequence

from api_gateway.config import GatewayConfig
from api_gateway.settings.file_schema import file_schema


def run_schema(arguments: Sequence[str]) -> int:
    """Run `api-gateway schema` with these arguments; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="api-gateway schema",
        description="Print the JSON Schema (draft 2020-12) of configuration files. An editor uses it if the first line"
        " of a file is: # yaml-language-server: $schema=gateway.schema.json",
    )
    parser.parse_args(arguments)
    print(schema_text(), end="")
    return 0


def schema_text() -> str:
    """Return the schema as text."""
    return json.dumps(file_schema(GatewayConfig, "Configuration of api-gateway"), indent=2) + "\n"
