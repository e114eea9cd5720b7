"""Standard output and standard error, written by threads, so that no reader and no disk blocks the event loop.

A line, or the record that it is rendered from, is queued in memory and written after `BATCH_DELAY` seconds. If the
queue is full, or writing fails, lines are dropped and counted; a warning reports the number, at most once a minute. A
blocked reader cannot keep the process from ending, because `flush` has a timeout.
"""

import atexit
import io
import logging
import os
import select
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

BATCH_DELAY = 0.05  # seconds that a line waits, so that several are written together
MAX_BYTES = 8 * 1024 * 1024  # in one queue
MAX_ENTRIES = 50_000  # in one queue
LOSS_REPORT_DELAY, LOSS_REPORT_INTERVAL = (
    1.0,
    60.0,
)  # seconds from the first lost line to a warning, and between warnings
EXIT_FLUSH_TIMEOUT = 2.0  # seconds to write the queue before the process ends
_ATOMIC = (
    4096  # bytes (PIPE_BUF on Linux) that are written to a pipe without mixing with the output of other processes
)
_BATCH = 64  # entries that are rendered and written at a stretch, in a quarter of a millisecond
_PAUSE = 0.0005  # seconds between stretches, in which the event loop gets the interpreter: it may wait 5 ms otherwise
_NAMES = {"stdout": "standard output", "stderr": "standard error"}

OnLoss = Callable[[int, OSError | None], None]  # number of lost lines, and the error; None: the queue was full
_Record = TypeVar("_Record")
_Later = tuple[Callable[[Any, float], str], Any, float]  # what renders a line, its record, and a time


class LineWriter:
    """A bounded queue for one file descriptor, and a thread that writes it in order and in whole lines."""

    def __init__(
        self, descriptor: int, on_loss: OnLoss, max_bytes: int = MAX_BYTES, max_entries: int = MAX_ENTRIES
    ) -> None:
        self._descriptor = descriptor
        self._on_loss = on_loss
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._lock = threading.RLock()  # a signal handler may write while its own thread does
        self._written = threading.Condition(self._lock)
        self._entries: list[str | _Later] = []
        self._pending = 0  # bytes queued or being written
        self._has_entries, self._is_urgent = threading.Event(), threading.Event()
        self._batches_written = 0
        self._stuck_at = -1  # batches that were written when `flush` last timed out
        self._is_mid_line = False  # the last write ended within a line
        threading.Thread(target=self._run, name=f"output {descriptor}", daemon=True).start()

    def __repr__(self) -> str:
        return f"<LineWriter {self._descriptor} [{len(self._entries)} queued, {self._pending} bytes]>"

    @property
    def is_terminal(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, text: str) -> None:
        """Queue `text`, one or more whole lines. Never blocks; lines that do not fit are dropped and counted."""
        if not self._queue(text, len(text) if text.isascii() else len(_encoded(text))):
            self._on_loss(_lines(text), None)

    def write_later(self, render: Callable[[_Record, float], str], record: _Record, at: float, size: int) -> None:
        """Queue the line that `render` returns of a record and a time; the thread renders it.

        This takes less CPU time than rendering at once, because the thread renders many lines one after another, while
        its code and data are in the processor's caches. `record` must not change. `size` is about that of record or
        line, in bytes. Never blocks; a line that does not fit is dropped and counted.
        """
        if not self._queue((render, record, at), size):
            self._on_loss(1, None)

    def _queue(self, entry: str | _Later, size: int) -> bool:
        """Queue an entry, and return True if it fits."""
        with self._lock:
            if self._pending + size > self._max_bytes or len(self._entries) >= self._max_entries:
                return False
            self._pending += size
            is_first = not self._entries
            self._entries.append(entry)
        if is_first:
            self._has_entries.set()
        return True

    def flush(self, seconds: float) -> bool:
        """Wait for at most `seconds` until everything queued is written; return whether it is.

        Returns at once if it has timed out before and nothing was written since.
        """
        self._is_urgent.set()
        try:
            with self._written:
                if self._stuck_at == self._batches_written:
                    return not self._pending
                is_written = self._written.wait_for(lambda: not self._pending, seconds)
                self._stuck_at = -1 if is_written else self._batches_written
                return is_written
        finally:
            self._is_urgent.clear()

    # In the writer's thread

    def _run(self) -> None:
        while True:
            self._has_entries.wait()
            self._is_urgent.wait(BATCH_DELAY)
            with self._lock:
                self._has_entries.clear()
                entries, self._entries = self._entries, []
                size = self._pending
            for first in range(0, len(entries), _BATCH):
                if first:
                    time.sleep(_PAUSE)
                for batch in self._batches(list(map(_rendered, entries[first : first + _BATCH]))):
                    self._write_batch(batch)
                    self._batches_written += 1
            with self._written:
                self._pending -= size
                self._written.notify_all()

    def _batches(self, entries: Sequence[str]) -> Iterator[bytes]:
        """Yield joined whole entries, each batch no larger than one write should be, unless a single entry is."""
        if not _is_pipe(self._descriptor):
            yield _encoded("".join(entries))
            return
        batch: list[bytes] = []
        size = 0
        for entry in map(_encoded, entries):
            size += len(entry)
            if size > _ATOMIC and batch:
                yield b"".join(batch)
                batch, size = [], len(entry)
            batch.append(entry)
        if batch:
            yield b"".join(batch)

    def _write_batch(self, batch: bytes) -> None:
        left = b"\n" + batch if self._is_mid_line else batch  # end an incomplete line first
        total = len(left)
        try:
            while left:
                left = left[self._write_some(left) :]
        except OSError as error:
            self._on_loss(left.count(b"\n"), error)
            if len(left) < total:
                self._is_mid_line = True
        else:
            self._is_mid_line = not batch.endswith(b"\n")

    def _write_some(self, data: bytes) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another process has made the shared descriptor non-blocking
                select.select((), (self._descriptor,), ())


