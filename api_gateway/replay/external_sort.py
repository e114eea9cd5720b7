"""Sorts events on disk, because lines are in the order of completion, and memory is used for clients.

Runs are sorted in memory and written to files; `merged` reads all of them in order. A run is opened when its first
event is due, so that runs of one log, which hardly overlap, are read one after the other.
"""

import heapq
import pickle
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from api_gateway.replay.log_lines import LogEvent

RUN_EVENTS = 100_000
BLOCK_EVENTS = 1024


class SortedRun(NamedTuple):
    """A file of sorted events, and the first of them."""

    first: LogEvent
    path: Path


class RunWriter:
    """Collects events, and writes them as sorted runs into a folder. `prefix` begins the names of the files."""

    def __init__(self, folder: Path, prefix: str, size: int = RUN_EVENTS) -> None:
        self._folder = folder
        self._prefix = prefix
        self._size = size
        self._events: list[LogEvent] = []
        self.runs: list[SortedRun] = []

    def __repr__(self) -> str:
        return f"<RunWriter [{len(self.runs)} runs, {len(self._events)} events]>"

    def add(self, events: Sequence[LogEvent]) -> None:
        """Add events in any order."""
        self._events += events
        if len(self._events) >= self._size:
            self.flush()

    def flush(self) -> None:
        """Write what has been added since the last run."""
        if not self._events:
            return
        self._events.sort()
        path = self._folder / f"{self._prefix}-{len(self.runs)}"
        with path.open("wb") as file:
            for begin in range(0, len(self._events), BLOCK_EVENTS):
                pickle.dump(self._events[begin : begin + BLOCK_EVENTS], file, pickle.HIGHEST_PROTOCOL)
        self.runs.append(SortedRun(self._events[0], path))
        self._events = []


def merged(runs: Sequence[SortedRun]) -> Iterator[list[LogEvent]]:
    """Yield the events of all runs in order, in lists of one or more."""
    readers = [_blocks(run.path) for run in runs]
    blocks: list[list[LogEvent]] = [[run.first] for run in runs]
    positions = [-1] * len(runs)  # -1: not opened
    heads = [(run.first, index) for index, run in enumerate(runs)]
    heapq.heapify(heads)
    while heads:
        _, index = heads[0]
        if positions[index] < 0:
            blocks[index], positions[index] = next(readers[index]), 0
        block, begin = blocks[index], positions[index]
        end = bisect_right(block, min(heads[1:3])[0], begin) if len(heads) > 1 else len(block)
        yield block[begin:end]
        if end == len(block):
            following = next(readers[index], None)
            if following is None:
                blocks[index] = []
                heapq.heappop(heads)
                continue
            blocks[index], end = following, 0
        positions[index] = end
        heapq.heapreplace(heads, (blocks[index][end], index))


def _blocks(path: Path) -> Iterator[list[LogEvent]]:
    with path.open("rb") as file, suppress(EOFError):
        while True:
            yield pickle.load(file)  # noqa: S301 - written by this command
