"""The file of breaker modes: changes are stored and followed, and an unreadable file changes nothing."""

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from api_gateway.admin.breaker_overrides import (
    OVERRIDES_FILE,
    OVERRIDES_POLL_INTERVAL,
    BreakerOverrides,
    InvalidOverrideFile,
    Override,
    OverrideFile,
)
from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.errors import StoreUnavailable
from api_gateway.resilience.breaker_policy import BreakerPolicy, Mode
from tests.kit import FakeClock, soon

WALL = 1_800_000_000.0
HELD = Override(Mode.FORCED_OPEN, WALL, WALL + 600, "moving house", "192.0.2.7")
WATCHED = Override(Mode.OBSERVE, WALL, None, "", "192.0.2.7")
ENTRY: dict[str, Any] = {
    "mode": "forced_open",
    "since": "2027-01-15T08:00:00.000+00:00",
    "until": None,
    "comment": "",
    "set_by": "me",
}


@pytest.fixture
def file(tmp_path: Path) -> OverrideFile:
    return OverrideFile(tmp_path / "state")


class Worker:
    """One of those who follow a file, with a clock of its own that runs from elsewhere."""

    def __init__(self, file: OverrideFile, wall: FakeClock) -> None:
        self.clock = FakeClock()
        self.breaker = CircuitBreaker(BreakerPolicy(), self.clock())
        self.try_handle = BreakerOverrides(file, {"users": self.breaker}, clock=self.clock, wall_clock=wall)

    def mode(self) -> Mode:
        return self.breaker.mode

    def trouble(self) -> str | None:
        return self.try_handle.error


# The file


def test_without_a_file_nothing_is_set(file: OverrideFile) -> None:
    assert (file.read(), file.signature()) == ({}, None)


def test_what_was_written_is_found_again(file: OverrideFile) -> None:
    assert file.change("users", HELD, WALL) == (None, {"users": HELD})
    assert file.change("orders", WATCHED, WALL) == (None, {"users": HELD, "orders": WATCHED})
    assert OverrideFile(file.path.parent).read() == {"users": HELD, "orders": WATCHED}


def test_a_change_returns_what_was_before_and_another_content_has_another_signature(file: OverrideFile) -> None:
    file.change("users", HELD, WALL)
    signature = file.signature()
    assert file.change("users", None, WALL) == (HELD, {})
    assert file.signature() != signature
    assert file.read() == {}


def test_what_is_over_is_taken_out_with_the_next_change(file: OverrideFile) -> None:
    file.change("users", HELD, WALL)
    assert file.change("orders", WATCHED, WALL + 600) == (None, {"orders": WATCHED})


def test_changes_of_several_at_once_are_all_kept(file: OverrideFile) -> None:
    names = [f"upstream-{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: OverrideFile(file.path.parent).change(name, WATCHED, WALL), names))
    assert sorted(file.read()) == sorted(names)


def test_a_writer_that_dies_halfway_leaves_the_file_as_it_was(
    file: OverrideFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise OSError("no space left")

    file.change("users", HELD, WALL)
    monkeypatch.setattr("api_gateway.system.state_folder.os.fsync", die)
    with pytest.raises(OSError, match="no space left"):
        file.change("users", WATCHED, WALL)
    assert file.read() == {"users": HELD}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"circuit_breakers": {\n  "users": x}}', ":2:12: not JSON: Expecting value"),
        ("", ":1:1: not JSON: Expecting value"),
        ("[]", ": must have an object circuit_breakers"),
        (b"\xff", ": not UTF-8: invalid start byte at byte 0"),
        ({"users": 7}, ": circuit_breakers.users: must have mode, since, until, comment, set_by, got 7"),
        ({"users": ENTRY | {"mode": 7}}, ": circuit_breakers.users.mode: must be text, got 7"),
        (
            {"users": ENTRY | {"mode": "open"}},
            ": circuit_breakers.users.mode: must be one of observe, forced_closed, forced_open, got 'open'",
        ),
        (
            {"users": ENTRY | {"until": "tomorrow"}},
            (
                ": circuit_breakers.users.until: must be a time with a UTC offset, such as 2026-12-01T00:00:00Z,"
                " got 'tomorrow'"
            ),
        ),
        (
            {"users": ENTRY | {"since": "2026-12-01T00:00:00"}},
            (
                ": circuit_breakers.users.since: must be a time with a UTC offset, such as 2026-12-01T00:00:00Z,"
                " got '2026-12-01T00:00:00'"
            ),
        ),
    ],
)
def test_what_cannot_be_used_is_named_by_file_place_and_value(file: OverrideFile, content: Any, problem: str) -> None:
    file.path.parent.mkdir()
    raw = json.dumps({"circuit_breakers": content}) if isinstance(content, dict) else content
    file.path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(InvalidOverrideFile) as raised:
        file.read()
    assert str(raised.value) == f"{file.path}{problem}"


