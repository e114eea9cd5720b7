"""The records of clients, and the protocol of the stores that keep them. No I/O."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from api_gateway.clients.bloom_filter import BloomFilter

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
    """One stored client: the registered tier and the last grant, each None if there is none.

    Without either the record is empty: it marks a removal, so that other processes learn of it. `version` counts the
    changes of the whole store; of two records of a client, the one with the higher version is valid. `changed_at` is
    seconds since the epoch.
    """

    id: str
    tier: str | None = None
    grant: Grant | None = None
    version: int = 0
    changed_at: float = 0.0

    @property
    def is_empty(self) -> bool:
        """True if the record marks a removal."""
        return self.tier is None and self.grant is None


@dataclass(frozen=True, slots=True)
class Change:
    """A change to be written. Fields are changed independently, so concurrent changes of both fields are kept."""

    tier: str | Unchanged | None = UNCHANGED
    grant: Grant | Unchanged | None = UNCHANGED


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

    In that case `ids`, sized for the requested number, has the ids of all records; None if they are unknown.
    """

    records: Sequence[ClientRecord]
    cursor: Cursor
    is_complete: bool
    ids: BloomFilter | None = None


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

    async def watch(self, on_news: Callable[[], Awaitable[None]]) -> None:
        """Await `on_news` whenever records may have changed, one call at a time, until cancelled."""
        ...

    async def close(self) -> None:
        """Release all resources."""
        ...
