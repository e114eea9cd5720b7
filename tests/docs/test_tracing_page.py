"""The page on tracing: its configuration and commands do what it says, and it lists every attribute."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from api_gateway.assembly import tracing
from api_gateway.observability import trace_exporter
from tests.kit import RawUpstream, in_front_of, reply, running_gateway
from tests.trace_kit import CLIENT, SERVER, collector

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tracing.md").read_text()
SETTINGS = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[0])
INSTALLING, ASKING = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)


def test_its_commands_do_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_exporter, "EXPORT_INTERVAL", 0.02)
    up = RawUpstream(reply(b"fine"))
    sections = in_front_of(up.url) | {"routes": [{"name": "users", "path": "/api/users", "upstream": "up"}]}
    assert SETTINGS["tracing"]["endpoint"] + "/v1/traces" == tracing.DEFAULT_ENDPOINT
    with collector() as received:
        own = {"tracing": SETTINGS["tracing"] | {"endpoint": received.url, "ratio": 1}}
        with running_gateway(sections | own, tmp_path) as running:
            commands = ASKING.replace("http://localhost:8000", running.url)
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", commands], capture_output=True, check=True, text=True
            )
        groups = received.exchanges(2)
    up.close()
    assert done.stdout.startswith("HTTP/1.1 200 OK")
    (own_span, attempt), (refused,) = groups
    assert (own_span.trace_id, own_span.kind, attempt.kind) == ("0af7651916cd43dd8448eb211c80319c", SERVER, CLIENT)
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    problem = json.loads(done.stdout[done.stdout.index("{") :])
    assert list(json.loads(shown)) == list(problem)
    varying = {"request_id", "trace_id"}
    assert {k: v for k, v in json.loads(shown).items() if k not in varying} == {
        k: v for k, v in problem.items() if k not in varying
    }
    assert problem["trace_id"] == refused.trace_id


def test_it_lists_every_attribute() -> None:
    source = (ROOT / "api_gateway" / "observability" / "trace_encoding.py").read_text()
    names = set(re.findall(r'"((?:http|url|server|client|network|error|gateway)\.[a-z_.]+)"', source))
    assert len(names) > 20
    assert names <= set(re.findall(r"[\w.]+", PAGE))
    listed = set(re.findall(r"`(gateway\.[a-z_.]+)`", PAGE))
    assert listed <= names


def test_it_names_the_extra_the_variables_and_the_limits() -> None:
    assert "api-gateway[otel]" in INSTALLING
    read = set(re.findall(r'"(OTEL_[A-Z_]+)"', Path(tracing.__file__).read_text()))
    assert {name for name in read if f"`{name}`" not in PAGE} == set()
    assert f"up to {trace_exporter.EXPORT_BATCH} exchanges" in PAGE
    assert trace_exporter.MAX_DELIVERIES == 6
    assert f"{trace_exporter.FLUSH_TIMEOUT:g} seconds to deliver" in PAGE
