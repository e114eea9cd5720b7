"""Detects callbacks that block an event loop: a thread samples the stacks of the threads in which a gateway serves.

A callback is identified by its outermost frame in the product, which is a new object for each call. It is reported if

- the loop's thread used more than LIMIT seconds of CPU time between samples of the same callback, or between two
  samples without giving the interpreter lock to this thread, which had been waiting for it, or
- it was asleep in one system call for longer than LIMIT: the number of voluntary context switches, the state and the
  callback are the same in samples that far apart. A thread that waits for a processor is not asleep, and one that
  waits for the interpreter lock wakes every few milliseconds; so a busy machine causes no reports.

A coroutine keeps its frame while it is suspended, so its samples count only until a callback that was scheduled at the
first of them has run. A loop is watched while its server serves; the start may take longer. A thread that is
traced may use more CPU time.
"""

import asyncio
import inspect
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from api_gateway.system.collection import frames_of_threads

LIMIT = 0.05  # seconds
TRACED_FACTOR = 4  # in CPU time: the interpreter calls a trace function for each line when coverage is measured
BUSY_FACTOR = 2  # in CPU time: hardware threads share a core, and processes its caches
PERIOD = 0.01  # seconds between samples
# Seconds of CPU time for each voluntary context switch above which a thread was in one call. The interpreter asks a
# thread for the lock every 5 ms, and it waits each time it gives the lock: to any thread, not always to this one.
ONE_CALL = 0.02
PRODUCT = f"{Path(__file__).resolve().parents[1] / 'api_gateway'}/"

Report = Callable[[str], None]


def cpu_limit() -> float:
    """Return the seconds of CPU time that a callback in this thread may use."""
    is_busy = os.getloadavg()[0] > len(os.sched_getaffinity(0))
    return LIMIT * (TRACED_FACTOR if sys.gettrace() else 1) * (BUSY_FACTOR if is_busy else 1)


@dataclass(eq=False)
class Watched:
    """The thread of a loop, and the callback of the last sample."""

    loop: asyncio.AbstractEventLoop
    ident: int = field(default_factory=threading.get_ident)
    native: int = field(default_factory=threading.get_native_id)
    frame: FrameType | None = None
    cpu: float = 0.0  # at the first sample of this callback
    last: float = 0.0  # at the last sample
    asleep_since: float | None = None
    switches: int = -1  # when it was last seen to fall asleep
    all_switches: int = 0  # at the last sample
    cpu_limit: float = field(default_factory=cpu_limit)
    has_passed: bool = (
        False  # the callback scheduled at the first sample has run, so a coroutine may have been resumed
    )
    is_reported: bool = False

    def __post_init__(self) -> None:
        # Opened once: it is read a hundred times a second, and a test may exhaust the descriptors.
        self._status = os.open(f"/proc/self/task/{self.native}/status", os.O_RDONLY | os.O_CLOEXEC)
        self._clock = time.pthread_getcpuclockid(self.ident)
        self.last = self.now()

    def now(self) -> float:
        return time.clock_gettime(self._clock)

    def start(self, frame: FrameType | None, cpu: float) -> None:
        """Begin to measure a callback."""
        self.frame, self.cpu, self.switches, self.asleep_since = frame, cpu, -1, None
        self.has_passed = self.is_reported = False
        if frame is not None and frame.f_code.co_flags & inspect.CO_COROUTINE:
            with suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._on_passed, id(frame))

    def _on_passed(self, frame: int) -> None:
        self.has_passed = self.has_passed or id(self.frame) == frame

    def state(self) -> tuple[str, int]:
        """Return the thread's state in the kernel, and its number of voluntary context switches."""
        status = os.pread(self._status, 4096, 0)
        _, _, after = status.partition(b"\nState:\t")
        switches = status[status.rindex(b"\nvoluntary_ctxt_switches:") :].split(maxsplit=2)[1]
        return chr(after[0]), int(switches)

    def close(self) -> None:
        """End the observation."""
        os.close(self._status)