class ProcessOutput:
    """Both streams of this process, with the counts of dropped lines and failed writes by stream."""

    def __init__(self, delay: float = LOSS_REPORT_DELAY, interval: float = LOSS_REPORT_INTERVAL) -> None:
        self.dropped: Counter[str] = Counter(dict.fromkeys(_NAMES, 0))  # lines
        self.errors: Counter[str] = Counter(dict.fromkeys(_NAMES, 0))  # failed writes
        self._delay, self._interval = delay, interval
        self._reported: Counter[str] = Counter()
        self._causes: dict[str, str] = {}
        self._has_losses = threading.Event()
        self._lock = threading.RLock()
        self.out = self._writer("stdout", _usable(1, sys.__stdout__))
        # If both are the same file they share a queue, which keeps the order of lines.
        self.err = self.out if _are_same(1, 2) else self._writer("stderr", _usable(2, sys.__stderr__))
        threading.Thread(target=self._report_losses, name="output losses", daemon=True).start()

    def __repr__(self) -> str:
        return f"<ProcessOutput [{self.dropped.total()} lines dropped, {self.errors.total()} errors]>"

    @property
    def losses(self) -> tuple[Counter[str], Counter[str]]:
        """The live counts of dropped lines and failed writes."""
        return self.dropped, self.errors

    def flush(self, seconds: float = EXIT_FLUSH_TIMEOUT) -> bool:
        """Wait for at most `seconds` until both streams are written; return whether they are."""
        until = time.monotonic() + seconds
        is_written = self.out.flush(seconds)
        return self.err.flush(max(0.0, until - time.monotonic())) and is_written

    def report(self) -> None:
        """Log how many lines were lost since the last report, if any."""
        for stream, name in _NAMES.items():
            new = self.dropped[stream] - self._reported[stream]
            if new:
                self._reported[stream] += new
                total, cause = self.dropped[stream], self._causes[stream]
                logger.warning("%s: %d lines were dropped, %d since the start: %s", name, new, total, cause)

    def _writer(self, stream: str, descriptor: int) -> LineWriter:
        def on_loss(lines: int, error: OSError | None) -> None:
            cause = "the reader is too slow" if error is None else error.strerror or str(error)
            with self._lock:
                self.dropped[stream] += lines
                self.errors[stream] += error is not None
                self._causes[stream] = cause
                self._has_losses.set()

        return LineWriter(descriptor, on_loss)

    def _report_losses(self) -> None:
        while True:
            self._has_losses.wait()
            time.sleep(self._delay)
            self._has_losses.clear()
            self.report()
            time.sleep(self._interval - self._delay)


