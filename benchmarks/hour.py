"""What a gateway with 10,000 clients remembers after an hour: memory by structure, on a virtual clock.

`python -m benchmarks.hour` builds the whole application and sends an hour of requests through its decisions and its
records; time passes by a clock of the benchmark's, and the run takes less than a minute. There are no sockets and no
upstream: `benchmarks.memory` and `benchmarks.many_clients` measure connections. At the end each client sends a request
in the same second, so that all have live buckets. Half of the clients are registered, in a store on disk. Prints the
entries and the bytes of each structure that grows, found by walking its objects, and the resident memory of the
process, whose code is not in the table.
"""

import argparse
import asyncio
import gc
import os
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from api_gateway.config import GatewayConfig
from api_gateway.main import GatewayApp, create_app
from api_gateway.models import Exchange
from api_gateway.proxy.admission import Wait
from api_gateway.reporting.traffic_history import POINT_SECONDS
from api_gateway.system.clocks import Clocks
from benchmarks.load import Failed
from benchmarks.processes import resident_bytes

HOUR, EPOCH = 3600, 1.8e9  # seconds
_TOOK = (0.004, 0.007, 0.015, 0.120)  # seconds of requests, in turn
_EACH_ERROR, _EACH_EAGER = 50, 10  # one request of so many fails; one is of a client that is refused most of them
_OUTSIDE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.CodeType)

Structures = dict[str, tuple[Callable[[], int], list[Any]]]


class VirtualClock:
    """The time of the benchmark: seconds since its beginning."""

    def __init__(self) -> None:
        self.now = 100.0

    def __repr__(self) -> str:
        return f"<VirtualClock [{self.now} s]>"

    def clocks(self) -> Clocks:
        """Return the clocks of a gateway that lives in this time."""
        return Clocks(lambda: self.now, lambda: int(self.now * 1e9), lambda: EPOCH + self.now)


def configuration(folder: Path) -> GatewayConfig:
    """Return the configuration of a gateway with ten routes."""
    names = [f"service-{number}" for number in range(10)]
    sections = {
        "state_dir": folder,
        "log": {"access": False},
        "address_limit": {"rate": 0},
        "tiers": {"FREE": {"rate": 0.5, "capacity": 3}},
        "upstreams": {name: {"targets": [{"url": "http://127.0.0.1:1"}]} for name in names},
        "routes": [{"name": name, "path": f"/api/{name}", "upstream": name} for name in names],
    }
    return GatewayConfig.model_validate(sections)


def name_of(number: int) -> str:
    """Return the id of a client."""
    return f"client-{number:05}"


class Traffic:
    """Requests as the request path makes and records them, without the upstream's part."""

    def __init__(self, app: GatewayApp, clock: VirtualClock) -> None:
        fast_path: Any = app.fast_path
        self._path = fast_path.current
        self._recorder = app.state.gateway.recorder
        self._clock = clock
        self.sent = self.refused = 0

    def __repr__(self) -> str:
        return f"<Traffic [{self.sent} requests, {self.refused} refused]>"

    def send(self, client: int) -> None:
        """Send one request of a client."""
        path, number = self._path, self.sent
        self.sent += 1
        lines = f"\r\nHost: gateway.test\r\nUser-Agent: benchmark\r\nX-Client-ID: {name_of(client)}\r\n".encode()
        headers = path.headers.read_lines("192.0.2.1", "http", lines, 100)
        target = f"/api/service-{number % 10}/{number}"
        plan = path.admission.plan(headers.facts, "GET", target, target.encode(), path.clock_ns())
        plan.headers, exchange = headers, plan.exchange
        path.record.begin(exchange)
        result = path.admission.decide(plan)
        if isinstance(result, Wait):
            raise Failed(f"{name_of(client)} has to be looked up")
        if result is None:
            self._respond(exchange, number)
        else:
            self.refused += 1
            path.refusal(plan, result, keep_alive=True)
        path.record.end(exchange, exchange.started + _TOOK[number % len(_TOOK)])

    def _respond(self, exchange: Exchange, number: int) -> None:
        took = _TOOK[number % len(_TOOK)]
        exchange.attempts, exchange.target, exchange.source = 1, "http://127.0.0.1:1", "upstream"
        exchange.upstream = exchange.route
        exchange.sent_at, exchange.head_at = exchange.started, exchange.started + took
        exchange.status, exchange.bytes_out = 200 if number % _EACH_ERROR else 502, 300
        self._recorder.observe_attempt(exchange.upstream, f"{exchange.status // 100}xx", took, self._clock.now)


