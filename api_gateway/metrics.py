"""What is counted: recorders fed once per exchange, percentiles with a bound, and the JSON snapshot.

Plain integers on one event loop, no locks. Label values come from the configuration or from closed lists, so nothing
here grows with clients or paths. Latency goes into logarithmic buckets (DDSketch, Masson et al. 2019): with
gamma = 1.01/0.99 every bucket's middle is within 1 % of every value in it, hence so is any percentile read from it.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from api_gateway.breaker_policy import Mode, State
from api_gateway.errors import Reason
from api_gateway.metrics_bodies import (
    BreakerCounts,
    LatencySeries,
    LatencyView,
    LatencyWindow,
    LimiterView,
    MetricsView,
    OutputView,
    OverloadView,
    RateSeries,
    RateWindow,
    RequestCounts,
)
from api_gateway.models import Exchange, LimiterState
from api_gateway.pacing import Steps, completed, each
from api_gateway.sketch import HeavyHitters
from api_gateway.upstream_bodies import ConcurrencyView, StoreView

Label = TypeVar("Label")

# Those of a recorder's counters that are kept by one label.
_COUNTERS = (
    "rejections",
    "allowed",
    "limited",
    "sources",
    "would_limit",
    "would_allow",
    "settlements",
    "operator_rejections",
    "dropped_lines",
    "write_errors",
)

# And those kept by several.
_TABLES = ("requests", "retries", "retries_denied", "fallbacks")

RELATIVE_ERROR = 0.01
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GAMMA = math.log(_GAMMA)
_log, _ceil = math.log, math.ceil
_FLOOR = 1e-6  # seconds; all below counts as this

SLICE = 5.0  # seconds by which the sliding windows move
WINDOWS = {"last_60s": 60.0, "last_5m": 300.0}
_SLICES = int(max(WINDOWS.values()) / SLICE)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "_other"
NO_ROUTE = "_none"
NO_TIER = "_none"
GATEWAY = "_gateway"  # in place of an upstream, for what the gateway sheds before it knows one
# What became of a cost after the decision: more was charged, some or all given back, or what an upstream told of it
# could not be read.
SETTLEMENTS = ("charged", "refunded", "unreadable")

# What a try on an upstream can end in: the class of its status, or why it has none.
OUTCOMES = (
    "1xx",
    "2xx",
    "3xx",
    "4xx",
    "5xx",
    Reason.UPSTREAM_CONNECT_ERROR.value,
    Reason.UPSTREAM_RESET.value,
    Reason.UPSTREAM_PROTOCOL_ERROR.value,
    Reason.UPSTREAM_TIMEOUT.value,
    Reason.OVERLOADED.value,
    Reason.BAD_REQUEST.value,
)

# What a try that failed can be repeated for, beside statuses.
RETRY_CAUSES = (
    Reason.UPSTREAM_CONNECT_ERROR.value,
    Reason.UPSTREAM_RESET.value,
    Reason.UPSTREAM_PROTOCOL_ERROR.value,
    Reason.UPSTREAM_TIMEOUT.value,
)

SWITCHED = 101  # a tunnel lasts as long as its two ends like, which is no latency


def bucket_of(seconds: float) -> int:
    """Return the index of the logarithmic bucket that holds `seconds`."""
    return math.ceil(math.log(max(_FLOOR, seconds)) / _LOG_GAMMA)


def value_of(bucket: int) -> float:
    """Return the value, in seconds, that is within 1 % of all values of the bucket."""
    return 2 * math.exp(bucket * _LOG_GAMMA) / (_GAMMA + 1)


def percentile(buckets: Mapping[int, int], percent: float) -> float | None:
    """Return the `percent`-th percentile in seconds (nearest rank), or None of nothing."""
    rank = math.ceil(sum(buckets.values()) * percent / 100)
    for bucket in sorted(buckets):
        rank -= buckets[bucket]
        if rank <= 0:
            return value_of(bucket)
    return None


_FLOOR_BUCKET = bucket_of(_FLOOR)


class BreakerFigures(Protocol):
    """What is shown of a circuit breaker."""

    @property
    def state(self) -> State: ...  # noqa: D102
    @property
    def mode(self) -> Mode: ...  # noqa: D102
    @property
    def opened_total(self) -> int: ...  # noqa: D102
    @property
    def rejected_total(self) -> int: ...  # noqa: D102
    @property
    def slow_total(self) -> int: ...  # noqa: D102
    @property
    def would_open_total(self) -> int: ...  # noqa: D102
    @property
    def would_reject_total(self) -> int: ...  # noqa: D102


class EjectionFigures(Protocol):
    """What is shown of a target's own breaker."""

    @property
    def is_ejected(self) -> bool: ...  # noqa: D102
    @property
    def ejections_total(self) -> int: ...  # noqa: D102


