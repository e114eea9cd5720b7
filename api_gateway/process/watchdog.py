"""Ends a process whose event loop is blocked, or that does not end in time after a stop signal.

A thread of its own looks at the loop a few times a second. It counts its own looks and not seconds, so that a process
that was stopped (SIGSTOP) or throttled is not ended for it: neither it nor the loop has run meanwhile. While the
loop's thread could run and gets no processor, a look counts for as much of its time as that thread has run. Nothing of
this is on the path of a request.

Two cases need more than a thread:

- A loop that is blocked outside of the interpreter never gets to a Python signal handler. So signals are read from the
  descriptor that C handlers write to (`signal.set_wakeup_fd`), and passed on to the loop's own.
- Native code that does not release the interpreter blocks every thread. So each look moves a timer of the process's
  CPU time ahead (ITIMER_PROF); when it runs out, the system ends the process by SIGPROF, after a stack is written.
"""

import asyncio
import contextlib
import faulthandler
import logging
import math
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from api_gateway.system.output import process_output

logger = logging.getLogger(__name__)

MIN_BLOCKED_CHECKS = 10  # at least, that must find the loop blocked before the process is ended
MAX_CHECK_INTERVAL = 0.5  # seconds between two looks
REPORT_TIMEOUT = 1.0  # seconds for the log to take the report: what blocks the loop may block the log, too
NATIVE_MARGIN = 2.0  # seconds of CPU time that native code may take beyond the time the loop has


class Watchdog:
    """Watches one event loop, that of the main thread.

    States: idle; watching, from `watch` on; and from either one stopping, from `expect_end` or a stop signal on.
    """

    def __init__(
        self,
        timeout: float,
        stop_within: float,
        *,
        blocked: int,
        overdue: int,
        stop_signals: Collection[int] = (signal.SIGTERM, signal.SIGINT),
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """End the process with `blocked` when its loop has not turned for `timeout` seconds.

        And with `overdue` when it has not ended `stop_within` seconds after a stop signal.
        """
        self._timeout = timeout
        self._stop_within = stop_within
        self._blocked, self._overdue = blocked, overdue
        self._stop_signals = frozenset(int(number) for number in stop_signals)
        self._end = end
        self._pause = min(MAX_CHECK_INTERVAL, timeout / MIN_BLOCKED_CHECKS)
        self._checks_until_blocked = math.ceil(timeout / self._pause)
        self._loop: asyncio.AbstractEventLoop | None = None  # while it is watched
        self._main = threading.main_thread().ident or 0
        self._silent = 0.0  # looks since the loop was last seen to turn, less what it waited for a processor
        self._ran = 0.0  # seconds that the loop's thread has run, ever
        self._has_turned = True
        self._checks_left = math.inf  # until the process must have ended
        self._has_timer = False

    def __repr__(self) -> str:
        state = "idle" if self._loop is None else f"{self._silent:g} looks without a turn of the loop"
        return f"<Watchdog [{state}, {self._checks_left} looks to the end]>"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Look from now on, and read the signals. To be used in the main thread, within the loop.

        The end that is awaited after a stop signal is that of the process, and so awaited beyond this block.
        """
        inlet, outlet = os.pipe()
        os.set_blocking(inlet, False)
        os.set_blocking(outlet, False)
        before = signal.set_wakeup_fd(outlet, warn_on_full_buffer=False)
        self._arm_timer()
        thread = threading.Thread(target=self._run, args=(inlet, before), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._loop = None
            signal.set_wakeup_fd(before)

    def watch(self) -> None:
        """Expect the running loop to turn from now on."""
        self._silent, self._has_turned = 0, True
        self._loop = asyncio.get_running_loop()

    def expect_end(self) -> None:
        """Expect the process to end in time. Idempotent: the first signal counts."""
        self._checks_left = min(self._checks_left, math.ceil(self._stop_within / self._pause))

    def set_stop_timeout(self, stop_within: float) -> None:
        """Give the process another time to end, from the next stop signal on."""
        self._stop_within = stop_within

    # In the thread

    def _run(self, inlet: int, before: int) -> None:
        poll = select.poll()
        poll.register(inlet, select.POLLIN)
        due = time.monotonic() + self._pause
        while True:
            left = due - time.monotonic()
            if left > 0 and poll.poll(max(1, math.ceil(left * 1000))):
                self._forward_signals(inlet, before)
                continue
            due = time.monotonic() + self._pause
            self._check()

    def _forward_signals(self, inlet: int, before: int) -> None:
        """Note stop signals, and wake the loop for all."""
        with contextlib.suppress(OSError):
            numbers = os.read(inlet, 4096)
            if not self._stop_signals.isdisjoint(numbers):
                self.expect_end()
            if before >= 0:
                os.write(before, numbers)

    def _check(self) -> None:
        self._disarm_timer()
        self._checks_left -= 1
        loop = self._loop
        ran_before, (self._ran, is_runnable) = self._ran, scheduling_of(threading.main_thread())
        if loop is not None and not self._has_turned:
            self._silent += min(1.0, (self._ran - ran_before) / self._pause) if is_runnable else 1
        elif loop is not None:
            self._silent, self._has_turned = 0, False
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(self._on_loop_turn)
        if self._checks_left <= 0:
            self._end_process(
                self._overdue, f"the process has not ended {self._stop_within:g} s after the stop signal"
            )
        elif loop is not None and self._silent >= self._checks_until_blocked:
            self._end_process(self._blocked, f"the event loop has been blocked for {self._timeout:g} s")

    def _on_loop_turn(self) -> None:
        self._has_turned = True

    def _end_process(self, code: int, reason: str) -> None:
        """Say why, and where the loop's thread is, then end the process: in time also if the log cannot take it."""
        try:
            snapshot = threading.Thread(target=self._report, args=(code, reason), daemon=True)
            snapshot.start()
            snapshot.join(REPORT_TIMEOUT)
        finally:
            self._end(code)

    def _report(self, code: int, reason: str) -> None:
        frame = sys._current_frames().get(self._main)  # noqa: SLF001 - the interpreter's documented way to see it
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "  (ended)\n"
        logger.critical("%s; it ends with exit code %d. The main thread is at:\n%s", reason, code, stack.rstrip())
        process_output().flush(REPORT_TIMEOUT)

    # The timer

    def _arm_timer(self) -> None:
        """Have a stack written before SIGPROF ends the process, unless somebody else uses that signal."""
        if signal.getsignal(signal.SIGPROF) is not signal.SIG_DFL:
            return
        with contextlib.suppress(AttributeError, OSError, ValueError):  # there is no standard error
            faulthandler.register(signal.SIGPROF, file=sys.stderr, all_threads=True, chain=True)
        self._has_timer = True
        self._disarm_timer()

    def _disarm_timer(self) -> None:
        if self._has_timer:
            signal.setitimer(signal.ITIMER_PROF, self._timeout + NATIVE_MARGIN)


def scheduling_of(thread: threading.Thread) -> tuple[float, bool]:
    """Return the seconds that a thread of this process has run, and whether it runs or waits for a processor.

    Linux tells them (proc(5): `schedstat`, `stat`); elsewhere a thread counts as one that waits for something else.
    """
    folder = Path(f"/proc/self/task/{thread.native_id}")
    try:
        state = (folder / "stat").read_text(errors="replace").rpartition(") ")[2][:1]
        return int((folder / "schedstat").read_text("ascii").split()[0]) / 1e9, state == "R"
    except (OSError, ValueError, IndexError):
        return 0.0, False
