"""The usage of clients in one SQLite file, to which all processes of a machine add.

What is added is committed before it counts as written, so `kill -9` loses at most what was counted since.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api_gateway.models import Clock, Exchange
from api_gateway.storage.sqlite_file import Connection, SqliteFile
from api_gateway.storage.sqlite_schema import Schema
from api_gateway.storage.sqlite_transaction import transaction
from api_gateway.usage.counts import COUNTED, DAY, Key, UsageCounts

USAGE_FILE = "usage.sqlite3"
WRITE_INTERVAL = 1.0  # seconds between two writes, and so the most that `kill -9` loses
_GROUPS = {"client": "client", "route": "route", "day": "day"}
_TABLE = (
    "CREATE TABLE usage (day INTEGER NOT NULL, client TEXT NOT NULL, route TEXT NOT NULL,"
    f" {', '.join(f'{name} NUMERIC NOT NULL' for name in COUNTED)}, PRIMARY KEY (day, client, route)) WITHOUT ROWID"
)
USAGE_SCHEMA = Schema(1, (_TABLE,), {})
_ADD = (
    f"INSERT INTO usage (day, client, route, {', '.join(COUNTED)})"  # noqa: S608 - constant names
    f" VALUES (?, ?, ?{', ?' * len(COUNTED)}) ON CONFLICT (day, client, route) DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTED)
)

logger = logging.getLogger(__name__)


class TooManyRows(Exception):
    """A question has more rows than are returned."""


@dataclass(frozen=True, slots=True)
class UsageQuestion:
    """Which usage to sum, by what: days are since the epoch, both included; `client` None means all."""

    by: Sequence[str]
    first_day: int
    last_day: int
    client: str | None
    limit: int


class UsageLedger:
    """Counts exchanges and adds the counts to the file once a second. SQLite is used in a thread of its own.

    States: closed, and open from `open` until `close`; counting is possible in both.
    """

    def __init__(self, folder: Path, wall_clock: Clock, *, max_unregistered: int, retention_days: int) -> None:
        """Keep `retention_days` days; for `max_unregistered` see `UsageCounts`."""
        self.path = folder / USAGE_FILE
        self._counts = UsageCounts(max_unregistered)
        self._wall_clock = wall_clock
        self._retention_days = retention_days
        self._file = SqliteFile(self.path, USAGE_SCHEMA, thread_name="usage", synchronous="NORMAL")
        self._pruned_day = -1
        self.error: str | None = None  # of the last write

    def __repr__(self) -> str:
        return f"<UsageLedger [{self.path}, {self._counts!r}]>"

    def count(self, exchange: Exchange, now: float) -> None:
        """Count an exchange that has ended at `now`, in seconds since the epoch."""
        self._counts.count(exchange, now)

    async def open(self) -> None:
        """Open the file, creating it if necessary. Raises OSError."""
        await self._file.open()

    async def run(self) -> None:
        """Write once a second, until cancelled."""
        while True:
            await asyncio.sleep(WRITE_INTERVAL)
            await self.flush()

    async def flush(self) -> None:
        """Write what has been counted; keep it for the next time if that fails, and log the first failure."""
        rows = self._counts.take()
        if not rows:
            return
        try:
            await self._file.run(self._add, rows)
        except OSError as error:
            self._counts.put_back(rows)
            if str(error) != self.error:
                logger.warning("usage: %s; it is kept in memory until it can be written", error)
            self.error = str(error)
        else:
            self.error = None

    async def ask(self, question: UsageQuestion) -> list[dict[str, Any]]:
        """Write what has been counted; return the rows of a question, in order. Raises OSError and TooManyRows."""
        await self.flush()
        return await self._file.run(self._ask, question)

    async def close(self) -> None:
        """Write what has been counted and close the file."""
        if self._file.is_open:
            await self.flush()
            if self.error is not None:
                logger.error("usage: the last counts were not stored and are lost: %s", self.error)
        await self._file.close()

    # In the thread

    def _add(self, rows: Mapping[Key, Sequence[float]]) -> None:
        connection = self._file.connection
        with transaction(connection):
            connection.executemany(_ADD, [(*key, *counted) for key, counted in rows.items()])
            self._prune(connection)

    def _prune(self, connection: Connection) -> None:
        """Delete days that are no longer kept, once a day."""
        today = int(self._wall_clock() // DAY)
        if today != self._pruned_day:
            connection.execute("DELETE FROM usage WHERE day <= ?", (today - self._retention_days,))
            self._pruned_day = today

    def _ask(self, question: UsageQuestion) -> list[dict[str, Any]]:
        groups = [_GROUPS[name] for name in question.by]
        grouping = f" GROUP BY {', '.join(groups)} ORDER BY {', '.join(groups)}" if groups else ""
        sums = ", ".join(f"coalesce(sum({name}), 0)" for name in COUNTED)
        found = self._file.connection.execute(
            f"SELECT {', '.join([*groups, sums])} FROM usage WHERE day BETWEEN ? AND ?"  # noqa: S608 - constant names
            f" AND (? IS NULL OR client = ?){grouping} LIMIT ?",
            (question.first_day, question.last_day, question.client, question.client, question.limit + 1),
        ).fetchall()
        if len(found) > question.limit:
            raise TooManyRows
        return [dict(zip((*question.by, *COUNTED), row, strict=True)) for row in found]
