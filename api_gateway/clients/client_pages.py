"""All registered clients in pages: those of the configuration, then those that only the store has."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from api_gateway.clients.records import ClientRecord, ClientStore
from api_gateway.models import Client

BATCH = 1_000  # records read from the store at once
_MOST_BATCHES = 20  # for one page: if few clients have the tier, pages are short
_STORED = "s:"  # positions in the store; others are ids of the configuration, behind `_CONFIGURED`
_CONFIGURED = "c:"


class ListedClient(NamedTuple):
    """A registered client, and its record."""

    client: Client
    record: ClientRecord


class InvalidPosition(ValueError):
    """A position that no page has named."""


async def client_page(
    store: ClientStore,
    configured: Mapping[str, Client],
    resolve: Callable[[ClientRecord], Client],
    *,
    after: str,
    limit: int,
    tier: str | None,
) -> tuple[list[ListedClient], str | None]:
    """Return the clients of a tier (None: of any) behind a position, and the position behind them; None at the end.

    A page has about `limit` clients: more if the store returns more at once, fewer if few clients have the tier. A
    client that is registered throughout is in at least one page. Raises InvalidPosition, and OSError if the store is
    unavailable.
    """
    found: list[ListedClient] = []
    position: str | None = after or _CONFIGURED
    for _ in range(_MOST_BATCHES):
        if position is None or len(found) >= limit:
            break
        count = min(BATCH, limit - len(found)) if tier is None else BATCH
        if position.startswith(_CONFIGURED):
            records, position = await _configured(store, configured, position, count)
        elif position.startswith(_STORED):
            scanned, end = await store.scan(position.removeprefix(_STORED), count)
            records = [record for record in scanned if not record.is_empty and record.id not in configured]
            position = None if end is None else f"{_STORED}{end}"
        else:
            raise InvalidPosition(after)
        clients = [ListedClient(resolve(record), record) for record in records]
        found += [one for one in clients if one.client.is_registered and tier in (None, one.client.quota.name)]
    return found, position


async def _configured(
    store: ClientStore, configured: Mapping[str, Client], position: str, count: int
) -> tuple[list[ClientRecord], str]:
    """Return the records of configured clients behind a position, empty ones if the store has none, and the next."""
    ids = sorted(name for name in configured if name > position.removeprefix(_CONFIGURED))
    chosen = ids[:count]
    records = await store.look_up(chosen) if chosen else []
    known = [record or ClientRecord(name) for name, record in zip(chosen, records, strict=True)]
    return known, f"{_CONFIGURED}{chosen[-1]}" if len(ids) > count else _STORED
