"""The counters of calendar quotas in one SQLite file, which is written behind the requests.

A request does not wait for the disk. Counters that were changed are written every `QUOTA_WRITE_INTERVAL` seconds in
one transaction, so the end of the process without notice (`kill -9`) forgets what was charged in less than `MAX_LOSS`
seconds before it: those clients may use that much again. An orderly end forgets nothing.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.periods import UNITS
from api_gateway.limits.quota_state import QuotaCount, QuotaCounter, past_at
from api_gateway.models import Clock
from api_gateway.printable_text import counted
from api_gateway.storage.sqlite_file import SqliteFile
from api_gateway.storage.sqlite_schema import Schema
from api_gateway.storage.sqlite_transaction import transaction

logger = logging.getLogger(__name__)

QUOTAS_FILE = "quotas.sqlite3"
QUOTA_WRITE_INTERVAL = 0.4  # seconds between the end of a write and the next one
MAX_LOSS = 1.0  # seconds; a write that takes longer than the rest is logged
_STEP = 2000  # counters that are converted to rows before the event loop turns

_COLUMNS = (
    "key, unit, began, start, used, carried, drawn, peak, before_start, before_used, before_carried, before_drawn,"
    " before_peak, balance, until, ends, past_at, is_unverified, resets"
)
_TABLE = (
    "CREATE TABLE counters (key TEXT PRIMARY KEY, unit TEXT NOT NULL, began INTEGER NOT NULL, start INTEGER NOT NULL,"
    " used INTEGER NOT NULL, carried INTEGER NOT NULL, drawn INTEGER NOT NULL, peak INTEGER NOT NULL,"
    " before_start INTEGER, before_used INTEGER, before_carried INTEGER, before_drawn INTEGER, before_peak INTEGER,"
    " balance INTEGER NOT NULL, until INTEGER NOT NULL, ends INTEGER NOT NULL, past_at INTEGER NOT NULL,"
    " is_unverified INTEGER NOT NULL DEFAULT 1, resets INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID"
)
_INDEX = "CREATE INDEX counters_by_end ON counters (past_at)"
QUOTAS_SCHEMA = Schema(
    3,
    (_TABLE, _INDEX),
    {
        1: ("ALTER TABLE counters ADD COLUMN is_unverified INTEGER NOT NULL DEFAULT 1",),
        2: ("ALTER TABLE counters ADD COLUMN resets INTEGER NOT NULL DEFAULT 0",),
    },
)
_REMOVE = "DELETE FROM counters WHERE key IN (SELECT key FROM counters WHERE past_at < ? ORDER BY past_at LIMIT ?)"
_LEAST_REMOVED = 1000  # by one write, and as many as it stores if that is more: so they do not accumulate
_REMEDY = (
    "it has what clients have used of their quotas: stop the gateway, then restore a backup, or move the file with its"
    " -wal and -shm files away to begin with unused quotas"
)

CounterRow = tuple[str | int | None, ...]


class PeriodStore:
    """The file (WAL, full sync), accessed in a single thread. States: closed, and open from `load` until `close`."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / QUOTAS_FILE
        self._file = SqliteFile(self.path, QUOTAS_SCHEMA, thread_name="quota-store", remedy=_REMEDY)

    def __repr__(self) -> str:
        return f"<PeriodStore [{self.path}]>"

    async def load(self, now: int, limit: int) -> list[tuple[str, QuotaCounter]]:
        """Open the file, creating it, and return the counters with an effect at `now` (seconds), the latest first.

        These are at most `limit` of verified keys, and as many others. Raises OSError.
        """
        await self._file.open()
        return await self._file.run(self._load, now, limit)

    async def write(self, rows: Sequence[CounterRow], now: int) -> None:
        """Store counters, and remove some without an effect at `now`, in one transaction.

        Raises OSError if none was stored.
        """
        await self._file.run(self._write, rows, now)

    async def close(self) -> None:
        """Close the file and end the thread."""
        await self._file.close()

    # Executed in the thread of the store

    def _load(self, now: int, limit: int) -> list[tuple[str, QuotaCounter]]:
        connection = self._file.connection
        connection.execute("DELETE FROM counters WHERE past_at < ?", (now,))
        counters: list[tuple[str, QuotaCounter]] = []
        for condition in ("NOT is_unverified", "is_unverified"):
            with closing(
                connection.execute(
                    f"SELECT {_COLUMNS} FROM counters WHERE {condition}"  # noqa: S608 - constant names
                    " ORDER BY past_at DESC LIMIT ?",
                    (limit,),
                )
            ) as found:
                for *row, resets in found:
                    key, counter = counter_of(tuple(row))
                    counter.resets = resets
                    counters.append((key, counter))
        return counters

    def _write(self, rows: Sequence[CounterRow], now: int) -> None:
        connection = self._file.connection
        with transaction(connection):
            connection.executemany(
                f"INSERT OR REPLACE INTO counters ({_COLUMNS}) VALUES ({', '.join('?' * 19)})",  # noqa: S608 - constant
                rows,
            )
            connection.execute(_REMOVE, (now, max(len(rows), _LEAST_REMOVED)))


