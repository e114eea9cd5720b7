"""The load test, run as a person runs it against a gateway: a table by class, and an exit code that can be trusted."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import RunningGateway, running_gateway

SCRIPT = Path(__file__).parents[2] / "load_test.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Run the demo."""
    with running_gateway({}, tmp_path_factory.mktemp("load")) as gateway:
        yield gateway


def run(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150, check=False)


def test_it_registers_its_clients_and_prints_what_each_class_sent_and_got(
    demo: RunningGateway, tmp_path: Path
) -> None:
    done = run("--host", demo.url, "--seconds", "3", "--users", "10", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("class ") :].splitlines()
    assert table[0].split() == ["class", "tier", "sent", "allowed", "limited", "failed", "p50", "p95", "p99"]
    rows = {row.split()[0]: row.split()[1:] for row in table[1:6]}
    assert {name: row[0] for name, row in rows.items()} == {
        "Free": "FREE",
        "Basic": "BASIC",
        "Premium": "PREMIUM",
        "Enterprise": "ENTERPRISE",
        "Flooder": "FREE",
    }
    for name, (_, sent, allowed, limited, failed, *_) in rows.items():
        assert int(sent) == int(allowed) + int(limited) > 0
        assert failed == "0"
        assert (int(limited) > 0) == (name == "Flooder")
    assert {client.quota.name for client in demo.live.clients._known.values()} == {
        "FREE",
        "BASIC",
        "PREMIUM",
        "ENTERPRISE",
    }


def test_without_a_gateway_it_says_so(tmp_path: Path) -> None:
    done = run("--host", "http://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 2
    assert "No gateway responds at http://127.0.0.1:9" in done.stderr
