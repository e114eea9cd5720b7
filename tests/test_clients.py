"""Which client has which tier, and that what was confirmed is on disk."""

import asyncio
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

import api_gateway
from api_gateway.clients import FILE_NAME, SCHEMA_VERSION, ClientRegistry, ClientStore, bucket_key
from api_gateway.errors import StoreUnavailable
from api_gateway.models import Quota

TIERS = {
    name: Quota.per_second(name, rate, capacity)
    for name, rate, capacity in (("FREE", 1, 10), ("BASIC", 5, 50), ("PREMIUM", 20, 200))
}


def registry_of(store: ClientStore, configured: dict[str, str] | None = None, *without: str) -> ClientRegistry:
    """Return a registry on `store` that knows all tiers but those in `without`."""
    tiers = {name: quota for name, quota in TIERS.items() if name not in without}
    return ClientRegistry(tiers, "FREE", configured or {}, store)


@asynccontextmanager
async def loaded(
    state_dir: Path, configured: dict[str, str] | None = None, *without: str
) -> AsyncIterator[ClientRegistry]:
    """Load a registry from a directory, as a start of the gateway does, and close it."""
    registry = registry_of(ClientStore(state_dir), configured, *without)
    try:
        await registry.load()
        yield registry
    finally:
        await registry.close()


def tier_of(registry: ClientRegistry, client_id: str) -> tuple[str, str]:
    client = registry.named(client_id)
    return client.quota.name, client.source


def rows(state_dir: Path) -> dict[str, str]:
    """Return what lies on disk."""
    with closing(sqlite3.connect(state_dir / FILE_NAME)) as connection:
        return dict(connection.execute("SELECT id, tier FROM clients"))


def alter(state_dir: Path, statement: str) -> list[Any]:
    """Do something to the file behind the gateway's back."""
    with closing(sqlite3.connect(state_dir / FILE_NAME)) as connection, connection:
        return connection.execute(statement).fetchall()


# Who a client is


async def test_registered_beats_configured_beats_the_default(tmp_path: Path) -> None:
    async with loaded(tmp_path, {"acme": "BASIC", "initech": "BASIC"}) as registry:
        await registry.set_tier("acme", "PREMIUM")
        assert tier_of(registry, "acme") == ("PREMIUM", "registered")
        assert tier_of(registry, "initech") == ("BASIC", "configured")
        assert tier_of(registry, "umbrella") == ("FREE", "default")


async def test_a_client_has_the_terms_of_its_tier_and_a_bucket_of_its_own(tmp_path: Path) -> None:
    async with loaded(tmp_path, {"acme": "BASIC"}) as registry:
        client = registry.named("acme")
        assert (client.id, client.key, client.quota) == ("acme", bucket_key("acme"), TIERS["BASIC"])


async def test_a_client_cannot_name_itself_into_the_bucket_of_an_address(tmp_path: Path) -> None:
    async with loaded(tmp_path) as registry:
        unnamed = registry.unnamed("192.0.2.7")
        assert (unnamed.id, unnamed.quota.name, unnamed.source) == ("192.0.2.7", "FREE", "address")
        for name in ("192.0.2.7", unnamed.key, "address:192.0.2.7"):
            assert registry.named(name).key != unnamed.key


async def test_asking_for_a_client_remembers_nothing(tmp_path: Path) -> None:
    async with loaded(tmp_path) as registry:
        before = repr(registry)
        for number in range(1000):
            registry.named(f"stranger-{number}")
        assert repr(registry) == before


async def test_a_default_tier_that_does_not_exist_is_a_defect_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        ClientRegistry(TIERS, "GOLD", {}, ClientStore(tmp_path))


# Changes


async def test_a_change_tells_before_and_after_and_holds_at_once(tmp_path: Path) -> None:
    async with loaded(tmp_path, {"acme": "BASIC"}) as registry:
        before, after = await registry.set_tier("acme", "PREMIUM")
        assert (before.quota.name, before.source) == ("BASIC", "configured")
        assert after == registry.named("acme")
        before, after = await registry.set_tier("acme", "FREE")
        assert (before.quota.name, after.quota.name) == ("PREMIUM", "FREE")


