"""State files of former and newer gateways: migrated with a backup beside them, or refused and left as they are.

The files in `former` were written by the commits that name their folders, and end with `kill -9`: the last changes are
in the write-ahead log. They have the clients acme (PREMIUM) and beta (BASIC).
"""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from api_gateway.admin.audit_log import AuditFile
from api_gateway.admin.breaker_overrides import InvalidOverrideFile, OverrideFile
from api_gateway.clients.sqlite_store import CLIENTS_FILE, CLIENTS_SCHEMA
from api_gateway.limits.period_store import QUOTAS_FILE, QUOTAS_SCHEMA
from api_gateway.storage import sqlite_schema
from api_gateway.storage.sqlite_file import SqliteFile
from api_gateway.system.state_folder import VERSION_FILE, FolderOfNewer, StateError, StateFolder
from api_gateway.system.state_version import backup_path, backups_of, newer_state
from api_gateway.usage.ledger import USAGE_FILE, USAGE_SCHEMA
from tests.cases import each
from tests.kit import ask, in_front_of, running_gateway
from tests.processes import ROOT
from tests.unit.test_audit_log import entry

FORMER = Path(__file__).parent / "former"
CLIENTS = {"acme": "PREMIUM", "beta": "BASIC"}
SCHEMAS = {CLIENTS_FILE: CLIENTS_SCHEMA, QUOTAS_FILE: QUOTAS_SCHEMA, USAGE_FILE: USAGE_SCHEMA}
NEWER = r"written by a newer gateway \(schema {}, newest supported {}\): start that gateway"


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def tiers_of(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return dict(connection.execute("SELECT id, tier FROM clients"))


def state_of(name: str, folder: Path) -> Path:
    """Copy what a former gateway has left to the gateway's own folder in a state folder, which is returned."""
    shutil.copytree(FORMER / name, folder / "state")
    (folder / "state").chmod(0o700)
    return folder


async def open_file(folder: Path, name: str) -> None:
    file = SqliteFile(folder / name, SCHEMAS[name], thread_name="test")
    try:
        await file.open()
    finally:
        await file.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def backups_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.backup"))


# Older


@pytest.mark.parametrize(("name", "version"), [("0250753", 2), ("14860c3", 3)])
def test_a_gateway_takes_over_what_a_former_one_has_left(name: str, version: int, tmp_path: Path) -> None:
    """Tiers, keys, modes of circuit breakers and the pseudonym. Only a file that is changed has a backup, and one."""
    sections = in_front_of("http://127.0.0.1:9") | {
        "tiers": {tier: {"rate": 1, "capacity": 1} for tier in ("FREE", "BASIC", "PREMIUM")}
    }
    sections["upstreams"]["orders"] = sections["upstreams"]["up"]
    state = state_of(name, tmp_path) / "state"
    for _ in range(2):
        with running_gateway(sections, tmp_path) as gateway:
            token = (state / "operator-token").read_text().strip()
            operator = {"Authorization": f"Bearer {token}"}
            for client, tier in CLIENTS.items():
                view = ask(f"{gateway.url}/clients/{client}", headers=operator).json()
                assert (view["tier"]["name"], view["tier_source"]) == (tier, "registered")
            if name == "14860c3":
                keys = ask(f"{gateway.url}/clients/acme/keys", headers=operator).json()["keys"]
                assert [key["label"] for key in keys] == ["first"]
                modes = ask(f"{gateway.url}/circuit-breakers", headers=operator).json()
                assert modes["circuit_breakers"]["orders"]["mode"] == "forced_open"
                assert (state / "via").read_text() == (FORMER / name / "via").read_text()
        backups = backups_in(state)
        if version == CLIENTS_SCHEMA.version:
            assert backups == []
        else:
            (backup,) = backups
            assert re.fullmatch(rf"clients\.sqlite3\.v{version}-\d{{8}}T\d{{6}}Z\.backup", backup.name)
            assert stat.S_IMODE(backup.stat().st_mode) == 0o600
            assert (version_of(backup), tiers_of(backup)) == (version, CLIENTS)
    assert (state / VERSION_FILE).read_text() == "1\n"


async def test_a_backup_put_in_the_place_of_the_file_is_the_file_before(tmp_path: Path) -> None:
    """As docs/upgrading.md says, to go back."""
    folder = state_of("0250753", tmp_path) / "state"
    await open_file(folder, CLIENTS_FILE)
    with closing(sqlite3.connect(folder / CLIENTS_FILE)) as connection:
        connection.execute("DELETE FROM clients")
        connection.commit()
    for file in (CLIENTS_FILE, f"{CLIENTS_FILE}-wal", f"{CLIENTS_FILE}-shm"):
        (folder / file).unlink(missing_ok=True)
    shutil.copy(backups_in(folder)[0], folder / CLIENTS_FILE)
    assert (version_of(folder / CLIENTS_FILE), tiers_of(folder / CLIENTS_FILE)) == (2, CLIENTS)
    await open_file(folder, CLIENTS_FILE)
    assert tiers_of(folder / CLIENTS_FILE) == CLIENTS
    assert len(backups_in(folder)) == 2


async def test_processes_that_migrate_a_file_at_once_make_one_backup(tmp_path: Path) -> None:
    folder = state_of("0250753", tmp_path) / "state"
    await asyncio.gather(*(open_file(folder, CLIENTS_FILE) for _ in range(4)))
    assert len(backups_in(folder)) == 1
    assert tiers_of(folder / CLIENTS_FILE) == CLIENTS


async def test_a_file_is_not_migrated_without_its_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = state_of("0250753", tmp_path) / "state"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sqlite_schema, "create_private", full)
    with pytest.raises(
        OSError, match=r"not migrated, as its backup clients.sqlite3.v2-[-\w]+.backup cannot be written"
    ):
        await open_file(folder, CLIENTS_FILE)
    monkeypatch.undo()
    assert (version_of(folder / CLIENTS_FILE), tiers_of(folder / CLIENTS_FILE)) == (2, CLIENTS)
    await open_file(folder, CLIENTS_FILE)
    assert tiers_of(folder / CLIENTS_FILE) == CLIENTS


