"""The dashboard of several workers is that of one gateway: its events, the last hour, and the configuration."""

import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit import PATIENCE, RawUpstream, ask, eventually, reply
from tests.processes import WAYS, Running, config_file, hooked, process

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the workers are processes"),
    pytest.mark.timeout(240),
]
TOKEN = "correct-horse-battery-staple"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
TEXT = f"tiers: {{FREE: {{rate: 100000, capacity: 1000000}}}}\nadmin: {{token: {TOKEN}}}\nlog: {{access: false}}\n"
REQUESTS = 60
SHORT_POINTS = """
from api_gateway.admin import feed
from api_gateway.reporting import traffic_history

feed.POINT_SECONDS = traffic_history.POINT_SECONDS = 2.0
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    up, folder = RawUpstream(reply(b"fine")), tmp_path_factory.mktemp("dashboard")
    path = config_file(folder, up.url, TEXT)
    hook = hooked(folder, SHORT_POINTS)
    with process(*WAYS["python -m"], "--config", path, "--workers", "2", cwd=folder, **hook) as running:
        eventually(lambda: ask(f"{running.url}/readyz").status == 200, "it serves")
        for _ in range(REQUESTS):  # each on a connection of its own, so that both workers get some
            assert ask(f"{running.url}/api/up").status == 200
        yield running
    up.close()


def frames(gateway: Running) -> Iterator[dict[str, Any]]:
    """Yield the events of each frame of a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port or 0, timeout=PATIENCE)
    connection.request("GET", "/dashboard/events", headers=BEARER)
    response, found = connection.getresponse(), {}
    assert response.status == 200
    try:
        while line := response.readline():
            if line.startswith(b"event: "):
                name = line[7:].strip().decode()
                found[name] = json.loads(response.readline()[6:])
                if name == "frame":
                    yield found
                    found = {}
    finally:
        connection.close()


def test_a_page_sees_all_workers_and_the_hour_that_the_supervisor_keeps(gateway: Running) -> None:
    counted = 0
    for frame in frames(gateway):
        assert frame["overview"]["workers"] == 2
        assert frame["overview"]["total"] == REQUESTS
        counted += sum(point["requests"] for point in frame.get("points", ()))
        if counted >= REQUESTS:  # they may be those of two points
            break
    assert counted == REQUESTS
    kept = [sum(one["requests"] for one in next(frames(gateway))["points"]) for _ in range(6)]
    assert kept == [REQUESTS] * 6, "whichever worker responds"


def test_each_worker_knows_where_the_settings_were_set(gateway: Running, tmp_path: Path) -> None:
    for _ in range(6):
        settings = ask(f"{gateway.url}/configuration", headers=BEARER).json()["settings"]
        (rate,) = (one for one in settings if one["setting"] == "tiers.FREE.rate")
        assert rate["value"] == 100_000
        assert rate["origin"].partition(":")[0].endswith(".yaml")
        assert TOKEN not in str(settings)
