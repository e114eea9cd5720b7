"""The tier of a client: granted, registered, configured or default; what fits into memory, and what is looked up."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from api_gateway.clients.api_keys import ApiKey
from api_gateway.clients.bloom_filter import BloomFilter
from api_gateway.clients.client_tiers import bucket_key
from api_gateway.clients.records import (
    MAX_KEPT_CHANGES,
    Change,
    Changes,
    ClientRecord,
    ClientSnapshot,
    ClientStore,
    Cursor,
    Grant,
    OutcomeUnknown,
    WriteResult,
    key_entry,
)
from api_gateway.clients.registry import ClientRegistry
from api_gateway.errors import StoreUnavailable
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Client, Quota
from tests.kit import FakeClock, soon
from tests.virtual_time import in_virtual_time

TIERS = {
    name: Quota.per_second(name, rate, capacity)
    for name, rate, capacity in (("FREE", 1, 10), ("BASIC", 5, 50), ("PREMIUM", 20, 200))
}
Pair = tuple[str, str]


class HeldStore:
    """A store in memory that several registries may share, that can be told to fail or to make one wait."""

    name = "the test's store"

    def __init__(self, wall_clock: FakeClock | None = None, *, is_remote: bool = True) -> None:
        self.is_remote = is_remote
        self.records: dict[str, ClientRecord] = {}
        self.mark = Cursor("first", 0)
        self.failure: OSError | None = None
        self.look_up_failure: OSError | None = None
        self.questions: list[list[str]] = []
        self.answers = asyncio.Event()
        self.answers.set()
        self.delays: asyncio.Event | None = None  # until it is set, what has been read is on its way
        self.delayed = 0
        self.watchers: list[asyncio.Event] = []
        self.ended = 0
        self.uses: dict[str, int] = {}
        self.tells_ids = False
        self._wall_clock = wall_clock or FakeClock()

    async def _reach(self) -> None:
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure

    def tell(self) -> None:
        for watcher in self.watchers:
            watcher.set()

    def fail(self, error: OSError) -> None:
        self.failure = error
        self.tell()

    async def load(self, limit: int) -> ClientSnapshot:
        await self._reach()
        live = [record for record in self.records.values() if not record.is_empty]
        ids = BloomFilter(limit)
        for record in live:
            ids.add(record.id)
            for key in record.keys:
                ids.add(key_entry(key.digest))
        return ClientSnapshot(live[:limit], self.mark, len(live) <= limit, ids if self.tells_ids else None)

    async def write(self, client_id: str, change: Change) -> WriteResult:
        await self._reach()
        before = self.records.get(client_id, ClientRecord(client_id))
        self.mark = self.mark._replace(version=self.mark.version + 1)
        after = self.records[client_id] = change.applied_to(before, self.mark.version, 0.0)
        self.tell()
        return WriteResult(before, after, self.mark.epoch)

    async def scan(self, position: str, count: int) -> tuple[list[ClientRecord], str | None]:
        await self._reach()
        ids = sorted(name for name in self.records if name > position)
        return [self.records[name] for name in ids[:count]], ids[count - 1] if len(ids) > count else None

    async def end_grant(self, client_id: str, version: int) -> WriteResult | None:
        await self._reach()
        record = self.records[client_id]
        if record.version != version or record.grant is None or record.grant.until > self._wall_clock():
            return None
        self.ended += 1
        return await self.write(client_id, Change(grant=None))

    async def changes(self, since: Cursor) -> Changes | None:
        await self._reach()
        if since.epoch != self.mark.epoch or since.version < self.mark.version - MAX_KEPT_CHANGES:
            return None
        newer = [record for record in self.records.values() if record.version > since.version]
        return Changes(sorted(newer, key=lambda record: record.version), self.mark)

    async def look_up(self, client_ids: Sequence[str]) -> list[ClientRecord | None]:
        self.questions.append(list(client_ids))
        await self.answers.wait()
        if self.look_up_failure is not None:
            raise self.look_up_failure
        await self._reach()
        return await self._delayed([self.records.get(each) for each in client_ids])

    async def look_up_keys(self, digests: Sequence[str]) -> list[ClientRecord | None]:
        self.questions.append(list(digests))
        await self.answers.wait()
        if self.look_up_failure is not None:
            raise self.look_up_failure
        await self._reach()
        owners = {key.digest: record for record in self.records.values() for key in record.keys}
        return await self._delayed([owners.get(digest) for digest in digests])

    async def _delayed(self, found: list[ClientRecord | None]) -> list[ClientRecord | None]:
        self.delayed += 1
        if self.delays is not None:
            await self.delays.wait()
        return found

    async def note_key_uses(self, uses: Mapping[str, int]) -> None:
        await self._reach()
        self.uses |= uses

    async def key_uses(self, digests: Sequence[str]) -> dict[str, int]:
        await self._reach()
        return {digest: self.uses[digest] for digest in digests if digest in self.uses}

    async def watch(self, on_news: Callable[[], Awaitable[None]]) -> None:
        news = asyncio.Event()
        self.watchers.append(news)
        try:
            while True:
                news.clear()
                await on_news()
                await news.wait()
        finally:
            self.watchers.remove(news)

    async def close(self) -> None:
        pass


@asynccontextmanager
async def following(
    store: ClientStore, configured: dict[str, str] | None = None, *without: str, **options: Any
) -> AsyncIterator[ClientRegistry]:
    """Run a registry as the gateway does, on a store it may share with others."""
    tiers = {name: quota for name, quota in TIERS.items() if name not in without}
    registry = ClientRegistry(tiers, "FREE", configured or {}, store, **options)
    await registry.load()
    task = asyncio.create_task(registry.follow())
    try:
        yield registry
    finally:
        await cancel_and_wait(task)
        await registry.close()


def view(client: Client | None) -> Pair | None:
    return None if client is None else (client.quota.name, client.source)


def tier_of(registry: ClientRegistry, client_id: str) -> Pair | None:
    return view(registry.by_id(client_id))


# Who a client is


async def test_a_grant_precedes_registration_then_configuration_then_the_default() -> None:
    store = HeldStore()
    async with following(store, {"acme": "BASIC", "initech": "BASIC"}, wall_clock=FakeClock(1000)) as registry:
        await registry.set_tier("acme", "FREE")
        assert tier_of(registry, "acme") == ("FREE", "registered")
        await registry.grant("acme", "PREMIUM", 2000)
        assert tier_of(registry, "acme") == ("PREMIUM", "granted")
        assert tier_of(registry, "initech") == ("BASIC", "configured")
        assert tier_of(registry, "umbrella") == ("FREE", "default")


async def test_a_client_has_the_terms_of_its_tier_and_a_bucket_of_its_own() -> None:
    async with following(HeldStore(), {"acme": "BASIC"}) as registry:
        client = registry.by_id("acme")
        assert (client.id, client.key, client.quota) == ("acme", bucket_key("acme"), TIERS["BASIC"])


async def test_a_client_cannot_name_itself_into_the_bucket_of_an_address() -> None:
    async with following(HeldStore()) as registry:
        unnamed = registry.by_address("192.0.2.7")
        assert (unnamed.id, unnamed.quota.name, unnamed.source) == ("192.0.2.7", "FREE", "address")
        for name in ("192.0.2.7", unnamed.key, "address:192.0.2.7"):
            assert registry.by_id(name).key != unnamed.key


async def test_asking_for_a_client_remembers_nothing() -> None:
    async with following(HeldStore()) as registry:
        before = repr(registry), repr(registry._cache)
        for number in range(1000):
            registry.try_get(f"stranger-{number}")
        assert (repr(registry), repr(registry._cache)) == before


def test_a_default_tier_that_does_not_exist_raises_at_once() -> None:
    with pytest.raises(KeyError):
        ClientRegistry(TIERS, "GOLD", {}, HeldStore())


async def test_a_registry_shows_its_state() -> None:
    store = HeldStore()
    async with following(store, {"a": "BASIC", "b": "BASIC"}) as registry:
        await registry.set_tier("c", "BASIC")
        assert repr(registry) == "<ClientRegistry [1 registered, 2 configured]>"
        store.fail(OSError("gone"))
        await soon(lambda: registry.store_error is not None, "the failure is noticed")
        assert repr(registry) == "<ClientRegistry [1 registered, 2 configured, gone]>"


# Changes


async def test_a_change_reports_before_and_after_and_applies_at_once() -> None:
    async with following(HeldStore(), {"acme": "BASIC"}) as registry:
        before, after = await registry.set_tier("acme", "PREMIUM")
        assert view(before) == ("BASIC", "configured")
        assert after == registry.by_id("acme")
        before, after = await registry.set_tier("acme", "FREE")
        assert (before.quota.name, after.quota.name) == ("PREMIUM", "FREE")


async def test_every_change_makes_who_has_looked_look_again() -> None:
    async with following(HeldStore(), wall_clock=FakeClock()) as registry:
        for change in (
            registry.set_tier("acme", "PREMIUM"),
            registry.grant("acme", "BASIC", 2000),
            registry.revoke("acme"),
            registry.delete("acme"),
        ):
            version = registry.version
            await change
            assert registry.version > version


async def test_removing_a_client_removes_registration_and_grant() -> None:
    async with following(HeldStore(), {"acme": "BASIC"}, wall_clock=FakeClock(1000)) as registry:
        await registry.set_tier("acme", "FREE")
        await registry.grant("acme", "PREMIUM", 2000)
        before, after = await registry.delete("acme")
        assert (view(before), view(after)) == (("PREMIUM", "granted"), ("BASIC", "configured"))
        assert after == registry.by_id("acme")


async def test_removing_a_client_that_is_not_registered_changes_nothing() -> None:
    async with following(HeldStore()) as registry:
        before, after = await registry.delete("acme")
        assert before == after
        assert after.source == "default"


async def test_a_change_of_one_process_is_reported_to_the_others_only() -> None:
    """Who makes a change takes the bucket over itself; the others learn of it by the callback, once."""
    told: dict[str, list[tuple[Pair | None, Pair | None]]] = {"one": [], "other": []}

    def teller(name: str) -> Callable[[Client, Client], None]:
        return lambda before, after: told[name].append((view(before), view(after)))

    store = HeldStore()
    async with (
        following(store, on_change=teller("one")) as one,
        following(store, {"acme": "BASIC"}, on_change=teller("other")) as other,
    ):
        version = other.version
        await one.set_tier("acme", "PREMIUM")
        await soon(lambda: tier_of(other, "acme") == ("PREMIUM", "registered"), "the other follows")
        assert other.version > version
        await one.delete("acme")
        await soon(lambda: tier_of(other, "acme") == ("BASIC", "configured"), "the other follows")
    assert told["one"] == []
    assert told["other"] == [
        (("BASIC", "configured"), ("PREMIUM", "registered")),
        (("PREMIUM", "registered"), ("BASIC", "configured")),
    ]


async def test_a_change_begins_from_what_others_made_before_it() -> None:
    """The bucket in this process's memory is on the quota it knows of: it is taken along both steps."""
    told: list[tuple[Pair | None, Pair | None]] = []
    store = HeldStore()
    registry = ClientRegistry(
        TIERS, "FREE", {}, store, on_change=lambda before, after: told.append((view(before), view(after)))
    )
    await registry.load()
    await store.write("acme", Change(tier="BASIC"))  # by somebody else, and not yet heard of here
    before, after = await registry.set_tier("acme", "PREMIUM")
    assert told == [(("FREE", "default"), ("BASIC", "registered"))]
    assert (view(before), view(after)) == (("BASIC", "registered"), ("PREMIUM", "registered"))


