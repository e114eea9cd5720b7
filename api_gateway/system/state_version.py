"""Versions of state files: what is said of a file from a newer gateway, and where previous content is kept.

A file states the version of its layout. Before a gateway changes the layout of an older file, it keeps the content
beside it; backups are never deleted. A file of a newer version is refused and left as it is.
"""

import re
from datetime import UTC, datetime
from pathlib import Path

_TIME = "%Y%m%dT%H%M%SZ"
_BACKUP = re.compile(r"\.v([0-9]{1,9})-[0-9]{8}T[0-9]{6}Z(?:-[0-9]+)?\.backup")


def newer_state(path: Path, version: int, newest: int) -> str:
    """Return the message about a file of a newer version, with what can be done."""
    saved = backups_of(path, newest)
    remedy = "set state_dir to another folder, to start without it"
    if saved:
        remedy = f"stop it and put the backup {saved[-1].name} in its place, which loses the changes since"
    return (
        f"{path} was written by a newer gateway (schema {version}, newest supported {newest}): start that gateway, or"
        f" one that is as new; or {remedy}. See docs/upgrading.md"
    )


def backup_path(path: Path, version: int, now: datetime | None = None) -> Path:
    """Return a path beside a file that does not exist yet, for its content of this version."""
    stem = f"{path.name}.v{version}-{(now or datetime.now(UTC)).strftime(_TIME)}"
    found, number = path.with_name(f"{stem}.backup"), 1
    while found.exists():
        number += 1
        found = path.with_name(f"{stem}-{number}.backup")
    return found


def backups_of(path: Path, newest: int) -> list[Path]:
    """Return the backups of a file of versions up to `newest`, the newest version and the last backup of it last."""
    found = []
    for file in path.parent.glob(f"{path.name}.v*.backup"):
        matched = _BACKUP.fullmatch(file.name.removeprefix(path.name))
        if matched is not None and int(matched[1]) <= newest:
            found.append((int(matched[1]), file.stat().st_mtime_ns, file))
    return [file for *_, file in sorted(found)]
