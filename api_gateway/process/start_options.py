"""The options of a start on the command line, and the settings they stand for. Light, so that `--help` is fast."""

import argparse
from typing import Any


def add_start_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that stand for settings."""
    parser.add_argument("--config", metavar="FILE", help="YAML or TOML file (default: $GATEWAY_CONFIG, or none)")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for any free one (default: 8000)")
    parser.add_argument("--workers", type=int, help="worker processes (default: 1)")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), help="least level that is logged (default: info)"
    )
    parser.add_argument("--no-access-log", action="store_true", help="do not write a line for each proxied request")


def overrides_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the command line, nested like the configuration."""
    server = {key: getattr(options, key) for key in ("host", "port", "workers") if getattr(options, key) is not None}
    log: dict[str, Any] = {"level": options.log_level} if options.log_level else {}
    if options.no_access_log:
        log["access"] = False
    return {key: section for key, section in (("server", server), ("log", log)) if section}
