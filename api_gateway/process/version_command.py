"""The command `api-gateway version`: which gateway this is, and which optional packages it can use."""

import json
import platform
from collections.abc import Sequence
from typing import Any

from api_gateway._version import __version__
from api_gateway.printable_text import table
from api_gateway.system.build import commit_of, variant, version_line
from api_gateway.system.command_line import CommandParser
from api_gateway.system.extras import EXTRAS, FASTER_LOOP


def run_version(arguments: Sequence[str]) -> int:
    """Run `api-gateway version` with these arguments; return the exit code."""
    found = _found()
    if _parser().parse_args(arguments).json:
        print(json.dumps(found, indent=2))
        return 0
    print(version_line())
    print(f"commit: {found['commit'] or 'unknown'}")
    print(f"event loop: {found['event_loop']}")
    print("\n".join(table(("extra", "installed", "what it is for"), map(_row, found["extras"]))))
    missing = [one["name"] for one in found["extras"] if one["installed"] is None]
    if missing:
        print(f"Install the package as api-gateway[{','.join(missing)}] to add what is missing.")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="api-gateway version", description="Print version, commit, variant, event loop and optional packages."
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _found() -> dict[str, Any]:
    loop = FASTER_LOOP.installed
    return {
        "version": __version__,
        "commit": commit_of(),
        "variant": variant(),
        "python": {"implementation": platform.python_implementation(), "version": platform.python_version()},
        "event_loop": "asyncio" if loop is None else f"uvloop {loop}",
        "extras": [
            {"name": one.name, "package": one.distribution, "installed": one.installed, "for": one.purpose}
            for one in EXTRAS
        ],
    }


def _row(extra: dict[str, Any]) -> tuple[str, str, str]:
    installed = "missing" if extra["installed"] is None else f"{extra['package']} {extra['installed']}"
    return extra["name"], installed, extra["for"]
