"""Latencies in logarithmic buckets, in total and by slices of time, and percentiles computed from them.

DDSketch (Masson et al. 2019): with gamma = 1.01/0.99, the value of a bucket is within 1 % of every latency in it, so
percentiles are, too.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from api_gateway.models import Exchange

RELATIVE_ERROR = 0.01
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GAMMA = math.log(_GAMMA)
_log, _ceil = math.log, math.ceil
_FLOOR = 1e-6  # seconds; lower values count as this
_LIMITED = ("rate_limited", "concurrency_exceeded")  # reasons
SLICE = 5.0  # seconds by which the sliding windows move
WINDOWS = {"last_60s": 60.0, "last_5m": 300.0}
_SLICES = int(max(WINDOWS.values()) / SLICE)


def bucket_of(seconds: float) -> int:
    """Return the index of the logarithmic bucket that holds `seconds`."""
    return math.ceil(math.log(max(_FLOOR, seconds)) / _LOG_GAMMA)


def value_of(bucket: int) -> float:
    """Return the value, in seconds, that is within 1 % of all values of the bucket."""
    return 2 * math.exp(bucket * _LOG_GAMMA) / (_GAMMA + 1)


def percentile(buckets: Mapping[int, int], percent: float) -> float | None:
    """Return the `percent`-th percentile in seconds (nearest rank); None without values."""
    rank = math.ceil(sum(buckets.values()) * percent / 100)
    for bucket in sorted(buckets):
        rank -= buckets[bucket]
        if rank <= 0:
            return value_of(bucket)
    return None


_FLOOR_BUCKET = bucket_of(_FLOOR)


@lru_cache(maxsize=4)
def _bounds(number: int) -> tuple[float, float]:
    """Return the bounds of a slice: the same objects for all series, so that they stay in the processor's caches."""
    return number * SLICE, (number + 1) * SLICE


class Tally:
    """Counts of one span of time: responses by kind, bytes of bodies, and durations in logarithmic buckets."""

    __slots__ = (
        "buckets",
        "bytes_in",
        "bytes_out",
        "gateway_errors",
        "limited",
        "requests",
        "total_seconds",
        "upstream_errors",
    )

    def __init__(self) -> None:
        self.requests = self.gateway_errors = self.upstream_errors = self.limited = 0
        self.bytes_in = self.bytes_out = 0
        self.total_seconds = 0.0
        self.buckets: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<Tally [{self.requests} requests]>"

    def add(self, other: "Tally") -> None:
        """Add the counts of another span."""
        self.requests += other.requests
        self.gateway_errors += other.gateway_errors
        self.upstream_errors += other.upstream_errors
        self.limited += other.limited
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.total_seconds += other.total_seconds
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count

    def state(self) -> list[Any]:
        """Return the counts as JSON values."""
        counts = [self.requests, self.gateway_errors, self.upstream_errors, self.limited]
        return [*counts, self.bytes_in, self.bytes_out, self.total_seconds, list(self.buckets.items())]

    @classmethod
    def from_state(cls, state: list[Any]) -> "Tally":
        """Return the tally with this state."""
        tally = cls()
        tally.requests, tally.gateway_errors, tally.upstream_errors, tally.limited, *rest = state
        tally.bytes_in, tally.bytes_out, tally.total_seconds, pairs = rest
        tally.buckets = dict(pairs)
        return tally

    def count(self, exchange: Exchange) -> None:
        """Count the response of one exchange."""
        self.requests += 1
        self.bytes_in += exchange.bytes_in
        self.bytes_out += exchange.bytes_out
        if exchange.status >= 500:  # noqa: PLR2004 - the class of server errors
            if exchange.source == "upstream":
                self.upstream_errors += 1
            else:
                self.gateway_errors += 1
        elif exchange.reason is not None and exchange.reason in _LIMITED:
            self.limited += 1

    def time(self, seconds: float) -> None:
        """Count one duration."""
        bucket = _ceil(_log(seconds) / _LOG_GAMMA) if seconds > _FLOOR else _FLOOR_BUCKET  # `bucket_of`, inlined
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.total_seconds += seconds


