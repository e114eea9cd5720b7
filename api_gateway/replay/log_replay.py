"""The steps of a replay: read and sort the parts of the logs, divide the clients, decide on each shard in order.

Both run in several processes if the logs are large. Memory grows with the clients of the log, not with its lines.
"""

import gc
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from api_gateway.config import GatewayConfig
from api_gateway.replay.external_sort import RunWriter, SortedRun, merged
from api_gateway.replay.log_files import BrokenFile, LogPart, blocks_of, log_parts
from api_gateway.replay.log_lines import (
    AT_NS,
    DECISION,
    KIND,
    NUMBER,
    PROCESS,
    SOURCE,
    TIER_SOURCE,
    ForeignLine,
    LogEvent,
    NotDecided,
    events_of,
)
from api_gateway.replay.saved_state import ReplaySnapshot
from api_gateway.replay.sharding import (
    UNREGISTERED,
    SharedBuckets,
    linked_address,
    linked_by_limits,
    shard_key,
    shards,
)
from api_gateway.replay.simulation import Simulation
from api_gateway.replay.tally import ReplayTally

SMALL = 32 * 1024 * 1024  # bytes of logs up to which another process does not pay
SHOWN_LINES = 5  # foreign lines of a part that are reported one by one
MAX_SHARE = 0.8  # of the events in one shard, above which shards do not pay
_PLACES = 1 << 40  # lines of one part


@dataclass(slots=True)
class LoggedClients:
    """The clients of a part of the logs, or of all: events by shard key, and pairs of keys that share a shard."""

    counts: Counter[str] = field(default_factory=Counter)
    links: set[tuple[str, str]] = field(default_factory=set)

    def take(self, other: "LoggedClients") -> None:
        """Add the clients of another part, and leave that without any: most parts have the same ones."""
        self.counts.update(other.counts)
        self.links |= other.links
        other.counts.clear()
        other.links.clear()