async def test_a_change_announced_before_its_own_response_is_not_mistaken_for_another() -> None:
    """Else its bucket would be taken over twice, and the response would tell the new tier as the previous one."""
    told: list[Client] = []
    store = HeldStore()
    async with following(store, on_change=lambda before, after: told.append(after)) as registry:
        write = store.write

        async def late(client_id: str, change: Change) -> WriteResult:
            written = await write(client_id, change)
            await registry._apply_changes()
            assert tier_of(registry, client_id) != ("PREMIUM", "registered")
            await write(client_id, Change(grant=Grant("BASIC", 2e9)))  # by somebody else, behind it
            await registry._apply_changes()
            return written

        store.write = late  # type: ignore[method-assign]  # the only way to hit the moment
        before, after = await registry.set_tier("acme", "PREMIUM")
        assert (view(before), view(after)) == (("FREE", "default"), ("PREMIUM", "registered"))
        assert tier_of(registry, "acme") == ("BASIC", "granted")
        assert [view(client) for client in told] == [("BASIC", "granted")]
        assert not registry._asking
        assert not registry._deferred


async def test_an_older_record_never_takes_the_place_of_a_newer_one() -> None:
    store = HeldStore()
    async with following(store) as registry:
        await registry.set_tier("acme", "BASIC")
        older = store.records["acme"]
        await registry.set_tier("acme", "PREMIUM")
        registry.apply(older)
        assert tier_of(registry, "acme") == ("PREMIUM", "registered")
        await registry.delete("acme")
        registry.apply(replace(older, version=2))
        assert tier_of(registry, "acme") == ("FREE", "default")


