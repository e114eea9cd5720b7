"""What an API key costs, and a flood of wrong keys beside a client with a key.

`python -m benchmarks.api_keys` measures the steps of a request within one process: see `benchmarks.steps`.
`--processes` runs gateways on one core; upstream (nginx) and load use the other. They run at the same time and are
driven in turns, so that ratios hold on a machine that is not idle. `--before` is a checkout of another commit, whose
gateway is measured too; it receives the same header fields. Two processes of the same code differ by up to two
microseconds a request.

The flood is sent at a fixed rate, a million wrong keys a minute times `--scale`, by an address with the default limit.
At the same time a client with a key sends 100 requests per second at fixed times, as it does without the flood, and
while another client sends as many requests with a valid key, so that only the wrong keys make a difference.

What is measured is the gateway's part: from the moment at which the client has sent a request to the one at which the
kernel has received the response. The client's own delay is printed beside it, and is not part of it. The flood has the
lowest priority on the core that it shares with the client and the upstream, so that neither waits for it.
"""

import argparse
import gc
import hashlib
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from api_gateway.clients.api_keys import new_key
from benchmarks.cases import CLIENT, Case
from benchmarks.claims import (
    STEP_ROUNDS,
    Claim,
    Verdict,
    print_table,
    print_verdicts,
    ratio_verdict,
    verdict,
)
from benchmarks.load import Client, Failed, OpenLoop, alternating_costs, await_ready, percentile
from benchmarks.processes import cpu_seconds, free_port, pinned, resident_bytes, running
from benchmarks.steps import alternating_steps, head_of
from benchmarks.upstream import upstream

ROOT = Path(__file__).parent.parent
GATEWAY_CORE, LOAD_CORE = 0, 1
MILLION_A_MINUTE = 1e6 / 60  # per second
RATE = 100.0  # requests per second of the client with a key
WRONG = 4_000  # different wrong keys
SITUATIONS = ("quiet", "right keys", "wrong keys")
ROUNDS, _COST_ROUNDS = 3, 5
_GROWTH = 1.05  # of memory from the first flood to the last one
_LEAD, _OVERLAP = 0.5, 2.0  # seconds by which the flood begins earlier, and those that it lasts longer in all
_LOWEST_PRIORITY = 19
_SO_TIMESTAMPNS = getattr(socket, "SO_TIMESTAMPNS", 35)  # socket(7), Linux; Python 3.11 has no name for it
_TIMESPEC = struct.Struct("@qq")
_REFUSALS = (401, 429)
BARE_CLIENT = "bare"  # without keys, registered as the other one is
CLAIMS = (
    Claim("a key, compared with a bare id in the same process", "key: keys", "bare id: keys", 2.0),
    Claim("a key, compared with a bare id", "key: keys", "bare id: no keys", 2.0),
    Claim("a key, compared with a bare id before", "key: keys", "bare id: before", 2.0),
)


def a_key() -> str:
    """Return a new key."""
    return new_key(secrets.token_bytes(32))


def configuration(folder: Path, port: int, origin: int, key: str | None) -> dict[str, Any]:
    """Return the configuration of a gateway; `key` is that of the client, None for a gateway without keys."""
    return {
        "server": {"port": port},
        "state_dir": str(folder / "state"),
        "log": {"access": False},
        "address_limit": {"exempt": []},
        "tiers": {"FREE": {"rate": 1_000_000, "capacity": 1_000_000}},
        "clients": clients(key),
        "upstreams": {"up": {"targets": [{"url": f"http://127.0.0.1:{origin}"}]}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
    }


def clients(key: str | None) -> dict[str, Any]:
    """Return the clients of a gateway; `key` is that of one of them, None if none has a key."""
    client: dict[str, Any] = {"tier": "FREE"}
    if key is not None:
        digest = hashlib.sha256(key.encode()).hexdigest()
        client |= {"keys": {"one": {"digest": digest}}, "verified_only": False}
    return {CLIENT: client, BARE_CLIENT: {"tier": "FREE"}}


@contextmanager
def gateway(
    checkout: Path,
    folder: Path,
    origin: int,
    key: str | None,
    more: Mapping[str, Any] | None = None,
    ready: Case | None = None,
) -> Iterator[tuple[int, int]]:
    """Run the gateway of a checkout, with `more` sections; yield its process id and port once `ready` is served."""
    folder.mkdir()
    port, path = free_port(), folder / "gateway.json"
    path.write_text(json.dumps(configuration(folder, port, origin, key) | dict(more or {})))  # JSON is YAML
    command = [sys.executable, str(checkout / "run_gateway.py"), "--config", str(path)]
    with running(command, core=GATEWAY_CORE, port=port, folder=folder, env={"PYTHONPATH": str(checkout)}) as pid:
        await_ready(port, case=ready)
        yield pid, port


def steps(rounds: int) -> dict[str, list[float]]:
    """Return the CPU time of a request in microseconds within one process, by what was measured. Raises Failed."""
    key = a_key()
    heads = {name: [head_of("small", case.headers)] for name, case in cases(key).items()}
    gateways = {"no keys": {"clients": clients(None)}, "keys": {"clients": clients(key)}}
    runs = [("no keys", "bare id"), ("keys", "bare id"), ("keys", "key")]
    with tempfile.TemporaryDirectory() as folder:
        return alternating_steps(gateways, heads, runs, Path(folder), rounds)


def cases(key: str) -> dict[str, Case]:
    """Return what is requested."""
    bare = Case("bare id", headers={"X-Client-ID": BARE_CLIENT})
    return {"bare id": bare, "key": Case("key", headers={"X-API-Key": key})}


def costs(seconds: float, rounds: int, before: Path | None) -> dict[str, list[float]]:
    """Return the CPU time of a request in microseconds, by what was measured, in each round. Raises Failed."""
    key = a_key()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "origin").mkdir()
        origin = stack.enter_context(upstream(folder / "origin", LOAD_CORE))
        gateways = {
            "no keys": stack.enter_context(gateway(ROOT, folder / "without", origin, None)),
            "keys": stack.enter_context(gateway(ROOT, folder / "with", origin, key)),
        }
        if before is not None:
            gateways["before"] = stack.enter_context(gateway(before, folder / "before", origin, None))
        runs = [*((name, "bare id") for name in gateways), ("keys", "key")]
        return alternating_costs(gateways, cases(key), runs, core=LOAD_CORE, seconds=seconds, rounds=rounds)


