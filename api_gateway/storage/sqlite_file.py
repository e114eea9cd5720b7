"""SQLite files of the state folder: private, each used in a thread of its own, with every error as an OSError."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Literal, TypeVar

from api_gateway.storage.sqlite_schema import Schema, check_schema, migrate
from api_gateway.system.state_folder import create_private, make_private

Result = TypeVar("Result")
Connection = sqlite3.Connection

BUSY_TIMEOUT = 5.0  # seconds to wait for another process
_WITH_LOG = "PRAGMA journal_mode = WAL"
_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class SqliteFile:
    """A file with a write-ahead log. States: closed, and open from `open` until `close`."""

    def __init__(
        self,
        path: Path,
        schema: Schema,
        *,
        thread_name: str,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
        remedy: str = "",
    ) -> None:
        """The tables are created, or migrated, when the file is opened. One of a newer gateway is refused.

        `remedy` is what to do about a corrupt file: with one, the error says that the file is corrupt.
        """
        self.path = path
        self._schema = schema
        self._synchronous = synchronous
        self._remedy = remedy
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=thread_name)
        self._connection: Connection | None = None

    def __repr__(self) -> str:
        return f"<SqliteFile [{self.path}{'' if self.is_open else ', closed'}]>"

    @property
    def is_open(self) -> bool:
        """Return whether the file is open."""
        return self._connection is not None

    @property
    def connection(self) -> Connection:
        """The connection, to be used in the thread. Raises OSError unless the file is open."""
        if self._connection is None:
            raise OSError(f"{self.path}: the file is not open")
        return self._connection

    async def open(self) -> None:
        """Open the file, creating it if necessary. Idempotent. Raises OSError."""
        if self._connection is None:
            self._connection = await self.run(self._open)

    async def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call a function in the thread. Errors of SQLite and of the file's content are raised as OSError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        except (sqlite3.Error, ValueError, RuntimeError) as error:  # RuntimeError: the thread has ended
            if self._remedy and _is_of_corrupt_file(error):
                raise OSError(f"{self.path}: the file is corrupt: {_printable(error)}; {self._remedy}") from error
            raise OSError(f"{self.path}: {_printable(error)}") from error

    async def close(self) -> None:
        """Close the file and end the thread. Idempotent."""
        if self._connection is not None:
            await self.run(self._connection.close)
            self._connection = None
        self._thread.shutdown(wait=False)

    def _open(self) -> Connection:
        make_private(self.path.parent)
        if not self.path.exists():
            _create(self.path)
        if self.path.stat().st_size == 0:  # SQLite would take it for a new one
            remedy = self._remedy or "restore a backup, or remove the file to begin with a new one"
            raise OSError(f"{self.path}: the file is empty, as after a failure of the disk or a restore; {remedy}")
        connection = _connected(self.path)
        try:
            check_schema(connection, self.path, self._schema)  # before anything is changed
            connection.execute(_WITH_LOG)
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            migrate(connection, self.path, self._schema)
        except BaseException:
            connection.close()
            raise
        return connection


def _create(path: Path) -> None:
    """Create a file of SQLite without tables. It is never empty, even if the process is killed at any moment."""
    draft = path.with_name(f".{path.name}.{threading.get_native_id()}.new")
    for suffix in ("", "-journal", "-wal", "-shm"):  # of a process that was killed
        draft.with_name(f"{draft.name}{suffix}").unlink(missing_ok=True)
    create_private(draft)  # SQLite creates its other files with the same permissions
    with closing(_connected(draft)) as connection:
        connection.execute(_WITH_LOG)  # writes the first page; at once, two processes cannot change the mode
    try:
        path.hardlink_to(draft)
    except FileExistsError:  # another process was faster
        pass
    except OSError:  # the file system has no hard links
        draft.rename(path)
    draft.unlink(missing_ok=True)


def _connected(path: Path) -> Connection:
    return sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT, check_same_thread=False)


def _is_of_corrupt_file(error: Exception) -> bool:
    """Return whether an error shows a corrupt file: its structure, text that is not UTF-8, or a value's type."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)  # errors raised by the Python module have none
        return "decode to UTF-8" in str(error) if code is None else code & 0xFF in _CORRUPT
    return isinstance(error, ValueError)


def _printable(error: Exception) -> str:
    """Return an error's message with escapes, in one line: it may quote arbitrary content of a corrupt file."""
    return str(error).encode("unicode_escape").decode()
