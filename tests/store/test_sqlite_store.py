"""Clients in a file: confirmed changes are on disk, and the processes of one machine follow each other."""

import asyncio
import base64
import os
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import api_gateway
from api_gateway.clients.records import NO_CURSOR, Change, ClientRecord, Cursor, Grant
from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import _IS_BARE, CLIENTS_FILE, CLIENTS_SCHEMA, EPOCH, SqliteClientStore
from api_gateway.errors import StoreUnavailable
from api_gateway.limits.period_store import QUOTAS_FILE, PeriodStore
from api_gateway.storage.sqlite_file import SqliteFile
from api_gateway.usage.ledger import USAGE_FILE, UsageLedger
from tests.kit import soon
from tests.unit.test_client_registry import TIERS, following, tier_of

# A file as schema 1 wrote it: acme PREMIUM, then initech BASIC, then üñí FREE.
SCHEMA_1_FILE = zlib.decompress(
    base64.b85decode(
        "c-rmPu}Z^07zgl63<Ly;OO2A{8x@L+FVM7}7)(r?T&S5!OivqVE7XiGeU0KPI0z07E|Ldu_X&IfcTW->9GnIJKkm=Recy51dhx(7N=X-2i&<9E0o"
        "!D{&N@VlF}=wbO~v@J*VylLwx4Sop9ifQrWODI00000z`wK9G}Cq*ZJCzY`Bdi9Le9(Urs%zhyMmK&yFRC;NxQ|E1V0nhkG#N*Qaa&jo615i>h@`"
        "<lK6g`@<}$ol;e^5)vJsA@5vqwJ#ic+f}(Kf9j>c)tXYrDdb3_s0RR910001hKV-|;X_?hibzj{bMVz~@&#TVE=zZI8Y_pgbrOYQ?H}-n<ARgF8%Q3"
        "TjCi@W&yd<dm!R-fUB~C2"
    )
)


def rows(state_dir: Path) -> dict[str, str]:
    """Return the registrations that lie on disk."""
    return dict(alter(state_dir, "SELECT id, tier FROM clients WHERE tier IS NOT NULL"))


def alter(state_dir: Path, statement: str) -> list[Any]:
    """Do something to the file behind the gateway's back."""
    with closing(sqlite3.connect(state_dir / CLIENTS_FILE)) as connection, connection:
        return connection.execute(statement).fetchall()


# What is on disk


async def test_a_change_survives_a_restart(tmp_path: Path) -> None:
    until = round(time.time() + 600.125, 3)
    async with following(SqliteClientStore(tmp_path / "deep" / "state")) as registry:
        await registry.set_tier("acme", "BASIC")
        await registry.set_tier("acme", "PREMIUM")
        await registry.set_tier("üñí", "BASIC")
        await registry.grant("initech", "PREMIUM", until)
    async with following(SqliteClientStore(tmp_path / "deep" / "state"), {"acme": "BASIC"}) as registry:
        assert tier_of(registry, "acme") == ("PREMIUM", "registered")
        assert tier_of(registry, "üñí") == ("BASIC", "registered")
        assert tier_of(registry, "initech") == ("PREMIUM", "granted")
        assert (await registry.inspect("initech")).grant == Grant("PREMIUM", until)


async def test_forgetting_a_client_survives_a_restart(tmp_path: Path) -> None:
    async with following(SqliteClientStore(tmp_path)) as registry:
        await registry.set_tier("acme", "PREMIUM")
        await registry.delete("acme")
    assert rows(tmp_path) == {}
    async with following(SqliteClientStore(tmp_path)) as registry:
        assert tier_of(registry, "acme") == ("FREE", "default")


async def test_changes_at_one_time_are_made_one_after_the_other(tmp_path: Path) -> None:
    async with following(SqliteClientStore(tmp_path)) as registry:
        order = ["BASIC", "PREMIUM", "FREE", "BASIC"]
        changes = await asyncio.gather(*(registry.set_tier("acme", tier) for tier in order))
    assert [(before.quota.name, after.quota.name) for before, after in changes] == [
        ("FREE", "BASIC"),
        ("BASIC", "PREMIUM"),
        ("PREMIUM", "FREE"),
        ("FREE", "BASIC"),
    ]
    assert rows(tmp_path) == {"acme": "BASIC"}


