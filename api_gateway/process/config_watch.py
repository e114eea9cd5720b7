"""The sources of the configuration, and a watch that reloads it when their files change.

The watch compares the contents about once a second, in a thread, so that it notices every kind of change: writing in
place, renaming another file to the name, and replacing a symbolic link in the path, as Kubernetes does. It reloads
after two checks with the same contents, so that a partly written file is not read.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from api_gateway.config import ENV_FILE, GatewayConfig, LoadedConfig, config_path, read_config
from api_gateway.process.start_check import file_errors
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.included_files import WILDCARDS, matching_files
from api_gateway.settings.secret import noting_files

logger = logging.getLogger(__name__)

CONFIG_POLL_INTERVAL = 1.0  # seconds between checks
_PIECE = 1_048_576  # bytes

_CLOCK_TICK_NS = 20_000_000  # by which the times of files may lag behind
_UNKNOWN = b""  # in place of a digest

Contents = Mapping[Path, bytes | None]


class ConfigSource:
    """Reads the configuration from its sources. `files`: those of the last success, and of failures since.

    `contents` are those of the last success, as far as they are known: no file that has changed meanwhile is equal.
    """

    def __init__(self, path: str | None, overrides: Mapping[str, Any]) -> None:
        """`path` and `overrides` are as in `load_config`."""
        self._path = path
        self._overrides = overrides
        self.files: frozenset[Path] = frozenset()
        self.contents: Contents = {}
        self._warnings: set[str] = set()

    def __repr__(self) -> str:
        return f"<ConfigSource [{len(self.files)} files]>"

    def __call__(self) -> GatewayConfig:
        """Read the configuration for a reload. Blocks. Raises ConfigError, also for files that cannot be used."""
        loaded = self.load()
        found = [f"{loaded.sources.origin(one.path)}{one}" for one in file_errors(loaded.config)]
        if found:
            raise ConfigError(found)
        return loaded.config

    def _warn(self, message: str) -> None:
        """Log a message only once, not at every reload."""
        if message not in self._warnings:
            self._warnings.add(message)
            logger.warning("%s", message)

    def load(self) -> LoadedConfig:
        """Read the configuration and update `files`, even on failure. Blocks. Raises ConfigError."""
        found = {Path(ENV_FILE)}
        chosen = config_path(self._path)
        if chosen is not None:
            found.add(chosen)
        began, before = time.time_ns(), contents_of(found | self.files)
        try:
            with noting_files(found):
                loaded = read_config(self._path, self._overrides, warn=self._warn)
        except BaseException:
            self.files |= found
            raise
        self.files = frozenset(found | _tls_files(loaded.config))
        self.contents = {
            path: _UNKNOWN if before.get(path, digest) != digest or _has_changed_since(path, began) else digest
            for path, digest in contents_of(self.files).items()
        }
        return loaded


class ConfigWatch:
    """Calls `reload` when the contents of a source's files have changed; `interval` in seconds."""

    def __init__(
        self, source: ConfigSource, reload: Callable[[], Awaitable[object]], interval: float = CONFIG_POLL_INTERVAL
    ) -> None:
        self._source = source
        self._reload = reload
        self._interval = interval

    def __repr__(self) -> str:
        return f"<ConfigWatch of {self._source!r}>"

    async def run(self) -> None:
        """Watch until cancelled, for changes since the configuration was read."""
        seen = changed = self._source.contents
        while True:
            await asyncio.sleep(self._interval)
            found = await self._check()
            if found == changed != seen:
                await self._reload()
                # The contents that the reload read are unknown, so the contents before it are the reference.
                found = {**await self._check(), **{path: found[path] for path in found if path in self._source.files}}
                seen = found
            changed = found

    async def _check(self) -> Contents:
        return await asyncio.to_thread(contents_of, self._source.files)


def _has_changed_since(path: Path, time_ns: int) -> bool:
    """Return whether a file has been written, or put in its place, since about that time."""
    try:
        return path.stat().st_ctime_ns >= time_ns - _CLOCK_TICK_NS
    except OSError:
        return False


def contents_of(files: Iterable[Path]) -> Contents:
    """Return a digest of each file, None if it cannot be read. Blocks."""
    return {path: _digest(path) for path in files}


def _digest(path: Path) -> bytes | None:
    digest = hashlib.blake2b(digest_size=16)
    if not path.is_file() and any(
        one in str(path) for one in WILDCARDS
    ):  # of files that are included: which there are
        digest.update("\0".join(map(str, matching_files(path))).encode(errors="surrogateescape"))
        return digest.digest()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError:
        return None
    return digest.digest()


def _tls_files(config: GatewayConfig) -> set[Path]:
    sections = [upstream.tls for upstream in config.upstreams.values()]
    return {
        path
        for section in sections
        for path in (section.ca_file, section.cert_file, section.key_file)
        if path is not None
    }
