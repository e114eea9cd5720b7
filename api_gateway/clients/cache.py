"""What one process remembers of the client store: all records if they fit, else those used last. Bounded, no I/O."""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from api_gateway.clients.bloom_filter import BloomFilter
from api_gateway.clients.records import ClientRecord, ClientSnapshot
from api_gateway.models import Client

_ABSENT_SHARE = 10  # invented ids may take this part of the room from the clients that exist


class ClientCache:
    """Records by id, the client each comes to in `clients`, and ids known to have no record.

    While it is complete, an id without a record is known to have none. Else `knows` tells, and `rules_out` of most
    ids that are invented.
    """

    def __init__(self, limit: int, resolve: Callable[[ClientRecord], Client | None]) -> None:
        """Hold at most `limit` ids; `resolve` returns what a record comes to now, None if it says nothing."""
        self.limit = limit
        self.is_complete = False
        self.clients: dict[str, Client] = {}
        self._records: OrderedDict[str, ClientRecord] = OrderedDict()
        self._absent: OrderedDict[str, None] = OrderedDict()
        self._empty: set[str] = set()
        self._ids: BloomFilter | None = BloomFilter(limit)  # all that may have a record; None if that is not known
        self._resolve = resolve

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else "partial"
        return f"<ClientCache [{len(self._records)} records, {len(self._absent)} absent, {state}]>"

    def __len__(self) -> int:
        """Return the ids held."""
        return len(self._records) + len(self._absent)

    def get(self, client_id: str) -> ClientRecord | None:
        """Return the record held of a client."""
        return self._records.get(client_id)

    def records(self) -> Iterable[ClientRecord]:
        """Return the records held."""
        return self._records.values()

    def knows(self, client_id: str) -> bool:
        """Tell whether it is known what the store says of a client, and note that it was used."""
        if client_id in self._records:
            self._records.move_to_end(client_id)
        elif client_id in self._absent:
            self._absent.move_to_end(client_id)
        else:
            return self.is_complete
        return True

    def surely_absent(self, client_id: str) -> bool:
        """Tell whether it is certain that nothing is stored of a client, without knowing of it in particular."""
        return self._ids is not None and client_id not in self._ids

    def start(self, snapshot: ClientSnapshot) -> None:
        """Hear how much there is, before its records are put in."""
        self.is_complete = snapshot.is_complete
        if snapshot.is_complete:
            return
        if snapshot.ids is None:
            self._ids = None
        elif self._ids is not None:
            self._ids.update(snapshot.ids)

    def note_id(self, client_id: str) -> None:
        """Note that there may be a record of a client, which is not held."""
        if self._ids is not None:
            self._ids.add(client_id)

    def put(self, record: ClientRecord, *, is_new_epoch: bool = False) -> bool:
        """Take a record over unless one as new is held; tell whether it was taken.

        In another epoch versions count anew, and the record is taken in any case.
        """
        held = self._records.get(record.id)
        if held is not None and held.version >= record.version and not is_new_epoch:
            return False
        self.note_id(record.id)
        self._records[record.id] = record
        self._records.move_to_end(record.id)
        self._absent.pop(record.id, None)
        self._empty.discard(record.id)
        if record.is_empty:
            self._empty.add(record.id)
        self.refresh(record)
        self._make_room()
        return True

    def refresh(self, record: ClientRecord) -> None:
        """Work out anew what a record comes to: with time, grants end."""
        client = self._resolve(record)
        if client is None:
            self.clients.pop(record.id, None)
        else:
            self.clients[record.id] = client

    def refresh_all(self) -> None:
        """Work out anew what every record comes to: tiers have changed."""
        for record in self._records.values():
            self.refresh(record)

    def put_negative(self, client_id: str) -> None:
        """Note that nothing is stored of a client."""
        if client_id not in self._records and not self.is_complete:
            self._absent[client_id] = None
            self._make_room()

    def forget_empty(self, version: int) -> None:
        """Drop what removals left, up to a version behind which no older record can come any more.

        A partial copy keeps them: they say that there is nothing to look up.
        """
        if self.is_complete:
            for client_id in [each for each in self._empty if self._records[each].version <= version]:
                self._drop(client_id)

    def _make_room(self) -> None:
        while len(self) > self.limit:
            if self.is_complete and self._empty:
                self._drop(next(iter(self._empty)))
            elif len(self._absent) * _ABSENT_SHARE > self.limit or not self._records:
                self._absent.popitem(last=False)
            else:
                self.is_complete = False
                self._drop(next(iter(self._records)))

    def _drop(self, client_id: str) -> None:
        del self._records[client_id]
        self._empty.discard(client_id)
        self.clients.pop(client_id, None)