CHILD = """
import asyncio, sys, time
from pathlib import Path
from api_gateway.clients.registry import ClientRegistry
from api_gateway.models import Quota
from api_gateway.clients.sqlite_store import SqliteClientStore

async def main():
    tiers = {name: Quota.per_second(name, 1, 10) for name in ("FREE", "BASIC", "PREMIUM")}
    registry = ClientRegistry(tiers, "FREE", {}, SqliteClientStore(Path(sys.argv[1])))
    await registry.load()
    for number in range(int(sys.argv[2])):
        await registry.set_tier(f"client-{number}", sys.argv[3])
    print("confirmed", flush=True)
    time.sleep(60)

asyncio.run(main())
"""


def child(state_dir: Path, count: int, tier: str) -> "subprocess.Popen[bytes]":
    """Start a process that registers so many clients for a tier, says so, and stays."""
    environment = os.environ | {"PYTHONPATH": str(Path(api_gateway.__file__).parents[1])}
    command = [sys.executable, "-c", CHILD, str(state_dir), str(count), tier]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


async def test_what_was_confirmed_survives_kill_9(tmp_path: Path) -> None:
    with child(tmp_path, 1, "PREMIUM") as process:
        assert process.stdout is not None
        confirmation = process.stdout.readline()
        process.kill()
    assert confirmation == b"confirmed\n"
    assert process.returncode == -9
    async with following(SqliteClientStore(tmp_path)) as registry:
        assert tier_of(registry, "client-0") == ("PREMIUM", "registered")


# Several processes


async def test_what_one_process_registers_another_follows_within_a_second(tmp_path: Path) -> None:
    async with following(SqliteClientStore(tmp_path)) as registry:
        with child(tmp_path, 3, "PREMIUM") as process:
            assert process.stdout is not None
            await asyncio.get_running_loop().run_in_executor(None, process.stdout.readline)
            took = await soon(lambda: tier_of(registry, "client-2") == ("PREMIUM", "registered"), "it is followed")
            process.kill()
        assert took < 1


async def test_writers_at_one_time_end_up_with_the_last_writer(tmp_path: Path) -> None:
    """Two processes and this one write the same clients; all that is left is in the order the file has given."""
    async with following(SqliteClientStore(tmp_path)) as registry:
        processes = [child(tmp_path, 20, tier) for tier in ("BASIC", "PREMIUM")]
        try:
            for number in range(20):
                await registry.set_tier(f"client-{number}", "FREE")
            for process in processes:
                assert process.stdout is not None
                await asyncio.get_running_loop().run_in_executor(None, process.stdout.readline)
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        versions = [version for (version,) in alter(tmp_path, "SELECT version FROM clients ORDER BY version")]
        assert versions[-1] == 60, "no version was given twice"
        final = rows(tmp_path)
        await soon(
            lambda: all(registry.by_id(each).quota.name == tier for each, tier in final.items()), "it is followed"
        )


async def test_two_processes_may_open_an_old_file_at_one_time(tmp_path: Path) -> None:
    (tmp_path / CLIENTS_FILE).write_bytes(SCHEMA_1_FILE)
    stores = [SqliteClientStore(tmp_path) for _ in range(4)]
    snapshots = await asyncio.gather(*(store.load(10) for store in stores))
    assert {len(snapshot.records) for snapshot in snapshots} == {3}
    for store in stores:
        await store.close()


# Versions


