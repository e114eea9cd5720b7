"""Calendar quotas of real processes: what `kill -9` forgets is bounded, and an orderly end forgets nothing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from api_gateway.limits.period_store import MAX_LOSS
from tests.kit import Answer, RawUpstream, ask, eventually
from tests.processes import Running, process

QUOTA = 100_000
CLIENT = {"X-Client-ID": "acme"}


def written(folder: Path, url: str, **more: Any) -> list[str]:
    """Write a configuration; return the arguments of a gateway with it."""
    sections = {
        "state_dir": str(folder / "state"),
        "server": {"port": 0, "max_event_loop_lag": None},
        "tiers": {"FREE": {"rate": 100_000, "capacity": 100_000}},
        "address_limit": {"rate": 0},
        "upstreams": {"up": {"targets": [{"url": url}]}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
        "store": {"decision_timeout": 10},  # of several workers, which a busy machine does not miss
        "limits": [{"name": "monthly", "quota": QUOTA, "period": "month", "time_zone": "Europe/Berlin"}],
    }
    (folder / "gateway.yaml").write_text(yaml.safe_dump(sections | more))
    return ["-m", "api_gateway", "--config", str(folder / "gateway.yaml")]


def used(running: Running) -> float:
    """Return what the client has used. A store that has just started may miss its deadline, which is 503."""
    answers: list[Answer] = []

    def responds() -> bool:
        answers.append(running.ask("/clients/acme/quotas"))
        assert answers[-1].status in (200, 503), answers[-1].body
        return answers[-1].status == 200

    eventually(responds, "the store responds in time")
    (quota,) = answers[-1].json()["quotas"]
    return float(quota["used"])


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_forgets_at_most_a_second_and_a_stop_nothing(tmp_path: Path, up: RawUpstream, workers: int) -> None:
    arguments = written(tmp_path, up.url, server={"port": 0, "max_event_loop_lag": None, "workers": workers})
    answered: list[float] = []
    with process(*arguments, cwd=tmp_path) as running:
        url = running.url
        while not answered or answered[-1] < answered[0] + MAX_LOSS + 0.3:
            assert ask(f"{url}/api/x", headers=CLIENT).status == 200
            answered.append(time.monotonic())
            time.sleep(0.005)
        killed = time.monotonic()
        running.popen.kill()
        running.popen.wait()
    certain = sum(at < killed - MAX_LOSS for at in answered)
    assert certain > 0
    with process(*arguments, cwd=tmp_path) as running:
        after = used(running)
        assert certain <= after <= len(answered)
        for _ in range(10):
            assert ask(f"{running.url}/api/x", headers=CLIENT).status == 200
        assert running.terminate() == 0
    with process(*arguments, cwd=tmp_path) as running:
        assert used(running) == after + 10


def test_a_top_up_that_was_confirmed_survives_kill_9(tmp_path: Path, up: RawUpstream) -> None:
    arguments = written(tmp_path, up.url)
    change = {"Content-Type": "application/json"}
    with process(*arguments, cwd=tmp_path) as running:
        path = "/clients/acme/quotas/monthly/top-up"
        body = json.dumps({"amount": 7, "expires": "2200-01-01T00:00:00Z"}).encode()
        assert running.ask(path, method="POST", headers=change, body=body).status == 200
        running.popen.kill()
        running.popen.wait()
    with process(*arguments, cwd=tmp_path) as running:
        (quota,) = running.ask("/clients/acme/quotas").json()["quotas"]
    assert (quota["top_up"], quota["remaining"]) == (7, QUOTA + 7)


def test_a_file_that_is_corrupt_stops_the_start_with_a_remedy(tmp_path: Path, up: RawUpstream) -> None:
    arguments = written(tmp_path, up.url)
    folder = tmp_path / "state" / "state"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "quotas.sqlite3").write_bytes(b"no database at all, for sure" * 100)
    with process(*arguments, cwd=tmp_path) as running:
        assert running.exit_code() != 0
    assert "quotas.sqlite3: the file is corrupt" in running.errors
    assert "move the file" in running.errors
