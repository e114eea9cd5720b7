"""`kill -9` at each step of a rotation: afterwards the old or the new key is valid, never neither."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api_gateway.clients.api_keys import ApiKey, digest_of, new_key
from api_gateway.clients.records import Change, ClientRecord, ClientStore, KeyChange
from api_gateway.clients.redis_store import RedisClientStore
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.storage.redis_session import StoreSession
from tests.processes import ROOT
from tests.store_kit import StoreServer

OLD, NEW = (ApiKey(digest_of(new_key(number.to_bytes(32)).encode()), created_at=float(number)) for number in (1, 2))
ROTATOR = """
import asyncio, os, signal, sys
from pathlib import Path
from api_gateway.clients.records import Change, KeyChange, Replacement
from tests.store.test_killed_rotations import NEW, OLD, opened

async def rotate(place, last_step, until):
    count = 0

    def step(*_):
        nonlocal count
        count += 1
        if count > last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    def stepping(call):
        async def wrapped(*arguments, **options):
            step()
            reply = await call(*arguments, **options)
            step()
            return reply
        return wrapped

    store = opened(place)
    await store.load(10)
    if hasattr(store, "_file"):
        store._file.connection.set_trace_callback(step)
        store._file.connection.set_progress_handler(step, 25)
    else:
        store._client.hget, store._client.eval = stepping(store._client.hget), stepping(store._client.eval)
    change = KeyChange(add=NEW, replaces=Replacement(OLD.digest, until))
    await store.write("acme", Change(keys=change))
    step()
    print(count, flush=True)

for line in sys.stdin:  # a process for each rotation, which need not import anything
    place, last_step, until = line.split()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            asyncio.run(rotate(place, int(last_step), float(until)))
            status = 0
        finally:
            os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended:
        print("killed" if ended == -signal.SIGKILL else f"exit code {ended}", flush=True)
"""


def opened(place: str) -> ClientStore:
    """Return a store: in a folder, or at a URL."""
    if "://" in place:
        return RedisClientStore(StoreSession(place, timeout=5.0))
    return SqliteClientStore(Path(place))


async def prepare(place: str) -> None:
    """Let the client have the old key only."""
    store = opened(place)
    await store.load(10)
    await store.write("acme", Change(keys=KeyChange(clear=True)))
    await store.write("acme", Change(keys=KeyChange(add=OLD)))
    await store.close()


async def record_in(place: str) -> ClientRecord:
    store = opened(place)
    await store.load(10)
    (record,) = await store.look_up(["acme"])
    found = await store.look_up_keys([OLD.digest, NEW.digest])
    await store.close()
    assert record is not None
    held = {key.digest for key in record.keys}
    assert [one is not None for one in found] == [OLD.digest in held, NEW.digest in held], (
        "the index is that of the keys"
    )
    return record


Rotate = Callable[[int, float], int | None]  # step and expiry of the old key; the number of steps, None if killed


@contextmanager
def rotator(place: str) -> Iterator[Rotate]:
    """Start a process that starts processes which rotate, and which kill themselves at a step."""
    command = [sys.executable, "-c", ROTATOR]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, replies = process.stdin, process.stdout

        def rotate_until(step: int, until: float) -> int | None:
            requests.write(f"{place} {step} {until}\n")
            requests.flush()
            said = replies.readline().strip()
            return None if said == "killed" else int(said)

        yield rotate_until
        requests.close()
        assert process.wait(60) == 0


def check_all_steps(place: str, longest: int) -> int:
    """Kill the rotation at each step, or at `longest` steps with equal distances; return the number of its steps."""
    until = time.time() + 3600
    asyncio.run(prepare(place))
    with rotator(place) as rotate_until:
        total = rotate_until(1_000_000, until)
        assert total is not None
        for step in sorted({total * number // longest for number in range(longest)}):
            asyncio.run(prepare(place))
            assert rotate_until(step, until) is None
            record = asyncio.run(record_in(place))
            digests = [key.digest for key in record.keys]
            assert digests in ([OLD.digest], [OLD.digest, NEW.digest])
            assert all(key.is_valid_at(time.time()) for key in record.keys)
            assert record.verified_only
    return total


@pytest.mark.timeout(300)
def test_in_a_file(tmp_path: Path) -> None:
    """Every statement is a step, and every 25 instructions of SQLite."""
    assert check_all_steps(str(tmp_path), 7) > 8


@pytest.mark.timeout(300)
def test_in_a_shared_store(store_server: StoreServer) -> None:
    """A step is before and after each command."""
    assert check_all_steps(store_server.url, 6) == 5
