"""The clients and their tiers: held in memory for requests, and kept in a store.

A change is stored first, then applied. Changes by other processes are read from the store and applied. Clients that do
not fit into memory are looked up in the store, concurrent look-ups in one query. `client_tiers` has what a record
means, and `grant_timer` what ends at its time.

Long because registrations, grants and changes from the store all modify the same in-memory copy.
"""

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from api_gateway.clients.cache import ClientCache
from api_gateway.clients.client_pages import ListedClient, client_page
from api_gateway.clients.client_tiers import ClientTiers, PreviousClients, owner_of
from api_gateway.clients.grant_timer import GrantTimer
from api_gateway.clients.identity_rules import NO_RULES, IdentityRules
from api_gateway.clients.kept_proofs import KeptProofs, ProofFile
from api_gateway.clients.key_directory import KeyDirectory
from api_gateway.clients.lookup_batcher import LOOKUP_BATCH, LookupBatcher
from api_gateway.clients.records import (
    NO_CURSOR,
    UNCHANGED,
    Change,
    ClientRecord,
    ClientSnapshot,
    ClientStore,
    Grant,
    KeyChange,
    OutcomeUnknown,
    WriteResult,
    key_entry,
)
from api_gateway.errors import ChangeUnconfirmed, StoreUnavailable
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Client, Clock, Quota

logger = logging.getLogger(__name__)

CLIENT_LIMIT = 100_000
OUTAGE_TOLERANCE = 3600.0  # seconds
_RELOAD_BATCH = 500  # records processed before the event loop runs other tasks
_RECONNECT_DELAYS = (0.1, 2.0)  # seconds: the first delay, doubled after each failure, and the longest


class ClientStatus(NamedTuple):
    """A client, its grant in force if any, the client without the grant, and whether the store has confirmed it."""

    client: Client
    grant: Grant | None
    without_grant: Client
    is_confirmed: bool


def _shown_at(client_id: str, change: Change) -> str:
    """Return, in words, which endpoint shows whether a change was made."""
    if change.tier is not UNCHANGED or change.grant is not UNCHANGED:
        return f"GET /clients/{client_id} shows the tier"
    if change.keys is not None:
        return f"GET /clients/{client_id}/keys lists the keys"
    return f"GET /clients/{client_id} shows verified_only"


def _ignore(_before: Client, _after: Client) -> None:
    pass


