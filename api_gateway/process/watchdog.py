"""Ends a process whose event loop is blocked, or that does not end in time after a stop signal.

A thread checks the loop a few times a second. It counts its checks and not seconds, so that a process that was stopped
(SIGSTOP) or throttled is not ended for that: neither the thread nor the loop has run meanwhile. While the loop's
thread is runnable without a processor, a check counts only in proportion to the CPU time that the thread got. Requests
are not affected.

Two cases need more than a thread:

- A loop that is blocked in native code does not run Python signal handlers. So the thread reads signals from the
  descriptor that the C handlers write to (`signal.set_wakeup_fd`), and forwards them to the loop's descriptor.
- Native code that does not release the interpreter lock blocks every thread. So each check restarts a timer of the
  process's CPU time (ITIMER_PROF); when it expires, the stack is written and SIGPROF ends the process.
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

from api_gateway.system.collection import frames_of_threads
from api_gateway.system.output import process_output

logger = logging.getLogger(__name__)

MIN_BLOCKED_CHECKS = 10  # the least number of checks that must find the loop blocked
MAX_CHECK_INTERVAL = 0.5  # seconds between checks
REPORT_TIMEOUT = 1.0  # seconds to write the report: what blocks the loop may block the log too
NATIVE_MARGIN = 2.0  # seconds of CPU time that native code may take beyond the loop's time


class Watchdog:
    """Watches the event loop of the main thread.

    States: idle; watching, after `watch`. From either, `expect_end` or a stop signal leads to stopping, in which the
    process must end within `stop_within` seconds.
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
        """End the process with exit code `blocked` if its loop does not run for `timeout` seconds.

        End it with exit code `overdue` if it has not ended `stop_within` seconds after a stop signal.
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
        self._silent = 0.0  # checks since the loop last ran, less the time that it waited for a processor
        self._ran = 0.0  # seconds of CPU time of the loop's thread
        self._has_turned = True
        self._checks_left = math.inf  # until the process must have ended
        self._has_timer = False

    def __repr__(self) -> str:
        state = "idle" if self._loop is None else f"{self._silent:g} checks without a reply of the loop"
        return f"<Watchdog [{state}, {self._checks_left} checks left]>"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Check the loop within this block, and read signals. To be used in the main thread, within the loop.

        After a stop signal the thread waits for the end of the process, also after this block.
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
        """Watch the running event loop from now on."""
        self._silent, self._has_turned = 0, True
        self._loop = asyncio.get_running_loop()

    def expect_end(self) -> None:
        """Require the process to end within `stop_within` seconds. Idempotent: the first call counts."""
        self._checks_left = min(self._checks_left, math.ceil(self._stop_within / self._pause))

    def set_stop_timeout(self, stop_within: float) -> None:
        """Set another time for the process to end, from the next stop signal on."""
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
        """Note stop signals, and forward all signals to the loop's descriptor."""
        with contextlib.suppress(OSError):
            numbers = os.read(inlet, 4096)
            if not self._stop_signals.isdisjoint(numbers):
                self.expect_end()
            if before >= 0:
                os.write(before, numbers)

    def _check(self) -> None:
        self._restart_timer()
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
        """Report the reason and the stack of the loop's thread, then end the process.

        The loop may be blocked within a log call and hold a lock of it, so what is not logged in REPORT_TIMEOUT is
        written past it.
        """
        try:
            for write in (_log, _write_past_the_log):
                thread = threading.Thread(target=self._report, args=(code, reason, write), daemon=True)
                thread.start()
                thread.join(REPORT_TIMEOUT)
                if not thread.is_alive():
                    break
        finally:
            self._end(code)

    def _report(self, code: int, reason: str, write: Callable[[str], None]) -> None:
        frame = frames_of_threads().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "  (ended)\n"
        write(f"{reason}; exiting with code {code}. Stack of the main thread:\n{stack.rstrip()}")

    # The timer

    def _arm_timer(self) -> None:
        """Have the stack written before SIGPROF ends the process, unless another handler uses that signal."""
        if signal.getsignal(signal.SIGPROF) is not signal.SIG_DFL:
            return
        with contextlib.suppress(AttributeError, OSError, ValueError):  # there is no standard error
            faulthandler.register(signal.SIGPROF, file=sys.stderr, all_threads=True, chain=True)
        self._has_timer = True
        self._restart_timer()

    def _restart_timer(self) -> None:
        if self._has_timer:
            signal.setitimer(signal.ITIMER_PROF, self._timeout + NATIVE_MARGIN)


def _log(message: str) -> None:
    """Log and wait until it is written, without `Logger.critical`: that takes a lock of the whole logging module."""
    logger.handle(logger.makeRecord(logger.name, logging.CRITICAL, __file__, 0, message, (), None))
    process_output().flush(REPORT_TIMEOUT)


def _write_past_the_log(message: str) -> None:
    os.write(2, f"{message}\n".encode("utf-8", "backslashreplace"))


def scheduling_of(thread: threading.Thread) -> tuple[float, bool]:
    """Return the CPU time of a thread of this process in seconds, and whether it is runnable.

    From `schedstat` and `stat` of Linux (proc(5)); on other systems 0 and False.
    """
    folder = Path(f"/proc/self/task/{thread.native_id}")
    try:
        state = (folder / "stat").read_text(errors="replace").rpartition(") ")[2][:1]
        return int((folder / "schedstat").read_text("ascii").split()[0]) / 1e9, state == "R"
    except (OSError, ValueError, IndexError):
        return 0.0, False
