"""The client store on a Redis or Valkey server that all gateways share.

Each change is one script: it takes the next version, is noted in the index of changes, and is published. Everybody
subscribes, and asks for newer versions twice a second all the same, so that a message that is lost costs half a
second at most. The keys share a hash tag, so in a cluster they lie on one node. The server must not evict
(`maxmemory-policy noeviction`), and tiers are as durable as it is (`appendonly yes`).
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from api_gateway.clients.bloom_filter import BloomFilter
from api_gateway.clients.records import (
    MAX_KEPT_CHANGES,
    UNCHANGED,
    Change,
    Changes,
    ClientRecord,
    ClientSnapshot,
    Cursor,
    Grant,
    OutcomeUnknown,
    WriteResult,
)
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.storage.redis_session import WRITE_REFUSALS, StoreError, StoreSession

logger = logging.getLogger(__name__)

REDIS_POLL_INTERVAL = 0.5  # seconds between two questions for newer versions
_WRITERS = 4  # changes under way at once; each takes a connection
_PAGE = 1_000  # records read at once

_WRITE = (Path(__file__).parent / "clients.lua").read_text()
# Says what became of a change, and calls it off if it has not been made: its command may still be under way.
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
local answer = {epoch, version}
if since < version then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. since, '+inf')) do
    answer[#answer + 1] = id
    answer[#answer + 1] = redis.call('HGET', KEYS[2], id) or ''
  end
end
return answer
"""


