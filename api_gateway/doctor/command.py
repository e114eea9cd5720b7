"""The command `api-gateway doctor`: runs all checks of a configuration and prints a line for each result."""

import argparse
import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime

from api_gateway.config import GatewayConfig, LoadedConfig, config_path, read_config
from api_gateway.doctor.access_checks import check_exposure, check_tokens
from api_gateway.doctor.checks import Check, CheckResult, Level, blocking, broken, doubtful, run_checks
from api_gateway.doctor.machine_checks import (
    check_certificates,
    check_descriptors,
    check_files,
    check_ports,
    check_state,
    check_time_zones,
)
from api_gateway.doctor.store_checks import store_checks
from api_gateway.doctor.upstream_checks import issuer_checks, upstream_checks, worst
from api_gateway.printable_text import counted
from api_gateway.process.start_options import overrides_of
from api_gateway.settings.diagnostics import ConfigError

EXIT_CODES = {Level.OK: 0, Level.WARNING: 1, Level.FAILED: 2}


def diagnose(options: argparse.Namespace) -> int:
    """Run the checks; return the exit code."""
    results = _results(options)
    level = worst(results)
    if options.json:
        print(json.dumps({"status": level, "checks": [asdict(one) for one in results]}, indent=2))
        return EXIT_CODES[level]
    for one in results:
        print(one)
    counts = [sum(one.level is kind for one in results) for kind in Level]
    print(f"{counts[0]} ok, {counted(counts[1], 'warning')}, {counts[2]} failed.")
    return EXIT_CODES[level]


def _results(options: argparse.Namespace) -> list[CheckResult]:
    warnings: list[str] = []
    try:
        loaded = read_config(options.config, overrides_of(options), warn=warnings.append)
    except ConfigError as error:
        remedy = "Correct the configuration; the other checks need it."
        return [broken("configuration", line, remedy) for line in error.problems]
    source = config_path(options.config)
    names = ", ".join(loaded.sources.names) or "nothing, all settings have their defaults"
    found = [CheckResult("configuration", Level.OK, f"valid, read from {names}" if source else f"read: {names}")]
    found += [doubtful("configuration", line, "Change or remove it.") for line in warnings]
    return found + asyncio.run(run_checks(list(_checks(loaded)), options.timeout))


def _checks(loaded: LoadedConfig) -> Iterator[Check]:
    config: GatewayConfig = loaded.config
    yield blocking("files and packages", lambda: check_files(config, loaded.sources.origin))
    yield blocking("certificates", lambda: check_certificates(config, datetime.now(UTC)))
    yield blocking("state_dir", lambda: check_state(config))
    yield blocking("ports", lambda: check_ports(config))
    yield blocking("open files", lambda: check_descriptors(config))
    yield blocking("time zones", lambda: check_time_zones(config))
    yield blocking("tokens", lambda: check_tokens(config))
    yield blocking("exposure", lambda: check_exposure(config))
    yield from store_checks(config)
    yield from upstream_checks(config)
    yield from issuer_checks(config)
