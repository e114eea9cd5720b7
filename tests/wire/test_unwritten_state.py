"""State that cannot be written to the state folder is shown while that lasts, and a stop says what it loses."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.kit import RawUpstream, RunningGateway, ask, eventually, in_front_of, reply, running_gateway

TABLES = {"quotas": ("quotas.sqlite3", "counters"), "usage": ("usage.sqlite3", "usage")}
KINDS = {"quotas", "usage", "webhook_events", "required_proofs", "key_uses"}


def rename(folder: Path, file: str, old: str, new: str) -> None:
    """Rename a table: the gateway cannot write to it, as on a full disk."""
    (path,) = folder.rglob(file)
    with closing(sqlite3.connect(path, timeout=30)) as connection:
        connection.execute(f"ALTER TABLE {old} RENAME TO {new}")


def written(gateway: RunningGateway) -> dict[str, float]:
    """Return by kind of state whether its last write was successful."""
    text = ask(f"{gateway.url}/metrics?format=prometheus").body.decode()
    name = "gateway_state_last_write_successful"
    lines = [line.removeprefix(f'{name}{{state="') for line in text.splitlines() if line.startswith(f"{name}{{")]
    return {line.partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


def problems(gateway: RunningGateway) -> str:
    return ask(f"{gateway.url}/dashboard/problems").body.decode()


def test_state_that_cannot_be_written_is_shown_until_it_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    up = RawUpstream(reply())
    sections: dict[str, Any] = in_front_of(up.url) | {
        "limits": [{"name": "monthly", "quota": 1_000_000, "period": "month"}],
        "usage": {"enabled": True},
    }

    def health() -> Any:
        assert ask(f"{gateway.url}/api/x").status == 200  # something is to be written
        return ask(f"{gateway.url}/health").json()

    with running_gateway(sections, tmp_path) as gateway:
        assert (health()["status"], health()["state"]) == ("pass", {"status": "pass", "errors": {}})
        assert written(gateway) == dict.fromkeys(KINDS, 1)
        for file, table in TABLES.values():
            rename(tmp_path, file, table, "away")
        eventually(lambda: set(health()["state"]["errors"]) == set(TABLES), "both are shown")
        found = health()
        assert (found["status"], found["state"]["status"]) == ("warn", "warn")
        assert "no such table" in found["state"]["errors"]["quotas"]
        assert written(gateway) == dict.fromkeys(KINDS, 1) | dict.fromkeys(TABLES, 0)
        eventually(lambda: "Charges of quotas are not stored" in problems(gateway), "a problem is shown")
        eventually(lambda: "The usage of clients is not stored" in problems(gateway), "another is shown")
        for file, table in TABLES.values():
            rename(tmp_path, file, "away", table)
        eventually(lambda: health()["state"]["status"] == "pass", "it is written again")
        eventually(lambda: "not stored" not in problems(gateway), "there is no problem any more")
        for file, table in TABLES.values():
            rename(tmp_path, file, table, "away")
        eventually(lambda: set(health()["state"]["errors"]) == set(TABLES), "both are shown again")
    assert "quotas: the last charges of 1 counter were not stored and are lost" in caplog.text
    assert "usage: the last counts were not stored and are lost" in caplog.text
    up.close()
