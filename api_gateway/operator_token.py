"""The operator token that the gateway generates for itself: a file in `state_dir` that only its own user can read."""

import logging
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

FILE = "operator-token"
MIN_LENGTH = 16  # characters


def operator_token(folder: Path) -> str | None:
    """Return the token, generated if there is none yet; None if the folder holds none and none can be written.

    Several processes may ask at once: the file appears with its content, once, and all return the same.
    """
    path = folder / FILE
    try:
        if not path.exists():
            _write(path)
        token = path.read_text("ascii").strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, ValueError) as error:
        logger.warning("%s: there is no generated operator token: %s", path, error)
        return None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s: other users may use the operator token; its permissions are %04o, not 0600", path, mode)
    if len(token) < MIN_LENGTH:
        logger.warning("%s: is not used as a token, it has less than %d characters", path, MIN_LENGTH)
        return None
    return token


def _write(path: Path) -> None:
    """Write a new token under a name of its own, and give it the name `path` unless that exists by now."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{FILE}-{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:  # noqa: PTH123 - of a descriptor
            file.write(f"{secrets.token_urlsafe(32)}\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
