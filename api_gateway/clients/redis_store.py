"""The client store on a Redis or Valkey server that several gateways share.

A change is one script call, which assigns the next version, adds the change to the index and publishes it. Gateways
subscribe to changes and also poll twice a second, so a lost message delays a change by at most half a second. All
keys have one hash tag, so in a cluster they are on one node. The server must not evict keys (`maxmemory-policy
noeviction`); registrations are as durable as the server (`appendonly yes`).
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from api_gateway.clients.api_keys import api_keys_of, as_members
from api_gateway.clients.bloom_filter import BloomFilter
from api_gateway.clients.records import (
    MAX_KEPT_CHANGES,
    MAX_VALID_KEYS,
    UNCHANGED,
    Change,
    Changes,
    ClientRecord,
    ClientSnapshot,
    Cursor,
    Grant,
    KeyChange,
    OutcomeUnknown,
    WriteResult,
    key_entry,
    proof_entry,
)
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.storage.redis_session import WRITE_REFUSALS, StoreError, StoreSession

logger = logging.getLogger(__name__)

REDIS_POLL_INTERVAL = 0.5  # seconds between two polls for changes
_WRITERS = 4  # concurrent changes; each needs a connection
_PAGE = 1_000  # records read by one command
_CURSOR_DIGITS = 20  # of a position in a hash, an unsigned 64-bit integer

_WRITE = (Path(__file__).parent / "clients.lua").read_text()
# Returns the outcome of a change, or cancels it if it has not been made: its command may still be in transit.
_SETTLE = """
local outcome = redis.call('GET', KEYS[3])
if not outcome then
  redis.call('SET', KEYS[3], 'void', 'EX', 600)
elseif outcome ~= 'void' then
  return {'made', outcome, redis.call('HGET', KEYS[2], ARGV[1]), redis.call('HGET', KEYS[1], 'epoch')}
end
return {'void'}
"""
_CHANGES = """
local found = redis.call('HMGET', KEYS[1], 'epoch', 'version')
local epoch, version, since = found[1] or '', tonumber(found[2] or 0), tonumber(ARGV[2])
if epoch ~= ARGV[1] or since > version or since < version - ARGV[3] then
  return false