class LoopWatch:
    """The sampling thread, for the loops between `begin` and `end`."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._watched: dict[int, Watched] = {}
        self._lock = threading.Lock()
        self._has_loops = threading.Event()
        threading.Thread(target=self._run, name="loop watch", daemon=True).start()

    def begin(self) -> None:
        """Watch the running loop of this thread."""
        self.end()
        with self._lock:
            self._watched[threading.get_ident()] = Watched(asyncio.get_running_loop())
            self._has_loops.set()

    def end(self) -> None:
        """Stop watching this thread."""
        with self._lock:
            watched = self._watched.pop(threading.get_ident(), None)
            if watched is not None:
                watched.close()
            if not self._watched:
                self._has_loops.clear()

    def _run(self) -> None:
        # Opened once, because a test may exhaust the descriptors.
        own = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        delayed, at = _run_delay(own), time.monotonic()
        while True:
            self._has_loops.wait()
            time.sleep(PERIOD)
            now, delay = time.monotonic(), _run_delay(own)
            # Seconds in which this thread was blocked by the interpreter lock only.
            locked_out, delayed, at = (now - at) - (delay - delayed), delay, now
            with self._lock:
                frames = frames_of_threads()
                for watched in self._watched.values():
                    self._sample(watched, _callback(frames.get(watched.ident)), now, locked_out)
                del frames

    def _sample(self, watched: Watched, frame: FrameType | None, now: float, locked_out: float) -> None:
        cpu = watched.now()
        since_last, watched.last = cpu - watched.last, cpu
        state, switches = watched.state()
        switched, watched.all_switches = switches - watched.all_switches, switches
        if frame is None or frame is not watched.frame or watched.has_passed:
            watched.start(frame, cpu)
            is_one_call = since_last > switched * ONE_CALL
            if frame is not None and is_one_call and min(since_last, locked_out) > watched.cpu_limit + PERIOD:
                self._tell(watched, frame, f"{since_last * 1000:.0f} ms of CPU time in one call")
            return
        if cpu - watched.cpu > watched.cpu_limit:
            self._tell(watched, frame, f"{(cpu - watched.cpu) * 1000:.0f} ms of CPU time")
            return
        if state not in "SD" or switches != watched.switches:
            watched.switches, watched.asleep_since = switches, now if state in "SD" else None
        elif watched.asleep_since is None:
            watched.asleep_since = now
        elif now - watched.asleep_since > LIMIT and not _starts_thread(frames_of_threads().get(watched.ident)):
            self._tell(watched, frame, f"asleep for {(now - watched.asleep_since) * 1000:.0f} ms")

    def _tell(self, watched: Watched, frame: FrameType, what: str) -> None:
        if not watched.is_reported:
            watched.is_reported = True
            leaf = frames_of_threads().get(watched.ident)
            stack = "".join(traceback.format_stack(leaf)[-8:])
            self._report(f"{frame.f_code.co_qualname} blocked the event loop: {what}; stack:\n{stack}")


def _callback(leaf: FrameType | None) -> FrameType | None:
    """Return the outermost frame of the product in the running callback; None while the loop waits."""
    found = None
    while leaf is not None and leaf.f_code not in LOOP_CODE:
        if leaf.f_code.co_filename.startswith(PRODUCT):
            found = leaf
        leaf = leaf.f_back
    return found


def _starts_thread(frame: FrameType | None) -> bool:
    """Return whether the thread waits for another one to start, which depends on the scheduler.

    Executors have one lock for all event loops of the process, which is held meanwhile.
    """
    while frame is not None:
        if frame.f_code in STARTS_THREAD:
            return True
        frame = frame.f_back
    return False


def _run_delay(schedstat: int) -> float:
    """Return the seconds that the thread of this open file has waited for a processor while runnable."""
    return int(os.pread(schedstat, 128, 0).split()[1]) / 1e9


STARTS_THREAD = {threading.Thread.start.__code__, ThreadPoolExecutor.submit.__code__}
LOOP_CODE = {asyncio.Runner.run.__code__, asyncio.BaseEventLoop.run_forever.__code__}


def install(report: Report) -> LoopWatch:
    """Watch the loop of each uvicorn server of this process while it serves."""
    watch = LoopWatch(report)
    on_tick, serve = uvicorn.Server.on_tick, uvicorn.Server.serve

    async def watched_tick(self: uvicorn.Server, counter: int) -> bool:
        if counter == 0:
            watch.begin()
        return await on_tick(self, counter)

    async def watched_serve(self: uvicorn.Server, sockets: Any = None) -> None:
        try:
            await serve(self, sockets)
        finally:
            watch.end()

    uvicorn.Server.on_tick = watched_tick  # type: ignore[method-assign]
    uvicorn.Server.serve = watched_serve  # type: ignore[method-assign]
    return watch


def watch_for(folder: str | None) -> None:
    """Watch the loops of this process, if there is a folder to put a file for each report into."""
    if not folder or not Path(folder).is_dir():
        return

    def report(text: str) -> None:
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".txt", delete=False) as file:
            file.write(text)

    install(report)
