"""The audit log: a line for each change that an operator makes, in one file that all workers of a gateway append to.

A line is written after the change, in one write under a lock, and before the response is sent. When the file has more
than `AUDIT_FILE_BYTES`, it replaces the former file. So at least the last `AUDIT_FILE_BYTES` are kept, and the two
files together have about twice as many at most. A line that a killed process left unfinished is skipped.
"""

import asyncio
import errno
import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from api_gateway.errors import StoreUnavailable
from api_gateway.metrics import AUDIT
from api_gateway.models import Body
from api_gateway.system.state_folder import make_private
from api_gateway.system.state_version import backup_path

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.jsonl"
AUDIT_FILE_BYTES = 8 * 1024 * 1024
AUDIT_VERSION = 1  # of the entries, in the first line of a file; one that states none has it, too
_HEADER = f'{{"version":{AUDIT_VERSION}}}\n'.encode()


class AuditAction(StrEnum):
    """The changes by operators that the log records."""

    TIER_SET = "tier_set"
    GRANT_SET = "grant_set"
    GRANT_ENDED = "grant_ended"
    BUCKETS_FILLED = "buckets_filled"
    QUOTA_CHANGED = "quota_changed"
    CLIENT_REMOVED = "client_removed"
    KEY_CREATED = "key_created"
    KEY_ROTATED = "key_rotated"
    KEY_REVOKED = "key_revoked"
    PROOF_SET = "proof_set"
    BREAKER_MODE_SET = "breaker_mode_set"
    CONFIGURATION_RELOADED = "configuration_reloaded"


class AuditEntry(Body):
    """A change by an operator."""

    time: str = Field(description="UTC, ISO 8601.")
    request_id: str = Field(description="That of the response's X-Request-ID.")
    operator: str = Field(description="The name of the token; `local` for a request from this machine without one.")
    address: str = Field(description="The address that the request came from.")
    action: AuditAction
    subject: str | None = Field(description="The client or circuit breaker; null for the configuration.")
    before: Any = Field(description="What was in force, without secrets.")
    after: Any
    confirmed: bool = Field(
        default=True,
        description="False if the store did not confirm the change, which may have been made: `after` is null.",
    )


class AuditView(Body):
    """The last changes."""

    entries: list[AuditEntry] = Field(description="Newest first.")


class AuditFile:
    """The file `audit.jsonl` in the state folder, and the former file. All methods block."""

    def __init__(self, folder: Path, max_bytes: int = AUDIT_FILE_BYTES) -> None:
        self.path = folder / AUDIT_FILE
        self.former = self.path.with_suffix(".1.jsonl")
        self._max_bytes = max_bytes

    def __repr__(self) -> str:
        return f"<AuditFile [{self.path}]>"

    def append(self, entry: AuditEntry) -> None:
        """Write an entry to the disk. Raises OSError."""
        make_private(self.path.parent)
        with self._locked() as descriptor:
            size = os.fstat(descriptor).st_size
            is_whole = size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"
            start = (b"" if is_whole else b"\n") if size else _HEADER
            line = start + _line_of(entry).encode() + b"\n"
            written = os.write(descriptor, line)
            if written < len(line):  # the disk is full; what has been written is not a whole entry
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
            if size + len(line) > self._max_bytes:
                self.path.replace(self.former)

    def last(self, count: int) -> list[AuditEntry]:
        """Return the last entries, newest first. Raises OSError."""
        return list(islice(self._entries(), count))

    def _entries(self) -> Iterator[AuditEntry]:
        for path in (self.path, self.former):
            try:
                lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            except FileNotFoundError:
                continue
            if _version_of(lines[0]) > AUDIT_VERSION:
                logger.warning("%s was written by a newer gateway, which alone can show its entries", path)
                continue
            for line in reversed(lines):
                try:
                    yield AuditEntry.model_validate(json.loads(line))
                except (ValueError, ValidationError, RecursionError):
                    continue  # unfinished, or of another version

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Open the file for this process alone; another process may have replaced it meanwhile."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if self.path.exists() and os.path.samestat(os.fstat(descriptor), self.path.stat()):
                    version = _version_of(os.pread(descriptor, len(_HEADER) + 8, 0).partition(b"\n")[0])
                    if version <= AUDIT_VERSION:
                        yield descriptor
                        return
                    self.path.rename(backup_path(self.path, version))  # what a newer gateway has written is kept
            finally:
                os.close(descriptor)


def _line_of(entry: AuditEntry) -> str:
    """Return an entry as JSON; `confirmed` only if it is false, as earlier gateways do not know it."""
    return entry.model_dump_json(exclude_defaults=True)


def _version_of(line: str | bytes) -> int:
    """Return the version that the first line of a file states; `AUDIT_VERSION` if it is an entry."""
    try:
        found = json.loads(line)["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return AUDIT_VERSION
    return found if isinstance(found, int) else AUDIT_VERSION


class AuditLog:
    """Records changes in the file and in the gateway's log, and counts them by action."""

    def __init__(self, file: AuditFile, counts: Counter[str], dropped_lines: Counter[str]) -> None:
        """`dropped_lines` counts, by stream, lines that could not be written."""
        self._file = file
        self._counts = counts
        self._dropped_lines = dropped_lines
        dropped_lines.setdefault(AUDIT, 0)
        for action in AuditAction:
            counts.setdefault(action.value, 0)

    def __repr__(self) -> str:
        return f"<AuditLog [{self._counts.total()} changes]>"

    async def record(self, entry: AuditEntry) -> None:
        """Record a change. It has been made, so a file that cannot be written is an error in the log alone."""
        self._counts[entry.action.value] += 1
        logger.info("audit: %s", _line_of(entry))
        try:
            await asyncio.to_thread(self._file.append, entry)
        except OSError as error:
            self._dropped_lines[AUDIT] += 1
            logger.error("%s: cannot record a change by an operator: %s", self._file.path, error.strerror)  # noqa: TRY400

    async def last(self, count: int) -> list[AuditEntry]:
        """Return the last changes, newest first. Raises StoreUnavailable if the file cannot be read, and logs why."""
        try:
            return await asyncio.to_thread(self._file.last, count)
        except OSError as error:
            logger.error("%s: cannot read the audit log: %s", self._file.path, error.strerror)  # noqa: TRY400
            raise StoreUnavailable("The audit log cannot be read.", retry_after=1) from error