class TargetFigures(Protocol):
    """What is shown of a target."""

    @property
    def key(self) -> str: ...  # noqa: D102
    @property
    def verdict(self) -> bool | None: ...  # noqa: D102
    @property
    def passive(self) -> EjectionFigures | None: ...  # noqa: D102


class ConcurrencyFigures(Protocol):
    """What is shown of what is under way."""

    @property
    def limit(self) -> float | None: ...  # noqa: D102
    @property
    def in_flight(self) -> int: ...  # noqa: D102


class UpstreamFigures(Protocol):
    """What is shown of an upstream: what one worker reports of it, or several together."""

    @property
    def breaker(self) -> BreakerFigures: ...  # noqa: D102
    @property
    def targets(self) -> Collection[TargetFigures]: ...  # noqa: D102
    @property
    def concurrency(self) -> ConcurrencyFigures: ...  # noqa: D102


class Tally:
    """Counts of one span of time: answers by kind, and durations in logarithmic buckets."""

    __slots__ = ("buckets", "gateway_errors", "limited", "requests", "total_seconds", "upstream_errors")

    def __init__(self) -> None:
        self.requests = self.gateway_errors = self.upstream_errors = self.limited = 0
        self.total_seconds = 0.0
        self.buckets: dict[int, int] = {}

    def add(self, other: "Tally") -> None:
        """Take in the counts of another span."""
        self.requests += other.requests
        self.gateway_errors += other.gateway_errors
        self.upstream_errors += other.upstream_errors
        self.limited += other.limited
        self.total_seconds += other.total_seconds
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count

    def state(self) -> list[Any]:
        """Return the counts as JSON can hold them."""
        counts = [self.requests, self.gateway_errors, self.upstream_errors, self.limited, self.total_seconds]
        return [*counts, list(self.buckets.items())]

    @classmethod
    def from_state(cls, state: list[Any]) -> "Tally":
        """Build the tally whose `state` this is."""
        tally = cls()
        tally.requests, tally.gateway_errors, tally.upstream_errors, tally.limited, tally.total_seconds, pairs = state
        tally.buckets = dict(pairs)
        return tally

    def count(self, exchange: Exchange) -> None:
        """Count one answer."""
        self.requests += 1
        if exchange.status >= 500:  # noqa: PLR2004 - the class of server errors
            if exchange.source == "upstream":
                self.upstream_errors += 1
            else:
                self.gateway_errors += 1
        elif exchange.reason == "rate_limited":
            self.limited += 1

    def time(self, seconds: float) -> None:
        """Count one duration."""
        bucket = _ceil(_log(seconds) / _LOG_GAMMA) if seconds > _FLOOR else _FLOOR_BUCKET  # `bucket_of`, written out
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.total_seconds += seconds


