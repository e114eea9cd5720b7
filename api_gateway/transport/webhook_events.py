"""Events that wait for a webhook, kept in the state folder until they are delivered, so that a restart loses none.

A process has one file, which it locks. A process that starts takes over the files that none has locked: those of
processes that have ended, however they ended. An event is written within a second, so `kill -9` loses at most those of
this time; one whose removal was not written is sent again, with the same id.
"""

import asyncio
import fcntl
import json
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.system.state_folder import make_private
from api_gateway.system.state_version import backup_path

logger = logging.getLogger(__name__)

MAX_QUEUED = 1000  # events that wait; of more, the oldest is dropped
REMEMBERED = 10_000  # ids that were queued or delivered, so that none is queued again
EVENT_WRITE_INTERVAL = 0.2  # seconds between the end of a write and the next one
EVENTS_VERSION = 1
_FILES = "webhook-*.json"
_MOST_FILES = 10_000


@dataclass(frozen=True, slots=True)
class WebhookEvent:
    """An event: a unique id, a type such as `quota.warning`, its time (seconds since the epoch), and its members."""

    id: str
    type: str
    at: float
    data: Mapping[str, Any]

    @property
    def body(self) -> bytes:
        """The event in JSON."""
        at = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return json.dumps({"type": self.type, "timestamp": at, "data": self.data}, separators=(",", ":")).encode()