async def test_a_process_that_is_too_far_behind_reads_everything_again() -> None:
    store = HeldStore()
    async with following(store) as registry:
        await registry.set_tier("acme", "BASIC")
        store.records["acme"] = ClientRecord("acme", "PREMIUM", version=MAX_KEPT_CHANGES + 9)
        store.mark = Cursor("first", MAX_KEPT_CHANGES + 9)
        store.tell()
        await soon(lambda: tier_of(registry, "acme") == ("PREMIUM", "registered"), "all is read anew")


# Failures


async def test_a_change_that_cannot_be_stored_is_not_made() -> None:
    store = HeldStore()
    async with following(store) as registry:
        await registry.set_tier("acme", "BASIC")
        store.failure = OSError("away")
        for change in (registry.set_tier("acme", "PREMIUM"), registry.delete("acme")):
            with pytest.raises(StoreUnavailable, match=r"the test's store and was not made") as caught:
                await change
            assert caught.value.retry_after == 5
        assert tier_of(registry, "acme") == ("BASIC", "registered")
        store.failure = None
        await registry.set_tier("acme", "PREMIUM")
        assert tier_of(registry, "acme") == ("PREMIUM", "registered")


async def test_a_change_of_unknown_outcome_is_reported_as_such() -> None:
    store = HeldStore()
    async with following(store) as registry:
        store.failure = OutcomeUnknown("no answer")
        keys, key = registry.keys, ApiKey("d" * 64)
        tier, listed = "GET /clients/acme shows the tier", "GET /clients/acme/keys lists the keys"
        for change, place in (
            (registry.set_tier("acme", "PREMIUM"), tier),
            (registry.revoke("acme"), tier),
            (registry.delete("acme"), tier),
            (keys.create("acme", key, verified_only=False), listed),
            (keys.rotate("acme", "e" * 64, key, 5.0), listed),
            (keys.revoke("acme", key.digest), listed),
            (keys.require_proof("acme", verified_only=True), "GET /clients/acme shows verified_only"),
        ):
            with pytest.raises(StoreUnavailable, match="may or may not have been made") as caught:
                await change
            assert caught.value.detail.endswith(f". {place} when the store is available again.")


