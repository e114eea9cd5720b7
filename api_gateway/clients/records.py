"""The records of clients, and the protocol of the stores that keep them. No I/O."""

import math
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Protocol

from api_gateway.clients.api_keys import ApiKey
from api_gateway.clients.bloom_filter import BloomFilter

MAX_VALID_KEYS = 32  # of one client
MAX_KEPT_CHANGES = 10_000  # changes that can be read by `changes`; a reader further behind loads all records


class Unchanged(Enum):
    """The value of a `Change` field that is not changed."""

    KEEP = "keep"


UNCHANGED = Unchanged.KEEP


@dataclass(frozen=True, slots=True)
class Grant:
    """A tier for a limited time; `until` is seconds since the epoch (UTC)."""

    tier: str
    until: float


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """One stored client: the registered tier, the last grant, and API keys, oldest first.

    `verified_only` is whether a credential must prove the id, None if that is not set. Tier and grant are None if
    there is none. Without any of these the record is empty: it marks a removal, so that other processes learn of it.
    `version` counts the changes of the whole store; of two records of a client, the one with the higher version is
    valid. `changed_at` is seconds since the epoch.
    """

    id: str
    tier: str | None = None
    grant: Grant | None = None
    version: int = 0
    changed_at: float = 0.0
    keys: tuple[ApiKey, ...] = ()
    verified_only: bool | None = None

    @property
    def is_empty(self) -> bool:
        """True if the record marks a removal."""
        return self.tier is None and self.grant is None and not self.keys and self.verified_only is None

    def requires_proof(self, tiers: Container[str] = ()) -> bool:
        """Return whether the id must be proved: by its own terms, or because its tier or grant is among `tiers`."""
        if self.verified_only or (self.keys and self.verified_only is None):
            return True
        return self.tier in tiers or (self.grant is not None and self.grant.tier in tiers)

    @property
    def ends(self) -> Iterator[float]:
        """The times at which the grant and the keys end, in seconds since the epoch."""
        if self.grant is not None:
            yield self.grant.until
        for key in self.keys:
            if key.expires_at is not None:
                yield key.expires_at


class KeyRefusal(Enum):
    """Why a key cannot be added."""

    ABSENT = "absent"  # the client does not have the key that is to be replaced
    REPLACED = "replaced"  # that key has been replaced already
    TOO_MANY = "too many"  # the client would have more than MAX_VALID_KEYS


class Replacement(NamedTuple):
    """The digest of a key that a new one replaces, and when it expires, in seconds since the epoch."""

    digest: str
    until: float


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A change of keys, made as a whole: `clear` all or `remove` some by digest, then `add`, which may replace a key.

    A key is replaced only once, and never expires later than before.
    """

    add: ApiKey | None = None
    remove: tuple[str, ...] = ()
    replaces: Replacement | None = None
    clear: bool = False

    def refusal(self, keys: Sequence[ApiKey]) -> KeyRefusal | None:
        """Return why a client with these keys cannot have the change, None if it can."""
        if self.replaces is not None:
            old = next((key for key in keys if key.digest == self.replaces.digest), None)
            if old is None:
                return KeyRefusal.ABSENT
            if old.replaced_by is not None:
                return KeyRefusal.REPLACED
        if self.add is not None:
            before, after = (_valid_at(self.add.created_at, held) for held in (keys, self.applied_to(keys)))
            if after > max(MAX_VALID_KEYS, before):  # a key can also be replaced at once if there are too many others
                return KeyRefusal.TOO_MANY
        return None

    def applied_to(self, keys: Sequence[ApiKey]) -> tuple[ApiKey, ...]:
        """Return the keys after the change, which must not be refused."""
        kept = [self._kept(key) for key in keys if not self.clear and key.digest not in self.remove]
        return (*kept, *(() if self.add is None else (self.add,)))

    def _kept(self, key: ApiKey) -> ApiKey:
        if self.add is None or self.replaces is None or key.digest != self.replaces.digest:
            return key
        ends = min(self.replaces.until, math.inf if key.expires_at is None else key.expires_at)
        return replace(key, expires_at=ends, replaced_by=self.add.id)


def _valid_at(now: float, keys: Sequence[ApiKey]) -> int:
    return sum(key.is_valid_at(now) for key in keys)


@dataclass(frozen=True, slots=True)
class Change:
    """A change to be written. Fields are changed independently, so concurrent changes of several fields are kept.

    With the first key that is added, `verified_only` becomes true unless it is or was set. If the change of keys is
    refused, nothing is changed.
    """

    tier: str | Unchanged | None = UNCHANGED
    grant: Grant | Unchanged | None = UNCHANGED
    keys: KeyChange | None = None
    verified_only: bool | Unchanged | None = UNCHANGED

    def applied_to(self, before: ClientRecord, version: int, now: float) -> ClientRecord:
        """Return the record after the change."""
        if self.keys is not None and self.keys.refusal(before.keys) is not None:
            return replace(before, version=version, changed_at=now)
        keys = before.keys if self.keys is None else self.keys.applied_to(before.keys)
        verified_only = before.verified_only if self.verified_only is UNCHANGED else self.verified_only
        if self.verified_only is UNCHANGED and verified_only is None and self.keys is not None:
            verified_only = True if self.keys.add is not None else None
        return ClientRecord(
            before.id,
            before.tier if self.tier is UNCHANGED else self.tier,
            before.grant if self.grant is UNCHANGED else self.grant,
            version,
            now,
            keys,
            verified_only,
        )


class Cursor(NamedTuple):
    """Position up to which changes have been read: a version, within an epoch of the store.

    A store that has lost its content begins a new epoch, and versions begin again.
    """

    epoch: str
    version: int


NO_CURSOR = Cursor("", 0)


@dataclass(frozen=True, slots=True)
class ClientSnapshot:
    """Records of a store at `cursor` or later; `is_complete` is false if there were more than requested.

    In that case `ids`, sized for the requested number, has the ids of all records, `key_entry` of all keys, and
    `proof_entry` of all ids that must be proved; None if they are unknown. `proofs` are the ids that must be proved by
    their own terms; None if there were more than requested, or they are unknown.
    """

    records: Sequence[ClientRecord]
    cursor: Cursor
    is_complete: bool
    ids: BloomFilter | None = None
    proofs: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """The newest record of each changed client, oldest change first, and the cursor after them."""

    records: Sequence[ClientRecord]
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The result of a change: the client's record before (empty if there was none) and after it."""

    before: ClientRecord
    after: ClientRecord
    epoch: str


