"""Clients on a real shared server: changes are followed within a second, and outcomes of writes are exact."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from api_gateway.clients import redis_store
from api_gateway.clients.records import Change, ClientRecord, Grant, OutcomeUnknown
from api_gateway.clients.redis_store import RedisClientStore
from api_gateway.clients.registry import ClientRegistry
from api_gateway.errors import StoreUnavailable
from api_gateway.storage.redis_session import StoreSession
from tests.kit import PATIENCE, soon
from tests.store_kit import StoreServer
from tests.unit.test_client_registry import following, tier_of, view

PREFIX = "{gateway:clients}:"
META, RECORDS, CHANGES = f"{PREFIX}meta", f"{PREFIX}records", f"{PREFIX}changes"
TIER_NAMES = ("FREE", "BASIC", "PREMIUM")


@asynccontextmanager
async def joined(server: StoreServer, *, patience: float = 5.0, **options: Any) -> AsyncIterator[ClientRegistry]:
    """Run a registry on that server, as a gateway does."""
    async with following(RedisClientStore(StoreSession(server.url, timeout=patience)), **options) as registry:
        yield registry


@asynccontextmanager
async def opened(server: StoreServer, patience: float = 0.3) -> AsyncIterator[RedisClientStore]:
    """Use a store by itself."""
    store = RedisClientStore(StoreSession(server.url, timeout=patience))
    try:
        yield store
    finally:
        await store.close()


def is_subscribed(*registries: ClientRegistry) -> Callable[[], bool]:
    return lambda: all(registry._store._is_listening for registry in registries)  # type: ignore[attr-defined]  # it is ours


# Following


async def test_what_one_gateway_changes_another_follows_by_the_message(
    store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the next poll for changes."""
    monkeypatch.setattr(redis_store, "REDIS_POLL_INTERVAL", 1_000)
    async with joined(store_server) as one, joined(store_server) as other:
        await soon(is_subscribed(one, other), "both subscribe")
        for tier in ("PREMIUM", "BASIC"):
            await one.set_tier("acme", tier)
            await soon(lambda tier=tier: tier_of(other, "acme") == (tier, "registered"), "it follows")  # type: ignore[misc]  # a loop's value
        await other.delete("acme")
        assert await soon(lambda: tier_of(one, "acme") == ("FREE", "default"), "it follows") < 1


async def test_without_messages_it_follows_within_a_second(
    store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisClientStore, "_on_message", lambda self, version: None)
    async with joined(store_server) as other:
        await soon(is_subscribed(other), "it subscribes")
        async with opened(store_server) as store:
            await store.write("acme", Change(tier="PREMIUM"))
        await soon(lambda: tier_of(other, "acme") == ("PREMIUM", "registered"), "it follows")


async def test_a_subscription_that_was_killed_comes_back(store_server: StoreServer) -> None:
    async with joined(store_server) as one, joined(store_server) as other:
        await soon(is_subscribed(one, other), "both subscribe")
        assert store_server.command("CLIENT", "KILL", "TYPE", "pubsub") == b":2\r\n"
        await one.set_tier("acme", "PREMIUM")
        await soon(lambda: tier_of(other, "acme") == ("PREMIUM", "registered"), "it follows")
        await soon(
            lambda: store_server.command("PUBSUB", "NUMSUB", f"{PREFIX}changed").endswith(b":2\r\n"), "it is back"
        )


async def test_a_restart_of_the_gateway_keeps_tiers_and_grants(store_server: StoreServer) -> None:
    until = round(time.time() + 600.125, 3)
    async with joined(store_server) as registry:
        await registry.set_tier("acme", "PREMIUM")
        await registry.set_tier("üñí", "BASIC")
        await registry.grant("initech", "PREMIUM", until)
    async with joined(store_server) as registry:
        assert tier_of(registry, "acme") == ("PREMIUM", "registered")
        assert tier_of(registry, "üñí") == ("BASIC", "registered")
        assert (await registry.inspect("initech")).grant == Grant("PREMIUM", until)


