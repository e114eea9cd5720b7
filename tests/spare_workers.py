"""Workers that are forked in advance, for the gateways of tests: an executed one imports for a second of CPU time.

A forked gateway (see `forked`) with `--workers N`, or with a file that sets `server.workers` to N, has 2 N of them.
They are forked before anything of the gateway runs, and wait for the descriptors and parameters of a worker. Its
supervisor takes them for its first 2 N workers, of which the second half replace others. Further ones, and those of
`processes.fresh_process`, are executed, as always outside the tests.
"""

import asyncio
import atexit
import ctypes
import fcntl
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from api_gateway.process.worker_config import ENTRY
from api_gateway.system.held_signals import block_signals

MAX_DESCRIPTORS = 64  # of one worker


class Spare:
    """A child of this process that becomes a worker when it is told to, and exits if this process ends before."""

    def __init__(self, others: Sequence["Spare"], prepare: Callable[[], None]) -> None:
        """Fork it. `prepare` is called there, before the worker runs."""
        self.control, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            for one in (self, *others):
                one.control.close()  # else it would not notice the end of this process
            _end_with(lambda: _wait_and_work(theirs, prepare))
        theirs.close()


class SpareProcess:
    """A spare in use, with what the supervisor uses of `asyncio.subprocess.Process`."""

    def __init__(self, spare: Spare, title: str, descriptors: Sequence[int]) -> None:
        self.pid = spare.pid
        self.returncode: int | None = None
        self.stdin = _Input(spare.control)
        message = json.dumps({"title": title, "targets": [0, *descriptors]}).encode()
        socket.send_fds(spare.control, [message], [self.stdin.file, *descriptors])
        self._ended = asyncio.ensure_future(self._reap())

    def send_signal(self, number: int) -> None:
        """Send it a signal. Raises ProcessLookupError if it has ended."""
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    async def wait(self) -> int:
        """Wait for its end; return the exit code, negative for a signal."""
        return await asyncio.shield(self._ended)

    async def _reap(self) -> int:
        loop, descriptor = asyncio.get_running_loop(), os.pidfd_open(self.pid)
        ended = asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])  # noqa: ASYNC222 - it has ended
        return self.returncode


class _Input:
    """The standard input of a spare: a file in memory, complete when it is closed."""

    def __init__(self, control: socket.socket) -> None:
        self.file = os.memfd_create("parameters")
        self._control = control

    def write(self, data: bytes) -> None:
        """Write it; the spare reads from the beginning."""
        os.pwrite(self.file, data, os.fstat(self.file).st_size)

    def close(self) -> None:
        """Let the worker run."""
        os.close(self.file)
        with self._control:
            self._control.sendall(b".")


def install(arguments: Sequence[str], prepare: Callable[[], None]) -> None:
    """Fork two spares for each worker; a supervisor in this process uses them for its first workers."""
    number = _number_of_workers(arguments)
    if number < 2:  # one process serves itself
        return
    spares: list[Spare] = []
    for _ in range(2 * number):
        spares.append(Spare(spares, prepare))
    execute: Any = asyncio.create_subprocess_exec

    async def start(*command: str, **options: Any) -> Any:
        if ENTRY not in command or not spares:
            return await execute(*command, **options)
        return SpareProcess(spares.pop(0), command[-1], options["pass_fds"])

    asyncio.create_subprocess_exec = start  # type: ignore[assignment]


def _number_of_workers(arguments: Sequence[str]) -> int:
    """Return what the command line says, or the file that it names; 0 for anything but a number."""
    if "--workers" in arguments:
        text = arguments[arguments.index("--workers") + 1]
        return int(text) if text.isdigit() else 0
    if "--config" not in arguments:
        return 0
    try:
        sections = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())
        found = sections["server"]["workers"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return 0
    return found if isinstance(found, int) else 0


def _wait_and_work(control: socket.socket, prepare: Callable[[], None]) -> None:
    message, received, *_ = socket.recv_fds(control, 65_536, MAX_DESCRIPTORS)
    if not message:
        return
    order = json.loads(message)
    # First beyond all numbers that are to be taken, then to their numbers.
    beyond = max(order["targets"]) + 1
    moved = [fcntl.fcntl(one, fcntl.F_DUPFD, beyond) for one in (control.fileno(), *received)]
    control.close()
    for one in received:
        os.close(one)
    for one, target in zip(moved[1:], order["targets"], strict=True):
        os.dup2(one, target)
        os.close(one)
    is_complete = os.read(moved[0], 1) != b""
    os.close(moved[0])
    if not is_complete:
        return
    os.setpgid(0, 0)
    block_signals()  # as the supervisor had when it would have executed it
    _set_title(f"python\0-c\0{order['title']}")
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the descriptor is not this object's
    sys.argv = ["-c", order["title"]]
    prepare()
    exec(ENTRY, {"__name__": "__main__"})  # noqa: S102 - what is executed otherwise


def _end_with(run: Callable[[], None]) -> None:
    """End this process as an interpreter ends after `run`."""
    code = 0
    try:
        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:  # noqa: BLE001 - the outermost frame
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _set_title(title: str) -> None:
    """Write over the arguments of this process, which /proc shows."""
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    first, rest = title.encode().split(b"\0", 1)
    padded = b"%b\0%b\0" % (first.ljust(end - start - len(rest) - 2), rest)
    ctypes.memmove(start, padded[: end - start], end - start)