class ClientRegistry:
    """Resolves client ids and addresses to clients with a tier.

    Each process ends a grant by its own clock; one process then removes it from the store, once it has expired by the
    store's clock.

    States: the store is in use, or unavailable (`store_error` is set, the last known tiers apply, and `follow`
    reconnects and loads all records). While records are loaded, changes are applied to the old and the new copy.
    """

    def __init__(
        self,
        tiers: Mapping[str, Quota],
        default_tier: str,
        configured: Mapping[str, str],
        store: ClientStore,
        *,
        limit: int = CLIENT_LIMIT,
        deadline: float = 0.02,
        wall_clock: Clock = time.time,
        random_source: random.Random | None = None,
        rules: IdentityRules = NO_RULES,
        outage_tolerance: float = OUTAGE_TOLERANCE,
        proof_file: ProofFile | None = None,
        on_change: Callable[[Client, Client], None] = _ignore,
    ) -> None:
        """`tiers` maps upper-case names to quotas, `configured` client ids to names of tiers.

        `rules` are about ids that must be proved. At most `limit` clients are held in memory; a request waits
        `deadline` seconds for the look-up of another. `outage_tolerance` is for how many seconds of a store outage
        known API keys are accepted. `proof_file` keeps which ids must be proved, for a start without the store.
        `on_change` is called when a client changes for another reason than a call of `set_tier`, `grant`, `revoke` or
        `delete` in this process; the caller then converts the client's bucket.
        """
        self._tiers = ClientTiers(tiers, default_tier, configured, rules, wall_clock)
        self.version = 0  # increased by every change; a client that was resolved before must be resolved again
        self.store_error: str | None = None  # why the store is unavailable
        self._limit = limit
        self._random = random_source or random.Random()  # noqa: S311 - not used for security
        self._on_change = on_change
        self._store = store
        self._cursor = NO_CURSOR
        self._cache = self._loading = ClientCache(limit, self._tiers.of_record)
        self._cache.is_complete = True  # until the store is loaded, no look-ups are made
        self._known = self._cache.clients
        self._proofs = KeptProofs(proof_file, limit)
        self._endings = GrantTimer(self, store, limit, wall_clock=wall_clock, source=self._random)
        self._lookups = LookupBatcher(
            store.look_up,
            self._on_lookup,
            self.by_id,
            self.bump_version,
            limit=limit + LOOKUP_BATCH,
            deadline=deadline,
        )
        self.keys = KeyDirectory(
            store,
            cache=lambda: self._cache,
            configured=lambda: self._tiers.rules.keys,
            is_store_available=lambda: self.store_error is None,
            write=self._write_record,
            on_lookup=self._on_key_lookup,
            bump_version=self.bump_version,
            wall_clock=wall_clock,
            limit=limit,
            deadline=deadline,
            outage_tolerance=outage_tolerance,
        )
        self._asking: Counter[str] = Counter()  # changes and readings in progress, by client
        self._deferred: dict[str, list[ClientRecord]] = {}  # records that arrived for these clients meanwhile

    def __repr__(self) -> str:
        error = f", {self.store_error}" if self.store_error else ""
        part = "" if self._cache.is_complete else " of those"
        return (
            f"<ClientRegistry [{len(self._known)}{part} registered, {len(self._tiers.configured)} configured{error}]>"
        )

    # The store

    async def load(self) -> None:
        """Read the registered clients. Raises OSError, except for a remote store: `follow` connects to it later."""
        try:
            await self._reload()
        except OSError as error:
            if not self._store.is_remote:
                raise
            self._note_store_error(error)
            await self._proofs.recall(self._cache, self._tiers.rules)

    async def follow(self) -> None:
        """Apply changes by other processes until cancelled. After an outage of the store all records are loaded."""
        storing = asyncio.create_task(self.keys.store_uses_periodically(), name="last uses of keys")
        try:
            await self._follow()
        finally:
            await cancel_and_wait(storing)

    async def _follow(self) -> None:
        clock = asyncio.get_running_loop().time
        pause, longest = _RECONNECT_DELAYS
        while True:
            began = clock()
            try:
                if self.store_error is not None:
                    await self._reload()
                await self._store.watch(self._apply_changes)
            except OSError as error:
                self._note_store_error(error)
            except Exception as error:  # after a defect, changes must still be read
                logger.exception("following the client store failed")
                self.store_error = repr(error)
            if clock() - began > longest:
                pause = _RECONNECT_DELAYS[0]
            await asyncio.sleep(pause * self._random.uniform(0.5, 1))
            pause = min(2 * pause, longest)

    @property
    def proofs_error(self) -> str | None:
        """Why the ids that need a credential are not stored, None if they are."""
        return self._proofs.error

    async def close(self) -> None:
        """Cancel timers, tasks and look-ups, and close the store."""
        await self._endings.close()
        await self._lookups.close()
        await self.keys.close()
        await self._proofs.close()
        await self._store.close()

    def _note_store_error(self, error: OSError) -> None:
        if self.store_error is None:
            logger.error(
                "client store unavailable, tiers unchanged (%d registered clients known): %s",
                len(self._known),
                error,
            )
        self.store_error = str(error)
        self.keys.on_outage()

    async def _reload(self) -> None:
        """Replace the records held by those of the store. Changes meanwhile are applied to both copies."""
        fresh = self._loading = ClientCache(self._limit, self._tiers.of_record)
        changed_ids = set()
        try:
            snapshot = await self._store.load(self._limit)
            fresh.start(snapshot)
            for count, record in enumerate(snapshot.records):
                fresh.put(record)
                if fresh.clients.get(record.id) != self._known.get(record.id):
                    changed_ids.add(record.id)
                if count % _RELOAD_BATCH == 0:
                    await asyncio.sleep(0)
        except BaseException:
            self._loading = self._cache
            raise
        self._adopt_snapshot(fresh, snapshot, changed_ids | (self._known.keys() - fresh.clients.keys()))

    def _adopt_snapshot(self, fresh: ClientCache, snapshot: ClientSnapshot, changed_ids: set[str]) -> None:
        known = self._known
        if self._cursor.epoch and self._cursor.epoch != snapshot.cursor.epoch:
            logger.warning("client store has lost its content: %d clients, %d known before", len(fresh), len(known))
        if not fresh.is_complete:
            logger.warning("more than store.max_cached_clients (%d) clients: the others are looked up", self._limit)
        if self.store_error is not None:
            logger.warning("client store available again")
        self._cache, self._cursor, self.store_error = fresh, snapshot.cursor, None
        self._known = fresh.clients
        self._proofs.follow(fresh, snapshot, self._tiers.rules)
        self._lookups.retry_now()
        self.keys.on_recovery()
        self.version += 1
        for client_id in changed_ids:
            self._notify(known.get(client_id) or self._tiers.without_record(client_id), self.by_id(client_id))
        self._endings.expiries.replace(fresh.records())
        self._warn_of_unknown_tiers(snapshot)
        self._endings.set_timer()

    def _warn_of_unknown_tiers(self, snapshot: ClientSnapshot) -> None:
        for record in snapshot.records:
            if record.tier is not None and record.tier not in self.tiers:
                logger.warning("client %r: registered tier %r is not configured", record.id, record.tier)

    async def _apply_changes(self) -> None:
        changes = await self._store.changes(self._cursor)
        if changes is None:
            await self._reload()
            return
        for record in changes.records:
            if record.id in self._asking:
                self._deferred.setdefault(record.id, []).append(record)
            elif (
                self._cache.is_complete
                or self._cache.knows(record.id)
                or self._lookups.is_pending(record.id)
                or self.keys.is_looking_up
            ):
                self.apply(record)
            else:
                self._cache.note_record(record)
                self._proofs.note(record)
                self._lookups.retry_now(record.id)
                self.keys.retry_now(record)
                self.version += 1  # the client may have been resolved before
        self._cursor = changes.cursor
        self._cache.forget_empty(changes.cursor.version)

    @property
    def claimable_count(self) -> int:
        """Number of registered clients in memory whose id needs no proof."""
        return sum(not client.is_verified_only for client in self._known.values())

    def bump_version(self) -> None:
        """Invalidate all clients that were resolved before."""
        self.version += 1

    def change_tiers(
        self,
        tiers: Mapping[str, Quota],
        default_tier: str,
        configured: Mapping[str, str],
        rules: IdentityRules = NO_RULES,
    ) -> "PreviousClients":
        """Apply other tiers, configured clients and rules on ids; return the previous tiers and clients.

        A client that is registered for a removed tier counts as not registered until the tier exists again.
        """
        before = PreviousClients(self.tiers, self.default, dict(self._known), self._tiers.configured)
        self._tiers.change(tiers, default_tier, configured, rules)
        for cache in {id(cache): cache for cache in (self._cache, self._loading)}.values():
            cache.refresh_all()
        if self._proofs.is_recalled:
            self._proofs.assume(self._cache, rules)
        else:
            self._proofs.change_tiers(self._cache, rules)
        self.version += 1
        lost = [name for name in before.registered if name not in self._known]
        if lost:
            shown = ", ".join(lost[:3])
            logger.warning("clients registered for a tier that is no longer configured: %d (%s)", len(lost), shown)
        return before

    # Resolution of ids and addresses

    @property
    def tiers(self) -> Mapping[str, Quota]:
        """The tiers by name."""
        return self._tiers.tiers

    @property
    def default(self) -> Quota:
        """The default tier."""
        return self._tiers.default

    def by_id(self, client_id: str) -> Client:
        """Return the client with this id, as far as it is known in memory.

        An id that the store may have a record of, which is not held and may require a proof, counts as requiring one.
        """
        known = self._known.get(client_id)
        if known is not None:
            return known
        client = self._tiers.without_record(client_id)
        needs_proof = not client.is_verified_only and self._cache.may_need_proof(
            client_id, with_tier=bool(self._tiers.rules.tiers)
        )
        if needs_proof:
            return replace(client, is_verified_only=True)
        return client

    def is_known(self, client_id: str) -> bool:
        """Return whether it is known what the store has of an id, or can be looked up."""
        return self.store_error is None or self._cache.knows(client_id)

    def is_doubtful(self, client_id: str) -> bool:
        """Return whether an id counts as one that must be proved only because nothing is known of the store."""
        known = self._known.get(client_id)
        return known is None and self._cache.is_blind and not self._tiers.without_record(client_id).is_verified_only

    def proved(self, client: Client, tier: str | None) -> Client:
        """Return a client whose id was proved; `tier` is what the credential states."""
        return self._tiers.proved(client, tier)

    def by_address(self, address: str) -> Client:
        """Return the client of a request without a client id: the address."""
        return self._tiers.by_address(address)

    def by_bucket_key(self, key: str) -> Client:
        """Return the client whose bucket has this key."""
        owner, is_address = owner_of(key)
        return self.by_address(owner) if is_address else self.by_id(owner)

    def try_get(self, client_id: str) -> Client | None:
        """Return the client with this id, or None if `look_up` is necessary."""
        cache = self._cache
        if cache.is_complete or cache.knows(client_id) or cache.surely_absent(client_id):
            return self.by_id(client_id)
        if self.store_error is not None or self._lookups.is_late(client_id):
            return self.by_id(client_id)
        return None

    async def look_up(self, client_id: str) -> Client:
        """Look a client up in the store. After the deadline it is resolved without the store, for one second."""
        return await self._lookups.look_up(client_id)

    def _on_lookup(self, client_id: str, record: ClientRecord | None, was_late: bool) -> None:  # noqa: FBT001 - a callback
        """Store the result of a look-up. After a late one, requests may have used the default tier: it is a change."""
        if record is None:
            self._cache.put_negative(client_id)
        elif self._cache.is_complete:
            return  # all records were read since, and this one may have been removed
        elif was_late or self._cache.get(client_id) is not None:
            self.apply(record)
        else:
            self._put(record)

    def _on_key_lookup(self, digest: str, record: ClientRecord | None, was_late: bool) -> None:  # noqa: FBT001 - a callback
        """Store the result of a look-up by key."""
        if record is None:
            self._cache.put_negative(key_entry(digest))
        else:
            self._on_lookup(record.id, record, was_late)

    # Changes

    async def set_tier(self, client_id: str, tier: str) -> tuple[Client, Client]:
        """Register a client for `tier`, a configured name, durably. Returns the client before and after.

        Raises ChangeUnconfirmed if the change may have been made, else StoreUnavailable.
        """
        return await self._write(client_id, Change(tier=tier))

    async def grant(self, client_id: str, tier: str, until: float) -> tuple[Client, Client]:
        """Grant a client a tier until a time in seconds since the epoch; replaces an earlier grant.

        The time is rounded up to the millisecond. Returns and raises as `set_tier` does.
        """
        whole = math.ceil(round(until * 1000, 3)) / 1000  # stores keep milliseconds; a grant must not end early
        return await self._write(client_id, Change(grant=Grant(tier, whole)))

    async def revoke(self, client_id: str) -> tuple[Client, Client]:
        """End the grant of a client, if it has one. Returns and raises as `set_tier` does."""
        return await self._write(client_id, Change(grant=None))

    async def delete(self, client_id: str) -> tuple[Client, Client]:
        """Remove registration, grant and keys of a client. Returns and raises as `set_tier` does."""
        change = Change(tier=None, grant=None, keys=KeyChange(clear=True), verified_only=None)
        return await self._write(client_id, change)

    async def record_of(self, client_id: str) -> tuple[ClientRecord, bool]:
        """Return the record of a client, and whether it is that of the store, or as in memory because of an outage."""
        with self._deferring(client_id):
            try:
                (record,) = await self._store.look_up([client_id])
            except OSError:
                return self._cache.get(client_id) or ClientRecord(client_id), False
            if record is not None:
                self.apply(record)
        return record or ClientRecord(client_id), True

    async def page(self, after: str, limit: int, tier: str | None) -> tuple[list[ListedClient], str | None]:
        """Return a page of all registered clients; see `client_page`. Raises InvalidPosition and StoreUnavailable."""
        try:
            return await client_page(
                self._store, self._tiers.configured, self._client_of, after=after, limit=limit, tier=tier
            )
        except OSError as error:
            message = f"The registered clients cannot be read from {self._store.name}."
            raise StoreUnavailable(message, retry_after=5) from error

    def _client_of(self, record: ClientRecord) -> Client:
        return self._tiers.of_record(record) or self._tiers.unregistered(record)

    async def inspect(self, client_id: str) -> ClientStatus:
        """Return a client as in the store, or as in memory if the store is unavailable (`is_confirmed` false)."""
        record, is_confirmed = await self.record_of(client_id)
        otherwise = self._tiers.registered(record) or self._tiers.unregistered(record)
        client = (self._tiers.of_record(record) or otherwise) if is_confirmed else self.by_id(client_id)
        grant = record.grant if client.source == "granted" else None
        return ClientStatus(client, grant, otherwise, is_confirmed)

    async def _write(self, client_id: str, change: Change) -> tuple[Client, Client]:
        """Make a change; return the client before and after it."""
        return (await self._write_changes(client_id, change))[:2]

    async def _write_record(self, client_id: str, change: Change) -> ClientRecord:
        """Make a change; return the record after it."""
        return (await self._write_changes(client_id, change))[2]

    async def _write_changes(self, client_id: str, change: Change) -> tuple[Client, Client, ClientRecord]:
        with self._deferring(client_id):
            written = await self._store_change(client_id, change)
            return *self._apply_own_write(written), written.after

    @contextmanager
    def _deferring(self, client_id: str) -> Iterator[None]:
        """Apply records of a client that arrive within this block at its end.

        One may be the change that is made in the block, or newer than what is read there and applied.
        """
        self._asking[client_id] += 1
        try:
            yield
        finally:
            self._asking[client_id] -= 1
            if not self._asking[client_id]:
                del self._asking[client_id]
                for record in self._deferred.pop(client_id, ()):
                    self.apply(record)

    async def _store_change(self, client_id: str, change: Change) -> WriteResult:
        try:
            return await self._store.write(client_id, change)
        except OutcomeUnknown as error:
            raise ChangeUnconfirmed(
                f"The change may or may not have been made: no response from {self._store.name}."
                f" {_shown_at(client_id, change)} when the store is available again.",
                retry_after=5,
            ) from error
        except OSError as error:
            raise StoreUnavailable(
                f"The change could not be written to {self._store.name} and was not made.", retry_after=5
            ) from error

    def _apply_own_write(self, written: WriteResult) -> tuple[Client, Client]:
        """Apply a change of this process, after an earlier change by another that it was based on."""
        client_id = written.after.id
        if written.before.version:
            self.apply(written.before)
        before = self.by_id(client_id)
        self._put(written.after, is_new_epoch=written.epoch != self._cursor.epoch)
        self.version += 1
        return before, self.by_id(client_id)

    def apply(self, record: ClientRecord) -> None:
        """Apply a change of another process or a looked-up record, and report the client if it differs."""
        before, held = self.by_id(record.id), self._cache.get(record.id)
        if self._put(record):
            if held is None or held.keys != record.keys:
                self.version += 1  # one of several keys does not change the client, and may be remembered as verified
            self._notify(before, self.by_id(record.id))

    def _put(self, record: ClientRecord, *, is_new_epoch: bool = False) -> bool:
        if self._loading is not self._cache:
            self._loading.put(record)
        was_complete = self._cache.is_complete
        if not self._cache.put(record, is_new_epoch=is_new_epoch):
            return False
        self._proofs.note(record)
        if was_complete and not self._cache.is_complete:
            logger.warning("more than store.max_cached_clients (%d) clients: the others are looked up", self._limit)
        if any(record.ends):
            self._endings.expect(record)
        return True

    def _notify(self, before: Client, after: Client) -> None:
        if before != after:
            self.version += 1
            self._on_change(before, after)

    # See `grant_timer.GrantRecords`

    def held(self, client_id: str) -> ClientRecord | None:
        """Return the record that is held of a client; None if there is none."""
        return self._cache.get(client_id)

    def on_expired(self) -> None:
        """Invalidate all clients that were resolved before."""
        self.version += 1

    def on_grant_ended(self, record: ClientRecord) -> None:
        """Give the client the tier that it has without its grant."""
        before = self.by_id(record.id)
        self._cache.refresh(record)
        self._notify(before, self.by_id(record.id))

    def end_expired(self) -> None:
        """End every grant and key that has expired, and set the timer for the next."""
        self._endings.end_expired()
