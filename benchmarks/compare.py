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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from benchmarks import load, memory
from benchmarks.cases import NEW_PROCESS, TITLES, needs_of
from benchmarks.peers import PEERS, Peer, Place
from benchmarks.plot import plot
from benchmarks.processes import cpu_seconds, free_port, raise_file_limit, running
from benchmarks.report import Results, tables
from benchmarks.upstream import certificate, upstream

RATE = 500.0
TURNS = 4
QUICK = ("small", "varied", "10k", "new", "latency")


class _MeasureMemory(Protocol):
    def __call__(self, pid: int, port: int, *, core: int) -> dict[str, float]: ...


_MEMORY: Mapping[str, _MeasureMemory] = {
    "memory": memory.measure,
    "idle": memory.measure_idle,
    "active": memory.measure_active,
}


class Comparison:
    """One run: cores, upstream, length of measurements, and results."""

    def __init__(
        self, *, peer_core: int, load_core: int, origin: int, certificate: Path | None, seconds: float
    ) -> None:
        self._peer_core = peer_core
        self._load_core = load_core
        self._origin = origin
        self._certificate = certificate
        self._seconds = seconds
        self.results = Results()

    def round(self, peers: Sequence[Peer], cases: Sequence[str], number: int) -> None:
        """Measure every peer once, beginning with a different one in each round; memory in the first round only.

        Cases that need the same configuration are measured in one process.
        """
        shift = number % len(peers)
        for peer in (*peers[shift:], *peers[:shift]):
            wanted = [case for case in cases if peer.takes(case)]
            for case in NEW_PROCESS:
                if case in wanted and number == 0:
                    self._measure(peer, frozenset(), [case])
            groups: dict[frozenset[str], list[str]] = {}
            for case in wanted:
                if case not in NEW_PROCESS:
                    groups.setdefault(needs_of(case), []).append(case)
            for needs, group in groups.items():
                self._measure(peer, needs, group)

    def _measure(self, peer: Peer, needs: frozenset[str], cases: Sequence[str]) -> None:
        try:
            with self._started(peer, needs) as (pid, port):
                for case in cases:
                    self._case(peer, case, pid, port)
        except (load.Failed, RuntimeError, OSError) as problem:
            _say(f"{peer.name} did not start: {problem}")
            for case in cases:
                self.results.fail(case, peer.name, str(problem))

    def _case(self, peer: Peer, case: str, pid: int, port: int) -> None:
        try:
            load.verify(port, case)
            if case in NEW_PROCESS:
                found = _MEMORY[case](pid, port, core=self._load_core)
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
        load.drive(port, case, core=self._load_core, seconds=1)
        before = cpu_seconds(pid)
        driven = load.drive(port, case, core=self._load_core, seconds=self._seconds)
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
    def _started(self, peer: Peer, needs: frozenset[str]) -> Iterator[tuple[int, int]]:
        with tempfile.TemporaryDirectory() as folder:
            place = Place(Path(folder), free_port(), self._origin, needs, self._certificate)
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
    parser.add_argument("--only", help=f"some of {','.join(TITLES)}")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a plot of CPU per request")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(arguments)
    try:
        options.peers = _chosen(options.peers, [peer.name for peer in PEERS], "peer")
        options.only = _chosen(options.only, QUICK if options.quick and not options.only else list(TITLES), "case")
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
    raise_file_limit()
    with tempfile.TemporaryDirectory() as folder, upstream(Path(folder), cores[1]) as origin:
        run = Comparison(
            peer_core=cores[0],
            load_core=cores[1],
            origin=origin,
            certificate=certificate(Path(folder)),
            seconds=options.seconds,
        )
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