@dataclass(slots=True)
class PartSummary:
    """The results of reading a part."""

    part: LogPart
    lines: int = 0
    foreign: int = 0
    shown: list[tuple[int, str]] = field(default_factory=list)  # number of the line within the part, and why
    incomplete: int = 0
    not_decided: int = 0
    begin_ns: int = 1 << 80
    end_ns: int = -1
    sources: Counter[str] = field(default_factory=Counter)
    spans: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # by process: least, greatest, count
    numbers: dict[str, list[int]] = field(default_factory=dict)  # by process, of the events that are being counted
    clients: LoggedClients = field(default_factory=LoggedClients)
    runs: list[SortedRun] = field(default_factory=list)
    broken: str | None = None  # why the rest of the file could not be read


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The result of a replay. `processes` have decided at the same time, in `seconds` for everything.

    `state` is that of the current configuration at the end, or else of the candidate.
    """

    parts: Sequence[PartSummary]
    tally: ReplayTally
    unknown_tiers: frozenset[str]
    processes: int
    seconds: float
    state: ReplaySnapshot
    snapshot: ReplaySnapshot | None = None


def replay_logs(
    paths: Sequence[Path],
    candidate: GatewayConfig,
    current: GatewayConfig | None,
    *,
    jobs: int | None = None,
    folder: Path | None = None,
    snapshot: ReplaySnapshot | None = None,
) -> ReplayResult:
    """Replay access logs under a candidate and, if given, under the current configuration. Raises ReplayError.

    Begin with the state in `snapshot`, which is that of the current configuration, and after its time.

    `jobs` is the number of processes (None: one for each processor, if the logs are large). Events are sorted in a
    temporary folder below `folder`.
    """
    began = time.monotonic()
    parts = log_parts(paths)
    if jobs is None:
        jobs = (os.cpu_count() or 1) if sum(part.end - part.begin for part in parts) > SMALL else 1
    configs = [candidate] if current is None else [candidate, current]
    with tempfile.TemporaryDirectory(prefix="api-gateway-replay-", dir=folder) as name:
        limits = SharedBuckets(configs)
        if jobs == 1:
            summaries, clients = _gathered(
                read_part(part, index, Path(name), limits) for index, part in enumerate(parts)
            )
            works = _divided(candidate, current, summaries, clients, 1, snapshot)
            found = list(map(decide_shard, works))
        else:
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                reading = [pool.submit(read_part, part, index, Path(name), limits) for index, part in enumerate(parts)]
                summaries, clients = _gathered(task.result() for task in reading)
                works = _divided(candidate, current, summaries, clients, jobs, snapshot)
                found = [task.result() for task in [pool.submit(decide_shard, work) for work in works]]
    tally, unknown, state = found[0]
    for other, tiers, states in found[1:]:
        tally.merge(other)
        unknown |= tiers
        state.add(states, snapshot)
    return ReplayResult(summaries, tally, frozenset(unknown), len(found), time.monotonic() - began, state, snapshot)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pause the garbage collector: events are millions of tuples without cycles, and collecting takes most time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# Reading


def read_part(part: LogPart, index: int, folder: Path, limits: SharedBuckets) -> PartSummary:
    """Read a part of a log, and write its events as sorted runs."""
    summary = PartSummary(part)
    writer = RunWriter(folder, f"run-{index}")
    is_limited = lru_cache(maxsize=65_536)(limits.apply_to)
    with _without_collections():
        try:
            for lines, is_complete in blocks_of(part):
                _read_lines(
                    summary, writer, lines, index * _PLACES, is_limited, limits.of_limits, is_complete=is_complete
                )
        except BrokenFile as error:
            summary.broken = str(error)
        writer.flush()
    summary.runs = writer.runs
    return summary


def _read_lines(
    summary: PartSummary,
    writer: RunWriter,
    lines: Sequence[str],
    place: int,
    is_limited: Callable[[str], bool],
    of_limits: frozenset[tuple[bool, bool]],
    *,
    is_complete: bool,
) -> None:
    found: list[LogEvent] = []
    before = summary.lines
    for number, line in enumerate(lines, before + 1):
        try:
            found += events_of(line, place + number)
        except NotDecided as other:
            summary.not_decided += 1
            if other.numbered is not None:
                process, own = other.numbered
                _extend(summary, process, [own])
        except ForeignLine as error:
            if not is_complete and number == before + len(lines):
                summary.incomplete += 1
            elif line.strip():
                summary.foreign += 1
                if len(summary.shown) < SHOWN_LINES:
                    summary.shown.append((number, str(error)))
    summary.lines += len(lines)
    if found:
        _count(summary, found, is_limited)
        if of_limits:
            summary.clients.links.update(
                (shard_key(event), other) for event in found for other in linked_by_limits(event, of_limits)
            )
        writer.add(found)


def _count(summary: PartSummary, events: Sequence[LogEvent], is_limited: Callable[[str], bool]) -> None:
    counts, links, numbers = summary.clients.counts, summary.clients.links, summary.numbers
    for event in events:
        key = shard_key(event)
        counts[key] = counts.get(key, 0) + 1
        if event[TIER_SOURCE] in UNREGISTERED:
            other = linked_address(event, is_limited)
            if other is not None:
                links.add((key, other))
        process, number = event[PROCESS], event[NUMBER]
        if process in numbers:
            numbers[process].append(number)
        else:
            numbers[process] = [number]
    for process, given in numbers.items():
        _extend(summary, process, given)
    numbers.clear()
    times = [event[AT_NS] for event in events]
    summary.begin_ns, summary.end_ns = min(summary.begin_ns, *times), max(summary.end_ns, *times)
    summary.sources.update([event[SOURCE] for event in events if event[KIND] == DECISION])


def _extend(summary: PartSummary, process: str, given: Sequence[int]) -> None:
    """Note that decisions of a process have these numbers."""
    least, greatest, count = summary.spans.get(process, (given[0], given[0], 0))
    summary.spans[process] = min(least, *given), max(greatest, *given), count + len(given)


# Deciding


@dataclass(frozen=True, slots=True)
class ShardWork:
    """The work of one process: the events of a shard, or of all (`shard_of` None)."""

    candidate: GatewayConfig
    current: GatewayConfig | None
    runs: Sequence[SortedRun]
    begin_ns: int
    end_ns: int
    shard_of: Mapping[str, int] | None = None
    shard: int = 0
    snapshot: ReplaySnapshot | None = None


def decide_shard(work: ShardWork) -> tuple[ReplayTally, set[str], ReplaySnapshot]:
    """Decide on events in their order.

    Return the figures, tiers of the log that the candidate does not have, and the state at the end.
    """
    snapshot = work.snapshot
    from_ns = -1 if snapshot is None else snapshot.at_ns
    candidate = Simulation(work.candidate, snapshot, work.current)
    current = None if work.current is None else Simulation(work.current, snapshot)
    tally = ReplayTally(candidate, current, work.begin_ns, work.end_ns)
    add, shard_of, shard = tally.add, work.shard_of, work.shard
    with _without_collections():
        for events in merged(work.runs):
            for event in events:
                if shard_of is None or shard_of[shard_key(event)] == shard:
                    if event[AT_NS] > from_ns:
                        add(event)
                    else:
                        tally.before_snapshot += event[KIND] == DECISION
    state = (current or candidate).state(max(work.end_ns, from_ns))
    return tally.without_simulations(), candidate.unknown_tiers, state


def _gathered(parts: Iterable[PartSummary]) -> tuple[list[PartSummary], LoggedClients]:
    """Return the results of reading, and the clients of all parts together."""
    summaries, clients = [], LoggedClients()
    for summary in parts:
        clients.take(summary.clients)
        summaries.append(summary)
    return summaries, clients


def _divided(
    candidate: GatewayConfig,
    current: GatewayConfig | None,
    summaries: Sequence[PartSummary],
    clients: LoggedClients,
    jobs: int,
    snapshot: ReplaySnapshot | None,
) -> list[ShardWork]:
    """Return the work of each process: by shards, if the limits permit that they have about the same size."""
    runs = [run for summary in summaries for run in summary.runs]
    begin_ns, end_ns = span_of(summaries)
    shard_of: Mapping[str, int] | None = None
    if jobs > 1:
        shard_of, largest = shards(clients.counts, clients.links, jobs)
        if largest > MAX_SHARE * clients.counts.total():
            shard_of = None
    number = 1 if shard_of is None else jobs
    return [
        ShardWork(candidate, current, runs, begin_ns, end_ns, shard_of, shard, snapshot) for shard in range(number)
    ]


def span_of(summaries: Sequence[PartSummary]) -> tuple[int, int]:
    """Return the times of the first and of the last event, in nanoseconds since the epoch; zeros without any."""
    spans = [(summary.begin_ns, summary.end_ns) for summary in summaries if summary.spans]
    return (min(begin for begin, _ in spans), max(end for _, end in spans)) if spans else (0, 0)