class PeriodJournal:
    """Writes the changed counters of this process to their file, from `start` to `close`."""

    def __init__(self, counters: PeriodCounters, store: PeriodStore, *, clock: Clock, wall_clock: Clock) -> None:
        self.counters = counters
        self.store = store
        self.error: str | None = None
        self._clock = clock
        self._wall_clock = wall_clock
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<PeriodJournal of {self.store!r} [{len(self.counters.changed)} to write]>"

    async def start(self) -> None:
        """Read the counters, and write them from now on. Raises OSError."""
        limit = self.counters.limit
        stored = await self.store.load(int(self._wall_clock()), limit)
        self.counters.restore(stored)
        unverified = sum(counter.is_unverified for _, counter in stored)
        if max(unverified, len(stored) - unverified) >= limit:
            logger.warning("%s has %d counters or more; the oldest are not read", self.store.path, limit)
        self._task = asyncio.create_task(self._run(), name="writing of quotas")

    async def close(self) -> None:
        """Write what has changed, and close the file."""
        if self._task is not None:
            await cancel_and_wait(self._task)
            self._task = None
            await self.write()
            if self.error is not None:
                lost = counted(len(self.counters.changed), "counter")
                logger.error("quotas: the last charges of %s were not stored and are lost: %s", lost, self.error)
        await self.store.close()

    async def write(self) -> None:
        """Write what has changed. An error is logged, and what was not written is written with the next changes."""
        if not self.counters.changed:
            return
        began, changed = self._clock(), self.counters.take_changed()
        try:
            await asyncio.shield(self.store.write(await _rows(changed), int(self._wall_clock())))
        except OSError as error:
            self.counters.changed.update(key for key, _ in changed)
            if self.error is None:
                logger.error("quotas are not stored: %s", error)  # noqa: TRY400 - the message has the cause
            self.error = str(error)
        except asyncio.CancelledError:  # it may have been written, and is written again
            self.counters.changed.update(key for key, _ in changed)
            raise
        else:
            if self.error is not None:
                logger.warning("quotas are stored again")
            self.error = None
            took = self._clock() - began
            if took > MAX_LOSS - QUOTA_WRITE_INTERVAL:
                logger.warning("%d quotas took %.1f s to be stored", len(changed), took)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(QUOTA_WRITE_INTERVAL)
            await self.write()


async def _rows(counters: Sequence[tuple[str, QuotaCounter]]) -> list[CounterRow]:
    rows: list[CounterRow] = []
    for index, (key, counter) in enumerate(counters, 1):
        rows.append((*row_of(key, counter), counter.resets))
        if index % _STEP == 0:
            await asyncio.sleep(0)
    return rows


def row_of(key: str, counter: QuotaCounter) -> CounterRow:
    """Return a counter as a row of the file, without its resets; values are those of JSON, too."""
    count, before = counter.count, counter.before
    earlier: CounterRow = (None,) * 5
    if before is not None:
        earlier = (before.start, before.used, before.carried, before.drawn, before.peak)
    return (
        key,
        counter.unit,
        counter.began,
        *(count.start, count.used, count.carried, count.drawn, count.peak),
        *earlier,
        counter.balance,
        counter.until,
        counter.end,
        past_at(counter),
        int(counter.is_unverified),
    )


def counter_of(row: CounterRow) -> tuple[str, QuotaCounter]:
    """Return the key and the counter of a row. Raises ValueError."""
    key, unit, began, *counts, balance, until, end, _, is_unverified = row
    latest, before = counts[:5], counts[5:]
    known = next((one for one in UNITS if one == unit), None)
    if known is None:
        raise ValueError(f"counter {key!r:.200}: there is no period of the unit {unit!r:.200}")
    counter = QuotaCounter(
        known,
        int(began or 0),
        QuotaCount(*(int(value or 0) for value in latest)),
        int(end or 0),
        before=None if before[0] is None else QuotaCount(*(int(value or 0) for value in before)),
        balance=int(balance or 0),
        until=int(until or 0),
        is_unverified=bool(is_unverified),
    )
    return str(key), counter