class WindowedSeries:
    """Tallies of the last slices of `SLICE` seconds, which cover the longest window, and of all time before.

    Slices are numbered by monotonic time divided by `SLICE`. A slice that leaves the last `_SLICES` is added to the
    tally of the past when its place is reused.
    """

    __slots__ = (
        "_from",
        "_newest",
        "_numbers",
        "_past",
        "_running",
        "_slices",
        "_until",
    )

    def __init__(self) -> None:
        self._past = Tally()  # of older slices
        self._slices: dict[int, Tally] = {}  # by number modulo _SLICES; a dict, because most series of many have none
        self._numbers: dict[int, int] = {}  # of the slices, by the same key
        self._newest = -1  # number of the newest slice
        self._running = self._past
        self._from = self._until = 0.0  # monotonic seconds between which the current slice is `_running`

    def __repr__(self) -> str:
        return f"<WindowedSeries [{len(self._numbers)} slices, newest {self._newest}]>"

    def at(self, now: float) -> Tally:
        """Return the tally of the slice that contains `now`, to be counted in."""
        if self._from <= now < self._until:
            return self._running
        number = int(now / SLICE)
        slot = number % _SLICES
        if self._numbers.get(slot) != number:
            if slot in self._slices:
                self._past.add(self._slices[slot])
            self._numbers[slot], self._slices[slot] = number, Tally()
            self._newest = max(self._newest, number)
        self._running = self._slices[slot]
        self._from, self._until = _bounds(number)
        return self._running

    @property
    def is_used(self) -> bool:
        """Return whether anything was counted."""
        return self._newest >= 0

    def has_changed(self, since: int) -> bool:
        """Return whether anything was counted in slices from number `since` on."""
        return self._newest >= since

    def state(self, since: int = 0) -> dict[str, Any]:
        """Return the counts as JSON values, with the slices from number `since` on."""
        return {
            "past": self._past.state(),
            "slices": [
                (number, self._slices[slot].state()) for slot, number in self._numbers.items() if number >= since
            ],
        }

    def update(self, state: Mapping[str, Any]) -> None:
        """Apply a `state` of another series; slices that are not in it stay unchanged."""
        self._past = Tally.from_state(state["past"])
        for number, tally in state["slices"]:
            self._put(number, Tally.from_state(tally))

    def absorb(self, other: "WindowedSeries") -> None:
        """Add the counts of another series, whose times must be on the same clock."""
        self._past.add(other._past)  # noqa: SLF001 - of the same class
        for slot, number in other._numbers.items():  # noqa: SLF001 - as above
            tally = other._slices[slot]  # noqa: SLF001 - as above
            mine = self._numbers.get(slot, -1)
            if number < mine:  # older than every window
                self._past.add(tally)
                continue
            merged = Tally()
            merged.add(tally)
            if number == mine:
                merged.add(self._slices[slot])
            elif mine >= 0:
                self._past.add(self._slices[slot])
            self._put(number, merged)

    def _put(self, number: int, tally: Tally) -> None:
        self._numbers[number % _SLICES], self._slices[number % _SLICES] = number, tally
        self._newest = max(self._newest, number)
        self._from = self._until = 0.0  # `_running` may have been replaced

    @property
    def total(self) -> Tally:
        """The tally since the start."""
        merged = Tally()
        for tally in (self._past, *self._slices.values()):
            merged.add(tally)
        return merged

    def sum_of(self, figure: Callable[[Tally], int]) -> int:
        """Return the sum of a figure since the start; unlike `total`, this merges no buckets."""
        return sum(map(figure, (self._past, *self._slices.values())))

    def last(self, span: float, now: float) -> Tally:
        """Return the tally of the last `span` seconds: the current slice and the full ones before it."""
        newest = int(now / SLICE)
        merged = Tally()
        for slot, number in self._numbers.items():
            if newest - span / SLICE < number <= newest:
                merged.add(self._slices[slot])
        return merged