def key_entry(digest: str) -> str:
    """Return the entry of a key among client ids, none of which begins with such a character."""
    return f"\0{digest}"


def proof_entry(client_id: str) -> str:
    """Return the entry of a client whose record says that its id must be proved; see `key_entry`."""
    return f"\1{client_id}"


class OutcomeUnknown(OSError):
    """It is unknown whether the store has made a change: it did not respond, nor to a query on the outcome."""


class ClientStore(Protocol):
    """A store of client records. Every method raises OSError if the store is unavailable."""

    @property
    def name(self) -> str:
        """Name of the store in messages; contains no secret."""
        ...

    @property
    def is_remote(self) -> bool:
        """True if the store may be temporarily unavailable: the gateway then starts and runs without it."""
        ...

    async def load(self, limit: int) -> ClientSnapshot:
        """Open the store if necessary, and read at most `limit` records."""
        ...

    async def write(self, client_id: str, change: Change) -> WriteResult:
        """Make a change, with the next version. On return it is as durable as the store is.

        The last writer wins. Raises OutcomeUnknown if the change may have been made; after any other OSError it has
        not been made and will not be.
        """
        ...

    async def end_grant(self, client_id: str, version: int) -> WriteResult | None:
        """Remove an expired grant if the record is still at `version`; return None if nothing was changed.

        Of concurrent calls, one succeeds.
        """
        ...

    async def changes(self, since: Cursor) -> Changes | None:
        """Return the changes since a cursor; None if they are not available, so that `load` is necessary."""
        ...

    async def look_up(self, client_ids: Sequence[str]) -> list[ClientRecord | None]:
        """Return the records of these clients in order, None for those without a record."""
        ...

    async def scan(self, position: str, count: int) -> tuple[list[ClientRecord], str | None]:
        """Return about `count` records behind a position, and the position behind them; None at the end.

        "" is the beginning. A record that exists throughout is returned at least once. Raises ValueError for a
        position that was not returned.
        """
        ...

    async def look_up_keys(self, digests: Sequence[str]) -> list[ClientRecord | None]:
        """Return the records of the clients that have these keys in order, None for a key that no client has."""
        ...

    async def note_key_uses(self, uses: Mapping[str, int]) -> None:
        """Store when keys were last used, in seconds since the epoch by digest."""
        ...

    async def key_uses(self, digests: Sequence[str]) -> dict[str, int]:
        """Return when these keys were last used, of those that were."""
        ...

    async def watch(self, on_news: Callable[[], Awaitable[None]]) -> None:
        """Await `on_news` whenever records may have changed, one call at a time, until cancelled."""
        ...

    async def close(self) -> None:
        """Release all resources."""
        ...
