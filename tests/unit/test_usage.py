"""The usage of clients: counted exactly, bounded, and kept through restarts, failures and other processes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from api_gateway.models import Client, Decision, Exchange, Quota
from api_gateway.usage.counts import DAY, OTHERS, UsageCounts, name_of
from api_gateway.usage.ledger import TooManyRows, UsageLedger, UsageQuestion

FREE = Quota.per_second("FREE", 1, 10)
NOW = 20_000.5 * DAY


def ended(client_id: str | None = "acme", source: Any = "registered", **values: Any) -> Exchange:
    client = None if client_id is None else Client(client_id, client_id, FREE, source)
    decision = Decision("k", FREE, allowed=True, remaining=1, wait_ns=0, reset_ns=0)
    fields: dict[str, Any] = {"route": "up", "cost": 2.5, "status": 200, "bytes_in": 3, "bytes_out": 5}
    exchange = Exchange("1", "GET", "/", "192.0.2.1", 0.0, client, decision=decision)
    for name, value in (fields | values).items():
        setattr(exchange, name, value)
    return exchange


def test_an_exchange_is_counted_once_with_what_was_charged() -> None:
    counts = UsageCounts(10)
    counts.count(ended(), NOW)
    refused = Decision("k", FREE, allowed=False, remaining=0, wait_ns=1, reset_ns=0)
    counts.count(ended(decision=refused, status=429), NOW)
    counts.count(ended(status=500, decision=None), NOW)
    counts.count(ended(None, route=None, decision=None, status=404), NOW + DAY)
    assert counts.take() == {(20_000, "acme", "up"): [3, 1, 1, 2.5, 9, 15], (20_001, "", ""): [1, 0, 0, 0, 3, 5]}
    assert counts.take() == {}


def test_what_is_counted_during_a_write_that_fails_is_added_to_it() -> None:
    counts = UsageCounts(10)
    counts.count(ended(), NOW)
    unwritten = counts.take()
    counts.count(ended(), NOW)
    counts.put_back(unwritten)
    assert counts.take() == {(20_000, "acme", "up"): [2, 0, 0, 5.0, 6, 10]}


def test_invented_ids_are_bounded_each_day_and_registered_ones_are_not() -> None:
    counts = UsageCounts(2)
    for name in ("a", "b", "c", "d", "a"):
        counts.count(ended(name, "default"), NOW)
    for name in ("e", "f"):
        counts.count(ended(name), NOW)
    counts.count(ended("g", "default"), NOW + DAY)
    assert {(key[0], key[1]): row[0] for key, row in counts.take().items()} == {
        (20_000, "a"): 2,
        (20_000, "b"): 1,
        (20_000, OTHERS): 2,
        (20_000, "e"): 1,
        (20_000, "f"): 1,
        (20_001, "g"): 1,
    }


def test_no_id_is_that_of_an_address() -> None:
    """A client that sends an address as its id does not see the usage of that address."""
    address = name_of(Client("192.0.2.1", "address:192.0.2.1", FREE, "address"))
    assert " " in address, "ids have none"
    assert " " in OTHERS
    assert name_of(Client("192.0.2.1", "client:192.0.2.1", FREE, "default")) != address


def ledger(folder: Path, now: float = NOW, **options: Any) -> UsageLedger:
    return UsageLedger(folder, lambda: now, **{"max_unregistered": 100, "retention_days": 30} | options)


def question(*by: str, client: str | None = None, limit: int = 100) -> UsageQuestion:
    return UsageQuestion(by, 0, 100_000, client, limit)


async def test_several_processes_add_to_one_file_and_what_is_written_survives(tmp_path: Path) -> None:
    one, other = ledger(tmp_path), ledger(tmp_path)
    await one.open()
    await other.open()
    assert one.path.stat().st_mode & 0o777 == 0o600
    for index in range(20):
        (one if index % 2 else other).count(ended(f"client-{index % 3}"), NOW)
        if index % 5 == 0:
            await asyncio.gather(one.flush(), other.flush())
    await other.flush()
    found = await one.ask(question("client"))
    assert [(row["client"], row["requests"], row["tokens"]) for row in found] == [
        ("client-0", 7, 17.5),
        ("client-1", 7, 17.5),
        ("client-2", 6, 15),
    ]
    again = ledger(tmp_path)  # as after `kill -9` of both, which never close it
    await again.open()
    assert (await again.ask(question()))[0]["requests"] == 20
    assert [row["route"] for row in await again.ask(question("route", "day", client="client-1"))] == ["up"]
    for each in (one, other, again):
        await each.close()


async def test_a_write_that_fails_is_made_later_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = ledger(tmp_path)
    one.count(ended(), NOW)
    await one.flush()
    await one.flush()
    assert len(caplog.messages) == 1, "the same failure is logged once"
    assert "is not open; it is kept in memory" in caplog.messages[0]
    one.count(ended(), NOW)
    await one.open()
    assert (await one.ask(question()))[0]["requests"] == 2
    await one.close()


async def test_what_was_counted_is_written_at_the_end(tmp_path: Path) -> None:
    one = ledger(tmp_path)
    await one.open()
    one.count(ended(), NOW)
    await one.close()
    again = ledger(tmp_path)
    await again.open()
    assert (await again.ask(question()))[0]["requests"] == 1
    await again.close()


async def test_days_beyond_the_retention_are_deleted(tmp_path: Path) -> None:
    one = ledger(tmp_path, retention_days=30)
    await one.open()
    for days in (0, 29, 30, 400):
        one.count(ended(), NOW - days * DAY)
    assert [row["day"] for row in await one.ask(question("day"))] == [19_971, 20_000]
    await one.close()


async def test_a_result_is_complete_or_an_error(tmp_path: Path) -> None:
    one = ledger(tmp_path)
    await one.open()
    for index in range(5):
        one.count(ended(str(index)), NOW)
    assert len(await one.ask(question("client", limit=5))) == 5
    with pytest.raises(TooManyRows):
        await one.ask(question("client", limit=4))
    await one.close()


async def test_a_file_that_is_no_database_is_an_error_that_names_it(tmp_path: Path) -> None:
    one = ledger(tmp_path)
    one.path.write_text("no database" * 1_000)
    with pytest.raises(OSError, match=r"usage\.sqlite3: file is not a database"):
        await one.open()
    await one.close()
