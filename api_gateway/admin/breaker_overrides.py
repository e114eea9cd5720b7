"""The circuit breaker modes that operators have set, in one file that all workers of a gateway read and change.

A change writes a new file and renames it over the old one, so a reader sees either version, never a part. If the file
is invalid or unreadable, the modes in force stay in force, and the error is logged and shown.
"""

import asyncio
import fcntl
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.errors import StoreUnavailable
from api_gateway.models import Clock
from api_gateway.resilience.breaker_policy import Mode
from api_gateway.system.state_folder import make_private, open_private, replacing
from api_gateway.system.state_version import newer_state

logger = logging.getLogger(__name__)

OVERRIDES_FILE = "circuit_breakers.json"
OVERRIDES_VERSION = 1  # of the file; one that states none has it, too
OVERRIDES_POLL_INTERVAL = 0.25  # seconds between two checks of the file
_KEYS = ("mode", "since", "until", "comment", "set_by")


class InvalidOverrideFile(Exception):
    """The file has invalid content; the message names the file, the place and the value."""


@dataclass(frozen=True, slots=True)
class Override:
    """A mode that an operator has set. Times are seconds since the epoch; without `until` it has no end."""

    mode: Mode
    since: float
    until: float | None
    comment: str
    set_by: str

    def is_over(self, wall: float) -> bool:
        """Return whether the override has expired at `wall`, in seconds since the epoch."""
        return self.until is not None and wall >= self.until


Overrides = dict[str, Override]


class OverrideFile:
    """The file `circuit_breakers.json` in `state_dir`. All methods block."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / OVERRIDES_FILE

    def __repr__(self) -> str:
        return f"<OverrideFile [{self.path}]>"

    def signature(self) -> tuple[int, int, int] | None:
        """Return modification time, size and inode, to detect a change; None if there is no file."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def read(self) -> Overrides:
        """Return the overrides by breaker; none if there is no file. Raises InvalidOverrideFile and OSError."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except UnicodeDecodeError as error:
            raise InvalidOverrideFile(f"{self.path}: not UTF-8: {error.reason} at byte {error.start}") from error
        try:
            content = json.loads(text)
        except ValueError as error:
            place = f"{error.lineno}:{error.colno}: " if isinstance(error, json.JSONDecodeError) else ""
            raise InvalidOverrideFile(f"{self.path}:{place}not JSON: {getattr(error, 'msg', error)}") from error
        version = content.get("version", OVERRIDES_VERSION) if isinstance(content, dict) else OVERRIDES_VERSION
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise InvalidOverrideFile(f"{self.path}: version: must be a whole number from 1, got {version!r}")
        if version > OVERRIDES_VERSION:
            raise InvalidOverrideFile(newer_state(self.path, version, OVERRIDES_VERSION))
        try:
            return _parsed(content)
        except InvalidOverrideFile as error:
            raise InvalidOverrideFile(f"{self.path}: {error}") from None

    def change(self, name: str, override: Override | None, wall: float) -> tuple[Override | None, Overrides]:
        """Set the override of one breaker, or remove it (None), and drop expired ones.

        Returns the previous override and all that are now in force. Raises InvalidOverrideFile and OSError.
        """
        make_private(self.path.parent)
        with self._locked():
            overrides = {key: value for key, value in self.read().items() if not value.is_over(wall)}
            before = overrides.pop(name, None)
            if override is not None:
                overrides[name] = override
            self._write(overrides)
        return before, overrides

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock that serializes changes by several processes."""
        with open_private(self.path.with_suffix(".lock")) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, overrides: Mapping[str, Override]) -> None:
        content = {
            "version": OVERRIDES_VERSION,
            "circuit_breakers": {name: _written(one) for name, one in sorted(overrides.items())},
        }
        with replacing(self.path, self.path.with_suffix(".new")) as file:
            file.write(json.dumps(content, indent=2) + "\n")