def structures(app: GatewayApp) -> Structures:
    """Return what grows with clients, requests or time: the number of its entries, and the objects that hold them."""
    gateway, points = app.state.gateway, app.state.traffic_history
    fast_path: Any = app.fast_path
    headers = fast_path.current.headers
    recorder, history = gateway.recorder, gateway.history
    clients: Any = gateway.clients
    return {
        "buckets of limits": (lambda: len(gateway.limiter), [gateway.limiter]),
        "registered clients": (lambda: len(clients._cache), [clients]),  # noqa: SLF001 - a measurement
        "cached header fields": (lambda: _cached(headers), [headers]),
        "records of requests": (lambda: sum(count for count, _ in history.sizes().values()), [history]),
        "points of traffic": (lambda: len(points.points), [points]),
        "metrics": (lambda: len(recorder.requests) + len(recorder.requests_by_client), [recorder]),
    }


def _cached(headers: object) -> int:
    """Return the number of entries of all caches of an object."""
    return sum(one.cache_info().currsize for one in vars(headers).values() if hasattr(one, "cache_info"))


def measured(found: Structures, app: GatewayApp) -> dict[str, tuple[int, int]]:
    """Return entries and bytes of each structure. What several have is counted for the first of them."""
    gateway = app.state.gateway
    seen = {id(one) for one in (app, gateway, gateway.config, gateway.clocks, gateway.quotas)}
    return {name: (count(), _bytes_of(roots, seen)) for name, (count, roots) in found.items()}


def _bytes_of(roots: list[Any], seen: set[int]) -> int:
    """Return the bytes of objects and of all that they refer to, without what was seen before."""
    size, waiting = 0, list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _OUTSIDE):
            continue
        seen.add(id(one))
        size += sys.getsizeof(one)
        waiting += gc.get_referents(one)
    return size


async def run(folder: Path, clients: int, rate: int) -> None:
    """Send an hour of requests, and print what is kept."""
    clock = VirtualClock()
    app = create_app(configuration(folder), clocks=clock.clocks())
    async with app.router.lifespan_context(app):
        traffic, found, history = Traffic(app, clock), structures(app), app.state.traffic_history
        gc.collect()
        resident, before = resident_bytes(os.getpid()), measured(found, app)
        registry = app.state.gateway.clients
        await asyncio.gather(*[registry.set_tier(name_of(number), "PREMIUM") for number in range(0, clients, 2)])
        begin, sampled = clock.now, clock.now
        for number in range(HOUR * rate):
            clock.now = begin + number / rate
            traffic.send(number * 7919 % clients if number % _EACH_EAGER else 1)
            if clock.now >= sampled + POINT_SECONDS:
                sampled = clock.now
                history.sample([app.state.gateway.recorder], clock.now, EPOCH + clock.now)
        for number in range(clients):
            clock.now += 1 / clients
            traffic.send(number)
        gc.collect()
        grown, after = resident_bytes(os.getpid()) - resident, measured(found, app)
    _print(traffic, before, after, resident, grown)


def _print(
    traffic: Traffic, before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], resident: int, grown: int
) -> None:
    print(f"{traffic.sent} requests, {traffic.refused} refused")  # noqa: T201 - a program
    print(f"{'':24}{'entries':>10}{'KiB':>10}{'grown by':>10}{'each':>8}")  # noqa: T201
    for name, (count, size) in after.items():
        growth = size - before[name][1]
        print(f"{name:24}{count:10}{size / 1024:10.0f}{growth / 1024:10.0f}{growth / max(1, count):8.0f}")  # noqa: T201
    total = sum(size - before[name][1] for name, (_, size) in after.items())
    print(f"{'all of these':24}{'':10}{'':10}{total / 1024:10.0f}")  # noqa: T201
    print(f"{'resident':24}{'':10}{(resident + grown) / 1024:10.0f}{grown / 1024:10.0f}")  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hour", description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rate", type=int, default=20, help="requests a second of the hour")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder), chosen.clients, chosen.rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