class WindowedSeries:
    """Tallies since the start and for each of the last slices of 5 s."""

    def __init__(self) -> None:
        self._past = Tally()  # of the slices that are gone
        self._slices: dict[int, Tally] = {}  # by number modulo _SLICES; most series of a large gateway have none
        self._numbers: dict[int, int] = {}  # of the slices, likewise
        self._newest = -1  # number of the newest slice
        self._running = self._past
        self._from = self._until = 0.0  # seconds on the clock which the running slice spans

    def at(self, now: float) -> Tally:
        """Return the tally of the running slice."""
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
        self._from, self._until = number * SLICE, (number + 1) * SLICE
        return self._running

    @property
    def is_used(self) -> bool:
        """Tell whether anything was ever counted."""
        return self._newest >= 0

    def has_changed(self, since: int) -> bool:
        """Tell whether anything was counted in the slices numbered `since` and above."""
        return self._newest >= since

    def state(self, since: int = 0) -> dict[str, Any]:
        """Return the counts as JSON can hold them; of the slices those numbered `since` and above."""
        return {
            "past": self._past.state(),
            "slices": [
                (number, self._slices[slot].state()) for slot, number in self._numbers.items() if number >= since
            ],
        }

    def update(self, state: Mapping[str, Any]) -> None:
        """Become what `state` says. Slices it does not hold are as they were when it held them last."""
        self._past = Tally.from_state(state["past"])
        for number, tally in state["slices"]:
            self._put(number, Tally.from_state(tally))

    def absorb(self, other: "WindowedSeries") -> None:
        """Take in the counts of another series whose times are on the same clock."""
        self._past.add(other._past)  # noqa: SLF001 - of the same class
        for slot, number in other._numbers.items():  # noqa: SLF001 - as above
            tally = other._slices[slot]  # noqa: SLF001 - as above
            mine = self._numbers.get(slot, -1)
            if number < mine:  # it is out of every window already
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
        self._from = self._until = 0.0  # the running slice may be another one now

    @property
    def total(self) -> Tally:
        """The tally since the start."""
        merged = Tally()
        for tally in (self._past, *self._slices.values()):
            merged.add(tally)
        return merged

    def last(self, span: float, now: float) -> Tally:
        """Return the tally of the last `span` seconds: the running slice and the full ones before it."""
        newest = int(now / SLICE)
        merged = Tally()
        for slot, number in self._numbers.items():
            if newest - span / SLICE < number <= newest:
                merged.add(self._slices[slot])
        return merged


