"""The gateway as a process, ended by its process id."""

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forked import HOOK, MODULES, Fork
from tests.kit import Answer, ask, eventually
from tests.measured import coverage_variables

ROOT = Path(__file__).parent.parent
START = 150.0  # seconds that a start may take on a busy machine
WAYS = {
    "run_gateway.py": [str(ROOT / "run_gateway.py"), "--port", "0"],
    "python -m": ["-m", "api_gateway", "--port", "0"],
}
_SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
_MODULE, _, _FUNCTION = _SCRIPTS["api-gateway"].partition(":")
ALL_WAYS = {
    **WAYS,
    "console script": ["-c", f"import sys; from {_MODULE} import {_FUNCTION}; sys.exit({_FUNCTION}())", "--port", "0"],
}

# Environment that enables the watch of event loops in gateway processes; see `loop_watch`.
REPORTS = Path(tempfile.mkdtemp(prefix="loop-reports-"))
atexit.register(shutil.rmtree, REPORTS, ignore_errors=True)
WATCHED = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'watched'}", "LOOP_WATCH_REPORTS": str(REPORTS)}


@dataclass
class Running:
    """A process of a test, and the files with its output."""

    popen: "subprocess.Popen[bytes] | Fork"
    stdout: Path
    stderr: Path

    @property
    def output(self) -> str:
        """Its standard output so far."""
        return self.stdout.read_text()

    @property
    def errors(self) -> str:
        """Its standard error so far."""
        return self.stderr.read_text()

    @property
    def logged(self) -> list[dict[str, Any]]:
        """The lines of JSON on both streams so far, without one that is still being written."""
        lines = [*self.output.splitlines(keepends=True), *self.errors.splitlines(keepends=True)]
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    @property
    def url(self) -> str:
        """The URL in its startup message, which `log.format: json` makes a message of the log."""
        eventually(lambda: "Listening on" in self._said or self.popen.poll() is not None, "it listens", START)
        found = re.search(r"http://localhost:(\d+)", self._said)
        assert found, self._said
        return f"http://127.0.0.1:{found[1]}"

    @property
    def _said(self) -> str:
        return self.output + self.errors

    @property
    def port(self) -> int:
        """The port in its startup message."""
        return int(self.url.rpartition(":")[2])

    def ask(self, path: str, *, headers: dict[str, str] | None = None, **options: Any) -> Answer:
        """Send a request with the generated token: the tests' process also serves upstreams, so it is not local."""
        url = self.url
        eventually(lambda: "Operator token in " in self.output, "it names its token", START)
        (file,) = re.findall(r"^Operator token in (.+)$", self.output, re.MULTILINE)
        token = (self.stdout.parent / file).read_text().strip()
        return ask(f"{url}{path}", headers={"Authorization": f"Bearer {token}"} | (headers or {}), **options)

    def signal(self, number: int) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def exit_code(self) -> int:
        """Wait for its exit; return the exit code."""
        return self.popen.wait(START)

    def terminate(self) -> int:
        """Send SIGTERM and wait for its exit; return the exit code."""
        self.signal(signal.SIGTERM)
        return self.exit_code()


@contextmanager
def process(*arguments: str, cwd: Path, **environment: str) -> Iterator[Running]:
    """Run Python with these arguments; stop it by its process id at the end.

    `-m api_gateway` and `-m uvicorn` become a fork of a process that has imported them, unless PYTHONPATH is set.
    """
    if arguments[0] == "-m" and arguments[1] in MODULES and "PYTHONPATH" not in environment:
        stdout, stderr = _outputs(cwd)
        variables = _variables(cwd, environment)
        fork = Fork(arguments[1], arguments[2:], cwd=cwd, env=variables, stdout=stdout, stderr=stderr)
        yield from _running(fork, cwd)
    else:
        with fresh_process(*arguments, cwd=cwd, **environment) as running:
            yield running


@contextmanager
def fresh_process(*arguments: str, cwd: Path, **environment: str) -> Iterator[Running]:
    """Run Python with these arguments in a new process; stop it by its process id at the end."""
    stdout, stderr = _outputs(cwd)
    variables = _variables(cwd, environment)
    with stdout.open("wb") as out, stderr.open("wb") as err:
        popen = subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=variables, stdout=out, stderr=err)
    yield from _running(popen, cwd)


def _running(popen: "subprocess.Popen[bytes] | Fork", cwd: Path) -> Iterator[Running]:
    try:
        yield Running(popen, *_outputs(cwd))
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait()


def _outputs(cwd: Path) -> tuple[Path, Path]:
    return cwd / "stdout.txt", cwd / "stderr.txt"


def _variables(cwd: Path, environment: Mapping[str, str]) -> dict[str, str]:
    basic = {"PATH": "/usr/bin:/bin", "PYTHONUNBUFFERED": "1", "XDG_STATE_HOME": str(cwd / "xdg-state")}
    return {**WATCHED, **coverage_variables(), **basic, **environment}


def hooked(folder: Path, text: str) -> dict[str, str]:
    """Return the environment of a forked process that runs this text first, for example to shorten times."""
    path = folder / "hook.py"
    path.write_text(text)
    return {HOOK: str(path)}


def config_file(folder: Path, upstream: str, extra: str = "") -> str:
    """Write a configuration with one upstream; return its path."""
    path = folder / "gateway.yaml"
    path.write_text(f'upstreams: {{up: {{targets: [{{url: "{upstream}"}}]}}}}\n{extra}')
    return str(path)


def reports_of_processes() -> list[str]:
    """Return the new reports of blocked event loops in gateway processes; each is returned once."""
    files = sorted(REPORTS.glob("*.txt"))
    texts = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return texts


# From /proc of Linux


def children(pid: int) -> dict[int, list[str]]:
    """Return the children of a process and their command lines."""
    found: dict[int, list[str]] = {}
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with suppress(OSError):
                    found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().split("\0")[:-1]
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int) -> None:
    """Send SIGKILL to one process."""
    os.kill(pid, signal.SIGKILL)
