"""Counts of ended exchanges by day, client and route, in memory until they are written."""

from collections.abc import Mapping

from api_gateway.models import Client, Exchange

Key = tuple[int, str, str]  # day since the epoch (UTC), client id, route
DAY = 86_400  # seconds
# With a space, which no client id has:
OTHERS = "other clients"  # instead of the id of a client that is not registered, beyond the limit
_ADDRESS = "address "  # before the address of a client without an id
# Of a row, in this order. `limited`: refused by a rate limit; `failed`: status 5xx; `tokens`: charged in the end.
COUNTED = ("requests", "limited", "failed", "tokens", "bytes_received", "bytes_sent")


def name_of(client: Client) -> str:
    """Return the name under which a client is counted: its id, or its address, which no other client can claim."""
    return f"{_ADDRESS}{client.id}" if client.source == "address" else client.id


class UsageCounts:
    """Counts exchanges. The number of ids that clients have invented is limited for each day."""

    def __init__(self, max_unregistered: int) -> None:
        """Count at most `max_unregistered` clients a day by id that are not registered; the others as `OTHERS`."""
        self._max_unregistered = max_unregistered
        self._rows: dict[Key, list[float]] = {}
        self._unregistered: set[str] = set()
        self._day = -1

    def __repr__(self) -> str:
        return f"<UsageCounts [{len(self._rows)} rows]>"

    def count(self, exchange: Exchange, now: float) -> None:
        """Count an exchange that has ended at `now`, in seconds since the epoch."""
        day = int(now // DAY)
        if day != self._day:
            self._day, self._unregistered = day, set()
        key = day, self._name(exchange), exchange.route or ""
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = [0] * len(COUNTED)
        row[0] += 1
        decision = exchange.decision
        if decision is not None:
            if decision.allowed:
                row[3] += exchange.cost
            else:
                row[1] += 1
        row[2] += exchange.status >= 500  # noqa: PLR2004 - the class of server errors
        row[4] += exchange.bytes_in
        row[5] += exchange.bytes_out

    def _name(self, exchange: Exchange) -> str:
        client = exchange.client
        if client is None:
            return ""
        name, known = name_of(client), self._unregistered
        if client.is_registered or name in known:
            return name
        if len(known) >= self._max_unregistered:
            return OTHERS
        known.add(name)
        return name

    def take(self) -> dict[Key, list[float]]:
        """Return the rows, and clear the counts."""
        rows, self._rows = self._rows, {}
        return rows

    def put_back(self, rows: Mapping[Key, list[float]]) -> None:
        """Add rows that could not be written."""
        for key, counted in rows.items():
            held = self._rows.get(key)
            self._rows[key] = counted if held is None else [a + b for a, b in zip(held, counted, strict=True)]