class Recorder:
    """Everything counted in one process, or what those of several come to.

    The slices are numbered by the monotonic clock, which the processes of a machine have in common.
    """

    def __init__(
        self,
        routes: Iterable[str],
        upstreams: Iterable[str],
        tiers: Iterable[str],
        percentiles: Sequence[float],
        now: float,
        rejections: Counter[str] | None = None,
        dropped_lines: Counter[str] | None = None,
        write_errors: Counter[str] | None = None,
    ) -> None:
        """Know all label values from the start, so that every series exists at zero before its first event.

        `rejections` by reason may already be counted elsewhere: by the server, for what never becomes an exchange.
        Likewise `dropped_lines` and `write_errors`, by stream (`stdout`, `stderr`): by the process's output.
        """
        tiers = tuple(tiers)
        self.started = now
        self.in_flight = 0
        self.routes = {name: WindowedSeries() for name in (*routes, NO_ROUTE)}
        self.upstreams = {name: WindowedSeries() for name in upstreams}
        self.requests: Counter[tuple[str, str, int, str, str]] = Counter()  # route, method, status, source, tier
        self.outcomes: dict[str, Counter[str]] = {name: Counter() for name in self.upstreams}
        self.retries: Counter[tuple[str, str]] = Counter()  # upstream, cause
        self.retries_denied: Counter[tuple[str, str]] = Counter()  # upstream, why
        self.fallbacks: Counter[tuple[str, str, str]] = Counter()  # route, who answered, the reason of the failure
        self.rejections: Counter[str] = Counter() if rejections is None else rejections
        self.allowed: Counter[str] = Counter(dict.fromkeys(tiers, 0))
        self.limited: Counter[str] = Counter(dict.fromkeys(tiers, 0))
        self.sources: Counter[str] = Counter()  # decisions by what they rest on
        self.would_limit: Counter[str] = Counter(dict.fromkeys(tiers, 0))  # allowed, but not by the candidate
        self.would_allow: Counter[str] = Counter(dict.fromkeys(tiers, 0))  # refused, but not by the candidate
        self.settlements: Counter[str] = Counter(dict.fromkeys(SETTLEMENTS, 0))
        places = (*self.upstreams, GATEWAY)
        self.operator_rejections: Counter[str] = Counter()  # rejected requests to operator endpoints, by reason
        self.shed: dict[str, Counter[str]] = {name: Counter(dict.fromkeys(tiers, 0)) for name in places}
        self.dropped_lines: Counter[str] = Counter() if dropped_lines is None else dropped_lines
        self.write_errors: Counter[str] = Counter() if write_errors is None else write_errors
        self.requests_by_client = HeavyHitters()  # by the client's key
        self.limited_by_client = HeavyHitters()
        self.percentiles = tuple(percentiles)

    def extend(
        self, routes: Iterable[str], upstreams: Iterable[str], tiers: Iterable[str], percentiles: Sequence[float]
    ) -> None:
        """Know more label values. Those known before stay, with what was counted under them."""
        self.percentiles = tuple(percentiles)
        for name in routes:
            self.routes.setdefault(name, WindowedSeries())
        for name in upstreams:
            self.upstreams.setdefault(name, WindowedSeries())
            self.outcomes.setdefault(name, Counter())
            self.shed.setdefault(name, Counter())
        for tier in tiers:
            for counts in (self.allowed, self.limited, self.would_limit, self.would_allow, *self.shed.values()):
                counts.setdefault(tier, 0)

    def __repr__(self) -> str:
        return f"<Recorder [{self.requests.total()} requests, {self.in_flight} in flight]>"

    def state(self, since: int = 0) -> dict[str, Any]:
        """Return everything as JSON can hold it; see `describing`."""
        return completed(self.describing(since))

    def describing(self, since: int) -> Steps[dict[str, Any]]:
        """Return everything as JSON can hold it; of series and slices those that changed in slice `since` or later."""
        routes = yield from each(_changed(self.routes, since), lambda _, series: series.state(since))
        upstreams = yield from each(_changed(self.upstreams, since), lambda _, series: series.state(since))
        return {
            "started": self.started,
            "in_flight": self.in_flight,
            "routes": routes,
            "upstreams": upstreams,
            **{name: [(*key, count) for key, count in getattr(self, name).items()] for name in _TABLES},
            "outcomes": {name: dict(counts) for name, counts in self.outcomes.items()},
            "shed": {name: dict(counts) for name, counts in self.shed.items()},
            **{name: dict(getattr(self, name)) for name in _COUNTERS},
            "requests_by_client": self.requests_by_client.state(),
            "limited_by_client": self.limited_by_client.state(),
        }

    def update(self, state: Mapping[str, Any]) -> None:
        """Become what another recorder's `state` says, given every state of it since its first."""
        completed(self.updating(state))

    def updating(self, state: Mapping[str, Any]) -> Steps[None]:
        """Do the same in steps."""
        self.started, self.in_flight = state["started"], state["in_flight"]
        for mine, theirs in ((self.routes, state["routes"]), (self.upstreams, state["upstreams"])):
            for name, series in theirs.items():
                mine.setdefault(name, WindowedSeries()).update(series)
                yield
        for name in _TABLES:
            setattr(self, name, Counter({tuple(key): count for *key, count in state[name]}))
            yield
        self.outcomes = {name: Counter(counts) for name, counts in state["outcomes"].items()}
        yield
        self.shed = {name: Counter(counts) for name, counts in state["shed"].items()}
        for name in _COUNTERS:
            setattr(self, name, Counter(state[name]))
        self.requests_by_client = HeavyHitters.from_state(state["requests_by_client"])
        yield
        self.limited_by_client = HeavyHitters.from_state(state["limited_by_client"])

    def absorb(self, other: "Recorder") -> None:
        """Take in what another recorder has counted."""
        self.started = min(self.started, other.started)
        self.in_flight += other.in_flight
        for mine, theirs in ((self.routes, other.routes), (self.upstreams, other.upstreams)):
            for name, series in theirs.items():
                mine.setdefault(name, WindowedSeries()).absorb(series)
        for name, outcomes in other.outcomes.items():
            _add(self.outcomes.setdefault(name, Counter()), outcomes)
        for name, counts in other.shed.items():
            _add(self.shed.setdefault(name, Counter()), counts)
        for name in (*_TABLES, *_COUNTERS):
            _add(getattr(self, name), getattr(other, name))
        self.requests_by_client.merge(other.requests_by_client.state())
        self.limited_by_client.merge(other.limited_by_client.state())

    def observe(self, exchange: Exchange) -> None:
        """Count one finished exchange."""
        route = exchange.route or NO_ROUTE
        client = exchange.client
        tier = NO_TIER if client is None else client.quota.name
        method = exchange.method if exchange.method in METHODS else OTHER
        self.requests[route, method, exchange.status, exchange.source, tier] += 1
        running = self.routes[route].at(exchange.finished)
        running.count(exchange)
        if exchange.reason is not None and exchange.fallback is None:
            self.rejections[exchange.reason] += 1
        for whose in exchange.shed_by:
            self.shed[whose or GATEWAY][tier] += 1
        if client is not None:
            self.requests_by_client.add(client.key)
        if exchange.decision is not None:
            self.sources[exchange.decision.source] += 1
            if exchange.decision.allowed:
                self.allowed[tier] += 1
            else:
                self.limited[tier] += 1
                self.limited_by_client.add(exchange.client_key)
        if exchange.sent_at is not None and exchange.status != SWITCHED:
            running.time(exchange.finished - exchange.started)

    def observe_try(self, upstream: str, outcome: str, seconds: float | None, now: float) -> None:
        """Count one try on an upstream; `outcome` is a class of status or a reason, `seconds` the time to the head."""
        self.outcomes[upstream][outcome] += 1
        if seconds is not None:
            self.upstreams[upstream].at(now).time(seconds)

    def observe_retry(self, upstream: str, cause: str) -> None:
        """Count a try that was made because the one before failed with `cause`, a reason or a status."""
        self.retries[upstream, cause] += 1

    def observe_denial(self, upstream: str, why: str) -> None:
        """Count a failed try that was not repeated."""
        self.retries_denied[upstream, why] += 1

    # For people

    def latency(self, now: float) -> Steps[LatencyView]:
        """Return the percentiles of every series and window."""
        all_routes = yield from self._merged(now)
        routes = yield from each(self._named_routes(), lambda _, series: self._latency_of([series], now))
        upstreams = yield from each(self.upstreams.items(), lambda _, series: self._latency_of([series], now))
        return LatencyView(overall=all_routes[0], routes=routes, upstreams=upstreams)

    def _merged(self, now: float) -> Steps[tuple[LatencySeries, RateSeries]]:
        """Return the percentiles and rates of all routes together."""
        windows = [(name, span, Tally()) for name, span, _ in self._windows([], now)]
        for series in list(self.routes.values()):
            for (_, _, tally), (_, _, own) in zip(windows, self._windows([series], now), strict=True):
                tally.add(own)
            yield
        latency = LatencySeries(**{name: self._latency_window(tally) for name, _, tally in windows})
        return latency, RateSeries(**{name: _rate_window(span, tally) for name, span, tally in windows})

    def _named_routes(self) -> list[tuple[str, WindowedSeries]]:
        return [(name, series) for name, series in self.routes.items() if name != NO_ROUTE]

    def snapshot(
        self,
        now: float,
        upstreams: Mapping[str, UpstreamFigures],
        *,
        buckets: int,
        bucket_limit: int,
        overflowed: int,
        limiter: LimiterState,
        lag: float = 0.0,
    ) -> Steps[MetricsView]:
        """Return every figure since the start."""
        _, rates = yield from self._merged(now)
        route_rates = yield from each(self.routes.items(), lambda _, series: self._rates_of([series], now))
        latency = yield from self.latency(now)
        breakers = yield from each(upstreams.items(), _breaker_counts)
        concurrency = yield from each(upstreams.items(), self.concurrency)
        return MetricsView(
            uptime_seconds=round(now - self.started, 3),
            requests=RequestCounts(
                total=self.requests.total(),
                in_flight=self.in_flight,
                by_route=self._sum_by(lambda key: key[0]),
                by_status=self._sum_by(lambda key: str(key[2])),
                by_tier=self._sum_by(lambda key: key[4]),
            ),
            rates=rates,
            route_rates=route_rates,
            latency=latency,
            upstream_outcomes={name: dict(outcomes) for name, outcomes in self.outcomes.items()},
            retries=_nested(self.upstreams, self.retries),
            retries_denied=_nested(self.upstreams, self.retries_denied),
            fallbacks=_by_route(self.fallbacks),
            rejections=dict(self.rejections),
            operator_rejections=dict(self.operator_rejections),
            rate_limiter=LimiterView(
                allowed=dict(self.allowed),
                limited=dict(self.limited),
                would_limit=dict(self.would_limit),
                would_allow=dict(self.would_allow),
                settlements=dict(self.settlements),
                buckets=buckets,
                max_buckets=bucket_limit,
                overflow_decisions=overflowed,
                decisions_by_source=dict(self.sources),
                store=StoreView(**asdict(limiter)),
            ),
            circuit_breakers=breakers,
            output=OutputView(dropped_lines=dict(self.dropped_lines), write_errors=dict(self.write_errors)),
            overload=OverloadView(
                event_loop_lag_seconds=round(lag, 6),
                upstreams=concurrency,
                shed={name: dict(counts) for name, counts in self.shed.items()},
            ),
        )

    def concurrency(self, name: str, upstream: UpstreamFigures) -> ConcurrencyView:
        """Return what is under way at an upstream, and what was refused for it."""
        figures = upstream.concurrency
        limit = None if figures.limit is None else round(figures.limit, 1)
        return ConcurrencyView(limit=limit, in_flight=figures.in_flight, shed=self.shed[name].total())

    def _sum_by(self, label: Callable[[tuple[str, str, int, str, str]], str]) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for key, count in self.requests.items():
            sums[label(key)] += count
        return dict(sums)

    def _windows(self, series: Sequence[WindowedSeries], now: float) -> Iterator[tuple[str, float, Tally]]:
        """Yield each window's name, the seconds it covers, and its counts."""
        uptime = max(now - self.started, 1e-9)
        for name, span in WINDOWS.items():
            merged = Tally()
            for one in series:
                merged.add(one.last(span, now))
            yield name, min(span - SLICE + now % SLICE, uptime), merged
        merged = Tally()
        for one in series:
            merged.add(one.total)
        yield "since_start", uptime, merged

    def _latency_of(self, series: Sequence[WindowedSeries], now: float) -> LatencySeries:
        return LatencySeries(**{name: self._latency_window(tally) for name, _, tally in self._windows(series, now)})

    def _latency_window(self, tally: Tally) -> LatencyWindow:
        count = sum(tally.buckets.values())
        return LatencyWindow(
            count=count,
            mean_ms=round(tally.total_seconds / count * 1000, 3) if count else None,
            percentiles_ms={
                f"p{percent:g}": _milliseconds(percentile(tally.buckets, percent)) for percent in self.percentiles
            },
        )

    def _rates_of(self, series: Sequence[WindowedSeries], now: float) -> RateSeries:
        return RateSeries(**{name: _rate_window(span, tally) for name, span, tally in self._windows(series, now)})