async def test_a_change_survives_a_restart(tmp_path: Path) -> None:
    async with loaded(tmp_path / "deep" / "state") as registry:
        await registry.set_tier("acme", "BASIC")
        await registry.set_tier("acme", "PREMIUM")
        await registry.set_tier("üñí", "BASIC")
    async with loaded(tmp_path / "deep" / "state", {"acme": "BASIC"}) as registry:
        assert tier_of(registry, "acme") == ("PREMIUM", "registered")
        assert tier_of(registry, "üñí") == ("BASIC", "registered")


async def test_forgetting_a_client_returns_it_to_what_it_was_and_survives_a_restart(tmp_path: Path) -> None:
    async with loaded(tmp_path, {"acme": "BASIC"}) as registry:
        await registry.set_tier("acme", "PREMIUM")
        before, after = await registry.forget("acme")
        assert (before.quota.name, after.quota.name, after.source) == ("PREMIUM", "BASIC", "configured")
        assert after == registry.named("acme")
    assert rows(tmp_path) == {}
    async with loaded(tmp_path) as registry:
        assert tier_of(registry, "acme") == ("FREE", "default")


async def test_forgetting_a_client_nobody_registered_changes_nothing(tmp_path: Path) -> None:
    async with loaded(tmp_path) as registry:
        before, after = await registry.forget("acme")
        assert before == after
        assert after.source == "default"


class WatchedStore(ClientStore):
    """A store that gives way in the middle of a write and counts how many are under way."""

    running = most = 0

    async def put(self, client_id: str, tier: str) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(5):
            await asyncio.sleep(0)
        await super().put(client_id, tier)
        self.running -= 1


async def test_changes_at_one_time_are_made_one_after_the_other(tmp_path: Path) -> None:
    store = WatchedStore(tmp_path)
    registry = registry_of(store)
    await registry.load()
    order = ["BASIC", "PREMIUM", "FREE", "BASIC"]
    changes = await asyncio.gather(*(registry.set_tier("acme", tier) for tier in order))
    assert store.most == 1
    assert [(before.quota.name, after.quota.name) for before, after in changes] == [
        ("FREE", "BASIC"),
        ("BASIC", "PREMIUM"),
        ("PREMIUM", "FREE"),
        ("FREE", "BASIC"),
    ]
    await registry.close()
    assert rows(tmp_path) == {"acme": "BASIC"}


CHILD = """
import asyncio, sys, time
from pathlib import Path
from api_gateway.clients import ClientRegistry, ClientStore
from api_gateway.models import Quota

async def main():
    tiers = {name: Quota.per_second(name, 1, 10) for name in ("FREE", "PREMIUM")}
    registry = ClientRegistry(tiers, "FREE", {}, ClientStore(Path(sys.argv[1])))
    await registry.load()
    await registry.set_tier("acme", "PREMIUM")
    print("confirmed", flush=True)
    time.sleep(60)

asyncio.run(main())
"""


async def test_what_was_confirmed_survives_kill_9(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(api_gateway.__file__).parents[1])}
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs on this loop
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as child:
        assert child.stdout is not None
        confirmation = child.stdout.readline()
        child.kill()
    assert confirmation == b"confirmed\n"
    assert child.returncode == -9
    async with loaded(tmp_path) as registry:
        assert tier_of(registry, "acme") == ("PREMIUM", "registered")


# Failures


async def close(registry: ClientRegistry, _: Path) -> None:
    await registry.close()


async def drop_table(_: ClientRegistry, state_dir: Path) -> None:
    alter(state_dir, "DROP TABLE clients")