end
local reply = {epoch, version}
if since < version then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. since, '+inf')) do
    reply[#reply + 1] = id
    reply[#reply + 1] = redis.call('HGET', KEYS[2], id) or ''
  end
end
return reply
"""


class RedisClientStore:
    """Client records in a hash on a shared server. Implements `ClientStore`."""

    name = "the shared store"
    is_remote = True

    def __init__(self, session: StoreSession, *, prefix: str = "gateway") -> None:
        """Use a session, which the store closes, and keys that begin with `{prefix:clients}:`."""
        self._session = session
        self._client: Any = session.client
        start = f"{{{prefix}:clients}}:"
        self._meta, self._records, self._changes = f"{start}meta", f"{start}records", f"{start}changes"
        self._outcomes, self._channel = f"{start}outcome:", f"{start}changed"
        self._keys, self._key_uses = f"{start}keys", f"{start}key-uses"
        self._news = asyncio.Event()
        self._writers = asyncio.Semaphore(_WRITERS)
        self._is_listening = False

    def __repr__(self) -> str:
        return f"<RedisClientStore [{'subscribed' if self._is_listening else 'not subscribed'}]>"

    async def load(self, limit: int) -> ClientSnapshot:
        """Read at most `limit` records, and the ids of all, a page at a time.

        Changes during the reading are newer than the returned cursor, so they are read again by `changes`.
        """
        epoch, version = await self._call(self._client.hmget(self._meta, "epoch", "version"))
        start = Cursor((epoch or b"").decode(), int(version or 0))
        records: dict[str, ClientRecord] = {}
        ids, proofs = BloomFilter(limit), set[str]()
        cursor = 0
        while True:
            cursor, page = await self._call(self._client.hscan(self._records, cursor, count=_PAGE))
            for client_id in page:
                ids.add(client_id.decode("ascii", "replace"))
            for digest in _digests_in(page.values()):
                ids.add(key_entry(digest))
            for client_id, text in page.items():
                if b'"verified_only":true' in text or (b'"keys":' in text and b'"verified_only":' not in text):
                    name = client_id.decode("ascii", "replace")
                    ids.add(proof_entry(name))
                    if len(proofs) <= limit:
                        proofs.add(name)
            if len(records) <= limit:
                records |= {record.id: record for record in _records(page.items()) if not record.is_empty}
            if not cursor:
                break
        found = list(records.values())[:limit]
        if len(records) <= limit:
            return ClientSnapshot(found, start, is_complete=True)
        known = frozenset(proofs) if len(proofs) <= limit else None
        return ClientSnapshot(found, start, is_complete=False, ids=ids, proofs=known)

    async def write(self, client_id: str, change: Change) -> WriteResult:
        """Make a change. Raises OutcomeUnknown and OSError as `ClientStore.write` does."""
        written = await self._write(client_id, change, "")
        assert written is not None  # noqa: S101 - an unconditional change is always made
        return written

    async def end_grant(self, client_id: str, version: int) -> WriteResult | None:
        """Remove a grant that has expired by the server's clock, if the record is still at `version`."""
        return await self._write(client_id, Change(grant=None), str(version))

    async def changes(self, since: Cursor) -> Changes | None:
        """Return the changes since a cursor; None if the epoch or the kept changes do not include it."""
        keys = self._meta, self._records, self._changes
        reply = await self._call(self._client.eval(_CHANGES, len(keys), *keys, *since, MAX_KEPT_CHANGES))
        if reply is None:
            return None
        epoch, version, *pairs = reply
        found = _records(zip(pairs[::2], pairs[1::2], strict=True))
        return Changes(found, Cursor(epoch.decode(), int(version)))

    async def look_up(self, client_ids: Sequence[str]) -> list[ClientRecord | None]:
        """Return the records of these clients in order, None for those without a readable record."""
        texts = await self._call(self._client.hmget(self._records, *client_ids))
        return [text and _record(each.encode(), text) for each, text in zip(client_ids, texts, strict=True)]

    async def scan(self, position: str, count: int) -> tuple[list[ClientRecord], str | None]:
        """Return records in the order of the server's hash table; see `ClientStore.scan`."""
        if position and not (position.isascii() and position.isdecimal() and len(position) <= _CURSOR_DIGITS):
            raise ValueError(f"no position of the store: {position[:40]!r}")
        cursor, page = await self._call(self._client.hscan(self._records, int(position or 0), count=count))
        return _records(page.items()), str(int(cursor)) if int(cursor) else None

    async def look_up_keys(self, digests: Sequence[str]) -> list[ClientRecord | None]:
        """Return the records of the clients that have these keys in order, None for a key that no client has."""
        ids = [found and found.decode() for found in await self._call(self._client.hmget(self._keys, *digests))]
        known = list(dict.fromkeys(client_id for client_id in ids if client_id))
        records = dict(zip(known, await self.look_up(known), strict=True)) if known else {}
        return [records.get(client_id) for client_id in ids]

    async def note_key_uses(self, uses: Mapping[str, int]) -> None:
        """Store when keys were last used, in seconds since the epoch by digest."""
        await self._call(self._client.hset(self._key_uses, mapping=dict(uses)))

    async def key_uses(self, digests: Sequence[str]) -> dict[str, int]:
        """Return when these keys were last used, of those that were."""
        found = await self._call(self._client.hmget(self._key_uses, *digests)) if digests else []
        return {digest: int(at) for digest, at in zip(digests, found, strict=True) if at is not None}

    async def watch(self, on_news: Callable[[], Awaitable[None]]) -> None:
        """Await `on_news` at once, after each message and every `REDIS_POLL_INTERVAL` seconds, until cancelled."""
        subscription = asyncio.create_task(
            self._session.listen(self._channel, self._on_message, self._on_listening), name="client store subscription"
        )
        try:
            while True:
                self._news.clear()
                await on_news()
                with suppress(TimeoutError):
                    async with asyncio.timeout(REDIS_POLL_INTERVAL):
                        await self._news.wait()
        finally:
            await cancel_and_wait(subscription)

    async def close(self) -> None:
        """Close the session."""
        with suppress(*StoreError):
            await self._session.close()

    def _on_message(self, _version: str) -> None:
        self._news.set()

    def _on_listening(self, is_listening: bool) -> None:  # noqa: FBT001 - the signature of a callback
        self._is_listening = is_listening
        self._news.set()  # messages published before the subscription were not received

    async def _write(self, client_id: str, change: Change, ended_version: str) -> WriteResult | None:
        async with self._writers:
            return await self._write_now(client_id, change, ended_version)

    async def _write_now(self, client_id: str, change: Change, ended_version: str) -> WriteResult | None:
        await self._call(self._client.hget(self._meta, "epoch"))  # a failure here has certainly changed nothing
        outcome = f"{self._outcomes}{secrets.token_hex(12)}"
        keys = self._meta, self._records, self._changes, outcome, self._keys, self._key_uses
        arguments = (
            client_id,
            secrets.token_hex(8),
            MAX_KEPT_CHANGES,
            self._channel,
            *_arguments(change),
            ended_version,
            "" if change.keys is None else _key_change(change.keys),
            "" if change.verified_only is UNCHANGED else json.dumps(change.verified_only),
        )
        try:
            reply = await self._client.eval(_WRITE, len(keys), *keys, *arguments)
        except WRITE_REFUSALS as error:
            raise OSError(f"the server refused the change: {error}") from error
        except StoreError as error:
            reply = await self._settle(client_id, outcome, error)
        if reply[0] == b"kept":
            return None
        if reply[0] == b"void":
            raise OSError("the server did not respond in time; the change was cancelled")
        _, before, after, epoch = reply
        key = client_id.encode()
        empty = ClientRecord(client_id)
        return WriteResult(_record(key, before) or empty, _record(key, after) or empty, epoch.decode())

    async def _settle(self, client_id: str, outcome: str, cause: Exception) -> Any:
        keys = self._meta, self._records, outcome
        try:
            return await self._client.eval(_SETTLE, len(keys), *keys, client_id)
        except StoreError as error:
            raise OutcomeUnknown(f"the store failed ({cause}), and a query on the outcome failed, too") from error

    async def _call(self, reply: Awaitable[Any]) -> Any:
        try:
            return await reply
        except StoreError as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


def _arguments(change: Change) -> list[str]:
    """Return the script's arguments for a change: for each field whether it is changed, and its value."""
    tier: str = "" if change.tier is UNCHANGED else change.tier or ""
    grant = None if change.grant is UNCHANGED else change.grant
    return [
        "" if change.tier is UNCHANGED else "1",
        tier,
        "" if change.grant is UNCHANGED else "1",
        grant.tier if grant else "",
        f"{grant.until:.3f}" if grant else "",
    ]


def _key_change(change: KeyChange) -> str:
    """Return a change of keys as the script reads it. An empty list would be an empty object in Lua."""
    members: dict[str, Any] = {}
    if change.add is not None:
        members["add"] = {change.add.digest: as_members(change.add)}
        members["most"] = MAX_VALID_KEYS
    if change.remove:
        members["remove"] = list(change.remove)
    if change.add is not None and change.replaces is not None:
        digest, until = change.replaces
        members["replaces"] = {"digest": digest, "until": round(until, 3), "by": change.add.id}
    if change.clear:
        members["clear"] = True
    return json.dumps(members)


def _digests_in(texts: Iterable[bytes]) -> Iterator[str]:
    """Yield the digests of the keys in records. A record that cannot be read is reported elsewhere."""
    for text in texts:
        if b'"keys"' in text:
            with suppress(ValueError, AttributeError):
                yield from json.loads(text).get("keys") or ()


def _records(pairs: Iterable[tuple[bytes, bytes]]) -> list[ClientRecord]:
    return [record for pair in pairs if (record := _record(*pair)) is not None]


def _record(client_id: bytes, text: bytes) -> ClientRecord | None:
    """Return a parsed record; None for an absent one, and for an unreadable one, which is logged."""
    if not text:
        return None
    try:
        fields = json.loads(text)
        tier, granted = fields.get("tier"), fields.get("grant")
        grant = Grant(granted, fields["grant_until"]) if granted else None
        keys = api_keys_of(fields["keys"]) if "keys" in fields else ()
        verified_only = fields.get("verified_only")
        return ClientRecord(
            client_id.decode(), tier, grant, fields["version"], fields["changed_at"], keys, verified_only
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.error("client %r: unreadable record ignored: %r", client_id, error)  # noqa: TRY400 - invalid content, no defect
        return None
