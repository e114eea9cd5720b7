"""The client store in one SQLite file, which the processes of one machine may share.

A change is written to disk before it is confirmed, so what was confirmed survives `kill -9`, and what failed changed
nothing. Other processes' changes are seen by `PRAGMA data_version`, which costs a look into shared memory.
"""

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from api_gateway.clients.bloom_filter import BloomFilter
from api_gateway.clients.records import (
    MAX_KEPT_CHANGES,
    UNCHANGED,
    Change,
    Changes,
    ClientRecord,
    ClientSnapshot,
    Cursor,
    Grant,
    WriteResult,
)
from api_gateway.system.state_folder import create_private, make_private

T = TypeVar("T")

SCHEMA_VERSION = 2
CLIENTS_FILE = "clients.sqlite3"
SQLITE_POLL_INTERVAL = 0.25  # seconds between two looks for changes of other processes
EPOCH = "file"  # a file has one life: whoever replaces it starts the gateway anew

_TABLE = (
    "CREATE TABLE clients (id TEXT PRIMARY KEY, tier TEXT, grant_tier TEXT, grant_until REAL,"
    " version INTEGER NOT NULL, changed_at REAL NOT NULL) WITHOUT ROWID"
)
_INDEXES = (
    "CREATE UNIQUE INDEX clients_by_version ON clients (version)",
    "CREATE INDEX clients_without_tier ON clients (version) WHERE tier IS NULL",
)
# Schema 1 was (id TEXT PRIMARY KEY, tier TEXT NOT NULL, changed_at REAL NOT NULL).
_FROM_SCHEMA_1 = (
    "INSERT INTO clients (id, tier, version, changed_at)"
    " SELECT id, tier, row_number() OVER (ORDER BY changed_at, id), changed_at FROM former"
)
_REMEDY = (
    "it holds the tiers and grants that were set while the gateway ran: stop the gateway and put a backup in its"
    " place, or move it away, with its -wal and -shm files, to start without them"
)
_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_COLUMNS = "id, tier, grant_tier, grant_until, version, changed_at"
_KINDS = (str, str | None, str | None, float | None, int, float)  # of their values


