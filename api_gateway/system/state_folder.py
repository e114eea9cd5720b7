"""The state folder of a gateway: its default location, its permissions, and its lock against a second gateway.

`state_dir` is the configured folder. The gateway creates its own folder (0700) in it, with files of mode 0600.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self, TextIO

from api_gateway.system.state_version import newer_state

OWN_FOLDER = "state"
VERSION_FILE = "version"
FOLDER_VERSION = 1  # of the layout of the folder, and of the files in it that state no version
LOCK_FILE = "lock"
FORMER_FOLDER = Path(".gateway")  # the default of state_dir in previous versions, in the current folder
_MOVED_DATABASE, _MOVED_MODES = "clients.sqlite3", "circuit_breakers.json"
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
_MAX_NAME_LENGTH = 60


class StateError(Exception):
    """The state folder cannot be used; the message names the setting, the folder and the cause."""


def default_state_dir(config_file: Path | None, environment: Mapping[str, str]) -> Path:
    """Return the default `state_dir` for a configuration file. It does not depend on the current folder.

    It is in $STATE_DIRECTORY (set by systemd), $XDG_STATE_HOME/api-gateway or ~/.local/state/api-gateway, and is named
    by the absolute path of the file. Raises StateError if none of these is set.
    """
    return _base(environment) / _name(config_file)


def _base(environment: Mapping[str, str]) -> Path:
    given = environment.get("STATE_DIRECTORY", "").partition(":")[0]
    if Path(given).is_absolute():
        return Path(given)
    for variable, below in (("XDG_STATE_HOME", "api-gateway"), ("HOME", ".local/state/api-gateway")):
        folder = environment.get(variable, "")
        if Path(folder).is_absolute():  # the XDG specification: a relative one is ignored
            return Path(folder, below)
    raise StateError(
        "state_dir: no default folder: none of HOME, XDG_STATE_HOME and STATE_DIRECTORY is set to an"
        " absolute path; set state_dir (GATEWAY_STATE_DIR), such as /var/lib/api-gateway"
    )


def _name(config_file: Path | None) -> str:
    """Return a unique name for a file. Links are not followed, because Kubernetes changes them with every update."""
    if config_file is None:
        return "default"
    path = os.path.abspath(config_file)  # noqa: PTH100 - `resolve` follows links
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", path).strip("-.")[-_MAX_NAME_LENGTH:].strip("-.")
    return f"{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def own_folder(state_dir: Path) -> Path:
    """Return the gateway's own folder inside `state_dir`."""
    return state_dir / OWN_FOLDER


def open_private(path: Path) -> TextIO:
    """Open a text file for writing with mode 0600. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "w", encoding="utf-8")


@contextmanager
def replacing(path: Path, draft: Path) -> Iterator[TextIO]:
    """Write a private text file whose readers find the previous or the new content. Raises OSError.

    `draft` is in the same folder; no other process may write it at the same time.
    """
    try:
        with open_private(draft) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def create_once(path: Path, text: str) -> str:
    """Return the content of a private ASCII file, which is created with `text` if there is none. Blocks.

    Several processes may call this at once: the file is created atomically, and all return the same content, without
    surrounding white space. Raises OSError, and ValueError for another encoding.
    """
    if not path.exists():
        make_private(path.parent)
        draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "w", encoding="ascii") as file:  # noqa: PTH123 - of a descriptor
                file.write(f"{text}\n")
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(draft, path)
        finally:
            draft.unlink()
    return path.read_text("ascii").strip()


def create_private(path: Path) -> None:
    """Create an empty file with mode 0600 unless it exists. Raises OSError."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents with mode 0700; do not change existing ones. Raises OSError."""
    if not folder.is_dir():
        if folder.parent != folder:
            make_private(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)


def lock_holder(folder: Path) -> str | None:
    """Return the id of the process that holds a folder, "unknown" if it is not known, or None."""
    with suppress(OSError), (folder / LOCK_FILE).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return (file.read(100).split() or ["unknown"])[0]
    return None


class FolderInUse(StateError):
    """Another gateway uses the folder."""


class HolderUnknown(FolderInUse):
    """The folder is locked, and the lock file does not contain the id of a running process.

    A process that has just locked the folder has not written its ids yet.
    """


class FolderOfNewer(StateError):
    """A newer gateway has written the folder."""


def check_folder_version(folder: Path) -> None:
    """Raise StateError if the folder was written by a newer gateway, or states no valid version."""
    path = folder / VERSION_FILE
    try:
        text = path.read_text("ascii", errors="replace").strip()
    except FileNotFoundError:  # of a previous version, or new
        return
    if not text.isdecimal():
        raise StateError(f"state_dir: {path}: must be a version such as {FOLDER_VERSION}, got {text[:40]!r}")
    if int(text) > FOLDER_VERSION:
        raise FolderOfNewer(f"state_dir: {newer_state(path, int(text), FOLDER_VERSION)}")