class BreakerOverrides:
    """Applies the modes in the file to the breakers of this process, and changes the file.

    `error` is why the file cannot be used, None if it can; while it cannot, the last valid overrides stay in force.
    """

    def __init__(
        self,
        file: OverrideFile,
        breakers: Mapping[str, CircuitBreaker],
        *,
        clock: Clock,
        wall_clock: Callable[[], float],
    ) -> None:
        self.error: str | None = None
        self._file = file
        self._breakers = breakers
        self._clock = clock
        self._wall_clock = wall_clock
        self._seen: object = ()
        self._overrides: Overrides = {}
        self._overrides_in_force = dict.fromkeys(breakers, Mode.AUTO)
        self._lock = asyncio.Lock()  # a change must not be overwritten by content that was read before it

    def __repr__(self) -> str:
        state = "in use" if self.error is None else "file unusable"
        return f"<BreakerOverrides [{len(self._overrides)} overrides, {state}]>"

    def follow(self, breakers: Mapping[str, CircuitBreaker]) -> None:
        """Replace the breakers, after a reload, and apply the modes to the new ones."""
        self._breakers = dict(breakers)
        self._overrides_in_force = {name: self._overrides_in_force.get(name, Mode.AUTO) for name in breakers}
        self._apply()

    @property
    def names(self) -> list[str]:
        """Names of the breakers, which are those of their upstreams."""
        return list(self._breakers)

    def override(self, name: str) -> Override | None:
        """Return the override of a breaker; None if there is none or it has expired."""
        found = self._overrides.get(name)
        return None if found is None or found.is_over(self._wall_clock()) else found

    async def follow_file(self) -> None:
        """Apply changes of the file every `OVERRIDES_POLL_INTERVAL` seconds, until cancelled."""
        while True:
            await asyncio.sleep(OVERRIDES_POLL_INTERVAL)
            await self.refresh()

    async def refresh(self) -> None:
        """Read the file if it has changed, and apply the modes. An error is logged once and kept in `error`."""
        async with self._lock:
            try:
                await self._read()
            except (InvalidOverrideFile, OSError) as error:
                if str(error) != self.error:
                    self.error = str(error)
                    logger.error("circuit breaker modes unchanged: %s", error)  # noqa: TRY400 - the message is enough
                if isinstance(error, OSError):
                    self._seen = ()
            self._apply()

    async def set(self, name: str, override: Override | None) -> Override | None:
        """Write an override (None: remove it) to disk, then apply it. Returns the previous one.

        Raises StoreUnavailable if the file cannot be read or written.
        """
        async with self._lock:
            try:
                before, self._overrides = await asyncio.to_thread(
                    self._file.change, name, override, self._wall_clock()
                )
            except (InvalidOverrideFile, OSError) as error:
                raise StoreUnavailable(f"The mode was not changed: {error}.", retry_after=1) from error
            self._apply()
        return before

    async def _read(self) -> None:
        seen = await asyncio.to_thread(self._file.signature)
        if seen != self._seen:
            self._seen = seen  # before reading, so that invalid content is reported once
            self._overrides = await asyncio.to_thread(self._file.read)
            self.error = None
            for name in sorted(set(self._overrides) - set(self._breakers)):
                logger.warning("%s: circuit_breakers.%s: there is no such upstream", self._file.path, name)

    def _apply(self) -> None:
        now, wall = self._clock(), self._wall_clock()
        for name, breaker in self._breakers.items():
            found = self.override(name)
            mode = Mode.AUTO if found is None else found.mode
            until = None if found is None or found.until is None else now + found.until - wall
            if mode is not self._overrides_in_force[name]:
                logger.warning(
                    "circuit breaker %s: mode %s -> %s%s",
                    name,
                    self._overrides_in_force[name],
                    mode,
                    _description(found),
                )
            self._overrides_in_force[name] = mode
            breaker.set_mode(mode, now, until)
            breaker.advance(now)


def _description(override: Override | None) -> str:
    if override is None:
        return ""
    return f", set by {override.set_by}" + (f": {override.comment}" if override.comment else "")


def _written(override: Override) -> dict[str, Any]:
    until = None if override.until is None else _iso(override.until)
    return {
        "mode": override.mode.value,
        "since": _iso(override.since),
        "until": until,
        "comment": override.comment,
        "set_by": override.set_by,
    }


def _parsed(content: Any) -> Overrides:
    """Return the overrides in a parsed file. Raises InvalidOverrideFile, which names the place."""
    breakers = content.get("circuit_breakers") if isinstance(content, dict) else None
    if not isinstance(breakers, dict):
        raise InvalidOverrideFile("must have an object circuit_breakers")
    return {name: _parsed_override(f"circuit_breakers.{name}", given) for name, given in breakers.items()}


def _parsed_override(place: str, given: Any) -> Override:
    if not isinstance(given, dict) or set(given) != set(_KEYS):
        raise InvalidOverrideFile(f"{place}: must have {', '.join(_KEYS)}, got {given!r}")
    for key in _KEYS:
        if not isinstance(given[key], str) and not (key == "until" and given[key] is None):
            raise InvalidOverrideFile(f"{place}.{key}: must be text, got {given[key]!r}")
    modes = [mode.value for mode in Mode if mode is not Mode.AUTO]
    if given["mode"] not in modes:
        raise InvalidOverrideFile(f"{place}.mode: must be one of {', '.join(modes)}, got {given['mode']!r}")
    until = None if given["until"] is None else _timestamp(f"{place}.until", given["until"])
    since = _timestamp(f"{place}.since", given["since"])
    return Override(Mode(given["mode"]), since, until, given["comment"], given["set_by"])


def _timestamp(place: str, text: str) -> float:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise InvalidOverrideFile(
            f"{place}: must be a time with a UTC offset, such as 2026-12-01T00:00:00Z, got {text!r}"
        )
    return found.timestamp()


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
