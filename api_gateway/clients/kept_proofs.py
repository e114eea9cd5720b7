"""The ids that must be proved, kept on this machine for a start while the store of the clients is unavailable.

Every process writes all that it knows, off the event loop and at most once a second; the processes of a machine know
the same soon after a change. The file is derived: one that is unusable, or of another version or store, is replaced
once the store has been read.
"""

import asyncio
import json
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from api_gateway.clients.cache import ClientCache
from api_gateway.clients.identity_rules import IdentityRules
from api_gateway.clients.records import ClientRecord, ClientSnapshot
from api_gateway.system.state_folder import make_private, replacing

logger = logging.getLogger(__name__)

PROOFS_FILE = "verified_only.json"
PROOFS_VERSION = 1
_WRITE_INTERVAL = 1.0  # seconds between two writes
_RETRY_INTERVAL = 30.0  # seconds, after a failed one
_BATCH = 5_000  # ids written before another thread may run
_READ_BATCH = 500  # records read before the event loop runs other tasks


class InvalidProofFile(Exception):
    """The file cannot be used; the message names the file and the cause."""


@dataclass(frozen=True, slots=True)
class RequiredProofs:
    """The ids in a store that must be proved, None if they are too many, and the tiers that required it."""

    ids: frozenset[str] | None
    tiers: frozenset[str]


class ProofFile:
    """The file `verified_only.json` of one store. All methods block."""

    def __init__(self, folder: Path, store: str) -> None:
        """`store` names the store without any secret."""
        self.path = folder / PROOFS_FILE
        self._store = store

    def __repr__(self) -> str:
        return f"<ProofFile [{self.path}]>"

    def read(self) -> RequiredProofs:
        """Return the content that was written last. Raises InvalidProofFile."""
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            raise InvalidProofFile(f"{self.path} does not exist yet") from None
        except (OSError, ValueError, RecursionError) as error:  # ValueError: it is neither text nor JSON
            raise InvalidProofFile(f"{self.path} cannot be read: {getattr(error, 'strerror', error)}") from error
        if not isinstance(content, dict):
            raise InvalidProofFile(f"{self.path} must have an object")
        version, store = content.get("version"), content.get("store")
        if version != PROOFS_VERSION or isinstance(version, bool):
            raise InvalidProofFile(f"{self.path} must have version {PROOFS_VERSION}, got {str(version)[:40]}")
        if store != self._store:
            raise InvalidProofFile(f"{self.path} is of another store, {str(store)[:100]!r}")
        ids, tiers = content.get("ids"), content.get("tiers")
        if not (_are_names(tiers) and (ids is None or _are_names(ids))):
            raise InvalidProofFile(f"{self.path} must have lists of names, tiers and ids")
        return RequiredProofs(None if ids is None else frozenset(ids), frozenset(tiers))

    def write(self, ids: Sequence[str] | None, tiers: Iterable[str]) -> None:
        """Replace the content; a reader finds the previous or the new one. Raises OSError."""
        head = json.dumps({"version": PROOFS_VERSION, "store": self._store, "tiers": sorted(tiers)})
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        make_private(self.path.parent)
        with replacing(self.path, draft) as file:
            file.write(f'{head[:-1]}, "ids": ')
            if ids is None:
                file.write("null}\n")
            else:
                parts = (json.dumps(ids[at : at + _BATCH])[1:-1] for at in range(0, len(ids), _BATCH))
                file.write("[")
                for number, part in enumerate(parts):
                    file.write(f",\n{part}" if number else part)
                file.write("]}\n")


def _are_names(found: object) -> TypeGuard[list[str]]:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


