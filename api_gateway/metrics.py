"""What is counted: a recorder that is fed once per exchange, and its state for other processes.

Plain integers on one event loop, no locks. Label values come from the configuration or from closed lists, so nothing
here grows with clients or paths.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from api_gateway.errors import Reason
from api_gateway.eventloop.pacing import Steps, completed, each
from api_gateway.models import Exchange
from api_gateway.observability.heavy_hitters import HeavyHitters
from api_gateway.observability.latency_series import WindowedSeries

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
        for mine, other in ((self.routes, state["routes"]), (self.upstreams, state["upstreams"])):
            for name, series in other.items():
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

    def observe_attempt(self, upstream: str, outcome: str, seconds: float | None, now: float) -> None:
        """Count one try on an upstream; `outcome` is a class of status or a reason, `seconds` the time to the head."""
        self.outcomes[upstream][outcome] += 1
        if seconds is not None:
            self.upstreams[upstream].at(now).time(seconds)

    def observe_retry(self, upstream: str, cause: str) -> None:
        """Count a try that was made because the one before failed with `cause`, a reason or a status."""
        self.retries[upstream, cause] += 1

    def observe_denial(self, upstream: str, reason: str) -> None:
        """Count a failed try that was not repeated."""
        self.retries_denied[upstream, reason] += 1


def _add(mine: Counter[Label], other: Counter[Label]) -> None:
    """Add counts to counts. `Counter.__iadd__` would drop those at zero, which are shown too."""
    for label, count in other.items():
        mine[label] += count


def _changed(series: Mapping[str, WindowedSeries], since: int) -> list[tuple[str, WindowedSeries]]:
    """Return the series that have changed in slice `since` or later; 0 returns all."""
    return [(name, one) for name, one in series.items() if not since or one.has_changed(since)]
