"""The feed of the dashboard: the state of all workers, gathered once for all pages, and only while a page is open.

A frame is rendered when a page waits for one, at most every `FRAME_SECONDS`. A page gets the whole state first, and
then what has changed: of hundreds of upstreams, those whose row differs.
"""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from api_gateway.admin.breaker_overrides import BreakerOverrides
from api_gateway.eventloop.steps import each, run_in_steps
from api_gateway.metrics import Recorder
from api_gateway.reporting.overview import overview, upstream_row
from api_gateway.reporting.problems import Alert, find_problems, status_of
from api_gateway.reporting.snapshot import Status, UpstreamSnapshot
from api_gateway.reporting.traffic_history import POINT_SECONDS, Point
from api_gateway.reporting.worker_channel import Aggregator
from api_gateway.system.clocks import Clocks, Moment

FRAME_SECONDS = 2.0  # between two frames
_ROWS_IN_EVENT = 50  # upstreams in one event


@dataclass(frozen=True, slots=True)
class Frame:
    """The state at one moment, as text of JSON. `rows` has each upstream with the number of its last change."""

    number: int
    at: float  # monotonic seconds
    status: Status
    overview: str
    problems: str
    rows: dict[str, tuple[int, str]]
    points: list[Point] = field(repr=False)


class Feed:
    """Renders frames. Two states: idle, and rendering (`_rendering` is set), in which callers share the next frame."""

    def __init__(self, aggregator: Aggregator, clocks: Clocks, overrides: BreakerOverrides) -> None:
        self._aggregator = aggregator
        self._clocks = clocks
        self._overrides = overrides
        self._frame: Frame | None = None
        self._points: list[Point] = []
        self._rendering: asyncio.Task[Frame] | None = None
        self.watchers = 0  # pages

    def __repr__(self) -> str:
        return f"<Feed [{self.watchers} watchers]>"

    async def frame(self) -> Frame:
        """Return a frame that is at most `FRAME_SECONDS` old."""
        frame = self._frame
        if frame is not None and self._clocks.monotonic() - frame.at < FRAME_SECONDS:
            return frame
        if self._rendering is None:
            self._rendering = asyncio.create_task(self._render(), name="dashboard")
            self._rendering.add_done_callback(self._on_rendered)
        return await asyncio.shield(self._rendering)

    def _on_rendered(self, task: "asyncio.Task[Frame]") -> None:
        self._rendering = None
        if not task.cancelled():
            task.exception()  # noted as retrieved: each caller that still waits gets it

    async def _render(self) -> Frame:
        before, wall = self._frame, self._clocks.wall()
        is_due = not self._points or not before or wall - self._points[-1]["at"] >= POINT_SECONDS
        snapshot = await self._aggregator.gather(with_points=is_due)
        now = self._clocks.now()
        if snapshot.points:
            self._points = snapshot.points
        number = 1 if before is None else before.number + 1
        known = {} if before is None else before.rows
        figures = await run_in_steps(overview(snapshot, now))
        rows = await run_in_steps(each(snapshot.upstreams.items(), partial(self._row, snapshot.recorder, now)))
        problems = find_problems(snapshot, self._points, self._overrides.error)
        status = figures["status"] = status_of(problems)
        changed = {
            name: known[name] if name in known and known[name][1] == row else (number, row)
            for name, row in rows.items()
        }
        self._frame = Frame(
            number,
            now.monotonic,
            status,
            _text(figures),
            _text([_shown(one) for one in problems]),
            changed,
            self._points,
        )
        return self._frame

    def _row(self, recorder: Recorder, now: Moment, name: str, upstream: UpstreamSnapshot) -> str:
        """Return an upstream as text of JSON, with the mode that an operator has set."""
        found = self._overrides.override(name)
        override = found and {
            "since": found.since,
            "until": found.until,
            "comment": found.comment,
            "set_by": found.set_by,
        }
        return _text({**upstream_row(recorder, name, upstream, now), "override": override})


@dataclass(slots=True)
class Watcher:
    """One page that watches, and what it has been sent."""

    _number: int = 0
    _names: set[str] = field(default_factory=set)
    _problems: str = ""
    _last_point: float = 0.0

    def events(self, frame: Frame) -> Iterator[bytes]:
        """Yield server-sent events with what has changed since the last frame that this page was sent."""
        if frame.number == self._number:
            return
        yield event("overview", frame.overview)
        if frame.problems != self._problems:
            self._problems = frame.problems
            yield event("problems", frame.problems)
        fresh = [point for point in frame.points if point["at"] > self._last_point]
        if fresh:
            self._last_point = fresh[-1]["at"]
            yield event("points", _text(fresh))
        gone = self._names - frame.rows.keys()
        if gone:
            yield event("gone", _text(sorted(gone)))
        rows = [row for number, row in frame.rows.values() if number > self._number]
        for first in range(0, len(rows), _ROWS_IN_EVENT):
            yield event("upstreams", f"[{','.join(rows[first : first + _ROWS_IN_EVENT])}]")
        self._names = set(frame.rows)
        self._number = frame.number
        yield event("frame", _text(frame.number))


def event(name: str, data: str) -> bytes:
    """Return a server-sent event; `data` is JSON, which has no line breaks."""
    return f"event: {name}\ndata: {data}\n\n".encode()


def _shown(problem: Alert) -> dict[str, str]:
    return {"severity": problem.severity, "text": problem.text, "link": problem.link}


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