class KeptProofs:
    """The ids that must be proved, as far as this process knows, and their file.

    States: new; recalled (the store was unavailable at the start: what the file has holds until `follow`), and
    following the store. Without a file nothing is kept.
    """

    def __init__(self, file: ProofFile | None, limit: int) -> None:
        """Keep at most `limit` ids; a store with more counts as unknown at a start without it."""
        self.is_recalled = False
        self._file = file
        self._limit = limit
        self._recalled = RequiredProofs(None, frozenset())
        self._source = "nothing is kept"  # of what was recalled, or why nothing was
        self._ids: set[str] | None = None
        self._tiers: frozenset[str] | None = None  # None until the store has been read
        self._unread: ClientCache | None = None  # whose records are to be read before the next write
        self._is_changed = False
        self._writing: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self.error: str | None = None  # of the last write

    def __repr__(self) -> str:
        count = "unknown" if self._ids is None else len(self._ids)
        return f"<KeptProofs [{count} ids{', recalled' if self.is_recalled else ''}]>"

    # At a start without the store

    async def recall(self, cache: ClientCache, rules: IdentityRules) -> None:
        """Read the file, and give the ids in it to an empty cache."""
        self.is_recalled = True
        if self._file is not None:
            try:
                self._recalled = await asyncio.to_thread(self._file.read)
                self._source = str(self._file.path)
            except InvalidProofFile as error:
                self._source = str(error)
        self.assume(cache, rules)

    def assume(self, cache: ClientCache, rules: IdentityRules) -> None:
        """Have a cache require a credential for the recalled ids; for any id, if they are not known."""
        ids, missing = self._recalled.ids, rules.tiers - self._recalled.tiers
        if ids is not None and not missing:
            cache.assume(ids)
            logger.warning(
                "started without the client store; ids that need a credential by %s: %d", self._source, len(ids)
            )
        elif not rules.can_prove:
            cache.assume(())
        else:
            cache.assume(None)
            cause = self._source
            if ids is not None:
                cause = f"{cause} does not cover the tiers {', '.join(sorted(missing))}"
            logger.warning(
                "started without the client store, and it is not known which ids need a credential (%s): until the"
                " store is available, each request that only sends an id is refused with 503; if no client has a"
                " credential, set identity.sources without api_key and jwt",
                cause,
            )

    # With the store

    def follow(self, cache: ClientCache, snapshot: ClientSnapshot, rules: IdentityRules) -> None:
        """Replace the ids by those of a store, whose records the cache holds as far as they fit."""
        self.is_recalled = False
        if self._file is not None:
            self._replace(cache, snapshot.proofs, rules.tiers)

    def change_tiers(self, cache: ClientCache, rules: IdentityRules) -> None:
        """Recompute the ids if the tiers that require a credential have changed."""
        if self._tiers is not None and rules.tiers != self._tiers:
            self._replace(cache, None, rules.tiers)

    def note(self, record: ClientRecord) -> None:
        """Update the ids by the record of a client, newer than any before."""
        if self._ids is None or self._tiers is None:
            return
        if record.requires_proof(self._tiers) == (record.id in self._ids):
            return
        self._ids ^= {record.id}
        if len(self._ids) > self._limit:
            self._ids = None
        self._write_soon()

    def _replace(self, cache: ClientCache, others: frozenset[str] | None, tiers: frozenset[str]) -> None:
        """Replace the ids by those of the cached records and `others`; None: the others are unknown."""
        is_known = cache.is_complete or (others is not None and not tiers)
        self._tiers = tiers
        self._ids, self._unread = (set(others or ()), cache) if is_known else (None, None)
        self._write_soon()

    async def _read_records(self, cache: ClientCache) -> None:
        """Read the cached records in steps; `note` covers those that change in the meantime."""
        ids, tiers = self._ids, self._tiers
        for count, client_id in enumerate(tuple(cache.clients)):  # copied five times as fast as `records`
            if ids is None or tiers is None or self._ids is not ids:
                return  # too many, or others are to be read
            record = cache.get(client_id)
            if record is None or record.requires_proof(tiers):  # None: no room for it since
                ids.add(client_id)
            else:
                ids.discard(client_id)
            if count % _READ_BATCH == 0:
                await asyncio.sleep(0)
        if ids is not None and self._ids is ids and len(ids) > self._limit:
            self._ids = None

    # The file

    def _write_soon(self) -> None:
        self._is_changed = True
        if self._file is not None and self._writing is None:
            self._writing = asyncio.create_task(self._write_changes(self._file), name="ids that must be proved")

    async def _write_changes(self, file: ProofFile) -> None:
        """Write at once, and then once in `_WRITE_INTERVAL` seconds, until what is known is written."""
        while self._is_changed:
            self._is_changed = False
            while self._unread is not None:
                unread, self._unread = self._unread, None
                await self._read_records(unread)
            ids = None if self._ids is None else tuple(self._ids)
            try:
                await asyncio.to_thread(file.write, ids, self._tiers or ())
            except OSError as error:
                self._note_error(error)
                self._is_changed = not self._closing.is_set()
            else:
                self.error = None
            with suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_INTERVAL if self.error else _WRITE_INTERVAL):
                    await self._closing.wait()
        self._writing = None

    def _note_error(self, error: OSError) -> None:
        if str(error) != self.error:
            logger.warning(
                "%s cannot be written, so a start without the client store would use its former content: %s; free"
                " space, or set state_dir to a folder that this user can write",
                PROOFS_FILE,
                error,
            )
        self.error = str(error)

    async def close(self) -> None:
        """Write what has changed."""
        self._closing.set()
        if self._writing is not None:
            await self._writing