class TextStream(io.TextIOBase):
    """Replacement for `sys.stdout` or `sys.stderr`, for `print`, warnings and tracebacks. Never blocks.

    An incomplete line is kept per thread until it is complete or flushed, so that lines of threads do not mix.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, writer: LineWriter, descriptor: int) -> None:
        self._writer = writer
        self._descriptor = descriptor
        self._unfinished = threading.local()

    def write(self, text: str) -> int:
        """Queue the lines that `text` completes."""
        lines, end, rest = (getattr(self._unfinished, "text", "") + text).rpartition("\n")
        self._unfinished.text = rest
        if end:
            self._writer.write(lines + end)
        return len(text)

    def flush(self) -> None:
        """Queue this thread's incomplete line."""
        rest, self._unfinished.text = getattr(self._unfinished, "text", ""), ""
        if rest:
            self._writer.write(rest)

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor


class LineHandler(logging.Handler):
    """A logging handler that writes to a `LineWriter`."""

    def __init__(self, writer: LineWriter, redact: Callable[[str], str] = str) -> None:
        """`redact` returns a line without secrets."""
        super().__init__()
        self._writer = writer
        self._redact = redact

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the formatted record."""
        try:
            self._writer.write(f"{self._redact(self.format(record))}\n")
        except Exception:  # noqa: BLE001 - arguments that cannot be formatted; the base class reports them
            self.handleError(record)

    def flush(self) -> None:
        """Wait until the log is written, for at most EXIT_FLUSH_TIMEOUT. Blocks; `emit` does not call it."""
        self._writer.flush(EXIT_FLUSH_TIMEOUT)


@cache
def process_output() -> ProcessOutput:
    """Return the output of this process, which is flushed at its exit."""
    open_standard_descriptors()
    output = ProcessOutput()
    atexit.register(output.flush)
    return output


@contextmanager
def redirected() -> Iterator[None]:
    """Redirect `sys.stdout` and `sys.stderr` to `process_output` within this block, and flush it at the end."""
    output = process_output()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = TextStream(output.out, 1), TextStream(output.err, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        output.report()
        output.flush()
        atexit.unregister(output.flush)  # do not wait twice for a blocked reader


def open_standard_descriptors() -> None:
    """Open /dev/null for each standard descriptor that is closed.

    Otherwise a socket would get its number: output would be sent to a client, and libuv aborts on closing it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)


def _usable(descriptor: int, stream: object) -> int:
    """Return `descriptor`, or one of /dev/null if it was closed at the start: the number may belong to a socket."""
    return os.open(os.devnull, os.O_WRONLY) if stream is None else descriptor


def _rendered(entry: str | _Later) -> str:
    """Return the text of an entry; none, and log why, if it cannot be rendered."""
    if isinstance(entry, str):
        return entry
    render, record, at = entry
    try:
        return render(record, at)
    except Exception:  # a defect, which must not end the thread
        logger.exception("a line could not be rendered")
        return ""


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _lines(text: str) -> int:
    return text.count("\n") + (not text.endswith("\n"))


def _is_pipe(descriptor: int) -> bool:
    with suppress(OSError):
        return not stat.S_ISREG(os.fstat(descriptor).st_mode)
    return False


def _are_same(one: int, other: int) -> bool:
    with suppress(OSError):
        return os.path.sameopenfile(one, other)
    return False
