"""Watches the event loop of a gateway that a test runs as a process of its own; Python imports this at its start."""

import os
import tempfile
from pathlib import Path

_FOLDER = os.environ.get("LOOP_WATCH_REPORTS")


def _report(text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=_FOLDER, suffix=".txt", delete=False) as file:
        file.write(text)


if _FOLDER is not None and Path(_FOLDER).is_dir():
    try:
        from tests.loop_watch import install
    except ImportError:  # a Python without the gateway's dependencies
        pass
    else:
        install(_report)
