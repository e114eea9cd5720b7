"""The in-memory copy of the client store in one process: all records if they fit, else the last used. No I/O."""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from api_gateway.clients.api_keys import KnownKey
from api_gateway.clients.bloom_filter import BloomFilter
from api_gateway.clients.records import ClientRecord, ClientSnapshot, key_entry, proof_entry
from api_gateway.models import Client

_ABSENT_SHARE = 10  # ids without a record may use one in this many places


class ClientCache:
    """Records by id, the clients that they resolve to, keys by digest, and ids and keys known to have no record.

    Two states: complete (all records of the store are held, so an id without one has none), and partial (`knows` and
    `surely_absent` return whether a look-up can be avoided). A complete cache becomes partial when it exceeds `limit`;
    only `start` makes it complete again.
    """

    def __init__(self, limit: int, resolve: Callable[[ClientRecord], Client | None]) -> None:
        """Hold at most `limit` ids. `resolve` returns the client of a record, None if no tier of it applies now."""
        self.limit = limit
        self.is_complete = False
        self.clients: dict[str, Client] = {}
        self.keys: dict[str, KnownKey] = {}
        self._records: OrderedDict[str, ClientRecord] = OrderedDict()
        self._absent: OrderedDict[str, None] = OrderedDict()
        self._empty: set[str] = set()
        self._ids: BloomFilter | None = BloomFilter(limit)  # all ids that may have a record; None if unknown
        self._resolve = resolve

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else "partial"
        return f"<ClientCache [{len(self._records)} records, {len(self._absent)} absent, {state}]>"

    def __len__(self) -> int:
        """Return the number of ids held."""
        return len(self._records) + len(self._absent)

    def get(self, client_id: str) -> ClientRecord | None:
        """Return the record of a client; None if none is held."""
        return self._records.get(client_id)

    def records(self) -> Iterable[ClientRecord]:
        """Return the records held, least recently used first."""
        return self._records.values()

    def knows(self, client_id: str) -> bool:
        """Return whether the store's content for a client is known, and mark the client as recently used."""
        if client_id in self._records:
            self._records.move_to_end(client_id)
        elif client_id in self._absent:
            self._absent.move_to_end(client_id)
        else:
            return self.is_complete
        return True

    def surely_absent(self, client_id: str) -> bool:
        """Return whether the filter of ids excludes that the store has a record of a client."""
        return self._ids is not None and client_id not in self._ids

    @property
    def is_blind(self) -> bool:
        """True if it is unknown which ids other than the held ones have a record."""
        return self._ids is None and not self.is_complete

    def may_need_proof(self, client_id: str, *, with_tier: bool) -> bool:
        """Return whether the store may have a record, not held here, that requires a credential for the id.

        `with_tier`: some tier requires a credential, so any record may.
        """
        if self.is_complete or client_id in self._records or client_id in self._absent:
            return False
        if self.surely_absent(client_id):
            return False
        return with_tier or not self.surely_absent(proof_entry(client_id))

    def start(self, snapshot: ClientSnapshot) -> None:
        """Initialise from a snapshot's metadata; its records are added by `put`."""
        self.is_complete = snapshot.is_complete
        if snapshot.is_complete:
            return
        if snapshot.ids is None:
            self._ids = None
        elif self._ids is not None:
            self._ids.update(snapshot.ids)

    def assume(self, client_ids: Iterable[str] | None) -> None:
        """Become partial. The store may have records that require a credential: of these ids, or (None) of any."""
        self.is_complete = False
        self._ids = None if client_ids is None else BloomFilter(self.limit)
        for client_id in client_ids or ():
            self.note_id(client_id)
            self.note_id(proof_entry(client_id))

    def note_id(self, client_id: str) -> None:
        """Record that the store may have a record of a client, or the key of an entry."""
        if self._ids is not None:
            self._ids.add(client_id)
        self._absent.pop(client_id, None)

    def note_record(self, record: ClientRecord) -> None:
        """Record that the store has a record of a client, and its keys, without holding them."""
        self.note_id(record.id)
        for key in record.keys:
            self.note_id(key_entry(key.digest))
        if record.requires_proof():
            self.note_id(proof_entry(record.id))

    def put(self, record: ClientRecord, *, is_new_epoch: bool = False) -> bool:
        """Store a record unless the held one has the same or a higher version; return whether it was stored.

        With `is_new_epoch`, versions are not comparable and the record is always stored.
        """
        held = self._records.get(record.id)
        if held is not None and held.version >= record.version and not is_new_epoch:
            return False
        self.note_record(record)
        if held is not None:
            self._drop_keys(held)
        for key in record.keys:
            self.keys[key.digest] = KnownKey(record.id, key)
        self._records[record.id] = record
        self._records.move_to_end(record.id)
        self._empty.discard(record.id)
        if record.is_empty:
            self._empty.add(record.id)
        self.refresh(record)
        self._make_room()
        return True

    def refresh(self, record: ClientRecord) -> None:
        """Resolve the client of a record again, as after the end of a grant."""
        client = self._resolve(record)
        if client is None:
            self.clients.pop(record.id, None)
        else:
            self.clients[record.id] = client

    def refresh_all(self) -> None:
        """Resolve the clients of all records again, as after a change of tiers."""
        for record in self._records.values():
            self.refresh(record)

    def put_negative(self, client_id: str) -> None:
        """Record that the store has no record of a client, or no client with the key of an entry."""
        if client_id not in self._records and not self.is_complete:
            self._absent[client_id] = None
            self._make_room()

    def forget_empty(self, version: int) -> None:
        """Drop the empty records of removed clients up to `version`, from which on no older record can arrive.

        A partial cache keeps them, because they save look-ups.
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

    def _drop_keys(self, record: ClientRecord) -> None:
        for key in record.keys:
            self.keys.pop(key.digest, None)

    def _drop(self, client_id: str) -> None:
        self._drop_keys(self._records.pop(client_id))
        self._empty.discard(client_id)
        self.clients.pop(client_id, None)
