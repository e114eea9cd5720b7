"""The pseudonym in `Via`: one for all machines that share a store."""

from pathlib import Path

from api_gateway.assembly.pseudonym import pseudonym_of
from api_gateway.config import GatewayConfig
from tests.store_kit import StoreServer


def machine(folder: Path, url: str, prefix: str = "gateway") -> GatewayConfig:
    return GatewayConfig.model_validate({"state_dir": folder, "store": {"url": url, "timeout": 5, "prefix": prefix}})


async def test_machines_with_one_store_have_one_name(tmp_path: Path, store: StoreServer) -> None:
    first = await pseudonym_of(machine(tmp_path / "one", store.url))
    assert first == (tmp_path / "one" / "state" / "via").read_text().strip()
    for folder in ("other", "one"):
        assert await pseudonym_of(machine(tmp_path / folder, store.url)) == first
    assert await pseudonym_of(machine(tmp_path / "other", store.url, prefix="another-deployment")) != first


async def test_without_the_store_each_machine_has_the_name_that_it_keeps(tmp_path: Path) -> None:
    unreachable = "redis://127.0.0.1:1"
    names = [await pseudonym_of(machine(tmp_path / folder, unreachable)) for folder in ("one", "one", "other")]
    assert names[0] == names[1] != names[2]