async def test_a_store_of_this_machine_must_open() -> None:
    store = HeldStore(is_remote=False)
    store.failure = OSError("no such disk")
    with pytest.raises(OSError, match="no such disk"):
        await ClientRegistry(TIERS, "FREE", {}, store).load()


async def test_a_remote_store_may_be_unavailable_at_start(caplog: pytest.LogCaptureFixture) -> None:
    store = HeldStore()
    await store.write("acme", Change(tier="PREMIUM"))
    store.failure = OSError("not up yet")
    async with following(store, {"initech": "BASIC"}) as registry:
        assert registry.store_error == "not up yet"
        assert tier_of(registry, "initech") == ("BASIC", "configured")
        assert view(registry.try_get("acme")) == ("FREE", "default")
        version = registry.version
        store.failure = None
        await soon(lambda: tier_of(registry, "acme") == ("PREMIUM", "registered"), "the store is found")
        assert registry.version > version
        assert registry.store_error is None
    told = [record.getMessage() for record in caplog.records]
    assert sum("store unavailable" in message for message in told) == 1
    assert sum("available again" in message for message in told) == 1


async def test_after_a_failure_everything_is_read_again() -> None:
    """A server that failed over may have lost changes that were read from it before."""
    store = HeldStore()
    async with following(store) as registry:
        await registry.set_tier("acme", "PREMIUM")
        store.fail(OSError("fails over"))
        await soon(lambda: registry.store_error is not None, "the failure is noticed")
        store.records["acme"] = replace(store.records["acme"], tier="BASIC")  # same version
        store.failure = None
        await soon(lambda: tier_of(registry, "acme") == ("BASIC", "registered"), "all is read anew")


async def test_a_store_of_a_new_epoch_is_followed_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    store = HeldStore()
    async with following(store) as registry:
        await registry.set_tier("acme", "PREMIUM")
        store.records, store.mark = {}, Cursor("second", 0)
        for _ in range(3):  # its versions may have overtaken those of its former life
            await store.write("initech", Change(tier="BASIC"))
        await soon(lambda: tier_of(registry, "initech") == ("BASIC", "registered"), "the new life is read")
        assert tier_of(registry, "acme") == ("FREE", "default")
    assert any("lost its content" in record.getMessage() for record in caplog.records)


