"""`kill -9` at each step of a rotation: afterwards the old or the new key is valid, never neither."""

import asyncio
import signal
import subprocess
import sys
import time
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
from api_gateway.clients.records import Change, KeyChange
from tests.store.test_killed_rotations import NEW, OLD, opened

STEP = int(sys.argv[2])
count = 0

def step(*_):
    global count
    count += 1
    if count > STEP:
        os.kill(os.getpid(), signal.SIGKILL)

def stepping(call):
    async def wrapped(*arguments, **options):
        step()
        reply = await call(*arguments, **options)
        step()
        return reply
    return wrapped

async def rotate():
    store = opened(sys.argv[1])
    await store.load(10)
    if hasattr(store, "_connection"):
        store._connection.set_trace_callback(step)
        store._connection.set_progress_handler(step, 25)
    else:
        store._client.hget, store._client.eval = stepping(store._client.hget), stepping(store._client.eval)
    until = float(sys.argv[3])
    change = KeyChange(add=NEW, expire=((OLD.digest, until),), requires=OLD.digest)
    await store.write("acme", Change(keys=change))
    step()
    print(count, flush=True)
    os._exit(0)

asyncio.run(rotate())
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


def rotate_until(place: str, step: int, until: float) -> int | None:
    """Rotate in a process that kills itself at a step; return the number of steps if it was not killed."""
    command = [sys.executable, "-c", ROTATOR, place, str(step), str(until)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    return int(ended.stdout) if ended.returncode == 0 else None


def check_all_steps(place: str, longest: int) -> int:
    """Kill the rotation at each step, or at `longest` steps with equal distances; return the number of its steps."""
    until = time.time() + 3600
    asyncio.run(prepare(place))
    total = rotate_until(place, 1_000_000, until)
    assert total is not None
    for step in sorted({total * number // longest for number in range(longest)}):
        asyncio.run(prepare(place))
        assert rotate_until(place, step, until) is None
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