def _add(mine: Counter[Label], theirs: Counter[Label]) -> None:
    """Add counts to counts. `Counter.__iadd__` would drop those at zero, which are shown too."""
    for label, count in theirs.items():
        mine[label] += count


def _changed(series: Mapping[str, WindowedSeries], since: int) -> list[tuple[str, WindowedSeries]]:
    """Return the series that have changed in slice `since` or later; 0 returns all."""
    return [(name, one) for name, one in series.items() if not since or one.has_changed(since)]


def _nested(names: Iterable[str], counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Return counts by two labels as one table for each of the first."""
    tables: dict[str, dict[str, int]] = {name: {} for name in names}
    for (first, second), count in counts.items():
        if first in tables:
            tables[first][second] = count
    return tables


def _by_route(fallbacks: Mapping[tuple[str, str, str], int]) -> dict[str, dict[str, int]]:
    """Return for each route that has used its fallback how often, by the reason of the failure."""
    found: dict[str, Counter[str]] = {}
    for (route, _, reason), count in fallbacks.items():
        found.setdefault(route, Counter())[reason] += count
    return {route: dict(counts) for route, counts in found.items()}


def _breaker_counts(_name: str, upstream: UpstreamFigures) -> BreakerCounts:
    breaker = upstream.breaker
    return BreakerCounts(
        state=breaker.state.value,
        opened_total=breaker.opened_total,
        rejected_total=breaker.rejected_total,
        mode=breaker.mode.value,
        slow_calls_total=breaker.slow_total,
        would_open_total=breaker.would_open_total,
        would_reject_total=breaker.would_reject_total,
    )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _rate_window(span: float, tally: Tally) -> RateWindow:
    requests = tally.requests or 1
    return RateWindow(
        requests=tally.requests,
        requests_per_second=round(tally.requests / span, 3),
        gateway_errors=tally.gateway_errors,
        upstream_errors=tally.upstream_errors,
        limited=tally.limited,
        error_rate=round((tally.gateway_errors + tally.upstream_errors) / requests, 6),
        limited_rate=round(tally.limited / requests, 6),
    )


# For Prometheus