@pytest.mark.parametrize("breakage", [close, drop_table])
async def test_a_change_that_cannot_be_written_is_not_made(
    tmp_path: Path, breakage: Callable[[ClientRegistry, Path], Awaitable[None]]
) -> None:
    async with loaded(tmp_path) as registry:
        await registry.set_tier("acme", "BASIC")
        await breakage(registry, tmp_path)
        with pytest.raises(StoreUnavailable, match=FILE_NAME) as caught:
            await registry.set_tier("acme", "PREMIUM")
        assert caught.value.retry_after == 5
        with pytest.raises(StoreUnavailable, match=FILE_NAME):
            await registry.forget("acme")
        assert tier_of(registry, "acme") == ("BASIC", "registered")


async def test_a_store_that_was_never_opened_refuses_changes(tmp_path: Path) -> None:
    registry = registry_of(ClientStore(tmp_path))
    with pytest.raises(StoreUnavailable) as caught:
        await registry.set_tier("acme", "BASIC")
    assert "not open" in str(caught.value.__cause__)
    assert tier_of(registry, "acme") == ("FREE", "default")
    await registry.close()


async def test_a_change_can_be_made_again_after_one_has_failed(tmp_path: Path) -> None:
    async with loaded(tmp_path) as registry:
        alter(tmp_path, "ALTER TABLE clients RENAME TO gone")
        with pytest.raises(StoreUnavailable):
            await registry.set_tier("acme", "BASIC")
        alter(tmp_path, "ALTER TABLE gone RENAME TO clients")
        await registry.set_tier("acme", "PREMIUM")
    assert rows(tmp_path) == {"acme": "PREMIUM"}


async def test_a_tier_that_is_no_longer_configured_falls_back_and_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tier may come back with the next configuration; the registration must not be lost meanwhile."""
    async with loaded(tmp_path) as registry:
        await registry.set_tier("acme", "PREMIUM")
        await registry.set_tier("initech", "PREMIUM")
    with caplog.at_level(logging.WARNING):
        async with loaded(tmp_path, {"initech": "BASIC"}, "PREMIUM") as registry:
            assert tier_of(registry, "acme") == ("FREE", "default")
            assert tier_of(registry, "initech") == ("BASIC", "configured")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert any("'acme'" in message and "'PREMIUM'" in message for message in told)
    async with loaded(tmp_path) as registry:
        assert tier_of(registry, "acme") == ("PREMIUM", "registered")


async def test_a_file_of_a_newer_gateway_is_refused_and_left_alone(tmp_path: Path) -> None:
    async with loaded(tmp_path) as registry:
        await registry.set_tier("acme", "PREMIUM")
    alter(tmp_path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    registry = registry_of(ClientStore(tmp_path))
    with pytest.raises(OSError, match=f"newer gateway .*{SCHEMA_VERSION + 1}.*{SCHEMA_VERSION}"):
        await registry.load()
    await registry.close()
    assert alter(tmp_path, "PRAGMA user_version") == [(SCHEMA_VERSION + 1,)]
    assert rows(tmp_path) == {"acme": "PREMIUM"}


async def test_a_file_that_is_no_database_is_refused_and_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection left open would be told of as a ResourceWarning by newer interpreters."""
    (tmp_path / FILE_NAME).write_bytes(b"this is not a database, whatever its name says" * 100)
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def watched(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", watched)
    store = ClientStore(tmp_path)
    with pytest.raises(OSError, match="not a database"):
        await store.open()
    await store.close()
    (connection,) = opened
    try:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")
    finally:
        connection.close()


async def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = ClientStore(tmp_path / "file" / "state")
    with pytest.raises(OSError, match="file"):
        await store.open()
    await store.close()


# The file


async def test_the_file_has_a_write_ahead_log_and_waits_for_the_disk(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    await store.open()
    connection = store._connection
    assert connection is not None
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    await store.close()


async def test_a_store_can_be_closed_twice(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    await store.open()
    await store.close()
    await store.close()


async def test_both_tell_their_state(tmp_path: Path) -> None:
    async with loaded(tmp_path, {"a": "BASIC", "b": "BASIC"}) as registry:
        await registry.set_tier("c", "BASIC")
        assert repr(registry) == "<ClientRegistry [1 registered, 2 configured]>"
    assert str(tmp_path / FILE_NAME) in repr(ClientStore(tmp_path))