# Who follows it


async def test_a_mode_that_one_sets_is_followed_by_the_others(file: OverrideFile) -> None:
    wall = FakeClock(WALL)
    one, other = Worker(file, wall), Worker(file, wall)
    assert await one.try_handle.set("users", HELD) is None
    assert one.mode() is Mode.FORCED_OPEN
    assert other.mode() is Mode.AUTO
    await other.try_handle.refresh()
    assert (other.mode(), other.try_handle.override("users")) == (Mode.FORCED_OPEN, HELD)
    assert await other.try_handle.set("users", None) == HELD
    await one.try_handle.refresh()
    assert one.mode() is Mode.AUTO


async def test_it_is_in_force_again_after_a_restart(file: OverrideFile) -> None:
    await Worker(file, FakeClock(WALL)).try_handle.set("users", WATCHED)
    restarted = Worker(file, FakeClock(WALL + 86_400))
    await restarted.try_handle.refresh()
    assert restarted.mode() is Mode.OBSERVE


@pytest.mark.parametrize("mode", [Mode.FORCED_OPEN, Mode.FORCED_CLOSED, Mode.OBSERVE])
async def test_it_ends_by_itself_by_the_wall_clock(file: OverrideFile, mode: Mode) -> None:
    wall = FakeClock(WALL)
    worker = Worker(file, wall)
    await worker.try_handle.set("users", Override(mode, WALL, WALL + 600, "", "me"))
    wall.advance(599)
    worker.clock.advance(599)
    await worker.try_handle.refresh()
    assert worker.mode() is mode
    wall.advance(1)
    worker.clock.advance(1)
    await worker.try_handle.refresh()
    assert (worker.mode(), worker.try_handle.override("users")) == (Mode.AUTO, None)


async def test_an_unusable_file_changes_nothing_and_is_logged_once(
    file: OverrideFile, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(file, FakeClock(WALL))
    await worker.try_handle.set("users", HELD)
    file.path.write_text("{")
    for _ in range(3):
        await worker.try_handle.refresh()
    assert worker.mode() is Mode.FORCED_OPEN
    (told,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert f"{file.path}:1:2: not JSON" in told
    assert worker.trouble() is not None
    with pytest.raises(StoreUnavailable, match=r"The mode was not changed: .*not JSON"):
        await worker.try_handle.set("users", None)
    file.path.unlink()
    await worker.try_handle.refresh()
    assert (worker.mode(), worker.trouble()) == (Mode.AUTO, None)


async def test_a_folder_that_cannot_be_read_is_tried_again(
    file: OverrideFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(file, FakeClock(WALL))
    file.change("users", HELD, WALL)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError("not yours")))
        await worker.try_handle.refresh()
    assert worker.trouble() == "not yours"
    await worker.try_handle.refresh()
    assert (worker.trouble(), worker.mode()) == (None, Mode.FORCED_OPEN)


async def test_a_name_that_no_upstream_has_is_warned_of(file: OverrideFile, caplog: pytest.LogCaptureFixture) -> None:
    file.change("usres", HELD, WALL)
    await Worker(file, FakeClock(WALL)).try_handle.refresh()
    assert "circuit_breakers.usres: there is no such upstream" in caplog.text


async def test_each_change_is_logged_with_who_and_why(file: OverrideFile, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(file, FakeClock(WALL))
    await worker.try_handle.set("users", HELD)
    await worker.try_handle.refresh()
    await worker.try_handle.set("users", None)
    assert [record.message for record in caplog.records] == [
        "circuit breaker users: mode auto -> forced_open, set by 192.0.2.7: moving house",
        "circuit breaker users: mode forced_open -> auto",
    ]


async def test_it_looks_several_times_a_second(file: OverrideFile) -> None:
    # The file is read in a thread, so this test waits in real time.
    worker = Worker(file, FakeClock(WALL))
    assert OVERRIDES_POLL_INTERVAL < 0.5
    following = asyncio.create_task(worker.try_handle.follow_file())
    try:
        file.change("users", HELD, WALL)
        await soon(lambda: worker.mode() is Mode.FORCED_OPEN, "the breaker is in the mode")
    finally:
        following.cancel()


def test_the_file_lies_in_the_state_directory(tmp_path: Path) -> None:
    assert OverrideFile(tmp_path).path == tmp_path / OVERRIDES_FILE
    assert OVERRIDES_FILE in repr(OverrideFile(tmp_path))
