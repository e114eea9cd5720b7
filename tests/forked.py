"""Starts the command line, or uvicorn, in a fork of a process that has imported it.

The imports of one start take a second of CPU time, and some two hundred tests start a gateway. What a fork cannot
show, such as how a fresh interpreter starts, is for `processes.fresh_process`.
"""

import atexit
import gc
import multiprocessing
import multiprocessing.process
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

from api_gateway.admin.routers import ROUTERS
from tests import spare_workers
from tests.loop_watch import watch_for
from tests.measured import VARIABLE, measure_into

PRELOADED = [
    "api_gateway.cli",
    "api_gateway.process.serve_command",
    "api_gateway.process.operator_access",
    "api_gateway.process.server",
    "api_gateway.process.supervisor",
    "api_gateway.process.worker",
    *(f"api_gateway.admin.{module}" for module, _, _ in ROUTERS),
    "api_gateway.admin.health_view",
    "api_gateway.assembly.shared_store",
    "anyio._backends._asyncio",
    "tests.forked",
    "uvloop",
    "uvicorn.loops.uvloop",
]
MODULES = ("api_gateway", "uvicorn")
HOOK = "TESTS_HOOK"  # in the environment: a file that is run first, as a `sitecustomize` of a new process would be


def _run(
    module: str, arguments: Sequence[str], cwd: str, variables: Mapping[str, str], outputs: Sequence[str]
) -> None:
    """Become `python -m MODULE` with these arguments, in the forked process."""
    gc.freeze()  # else a collection visits, and so copies, all that was imported before the fork, in one callback
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    for descriptor, path in enumerate((os.devnull, *outputs)):
        opened = os.open(path, os.O_WRONLY if descriptor else os.O_RDONLY)
        os.dup2(opened, descriptor)
        if opened != descriptor:
            os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing's has a descriptor that is not inherited
    sys.argv = [module, *arguments]
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]  # the gateway is nobody's worker
    if HOOK in os.environ:
        runpy.run_path(os.environ[HOOK])
    spare_workers.install(arguments, _observe)
    _observe()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without them


def _observe() -> None:
    measure_into(os.environ.get(VARIABLE))
    watch_for(os.environ.get("LOOP_WATCH_REPORTS"))


class Fork:
    """A forked process, with what the tests use of `subprocess.Popen`."""

    def __init__(
        self, module: str, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path
    ) -> None:
        for path in (stdout, stderr):
            path.write_bytes(b"")  # now, and not once the fork comes to it: a former process may have left its output
        outputs = (str(stdout), str(stderr))
        self._process = _context().Process(target=_run, args=(module, arguments, str(cwd), env, outputs))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.returncode: int | None = None

    def __repr__(self) -> str:
        return f"<Fork {self.pid} [{self.returncode}]>"

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("api_gateway", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to stop."""
        if self.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            self._process.kill()


def _context() -> ForkServerContext:
    """Return the context whose server, which it starts for the first process, has imported the gateway."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
