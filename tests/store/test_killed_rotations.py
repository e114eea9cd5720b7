"""`kill -9` at each step of a rotation: afterwards the old or the new key is valid, never neither."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api_gateway.clients.records import Change, ClientRecord, KeyChange
from tests.processes import ROOT
from tests.store.killed_rotator import NEW, OLD, opened
from tests.store_kit import StoreServer


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
    command = [sys.executable, "-m", "tests.store.killed_rotator"]
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


def check_each_step(place: str) -> int:
    """Kill the rotation at each step; return the number of its steps."""
    until = time.time() + 3600
    asyncio.run(prepare(place))
    with rotator(place) as rotate_until:
        total = rotate_until(1_000_000, until)
        assert total is not None
        seen = []
        for step in range(total):
            asyncio.run(prepare(place))
            assert rotate_until(step, until) is None
            record = asyncio.run(record_in(place))
            digests = [key.digest for key in record.keys]
            assert digests in ([OLD.digest], [OLD.digest, NEW.digest])
            assert all(key.is_valid_at(time.time()) for key in record.keys)
            assert record.verified_only
            seen.append(len(digests))
    assert seen == sorted(seen), "once both keys are valid, they stay so"
    assert set(seen) == {1, 2}, "steps before the change and after it"
    return total


@pytest.mark.timeout(300)
def test_in_a_file(tmp_path: Path) -> None:
    """Every statement is a step, and every 25 instructions of SQLite."""
    assert check_each_step(str(tmp_path)) > 8


@pytest.mark.timeout(300)
def test_in_a_shared_store(store_server: StoreServer) -> None:
    """A step is before and after each command."""
    assert check_each_step(store_server.url) == 5
