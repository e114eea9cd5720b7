"""One of three targets fails: the effect on clients, through the gateway and through other proxies.

`python -m benchmarks.chaos` sends GETs at a fixed rate, independent of responses, through one proxy at a time. In each
measurement one target fails in one manner for some seconds and then works again for as long. A request counts as
failed without a complete 200 response, and as slow after more than a second from its due time. Retries are the
requests at targets beyond one per request. `out` is the time until the failing target gets less than a tenth of its
share, `back` the time from its recovery until it gets four fifths of it, and `peak` the largest number of requests
that it gets in any second after its recovery, in shares. All times are of the machine's monotonic clock. The settings
are in `benchmarks.fallible`. Linux only.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.fallible import PROXIES, Place, Proxy
from benchmarks.processes import free_port, pinned, running
from benchmarks.steady import SLOW_CALL, Call, Load
from benchmarks.target import Target, targets

TARGETS = 3
WARM_UP = 2.0  # seconds before the failure
OUT, BACK = 0.1, 0.8  # shares of what a target gets without failures
BIN = 0.25  # seconds over which shares are measured
QUEUED = 0.25  # seconds in which a target that was stopped reads the requests sent meanwhile


# The failures


async def dead(target: Target, seconds: float) -> None:
    """Kill the target, and restart it at the end."""
    target.kill()
    await asyncio.sleep(seconds)
    await asyncio.get_running_loop().run_in_executor(None, target.start)


async def errors(target: Target, seconds: float) -> None:
    """Make half of the responses 503."""
    await _told("errors", target, seconds)


async def slow(target: Target, seconds: float) -> None:
    """Delay its responses by two seconds."""
    await _told("slow", target, seconds)


async def _told(word: str, target: Target, seconds: float) -> None:
    target.tell(word)
    await asyncio.sleep(seconds)
    target.tell("up")


async def flapping(target: Target, seconds: float) -> None:
    """Stop and start listening alternately, one second each."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for word in ("down", "up"):
            target.tell(word)
            await asyncio.sleep(min(1.0, seconds / 2))


async def hanging(target: Target, seconds: float) -> None:
    """SIGSTOP: the kernel accepts connections, and the target never responds."""
    target.signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    target.signal(signal.SIGCONT)


@dataclass(frozen=True)
class Failure:
    """A kind of failure. `shows` is the source of which requests reached the failing target.

    `notes`: its record of requests; `clients`: the clients that had to wait; `nowhere`: unknown.
    """

    title: str
    act: Callable[[Target, float], Awaitable[None]]
    shows: str


FAILURES = {
    "dead": Failure("It is killed: connections are refused", dead, "nowhere"),
    "errors": Failure("Half of its responses are 503", errors, "notes"),
    "slow": Failure("It responds two seconds late", slow, "notes"),
    "flapping": Failure("It goes down and up, a second each", flapping, "nowhere"),
    "hanging": Failure("It accepts and never responds (SIGSTOP)", hanging, "clients"),
}


# Results


@dataclass
class Run:
    """One measurement: requests, the record of each target (the failing one first), and the time of the failure."""

    calls: list[Call]
    notes: list[list[tuple[int, float]]]
    failed_at: float
    well_at: float
    ended_at: float
    rate: float
    lag: float = 0.0


@dataclass
class Figures:
    """Results of a measurement; None if unknown, or if it did not happen."""

    requests: int
    failed: int
    slow: int
    retries: int
    out: float | None
    back: float | None
    peak: float
    statuses: dict[int, int] = field(default_factory=dict)  # of failed requests


def figures(run: Run, shows: str) -> Figures:
    """Evaluate a measurement, without the requests of the warm-up."""
    calls = [call for call in run.calls if call.due >= run.failed_at]
    first = calls[0].number if calls else 0
    seen = Counter(number for notes in run.notes for number, _ in notes if number >= first)
    share = run.rate / len(run.notes)
    contacts = _contacts(run, shows)
    noted = sorted(at for _, at in run.notes[0] if at >= run.well_at)
    return Figures(
        requests=len(calls),
        failed=sum(call.is_failed() for call in calls),
        slow=sum(call.is_slow() for call in calls),
        retries=sum(count - 1 for count in seen.values()),
        out=None
        if contacts is None
        else _until(contacts, run.failed_at, run.well_at, lambda n: n < OUT * share * BIN),
        back=_until(noted, run.well_at, run.ended_at, lambda n: n >= BACK * share * BIN),
        peak=_peak([at for at in noted if at >= run.well_at + QUEUED], [call.sent for call in calls], share),
        statuses=dict(Counter(call.status for call in calls if call.is_failed())),
    )


def _contacts(run: Run, shows: str) -> list[float] | None:
    """Return the due times of the requests that reached the failing target, None if unknown."""
    if shows == "nowhere":
        return None
    if shows == "clients":
        return sorted(call.due for call in run.calls if call.is_failed() or call.lasted > SLOW_CALL * 0.9)
    return sorted(run.calls[number].due for number, _ in run.notes[0])


def _until(times: Sequence[float], start: float, end: float, is_so: Callable[[int], bool]) -> float | None:
    """Return the seconds from `start` to the first bin before `end` whose count fulfils the condition."""
    for number in range(int((end - start) / BIN)):
        low = start + number * BIN
        if is_so(sum(low <= at < low + BIN for at in times)):
            return number * BIN
    return None


