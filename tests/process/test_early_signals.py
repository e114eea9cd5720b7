"""Signals that come while the gateway is still being imported: none ends it by mistake, and none with a traceback.

`sitecustomize` stops the import of the command line, until a file is there.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit import ask, eventually
from tests.processes import ALL_WAYS, ROOT, Running, process

LONG = 60.0
HOOK = """
import pathlib, sys, time

FOLDER = pathlib.Path(__file__).parent

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "api_gateway.process.serve_command":
            (FOLDER / "importing").touch()
            while not (FOLDER / "go").exists():
                time.sleep(0.01)

sys.meta_path.insert(0, Stop())
"""


@contextmanager
def importing(way: list[str], folder: Path) -> Iterator[Running]:
    """Start a gateway and stop it where it begins to import what it consists of."""
    hook = folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    with process(*way, cwd=folder, PYTHONPATH=os.pathsep.join((str(hook), str(ROOT)))) as running:
        eventually(lambda: (hook / "importing").exists() or running.popen.poll() is not None, "it imports", LONG)
        assert running.popen.poll() is None, running.errors
        yield running


@pytest.mark.parametrize("way", ALL_WAYS.values(), ids=ALL_WAYS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_it_without_a_word(tmp_path: Path, way: list[str], number: int) -> None:
    with importing(way, tmp_path) as running:
        running.signal(number)
        assert running.exit_code() == 128 + number
        assert (running.output, running.errors) == ("", "")


def test_a_reload_or_a_restart_is_heeded_after_the_start(tmp_path: Path) -> None:
    """That signals are held in each of the ways is shown by those that stop it."""
    with importing(ALL_WAYS["python -m"], tmp_path) as running:
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            running.signal(number)
        (tmp_path / "hook" / "go").touch()
        assert ask(f"{running.url}/healthz").status == 200
        eventually(lambda: "(SIGHUP)" in running.errors, "it reloads", LONG)
        assert running.terminate() == 0, running.errors


def test_an_interrupt_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """A shell starts a background process like that."""
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    code = f"{ignoring} from api_gateway.__main__ import main; raise SystemExit(main())"
    with importing(["-c", code, "--port", "0"], tmp_path) as running:
        running.signal(signal.SIGINT)
        (tmp_path / "hook" / "go").touch()
        assert ask(f"{running.url}/healthz").status == 200
