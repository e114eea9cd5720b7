"""Which client has which tier: decided in memory for the request path, kept in a store for the next start.

A change is stored first and then takes effect. What others change in the same store takes effect when the store tells
of it. What does not fit into memory is looked up, all that is asked for at one time in one question.

Long because it is one subject: records, grants and the followed store change the same copy of them.
"""

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

from api_gateway.clients.cache import ClientCache
from api_gateway.clients.grant_expiry import Expiry, ExpiryQueue
from api_gateway.clients.lookup_batcher import BATCH, LookupBatcher
from api_gateway.clients.records import (
    NO_CURSOR,
    Change,
    ClientRecord,
    ClientSnapshot,
    ClientStore,
    Grant,
    OutcomeUnknown,
    WriteResult,
)
from api_gateway.errors import StoreUnavailable
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Client, Clock, Quota

logger = logging.getLogger(__name__)

CLIENT_LIMIT = 100_000
_CLIENT, _ADDRESS = "client:", "address:"  # what the keys of their buckets begin with
_TAKEN_AT_ONCE = 500  # records, between two looks at other work
_CLEAR_AGAIN_AFTER = 1.0  # seconds
_RECONNECT_AFTER = (0.1, 2.0)  # seconds, doubled from one failure to the next
_LONGEST_NAP = 30.0  # seconds until the wall clock is looked at again: it may be set
_CLEAR_WITHIN = 0.2  # seconds over which those that have seen a grant end spread out


class ClientStatus(NamedTuple):
    """A client, its grant if it has one, what it is without, and whether the store has said so just now."""

    client: Client
    grant: Grant | None
    otherwise: Client
    is_confirmed: bool


class EarlierClients(NamedTuple):
    """Who was who before tiers or configured clients changed: the tiers, and clients by id."""

    tiers: Mapping[str, Quota]
    default: Quota
    registered: Mapping[str, Client]
    configured: Mapping[str, Client]

    def quota_of(self, key: str) -> Quota:
        """Return the quota that a client's bucket had, by the bucket's key."""
        client_id = key.removeprefix(_CLIENT)
        if client_id == key:  # an address
            return self.default
        known = self.registered.get(client_id) or self.configured.get(client_id)
        return self.default if known is None else known.quota


def _ignore(_before: Client, _after: Client) -> None:
    pass