# The flood


class Keyed(Client):
    """A connection that sends keys in turn, and accepts these statuses."""

    def __init__(self, port: int, keys: Iterator[str], statuses: tuple[int, ...]) -> None:
        self._keys, self._statuses = keys, statuses
        self.request = self._next()
        super().__init__(port)

    def _next(self) -> bytes:
        return f"GET /api/small HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {next(self._keys)}\r\n\r\n".encode()

    def check(self, answer: Any) -> None:
        """See `Client`."""
        if answer.status not in self._statuses:
            raise Failed(f"status {answer.status}")
        self.request = self._next()


@dataclass
class Served:
    """Times of the client with a key in seconds: of the gateway's part of each request, and of the client's delay."""

    gateway: list[float] = field(default_factory=list)
    client: list[float] = field(default_factory=list)


class Stamped(Keyed):
    """A connection of the client with a key, which measures from a request sent to a response received by the kernel.

    So a delay of this process is not taken for one of the gateway's.
    """

    def __init__(self, port: int, key: str, served: Served) -> None:
        super().__init__(port, cycle([key]), (200,))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._served = served
        self._sent_ns = 0

    def send(self, due: float) -> None:
        """See `Client`."""
        self._served.client.append(time.perf_counter() - due)
        self._sent_ns = time.time_ns()  # the kernel's timestamps are of this clock
        super().send(due)

    def read(self) -> bytes:
        """See `Client`. A small response arrives in one piece."""
        received, ancillary, _, _ = self._socket.recvmsg(65_536, socket.CMSG_SPACE(_TIMESPEC.size))
        for _, kind, stamp in ancillary:
            if kind == _SO_TIMESTAMPNS:
                seconds, nanoseconds = _TIMESPEC.unpack(stamp)
                self._served.gateway.append((seconds * 10**9 + nanoseconds - self._sent_ns) / 1e9)
        return received


def send_flood(port: int, rate: float, seconds: float, key: str) -> None:
    """Send a key, or wrong keys if it is empty, at a fixed rate."""
    os.nice(_LOWEST_PRIORITY)
    keys = cycle([key] if key else [a_key() for _ in range(WRONG)])
    with closing(OpenLoop(lambda: Keyed(port, keys, (200,) if key else _REFUSALS))) as loop:
        loop.warm_up()
        gc.freeze()
        print("ready", flush=True)  # noqa: T201 - for the process that measures
        loop.run(rate, seconds)


@contextmanager
def flooded(port: int, rate: float, seconds: float, key: str) -> Iterator[None]:
    """Send a flood from another process within this block; it has begun and lasts for `seconds` at least.

    Raises Failed.
    """
    lasting = str(seconds + _OVERLAP)
    command = [sys.executable, "-m", "benchmarks.api_keys", "--send", str(port), str(rate), lasting, key]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as sender:  # noqa: S603 - fixed arguments
        assert sender.stdout is not None  # noqa: S101 - a pipe
        try:
            sender.stdout.readline()
            time.sleep(_LEAD)
            yield
            is_over = sender.poll() is not None
        except BaseException:
            sender.kill()
            raise
    if sender.returncode or is_over:
        raise Failed("the flood could not be sent at its rate; use a lower --scale")