async def test_a_file_that_only_lacks_its_version_gets_it(tmp_path: Path) -> None:
    """The usage of former gateways has none. Nothing else changes, so there is no backup."""
    with closing(sqlite3.connect(tmp_path / USAGE_FILE)) as connection:
        connection.execute(USAGE_SCHEMA.tables[0])
        connection.execute("INSERT INTO usage VALUES (20000, 'acme', 'all', 1, 2, 3, 4, 5, 6)")
        connection.commit()
    await open_file(tmp_path, USAGE_FILE)
    assert version_of(tmp_path / USAGE_FILE) == 1
    with closing(sqlite3.connect(tmp_path / USAGE_FILE)) as connection:
        assert connection.execute("SELECT * FROM usage").fetchall() == [(20000, "acme", "all", 1, 2, 3, 4, 5, 6)]
    assert backups_in(tmp_path) == []


@each("name", SCHEMAS)
def test_there_is_a_step_from_each_version_to_the_next(name: str) -> None:
    assert set(SCHEMAS[name].steps) == set(range(1, SCHEMAS[name].version))


def test_a_second_backup_of_the_same_second_has_another_name(tmp_path: Path) -> None:
    path, now = tmp_path / "file", datetime(2026, 12, 1, tzinfo=UTC)
    for _ in range(3):
        backup_path(path, 1, now).touch()
    (tmp_path / "file.v1-x.backup").touch()
    stem = "file.v1-20261201T000000Z"
    assert {file.name for file in backups_of(path, 1)} == {f"{stem}{end}.backup" for end in ("", "-2", "-3")}
    assert backups_of(path, 0) == []


# Newer


@pytest.mark.parametrize("name", SCHEMAS)
async def test_a_file_of_a_newer_gateway_is_refused_and_not_touched(name: str, tmp_path: Path) -> None:
    newest = SCHEMAS[name].version
    (tmp_path / f"{name}.v{newest}-20261201T000000Z.backup").touch()
    with closing(sqlite3.connect(tmp_path / name)) as connection:
        connection.execute("CREATE TABLE of_the_future (id)")
        connection.execute(f"PRAGMA user_version = {newest + 1}")
    before = contents(tmp_path)
    with pytest.raises(OSError, match=NEWER.format(newest + 1, newest)) as caught:
        await open_file(tmp_path, name)
    assert str(tmp_path / name) in str(caught.value)
    assert f"put the backup {name}.v{newest}-20261201T000000Z.backup in its place" in str(caught.value)
    assert contents(tmp_path) == before


def test_the_message_without_a_backup_names_another_remedy(tmp_path: Path) -> None:
    assert "set state_dir to another folder" in newer_state(tmp_path / "file", 2, 1)


@pytest.mark.parametrize(("text", "message"), [("2", NEWER.format(2, 1)), ("", "must be a version such as 1, got ''")])
def test_a_folder_of_a_newer_gateway_is_refused(text: str, message: str, tmp_path: Path) -> None:
    StateFolder(tmp_path).close()
    path = tmp_path / "state" / VERSION_FILE
    path.write_text(text)
    with pytest.raises(StateError, match=message) as caught:
        StateFolder(tmp_path)
    assert isinstance(caught.value, FolderOfNewer) == (text == "2")
    assert str(caught.value).startswith(f"state_dir: {path}")
    assert path.read_text() == text


def test_modes_of_a_newer_gateway_are_refused_and_not_overwritten(tmp_path: Path) -> None:
    file = OverrideFile(tmp_path)
    file.path.write_text('{"version": 2, "circuit_breakers": []}')
    for action in (file.read, lambda: file.change("up", None, 0.0)):
        with pytest.raises(InvalidOverrideFile, match=NEWER.format(2, 1)):
            action()
    assert file.path.read_text() == '{"version": 2, "circuit_breakers": []}'