async def test_a_write_into_a_store_that_began_anew_holds_at_once() -> None:
    store = HeldStore()
    registry = ClientRegistry(TIERS, "FREE", {}, store)
    for _ in range(3):
        await store.write("acme", Change(tier="BASIC"))
    await registry.load()
    store.records, store.mark = {}, Cursor("second", 0)
    await registry.set_tier("acme", "PREMIUM")
    assert tier_of(registry, "acme") == ("PREMIUM", "registered")


async def test_what_is_written_during_a_reload_is_not_lost() -> None:
    store = HeldStore()
    async with following(store) as registry:
        reload = asyncio.create_task(registry._reload())
        snapshot_taken = asyncio.create_task(store.load(10))
        await snapshot_taken
        await registry.set_tier("acme", "PREMIUM")
        await reload
        assert tier_of(registry, "acme") == ("PREMIUM", "registered")


async def test_a_defect_does_not_end_the_following(caplog: pytest.LogCaptureFixture) -> None:
    store = HeldStore()

    def fail_once(_before: Client, _after: Client) -> None:
        registry._on_change = lambda before, after: None
        raise ZeroDivisionError

    async with following(store, on_change=fail_once) as registry:
        await store.write("acme", Change(tier="BASIC"))
        await soon(lambda: tier_of(registry, "acme") == ("BASIC", "registered"), "it goes on")
        await soon(lambda: registry.store_error is None, "it recovers")
        await store.write("acme", Change(tier="PREMIUM"))
        await soon(lambda: tier_of(registry, "acme") == ("PREMIUM", "registered"), "it follows again")
    assert any(record.exc_info for record in caplog.records)


