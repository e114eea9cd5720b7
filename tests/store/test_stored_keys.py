"""API keys in both stores: durable, found by digest, changed as a whole, and followed by other gateways."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from api_gateway.clients.api_keys import ApiKey, KnownKey, digest_of, new_key
from api_gateway.clients.identity_rules import IdentityRules
from api_gateway.clients.key_directory import KeyState
from api_gateway.clients.records import (
    MAX_VALID_KEYS,
    UNCHANGED,
    Change,
    ClientStore,
    KeyChange,
    Replacement,
    key_entry,
)
from api_gateway.clients.redis_store import RedisClientStore
from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import CLIENTS_FILE, SqliteClientStore
from api_gateway.storage.redis_session import StoreSession
from tests.kit import FakeClock, soon
from tests.store_kit import CALM, StoreServer
from tests.unit.test_client_registry import TIERS, HeldStore, following

Open = Callable[[], ClientStore]


@pytest.fixture(params=["sqlite", "shared"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, store_server: StoreServer) -> Open:
    """Return what opens a store; all are the same one."""
    if request.param == "sqlite":
        return lambda: SqliteClientStore(tmp_path)
    return lambda: RedisClientStore(StoreSession(store_server.url, timeout=1.0))


@asynccontextmanager
async def store_of(opened: Open) -> AsyncIterator[ClientStore]:
    store = opened()
    try:
        await store.load(100)
        yield store
    finally:
        await store.close()


def made(number: int, **terms: Any) -> ApiKey:
    """Return a key."""
    return ApiKey(digest_of(new_key(number.to_bytes(32)).encode()), f"key {number}", 1.8e9 + number, **terms)


ONE, TWO, THREE = made(1), made(2, expires_at=2e9 + 0.125, routes=("users", "orders")), made(3)


async def test_a_key_is_stored_with_all_its_terms(opened: Open) -> None:
    async with store_of(opened) as store:
        written = await store.write("acme", Change(keys=KeyChange(add=ONE)))
        assert (written.after.keys, written.after.verified_only) == ((ONE,), True)
        await store.write("acme", Change(keys=KeyChange(add=TWO)))
        await store.write("open", Change(keys=KeyChange(add=THREE), verified_only=False))
    async with store_of(opened) as store:
        snapshot = await store.load(10)
        found = {record.id: record for record in snapshot.records}
        assert found["acme"].keys == (ONE, TWO)
        assert (found["open"].keys, found["open"].verified_only) == ((THREE,), False)
        acme, nobody, other = await store.look_up_keys([TWO.digest, made(9).digest, THREE.digest])
        assert acme == found["acme"]
        assert nobody is None
        assert other == found["open"]


async def test_a_change_of_the_tier_keeps_the_keys_and_the_other_way_round(opened: Open) -> None:
    async with store_of(opened) as store:
        await store.write("acme", Change(tier="PREMIUM"))
        await store.write("acme", Change(keys=KeyChange(add=ONE)))
        await store.write("acme", Change(tier="BASIC"))
        (record,) = await store.look_up(["acme"])
        assert record is not None
        assert (record.tier, record.keys) == ("BASIC", (ONE,))
        await store.write("acme", Change(tier=None))
        (record,) = await store.look_up(["acme"])
        assert record is not None
        assert (record.tier, record.keys, record.is_empty) == (None, (ONE,), False)


async def test_a_rotation_is_made_as_a_whole_or_not_at_all(opened: Open) -> None:
    async with store_of(opened) as store:
        await store.write("acme", Change(keys=KeyChange(add=ONE)))
        rotation = KeyChange(add=THREE, replaces=Replacement(ONE.digest, 1.9e9))
        rotated = (await store.write("acme", Change(keys=rotation))).after
        assert rotated.keys == (replace(ONE, expires_at=1.9e9, replaced_by=THREE.id), THREE)
        again = KeyChange(add=made(4), remove=(THREE.digest,), replaces=Replacement(ONE.digest, 1.95e9))
        after = (await store.write("acme", Change(tier="BASIC", keys=again, verified_only=False))).after
        assert after == replace(rotated, version=after.version, changed_at=after.changed_at), "nothing is changed"
        (record,) = await store.look_up(["acme"])
        assert record == after
        assert await store.look_up_keys([made(4).digest, THREE.digest]) == [None, after]
        await store.write("acme", Change(keys=KeyChange(remove=(ONE.digest,))))
        after = (await store.write("acme", Change(keys=again))).after
        assert after.keys == (THREE,), "the key was revoked meanwhile"
        sooner = KeyChange(add=TWO, replaces=Replacement(THREE.digest, 2.5e9))
        await store.write("acme", Change(keys=sooner))
        late = KeyChange(add=made(4), replaces=Replacement(TWO.digest, 2.5e9))
        after = (await store.write("acme", Change(keys=late))).after
        assert {key.expires_at for key in after.keys if key.digest == TWO.digest} == {TWO.expires_at}, "never later"


async def test_concurrent_new_keys_do_not_exceed_the_limit(opened: Open) -> None:
    """The store decides on the number, which each gateway could only have read before."""
    async with store_of(opened) as one, store_of(opened) as other:
        expired = made(0, expires_at=1.8e9 + 0.5)
        await one.write("acme", Change(keys=KeyChange(add=expired)))
        keys = [made(number) for number in range(1, MAX_VALID_KEYS + 9)]
        changes = [Change(keys=KeyChange(add=key)) for key in keys]
        written = await asyncio.gather(
            *(store.write("acme", change) for change, store in zip(changes, cycle([one, other]), strict=False))
        )
        (record,) = await one.look_up(["acme"])
        assert record is not None
        held = set(record.keys) - {expired}
        assert len(held) == MAX_VALID_KEYS
        assert held == {key for key, result in zip(keys, written, strict=True) if key in result.after.keys}
        first, new = min(held, key=lambda key: key.created_at), made(100)
        overlapping = Change(keys=KeyChange(add=new, replaces=Replacement(first.digest, new.created_at + 60)))
        assert new not in (await one.write("acme", overlapping)).after.keys
        at_once = Change(keys=KeyChange(add=new, replaces=Replacement(first.digest, new.created_at)))
        assert new in (await one.write("acme", at_once)).after.keys, "the number of valid keys stays"


async def test_revoked_keys_are_found_no_more_and_the_id_stays_closed(opened: Open) -> None:
    async with store_of(opened) as store:
        for key in (ONE, TWO):
            await store.write("acme", Change(keys=KeyChange(add=key)))
        after = (await store.write("acme", Change(keys=KeyChange(remove=(ONE.digest,))))).after
        assert after.keys == (TWO,)
        after = (await store.write("acme", Change(keys=KeyChange(clear=True)))).after
        assert (after.keys, after.verified_only, after.is_empty) == ((), True, False)
        assert await store.look_up_keys([ONE.digest, TWO.digest]) == [None, None]
        after = (await store.write("acme", Change(verified_only=None))).after
        assert after.is_empty


async def test_concurrent_changes_of_keys_are_all_kept(opened: Open) -> None:
    async with store_of(opened) as one, store_of(opened) as other:
        keys = [made(number) for number in range(8)]
        await asyncio.gather(
            *(
                store.write("acme", Change(keys=KeyChange(add=key)))
                for key, store in zip(keys, [one, other] * 4, strict=True)
            )
        )
        (record,) = await one.look_up(["acme"])
        assert record is not None
        assert {key.digest for key in record.keys} == {key.digest for key in keys}


async def test_of_more_clients_than_asked_for_all_keys_are_in_the_filter(opened: Open) -> None:
    async with store_of(opened) as store:
        keys = [made(number) for number in range(5)]
        for number, key in enumerate(keys):
            await store.write(f"client-{number}", Change(keys=KeyChange(add=key)))
        snapshot = await store.load(2)
        assert not snapshot.is_complete
        assert snapshot.ids is not None
        assert all(key_entry(key.digest) in snapshot.ids for key in keys)
        assert sum(key_entry(made(number).digest) in snapshot.ids for number in range(100, 1100)) < 50


async def test_last_uses_are_kept_until_a_key_is_revoked(opened: Open) -> None:
    async with store_of(opened) as store:
        await store.write("acme", Change(keys=KeyChange(add=ONE)))
        await store.note_key_uses({ONE.digest: 600})
        assert await store.key_uses([ONE.digest, TWO.digest]) == {ONE.digest: 600}
        await store.write("acme", Change(keys=KeyChange(remove=(ONE.digest,))))
        assert await store.key_uses([ONE.digest]) == {}
        assert await store.key_uses([]) == {}


async def test_why_last_uses_are_not_stored_is_known_until_they_are(tmp_path: Path) -> None:
    async with following(SqliteClientStore(tmp_path)) as registry:
        await registry.keys.create("acme", ONE, verified_only=UNCHANGED)
        registry.keys.note_use(ONE.digest)
        for old, new in (("key_uses", "away"), ("away", "key_uses")):
            with closing(sqlite3.connect(tmp_path / CLIENTS_FILE)) as connection:
                connection.execute(f"ALTER TABLE {old} RENAME TO {new}")
            with suppress(OSError):
                await registry.keys.store_uses()
            assert (registry.keys.uses_error is None) == (new == "key_uses")
        assert await registry.keys.last_uses([ONE]) != {}


async def test_another_gateway_accepts_and_refuses_a_key_within_a_second(opened: Open) -> None:
    async with following(opened()) as one, following(opened()) as other:
        await one.keys.create("acme", ONE, verified_only=UNCHANGED)
        assert one.keys.find(ONE.digest) == KnownKey("acme", ONE)
        took = await soon(lambda: other.keys.find(ONE.digest) == KnownKey("acme", ONE), "the key is known")
        assert took < 1
        assert other.by_id("acme").is_verified_only
        version = other.version
        await one.keys.revoke("acme", ONE.digest)
        assert one.keys.find(ONE.digest) is KeyState.ABSENT
        assert await soon(lambda: other.keys.find(ONE.digest) is KeyState.ABSENT, "the key is revoked") < 1
        assert other.version > version, "proofs that were remembered are verified again"


async def test_another_gateway_verifies_again_when_one_of_several_keys_is_revoked(opened: Open) -> None:
    """The client stays the same: it still has a key."""
    async with following(opened()) as one, following(opened()) as other:
        for key in (ONE, TWO):
            await one.keys.create("acme", key, verified_only=UNCHANGED)
        await soon(lambda: other.keys.find(TWO.digest) == KnownKey("acme", TWO), "both keys are known")
        client, version = other.by_id("acme"), other.version
        await one.keys.revoke("acme", ONE.digest)
        assert await soon(lambda: other.keys.find(ONE.digest) is KeyState.ABSENT, "the key is revoked") < 1
        assert other.by_id("acme") == client
        assert other.version > version, "proofs that were remembered are verified again"


@pytest.mark.parametrize(("limit", "reads_by_key"), [(2, True), (2, False), (100, False)])
async def test_a_record_that_was_read_before_a_revocation_does_not_bring_the_key_back(
    limit: int, *, reads_by_key: bool
) -> None:
    """The reply of a shared store may arrive after the news of the change: by key, and for an operator."""
    store = HeldStore()
    for number in range(5):
        await store.write(f"client-{number}", Change(keys=KeyChange(add=made(number))))
    async with following(store, limit=limit, deadline=CALM) as registry:
        digest = made(4).digest
        assert (registry._cache.get("client-4") is None) is (limit < 5)
        store.delays = asyncio.Event()
        reading: asyncio.Task[Any] = asyncio.create_task(
            registry.keys.look_up(digest) if reads_by_key else registry.record_of("client-4")
        )
        await soon(lambda: store.delayed == 1, "the record was read, and is on its way")
        version = registry.version
        await store.write("client-4", Change(keys=KeyChange(clear=True), verified_only=None))
        await soon(lambda: registry._cursor == store.mark, "the news has arrived")
        store.delays.set()
        await reading
        found = registry.keys.find(digest)
        assert (await registry.keys.look_up(digest) if found is KeyState.UNKNOWN else found) is KeyState.ABSENT
        assert registry.version > version, "proofs that were remembered are verified again"


async def test_keys_that_do_not_fit_into_memory_are_looked_up(opened: Open) -> None:
    async with store_of(opened) as store:
        for number in range(20):
            await store.write(f"client-{number}", Change(keys=KeyChange(add=made(number))))
    async with following(opened(), limit=5, deadline=5.0) as registry:
        for number in range(20):
            found = registry.keys.find(made(number).digest)
            if found is KeyState.UNKNOWN:
                found = await registry.keys.look_up(made(number).digest)
            assert found == KnownKey(f"client-{number}", made(number))
        assert len(registry._cache.keys) <= 5
        strangers = [registry.keys.find(made(number).digest) for number in range(100, 400)]
        assert strangers.count(KeyState.ABSENT) > 280, "the filter excludes them"
        for number in range(100, 400):
            if registry.keys.find(made(number).digest) is KeyState.UNKNOWN:
                assert await registry.keys.look_up(made(number).digest) is KeyState.ABSENT
        async with store_of(opened) as store:
            await store.write("client-3", Change(keys=KeyChange(remove=(made(3).digest,))))
            await store.write("newcomer", Change(keys=KeyChange(add=made(100))))
        await soon(lambda: registry.keys.find(made(100).digest) is not KeyState.ABSENT, "the new key is followed")
        for number, expected in ((3, KeyState.ABSENT), (100, KnownKey("newcomer", made(100)))):
            digest = made(number).digest
            found = registry.keys.find(digest)
            assert (await registry.keys.look_up(digest) if found is KeyState.UNKNOWN else found) == expected


async def test_an_id_that_needs_a_proof_needs_one_too_while_its_record_cannot_be_read(opened: Open) -> None:
    """It does not fit into memory, and its look-up is late: nobody may claim it meanwhile."""
    async with store_of(opened) as store:
        for number in range(20):
            await store.write(f"client-{number}", Change(keys=KeyChange(add=made(number))))
            await store.write(f"open-{number}", Change(keys=KeyChange(add=made(100 + number)), verified_only=False))
            await store.write(f"tier-{number}", Change(tier="BASIC"))
    async with following(opened(), limit=25, deadline=CALM) as registry:  # a smaller filter would be full
        registry.store_error = "unavailable"
        keyed = [registry.try_get(f"client-{number}") for number in range(20)]
        assert all(client is not None and client.is_verified_only for client in keyed)
        for name in ("open", "tier", "invented"):
            others = [registry.try_get(f"{name}-{number}") for number in range(20)]
            refused = sum(client is not None and client.is_verified_only for client in others)
            assert refused <= 4, f"{name}: all but few are known to need none"
        registry.store_error = None
        for number in range(20):
            client = registry.try_get(f"open-{number}") or await registry.look_up(f"open-{number}")
            assert not client.is_verified_only


async def test_a_tier_that_needs_a_proof_needs_one_too_while_records_cannot_be_read(opened: Open) -> None:
    async with store_of(opened) as store:
        for number in range(20):
            await store.write(f"tier-{number}", Change(tier="BASIC"))
    async with following(opened(), limit=5, rules=IdentityRules(tiers=frozenset({"BASIC"}))) as registry:
        registry.store_error = "unavailable"
        clients = [registry.try_get(f"tier-{number}") for number in range(20)]
        assert all(client is not None and client.is_verified_only for client in clients)
        invented = [registry.by_id(f"invented-{number}").is_verified_only for number in range(100)]
        assert sum(invented) <= 10


async def test_a_key_expires_without_a_change_of_the_store(opened: Open) -> None:
    wall = FakeClock(time.time())
    async with following(opened(), wall_clock=wall) as registry:
        key = made(1, expires_at=wall() + 100)
        await registry.keys.create("acme", key, verified_only=UNCHANGED)
        version = registry.version
        registry.end_expired()
        assert registry.version == version
        wall.advance(100.001)  # stores keep milliseconds
        registry.end_expired()
        assert registry.version > version, "proofs that were remembered are verified again"
        assert registry.by_id("acme").is_verified_only


async def test_without_the_store_known_keys_are_accepted_for_a_stated_time(store_server: StoreServer) -> None:
    store = RedisClientStore(StoreSession(store_server.url, timeout=0.3))
    async with following(store, outage_tolerance=0.5) as registry:
        await registry.keys.create("acme", ONE, verified_only=UNCHANGED)
        store_server.pause()
        await soon(lambda: registry.store_error is not None, "the outage is noticed")
        if registry.keys.find(ONE.digest) is not KeyState.UNAVAILABLE:  # the time is not over yet
            assert registry.keys.find(ONE.digest) == KnownKey("acme", ONE)
        assert registry.keys.find(TWO.digest) is KeyState.UNAVAILABLE, "it may have been created elsewhere"
        version = registry.version
        await soon(lambda: registry.keys.find(ONE.digest) is KeyState.UNAVAILABLE, "the time is over")
        assert registry.version >= version
        assert "outdated" in repr(registry.keys)
        store_server.resume()
        await soon(lambda: registry.keys.find(ONE.digest) == KnownKey("acme", ONE), "the store has returned")
        assert registry.keys.find(TWO.digest) is KeyState.ABSENT


def test_the_registry_shows_its_keys(tmp_path: Path) -> None:
    registry = ClientRegistry(TIERS, "FREE", {}, SqliteClientStore(tmp_path))
    assert "0 keys held, 0 configured, current" in repr(registry.keys)