async def test_changes_are_returned_in_their_order_with_the_newest_of_each_client(tmp_path: Path) -> None:
    store = SqliteClientStore(tmp_path)
    mark = (await store.load(10)).cursor
    assert mark == Cursor(EPOCH, 0)
    await store.write("a", Change(tier="BASIC"))
    await store.write("b", Change(tier="BASIC"))
    written = await store.write("a", Change(tier=None))
    assert (written.before.tier, written.after.tier, written.after.version) == ("BASIC", None, 3)
    changes = await store.changes(mark)
    assert changes is not None
    assert [(record.id, record.tier, record.version) for record in changes.records] == [
        ("b", "BASIC", 2),
        ("a", None, 3),
    ]
    assert changes.cursor == Cursor(EPOCH, 3)
    again = await store.changes(changes.cursor)
    assert again is not None
    assert list(again.records) == []
    assert await store.changes(NO_CURSOR) is None
    assert await store.changes(Cursor(EPOCH, 4)) is None, "the file has been replaced by an older one"
    await store.close()


async def test_removals_are_kept_for_a_bounded_number_of_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api_gateway.clients.sqlite_store.MAX_KEPT_CHANGES", 5)
    store = SqliteClientStore(tmp_path)
    start = (await store.load(10)).cursor
    await store.write("gone", Change(tier=None))
    await store.write("over", Change(grant=Grant("BASIC", 1)))
    await store.write("lasting", Change(grant=Grant("BASIC", time.time() + 600)))
    for _ in range(7):
        await store.write("busy", Change(tier="BASIC"))
    assert [found and found.id for found in await store.look_up(["gone", "over", "lasting", "busy"])] == [
        None,
        None,
        "lasting",
        "busy",
    ]
    assert await store.changes(start) is None, "too far behind"
    await store.close()


async def test_no_more_than_asked_for_is_loaded(tmp_path: Path) -> None:
    store = SqliteClientStore(tmp_path)
    await store.load(10)
    for number in range(5):
        await store.write(f"client-{number}", Change(tier="BASIC"))
    await store.write("gone", Change(tier=None))
    snapshot = await store.load(3)
    assert [record.id for record in snapshot.records] == ["client-2", "client-3", "client-4"], "the newest"
    assert not snapshot.is_complete
    assert snapshot.ids is not None
    assert all(f"client-{number}" in snapshot.ids for number in range(5))
    assert (await store.load(5)).is_complete
    await store.close()


async def test_a_grant_is_cleared_once_and_not_before_its_end(tmp_path: Path) -> None:
    store = SqliteClientStore(tmp_path)
    await store.load(10)
    lasting = (await store.write("lasting", Change(grant=Grant("BASIC", time.time() + 600)))).after
    over = (await store.write("over", Change(tier="FREE", grant=Grant("BASIC", 1)))).after
    assert await store.end_grant("lasting", lasting.version) is None
    assert await store.end_grant("over", over.version - 1) is None
    ended = await store.end_grant("over", over.version)
    assert ended is not None
    assert (ended.after.tier, ended.after.grant) == ("FREE", None)
    assert await store.end_grant("over", over.version) is None
    await store.close()


# Schemas


async def test_a_file_of_schema_1_is_taken_over_with_all_it_holds(tmp_path: Path) -> None:
    (tmp_path / CLIENTS_FILE).write_bytes(SCHEMA_1_FILE)
    before = alter(tmp_path, "SELECT id, tier, changed_at FROM clients ORDER BY changed_at")
    assert alter(tmp_path, "PRAGMA user_version") == [(1,)]
    async with following(SqliteClientStore(tmp_path)) as registry:
        assert tier_of(registry, "acme") == ("PREMIUM", "registered")
        await registry.set_tier("initech", "FREE")
    assert alter(tmp_path, "PRAGMA user_version") == [(CLIENTS_SCHEMA.version,)]
    assert [row[:2] for row in before] == [("acme", "PREMIUM"), ("initech", "BASIC"), ("üñí", "FREE")]
    assert alter(tmp_path, "SELECT id, tier, version FROM clients ORDER BY version") == [
        ("acme", "PREMIUM", 1),
        ("üñí", "FREE", 3),
        ("initech", "FREE", 4),
    ]
    assert alter(tmp_path, "SELECT changed_at FROM clients WHERE id = 'acme'") == [(before[0][2],)]
    assert alter(tmp_path, "SELECT name FROM sqlite_master WHERE name = 'former'") == []


