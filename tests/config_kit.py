"""Configuration files of tests, and the lines that they are refused with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from api_gateway.config import load_config
from api_gateway.settings.diagnostics import ConfigError

UPSTREAM = "upstreams: {users: http://127.0.0.1:9001}\n"
Write = Callable[..., Path]


def writer(folder: Path) -> Write:
    """Return what writes a text to a file below a folder, by default to `gateway.yaml`."""

    def written(text: str, name: str = "gateway.yaml") -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return written


def refused(path: Path) -> list[str]:
    """Return the lines that a file is refused with, without its folder."""
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return [line.replace(f"{path.parent}/", "") for line in caught.value.problems]