class RedisClientStore:
    """Client records in hashes of a shared server. See `ClientStore`."""

    name = "the shared store"
    is_remote = True

    def __init__(self, session: StoreSession, *, prefix: str = "gateway") -> None:
        """Use a session of one's own, which connects when first used; every key begins with `{prefix:clients}:`."""
        self._session = session
        self._client: Any = session.client
        start = f"{{{prefix}:clients}}:"
        self._meta, self._records, self._changes = f"{start}meta", f"{start}records", f"{start}changes"
        self._outcomes, self._channel = f"{start}outcome:", f"{start}changed"
        self._news = asyncio.Event()
        self._writers = asyncio.Semaphore(_WRITERS)
        self._is_listening = False

    def __repr__(self) -> str:
        return f"<RedisClientStore [{'listening' if self._is_listening else 'not listening'}]>"

    async def load(self, limit: int) -> ClientSnapshot:
        """See `ClientStore`. What changes while it reads is newer than the mark, and so read again.

        All ids are read, a page at a time, also where there are more than `limit`.
        """
        epoch, version = await self._call(self._client.hmget(self._meta, "epoch", "version"))
        mark = Cursor((epoch or b"").decode(), int(version or 0))
        records: dict[str, ClientRecord] = {}
        ids = BloomFilter(limit)
        cursor = 0
        while True:
            cursor, page = await self._call(self._client.hscan(self._records, cursor, count=_PAGE))
            for client_id in page:
                ids.add(client_id.decode("ascii", "replace"))
            if len(records) <= limit:
                records |= {record.id: record for record in _records(page.items()) if not record.is_empty}
            if not cursor:
                break
        is_complete = len(records) <= limit
        return ClientSnapshot(list(records.values())[:limit], mark, is_complete, None if is_complete else ids)

    async def write(self, client_id: str, change: Change) -> WriteResult:
        """See `ClientStore`."""
        written = await self._write(client_id, change, "")
        assert written is not None  # noqa: S101 - without a condition it is always made
        return written

    async def end_grant(self, client_id: str, version: int) -> WriteResult | None:
        """See `ClientStore`; whether its time is over is told by the server's clock."""
        return await self._write(client_id, Change(grant=None), str(version))

    async def changes(self, since: Cursor) -> Changes | None:
        """See `ClientStore`."""
        keys = self._meta, self._records, self._changes
        reply = await self._call(self._client.eval(_CHANGES, len(keys), *keys, *since, MAX_KEPT_CHANGES))
        if reply is None:
            return None
        epoch, version, *pairs = reply
        found = _records(zip(pairs[::2], pairs[1::2], strict=True))
        return Changes(found, Cursor(epoch.decode(), int(version)))

    async def look_up(self, client_ids: Sequence[str]) -> list[ClientRecord | None]:
        """See `ClientStore`."""
        texts = await self._call(self._client.hmget(self._records, *client_ids))
        return [text and _record(each.encode(), text) for each, text in zip(client_ids, texts, strict=True)]

    async def watch(self, on_news: Callable[[], Awaitable[None]]) -> None:
        """See `ClientStore`; the first call comes at once."""
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
        """See `ClientStore`."""
        with suppress(*StoreError):
            await self._session.close()

    def _on_message(self, _version: str) -> None:
        self._news.set()

    def _on_listening(self, is_listening: bool) -> None:  # noqa: FBT001 - what is told, not what is asked for
        self._is_listening = is_listening
        self._news.set()  # what was published before it began is not told

    async def _write(self, client_id: str, change: Change, ended_version: str) -> WriteResult | None:
        async with self._writers:
            return await self._write_now(client_id, change, ended_version)

    async def _write_now(self, client_id: str, change: Change, ended_version: str) -> WriteResult | None:
        await self._call(self._client.hget(self._meta, "epoch"))  # what fails here has certainly changed nothing
        outcome = f"{self._outcomes}{secrets.token_hex(12)}"
        keys = self._meta, self._records, self._changes, outcome
        arguments = (
            client_id,
            secrets.token_hex(8),
            MAX_KEPT_CHANGES,
            self._channel,
            *_arguments(change),
            ended_version,
        )
        try:
            reply = await self._client.eval(_WRITE, len(keys), *keys, *arguments)
        except WRITE_REFUSALS as error:
            raise OSError(f"the server refuses the change: {error}") from error
        except StoreError as error:
            reply = await self._settle(client_id, outcome, error)
        if reply[0] == b"kept":
            return None
        if reply[0] == b"void":
            raise OSError("the server did not answer in time; the change was called off")
        _, before, after, epoch = reply
        key = client_id.encode()
        empty = ClientRecord(client_id)
        return WriteResult(_record(key, before) or empty, _record(key, after) or empty, epoch.decode())

    async def _settle(self, client_id: str, outcome: str, cause: Exception) -> Any:
        keys = self._meta, self._records, outcome
        try:
            return await self._client.eval(_SETTLE, len(keys), *keys, client_id)
        except StoreError as error:
            raise OutcomeUnknown(f"the store failed ({cause}), and then did not tell what became of it") from error

    async def _call(self, reply: Awaitable[Any]) -> Any:
        try:
            return await reply
        except StoreError as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


def _arguments(change: Change) -> list[str]:
    """Return what the script is given of a change: for each field whether it is set, and to what."""
    tier: str = "" if change.tier is UNCHANGED else change.tier or ""
    grant = None if change.grant is UNCHANGED else change.grant
    return [
        "" if change.tier is UNCHANGED else "1",
        tier,
        "" if change.grant is UNCHANGED else "1",
        grant.tier if grant else "",
        f"{grant.until:.3f}" if grant else "",
    ]


def _records(pairs: Iterable[tuple[bytes, bytes]]) -> list[ClientRecord]:
    return [record for pair in pairs if (record := _record(*pair)) is not None]


def _record(client_id: bytes, text: bytes) -> ClientRecord | None:
    """Read one record; one that cannot be read was written by somebody else, and says nothing."""
    if not text:
        return None
    try:
        fields = json.loads(text)
        tier, granted = fields.get("tier"), fields.get("grant")
        grant = Grant(granted, fields["grant_until"]) if granted else None
        return ClientRecord(client_id.decode(), tier, grant, fields["version"], fields["changed_at"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.error("the record of client %r cannot be read and is ignored: %r", client_id, error)  # noqa: TRY400 - nothing of ours failed
        return None
