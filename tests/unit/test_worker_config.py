"""A worker gets the configuration that the supervisor has read, with secrets and removed defaults."""

import json
from pathlib import Path
from typing import Any

import pytest

from api_gateway import __version__
from api_gateway.config import load_config
from api_gateway.demo import DemoUpstreams
from api_gateway.errors import STARTUP_FAILED
from api_gateway.process.worker import main
from api_gateway.process.worker_config import WorkerConfig
from api_gateway.reload.serialization import deserialized, serialized

WHOLE: dict[str, Any] = {
    "server": {"workers": 4, "trusted_proxies": ["10.0.0.0/8", "::1"], "drain_timeout": 2.5},
    "store": {"url": "redis://cache"},
    "admin": {"token": "correct-horse"},
    "tiers": {"GOLD": {"rate": 0.5, "capacity": 7}, "FREE": None},
    "default_tier": "GOLD",
    "clients": {"acme": {"tier": "gold"}},
    "upstreams": {
        "up": {"targets": [{"url": "http://127.0.0.1:9"}], "tls": {"ca_file": "ca.pem"}, "health_check": {}}
    },
    "routes": [{"name": "up", "path": "/api/up", "upstream": "up", "costs": [{"methods": ["post"], "cost": 0.25}]}],
    "address_limit": {"exempt": ["192.0.2.0/24"]},
}


@pytest.mark.parametrize("sections", [{}, WHOLE], ids=["nothing", "everything"])
def test_a_configuration_arrives_as_it_was(sections: dict[str, Any]) -> None:
    config = load_config(None, sections)
    arrived = deserialized(json.loads(json.dumps(serialized(config, {}))))
    assert arrived == config
    assert "FREE" not in arrived.tiers or not sections


def test_an_edit_of_the_sources_does_not_reach_a_worker_that_takes_a_place(tmp_path: Path) -> None:
    """Only a reload does; otherwise some would be what others are not."""
    values = serialized(load_config(None, WHOLE), {})
    (tmp_path / ".env").write_text("GATEWAY_CLIENTS__OTHER__TIER=BASIC\nGATEWAY_LOG__LEVEL=debug\n")
    arrived = deserialized(values)
    assert list(arrived.clients) == ["acme"]
    assert arrived.log.level == "info"


def test_sections_take_the_place_of_the_configuration_s_own() -> None:
    demo = DemoUpstreams()
    try:
        config = deserialized(serialized(load_config(None, {}), demo.sections()))
        assert not config.is_demo
        assert set(config.upstreams) == set(demo.urls)
    finally:
        demo.close()


def test_a_brief_travels_as_json() -> None:
    config = json.loads(WorkerConfig(3, {"a": 1}, 7, [8, 9], [10], [11]).encode())
    assert (config["number"], config["config"], config["channel"]) == (3, {"a": 1}, 7)
    assert (config["listeners"], config["admin_listeners"]) == ([8, 9], [10])
    assert config["redirect_listeners"] == [11]
    assert config["path"]
    assert config["version"] == __version__


@pytest.mark.parametrize("sent", [{}, {"version": "0.0.1"}])
def test_a_worker_of_another_release_than_its_supervisor_does_not_start(
    sent: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Their messages may differ. A rolling restart is then aborted, and the old workers continue to serve."""
    assert main(sent) == STARTUP_FAILED
    expected = f"{__version__} is installed, and the supervisor runs {sent.get('version')}: restart the gateway"
    assert caplog.messages == [expected]