class StateFolder:
    """The folder, locked by one process, and open to its child processes, until `close` or the end of the process.

    States: held, shared (`sharer` holds it), closed. The `lock` file contains the ids of the holder and its parent
    process.
    """

    sharer: int | None = None  # another worker of the same server, which holds the lock

    def __init__(self, state_dir: Path, *, is_worker: bool = False) -> None:
        """Create the folder if necessary, lock it, and set the permissions of its files. Blocks.

        A worker of a server such as `uvicorn --workers` shares it with the other workers of the same parent process.
        Raises StateError.
        """
        self.path = own_folder(state_dir)
        self._state_dir = state_dir
        self._lock = -1
        self._is_worker = is_worker
        try:
            make_private(self.path)
            self._check_owner()
            self._take()
            check_folder_version(self.path)
            self._move_former()
            create_once(self.path / VERSION_FILE, str(FOLDER_VERSION))
            self._protect()
        except OSError as error:
            self.close()
            raise self._refused(f"{(error.strerror or str(error)).lower()}: {error.filename or self.path}") from error
        except StateError:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<StateFolder [{self.path}{'' if self._lock >= 0 else ', not held'}]>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _refused(self, cause: str) -> StateError:
        return StateError(
            f"state_dir: {self._state_dir}: {cause}; set state_dir (GATEWAY_STATE_DIR) to a folder that this user can"
            " write and no other gateway uses"
        )

    def _check_owner(self) -> None:
        """Refuse a folder that another user could have created, as is possible in /tmp."""
        found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise self._refused(f"{self.path} is not a folder")
        if found.st_uid != os.geteuid():
            raise self._refused(f"{self.path} belongs to user {found.st_uid}, not to user {os.geteuid()}")
        self.path.chmod(0o700)

    def _take(self) -> None:
        self._lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse_second()
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # some network file systems have no locks
                raise
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()} {os.getppid()}\n".encode(), 0)

    def _refuse_second(self) -> None:
        """Raise FolderInUse unless this process, its parent, or another worker of the same server holds the lock."""
        text = os.pread(self._lock, 100, 0).decode(errors="replace").split()
        holder, parent = (int(part) if part.isdecimal() else 0 for part in (*text, "", "")[:2])
        if holder in (os.getpid(), os.getppid()):
            return
        if self._is_worker and parent == os.getppid():
            self.sharer = holder
            return
        fault = FolderInUse if _is_running(holder) else HolderUnknown
        raise fault(
            f"state_dir: {self._state_dir}: another gateway uses this folder (process {holder or 'unknown'}); stop it,"
            " or set state_dir (GATEWAY_STATE_DIR) to a different folder for each gateway"
        )

    def _move_former(self) -> None:
        """Move files of previous versions, which were directly in `state_dir`, to the folder.

        The file of clients is copied with its write-ahead log, which has its last changes, and the copy gets its name
        last. So the end of the process meanwhile leaves the previous files as they were, and the next start goes on.
        """
        former, present = self._state_dir / _MOVED_MODES, self.path / _MOVED_MODES
        if former.exists() and not present.exists():
            former.rename(present)
        former, present = self._state_dir / _MOVED_DATABASE, self.path / _MOVED_DATABASE
        if present.exists() or not former.exists():
            return
        log = Path(f"{former}-wal")
        Path(f"{present}-wal").unlink(missing_ok=True)  # of a start that did not end
        if log.exists():
            _copy(log, Path(f"{present}-wal"))
        _copy(former, draft := present.with_name(f".{present.name}.former"))
        draft.rename(present)
        for file in (former, log, Path(f"{former}-shm")):
            file.unlink(missing_ok=True)

    def _protect(self) -> None:
        for file in self.path.iterdir():
            with suppress(FileNotFoundError):
                if stat.S_ISREG(file.lstat().st_mode):
                    file.chmod(0o600)


def _is_running(pid: int) -> bool:
    if not pid:
        return False
    try:
        with suppress(PermissionError):  # a process of another user
            os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    """Copy a file, to the disk and with mode 0600."""
    target.unlink(missing_ok=True)
    create_private(target)
    with source.open("rb") as read, target.open("r+b") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())


def former_state(state_dir: Path, environment: Mapping[str, str]) -> str | None:
    """Return a hint if the former default folder contains state and `state_dir` is the current default, else None."""
    former = Path.cwd() / FORMER_FOLDER
    try:
        is_default = state_dir.parent == _base(environment)
    except StateError:
        return None
    if not is_default or not any((former / name).exists() for name in (_MOVED_DATABASE, _MOVED_MODES)):
        return None
    return (
        f"{former} is no longer used: state is kept in {state_dir}; to keep using it, set state_dir: {FORMER_FOLDER}"
        f" (GATEWAY_STATE_DIR={FORMER_FOLDER})"
    )
