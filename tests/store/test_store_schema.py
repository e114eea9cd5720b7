"""The version of the keys in a shared store: that of a newer gateway is refused, as soon as it can be read."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from api_gateway.assembly import store_schema
from api_gateway.assembly.store_schema import STORE_SCHEMA, check_store_schema, hold_store_schema, schema_key
from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from tests.kit import soon
from tests.store_kit import StoreServer

KEY = schema_key("gateway")


def config_of(folder: Path, url: str, prefix: str = "gateway") -> GatewayConfig:
    return GatewayConfig.model_validate({"state_dir": folder, "store": {"url": url, "timeout": 5, "prefix": prefix}})


async def test_the_first_gateway_writes_the_version_and_the_others_read_it(tmp_path: Path, store: StoreServer) -> None:
    for _ in range(2):
        assert await check_store_schema(config_of(tmp_path, store.url))
        assert store.admin.get(KEY) == str(STORE_SCHEMA).encode()
        assert store.admin.ttl(KEY) == -1


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (str(STORE_SCHEMA + 1), r"'gateway:' were written by a newer gateway \(schema 2, newest supported 1\)"),
        ("0", "the key 'gateway:schema' must be a version such as 1, got '0'"),
        ("x\n", r"must be a version such as 1, got 'x\\n'"),
    ],
)
async def test_any_other_version_is_refused_and_left(
    found: str, message: str, tmp_path: Path, store: StoreServer
) -> None:
    store.admin.set(KEY, found)
    async with AsyncExitStack() as stack:
        with pytest.raises(StartupError, match=message):
            await hold_store_schema(config_of(tmp_path, store.url), stack)
    assert store.admin.get(KEY) == found.encode()
    assert await check_store_schema(config_of(tmp_path, store.url, prefix="another"))


@pytest.mark.parametrize("version", [STORE_SCHEMA, STORE_SCHEMA + 1])
async def test_a_gateway_that_started_in_an_outage_is_stopped_only_if_it_is_too_old(
    version: int, tmp_path: Path, store: StoreServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_schema, "_RETRY_AFTER", 0.02)
    config, stops = config_of(tmp_path, store.url), []
    store.kill()
    async with AsyncExitStack() as stack:
        await hold_store_schema(config, stack, lambda: stops.append(1))
        assert stops == []
        store.start()
        if version > STORE_SCHEMA:
            store.admin.set(KEY, version)
            await soon(lambda: stops == [1], "it is stopped")
            assert "newer gateway (schema 2, newest supported 1)" in caplog.text
        else:
            await soon(lambda: store.admin.get(KEY) == b"1", "the version is written")
    assert len(stops) == version - STORE_SCHEMA
