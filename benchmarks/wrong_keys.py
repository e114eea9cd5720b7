"""A million different wrong keys: what they leave in memory, and how many look-ups in the store they cause.

`python -m benchmarks.wrong_keys` runs a gateway in this process, on connections without sockets (`benchmarks.steps`).
More clients are stored than fit into its memory, so that it cannot know of a wrong key that it is wrong; the filter of
keys is left out too, as if all of them passed it. All keys come from one address with the default limit, at the rate
that one core serves. `python -m benchmarks.api_keys` shows what a client with a key notices of a flood.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from api_gateway.clients.cache import ClientCache
from api_gateway.clients.records import Change
from api_gateway.clients.sqlite_store import SqliteClientStore
from benchmarks.api_keys import a_key
from benchmarks.claims import Verdict, print_verdicts, ratio_verdict
from benchmarks.load import Failed
from benchmarks.processes import resident_bytes
from benchmarks.steps import Clients, Upstream, head_of, step_gateway

RATE, CAPACITY = 100, 1000  # of the limit of an address, as by default
_STORED, _HELD = 400, 200  # clients
_PATIENCE = 10.0  # seconds for a response
_PARTS = 10  # after each of which memory is measured
_GROWTH = 1.05  # of memory from the first part to the last one
_ANSWERS = (b"HTTP/1.1 401 ", b"HTTP/1.1 429 ", b"HTTP/1.1 503 ")  # 503: the look-up took longer than a request waits


@dataclass
class Attack:
    """What an attack has left: memory in MB after each part, look-ups of keys, responses by status, and its time."""

    memory: list[float] = field(default_factory=list)
    look_ups: int = 0
    responses: dict[bytes, int] = field(default_factory=dict)
    seconds: float = 0.0


async def attack(count: int, folder: Path) -> Attack:
    """Send so many different wrong keys. Raises Failed."""
    found = Attack()
    store = SqliteClientStore(folder)
    await store.load(1)
    for number in range(_STORED):
        await store.write(f"client-{number}", Change(tier="FREE"))
    await store.close()
    look_up_keys = SqliteClientStore.look_up_keys

    async def counted(self: SqliteClientStore, digests: Sequence[str]) -> Any:
        found.look_ups += len(digests)
        return await look_up_keys(self, digests)

    limit = {"rate": RATE, "capacity": CAPACITY, "exempt": []}
    sections = {"store": {"max_cached_clients": _HELD}, "address_limit": limit}
    with (
        patch.object(SqliteClientStore, "look_up_keys", counted),
        patch.object(ClientCache, "surely_absent", lambda *_: False),
    ):
        async with step_gateway(sections, folder) as connect:
            one = Clients(connect, Upstream(), [b""])
            began = time.monotonic()
            for _ in range(_PARTS):
                for _ in range(count // _PARTS):
                    await _send(one, found)
                found.memory.append(resident_bytes(os.getpid()) / 1e6)
            found.seconds = time.monotonic() - began
    return found


async def _send(one: Clients, found: Attack) -> None:
    one.request(head_of("small", {"X-API-Key": a_key()}))
    end = time.monotonic() + _PATIENCE
    while not one.responses and time.monotonic() < end:  # noqa: ASYNC110 - for other tasks
        await asyncio.sleep(0)
    if len(one.responses) != 1 or not one.responses[0].startswith(_ANSWERS):
        raise Failed(f"responses to a wrong key: {[each[:40] for each in one.responses]}")
    status = one.responses.pop()[9:12]
    found.responses[status] = found.responses.get(status, 0) + 1


def verdicts(found: Attack) -> list[Verdict]:
    """Print what an attack has left, and return the verdicts on it."""
    statuses = ", ".join(f"{number} with {status.decode()}" for status, number in sorted(found.responses.items()))
    admitted = CAPACITY + RATE * found.seconds
    print(f"{sum(found.responses.values())} wrong keys in {found.seconds:.0f} s: {statuses}")  # noqa: T201 - a program
    print(f"memory, MB: {[round(each, 1) for each in found.memory]}")  # noqa: T201
    line = f"look-ups: {found.look_ups}; claimed at most {admitted:.0f}, as the address limit admits"
    is_met = 0 < found.look_ups <= admitted
    return [
        Verdict("look-ups", is_met, f"{line}: {'met' if is_met else 'NOT MET'}"),
        ratio_verdict("memory after the last part / after the first", found.memory[-1], found.memory[0], _GROWTH),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack, and print what it left."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wrong_keys", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="of different keys")
    chosen = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = asyncio.run(attack(chosen.count, Path(folder)))
    except Failed as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return print_verdicts(verdicts(found))


if __name__ == "__main__":
    sys.exit(main())
