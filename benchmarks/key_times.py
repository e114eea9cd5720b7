"""Whether the time of a refusal tells which keys exist: times of right and wrong keys, and what chance makes of them.

`python -m benchmarks.key_times` times keys that a gateway sees for the first time, in this process, in three places:
their verification alone, with all keys in memory; a request, from its head to its response, if more clients are stored
than fit into memory, so that the filter of keys excludes the wrong ones; and the same if the filter passes all keys,
so that the store is asked. There are no sockets (`benchmarks.steps`), whose delays would hide differences.

A wrong key that begins like an existing one, and a revoked one, must take as long as one that never existed: the
Kolmogorov-Smirnov distance of their times must not exceed that which chance makes. Chance is measured too: in each
round the times of both kinds are exchanged or not, at random, many times over. A right key and a typing error have
other responses anyhow, so a small difference tells nothing; only the verification of a right key is compared with that
of a wrong one, by the ratio of their medians.
"""

import argparse
import asyncio
import os
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, compress, pairwise
from operator import mul
from pathlib import Path
from statistics import median
from unittest.mock import patch

from api_gateway.clients.api_keys import RANDOM_BYTES, ApiKey, digest_of, new_key
from api_gateway.clients.cache import ClientCache
from api_gateway.clients.records import Change, KeyChange
from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.errors import GatewayError
from api_gateway.http1.headers import fields_of
from api_gateway.models import Quota
from api_gateway.proxy.api_key_source import ApiKeySource
from api_gateway.transport import http1_transport
from benchmarks.claims import Verdict, print_verdicts, ratio_verdict
from benchmarks.load import Failed, percentile
from benchmarks.steps import Clients, Upstream, head_of, step_gateway

RIGHT, ABSENT, ALIKE, REVOKED, MISTYPED = "right", "never existed", "begins like one", "revoked", "mistyped"
VERIFICATION, REQUEST, LOOK_UP = "verification", "request", "request with a look-up"
# What is timed where. Those that must not be told apart from keys that never existed are compared with them.
KINDS = {
    VERIFICATION: (RIGHT, ABSENT, ALIKE, REVOKED, MISTYPED),
    REQUEST: (RIGHT, ABSENT, ALIKE, MISTYPED),
    LOOK_UP: (ABSENT, ALIKE),
}
_COMPARED = (ALIKE, REVOKED)
STORED, HELD = 120, 80  # clients: half of them have a key, the others had one
_ALIKE_BYTES = 24  # of a key, which an attacker might know
_SHUFFLES = 500  # one verdict in so many fails by chance
_RATIO = 1.5  # of the medians of a right and a wrong key, the larger one to the other
_ADMITTED, _REFUSED = b"HTTP/1.1 200 ", b"HTTP/1.1 401 "
_LATE = b"HTTP/1.1 503 "  # the look-up took longer than a request waits
_TIMEOUT = 10.0  # seconds for a response

Times = Mapping[str, Sequence[float]]