async def test_all_who_write_at_one_time_end_up_with_the_last_writer(store_server: StoreServer) -> None:
    async with (
        joined(store_server, patience=5) as one,
        joined(store_server, patience=5) as other,
        joined(store_server, patience=5) as third,
    ):
        everybody, source = (one, other, third), random.Random(7)
        changes = [
            registry.set_tier(f"client-{number % 4}", source.choice(TIER_NAMES))
            for number in range(100)
            for registry in everybody
        ]
        await asyncio.gather(*changes)
        async with opened(store_server) as store:
            snapshot = await store.load(10)
        assert snapshot.cursor.version == 300
        final = {record.id: (record.tier, "registered") for record in snapshot.records}
        assert len(final) == 4
        await soon(
            lambda: all(tier_of(each, name) == what for each in everybody for name, what in final.items()),
            "all of them agree",
        )


async def test_a_grant_ends_on_time_everywhere(store_server: StoreServer) -> None:
    async with joined(store_server) as one, joined(store_server) as other:
        until = time.time() + 0.4
        await one.grant("acme", "PREMIUM", until)
        await soon(lambda: tier_of(other, "acme") == ("PREMIUM", "granted"), "the other follows", within=0.4)
        for registry in (one, other):
            await soon(lambda each=registry: tier_of(each, "acme") == ("FREE", "default"), "it ends")  # type: ignore[misc]  # a loop's value
        assert 0 <= time.time() - until < 0.2
        await soon(
            lambda: not one._endings._tasks and not other._endings._tasks, "one clears it, and the other lets it be"
        )
        (record,) = await one._store.look_up(["acme"])
        assert record is not None
        assert (record.is_empty, record.version) == (True, 2)


# The records


async def test_each_field_is_changed_by_itself_and_what_others_have_put_there_stays(store_server: StoreServer) -> None:
    async with opened(store_server) as store:
        await store.write("acme", Change(grant=Grant("PREMIUM", 2_000_000_000)))
        written = await store.write("acme", Change(tier="BASIC"))
        assert written.before == ClientRecord(
            "acme", None, Grant("PREMIUM", 2_000_000_000), 1, written.before.changed_at
        )
        assert (written.after.tier, written.after.grant) == ("BASIC", written.before.grant)
        assert written.after.version == 2
        assert abs(written.after.changed_at - time.time()) < 5
        assert (await store.look_up(["nobody", "acme"])) == [None, written.after]
        store_server.command("HSET", RECORDS, "acme", '{"version": 9, "changed_at": 1, "note": "kept"}')
        await store.write("acme", Change(tier="FREE"))
        assert b'"note":"kept"' in store_server.command("HGET", RECORDS, "acme")


