"""A process that starts processes which rotate a key, and which kill themselves at a step: `python -m` runs it.

It imports little, as each process that it starts is a copy of it.
"""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from api_gateway.clients.api_keys import ApiKey, digest_of, new_key
from api_gateway.clients.records import Change, KeyChange, Replacement
from api_gateway.clients.redis_store import RedisClientStore
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.storage.redis_session import StoreSession

OLD, NEW = (ApiKey(digest_of(new_key(number.to_bytes(32)).encode()), created_at=float(number)) for number in (1, 2))


def opened(place: str) -> SqliteClientStore | RedisClientStore:
    """Return a store: in a folder, or at a URL."""
    if "://" in place:
        return RedisClientStore(StoreSession(place, timeout=5.0))
    return SqliteClientStore(Path(place))


async def rotate(place: str, last_step: int, until: float) -> None:
    """Rotate the key, and print the number of steps; SIGKILL ends the process after `last_step`.

    In a file every statement is a step, and every 25 instructions of SQLite. In a shared store it is the beginning and
    the end of each command.
    """
    count = 0

    def step(*_: object) -> None:
        nonlocal count
        count += 1
        if count > last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    def stepping(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def wrapped(*arguments: Any, **options: Any) -> Any:
            step()
            reply = await call(*arguments, **options)
            step()
            return reply

        return wrapped

    store = opened(place)
    await store.load(10)
    if isinstance(store, SqliteClientStore):
        store._file.connection.set_trace_callback(step)
        store._file.connection.set_progress_handler(step, 25)
    else:
        store._client.hget, store._client.eval = stepping(store._client.hget), stepping(store._client.eval)
    change = KeyChange(add=NEW, replaces=Replacement(OLD.digest, until))
    await store.write("acme", Change(keys=change))
    step()
    print(count, flush=True)


def main() -> None:
    """Start a process for each line of input: place, last step, expiry of the old key; print what became of it."""
    gc.freeze()
    for line in sys.stdin:
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


if __name__ == "__main__":
    main()
