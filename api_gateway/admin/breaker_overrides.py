"""The modes that operators have put breakers in: one small file, which all workers of a gateway read and change.

A change is written whole to another file that then takes the place of the first, so whoever reads finds one or the
other. A file that cannot be used changes nothing: what was in force stays in force, and the trouble is told.
"""

import asyncio
import fcntl
import json
import logging
import os
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
from api_gateway.system.state_folder import make_private, open_private

logger = logging.getLogger(__name__)

OVERRIDES_FILE = "circuit_breakers.json"
OVERRIDES_POLL_INTERVAL = 0.25  # seconds between two looks at the file
_KEYS = ("mode", "since", "until", "comment", "set_by")


class InvalidOverrideFile(Exception):
    """The file holds something else than modes; the message names the file, the place and the value."""


@dataclass(frozen=True, slots=True)
class Override:
    """A mode that an operator has set. Times are seconds since the epoch; `until` None is until it is changed."""

    mode: Mode
    since: float
    until: float | None
    comment: str
    set_by: str

    def is_over(self, wall: float) -> bool:
        """Tell whether it has ended by itself."""
        return self.until is not None and wall >= self.until


Overrides = dict[str, Override]


class OverrideFile:
    """The file in `state_dir`. All methods block."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / OVERRIDES_FILE

    def __repr__(self) -> str:
        return f"<OverrideFile [{self.path}]>"

    def signature(self) -> tuple[int, int, int] | None:
        """Return what differs between two contents; None if there is no file."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def read(self) -> Overrides:
        """Return the modes by breaker. Raises InvalidOverrideFile, or OSError."""
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
        try:
            return _parsed(content)
        except InvalidOverrideFile as error:
            raise InvalidOverrideFile(f"{self.path}: {error}") from None

    def change(self, name: str, override: Override | None, wall: float) -> tuple[Override | None, Overrides]:
        """Write one mode, or take it out; return the one before and all that are in force. Raises as `read` does."""
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
        """Keep other processes from changing it meanwhile."""
        with open_private(self.path.with_suffix(".lock")) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, overrides: Mapping[str, Override]) -> None:
        content = {"circuit_breakers": {name: _written(one) for name, one in sorted(overrides.items())}}
        fresh = self.path.with_suffix(".new")
        with open_private(fresh) as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)


class BreakerOverrides:
    """Keeps breakers in the modes that the file says, and changes it."""

    def __init__(
        self,
        file: OverrideFile,
        breakers: Mapping[str, CircuitBreaker],
        *,
        clock: Clock,
        wall_clock: Callable[[], float],
    ) -> None:
        self.error: str | None = None  # why the file cannot be used, while it cannot
        self._file = file
        self._breakers = breakers
        self._clock = clock
        self._wall_clock = wall_clock
        self._seen: object = ()
        self._overrides: Overrides = {}
        self._overrides_in_force = dict.fromkeys(breakers, Mode.AUTO)
        self._lock = asyncio.Lock()  # what was read before a change is not taken for what is there after it

    def __repr__(self) -> str:
        return f"<BreakerOverrides [{len(self._overrides)} overrides]>"

    def follow(self, breakers: Mapping[str, CircuitBreaker]) -> None:
        """Keep these breakers in their modes from now on, and no others."""
        self._breakers = dict(breakers)
        self._overrides_in_force = {name: self._overrides_in_force.get(name, Mode.AUTO) for name in breakers}
        self._apply()

    @property
    def names(self) -> list[str]:
        """The names of the breakers."""
        return list(self._breakers)

    def override(self, name: str) -> Override | None:
        """Return what an operator has set for a breaker, unless it is over."""
        found = self._overrides.get(name)
        return None if found is None or found.is_over(self._wall_clock()) else found

    async def follow_file(self) -> None:
        """Follow the file until cancelled."""
        while True:
            await asyncio.sleep(OVERRIDES_POLL_INTERVAL)
            await self.refresh()

    async def refresh(self) -> None:
        """Read the file if it has changed, and see to it that the breakers are as it says."""
        async with self._lock:
            try:
                await self._read()
            except (InvalidOverrideFile, OSError) as error:
                if str(error) != self.error:
                    self.error = str(error)
                    logger.error("modes of circuit breakers stay as they are: %s", error)  # noqa: TRY400 - it says all
                if isinstance(error, OSError):
                    self._seen = ()
            self._apply()

    async def set(self, name: str, override: Override | None) -> Override | None:
        """Put a breaker into a mode, on disk first; return what was in force. Raises StoreUnavailable."""
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
            self._seen = seen  # also if it cannot be used: that is said once
            self._overrides = await asyncio.to_thread(self._file.read)
            self.error = None
            for name in sorted(set(self._overrides) - set(self._breakers)):
                logger.warning("%r: circuit_breakers.%s: there is no such upstream", self._file, name)

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
    """Return the modes in a parsed file. Raises InvalidOverrideFile, naming the place."""
    breakers = content.get("circuit_breakers") if isinstance(content, dict) else None
    if not isinstance(breakers, dict):
        raise InvalidOverrideFile("must hold an object circuit_breakers")
    return {name: _parsed_override(f"circuit_breakers.{name}", given) for name, given in breakers.items()}


def _parsed_override(place: str, given: Any) -> Override:
    if not isinstance(given, dict) or set(given) != set(_KEYS):
        raise InvalidOverrideFile(f"{place}: must hold {', '.join(_KEYS)}, got {given!r}")
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
            f"{place}: must be a moment with its offset, such as 2026-12-01T00:00:00Z, got {text!r}"
        )
    return found.timestamp()


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
