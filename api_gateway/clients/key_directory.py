"""The API keys of clients: found for requests, changed for operators, and the times of their last use.

Keys are a part of client records, so that they reach other processes as tiers do. Keys of the configuration do not
change.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum

from api_gateway.clients.api_keys import ApiKey, KnownKey, key_id
from api_gateway.clients.cache import ClientCache
from api_gateway.clients.lookup_batcher import LOOKUP_BATCH, LookupBatcher
from api_gateway.clients.records import (
    UNCHANGED,
    Change,
    ClientRecord,
    ClientStore,
    KeyChange,
    KeyRefusal,
    Replacement,
    Unchanged,
    key_entry,
)
from api_gateway.clients.unusable_keys import warning_of
from api_gateway.eventloop.steps import Steps, run_in_steps
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Clock

logger = logging.getLogger(__name__)

USE_PRECISION = 60  # seconds
_FLUSH_INTERVAL = 30.0  # seconds between two writes of last uses
_MAX_USES = 100_000  # uses that are kept while the store is unavailable
_RETENTION = 30 * 86_400.0  # seconds for which an expired key is listed


class KeyState(Enum):
    """The knowledge about a key that is not held."""

    ABSENT = "absent"  # no client has it
    UNAVAILABLE = "unavailable"  # the store, which might know the key, is unavailable
    UNKNOWN = "unknown"  # the store must be asked


class KeyNotAdded(Exception):
    """A key was not added, and nothing was changed: `refusal` is why, `record` is that of the client."""

    def __init__(self, refusal: KeyRefusal, record: ClientRecord) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal
        self.record = record


class KeyDirectory:
    """API keys by their digest. Held keys are those of the held client records, and those of the configuration.

    States: current; and outdated, from `outage_tolerance` seconds after the store became unavailable until it is
    available again. A revocation might have been missed meanwhile, so an outdated directory knows no stored key.
    """

    def __init__(
        self,
        store: ClientStore,
        *,
        cache: Callable[[], ClientCache],
        configured: Callable[[], Mapping[str, KnownKey]],
        is_store_available: Callable[[], bool],
        write: Callable[[str, Change], Awaitable[ClientRecord]],
        on_lookup: Callable[[str, ClientRecord | None, bool], None],
        bump_version: Callable[[], None],
        wall_clock: Clock,
        limit: int,
        deadline: float,
        outage_tolerance: float,
    ) -> None:
        """`write` makes a change and returns the record after it. `on_lookup` holds the result of a look-up."""
        self.wall_clock = wall_clock
        self.outage_tolerance = outage_tolerance
        self._store = store
        self._cache, self._configured = cache, configured
        self._is_store_available = is_store_available
        self._write = write
        self._bump_version = bump_version
        self._is_source = True
        self._routes: frozenset[str] | None = None  # names of all routes; None: not known
        self._warning: asyncio.Task[None] | None = None
        self._is_current = True
        self._outage: asyncio.TimerHandle | None = None
        self._hold = on_lookup
        self._just_absent: str | None = None  # digest of the last look-up, if no client has that key
        self._uses: dict[str, int] = {}  # not yet stored
        self.uses_error: str | None = None  # of the last write of them
        self._lookups = LookupBatcher[KnownKey | KeyState](
            store.look_up_keys, self._on_lookup, self._now, bump_version, limit=limit + LOOKUP_BATCH, deadline=deadline
        )

    def __repr__(self) -> str:
        state = "current" if self._is_current else "outdated"
        return f"<KeyDirectory [{len(self._cache().keys)} keys held, {len(self._configured())} configured, {state}]>"

    def change(self, *, outage_tolerance: float, is_source: bool, routes: frozenset[str]) -> None:
        """Apply the settings of a configuration, and log which stored keys they make useless.

        `is_source`: keys are a source of identities. `routes` are the names of all routes.
        """
        self.outage_tolerance, self._is_source, self._routes = outage_tolerance, is_source, routes
        self._warn()

    def _warn(self) -> None:
        """Log which of the keys held cannot be used, in a task, because there may be many."""
        if self._warning is not None:
            self._warning.cancel()
        cache = self._cache()
        if self._routes is None or not cache.keys:
            return
        steps = warning_of(
            list(cache.keys.values()),
            self.wall_clock(),
            is_source=self._is_source,
            routes=self._routes,
            is_complete=cache.is_complete,
        )
        self._warning = asyncio.get_running_loop().create_task(_log(steps), name="stored keys that cannot be used")

    @property
    def is_empty(self) -> bool:
        """True if there certainly are no keys."""
        cache = self._cache()
        return cache.is_complete and not cache.keys and not self._configured()

    # For requests

    def find(self, digest: str) -> KnownKey | KeyState:
        """Return a key and its client, also if it has expired; or what is known of it."""
        known = self._configured().get(digest)
        if known is not None:
            return known
        cache = self._cache()
        known = cache.keys.get(digest)
        if known is not None:
            return known if self._is_current else KeyState.UNAVAILABLE
        if not self._is_store_available():
            return KeyState.UNAVAILABLE
        entry = key_entry(digest)
        if cache.is_complete or cache.surely_absent(entry) or cache.knows(entry):
            return KeyState.ABSENT
        return KeyState.UNAVAILABLE if self._lookups.is_late(digest) else KeyState.UNKNOWN

    async def look_up(self, digest: str) -> KnownKey | KeyState:
        """Look a key up in the store; the result is never UNKNOWN."""
        return await self._lookups.look_up(digest)

    def _on_lookup(self, digest: str, record: ClientRecord | None, was_late: bool) -> None:  # noqa: FBT001 - a callback
        is_absent = record is None or all(key.digest != digest for key in record.keys)
        self._just_absent = digest if is_absent else None
        self._hold(digest, record, was_late)

    def _now(self, digest: str) -> KnownKey | KeyState:
        if digest == self._just_absent:  # the cache may have no room to remember it
            self._just_absent = None
            return KeyState.ABSENT
        found = self.find(digest)
        return KeyState.UNAVAILABLE if found is KeyState.UNKNOWN else found

    def retry_now(self, record: ClientRecord) -> None:
        """Permit look-ups of the keys of a record."""
        for key in record.keys:
            self._lookups.retry_now(key.digest)

    @property
    def is_looking_up(self) -> bool:
        """Return whether a look-up is in progress, which may return the record of any client as it was before."""
        return not self._lookups.is_idle

    # For operators

    async def create(self, client_id: str, key: ApiKey, *, verified_only: bool | Unchanged) -> ClientRecord:
        """Add a key durably; remove those that expired long ago. Raises StoreUnavailable and KeyNotAdded."""
        change = KeyChange(add=key, remove=self._expired_long_ago(client_id))
        return await self._add(client_id, key, change, verified_only=verified_only)

    async def rotate(self, client_id: str, digest: str, key: ApiKey, until: float) -> ClientRecord:
        """Add a key, and let the one with `digest` expire at `until`, in one change.

        Keys that expired long ago are removed. Raises StoreUnavailable and KeyNotAdded.
        """
        old = tuple(one for one in self._expired_long_ago(client_id) if one != digest)
        change = KeyChange(add=key, remove=old, replaces=Replacement(digest, until))
        return await self._add(client_id, key, change)

    async def _add(
        self, client_id: str, key: ApiKey, change: KeyChange, *, verified_only: bool | Unchanged = UNCHANGED
    ) -> ClientRecord:
        """Make a change that adds a key; the store decides, so concurrent changes cannot exceed the limit together."""
        after = await self._write(client_id, Change(keys=change, verified_only=verified_only))
        if all(one.digest != key.digest for one in after.keys):
            refusal = change.refusal(after.keys)
            if refusal is not None:
                raise KeyNotAdded(refusal, after)
        return after

    async def revoke(self, client_id: str, digest: str) -> ClientRecord:
        """Remove a key durably. Raises StoreUnavailable."""
        return await self._write(client_id, Change(keys=KeyChange(remove=(digest,))))

    async def require_proof(self, client_id: str, *, verified_only: bool | None) -> ClientRecord:
        """Set durably whether a credential must prove the id; None: as configured, else if the client has keys.

        Raises StoreUnavailable.
        """
        return await self._write(client_id, Change(verified_only=verified_only))

    def configured_of(self, client_id: str) -> list[ApiKey]:
        """Return the keys of a client in the configuration."""
        return [known.key for known in self._configured().values() if known.client_id == client_id]

    def digest_of_id(self, identifier: str) -> str | None:
        """Return the digest of a held key by its id; None if no held key has it."""
        held = (*self._configured(), *self._cache().keys)
        return next((digest for digest in held if key_id(digest) == identifier), None)

    async def last_uses(self, keys: Sequence[ApiKey]) -> dict[str, int]:
        """Return when keys were last used, by digest, in seconds since the epoch; without those of a store outage."""
        digests = [key.digest for key in keys]
        uses: dict[str, int] = {}
        with suppress(OSError):
            uses = await self._store.key_uses(digests)
        for digest in digests:
            if digest in self._uses:
                uses[digest] = max(self._uses[digest], uses.get(digest, 0))
        return uses

    def _expired_long_ago(self, client_id: str) -> tuple[str, ...]:
        now, record = self.wall_clock(), self._cache().get(client_id)
        return tuple(
            key.digest
            for key in (() if record is None else record.keys)
            if key.expires_at is not None and key.expires_at + _RETENTION < now
        )

    # Last uses

    def note_use(self, digest: str) -> None:
        """Note that a key was used now."""
        if digest in self._uses or len(self._uses) < _MAX_USES:
            self._uses[digest] = int(self.wall_clock()) // USE_PRECISION * USE_PRECISION

    async def store_uses(self) -> None:
        """Write the last uses to the store. Raises OSError; the uses are kept then."""
        uses, self._uses = self._uses, {}
        if not uses:
            return
        try:
            await self._store.note_key_uses(uses)
        except OSError as error:
            self._uses = uses | self._uses
            self.uses_error = str(error)
            raise
        self.uses_error = None

    async def store_uses_periodically(self) -> None:
        """Write the last uses to the store every `_FLUSH_INTERVAL` seconds, until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_INTERVAL)
            with suppress(OSError):  # `uses_error` shows it
                await self.store_uses()

    # Outages of the store

    def on_outage(self) -> None:
        """Start the time after which stored keys are no longer accepted."""
        if self._outage is None and self._is_current:
            loop = asyncio.get_running_loop()
            self._outage = loop.call_later(self.outage_tolerance, self._become_outdated)

    def on_recovery(self) -> None:
        """Accept stored keys again: all of them have been read. Log which of them cannot be used."""
        if self._outage is not None:
            self._outage.cancel()
        self._outage, self._is_current = None, True
        self._lookups.retry_now()
        self._warn()

    def _become_outdated(self) -> None:
        self._outage, self._is_current = None, False
        self._bump_version()

    async def close(self) -> None:
        """Cancel look-ups, and write the last uses."""
        if self._outage is not None:
            self._outage.cancel()
        if self._warning is not None:
            await cancel_and_wait(self._warning)
        await self._lookups.close()
        with suppress(OSError):
            await self.store_uses()


async def _log(steps: Steps[str | None]) -> None:
    warning = await run_in_steps(steps)
    if warning is not None:
        logger.warning("%s", warning)
