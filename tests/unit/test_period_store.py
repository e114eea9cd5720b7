"""The file of calendar quotas: what was written is read again, and an error of the disk loses nothing."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.period_store import CounterRow, PeriodJournal, PeriodStore
from api_gateway.limits.periods import HOUR, Calendar
from api_gateway.limits.quota_state import MICROSECONDS, PeriodQuota, QuotaCounter
from tests.kit import FakeClock, soon

NOW = 1_801_440_000  # 1 February 2027
QUOTA = PeriodQuota.of("monthly", 10, Calendar("month", ZoneInfo("UTC")), carry_over=5)
HOURLY = PeriodQuota.of("hourly", 10, Calendar("hour", ZoneInfo("UTC")))


def journal(folder: Path, now: float = NOW, limit: int = 100, **more: Any) -> PeriodJournal:
    """Return a journal of new counters."""
    clock = FakeClock(now)
    return PeriodJournal(
        PeriodCounters(limit), more.get("store") or PeriodStore(folder), clock=clock, wall_clock=clock
    )


def spend(
    counters: PeriodCounters,
    key: str,
    cost: int = 1000,
    now: int = NOW,
    quota: PeriodQuota = QUOTA,
    *,
    is_unverified: bool = False,
) -> None:
    """Charge a cost."""
    standing = counters.standing(key, quota, now * MICROSECONDS, is_unverified=is_unverified)
    counters.charge(standing, cost, now * MICROSECONDS)


async def stored(folder: Path, now: float = NOW, limit: int = 100) -> dict[str, QuotaCounter]:
    """Return the counters in the file."""
    reading = journal(folder, now, limit)
    await reading.start()
    await reading.close()
    return reading.counters.counters


async def test_what_was_charged_is_read_again(tmp_path: Path) -> None:
    writing = journal(tmp_path)
    await writing.start()
    spend(writing.counters, "a", 4000, NOW - 1)
    spend(writing.counters, "a", 3000)
    spend(writing.counters, "b", 1)
    writing.counters.top_up("b", QUOTA, 7000, NOW + 10, NOW * MICROSECONDS)
    before = dict(writing.counters.counters)
    await writing.close()
    assert await stored(tmp_path) == before
    assert before["a"].before is not None
    assert (before["a"].before.used, before["a"].count.used, before["a"].count.carried) == (4000, 3000, 5000)
    assert (tmp_path / "quotas.sqlite3").stat().st_mode & 0o777 == 0o600


async def test_counters_that_have_ended_are_removed(tmp_path: Path) -> None:
    writing = journal(tmp_path)
    await writing.start()
    spend(writing.counters, "a", quota=HOURLY)
    spend(writing.counters, "b")
    await writing.close()
    assert set(await stored(tmp_path, NOW + 27 * HOUR)) == {"a", "b"}
    assert set(await stored(tmp_path, NOW + 27 * HOUR + 1)) == {"b"}
    assert set(await stored(tmp_path)) == {"b"}


async def test_no_more_counters_are_read_than_memory_may_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writing = journal(tmp_path)
    await writing.start()
    for number in range(5):
        spend(writing.counters, f"a{number}", now=NOW + number * 40 * 24 * HOUR)
    await writing.close()
    assert set(await stored(tmp_path, limit=2)) == {"a3", "a4"}
    assert "2 counters or more" in caplog.text


async def test_invented_keys_do_not_displace_others_at_a_start(tmp_path: Path) -> None:
    """Also if the limit has been lowered, and the invented ones have been used last."""
    writing = journal(tmp_path)
    await writing.start()
    for number in range(3):
        spend(writing.counters, f"known {number}")
    for number in range(50):
        spend(writing.counters, f"invented {number}", now=NOW + 40 * 24 * HOUR, is_unverified=True)
    before = dict(writing.counters.counters)
    await writing.close()
    found = await stored(tmp_path, limit=4)
    assert {key for key in found if key.startswith("known")} == {"known 0", "known 1", "known 2"}
    assert (len(found), sum(counter.is_unverified for counter in found.values())) == (7, 4)
    assert all(before[key] == counter for key, counter in found.items())


@pytest.mark.parametrize(("version", "absent"), [(1, ("is_unverified", "resets")), (2, ("resets",))])
async def test_a_file_of_an_earlier_version_is_read_and_its_keys_count_as_unverified(
    tmp_path: Path, version: int, absent: Sequence[str]
) -> None:
    writing = journal(tmp_path)
    await writing.start()
    spend(writing.counters, "a")
    await writing.close()
    with sqlite3.connect(tmp_path / "quotas.sqlite3") as other:
        for column in absent:
            other.execute(f"ALTER TABLE counters DROP COLUMN {column}")
        other.execute(f"PRAGMA user_version = {version}")
    other.close()
    found = await stored(tmp_path)
    assert (found["a"].count.used, found["a"].is_unverified, found["a"].resets) == (1000, version == 1, 0)
    assert set(await stored(tmp_path)) == {"a"}


async def test_the_number_of_resets_is_stored_with_the_counter(tmp_path: Path) -> None:
    writing = journal(tmp_path)
    await writing.start()
    spend(writing.counters, "a")
    for _ in range(3):
        writing.counters.reset("a", QUOTA, NOW * MICROSECONDS)
    await writing.close()
    assert (await stored(tmp_path))["a"].resets == 3


async def test_what_could_not_be_written_is_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(PeriodStore):
        fails = True

        async def write(self, rows: Any, now: int) -> None:
            if self.fails:
                raise OSError("disk full")
            await super().write(rows, now)

    store = Failing(tmp_path)
    writing = journal(tmp_path, store=store)
    await writing.start()
    spend(writing.counters, "a")
    await writing.write()
    await writing.write()
    assert caplog.text.count("disk full") == 1
    spend(writing.counters, "b")
    store.fails = False
    await writing.close()
    assert "stored again" in caplog.text
    assert set(await stored(tmp_path)) == {"a", "b"}


async def test_counters_that_have_ended_are_removed_while_others_are_written(tmp_path: Path) -> None:
    """A file does not grow with the keys that clients have invented since the start."""
    writing = journal(tmp_path)
    await writing.start()
    store = writing.store
    for number in range(3):
        for index in range(2000):
            spend(writing.counters, f"{number} {index}", quota=HOURLY)
        await writing.write()
        writing.counters.counters.clear()
        await store.write([], NOW + 26 * HOUR)
    spend(writing.counters, "a", quota=HOURLY, now=NOW + 100 * HOUR)
    for _ in range(4):
        await store.write([], NOW + 100 * HOUR)
    await writing.close()
    with closing(sqlite3.connect(tmp_path / "quotas.sqlite3")) as other:
        assert other.execute("SELECT key FROM counters").fetchall() == [("a",)]


async def test_changes_are_written_without_an_end(tmp_path: Path) -> None:
    """The task of the journal writes them, which is what remains after `kill -9`."""
    writing = journal(tmp_path)
    await writing.start()
    spend(writing.counters, "a")

    def rows() -> list[CounterRow]:
        with closing(sqlite3.connect(tmp_path / "quotas.sqlite3")) as other:
            return other.execute("SELECT key, used FROM counters").fetchall()

    await soon(lambda: rows() == [("a", 1000)], "the task writes")
    await writing.close()


async def test_a_file_that_cannot_be_used_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "quotas.sqlite3").write_bytes(b"no database at all, for sure" * 100)
    with pytest.raises(OSError, match=r"quotas.sqlite3: the file is corrupt: .*move the file"):
        await stored(tmp_path)
    (tmp_path / "quotas.sqlite3").unlink()
    await stored(tmp_path)
    with sqlite3.connect(tmp_path / "quotas.sqlite3") as other:
        other.execute("PRAGMA user_version = 9")
    other.close()
    with pytest.raises(OSError, match=r"newer gateway \(schema 9, newest supported 3\)"):
        await stored(tmp_path)
    with pytest.raises(OSError, match="not open"):
        await PeriodStore(tmp_path).write([], NOW)