class SqliteClientStore:
    """The table of clients in one SQLite file (WAL, full sync), used from a thread of its own. See `ClientStore`."""

    name = CLIENTS_FILE
    is_remote = False

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / CLIENTS_FILE
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="client-store")
        self._connection: sqlite3.Connection | None = None

    def __repr__(self) -> str:
        return f"<SqliteClientStore [{self.path}]>"

    async def load(self, limit: int) -> ClientSnapshot:
        """See `ClientStore`; creates the file, or brings it to the current schema."""
        return await self._run(self._load, limit)

    async def write(self, client_id: str, change: Change) -> WriteResult:
        """See `ClientStore`; on return the change is on disk."""
        written = await self._run(self._write, client_id, change, None)
        assert written is not None  # noqa: S101 - without a condition it is always made
        return written

    async def end_grant(self, client_id: str, version: int) -> WriteResult | None:
        """See `ClientStore`."""
        return await self._run(self._write, client_id, Change(grant=None), version)

    async def changes(self, since: Cursor) -> Changes | None:
        """See `ClientStore`."""
        return await self._run(self._changes, since)

    async def look_up(self, client_ids: Sequence[str]) -> list[ClientRecord | None]:
        """See `ClientStore`."""
        return await self._run(self._look_up, client_ids)

    async def watch(self, on_news: Callable[[], Awaitable[None]]) -> None:
        """See `ClientStore`; news are at most 0.25 s old."""
        seen = None  # the first look always brings news: something may have come since the file was read
        while True:
            current = await self._run(self._data_version)
            if current != seen:
                seen = current
                await on_news()
            await asyncio.sleep(SQLITE_POLL_INTERVAL)

    async def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            await self._run(self._connection.close)
            self._connection = None
        self._thread.shutdown(wait=False)

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        except (sqlite3.Error, ValueError, RuntimeError) as error:  # RuntimeError: the thread has ended
            if _is_of_corrupt_file(error):
                raise OSError(f"{self.path}: the file is corrupt: {_printable(error)}; {_REMEDY}") from error
            raise OSError(f"{self.path}: {_printable(error)}") from error

    # In the store's thread

    @property
    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.ProgrammingError("the client store is not open")
        return self._connection

    def _load(self, limit: int) -> ClientSnapshot:
        if self._connection is None:
            self._connection = self._open()
        with _transaction(self._connection, "BEGIN"):
            version = _latest(self._connection)
            rows = self._connection.execute(
                f"SELECT {_COLUMNS} FROM clients WHERE tier IS NOT NULL OR grant_tier IS NOT NULL"  # noqa: S608 - our own names
                " ORDER BY version DESC LIMIT ?",
                (limit + 1,),
            ).fetchall()
            is_complete = len(rows) <= limit
            ids = None if is_complete or not limit else self._ids(self._connection, limit)
        records = [_record(row) for row in reversed(rows[:limit])]
        return ClientSnapshot(records, Cursor(EPOCH, version), is_complete, ids)

    def _ids(self, connection: sqlite3.Connection, limit: int) -> BloomFilter:
        ids = BloomFilter(limit)
        for (client_id,) in connection.execute("SELECT id FROM clients"):
            if not isinstance(client_id, str):
                raise ValueError(f"client {client_id!r:.200} has no name")  # noqa: TRY004 - as in `_latest`
            ids.add(client_id)
        return ids

    def _open(self) -> sqlite3.Connection:
        make_private(self.path.parent)
        create_private(self.path)  # SQLite gives its further files the same permissions
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=5.0, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Bring the file to the current schema, in one piece: another process may be about to do the same."""
        with _transaction(connection, "BEGIN IMMEDIATE"):
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise OSError(
                    f"{self.path} was written by a newer gateway (schema {version}, known is {SCHEMA_VERSION})"
                )
            if version == SCHEMA_VERSION:
                return
            has_former = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'clients'").fetchone()
            if has_former:
                connection.execute("ALTER TABLE clients RENAME TO former")
            for statement in (_TABLE, *_INDEXES):
                connection.execute(statement)
            if has_former:
                connection.execute(_FROM_SCHEMA_1)
                connection.execute("DROP TABLE former")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _write(self, client_id: str, change: Change, of_version: int | None) -> WriteResult | None:
        """Make a change; with `of_version` only to a record at that version whose grant has ended."""
        connection, now = self._open_connection, time.time()
        with _transaction(connection, "BEGIN IMMEDIATE"):
            before = self._find(client_id) or ClientRecord(client_id)
            if of_version is not None and not (
                before.version == of_version and before.grant is not None and before.grant.until <= now
            ):
                return None
            tier = before.tier if change.tier is UNCHANGED else change.tier
            grant = before.grant if change.grant is UNCHANGED else change.grant
            after = ClientRecord(client_id, tier, grant, _latest(connection) + 1, now)
            connection.execute(
                f"INSERT OR REPLACE INTO clients ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",  # noqa: S608 - our own names
                (
                    client_id,
                    tier,
                    grant.tier if grant else None,
                    grant.until if grant else None,
                    after.version,
                    now,
                ),
            )
            connection.execute(
                "DELETE FROM clients WHERE version <= ? AND tier IS NULL AND coalesce(grant_until, 0) <= ?",
                (after.version - MAX_KEPT_CHANGES, now),
            )
        return WriteResult(before, after, EPOCH)

    def _changes(self, since: Cursor) -> Changes | None:
        connection = self._open_connection
        with _transaction(connection, "BEGIN"):
            version = _latest(connection)
            if since.version < version - MAX_KEPT_CHANGES or since.version > version or since.epoch != EPOCH:
                return None
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM clients WHERE version > ? ORDER BY version",  # noqa: S608 - our own names
                (since.version,),
            )
            return Changes([_record(row) for row in rows], Cursor(EPOCH, version))

    def _look_up(self, client_ids: Sequence[str]) -> list[ClientRecord | None]:
        return [self._find(client_id) for client_id in client_ids]

    def _find(self, client_id: str) -> ClientRecord | None:
        statement = f"SELECT {_COLUMNS} FROM clients WHERE id = ?"  # noqa: S608 - our own names
        row = self._open_connection.execute(statement, (client_id,)).fetchone()
        return None if row is None else _record(row)

    def _data_version(self) -> int:
        (version,) = self._open_connection.execute("PRAGMA data_version").fetchone()
        return int(version)


@contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _is_of_corrupt_file(error: Exception) -> bool:
    """Tell whether the file is damaged: its structure, or text that is no UTF-8, or a value of the wrong type."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)  # of Python's own errors there is none
        return "decode to UTF-8" in str(error) if code is None else code & 0xFF in _CORRUPT
    return isinstance(error, ValueError)


def _printable(error: Exception) -> str:
    """Return an error's message in one line: what it quotes of a corrupt file may hold anything."""
    return str(error).encode("unicode_escape").decode()


def _latest(connection: sqlite3.Connection) -> int:
    """Return the version of the last change. Its row is never deleted, so versions never repeat."""
    (version,) = connection.execute("SELECT coalesce(max(version), 0) FROM clients").fetchone()
    if not isinstance(version, int):
        raise ValueError(f"the last version is {version!r:.200}")  # noqa: TRY004 - what the file holds, not what the code does
    return version


def _record(row: Sequence[Any]) -> ClientRecord:
    client_id, tier, grant_tier, until, version, changed_at = row
    if not all(isinstance(value, kinds) for value, kinds in zip(row, _KINDS, strict=True)):
        raise ValueError(f"client {client_id!r:.200} has a column of another type than the table's")
    if (grant_tier is None) is not (until is None):
        raise ValueError(f"client {client_id!r:.200} has half a grant")
    grant = None if grant_tier is None else Grant(grant_tier, until)
    return ClientRecord(client_id, tier, grant, version, changed_at)