async def test_an_unreadable_record_is_logged_and_ignored(
    store_server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(store_server) as store:
        await store.write("acme", Change(tier="BASIC"))
        store_server.command("HSET", RECORDS, "broken", "PREMIUM")
        assert [record.id for record in (await store.load(10)).records] == ["acme"]
        assert await store.look_up(["broken"]) == [None]
    assert any("'broken'" in record.getMessage() for record in caplog.records)


async def test_changes_and_removals_are_bounded(store_server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_gateway.clients.redis_store.MAX_KEPT_CHANGES", 5)
    async with opened(store_server) as store:
        start = (await store.write("first", Change(tier="BASIC"))).after.version
        mark = (await store.load(1)).cursor
        await store.write("gone", Change(tier=None))
        await store.write("over", Change(grant=Grant("BASIC", 1)))
        for _ in range(3):
            await store.write("busy", Change(tier="BASIC"))
        changes = await store.changes(mark)
        assert changes is not None
        assert [record.id for record in changes.records] == ["gone", "over", "busy"]
        for _ in range(7):
            await store.write("busy", Change(tier="BASIC"))
        assert await store.changes(mark) is None, "too far behind"
        found = await store.look_up(["first", "gone", "over", "busy"])
        assert [record and record.id for record in found] == ["first", None, None, "busy"]
        assert store_server.command("ZCARD", CHANGES) == b":1\r\n"
        assert start == 1


async def test_no_more_than_asked_for_is_loaded(store_server: StoreServer) -> None:
    async with opened(store_server) as store:
        for number in range(5):
            await store.write(f"client-{number}", Change(tier="BASIC"))
        await store.write("gone", Change(tier=None))
        snapshot = await store.load(3)
        assert (len(snapshot.records), snapshot.is_complete) == (3, False)
        assert snapshot.ids is not None
        assert all(f"client-{number}" in snapshot.ids for number in range(5))
        assert (await store.load(5)).is_complete


async def test_a_grant_is_cleared_once_and_not_before_its_end(store_server: StoreServer) -> None:
    async with opened(store_server) as store:
        lasting = (await store.write("lasting", Change(grant=Grant("BASIC", time.time() + 600)))).after
        over = (await store.write("over", Change(tier="FREE", grant=Grant("BASIC", 1)))).after
        assert await store.end_grant("lasting", lasting.version) is None
        assert await store.end_grant("over", over.version - 1) is None
        ended = await store.end_grant("over", over.version)
        assert ended is not None
        assert (ended.after.tier, ended.after.grant) == ("FREE", None)
        assert await store.end_grant("over", over.version) is None
        assert repr(store) == "<RedisClientStore [not subscribed]>"


# Looking up


async def test_a_store_that_hangs_delays_no_cached_client_and_others_by_the_deadline(
    store_server: StoreServer, paused: Callable[[], None]
) -> None:
    async with opened(store_server) as store:
        for number in range(25):
            await store.write(f"client-{number}", Change(tier="PREMIUM"))
    async with joined(store_server, limit=20, deadline=0.05, patience=2) as registry:
        names = [f"client-{number}" for number in range(25)]
        known = [name for name in names if registry.try_get(name) is not None]
        unknown = [name for name in names if name not in known]
        assert len(known) == 20
        paused()
        began = time.monotonic()
        found = await asyncio.gather(*(registry.look_up(name) for name in unknown for _ in range(20)))
        assert 0.04 < time.monotonic() - began < 0.5
        assert {view(client) for client in found} == {("FREE", "default")}
        assert all(view(registry.try_get(name)) == ("PREMIUM", "registered") for name in known)
        store_server.resume()
        await soon(lambda: view(registry.try_get(unknown[0])) == ("PREMIUM", "registered"), "the answer comes")


async def test_a_miss_is_looked_up(store_server: StoreServer) -> None:
    async with opened(store_server) as store:
        for number in range(25):
            await store.write(f"client-{number}", Change(tier="PREMIUM"))
    async with joined(store_server, limit=20, deadline=5) as registry:
        found = await asyncio.gather(*(registry.look_up(f"client-{number}") for number in range(25)))
        assert {view(client) for client in found} == {("PREMIUM", "registered")}
        assert view(await registry.look_up("stranger")) == ("FREE", "default")


# Trouble


@pytest.fixture
def paused(store_server: StoreServer) -> Iterator[Callable[[], None]]:
    """Let the server hang; it goes on at the end."""
    yield store_server.pause
    store_server.resume()


async def test_a_store_that_comes_back_empty_is_noticed(
    store_server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with joined(store_server) as registry:
        await registry.set_tier("acme", "PREMIUM")
        await soon(lambda: bool(registry._cursor.epoch), "it has read the change")
        store_server.restart_empty()
        await soon(lambda: tier_of(registry, "acme") == ("FREE", "default"), "it reads all anew")
        await registry.set_tier("acme", "BASIC")
        assert tier_of(registry, "acme") == ("BASIC", "registered")
    assert any("lost its content" in record.getMessage() for record in caplog.records)


async def test_a_store_that_was_flushed_is_noticed_even_if_its_versions_have_caught_up(
    store_server: StoreServer,
) -> None:
    async with joined(store_server) as registry, opened(store_server) as store:
        await registry.set_tier("acme", "PREMIUM")
        await soon(lambda: registry._cursor.version == 1, "it has read the change")
        store_server.command("FLUSHALL")
        for _ in range(3):
            await store.write("initech", Change(tier="BASIC"))
        await soon(lambda: tier_of(registry, "acme") == ("FREE", "default"), "it reads all anew")
        await soon(lambda: tier_of(registry, "initech") == ("BASIC", "registered"), "it reads the later changes")


async def test_a_store_that_is_down_at_start_is_waited_for(store_server: StoreServer) -> None:
    store_server.kill()
    async with joined(store_server, configured={"initech": "BASIC"}) as registry:
        assert registry.store_error
        assert tier_of(registry, "initech") == ("BASIC", "configured")
        with pytest.raises(StoreUnavailable, match="was not made"):
            await registry.set_tier("acme", "PREMIUM")
        assert not (await registry.inspect("acme")).is_confirmed
        store_server.start()
        await soon(lambda: registry.store_error is None, "the store is found")
        await registry.set_tier("acme", "PREMIUM")


async def test_a_store_that_hangs_at_start_does_not_hold_it_up(
    store_server: StoreServer, paused: Callable[[], None]
) -> None:
    paused()
    async with asyncio.timeout(PATIENCE), joined(store_server, patience=0.3) as registry:
        assert registry.store_error


async def test_a_write_without_a_response_of_the_store_has_an_unknown_outcome(
    store_server: StoreServer, paused: Callable[[], None]
) -> None:
    """It hangs between the first question and the change, and keeps hanging; later it may do the change, or not."""
    async with opened(store_server, patience=0.2) as store:
        await store.write("acme", Change(tier="BASIC"))
        ask = store._call

        async def ask_and_hang(reply: Any) -> Any:
            found = await ask(reply)
            paused()
            return found

        store._call = ask_and_hang  # type: ignore[method-assign]  # the only way to hit the moment
        with pytest.raises(OutcomeUnknown):
            await store.write("acme", Change(tier="PREMIUM"))


async def test_a_write_that_was_made_without_a_response_is_detected(store_server: StoreServer) -> None:
    """The change's response is lost; the store, asked what became of it, tells."""
    async with opened(store_server) as store:
        await store.write("acme", Change(tier="BASIC"))
        lose_answers(store, after_sending=True)
        written = await store.write("acme", Change(tier="PREMIUM"))
        assert (written.before.tier, written.after.tier) == ("BASIC", "PREMIUM")


async def test_a_late_write_is_cancelled_permanently(store_server: StoreServer) -> None:
    """The change has not arrived when the store is asked about it; arriving later it must change nothing."""
    async with opened(store_server) as store:
        await store.write("acme", Change(tier="BASIC"))
        late = lose_answers(store, after_sending=False)
        with pytest.raises(OSError, match="cancelled") as caught:
            await store.write("acme", Change(tier="PREMIUM"))
        assert not isinstance(caught.value, OutcomeUnknown)
        (command,) = late
        assert await store._client.eval(*command) == [b"void"]
        (record,) = await store.look_up(["acme"])
        assert record is not None
        assert record.tier == "BASIC"


def lose_answers(store: RedisClientStore, *, after_sending: bool) -> list[tuple[Any, ...]]:
    """Let the next script fail as if its response had not come, after or before the server did it."""
    kept: list[tuple[Any, ...]] = []
    evaluate = store._client.eval

    async def lossy(*command: Any) -> Any:
        store._client.eval = evaluate
        kept.append(command)
        if after_sending:
            await evaluate(*command)
        raise TimeoutError("no answer")

    store._client.eval = lossy
    return kept


async def test_a_change_the_server_refuses_was_not_made(store_server: StoreServer) -> None:
    async with joined(store_server) as registry:
        store_server.command("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(StoreUnavailable, match="was not made"):
            await registry.set_tier("acme", "PREMIUM")
        assert tier_of(registry, "acme") == ("FREE", "default")


async def test_all_keys_lie_on_one_node_of_a_cluster(store_server: StoreServer) -> None:
    async with opened(store_server) as store:
        await store.write("acme", Change(tier="BASIC"))
    reply = store_server.command("KEYS", "*")
    keys = [line for line in reply.decode().split("\r\n") if line and line[0] not in "*$"]
    assert len(keys) == 4
    assert all(key.startswith("{gateway:clients}:") for key in keys), keys
    assert META in keys


async def test_all_records_are_read_in_pages(store_server: StoreServer) -> None:
    async with opened(store_server) as store:
        for number in range(30):
            await store.write(f"c{number}", Change(tier="BASIC"))
        found: set[str] = set()
        position: str | None = ""
        while position is not None:
            records, position = await store.scan(position, 10)
            found |= {record.id for record in records}
        assert found == {f"c{number}" for number in range(30)}
        with pytest.raises(ValueError, match="no position"):
            await store.scan("nowhere", 10)