def _peak(times: Sequence[float], sent: Sequence[float], share: float) -> float:
    """Return the largest number of requests that a target got within a second, in shares; all times are sorted.

    If the load was late and sent more requests than were due in that second, the shares are larger accordingly.
    """
    best = 0.0
    for last, at in enumerate(times):
        got = last + 1 - bisect_right(times, at - 1)
        offered = bisect_right(sent, at) - bisect_right(sent, at - 1)
        best = max(best, got / max(share, offered / TARGETS))
    return best


# Running


async def measure(port: int, made: Sequence[Target], failure: Failure, rate: float, seconds: float) -> Run:
    """Let the first target fail under load and recover."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    load = Load(port, rate)
    loading = asyncio.ensure_future(load.run(done))
    try:
        await asyncio.sleep(WARM_UP)
        failed_at = time.monotonic()
        await failure.act(made[0], seconds)
        well_at = time.monotonic()
        await asyncio.sleep(seconds)
        ended_at = time.monotonic()
    finally:
        done.set_result(None)
        await loading
    return Run(load.calls, [target.notes() for target in made], failed_at, well_at, ended_at, rate, load.lag)


def run_one(proxy: Proxy, failure: Failure, rate: float, seconds: float, cores: Sequence[int]) -> Figures:
    """Measure one proxy with one failure, with new targets and a new proxy. Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as name, targets(TARGETS, Path(name), cores[-1]) as made:
        place = Place(Path(name), free_port(), tuple(target.port for target in made))
        launch = proxy.launch(place)
        with running(launch.command, core=cores[0], port=place.port, folder=place.folder, env=launch.env):
            time.sleep(0.5)  # for proxies that check their targets first
            with pinned(cores[-1]):
                run = asyncio.run(measure(place.port, made, failure, rate, seconds))
    if not all(any(at < run.failed_at for _, at in notes) for notes in run.notes):
        raise RuntimeError("not every target got requests before the failure")
    if run.lag > 0.1:  # noqa: PLR2004 - seconds
        sys.stderr.write(f"{proxy.name}: the load generator was up to {run.lag * 1000:.0f} ms late\n")
    return figures(run, failure.shows)


def table(failure: Failure, found: Sequence[tuple[str, Figures]]) -> str:
    """Return the table of one failure."""
    lines = [
        f"{failure.title}:",
        "",
        "| | requests | failed | slow | retries | out, s | back, s | peak |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for title, one in found:
        out, back = ("-" if value is None else f"{value:g}" for value in (one.out, one.back))
        lines.append(
            f"| {title} | {one.requests:,} | {one.failed:,} | {one.slow:,} | {one.retries:,} | {out} | {back} |"
            f" {one.peak:.2f} |"
        )
    return "\n".join(lines) + "\n"


def summary(found: Sequence[tuple[str, Sequence[Figures]]]) -> str:
    """Return the table of the sums over all failures."""
    lines = [
        "All failures:",
        "",
        "| | requests | failed | slow | retries | highest peak |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for title, each in found:
        sums = [sum(getattr(one, name) for one in each) for name in ("requests", "failed", "slow", "retries")]
        lines.append(f"| {title} | {' | '.join(f'{one:,}' for one in sums)} | {max(one.peak for one in each):.2f} |")
    return "\n".join(lines) + "\n"


def _chosen(names: str | None, known: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    chosen = names.split(",") if names else list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the tables. Returns 1 if a proxy could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=10, help="length of failure and of recovery (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=300, help="requests per second (default: %(default)s)")
    parser.add_argument("--peers", help=f"some of {','.join(proxy.name for proxy in PROXIES)}")
    parser.add_argument("--failures", help=f"some of {','.join(FAILURES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(arguments)
    names = _chosen(options.peers, [proxy.name for proxy in PROXIES], parser)
    proxies = [proxy for proxy in PROXIES if proxy.name in names]
    for proxy in proxies:
        if not proxy.found():
            sys.stderr.write(f"{proxy.name} is skipped, it was not found: {proxy.hint}\n")
    proxies = [proxy for proxy in proxies if proxy.found()]
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, dict[str, Figures]] = {}
    has_all = True
    for name in _chosen(options.failures, list(FAILURES), parser):
        for proxy in proxies:
            try:
                one = run_one(proxy, FAILURES[name], options.rate, options.seconds, cores)
            except (RuntimeError, OSError) as problem:
                sys.stderr.write(f"{proxy.name}, {name}: FAILED: {problem}\n")
                has_all = False
                continue
            sys.stderr.write(f"{proxy.name}, {name}: {one}\n")
            found.setdefault(name, {})[proxy.name] = one
        rows = [(proxy.title, found[name][proxy.name]) for proxy in proxies if proxy.name in found.get(name, {})]
        sys.stdout.write(table(FAILURES[name], rows) + "\n")
        sys.stdout.flush()
    whole = [proxy for proxy in proxies if all(proxy.name in peers for peers in found.values())]
    if not whole:
        return 1
    by_proxy = [(proxy.title, [figures[proxy.name] for figures in found.values()]) for proxy in whole]
    sys.stdout.write(summary(by_proxy))
    if options.json:
        everything = {name: {peer: asdict(one) for peer, one in peers.items()} for name, peers in found.items()}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0 if has_all else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all processes are stopped then too
    raise SystemExit(main())
