"""Loads an extension in a process of its own before the gateway does, so that a bad one cannot end or stop it.

Run as a program, this module reads what to load from its standard input, and writes the problem or null.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from api_gateway.extensions.loading import ExtensionError, load_extension

_LONGEST = 400  # characters of a message


def try_extension(
    name: str, use: str, options: Mapping[str, Any], seconds: float, configured: Collection[str] = ()
) -> str | None:
    """Return why an extension cannot be loaded; None if it can. Blocks for `seconds` at most.

    `configured` are the hooks that have settings. The process has the environment, the working directory and the
    import path of this one.
    """
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "api_gateway.extensions.trial"],  # -P: the import path is exactly this one
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
        start_new_session=True,
    )
    given = json.dumps([name, use, dict(options), list(configured)], default=str).encode()
    try:
        reported, complaints = child.communicate(given, timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with all that it has started; it has not been waited for
        child.communicate()
        return f"it was not loaded within {seconds:g} s"
    if reported:
        problem: str | None = json.loads(reported)
        return None if problem is None else problem[:_LONGEST]
    lines = complaints.decode(errors="replace").strip().splitlines()
    why = f"it ended the process with code {child.returncode}" + (f": {lines[-1]}" if lines else "")
    return why[:_LONGEST]


def main() -> None:
    """Load what standard input asks for."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the extension prints is not the report
    given = json.load(sys.stdin)
    problem = None
    try:
        load_extension(*given)
    except ExtensionError as error:
        problem = str(error)
    output.write(json.dumps(problem))
    output.flush()
    os._exit(0)  # without waiting for threads that the extension has started


if __name__ == "__main__":
    main()
