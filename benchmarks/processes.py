"""Measured processes: started on one core, measured by /proc, stopped by their id. Linux only."""

import os
import resource
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from api_gateway.storage.embedded_server import find_server

LISTEN_TIMEOUT = 60.0
STOP_TIMEOUT = 40.0
_TICK = os.sysconf("SC_CLK_TCK")
_PARENT, _USER = 1, 11  # fields of /proc/<pid>/stat after the name: ppid; utime, stime, cutime, cstime


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Pin this thread, and the processes that it starts, to one core within this block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running(
    command: Sequence[str], *, core: int, port: int, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Start a server on a core, wait until it listens on `port`, yield its process id, and stop it afterwards.

    Its working folder is `folder`, which also gets its output; the end of the output is shown if it does not start.
    The gateway's variables are removed from its environment. Raises RuntimeError.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("GATEWAY_")}
    log = folder / "output.log"
    with pinned(core), log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - fixed arguments
            command,
            cwd=folder,
            env=inherited | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        if not _listens(process, port):
            end = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{Path(command[0]).name} does not listen on port {port}; its output:\n{end}")
        yield process.pid
    finally:
        _stop(process)


def _listens(process: "subprocess.Popen[bytes]", port: int) -> bool:
    deadline = time.monotonic() + LISTEN_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def store_command(port: int) -> list[str]:
    """Return the command of a store on `port` without persistence. Raises NoServer."""
    return [find_server(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]


def raise_file_limit() -> None:
    """Raise the limit of open files of this process and of those that it starts to what is permitted."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def family(pid: int) -> list[int]:
    """Return a process and all its running descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[_PARENT]), []).append(int(entry.name))
    found = [pid]
    for one in found:  # grows during the iteration
        found.extend(children.get(one, ()))
    return found


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of a process and its descendants, including those it has waited for."""
    ticks = sum(int(ticks) for one in family(pid) for ticks in _stat(one)[_USER : _USER + 4])
    return ticks / _TICK


def resident_bytes(pid: int, *, peak: bool = False) -> int:
    """Return the resident memory of a process and its descendants, now or at its peak."""
    word = "VmHWM:" if peak else "VmRSS:"
    return sum(_status_kib(one, word) for one in family(pid)) * 1024


def reset_peak(pid: int) -> None:
    """Reset the peak of resident memory (proc(5), clear_refs)."""
    for one in family(pid):
        Path(f"/proc/{one}/clear_refs").write_text("5")


def _stat(pid: int) -> list[str]:
    """Return the fields after the name, which may contain any character; none if the process has exited."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _status_kib(pid: int, word: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(word)), 0)