@dataclass
class Flood:
    """Results of a situation: times of the client with a key, CPU seconds per second, and memory in MB."""

    served: Served = field(default_factory=Served)
    busy: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


def flood(seconds: float, scale: float) -> dict[str, Flood]:
    """Return what a client with a key experiences without and with floods. Raises Failed."""
    key, rate = a_key(), MILLION_A_MINUTE * scale
    found = {name: Flood() for name in SITUATIONS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "origin").mkdir()
        origin = stack.enter_context(upstream(folder / "origin", LOAD_CORE))
        pid, port = stack.enter_context(gateway(ROOT, folder / "one", origin, key))
        stack.enter_context(pinned(LOAD_CORE))
        gc.freeze()
        for _ in range(ROUNDS):
            for name in SITUATIONS:
                with ExitStack() as round_:
                    if name != "quiet":
                        sent = key if name == "right keys" else ""
                        round_.enter_context(flooded(port, rate, seconds, sent))
                    _measure(found[name], pid, port, key, seconds)
    return found


def _measure(result: Flood, pid: int, port: int, key: str, seconds: float) -> None:
    served = Served()
    with closing(OpenLoop(lambda: Stamped(port, key, served))) as loop:
        loop.warm_up()
        served.client.clear()
        served.gateway.clear()
        began = cpu_seconds(pid), time.perf_counter()
        loop.run(RATE, seconds)
        result.busy.append((cpu_seconds(pid) - began[0]) / (time.perf_counter() - began[1]))
    if len(served.gateway) != len(served.client):
        raise Failed("the kernel has no timestamps of received data")
    result.served.gateway += served.gateway
    result.served.client += served.client
    result.memory.append(resident_bytes(pid) / 1e6)


def _verdicts_of_costs(found: Mapping[str, Sequence[float]]) -> list[Verdict]:
    print_table(found)
    return [verdict(claim, found) for claim in CLAIMS if claim.against in found]


def verdicts_of_flood(result: Mapping[str, Flood], rate: float) -> list[Verdict]:
    """Print what a client with a key experienced under a flood of this rate, and return the verdicts on it."""
    print(f"A flood of {rate:.0f} wrong keys per second; a client with a key, ms, and the gateway's CPU")  # noqa: T201
    print(f"{'':12} {'median':>7} {'p99':>7} {'max':>7} {'client late, p99':>17} {'CPU s/s':>8}  memory, MB")  # noqa: T201
    for name, found in result.items():
        served, late = sorted(found.served.gateway), sorted(found.served.client)
        times = " ".join([f"{percentile(served, share) * 1000:7.2f}" for share in (0.5, 0.99, 1.0)])
        memory = [round(value, 1) for value in found.memory]
        print(f"{name:12} {times} {percentile(late, 0.99) * 1000:17.2f} {median(found.busy):8.2f}  {memory}")  # noqa: T201
    quiet, right, wrong = (percentile(sorted(result[name].served.gateway), 0.99) * 1000 for name in SITUATIONS)
    return [
        ratio_verdict("p99 under wrong keys / its usual", wrong, quiet, 2.0),
        ratio_verdict("p99 under wrong keys / under right keys", wrong, right, 2.0),
        _verdict_on_memory(result["wrong keys"].memory),
    ]


def _verdict_on_memory(memory: Sequence[float]) -> Verdict:
    """Return whether memory stops growing: the first flood fills what is bounded, the last ones add nothing."""
    return ratio_verdict("memory after the last flood / after the first", memory[-1], memory[0], _GROWTH)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.api_keys", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--rounds", type=int, help=f"{_COST_ROUNDS} of processes, {STEP_ROUNDS} within one process")
    parser.add_argument("--scale", type=float, default=0.1, help="of a million wrong keys a minute")
    parser.add_argument("--before", type=Path, help="a checkout of another commit; processes are measured")
    parser.add_argument("--processes", action="store_true", help="measure whole processes")
    parser.add_argument("--parts", default="costs,flood")
    parser.add_argument("--send", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    verdicts: list[Verdict] = []
    try:
        if chosen.send:
            port, rate, seconds, key = chosen.send
            send_flood(int(port), float(rate), float(seconds), key)
            return 0
        if "costs" in chosen.parts:
            in_one = not chosen.processes and chosen.before is None
            rounds = chosen.rounds or (STEP_ROUNDS if in_one else _COST_ROUNDS)
            found = steps(rounds) if in_one else costs(chosen.seconds, rounds, chosen.before)
            verdicts += _verdicts_of_costs(found)
        if "flood" in chosen.parts:
            verdicts += verdicts_of_flood(flood(chosen.seconds * 3, chosen.scale), MILLION_A_MINUTE * chosen.scale)
    except Failed as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    print(f"load {os.getloadavg()[0]:.1f}")  # noqa: T201
    return print_verdicts(verdicts)


if __name__ == "__main__":
    sys.exit(main())