async def test_a_takeover_that_fails_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / CLIENTS_FILE).write_bytes(SCHEMA_1_FILE)
    alter(tmp_path, "CREATE TABLE former (id TEXT)")  # in the way
    store = SqliteClientStore(tmp_path)
    with pytest.raises(OSError, match="former"):
        await store.load(10)
    await store.close()
    assert alter(tmp_path, "PRAGMA user_version") == [(1,)]
    assert rows(tmp_path) == {"acme": "PREMIUM", "initech": "BASIC", "üñí": "FREE"}


async def test_a_file_of_a_newer_gateway_is_refused_and_left_alone(tmp_path: Path) -> None:
    async with following(SqliteClientStore(tmp_path)) as registry:
        await registry.set_tier("acme", "PREMIUM")
    alter(tmp_path, f"PRAGMA user_version = {CLIENTS_SCHEMA.version + 1}")
    registry = ClientRegistry(TIERS, "FREE", {}, SqliteClientStore(tmp_path))
    with pytest.raises(OSError, match=f"newer gateway .*{CLIENTS_SCHEMA.version + 1}.*{CLIENTS_SCHEMA.version}"):
        await registry.load()
    await registry.close()
    assert alter(tmp_path, "PRAGMA user_version") == [(CLIENTS_SCHEMA.version + 1,)]
    assert rows(tmp_path) == {"acme": "PREMIUM"}


# Failures


async def close(registry: ClientRegistry, _: Path) -> None:
    await registry.close()


async def drop_table(_: ClientRegistry, state_dir: Path) -> None:
    alter(state_dir, "DROP TABLE clients")


@pytest.mark.parametrize("breakage", [close, drop_table])
async def test_a_change_that_cannot_be_written_is_not_made(
    tmp_path: Path, breakage: Callable[[ClientRegistry, Path], Awaitable[None]]
) -> None:
    async with following(SqliteClientStore(tmp_path)) as registry:
        await registry.set_tier("acme", "BASIC")
        await breakage(registry, tmp_path)
        with pytest.raises(StoreUnavailable, match=CLIENTS_FILE) as caught:
            await registry.set_tier("acme", "PREMIUM")
        assert caught.value.retry_after == 5
        with pytest.raises(StoreUnavailable, match=CLIENTS_FILE):
            await registry.delete("acme")
        assert tier_of(registry, "acme") == ("BASIC", "registered")


async def test_a_store_that_was_never_opened_refuses_changes(tmp_path: Path) -> None:
    registry = ClientRegistry(TIERS, "FREE", {}, SqliteClientStore(tmp_path))
    with pytest.raises(StoreUnavailable) as caught:
        await registry.set_tier("acme", "BASIC")
    assert "not open" in str(caught.value.__cause__)
    assert tier_of(registry, "acme") == ("FREE", "default")
    await registry.close()


async def test_a_change_can_be_made_again_after_one_has_failed(tmp_path: Path) -> None:
    async with following(SqliteClientStore(tmp_path)) as registry:
        alter(tmp_path, "ALTER TABLE clients RENAME TO gone")
        with pytest.raises(StoreUnavailable):
            await registry.set_tier("acme", "BASIC")
        alter(tmp_path, "ALTER TABLE gone RENAME TO clients")
        await registry.set_tier("acme", "PREMIUM")
    assert rows(tmp_path) == {"acme": "PREMIUM"}


