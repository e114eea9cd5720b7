"""Mistakes in settings that are easily made: the exact message, with place, value and remedy."""

import json
import re
from pathlib import Path

import pytest

from api_gateway.config import GatewayConfig, load_config
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.quantities import DURATION_TEXT, RATE_TEXT, SIZE_TEXT
from api_gateway.settings.setting_types import HSTS, PATTERNS
from tests.cases import each

WHOLE, NUMBER = "must be a whole number, got True", "must be a number, got True"
TARGET = "upstreams: {a: {targets: [{url: '%s'}]}}"
HIDDEN = ", got a value that is not shown because it may contain a password"
ONLY_ADDRESS = "server.host: must be only an address, such as 0.0.0.0; set the port as server.port, got"


def message_of(folder: Path, yaml: str) -> str:
    """Return the only problem of a configuration, behind the name of its file and line."""
    path = folder / "gateway.yaml"
    path.write_text(yaml)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    (problem,) = raised.value.problems
    return problem.removeprefix(f"{path}:1: ")


@each(
    ("yaml", "message"),
    [
        ("server: {workers: true}", f"server.workers: {WHOLE}"),
        ("server: {max_connections: true}", f"server.max_connections: {WHOLE}"),
        ("server: {max_body_bytes: yes}", f"server.max_body_bytes: {WHOLE}"),
        ("server: {header_timeout: on}", f"server.header_timeout: {NUMBER}"),
        ("server: {port: false}", "server.port: must be a whole number, got False"),
        ("tiers: {FREE: {rate: true}}", f"tiers.FREE.rate: {NUMBER}"),
        ("tiers: {FREE: {capacity: true}}", f"tiers.FREE.capacity: {WHOLE}"),
        ("metrics: {percentiles: [50, true]}", f"metrics.percentiles[1]: {NUMBER}"),
        ("limits: [{name: a, concurrent: true}]", f"limits[0].concurrent: {WHOLE}"),
        (
            "limits: [{name: a, concurrent: {FREE: true}, tiers: [FREE]}]",
            f"limits[0].concurrent.FREE: {WHOLE}",
        ),
        (
            "limits: [{name: a, quota: 9, period: day, warn_at: [true]}]",
            f"limits[0].warn_at[0]: {NUMBER}",
        ),
        (
            "limits: [{name: a, rate: 1, capacity: 2, tiers: []}]",
            "limits[0].tiers: must name at least one tier, got []",
        ),
        (
            "limits: [{name: a, rate: 1, capacity: 2, tiers: {}}]",
            "limits[0].tiers: must name at least one tier, got {}",
        ),
        (
            "limits: [{name: a, quota: 1, period: day, time_zone: Europe/Berln}]",
            "limits[0].time_zone: no such time zone, got 'Europe/Berln'; did you mean 'Europe/Berlin'?",
        ),
        *[
            (
                TARGET % url,
                (
                    "upstreams.a.targets[0].url: must contain a host name or an address, and optionally a port; an"
                    f" IPv6 address needs brackets, as in http://[::1]:80{HIDDEN}"
                ),
            )
            for url in ("http://::1:80", "https://::1", "http://fe80::1:80")
        ],
        (
            TARGET % "http://:80",
            "upstreams.a.targets[0].url: must be http://host[:port] or https://host[:port], got 'http://:80'",
        ),
        ("server: {host: 'http://0.0.0.0'}", f"{ONLY_ADDRESS} 'http://0.0.0.0'"),
        ("server: {host: '0.0.0.0:80'}", f"{ONLY_ADDRESS} '0.0.0.0:80'"),
        ("server: {host: '[::1]:80'}", f"{ONLY_ADDRESS} '[::1]:80'"),
        ("server: {host: 'localhost:'}", f"{ONLY_ADDRESS} 'localhost:'"),
        ("port: 8443", "port: unknown key; did you mean 'server.port'?"),
        ("prefix: a", "prefix: unknown key; did you mean 'store.prefix'?"),
        ("limit: []", "limit: unknown key; did you mean 'limits'?"),
        (
            "server: {tls: {certificates: [{certificate: a.pem}], hsts: 86400s}}",
            f"server.tls.hsts: {PATTERNS[HSTS]}, got '86400s'",
        ),
    ],
)
def test_a_mistake_has_place_value_and_remedy(yaml: str, message: str, tmp_path: Path) -> None:
    assert message_of(tmp_path, yaml) == message


def test_no_message_shows_a_regular_expression() -> None:
    """Each pattern that a setting must match is described, or that of another spelling, for which messages exist."""
    schema = json.dumps(GatewayConfig.model_json_schema())
    patterns = {json.loads(f'"{text}"') for text in re.findall(r'"pattern": "((?:[^"\\]|\\.)*)"', schema)}
    assert patterns - PATTERNS.keys() == {DURATION_TEXT, SIZE_TEXT, RATE_TEXT, "^[Hh][Tt][Tt][Pp][Ss]?://"}


def test_an_entry_of_include_is_a_file_other_than_the_one_that_includes_it(tmp_path: Path) -> None:
    (tmp_path / "teams").mkdir()
    for pattern, fault in {
        "teams": "is a folder; include the files in it, as in teams/*.yaml",
        "gateway.yaml": "a file cannot include itself; name others, as in teams/*.yaml",
        "./*.yaml": "a file cannot include itself; name others, as in teams/*.yaml",
        "none.yaml": "no such file",
    }.items():
        assert message_of(tmp_path, f"include: ['{pattern}']") == f"include[0]: {fault}, got {pattern!r}"


@each("host", ["0.0.0.0", "::", "::1", "[::1]", "fe80::1%eth0", "localhost", "unix:/run/gateway.sock"])
def test_an_address_without_a_port_is_accepted(host: str) -> None:
    assert GatewayConfig.model_validate({"server": {"host": host}}).server.host == host


def test_numbers_may_be_text_and_switches_stay_switches() -> None:
    """Variables are text."""
    config = GatewayConfig.model_validate(
        {"server": {"workers": "2", "header_timeout": "5"}, "admin": {"local": True}}
    )
    assert (config.server.workers, config.server.header_timeout, config.admin.local) == (2, 5.0, True)
