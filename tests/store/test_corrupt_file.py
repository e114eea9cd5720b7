"""A corrupt file of clients: one line of log, at the start and while the gateway runs, and never a traceback."""

import json
import logging
import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api_gateway.clients.records import Change, Grant
from api_gateway.clients.sqlite_store import CLIENTS_FILE, SqliteClientStore
from tests.kit import RunningGateway, ask, eventually, in_front_of
from tests.processes import process

PAGE = 4096
CLIENTS = 200
StartGateway = Callable[[dict[str, Any]], RunningGateway]
Corrupt = Callable[[Path], None]


async def fill(folder: Path) -> None:
    """Write clients into the file, and everything into its main part."""
    store = SqliteClientStore(folder)
    await store.load(10_000)
    for number in range(CLIENTS):
        change = Change(tier="PREMIUM") if number % 2 else Change(grant=Grant("BASIC", 2e9))
        await store.write(f"client-{number}", change)
    await store.close()
    checkpoint(folder / CLIENTS_FILE)


def checkpoint(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def overwrite(file: Path, *pieces: tuple[int, bytes]) -> None:
    descriptor = os.open(file, os.O_WRONLY)
    for at, piece in pieces:
        os.pwrite(descriptor, piece, at)
    os.close(descriptor)


def pages(file: Path) -> None:
    overwrite(file, *((at, b"\xff" * 200) for at in range(PAGE, file.stat().st_size, PAGE)))


def header(file: Path) -> None:
    overwrite(file, (0, b"no database at all"))


def schema(file: Path) -> None:
    """Put what is no UTF-8, and a line break, into the statement that makes the table."""
    at = file.read_bytes().index(b"CREATE TABLE clients")
    overwrite(file, (at + 8, b"\n\xf2\xff"))


def names(file: Path) -> None:
    """Put what is no UTF-8 into the clients' names and tiers."""
    data = file.read_bytes()
    overwrite(file, (data.rindex(b"client-7"), b"\xf2"), (data.rindex(b"PREMIUM"), b"\xf2"))


def types(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE clients SET tier = x'00ff' WHERE id = 'client-1'")
    connection.close()
    checkpoint(file)


CORRUPTIONS = (pages, header, schema, names, types)


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
async def test_at_the_start_it_is_one_line_and_exit_code_3(tmp_path: Path, corrupt: Corrupt) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(json.dumps(in_front_of("http://127.0.0.1:9") | {"state_dir": str(tmp_path / "state")}))
    with process("-m", "api_gateway", "--port", "0", "--config", str(config), cwd=tmp_path) as running:
        assert running.url
        running.popen.terminate()
        running.popen.wait(60)
    (file,) = (tmp_path / "state").rglob(CLIENTS_FILE)
    await fill(file.parent)
    corrupt(file)
    with process("-m", "api_gateway", "--port", "0", "--config", str(config), cwd=tmp_path) as running:
        assert running.popen.wait(60) == 3
        (line,) = running.errors.splitlines()
    assert "state_dir: " in line
    assert f"{file}: the file is corrupt: " in line
    assert "tiers and grants" in line
    assert "then restore a backup, or move the file" in line


async def test_a_file_that_is_not_corrupt_is_not_called_so(tmp_path: Path) -> None:
    store = SqliteClientStore(tmp_path / "state")
    await store.load(50)
    await store.close()
    with pytest.raises(OSError, match=CLIENTS_FILE) as closed:
        await store.write("acme", Change(tier="FREE"))
    (tmp_path / "folder" / CLIENTS_FILE).mkdir(parents=True)
    store = SqliteClientStore(tmp_path / "folder")
    with pytest.raises(OSError, match="folder") as unusable:
        await store.load(50)
    await store.close()
    assert "corrupt" not in f"{closed.value}{unusable.value}"


def test_while_it_runs_it_is_one_line_and_tiers_stay(gateway: StartGateway, caplog: pytest.LogCaptureFixture) -> None:
    running = gateway(in_front_of("http://127.0.0.1:9"))
    change = {"method": "POST", "headers": {"Content-Type": "application/json"}, "body": b'{"tier": "FREE"}'}
    assert ask(f"{running.url}/clients/known/tier", **change).status == 200  # type: ignore[arg-type]  # see `ask`
    (file,) = Path(running.config.state_dir).rglob(CLIENTS_FILE)
    with sqlite3.connect(file) as connection:
        for number in range(3000):
            row = (f"client-{number}", "FREE", number + 10)
            connection.execute("INSERT INTO clients (id, tier, version, changed_at) VALUES (?, ?, ?, 0)", row)
    connection.close()
    checkpoint(file)
    pages(file)
    overwrite(file, (24, b"\0\0\x7f\x01"), (92, b"\0\0\x7f\x01"))  # the counter of changes: what is cached is stale

    def errors() -> list[logging.LogRecord]:
        return [one for one in caplog.records if one.levelno >= logging.WARNING and "client" in one.name]

    eventually(lambda: bool(errors()), "it is noticed")
    refused = ask(f"{running.url}/clients/other/tier", **change)  # type: ignore[arg-type]  # see `ask`
    assert (refused.status, refused.json()["reason"]) == (503, "store_unavailable")
    assert ask(f"{running.url}/clients/known").json()["tier_source"] == "registered"
    shown = ask(f"{running.url}/health").json()["client_store"]
    assert (shown["status"], "malformed" in shown["error"], "backup" in shown["error"]) == ("warn", True, True)
    assert [(len(one.getMessage().splitlines()), one.exc_info) for one in errors()] == [(1, None)]


async def test_whatever_bytes_are_damaged_it_is_an_os_error_or_reads_well(tmp_path: Path) -> None:
    await fill(tmp_path / "good")
    good = (tmp_path / "good" / CLIENTS_FILE).read_bytes()
    source, messages = random.Random(7), list[str]()
    for number in range(60):
        damaged = bytearray(good)
        for _ in range(source.choice((1, 3, 20, 200))):
            damaged[source.randrange(100, len(damaged))] = source.randrange(256)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / CLIENTS_FILE).write_bytes(damaged)
        store = SqliteClientStore(folder)
        try:
            await store.load(50)
            await store.look_up([f"client-{number}" for number in range(CLIENTS)])
        except OSError as error:
            messages.append(str(error))
        finally:
            await store.close()
    assert messages
    assert not [message for message in messages if len(message.splitlines()) != 1]
