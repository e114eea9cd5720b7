"""The gateway and other proxies, in one run on one machine: CPU per request, throughput, latency, memory.

`python -m benchmarks.compare` starts nginx as upstream on one core, then each peer in turn on another core, with the
load from the first core. CPU is the user and system time of all processes of the peer. Peers that are not installed
are reported and skipped. Requires Linux, two cores, nginx and wrk.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import load, memory
from benchmarks.peers import PEERS, Peer, Place
from benchmarks.plot import plot
from benchmarks.processes import cpu_seconds, free_port, running
from benchmarks.report import CASES, Results, tables
from benchmarks.upstream import upstream

CONNECTIONS = 64
UPLOAD_CONNECTIONS = 8  # with 64 uploads of 10 MB, too many would be incomplete at the end
RATE = 500.0
TURNS = 4
QUICK = ("small", "varied", "10k", "new", "latency")


class Comparison:
    """One run: cores, upstream, length of measurements, and results."""

    def __init__(self, *, peer_core: int, load_core: int, origin: int, seconds: float) -> None:
        self._peer_core = peer_core
        self._load_core = load_core
        self._origin = origin
        self._seconds = seconds
        self.results = Results()

    def round(self, peers: Sequence[Peer], cases: Sequence[str], number: int) -> None:
        """Measure every peer once, beginning with a different one in each round; memory in the first round only."""
        shift = number % len(peers)
        for peer in (*peers[shift:], *peers[:shift]):
            wanted = [case for case in cases if case in peer.cases]
            if "memory" in wanted and number == 0:
                self._measure(peer, ["memory"])  # in a new process, which has allocated nothing yet
            self._measure(peer, [case for case in wanted if case != "memory"])

    def _measure(self, peer: Peer, cases: Sequence[str]) -> None:
        if not cases:
            return
        try:
            with self._started(peer) as (pid, port):
                for case in cases:
                    self._case(peer, case, pid, port)
        except (load.Failed, RuntimeError, OSError) as problem:
            _say(f"{peer.name} did not start: {problem}")
            for case in cases:
                self.results.fail(case, peer.name, str(problem))

    def _case(self, peer: Peer, case: str, pid: int, port: int) -> None:
        try:
            load.verify(port, case)
            if case == "memory":
                found = memory.measure(pid, port, core=self._load_core)
            elif case == "latency":
                found = self._added(port)
            else:
                found = self._throughput(case, pid, port)
        except (load.Failed, OSError) as problem:
            _say(f"{peer.name}, {case}: FAILED: {problem}")
            self.results.fail(case, peer.name, str(problem))
        else:
            _say(f"{peer.name}, {case}: {', '.join(f'{name} {value:.6g}' for name, value in found.items())}")
            self.results.add(case, peer.name, found)

    def _throughput(self, case: str, pid: int, port: int) -> dict[str, float]:
        connections = UPLOAD_CONNECTIONS if case == "upload" else CONNECTIONS
        load.drive(port, case, core=self._load_core, seconds=1, connections=connections)
        before = cpu_seconds(pid)
        driven = load.drive(port, case, core=self._load_core, seconds=self._seconds, connections=connections)
        used = cpu_seconds(pid) - before
        return {"rate": driven.requests / driven.seconds, "cpu": used / driven.requests * 1e6}

    def _added(self, port: int) -> dict[str, float]:
        """Send requests alternately through the peer and to the upstream directly; return the difference."""
        through: list[float] = []
        direct: list[float] = []
        for _ in range(TURNS):
            through += self._latencies(port)
            direct += self._latencies(self._origin)
        return {
            f"p{share * 100:.0f}": (load.percentile(sorted(through), share) - load.percentile(sorted(direct), share))
            * 1e6
            for share in (0.5, 0.99)
        }

    def _latencies(self, port: int) -> list[float]:
        return load.latencies(port, core=self._load_core, rate=RATE, seconds=self._seconds / TURNS)

    @contextmanager
    def _started(self, peer: Peer) -> Iterator[tuple[int, int]]:
        with tempfile.TemporaryDirectory() as folder:
            place = Place(Path(folder), free_port(), self._origin)
            launch = peer.launch(place)
            with running(
                launch.command, core=self._peer_core, port=place.port, folder=place.folder, env=launch.env
            ) as pid:
                load.await_ready(place.port)
                yield pid, place.port


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _chosen(names: str | None, known: Sequence[str], what: str) -> list[str]:
    """Split a list of the command line; None selects all. Raises ValueError."""
    chosen = names.split(",") if names else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"no such {what}: {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in chosen]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each peer (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="length of a measurement (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"one round of one second with {','.join(QUICK)}")
    parser.add_argument("--peers", help=f"some of {','.join(peer.name for peer in PEERS)}")
    parser.add_argument("--only", help=f"some of {','.join(CASES)}")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a plot of CPU per request")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(arguments)
    try:
        options.peers = _chosen(options.peers, [peer.name for peer in PEERS], "peer")
        options.only = _chosen(options.only, QUICK if options.quick else list(CASES), "case")
    except ValueError as problem:
        parser.error(str(problem))
    if options.quick:
        options.rounds, options.seconds = 1, 1
    return options


def _installed(names: Sequence[str]) -> list[Peer]:
    """Return the installed peers, and print how to install the others."""
    peers = [peer for peer in PEERS if peer.name in names]
    for peer in peers:
        if not peer.found():
            _say(f"{peer.name} is skipped, it was not found: {peer.hint}")
    return [peer for peer in peers if peer.found()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all peers in turn and print the tables. Return 1 if a measurement failed, 2 if none is possible."""
    options = _options(arguments)
    cores = sorted(os.sched_getaffinity(0))
    missing = [name for name in ("nginx", "wrk") if shutil.which(name) is None]
    if missing or len(cores) < 2:  # noqa: PLR2004 - one for the peer, one for its load
        _say(f"not found: {', '.join(missing)} (Debian packages)" if missing else "two cores are needed")
        return 2
    peers = _installed(options.peers)
    with tempfile.TemporaryDirectory() as folder, upstream(Path(folder), cores[1]) as origin:
        run = Comparison(peer_core=cores[0], load_core=cores[1], origin=origin, seconds=options.seconds)
        for number in range(options.rounds if peers else 0):
            _say(f"round {number + 1} of {options.rounds}")
            run.round(peers, options.only, number)
    sys.stdout.write(tables(run.results, peers))
    if options.json:
        options.json.write_text(json.dumps(run.results.as_json(), indent=1) + "\n")
    if options.svg:
        options.svg.write_text(plot(run.results, peers))
    return 1 if run.results.failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then too
    raise SystemExit(main())
