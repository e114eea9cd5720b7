"""The versions of an SQLite file's tables: how a new file begins, and how one of an older version becomes current.

The version is in `PRAGMA user_version`. A migration is one transaction, before which the content is copied to a backup
beside the file: a process that is killed leaves the old content or the new one. Processes may migrate a file at once;
one of them does it.
"""

import logging
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from api_gateway.storage.sqlite_transaction import transaction
from api_gateway.system.state_folder import create_private
from api_gateway.system.state_version import backup_path, newer_state

logger = logging.getLogger(__name__)

_FIRST = 1  # the version of a file with tables that states none


@dataclass(frozen=True, slots=True)
class Schema:
    """The current version, the statements of a new file, and by older version those that lead to the next one."""

    version: int
    tables: tuple[str, ...]
    steps: Mapping[int, tuple[str, ...]]


def check_schema(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    """Raise OSError if the file was written by a newer gateway. Changes nothing."""
    version = _stated(connection)
    if version > schema.version:
        raise OSError(newer_state(path, version, schema.version))


def migrate(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    """Create the tables of a new file, or bring an older one to the current version. Raises OSError."""
    if _stated(connection) == schema.version:
        return
    with transaction(connection):  # another process may have done it meanwhile
        check_schema(connection, path, schema)
        version = _stated(connection)
        if version == schema.version:
            return
        has_tables = connection.execute("SELECT 1 FROM sqlite_master").fetchone() is not None
        if not has_tables:
            _execute(connection, schema.tables)
        else:
            _bring_up(connection, path, schema, version or _FIRST)
        connection.execute(f"PRAGMA user_version = {schema.version}")


def _bring_up(connection: sqlite3.Connection, path: Path, schema: Schema, version: int) -> None:
    if version == schema.version:  # only the number is missing
        return
    saved = _backed_up(path, version)
    logger.warning("%s: schema %d becomes %d; the content before is kept in %s", path, version, schema.version, saved)
    for number in range(version, schema.version):
        _execute(connection, schema.steps[number])


def _execute(connection: sqlite3.Connection, statements: tuple[str, ...]) -> None:
    for statement in statements:
        connection.execute(statement)


def _stated(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _backed_up(path: Path, version: int) -> Path:
    """Copy the committed content to a file of its own, which exists as a whole or not at all. Raises OSError."""
    saved, draft = backup_path(path, version), path.with_name(f".{path.name}.backup")
    try:
        for left in (draft, draft.with_name(f"{draft.name}-journal")):
            left.unlink(missing_ok=True)
        create_private(draft)
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(draft)) as target:
            source.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")  # so that it is one file
        _synchronize(draft, os.O_RDWR)
        draft.rename(saved)
        _synchronize(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except (OSError, sqlite3.Error) as error:
        raise OSError(f"{path} is not migrated, as its backup {saved.name} cannot be written: {error}") from error
    return saved


def _synchronize(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
