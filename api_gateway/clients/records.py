"""What is stored of a client, and what the registry asks of a store of such records. No I/O."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from api_gateway.clients.bloom_filter import BloomFilter

MAX_KEPT_CHANGES = 10_000  # whoever is further behind than this reads everything anew


class Unchanged(Enum):
    """Says of a field that it stays as it is."""

    KEEP = "keep"


UNCHANGED = Unchanged.KEEP


@dataclass(frozen=True, slots=True)
class Grant:
    """A tier until a moment, in seconds since the epoch (UTC)."""

    tier: str
    until: float


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """One client as it is stored: the tier it is registered for, if any, and the grant it was last given, if any.

    With neither it is what a removal leaves behind, so that others learn of it. `version` counts the changes of the
    whole store; of two records of one client the higher one holds. `changed_at` is seconds since the epoch.
    """

    id: str
    tier: str | None = None
    grant: Grant | None = None
    version: int = 0
    changed_at: float = 0.0

    @property
    def is_empty(self) -> bool:
        """True when nothing is said of the client any more."""
        return self.tier is None and self.grant is None


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be written of a client. Each field is changed by itself, so that two writers of two fields agree."""

    tier: str | Unchanged | None = UNCHANGED
    grant: Grant | Unchanged | None = UNCHANGED


class Cursor(NamedTuple):
    """How far a store's changes have been read. `epoch` is the life of the store in which versions count."""

    epoch: str
    version: int


NO_CURSOR = Cursor("", 0)


@dataclass(frozen=True, slots=True)
class ClientSnapshot:
    """Records as they were at `mark` or later; not all of them if there were more than asked for.

    Then `ids`, made for as many as were asked for, holds the ids of all; None if the store does not tell them.
    """

    records: Sequence[ClientRecord]
    cursor: Cursor
    is_complete: bool
    ids: BloomFilter | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """The newest record of every client changed since, oldest change first, and how far that goes."""

    records: Sequence[ClientRecord]
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class WriteResult:
    """A change that was made: the client's record before it (empty if there was none) and after it."""

    before: ClientRecord
    after: ClientRecord
    epoch: str


class OutcomeUnknown(OSError):
    """The store did not say whether it made a change, and could not be asked."""


class ClientStore(Protocol):
    """A store of records. Every method raises OSError when the store cannot be used."""

    @property
    def name(self) -> str:
        """What to call it towards an operator; holds no secret."""
        ...

    @property
    def is_remote(self) -> bool:
        """True when it can be away for a while, so that the gateway starts and goes on without it."""
        ...

    async def load(self, limit: int) -> ClientSnapshot:
        """Open the store if need be and read at most `limit` records."""
        ...

    async def write(self, client_id: str, change: Change) -> WriteResult:
        """Make a change and give it the next version. On return it is as durable as the store is.

        The last writer wins. Raises OutcomeUnknown when it may or may not have been made; after any other OSError it
        has not been and will not be.
        """
        ...

    async def end_grant(self, client_id: str, version: int) -> WriteResult | None:
        """Remove the grant of a record that is still at `version` if its time is over; None if nothing was changed.

        Of all that try, one succeeds.
        """
        ...

    async def changes(self, since: Cursor) -> Changes | None:
        """Return what has changed since; None if that cannot be told any more, so that all is to be read anew."""
        ...

    async def look_up(self, client_ids: Sequence[str]) -> list[ClientRecord | None]:
        """Return the records of these clients, None for those of whom nothing is stored."""
        ...

    async def watch(self, on_news: Callable[[], Awaitable[None]]) -> None:
        """Await `on_news` whenever something may have changed, one call at a time, until cancelled."""
        ...

    async def close(self) -> None:
        """Let go of the store."""
        ...