class WaitingFile:
    """The file of this process with its events, and those that ended processes have left. All methods block.

    States: closed; open, from `take` until `close`. The lock is on the file itself, which each write replaces.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder
        self._descriptor = -1

    def __repr__(self) -> str:
        return f"<WaitingFile [{self._path}]>"

    @property
    def is_open(self) -> bool:
        """True if this process has a file."""
        return self._descriptor >= 0

    def take(self) -> list[WebhookEvent]:
        """Lock a file of this process, and move the events of unlocked ones there; return them. Raises OSError."""
        make_private(self._folder)
        held = {path: descriptor for path in sorted(self._folder.glob(_FILES)) if (descriptor := _lock(path)) >= 0}
        try:
            events = sorted((event for path in held for event in _events_of(path)), key=lambda one: one.at)
            own = next(iter(held.items()), None) or self._created()
            self._path, self._descriptor = own
            held.pop(self._path, None)
            self.write(events[-MAX_QUEUED:])
            for path in held:
                path.unlink(missing_ok=True)
        finally:
            for descriptor in held.values():
                os.close(descriptor)
        return events

    def write(self, events: Iterable[WebhookEvent]) -> None:
        """Replace the content, which is the old or the new one whenever the process ends. Raises OSError."""
        rows = [{"id": one.id, "type": one.type, "at": one.at, "data": one.data} for one in events]
        draft = self._path.with_suffix(".new")
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(json.dumps({"version": EVENTS_VERSION, "events": rows}).encode())
                file.flush()
                os.fsync(descriptor)
            draft.replace(self._path)
        except OSError:
            os.close(descriptor)
            raise
        former, self._descriptor = self._descriptor, descriptor
        if former >= 0:
            os.close(former)

    def close(self, *, is_empty: bool) -> None:
        """Leave the events to the next process that starts; without any, remove the file. Raises OSError."""
        if self._descriptor >= 0:
            if is_empty:
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _created(self) -> tuple[Path, int]:
        """Create a file and lock it; another process that starts at the same time may be faster."""
        for number in range(_MOST_FILES):
            path = self._folder / f"webhook-{number}.json"
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                descriptor = _lock(path)
                if descriptor >= 0:
                    return path, descriptor
        raise OSError(f"{self._folder} has {_MOST_FILES} files of waiting events")


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock of a file; -1 if another process has it, or has replaced the file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return -1
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    os.close(descriptor)
    return -1


def _events_of(path: Path) -> Iterator[WebhookEvent]:
    """Yield the events of a file. One that cannot be read is kept beside it, and has none."""
    text = path.read_bytes()
    if not text:  # of a process that ended before it had any
        return
    version, cause = EVENTS_VERSION, "was written by a newer gateway, which alone can send its events"
    try:
        content = json.loads(text)
        version = int(content["version"])
        if version <= EVENTS_VERSION:
            yield from [
                WebhookEvent(str(one["id"]), str(one["type"]), float(one["at"]), dict(one["data"]))
                for one in content["events"]
            ]
            return
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        cause = f"has no events that can be read ({type(error).__name__}); it may be deleted"
    saved = backup_path(path, version)
    saved.touch(0o600)
    saved.write_bytes(text)
    logger.error("%s %s; it is kept as %s", path, cause, saved.name)


class WaitingEvents:
    """The events that wait, in their order, and the ids that are known; they outlive a `Webhook` of a configuration.

    From `start` to `close` they are kept in a folder (None: they are not).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.dropped = 0
        self.arrived = asyncio.Event()
        self._file = None if folder is None else WaitingFile(folder)
        self._queue: deque[WebhookEvent] = deque()
        self._known: dict[str, None] = {}  # in the order of arrival
        self._changed = asyncio.Event()
        self._taking: asyncio.Future[list[WebhookEvent]] | None = None  # of the file, until it is read
        self._writing: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self.error: str | None = None  # why they are not stored

    def __repr__(self) -> str:
        return f"<WaitingEvents [{len(self._queue)}, in {self._file!r}]>"

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def first(self) -> WebhookEvent | None:
        """The event that is to be sent next."""
        return self._queue[0] if self._queue else None

    def add(self, event: WebhookEvent) -> None:
        """Queue an event, unless one with the same id was queued before."""
        if event.id in self._known:
            return
        self._known[event.id] = None
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        if len(self._queue) >= MAX_QUEUED:
            lost = self._queue.popleft()
            self.dropped += 1
            logger.warning("webhook: %d events wait, event %s is dropped", MAX_QUEUED, lost.id)
        self._queue.append(event)
        self.arrived.set()
        self._changed.set()

    def remove(self, event: WebhookEvent) -> None:
        """Forget an event that was delivered or given up; it may have been dropped meanwhile."""
        with suppress(ValueError):
            self._queue.remove(event)
            self._changed.set()

    def start(self) -> None:
        """Read the events that earlier processes have left, and keep all from now on. Idempotent."""
        if self._file is not None and self._task is None:
            self._taking = asyncio.ensure_future(asyncio.to_thread(self._file.take))
            self._task = asyncio.create_task(self._run(self._file), name="webhook events")

    async def close(self) -> None:
        """Write the events that wait, and leave them to the next process."""
        task, self._task = self._task, None
        if task is None or self._file is None:
            if self._queue:
                logger.warning("webhook: %d events were not delivered: %s", len(self._queue), self._queue[0].id)
            return
        await cancel_and_wait(task)
        await self._read()
        await self._write(self._file)
        if self._queue and self.error is None:
            logger.warning("webhook: %d events wait, and are sent after the next start", len(self._queue))
        elif self._queue:
            logger.error("webhook: %d events were not delivered: %s", len(self._queue), self._queue[0].id)
        with suppress(OSError):
            await asyncio.to_thread(self._file.close, is_empty=not self._queue)

    async def _run(self, file: WaitingFile) -> None:
        await self._read()
        while True:
            await self._changed.wait()
            await self._write(file)
            await asyncio.sleep(EVENT_WRITE_INTERVAL)

    async def _read(self) -> None:
        """Queue the events of earlier processes before those that have arrived meanwhile. Idempotent."""
        if self._taking is None:
            return
        try:
            former = await asyncio.shield(self._taking)
        except OSError as error:
            former = []
            self._report(error)
        self._taking = None
        if former:
            logger.info("webhook: %d events have waited for the start, and are sent", len(former))
            self._prepend(former)

    def _prepend(self, former: Iterable[WebhookEvent]) -> None:
        newer, self._queue = list(self._queue), deque()
        for one in newer:
            self._known.pop(one.id, None)
        for one in (*former, *newer):
            self.add(one)

    async def _write(self, file: WaitingFile) -> None:
        """Write the events if they have changed. An error is logged once, and they are written later."""
        if self._writing is not None:  # of a task that was cancelled
            await asyncio.wait({self._writing})
        if not (self._changed.is_set() and file.is_open):
            return
        self._changed.clear()
        try:
            self._writing = asyncio.ensure_future(asyncio.to_thread(file.write, list(self._queue)))
            await asyncio.shield(self._writing)
        except OSError as error:
            self._changed.set()
            self._report(error)
        except asyncio.CancelledError:
            self._changed.set()
            raise
        else:
            self.error = None

    def _report(self, error: OSError) -> None:
        if self.error is None:
            logger.error("webhook: waiting events are not kept for a restart: %s", error)
        self.error = str(error)