async def test_an_unknown_tier_falls_back_to_the_default_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It may come back with the next configuration; the registration must not be lost meanwhile."""
    store = HeldStore()
    await store.write("acme", Change(tier="PREMIUM"))
    await store.write("initech", Change(tier="PREMIUM", grant=Grant("PREMIUM", 2000)))
    with caplog.at_level(logging.WARNING):
        async with following(store, {"initech": "BASIC"}, "PREMIUM", wall_clock=FakeClock()) as registry:
            assert tier_of(registry, "acme") == ("FREE", "default")
            assert tier_of(registry, "initech") == ("BASIC", "configured")
    assert any("'acme'" in record.getMessage() and "'PREMIUM'" in record.getMessage() for record in caplog.records)
    async with following(store, wall_clock=FakeClock()) as registry:
        assert tier_of(registry, "acme") == ("PREMIUM", "registered")


# The bound, and looking up


async def crowded(store: HeldStore, count: int) -> None:
    for number in range(count):
        await store.write(f"client-{number}", Change(tier="PREMIUM"))


async def test_while_all_clients_fit_a_miss_means_not_registered() -> None:
    store = HeldStore()
    await crowded(store, 20)
    async with following(store, limit=20) as registry:
        assert view(registry.try_get("stranger")) == ("FREE", "default")
        assert store.questions == []


async def test_what_does_not_fit_is_looked_up_once_and_remembered() -> None:
    store = HeldStore()
    await crowded(store, 25)
    async with following(store, limit=20) as registry:
        assert registry.try_get("client-24") is None
        assert view(await registry.look_up("client-24")) == ("PREMIUM", "registered")
        assert view(registry.try_get("client-24")) == ("PREMIUM", "registered")
        assert registry.try_get("stranger") is None
        assert view(await registry.look_up("stranger")) == ("FREE", "default")
        assert view(registry.try_get("stranger")) == ("FREE", "default")
        assert store.questions == [["client-24"], ["stranger"]]
        assert len(registry._cache) == 20


async def test_a_configured_client_may_be_registered_for_another_tier_in_the_store() -> None:
    store = HeldStore()
    await crowded(store, 25)
    async with following(store, {"client-24": "BASIC"}, limit=20) as registry:
        assert registry.try_get("client-24") is None
        assert view(await registry.look_up("client-24")) == ("PREMIUM", "registered")


async def test_one_too_many_turns_a_complete_copy_into_a_partial_one(caplog: pytest.LogCaptureFixture) -> None:
    store = HeldStore()
    async with following(store, limit=20) as registry:
        for number in range(21):
            await registry.set_tier(f"client-{number}", "BASIC")
        assert registry.try_get("client-0") is None
        assert view(await registry.look_up("client-0")) == ("BASIC", "registered")
    assert sum("max_cached_clients" in record.getMessage() for record in caplog.records) == 1


async def test_those_used_last_stay() -> None:
    store = HeldStore()
    await crowded(store, 30)
    async with following(store, limit=20) as registry:
        for number in range(20, 30):
            registry.try_get("client-3")
            await registry.look_up(f"client-{number}")
        assert registry.try_get("client-3") is not None
        assert registry.try_get("client-4") is None


async def test_invented_names_do_not_push_out_those_that_exist() -> None:
    store = HeldStore()
    await crowded(store, 101)
    async with following(store, limit=100) as registry:
        for number in range(500):
            await registry.look_up(f"stranger-{number}")
        known = sum(registry.try_get(f"client-{number}") is not None for number in range(101))
        assert known >= 89
        assert len(registry._cache) == 100


async def test_look_ups_of_one_client_are_made_once_and_those_of_many_in_one_call() -> None:
    store = HeldStore()
    await crowded(store, 25)
    async with following(store, limit=20, deadline=5) as registry:
        store.answers.clear()
        asking = [asyncio.create_task(registry.look_up("client-24")) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking += [asyncio.create_task(registry.look_up(f"client-{number}")) for number in (22, 23, 24)]
        await asyncio.sleep(0)
        store.answers.set()
        found = await asyncio.gather(*asking)
        assert {view(client) for client in found} == {("PREMIUM", "registered")}
        assert store.questions == [["client-24"], ["client-22", "client-23"]]


async def test_what_is_late_counts_as_not_registered_until_it_comes() -> None:
    store = HeldStore()
    await crowded(store, 25)
    async with following(store, limit=20, deadline=0.01) as registry:
        store.answers.clear()
        assert view(await registry.look_up("client-24")) == ("FREE", "default")
        assert view(registry.try_get("client-24")) == ("FREE", "default"), "nobody waits for it twice"
        assert view(registry.try_get("client-1")) == ("PREMIUM", "registered")
        version = registry.version
        store.answers.set()
        await soon(lambda: view(registry.try_get("client-24")) == ("PREMIUM", "registered"), "the answer is noted")
        assert registry.version > version, "who went by the default looks again"


@in_virtual_time
async def test_a_look_up_that_failed_is_made_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_gateway.clients.lookup_batcher.LATE_RETRY_DELAY", 0.05)
    store = HeldStore()
    await crowded(store, 25)
    async with following(store, limit=20) as registry:
        store.look_up_failure = OSError("away")
        assert view(await registry.look_up("client-24")) == ("FREE", "default")
        assert view(registry.try_get("client-24")) == ("FREE", "default")
        version, store.look_up_failure = registry.version, None
        await soon(lambda: registry.version > version, "it may be asked again")
        assert registry.try_get("client-24") is None
        assert view(await registry.look_up("client-24")) == ("PREMIUM", "registered")


@in_virtual_time
async def test_while_the_store_is_known_to_be_unavailable_no_request_waits_for_it() -> None:
    store = HeldStore()
    await crowded(store, 25)
    async with following(store, limit=20) as registry:
        store.fail(OSError("away"))
        await soon(lambda: registry.store_error is not None, "the failure is noticed")
        assert view(registry.try_get("client-24")) == ("FREE", "default")
        store.failure = None
        await soon(lambda: registry.store_error is None, "the store is back")
        assert registry.try_get("client-24") is None


async def test_a_change_of_a_client_that_is_not_remembered_is_not_missed() -> None:
    """Somebody may still go by what it once was; and a question under way may bring what it was before."""
    store = HeldStore()
    await crowded(store, 25)
    async with following(store, limit=20, deadline=5) as registry:
        version = registry.version
        await store.write("client-24", Change(tier="BASIC"))
        await soon(lambda: registry.version > version, "who has looked looks again")
        assert registry.try_get("client-24") is None
        asking = asyncio.create_task(registry.look_up("newcomer"))
        await asyncio.sleep(0)
        registry.apply(ClientRecord("newcomer", "BASIC", version=99))  # told while the question is under way
        assert view(await asking) == ("BASIC", "registered")


async def test_invented_ids_are_not_looked_up_if_the_store_lists_all_ids() -> None:
    store = HeldStore()
    store.tells_ids = True
    await crowded(store, 25)
    async with following(store, limit=20) as registry:
        found = [registry.try_get(f"stranger-{number}") for number in range(500)]
        assert sum(client is None for client in found) <= 5, "a few may be taken for others"
        assert {view(client) for client in found} <= {("FREE", "default"), None}
        assert registry.try_get("client-24") is None
        assert view(await registry.look_up("client-24")) == ("PREMIUM", "registered")
        await store.write("stranger-1", Change(tier="BASIC"))
        await soon(lambda: registry.try_get("stranger-1") is None, "it is told of, and looked up")
        await registry.set_tier("stranger-2", "BASIC")
        for number in range(20):
            await registry.look_up(f"client-{number}")
        assert registry.try_get("stranger-2") is None, "it had to make room, and is looked up"


async def test_a_client_registered_during_a_full_read_is_looked_up_later() -> None:
    store = HeldStore()
    store.tells_ids = True
    await crowded(store, 25)
    async with following(store, limit=20) as registry:
        reading = asyncio.create_task(registry._reload())
        await asyncio.sleep(0)
        for number in range(25):
            registry._put(ClientRecord(f"newcomer-{number}", "BASIC", version=100 + number))
        await reading
        assert all(view(registry.try_get(f"newcomer-{number}")) != ("FREE", "default") for number in range(25))


async def test_one_client_too_many_makes_no_registered_client_unknown() -> None:
    store = HeldStore()
    async with following(store, limit=20) as registry:
        for number in range(30):
            await registry.set_tier(f"client-{number}", "BASIC")
        assert all(view(registry.try_get(f"client-{number}")) != ("FREE", "default") for number in range(30))
        assert sum(registry.try_get(f"stranger-{number}") is None for number in range(500)) <= 5


async def test_a_name_known_to_be_absent_may_be_registered() -> None:
    store = HeldStore()
    await crowded(store, 25)
    async with following(store, limit=20) as registry:
        await registry.look_up("newcomer")
        await store.write("newcomer", Change(tier="BASIC"))
        await soon(lambda: view(registry.try_get("newcomer")) == ("BASIC", "registered"), "it is told of")


# Inspection


async def test_an_inspection_asks_the_store() -> None:
    store = HeldStore()
    registry = ClientRegistry(TIERS, "FREE", {}, store, wall_clock=FakeClock(1000))
    await registry.load()
    await store.write("acme", Change(tier="BASIC", grant=Grant("PREMIUM", 2000)))
    found = await registry.inspect("acme")
    assert (view(found.client), found.grant, view(found.without_grant), found.is_confirmed) == (
        ("PREMIUM", "granted"),
        Grant("PREMIUM", 2000),
        ("BASIC", "registered"),
        True,
    )
    assert registry.by_id("acme") == found.client, "what was learnt holds"
    store.failure = OSError("away")
    found = await registry.inspect("acme")
    assert (view(found.client), found.is_confirmed) == (("PREMIUM", "granted"), False)
    await registry.close()


# Grants


async def test_a_grant_ends_on_time_on_every_process_and_one_of_them_clears_it() -> None:
    clock = FakeClock(1000)
    store = HeldStore(clock)
    changed: list[str] = []
    options: dict[str, Any] = {"wall_clock": clock}
    async with (
        following(store, on_change=lambda before, after: changed.append("one"), **options) as one,
        following(store, on_change=lambda before, after: changed.append("other"), **options) as other,
    ):
        await one.set_tier("acme", "BASIC")
        await one.grant("acme", "PREMIUM", 1060)
        await soon(lambda: tier_of(other, "acme") == ("PREMIUM", "granted"), "the other follows")
        changed.clear()
        clock.now = 1059.999
        one.end_expired()
        assert tier_of(one, "acme") == ("PREMIUM", "granted")
        clock.now = 1060
        versions = one.version, other.version
        one.end_expired()
        other.end_expired()
        assert tier_of(one, "acme") == tier_of(other, "acme") == ("BASIC", "registered")
        assert one.version > versions[0]
        assert other.version > versions[1]
        await soon(lambda: store.records["acme"].grant is None, "one of them clears it")
        await soon(lambda: not one._endings._tasks and not other._endings._tasks, "the other lets it be")
    assert changed == ["one", "other"], "each process takes its own bucket over, once"
    assert store.ended == 1


@in_virtual_time
async def test_a_grant_ends_by_itself() -> None:
    clock = FakeClock(1000)
    async with following(HeldStore(clock), wall_clock=clock) as registry:
        await registry.grant("acme", "PREMIUM", 1000.05)
        clock.now = 1000.05
        await soon(lambda: tier_of(registry, "acme") == ("FREE", "default"), "it ends")


@pytest.mark.parametrize(("until", "kept"), [(2000.0001, 2000.001), (2000.1, 2000.1), (2000.0, 2000.0)])
async def test_a_grant_never_ends_early_for_being_rounded(until: float, kept: float) -> None:
    store = HeldStore()
    async with following(store, wall_clock=FakeClock(1000)) as registry:
        await registry.grant("acme", "PREMIUM", until)
    assert store.records["acme"].grant == Grant("PREMIUM", kept)


async def test_a_grant_that_was_replaced_does_not_end_the_one_in_its_place() -> None:
    clock = FakeClock(1000)
    async with following(HeldStore(clock), wall_clock=clock) as registry:
        await registry.grant("acme", "PREMIUM", 1060)
        await registry.grant("acme", "PREMIUM", 1120)
        clock.now = 1090
        registry.end_expired()
        assert tier_of(registry, "acme") == ("PREMIUM", "granted")


async def test_a_tier_and_a_grant_are_changed_each_by_itself() -> None:
    async with following(HeldStore(), wall_clock=FakeClock(1000)) as registry:
        await registry.grant("acme", "PREMIUM", 2000)
        await registry.set_tier("acme", "BASIC")
        assert tier_of(registry, "acme") == ("PREMIUM", "granted")
        before, after = await registry.revoke("acme")
        assert (view(before), view(after)) == (("PREMIUM", "granted"), ("BASIC", "registered"))


@in_virtual_time
async def test_a_grant_whose_time_was_over_before_the_start_is_none() -> None:
    clock = FakeClock(3000)
    store = HeldStore(clock)
    await store.write("acme", Change(grant=Grant("PREMIUM", 2000)))
    async with following(store, wall_clock=clock) as registry:
        assert tier_of(registry, "acme") == ("FREE", "default")
        await soon(lambda: store.records["acme"].is_empty, "it is cleared")


@in_virtual_time
async def test_a_grant_ends_on_time_while_the_store_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_gateway.clients.grant_timer.CLEAR_RETRY_DELAY", 0.02)
    clock = FakeClock(1000)
    store = HeldStore(clock)
    async with following(store, wall_clock=clock) as registry:
        await registry.grant("acme", "PREMIUM", 1060)
        store.failure = OSError("away")
        clock.now = 1060
        registry.end_expired()
        assert tier_of(registry, "acme") == ("FREE", "default")
        await asyncio.sleep(0)
        store.failure = None
        await soon(lambda: store.records["acme"].is_empty, "it is cleared later")


async def test_the_ends_of_replaced_grants_are_forgotten() -> None:
    async with following(HeldStore(), wall_clock=FakeClock(1000), limit=10) as registry:
        for number in range(200):
            await registry.grant("acme", "PREMIUM", 5000 + number)
        assert len(registry._endings.expiries) <= 22
        assert tier_of(registry, "acme") == ("PREMIUM", "granted")


# Pages


async def every_page(registry: ClientRegistry, limit: int, tier: str | None) -> list[list[str]]:
    pages, position = [], ""
    while True:
        found, following_position = await registry.page(position, limit, tier)
        pages.append([one.client.id for one in found])
        if following_position is None:
            return pages
        position = following_position


async def test_pages_have_each_registered_client_once_whatever_is_held_in_memory() -> None:
    store = HeldStore()
    async with following(store, configured={"conf": "BASIC", "both": "BASIC"}, limit=2) as registry:
        for number in range(9):
            await registry.set_tier(f"c{number}", "PREMIUM" if number % 3 else "BASIC")
        await registry.set_tier("both", "PREMIUM")
        await registry.delete("c4")
        names = [name for page in await every_page(registry, 2, None) for name in page]
        assert sorted(names) == sorted({"conf", "both"} | {f"c{number}" for number in range(9)} - {"c4"})
        assert len(set(names)) == len(names)
        premium = [name for page in await every_page(registry, 2, "PREMIUM") for name in page]
        assert sorted(premium) == ["both", "c1", "c2", "c5", "c7", "c8"]
        store.failure = OSError("down")
        with pytest.raises(StoreUnavailable):
            await registry.page("", 10, None)