@pytest.mark.parametrize("version", ["0", "true", '"1"', "1.0"])
def test_the_version_of_modes_is_a_number(version: str, tmp_path: Path) -> None:
    file = OverrideFile(tmp_path)
    file.path.write_text(f'{{"version": {version}, "circuit_breakers": {{}}}}')
    with pytest.raises(InvalidOverrideFile, match="version: must be a whole number from 1, got "):
        file.read()


def test_modes_and_audit_log_state_their_version(tmp_path: Path) -> None:
    file, log = OverrideFile(tmp_path), AuditFile(tmp_path)
    file.change("up", None, 0.0)
    log.append(entry(1))
    assert json.loads(file.path.read_text())["version"] == 1
    assert log.path.read_text().splitlines()[0] == '{"version":1}'


def test_an_audit_log_of_a_newer_gateway_is_kept_beside_the_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A change by an operator is recorded in any case."""
    log = AuditFile(tmp_path)
    newer = '{"version":2}\n{"what": "only a newer gateway knows"}\n'
    log.path.write_text(newer)
    with caplog.at_level(logging.WARNING):
        assert log.last(5) == []
    assert "was written by a newer gateway" in caplog.text
    log.append(entry(1))
    assert log.last(5) == [entry(1)]
    (kept,) = backups_in(tmp_path)
    assert kept.name.startswith("audit.jsonl.v2-")
    assert kept.read_text() == newer


# Killed in the middle


def migrate_clients(folder: Path) -> None:
    SqliteFile(folder / "state" / CLIENTS_FILE, CLIENTS_SCHEMA, thread_name="test")._open().close()


def take_over_folder(folder: Path) -> None:
    StateFolder(folder).close()


def clients_are_old_or_new(folder: Path) -> None:
    path = folder / "state" / CLIENTS_FILE
    assert version_of(path) in (2, CLIENTS_SCHEMA.version)
    assert tiers_of(path) == CLIENTS
    for backup in backups_in(folder / "state"):
        assert (version_of(backup), tiers_of(backup)) == (2, CLIENTS)


def files_are_old_or_new(folder: Path) -> None:
    places = [place / CLIENTS_FILE for place in (folder, folder / "state") if (place / CLIENTS_FILE).exists()]
    assert places
    for path in places:
        copy = folder / "looked-at"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()  # to look at a file with a log changes both
        for file in path.parent.glob(f"{CLIENTS_FILE}*"):
            shutil.copy(file, copy / file.name)
        assert tiers_of(copy / CLIENTS_FILE) == CLIENTS


def clients_are_absent_or_a_database(folder: Path) -> None:
    path = folder / "state" / CLIENTS_FILE
    assert not path.exists() or path.stat().st_size, "an empty file is refused"


ACTIONS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "creation": (migrate_clients, clients_are_absent_or_a_database),
    "migration": (migrate_clients, clients_are_old_or_new),
    "folder": (take_over_folder, files_are_old_or_new),
}
_STEPS = ("open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename")  # audited by Python


def kill_at(number: int) -> None:
    """End this process without notice at its nth step: a call of the system that changes files, or a statement."""
    steps = 0

    def step(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == number:
            os.kill(os.getpid(), signal.SIGKILL)

    connect = sqlite3.connect

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **options)
        connection.set_trace_callback(step)
        connection.set_progress_handler(step, 50)
        return connection

    sqlite3.connect = traced  # type: ignore[assignment]  # of this process alone, which ends
    sys.addaudithook(lambda event, _: step() if event in _STEPS else None)


def kill_at_each_step(kind: str, place: Path) -> int:
    """Do an action in a child process that ends at its first step, at its second, and so on; check what is left."""
    action, check = ACTIONS[kind]
    for number in range(1, 1000):
        folder = place / str(number)
        if kind == "folder":
            shutil.copytree(FORMER / "0250753", folder)
        elif kind == "migration":
            folder.mkdir()
            state_of("0250753", folder)
        child = os.fork()
        if child == 0:
            kill_at(number)
            action(folder)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0
        check(folder)
        action(folder)
        check(folder)
        assert tiers_of(folder / "state" / CLIENTS_FILE) == ({} if kind == "creation" else CLIENTS)
        shutil.rmtree(folder)
        if status == 0:
            return number - 1
    raise AssertionError("it does not end")


@pytest.mark.parametrize(("kind", "least"), [("creation", 10), ("migration", 20), ("folder", 8)])
def test_kill_9_at_any_step_leaves_the_old_content_or_the_new_one(kind: str, least: int, tmp_path: Path) -> None:
    program = "import sys, pathlib; from tests.store.test_state_versions import kill_at_each_step as kill\n"
    program += "print(kill(sys.argv[1], pathlib.Path(sys.argv[2])))"
    run = subprocess.run(
        [sys.executable, "-c", program, kind, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= least