class Keys:
    """Keys of all kinds: those of the clients of a store, those that were revoked, and wrong ones without end."""

    def __init__(self) -> None:
        self._random = [secrets.token_bytes(RANDOM_BYTES) for _ in range(STORED)]
        self.right, self.revoked = self._random[: STORED // 2], self._random[STORED // 2 :]

    def some(self, kind: str, count: int) -> list[bytes]:
        """Return keys of a kind, each an object of its own: none is faster because its bytes are in a cache."""
        return [self._next(kind) for _ in range(count)]

    def _next(self, kind: str) -> bytes:
        one = random.choice(self.revoked if kind == REVOKED else self.right)  # noqa: S311 - no secret
        if kind == ABSENT:
            one = secrets.token_bytes(RANDOM_BYTES)
        elif kind == ALIKE:
            one = one[:_ALIKE_BYTES] + secrets.token_bytes(RANDOM_BYTES - _ALIKE_BYTES)
        key = new_key(one)
        return (key[:-1] + ("0" if key[-1] != "0" else "1") if kind == MISTYPED else key).encode()

    async def store(self, folder: Path) -> None:
        """Write a client for each right key, and for each key that is revoked afterwards."""
        store = SqliteClientStore(folder)
        await store.load(1)
        for number, one in enumerate(self._random):
            added = ApiKey(digest_of(new_key(one).encode()))
            await store.write(f"client-{number}", Change(keys=KeyChange(add=added)))
            if number >= len(self.right):
                await store.write(f"client-{number}", Change(keys=KeyChange(remove=(added.digest,))))
        await store.close()


async def verifications(count: int, folder: Path) -> Times:
    """Return the times of verifying keys in microseconds, by kind. Raises Failed."""
    keys = Keys()
    await keys.store(folder)
    registry = ClientRegistry({"FREE": Quota.per_second("FREE", 1, 10)}, "FREE", {}, SqliteClientStore(folder))
    await registry.load()
    source = ApiKeySource(registry.keys, "X-API-Key")

    async def verify(kind: str, key: bytes) -> float:
        fields = fields_of([(b"x-api-key", key)])
        began = time.perf_counter_ns()
        claim = source.claim(fields)
        assert claim is not None  # noqa: S101 - it is a key
        result = source.verify(claim, 0)
        spent = time.perf_counter_ns() - began
        if isinstance(result, GatewayError) is (kind == RIGHT):
            raise Failed(f"{VERIFICATION}, {kind}: {result!r}")
        return spent / 1000

    found = await _in_turns(VERIFICATION, keys, count, verify)
    await registry.close()
    return found


async def requests(place: str, count: int, folder: Path) -> Times:
    """Return the times of requests in microseconds, by kind of their key. Raises Failed."""
    keys = Keys()
    await keys.store(folder)
    upstream = Upstream()
    with patch.object(http1_transport, "_connect", upstream.connect):
        async with step_gateway({"store": {"max_cached_clients": HELD}}, folder) as connect:
            one = Clients(connect, upstream, [head_of("small", {})])
            await one.warm_up()

            async def ask(kind: str, key: bytes) -> float:
                head = head_of("small", {"X-API-Key": key.decode()})
                began = time.perf_counter_ns()
                one.request(head)
                while not one.responses and time.perf_counter_ns() - began < _TIMEOUT * 1e9:
                    await asyncio.sleep(0)
                    upstream.respond()
                spent = time.perf_counter_ns() - began
                expected = _ADMITTED if kind == RIGHT else _REFUSED
                if len(one.responses) != 1 or not one.responses[0].startswith((expected, _LATE)):
                    raise Failed(f"{place}, {kind}: {[each[:40] for each in one.responses]}")
                one.responses.clear()
                return spent / 1000

            return await _in_turns(place, keys, count, ask)


async def _in_turns(place: str, keys: Keys, count: int, timed: Callable[[str, bytes], Awaitable[float]]) -> Times:
    """Return so many times of each kind. All kinds have their turn in each round, in random order.

    The keys are made before, since what happens before a key is timed would change its time.
    """
    made = {kind: keys.some(kind, count + 1) for kind in KINDS[place]}
    found: dict[str, list[float]] = {kind: [] for kind in made}
    for number in range(count + 1):
        for kind in random.sample(list(made), len(made)):
            spent = await timed(kind, made[kind][number])
            if number:  # the first round is not counted
                found[kind].append(spent)
    return found


def distances(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov distance of two samples of the same rounds, and the largest that chance makes.

    0 is for equal distributions, 1 for separate ones. If the kinds do not differ, the two times of a round might as
    well be exchanged; so the second figure is the largest of many distances after such exchanges.
    """
    count = len(one)
    points = sorted([*_points(one, 1), *_points(other, -1)])
    is_last = [*(point[0] != after[0] for point, after in pairwise(points)), True]
    steps, rounds = [step for _, _, step in points], [number for _, number, _ in points]

    def distance(signs: Sequence[int]) -> float:
        heights = accumulate(map(mul, steps, map(signs.__getitem__, rounds)))
        largest: int = max(map(abs, compress(heights, is_last)))
        return largest / count

    signs = (random.choices((1, -1), k=count) for _ in range(_SHUFFLES))  # noqa: S311 - no secret
    return distance([1] * count), max(map(distance, signs))


def _points(values: Iterable[float], step: int) -> Iterator[tuple[float, int, int]]:
    return ((value, number, step) for number, value in enumerate(values))


def verdicts(place: str, found: Times) -> list[Verdict]:
    """Print the times of a place, and return the verdicts on them."""
    absent = found[ABSENT]
    print(f"{place}, us: median, 99th percentile, distance from keys that never existed, and that of chance")  # noqa: T201 - a program
    result = []
    for kind, values in found.items():
        apart, chance = distances(values, absent)
        print(f"  {kind:18} {median(values):8.2f} {percentile(sorted(values), 0.99):8.2f} {apart:8.3f} {chance:8.3f}")  # noqa: T201
        if kind in _COMPARED:
            is_met = apart <= chance
            name = f"{place}: a key that {'was revoked' if kind == REVOKED else kind}"
            line = f"{name}: distance {apart:.3f}; claimed at most that of chance, {chance:.3f}"
            result.append(Verdict(name, is_met, f"{line}: {'met' if is_met else 'NOT MET'}"))
    if place == VERIFICATION:
        less, more = sorted([median(found[RIGHT]), median(absent)])
        result.append(ratio_verdict(f"{place}: the slower of a right and a wrong key", more, less, _RATIO))
    return result


async def measure(count: int) -> dict[str, Times]:
    """Return the times in microseconds by place and kind. Raises Failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {VERIFICATION: await verifications(count, folder / "verification")}
        found[REQUEST] = await requests(REQUEST, count, folder / "request")
        with patch.object(ClientCache, "surely_absent", lambda *_: False):
            found[LOOK_UP] = await requests(LOOK_UP, count, folder / "look-up")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables and verdicts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.key_times", description=__doc__)
    parser.add_argument("--count", type=int, default=5_000, help="of keys of each kind, in each place")
    chosen = parser.parse_args(arguments)
    try:
        found = asyncio.run(measure(chosen.count))
    except Failed as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    result = [one for place, times in found.items() for one in verdicts(place, times)]
    print(f"load {os.getloadavg()[0]:.1f}")  # noqa: T201
    return print_verdicts(result)


if __name__ == "__main__":
    sys.exit(main())