class ClientRegistry:
    """Answers who a client is. Granted beats registered by the API, which beats configured, and that the default.

    A grant ends on every process by that machine's clock: where clocks differ, so do the moments. It is then taken
    out of the store by one of them, not before the store's own clock says so.
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
        on_change: Callable[[Client, Client], None] = _ignore,
    ) -> None:
        """Hold `tiers` (upper-case name to quota) and `configured` (client id to tier name).

        At most `limit` clients of the store are remembered; a request waits `deadline` seconds for one that is not.
        `on_change` is called when a client has changed in this process by other means than its own `set_tier` and the
        like: its bucket is to be taken over.
        """
        self.tiers = dict(tiers)
        self.default = self.tiers[default_tier]
        self._configured = self._as_configured(configured)
        self.version = 0  # goes up with every change, so that who has looked a client up knows to look again
        self.trouble: str | None = None  # why the store cannot be used, while it cannot
        self._limit = limit
        self._wall_clock = wall_clock
        self._random = random_source or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._on_change = on_change
        self._store = store
        self._cursor = NO_CURSOR
        self._cache = self._loading = ClientCache(limit, self._resolve)
        self._cache.is_complete = True  # until there is something to look up
        self._known = self._cache.clients
        self._expiries = ExpiryQueue(limit)
        self._timer: asyncio.TimerHandle | None = None
        self._lookups = LookupBatcher(
            store.look_up, self._note, self.by_id, self.count_version, limit=limit + BATCH, deadline=deadline
        )
        self._writing: Counter[str] = Counter()  # changes under way, by client
        self._heard: dict[str, list[ClientRecord]] = {}  # of such clients meanwhile
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        trouble = f", {self.trouble}" if self.trouble else ""
        part = "" if self._cache.is_complete else " of those"
        return f"<ClientRegistry [{len(self._known)}{part} registered, {len(self._configured)} configured{trouble}]>"

    # The store

    async def load(self) -> None:
        """Read the registered clients. Raises OSError, but starts without a remote store and waits for it."""
        try:
            await self._reload()
        except OSError as error:
            if not self._store.is_remote:
                raise
            self._lose_touch(error)

    async def follow(self) -> None:
        """Follow what others change, until cancelled. After the store was away all is read anew."""
        clock = asyncio.get_running_loop().time
        pause, longest = _RECONNECT_AFTER
        while True:
            began = clock()
            try:
                if self.trouble is not None:
                    await self._reload()
                await self._store.watch(self._catch_up)
            except OSError as error:
                self._lose_touch(error)
            except Exception as error:  # a defect here must not leave tiers as they are for good
                logger.exception("the client store")
                self.trouble = repr(error)
            if clock() - began > longest:
                pause = _RECONNECT_AFTER[0]
            await asyncio.sleep(pause * self._random.uniform(0.5, 1))
            pause = min(2 * pause, longest)

    async def close(self) -> None:
        """End what is under way and close the store."""
        if self._timer is not None:
            self._timer.cancel()
        await cancel_and_wait(*self._tasks)
        await self._lookups.close()
        await self._store.close()

    def _lose_touch(self, error: OSError) -> None:
        if self.trouble is None:
            logger.error(
                "the client store cannot be used, tiers stay as they are (%d registered clients known): %s",
                len(self._known),
                error,
            )
        self.trouble = str(error)

    async def _reload(self) -> None:
        """Take the store's records in place of those held; what is written meanwhile goes into both copies."""
        fresh = self._loading = ClientCache(self._limit, self._resolve)
        different = set()
        try:
            snapshot = await self._store.load(self._limit)
            fresh.start(snapshot)
            for count, record in enumerate(snapshot.records):
                fresh.put(record)
                if fresh.clients.get(record.id) != self._known.get(record.id):
                    different.add(record.id)
                if count % _TAKEN_AT_ONCE == 0:
                    await asyncio.sleep(0)
        except BaseException:
            self._loading = self._cache
            raise
        self._take_over(fresh, snapshot, different | (self._known.keys() - fresh.clients.keys()))

    def _take_over(self, fresh: ClientCache, snapshot: ClientSnapshot, different: set[str]) -> None:
        known = self._known
        if self._cursor.epoch and self._cursor.epoch != snapshot.cursor.epoch:
            logger.warning("the client store has begun anew, with %d clients; %d were known", len(fresh), len(known))
        if not fresh.is_complete:
            logger.warning("more than store.max_cached_clients (%d) clients: the others are looked up", self._limit)
        if self.trouble is not None:
            logger.warning("the client store can be used again")
        self._cache, self._cursor, self.trouble = fresh, snapshot.cursor, None
        self._known = fresh.clients
        self._lookups.retry_now()
        self.version += 1
        for client_id in different:
            self._tell(known.get(client_id) or self._fallback(client_id), self.by_id(client_id))
        self._expiries.replace(fresh.records())
        self._warn_of_unknown_tiers(snapshot)
        self._set_timer()

    def _warn_of_unknown_tiers(self, snapshot: ClientSnapshot) -> None:
        for record in snapshot.records:
            if record.tier is not None and record.tier not in self.tiers:
                logger.warning("client %r is registered for tier %r, which is not configured", record.id, record.tier)

    async def _catch_up(self) -> None:
        changes = await self._store.changes(self._cursor)
        if changes is None:
            await self._reload()
            return
        for record in changes.records:
            if record.id in self._writing:
                self._heard.setdefault(record.id, []).append(record)
            elif self._cache.is_complete or self._cache.knows(record.id) or self._lookups.is_asked(record.id):
                self._apply(record)
            else:
                self._cache.note_id(record.id)
                self._lookups.retry_now(record.id)
                self.version += 1  # somebody may still go by what was once known of it
        self._cursor = changes.cursor
        self._cache.forget_empty(changes.cursor.version)

    def count_version(self) -> None:
        """Have everybody who has looked a client up look again."""
        self.version += 1

    def retier(self, tiers: Mapping[str, Quota], default_tier: str, configured: Mapping[str, str]) -> "EarlierClients":
        """Go by other tiers and other configured clients; return who was who until now.

        Who is registered for a tier that is no more counts as not registered, until the tier is there again.
        """
        before = EarlierClients(self.tiers, self.default, dict(self._known), self._configured)
        self.tiers = dict(tiers)
        self.default = self.tiers[default_tier]
        self._configured = self._as_configured(configured)
        for copy in {id(copy): copy for copy in (self._cache, self._loading)}.values():
            copy.refresh_all()
        self.version += 1
        lost = [name for name in before.registered if name not in self._known]
        if lost:
            shown = ", ".join(lost[:3])
            logger.warning("registered for a tier that is no longer configured: %d clients (%s)", len(lost), shown)
        return before

    # Who is who

    def by_id(self, client_id: str) -> Client:
        """Return the client that calls itself `client_id`, as far as is known here."""
        known = self._known.get(client_id) or self._configured.get(client_id)
        return known or Client(client_id, bucket_key(client_id), self.default, "default")

    def by_address(self, address: str) -> Client:
        """Return the client that gave no name: it is its address."""
        return Client(address, f"{_ADDRESS}{address}", self.default, "address")

    def by_bucket_key(self, key: str) -> Client:
        """Return the client whose bucket has this key."""
        return self.by_address(key[len(_ADDRESS) :]) if key.startswith(_ADDRESS) else self.by_id(key[len(_CLIENT) :])

    def try_get(self, client_id: str) -> Client | None:
        """Return the client that calls itself `client_id`, or None if it takes a `look_up`."""
        copy = self._cache
        if copy.is_complete or copy.knows(client_id) or copy.surely_absent(client_id):
            return self.by_id(client_id)
        if self.trouble is not None or self._lookups.is_late(client_id):
            return self.by_id(client_id)
        return None

    async def look_up(self, client_id: str) -> Client:
        """Ask the store of a client. What it does not tell in time counts as not registered, for a second."""
        return await self._lookups.look_up(client_id)

    def _note(self, client_id: str, record: ClientRecord | None, was_late: bool) -> None:  # noqa: FBT001 - told so
        """Take over what a look-up has told. Who has gone by the default meanwhile is to look again."""
        if record is None:
            self._cache.put_negative(client_id)
        elif was_late or self._cache.get(client_id) is not None:
            self._apply(record)
        else:
            self._put(record)

    # Changes

    async def set_tier(self, client_id: str, tier: str) -> tuple[Client, Client]:
        """Register `client_id` for `tier` (a configured name), durably. Returns it as it was and as it is.

        Raises StoreUnavailable when it could not be stored; the message tells whether that is certain.
        """
        return await self._write(client_id, Change(tier=tier))

    async def grant(self, client_id: str, tier: str, until: float) -> tuple[Client, Client]:
        """Give `client_id` a tier until a moment in seconds since the epoch, in place of an earlier grant.

        It is kept to the millisecond, rounded up. See `set_tier`.
        """
        whole = math.ceil(round(until * 1000, 3)) / 1000  # stores keep three digits; it shall not end early for that
        return await self._write(client_id, Change(grant=Grant(tier, whole)))

    async def revoke(self, client_id: str) -> tuple[Client, Client]:
        """End the grant of `client_id`, if it has one; see `set_tier`."""
        return await self._write(client_id, Change(grant=None))

    async def delete(self, client_id: str) -> tuple[Client, Client]:
        """Remove all that the API has said of `client_id`, registration and grant; see `set_tier`."""
        return await self._write(client_id, Change(tier=None, grant=None))

    async def inspect(self, client_id: str) -> ClientStatus:
        """Return a client as the store has it, or as it is known here if the store cannot be asked."""
        is_confirmed = True
        try:
            (record,) = await self._store.look_up([client_id])
        except OSError:
            record, is_confirmed = self._cache.get(client_id), False
        if record is None:
            record = ClientRecord(client_id)
        elif is_confirmed:
            self._apply(record)
        otherwise = self._registered(record) or self._fallback(client_id)
        client = self._resolve(record) or otherwise
        grant = record.grant if client.source == "granted" else None
        return ClientStatus(client, grant, otherwise, is_confirmed)

    async def _write(self, client_id: str, change: Change) -> tuple[Client, Client]:
        """Make a change. What is heard of the client meanwhile waits: it may be this very change."""
        self._writing[client_id] += 1
        try:
            return self._adopt(await self._store_change(client_id, change))
        finally:
            self._writing[client_id] -= 1
            if not self._writing[client_id]:
                del self._writing[client_id]
                for record in self._heard.pop(client_id, ()):
                    self._apply(record)

    async def _store_change(self, client_id: str, change: Change) -> WriteResult:
        try:
            return await self._store.write(client_id, change)
        except OutcomeUnknown as error:
            raise StoreUnavailable(
                f"The change may or may not have been made: {self._store.name} did not answer."
                f" GET /clients/{client_id} tells when it answers again.",
                retry_after=5,
            ) from error
        except OSError as error:
            raise StoreUnavailable(
                f"The change could not be written to {self._store.name} and was not made.", retry_after=5
            ) from error

    def _adopt(self, written: WriteResult) -> tuple[Client, Client]:
        """Take over a change that this process has made itself, behind what others had made before it."""
        client_id = written.after.id
        if written.before.version:
            self._apply(written.before)
        before = self.by_id(client_id)
        self._put(written.after, is_new_epoch=written.epoch != self._cursor.epoch)
        self.version += 1
        return before, self.by_id(client_id)

    def _apply(self, record: ClientRecord) -> None:
        """Take over a change that somebody has made."""
        before = self.by_id(record.id)
        if self._put(record):
            self._tell(before, self.by_id(record.id))

    def _put(self, record: ClientRecord, *, is_new_epoch: bool = False) -> bool:
        if self._loading is not self._cache:
            self._loading.put(record)
        was_complete = self._cache.is_complete
        if not self._cache.put(record, is_new_epoch=is_new_epoch):
            return False
        if was_complete and not self._cache.is_complete:
            logger.warning("more than store.max_cached_clients (%d) clients: the others are looked up", self._limit)
        if record.grant is not None:
            self._expiries.expect(record, self._is_current)
            self._set_timer()
        return True

    def _tell(self, before: Client, after: Client) -> None:
        if before != after:
            self.version += 1
            self._on_change(before, after)

    # Grants

    def _is_current(self, expiry: Expiry) -> bool:
        record = self._cache.get(expiry.client_id)
        return record is not None and record.version == expiry.version

    def end_grants(self) -> None:
        """End every grant whose time is over."""
        for expiry in self._expiries.due(self._wall_clock()):
            record = self._cache.get(expiry.client_id)
            if record is None:
                self.version += 1  # somebody may still go by what was once known of it
            elif record.version == expiry.version:
                self._end_grant(record)
        self._set_timer()

    def _end_grant(self, record: ClientRecord) -> None:
        before = self.by_id(record.id)
        self._cache.refresh(record)
        self._tell(before, self.by_id(record.id))
        task = asyncio.create_task(self._clear(record), name="clearing of an ended grant")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _clear(self, record: ClientRecord) -> None:
        """Take an ended grant out of the store, unless another process does. Nothing waits for it to be done."""
        written = None
        await asyncio.sleep(self._random.uniform(0, _CLEAR_WITHIN))
        while written is None and self._cache.get(record.id) == record:
            with suppress(OSError):
                written = await self._store.end_grant(record.id, record.version)
            if written is None:
                await asyncio.sleep(_CLEAR_AGAIN_AFTER)
        if written is not None:
            self._apply(written.after)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._expiries.next_at is not None:
            nap = min(max(self._expiries.next_at - self._wall_clock(), 0), _LONGEST_NAP)
            self._timer = asyncio.get_running_loop().call_later(nap, self.end_grants)

    # What a record comes to

    def _as_configured(self, configured: Mapping[str, str]) -> dict[str, Client]:
        return {
            client_id: Client(client_id, bucket_key(client_id), self.tiers[tier], "configured")
            for client_id, tier in configured.items()
        }

    def _resolve(self, record: ClientRecord) -> Client | None:
        grant = record.grant
        if grant is not None and grant.tier in self.tiers and grant.until > self._wall_clock():
            return Client(record.id, bucket_key(record.id), self.tiers[grant.tier], "granted")
        return self._registered(record)

    def _registered(self, record: ClientRecord) -> Client | None:
        quota = None if record.tier is None else self.tiers.get(record.tier)
        return None if quota is None else Client(record.id, bucket_key(record.id), quota, "registered")

    def _fallback(self, client_id: str) -> Client:
        """Return what a client is of whom the store says nothing."""
        known = self._configured.get(client_id)
        return known or Client(client_id, bucket_key(client_id), self.default, "default")


def bucket_key(client_id: str) -> str:
    """Return the key of a named client's bucket, which no address can have."""
    return f"{_CLIENT}{client_id}"