async def test_a_file_that_is_no_database_is_refused_and_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection left open would be told of as a ResourceWarning by newer interpreters."""
    (tmp_path / CLIENTS_FILE).write_bytes(b"this is not a database, whatever its name says" * 100)
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def watched(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", watched)
    store = SqliteClientStore(tmp_path)
    with pytest.raises(OSError, match="not a database"):
        await store.load(1)
    await store.close()
    (connection,) = opened
    try:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")
    finally:
        connection.close()


def drafts(folder: Path) -> list[Path]:
    return list(folder.glob(".*"))


@pytest.mark.parametrize("name", [CLIENTS_FILE, QUOTAS_FILE, USAGE_FILE])
async def test_an_empty_file_is_refused_instead_of_taken_for_a_new_one(tmp_path: Path, name: str) -> None:
    """A restore or a disk may leave one; a start would forget what operators have granted and clients have used."""
    file = {
        CLIENTS_FILE: SqliteClientStore(tmp_path)._file,
        QUOTAS_FILE: PeriodStore(tmp_path)._file,
        USAGE_FILE: UsageLedger(tmp_path, time.time, max_unregistered=1, retention_days=1)._file,
    }[name]
    (tmp_path / name).touch()
    with pytest.raises(OSError, match=rf"{name}: the file is empty.*backup"):
        await file.open()
    (tmp_path / name).unlink()
    await file.open()
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert not drafts(tmp_path)
    await file.close()


async def test_a_file_is_created_where_the_file_system_has_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(_path: Path, _target: Path) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    file = SqliteFile(tmp_path / CLIENTS_FILE, CLIENTS_SCHEMA, thread_name="test")
    await file.open()
    assert file.connection.execute("SELECT count(*) FROM clients").fetchone() == (0,)
    assert not drafts(tmp_path)
    await file.close()


async def test_processes_that_create_a_file_at_once_use_the_same(tmp_path: Path) -> None:
    files = [SqliteFile(tmp_path / CLIENTS_FILE, CLIENTS_SCHEMA, thread_name=f"test-{n}") for n in range(4)]
    await asyncio.gather(*(file.open() for file in files))
    for number, file in enumerate(files):
        statement = f"INSERT INTO clients (id, version, changed_at) VALUES ('{number}', {number}, 1)"  # noqa: S608 - numbers
        await file.run(file.connection.execute, statement)
    with closing(sqlite3.connect(tmp_path / CLIENTS_FILE)) as connection:
        assert connection.execute("SELECT count(*) FROM clients").fetchone() == (4,)
    for file in files:
        await file.close()


async def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = SqliteClientStore(tmp_path / "file" / "state")
    with pytest.raises(OSError, match="file"):
        await store.load(1)
    await store.close()


# The file


async def test_the_file_has_a_write_ahead_log_and_waits_for_the_disk(tmp_path: Path) -> None:
    store = SqliteClientStore(tmp_path)
    await store.load(1)
    connection = store._file.connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert connection.execute("PRAGMA user_version").fetchone() == (CLIENTS_SCHEMA.version,)
    await store.close()


async def test_a_store_can_be_closed_twice_and_its_repr_shows_its_state(tmp_path: Path) -> None:
    store = SqliteClientStore(tmp_path)
    assert str(tmp_path / CLIENTS_FILE) in repr(store)
    await store.load(1)
    await store.close()
    await store.close()


async def test_of_a_hundred_thousand_clients_a_write_costs_what_it_costs_of_one(tmp_path: Path) -> None:
    """The removals to be purged are found by an index of their own."""
    store = SqliteClientStore(tmp_path)
    await store.load(1)
    plan = alter(tmp_path, "EXPLAIN QUERY PLAN DELETE FROM clients WHERE version <= 5 AND " + _IS_BARE)  # noqa: S608 - constant
    assert "clients_without_terms" in plan[0][-1], plan
    assert (await store.write("acme", Change(tier="BASIC"))).before == ClientRecord("acme")
    await store.close()


async def test_all_records_are_read_in_pages(tmp_path: Path) -> None:
    store = SqliteClientStore(tmp_path)
    await store.load(10)
    for number in range(30):
        await store.write(f"c{number:02}", Change(tier="BASIC"))
    pages, position = [], ""
    while True:
        records, end = await store.scan(position, 10)
        pages.append([record.id for record in records])
        if end is None:
            break
        position = end
    assert pages == [[f"c{number:02}" for number in range(first, first + 10)] for first in (0, 10, 20)]
    await store.close()
