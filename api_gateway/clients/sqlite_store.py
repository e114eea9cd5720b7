"""The client store in one SQLite file, which the processes of one machine may share.

A change is on disk before it is confirmed, so a confirmed change survives `kill -9`, and a failed one has no effect.
Changes by other processes are detected by `PRAGMA data_version`, which only reads shared memory.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from api_gateway.clients.api_keys import api_keys_of, keys_as_json
from api_gateway.clients.bloom_filter import BloomFilter
from api_gateway.clients.records import (
    MAX_KEPT_CHANGES,
    Change,
    Changes,
    ClientRecord,
    ClientSnapshot,
    Cursor,
    Grant,
    WriteResult,
    key_entry,
    proof_entry,
)
from api_gateway.storage.sqlite_file import Connection, SqliteFile
from api_gateway.storage.sqlite_schema import Schema
from api_gateway.storage.sqlite_transaction import transaction

CLIENTS_FILE = "clients.sqlite3"
SQLITE_POLL_INTERVAL = 0.25  # seconds between two checks for changes by other processes
EPOCH = "file"  # constant, because the gateway must be restarted when the file is replaced

_TABLE = (
    "CREATE TABLE clients (id TEXT PRIMARY KEY, tier TEXT, grant_tier TEXT, grant_until REAL,"
    " version INTEGER NOT NULL, changed_at REAL NOT NULL, keys TEXT, verified_only INTEGER) WITHOUT ROWID"
)
_KEY_TABLES = (
    "CREATE TABLE client_keys (digest TEXT PRIMARY KEY, client_id TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE key_uses (digest TEXT PRIMARY KEY, used_at INTEGER NOT NULL) WITHOUT ROWID",
)
_IS_BARE = "tier IS NULL AND keys IS NULL AND verified_only IS NULL"
_INDEXES = (
    "CREATE UNIQUE INDEX clients_by_version ON clients (version)",
    f"CREATE INDEX clients_without_terms ON clients (version) WHERE {_IS_BARE}",
)
# Schema 2 had neither keys nor verified_only, schema 1 no grants and versions.
_FROM_SCHEMA_2 = (
    "ALTER TABLE clients ADD COLUMN keys TEXT",
    "ALTER TABLE clients ADD COLUMN verified_only INTEGER",
    "DROP INDEX clients_without_tier",
    _INDEXES[1],
    *_KEY_TABLES,
)
_TABLE_2 = (
    "CREATE TABLE clients (id TEXT PRIMARY KEY, tier TEXT, grant_tier TEXT, grant_until REAL,"
    " version INTEGER NOT NULL, changed_at REAL NOT NULL) WITHOUT ROWID"
)
_TAKE_OVER_1 = (
    "INSERT INTO clients (id, tier, version, changed_at)"
    " SELECT id, tier, row_number() OVER (ORDER BY changed_at, id), changed_at FROM former"
)
_FROM_SCHEMA_1 = (
    "ALTER TABLE clients RENAME TO former",
    _TABLE_2,
    _INDEXES[0],
    "CREATE INDEX clients_without_tier ON clients (version) WHERE tier IS NULL",
    _TAKE_OVER_1,
    "DROP TABLE former",
)
CLIENTS_SCHEMA = Schema(3, (_TABLE, *_INDEXES, *_KEY_TABLES), {1: _FROM_SCHEMA_1, 2: _FROM_SCHEMA_2})
_REMEDY = (
    "it has the tiers and grants that operators have set: stop the gateway, then restore a backup, or move the file"
    " with its -wal and -shm files away to start without them"
)
_COLUMNS = "id, tier, grant_tier, grant_until, version, changed_at, keys, verified_only"
_KINDS = (str, str | None, str | None, float | None, int, float, str | None, int | None)  # types of the columns


class SqliteClientStore:
    """Client records in one SQLite file (WAL, full sync), accessed in a single thread. Implements `ClientStore`.

    States: closed, and open from the first `load` until `close`; the other methods raise OSError unless it is open.
    """

    name = CLIENTS_FILE
    is_remote = False

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / CLIENTS_FILE
        self._file = SqliteFile(self.path, CLIENTS_SCHEMA, thread_name="client-store", remedy=_REMEDY)

    def __repr__(self) -> str:
        return f"<SqliteClientStore [{self.path}]>"

    async def load(self, limit: int) -> ClientSnapshot:
        """Open the file, creating it or migrating its schema, and read at most `limit` records."""
        await self._file.open()
        return await self._file.run(self._load, limit)

    async def write(self, client_id: str, change: Change) -> WriteResult:
        """Make a change, which is on disk on return. Raises OSError if it was not made."""
        written = await self._file.run(self._write, client_id, change, None)
        assert written is not None  # noqa: S101 - an unconditional change is always made
        return written

    async def end_grant(self, client_id: str, version: int) -> WriteResult | None:
        """Remove an expired grant if the record is still at `version`; None if nothing was changed."""
        return await self._file.run(self._write, client_id, Change(grant=None), version)

    async def changes(self, since: Cursor) -> Changes | None:
        """Return the changes since a cursor; None if the kept changes do not include it."""
        return await self._file.run(self._changes, since)

    async def look_up(self, client_ids: Sequence[str]) -> list[ClientRecord | None]:
        """Return the records of these clients in order, None for those without a record."""
        return await self._file.run(self._look_up, client_ids)

    async def scan(self, position: str, count: int) -> tuple[list[ClientRecord], str | None]:
        """Return records in the order of ids; see `ClientStore.scan`."""
        return await self._file.run(self._scan, position, count)

    async def look_up_keys(self, digests: Sequence[str]) -> list[ClientRecord | None]:
        """Return the records of the clients that have these keys in order, None for a key that no client has."""
        return await self._file.run(self._look_up_keys, digests)

    async def note_key_uses(self, uses: Mapping[str, int]) -> None:
        """Store when keys were last used, in seconds since the epoch by digest."""
        await self._file.run(self._note_key_uses, uses)

    async def key_uses(self, digests: Sequence[str]) -> dict[str, int]:
        """Return when these keys were last used, of those that were."""
        return await self._file.run(self._key_uses, digests)

    async def watch(self, on_news: Callable[[], Awaitable[None]]) -> None:
        """Await `on_news` at once, and within `SQLITE_POLL_INTERVAL` seconds of a change, until cancelled."""
        seen = None  # the first call of `on_news` is unconditional: the file may have changed since it was loaded
        while True:
            current = await self._file.run(self._data_version)
            if current != seen:
                seen = current
                await on_news()
            await asyncio.sleep(SQLITE_POLL_INTERVAL)

    async def close(self) -> None:
        """Close the file and end the thread."""
        await self._file.close()

    # Executed in the thread of the store

    def _load(self, limit: int) -> ClientSnapshot:
        connection = self._file.connection
        with transaction(connection, "BEGIN"):
            version = _latest(connection)
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM clients WHERE grant_tier IS NOT NULL OR NOT ({_IS_BARE})"  # noqa: S608 - constant names
                " ORDER BY version DESC LIMIT ?",
                (limit + 1,),
            ).fetchall()
            is_complete = len(rows) <= limit
            ids = None if is_complete or not limit else self._ids(connection, limit)
        records = [_record(row) for row in reversed(rows[:limit])]
        return ClientSnapshot(records, Cursor(EPOCH, version), is_complete, ids)

    def _ids(self, connection: Connection, limit: int) -> BloomFilter:
        ids = BloomFilter(limit)
        for (client_id,) in connection.execute("SELECT id FROM clients"):
            if not isinstance(client_id, str):
                raise ValueError(f"client {client_id!r:.200}: the id must be text")  # noqa: TRY004 - as in `_latest`
            ids.add(client_id)
        for (digest,) in connection.execute("SELECT digest FROM client_keys"):
            ids.add(key_entry(digest))
        proved = "verified_only = 1 OR (verified_only IS NULL AND keys IS NOT NULL)"
        for (client_id,) in connection.execute(f"SELECT id FROM clients WHERE {proved}"):  # noqa: S608 - a constant
            ids.add(proof_entry(client_id))
        return ids

    def _write(self, client_id: str, change: Change, of_version: int | None) -> WriteResult | None:
        """Make a change; with `of_version` only if the record has that version and its grant has expired."""
        connection, now = self._file.connection, time.time()
        with transaction(connection):
            before = self._find(client_id) or ClientRecord(client_id)
            if of_version is not None and not (
                before.version == of_version and before.grant is not None and before.grant.until <= now
            ):
                return None
            after = change.applied_to(before, _latest(connection) + 1, now)
            grant = after.grant
            connection.execute(
                f"INSERT OR REPLACE INTO clients ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - constant names
                (
                    client_id,
                    after.tier,
                    grant.tier if grant else None,
                    grant.until if grant else None,
                    after.version,
                    now,
                    keys_as_json(after.keys) if after.keys else None,
                    after.verified_only,
                ),
            )
            _index_keys(connection, before, after)
            connection.execute(
                f"DELETE FROM clients WHERE version <= ? AND {_IS_BARE} AND coalesce(grant_until, 0) <= ?",  # noqa: S608 - constant
                (after.version - MAX_KEPT_CHANGES, now),
            )
        return WriteResult(before, after, EPOCH)

    def _scan(self, position: str, count: int) -> tuple[list[ClientRecord], str | None]:
        rows = self._file.connection.execute(
            f"SELECT {_COLUMNS} FROM clients WHERE id > ? ORDER BY id LIMIT ?",  # noqa: S608 - constant names
            (position, count + 1),
        ).fetchall()
        records = [_record(row) for row in rows[:count]]
        return records, records[-1].id if len(rows) > count else None

    def _look_up_keys(self, digests: Sequence[str]) -> list[ClientRecord | None]:
        connection, found = self._file.connection, []
        for digest in digests:
            row = connection.execute("SELECT client_id FROM client_keys WHERE digest = ?", (digest,)).fetchone()
            found.append(None if row is None else self._find(row[0]))
        return found

    def _note_key_uses(self, uses: Mapping[str, int]) -> None:
        with transaction(self._file.connection):
            self._file.connection.executemany(
                "INSERT INTO key_uses (digest, used_at) VALUES (?, ?)"
                " ON CONFLICT (digest) DO UPDATE SET used_at = max(used_at, excluded.used_at)",
                list(uses.items()),
            )

    def _key_uses(self, digests: Sequence[str]) -> dict[str, int]:
        connection, found = self._file.connection, {}
        for digest in digests:
            row = connection.execute("SELECT used_at FROM key_uses WHERE digest = ?", (digest,)).fetchone()
            if row is not None:
                found[digest] = int(row[0])
        return found

    def _changes(self, since: Cursor) -> Changes | None:
        connection = self._file.connection
        with transaction(connection, "BEGIN"):
            version = _latest(connection)
            if since.version < version - MAX_KEPT_CHANGES or since.version > version or since.epoch != EPOCH:
                return None
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM clients WHERE version > ? ORDER BY version",  # noqa: S608 - constant names
                (since.version,),
            )
            return Changes([_record(row) for row in rows], Cursor(EPOCH, version))

    def _look_up(self, client_ids: Sequence[str]) -> list[ClientRecord | None]:
        return [self._find(client_id) for client_id in client_ids]

    def _find(self, client_id: str) -> ClientRecord | None:
        statement = f"SELECT {_COLUMNS} FROM clients WHERE id = ?"  # noqa: S608 - constant names
        row = self._file.connection.execute(statement, (client_id,)).fetchone()
        return None if row is None else _record(row)

    def _data_version(self) -> int:
        (version,) = self._file.connection.execute("PRAGMA data_version").fetchone()
        return int(version)


def _index_keys(connection: Connection, before: ClientRecord, after: ClientRecord) -> None:
    """Let the index of keys have those of a changed record."""
    if before.keys == after.keys:
        return
    held = {key.digest for key in after.keys}
    gone = [(key.digest,) for key in before.keys if key.digest not in held]
    connection.executemany("DELETE FROM client_keys WHERE digest = ?", gone)
    connection.executemany("DELETE FROM key_uses WHERE digest = ?", gone)
    rows = [(digest, after.id) for digest in held]
    connection.executemany("INSERT OR REPLACE INTO client_keys (digest, client_id) VALUES (?, ?)", rows)


def _latest(connection: Connection) -> int:
    """Return the version of the last change. The row with it is never deleted, so versions are not reused."""
    (version,) = connection.execute("SELECT coalesce(max(version), 0) FROM clients").fetchone()
    if not isinstance(version, int):
        raise ValueError(f"the last version must be an integer, got {version!r:.200}")  # noqa: TRY004 - invalid content
    return version


def _record(row: Sequence[Any]) -> ClientRecord:
    client_id, tier, grant_tier, until, version, changed_at, keys, verified_only = row
    if not all(isinstance(value, kinds) for value, kinds in zip(row, _KINDS, strict=True)):
        raise ValueError(f"client {client_id!r:.200}: a column has a value of another type than the table's")
    if (grant_tier is None) is not (until is None):
        raise ValueError(f"client {client_id!r:.200}: a grant needs both tier and end")
    grant = None if grant_tier is None else Grant(grant_tier, until)
    return ClientRecord(
        client_id,
        tier,
        grant,
        version,
        changed_at,
        () if keys is None else api_keys_of(json.loads(keys)),
        None if verified_only is None else bool(verified_only),
    )
