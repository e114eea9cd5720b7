"""The recorder: counters that each exchange updates once, and their state for other processes.

Plain integers on one event loop, without locks. Label values come from the configuration or from closed lists, so the
size does not depend on clients or paths.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from api_gateway.errors import Reason
from api_gateway.eventloop.steps import Steps, each, run_at_once
from api_gateway.models import Decision, Exchange
from api_gateway.observability.heavy_hitters import HeavyHitters
from api_gateway.observability.label_counter import LabelCounter
from api_gateway.observability.latency_series import WindowedSeries
from api_gateway.observability.request_record import REQUEST_RESULTS
from api_gateway.observability.trace_exporter import RESULTS

Label = TypeVar("Label")

# Seconds: the bounds that OpenTelemetry recommends for http.server.request.duration.
DURATION_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)

# The recorder's counters with one label.
_COUNTERS = (
    "unproxied_refusals",
    "allowed",
    "limited",
    "sources",
    "would_refuse",
    "would_allow",
    "identity_would_refuse",
    "bare_client_ids",
    "settlements",
    "quota_warnings",
    "in_flight_by_limit",
    "operator_refusals",
    "operator_changes",
    "dropped_lines",
    "write_errors",
    "parsed_heads",
    "illegal_events",
    "trace_spans",
    "tls_handshakes",
    "tls_failures",
    "tls_reloads",
    "requests_not_kept",
    "mirrored_in_flight",
)

# The recorder's counters with several labels.
_TABLES = (
    "requests",
    "reasons",
    "retries",
    "retries_denied",
    "fallbacks",
    "illegal_exchange_events",
    "key_fetches",
    "refusals_by_limit",
    "candidate_refusals",
    "hook_calls",
    "hook_ns",
    "mirrored",
)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "_other"
NO_ROUTE = "_none"
NO_TIER = "_none"
GATEWAY = "_gateway"  # instead of an upstream, for requests that are shed before their upstream is known
# Results of a cost settlement: more was charged, some or all was refunded, or there was no valid value.
SETTLEMENTS = ("charged", "refunded", "unreadable")

# Reasons for which requests would be refused if `identity.mode` were `enforce`.
OBSERVED_REASONS = (
    Reason.CREDENTIALS_REQUIRED.value,
    Reason.CREDENTIALS_INVALID.value,
    Reason.CREDENTIALS_INSUFFICIENT.value,
    Reason.CLIENT_ID_INVALID.value,
    Reason.BAD_REQUEST.value,  # a request that repeats its credential
    Reason.STORE_UNAVAILABLE.value,  # without which a key cannot be verified, or whether an id needs one is unknown
    Reason.ISSUER_UNAVAILABLE.value,
)

# Results of an attempt: the class of its status, or the reason why it has none.
ATTEMPT_RESULTS = (
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

# Causes of a retry, other than statuses.
RETRY_CAUSES = (
    Reason.UPSTREAM_CONNECT_ERROR.value,
    Reason.UPSTREAM_RESET.value,
    Reason.UPSTREAM_PROTOCOL_ERROR.value,
    Reason.UPSTREAM_TIMEOUT.value,
)

AUDIT = "audit"  # stream of the lines that the audit log should have

SWITCHED = 101  # status of a tunnel, whose duration is not a latency


class Recorder:
    """All counters of one process, or the sums over several.

    Times are on the monotonic clock, which is the same for all processes of a machine.
    """

    def __init__(
        self,
        routes: Iterable[str],
        upstreams: Iterable[str],
        tiers: Iterable[str],
        percentiles: Sequence[float],
        now: float,
        refusals: Counter[str] | None = None,
        dropped_lines: Counter[str] | None = None,
        write_errors: Counter[str] | None = None,
        parsed_heads: Counter[str] | None = None,
        illegal_events: Counter[str] | None = None,
    ) -> None:
        """Create all series with the value zero, so that each exists before its first event.

        `refusals`, by reason, may be shared with the server and the operator endpoints, which count requests that
        never become an exchange;
        `dropped_lines` and `write_errors`, by stream (`stdout`, `stderr`), with the output of the process; the former
        also has the stream `audit`;
        `parsed_heads`, by parser, and `illegal_events`, by event, with the connections of clients.
        """
        tiers = tuple(tiers)
        self.started = now
        self.in_flight = self.waiting_traces = 0  # requests, and exchanges that wait to be exported
        self.routes = {name: WindowedSeries() for name in (*routes, NO_ROUTE)}
        self.upstreams = {name: WindowedSeries() for name in upstreams}
        self.requests: Counter[tuple[str, str, int, str, str]] = LabelCounter()  # route, method, status, source, tier
        self.attempt_results: dict[str, Counter[str]] = {name: LabelCounter() for name in self.upstreams}
        self.retries: Counter[tuple[str, str]] = Counter()  # upstream, cause
        self.retries_denied: Counter[tuple[str, str]] = Counter()  # upstream, why
        self.fallbacks: Counter[tuple[str, str, str]] = Counter()  # route, fallback, reason of the failure
        self.illegal_exchange_events: Counter[tuple[str, str]] = Counter()  # phase of an exchange, event
        self.key_fetches: Counter[tuple[str, str]] = Counter()  # issuer, result
        self.refusals_by_limit: Counter[tuple[str, str]] = LabelCounter()  # limit, tier; of all limits that refuse
        self.candidate_refusals: Counter[tuple[str, str]] = Counter()  # the same of candidates, if admitted
        self.hook_calls: Counter[tuple[str, str, str]] = Counter()  # extension, hook, result
        self.hook_ns: Counter[tuple[str, str]] = Counter()  # nanoseconds, by extension and hook
        self.mirrored: Counter[tuple[str, str]] = Counter()  # copies of requests, by route and result
        self.mirrored_in_flight: Counter[str] = Counter()  # by route
        self.reasons: Counter[tuple[str, int]] = LabelCounter()  # of proxied requests: reason, status
        self.unproxied_refusals: Counter[str] = LabelCounter() if refusals is None else refusals
        self.allowed: Counter[str] = LabelCounter(dict.fromkeys(tiers, 0))
        self.limited: Counter[str] = LabelCounter(dict.fromkeys(tiers, 0))
        self.sources: Counter[str] = LabelCounter()  # decisions by source
        self.would_refuse: Counter[str] = Counter(dict.fromkeys(tiers, 0))  # allowed; the candidate would refuse
        self.would_allow: Counter[str] = Counter(dict.fromkeys(tiers, 0))  # refused; the candidate would allow
        self.identity_would_refuse: Counter[str] = Counter(dict.fromkeys(OBSERVED_REASONS, 0))  # in mode observe
        self.bare_client_ids: Counter[str] = Counter(dict.fromkeys(("admitted", "refused"), 0))
        self.settlements: Counter[str] = Counter(dict.fromkeys(SETTLEMENTS, 0))
        self.quota_warnings: Counter[str] = Counter()  # by the name of the limit
        self.in_flight_by_limit: Counter[str] = Counter()  # requests that hold a slot of a concurrency limit
        self.operator_refusals: Counter[str] = Counter()  # refused requests to operator endpoints, by reason
        self.operator_changes: Counter[str] = Counter()  # changes by operators, by action
        self.shed = {name: Counter(dict.fromkeys(tiers, 0)) for name in (*self.upstreams, GATEWAY)}
        self.dropped_lines: Counter[str] = Counter() if dropped_lines is None else dropped_lines
        self.write_errors: Counter[str] = Counter() if write_errors is None else write_errors
        self.parsed_heads: Counter[str] = Counter() if parsed_heads is None else parsed_heads
        self.illegal_events: Counter[str] = Counter() if illegal_events is None else illegal_events
        self.trace_spans: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))  # by what became of them
        self.tls_handshakes: Counter[str] = Counter()  # by version and session: `TLSv1.3/new` or `/resumed`
        self.tls_failures: Counter[str] = Counter()  # handshakes by reason
        self.tls_reloads: Counter[str] = Counter()  # of certificates, by result
        self.requests_not_kept: Counter[str] = LabelCounter(dict.fromkeys(REQUEST_RESULTS, 0))  # for lack of a place
        # The last exported trace by route and bucket of its histogram: id, seconds, and time since the epoch.
        self.exemplars: dict[tuple[str, int], tuple[str, float, float]] = {}
        self.requests_by_client, self.limited_by_client = HeavyHitters(), HeavyHitters()  # by the client's key
        self.limited_by_bucket, self.bare_by_client = HeavyHitters(), HeavyHitters()  # by what refuses; unproved ids
        self.percentiles = tuple(percentiles)

    def extend(
        self, routes: Iterable[str], upstreams: Iterable[str], tiers: Iterable[str], percentiles: Sequence[float]
    ) -> None:
        """Add label values, after a reload. Existing series and their counts stay."""
        self.percentiles = tuple(percentiles)
        for name in routes:
            self.routes.setdefault(name, WindowedSeries())
        for name in upstreams:
            self.upstreams.setdefault(name, WindowedSeries())
            self.attempt_results.setdefault(name, LabelCounter())
            self.shed.setdefault(name, Counter())
        for tier in tiers:
            for counts in (self.allowed, self.limited, self.would_refuse, self.would_allow, *self.shed.values()):
                counts.setdefault(tier, 0)

    def __repr__(self) -> str:
        return f"<Recorder [{self.requests.total()} requests, {self.in_flight} in flight]>"

    @property
    def refusals(self) -> Counter[str]:
        """Responses that the gateway generated, by reason: to proxied requests, to others, and to operators."""
        total = Counter(self.unproxied_refusals)
        for (reason, _), count in self.reasons.items():
            total[reason] += count
        return total

    def state(self, since: int = 0) -> dict[str, Any]:
        """Return the state as JSON values; see `state_in_steps`."""
        return run_at_once(self.state_in_steps(since))

    def state_in_steps(self, since: int) -> Steps[dict[str, Any]]:
        """Return the state as JSON values, in steps, without series and slices unchanged since slice `since`."""
        routes = yield from each(_changed(self.routes, since), lambda _, series: series.state(since))
        upstreams = yield from each(_changed(self.upstreams, since), lambda _, series: series.state(since))
        return {
            "started": self.started,
            "in_flight": self.in_flight,
            "waiting_traces": self.waiting_traces,
            "exemplars": [(*key, *exemplar) for key, exemplar in list(self.exemplars.items())],  # a thread adds some
            "routes": routes,
            "upstreams": upstreams,
            **{name: [(*key, count) for key, count in getattr(self, name).items()] for name in _TABLES},
            "attempt_results": {name: dict(counts) for name, counts in self.attempt_results.items()},
            "shed": {name: dict(counts) for name, counts in self.shed.items()},
            **{name: dict(getattr(self, name)) for name in _COUNTERS},
            "requests_by_client": self.requests_by_client.state(),
            "limited_by_client": self.limited_by_client.state(),
            "limited_by_bucket": self.limited_by_bucket.state(),
            "bare_by_client": self.bare_by_client.state(),
        }

    def update(self, state: Mapping[str, Any]) -> None:
        """Apply a `state` of another recorder. Every state since its first must have been applied, in order."""
        run_at_once(self.update_in_steps(state))

    def update_in_steps(self, state: Mapping[str, Any]) -> Steps[None]:
        """Apply a `state` as `update` does, in steps."""
        self.started, self.in_flight = state["started"], state["in_flight"]
        self.waiting_traces = state["waiting_traces"]
        self.exemplars = {(route, bucket): (one, took, at) for route, bucket, one, took, at in state["exemplars"]}
        for mine, other in ((self.routes, state["routes"]), (self.upstreams, state["upstreams"])):
            for name, series in other.items():
                mine.setdefault(name, WindowedSeries()).update(series)
                yield
        for name in _TABLES:
            setattr(self, name, Counter({tuple(key): count for *key, count in state[name]}))
            yield
        self.attempt_results = yield from each(state["attempt_results"].items(), lambda _, counts: Counter(counts))
        self.shed = yield from each(state["shed"].items(), lambda _, counts: Counter(counts))
        for name in _COUNTERS:
            setattr(self, name, Counter(state[name]))
        self.requests_by_client = HeavyHitters.from_state(state["requests_by_client"])
        yield
        self.limited_by_client = HeavyHitters.from_state(state["limited_by_client"])
        yield
        self.bare_by_client = HeavyHitters.from_state(state["bare_by_client"])
        yield
        self.limited_by_bucket = HeavyHitters.from_state(state["limited_by_bucket"])

    def end(self) -> None:
        """Clear current figures, after the end of the process that counted them."""
        self.in_flight = self.waiting_traces = 0
        for present in (self.in_flight_by_limit, self.mirrored_in_flight):
            for name in present:
                present[name] = 0

    def absorb(self, other: "Recorder") -> None:
        """Add the counts of another recorder."""
        self.started = min(self.started, other.started)
        self.in_flight += other.in_flight
        self.waiting_traces += other.waiting_traces
        for key, exemplar in list(other.exemplars.items()):
            if exemplar[2] >= self.exemplars.get(key, exemplar)[2]:
                self.exemplars[key] = exemplar
        for own, found in ((self.routes, other.routes), (self.upstreams, other.upstreams)):
            for name, series in found.items():
                own.setdefault(name, WindowedSeries()).absorb(series)
        for name, results in other.attempt_results.items():
            _add(self.attempt_results.setdefault(name, Counter()), results)
        for name, counts in other.shed.items():
            _add(self.shed.setdefault(name, Counter()), counts)
        for name in (*_TABLES, *_COUNTERS):
            _add(getattr(self, name), getattr(other, name))
        self.requests_by_client.merge(other.requests_by_client.state())
        self.limited_by_client.merge(other.limited_by_client.state())
        self.limited_by_bucket.merge(other.limited_by_bucket.state())
        self.bare_by_client.merge(other.bare_by_client.state())

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
            self.reasons[exchange.reason, exchange.status] += 1
        for upstream in exchange.shed_by:
            self.shed[upstream or GATEWAY][tier] += 1
        if client is not None:
            self.requests_by_client.add(client.key)
        decision = exchange.decision
        if decision is not None:
            self.sources[decision.source] += 1
            if decision.allowed:
                self.allowed[tier] += 1
            else:
                self.limited[tier] += 1
                self.limited_by_client.add("" if client is None else client.key)
                for key in _refusing_keys(exchange, decision):
                    self.limited_by_bucket.add(key)
                for quota in decision.violated or (decision.quota,):
                    self.refusals_by_limit[quota.policy, tier] += 1
        if exchange.sent_at is not None and exchange.status != SWITCHED:  # `is_timed`, inlined
            running.time(exchange.finished - exchange.started)

    def observe_attempt(self, upstream: str, result: str, seconds: float | None, now: float) -> None:
        """Count one attempt; `result` is a class of status or a reason, `seconds` the time to the response's head."""
        self.attempt_results[upstream][result] += 1
        if seconds is not None:
            self.upstreams[upstream].at(now).time(seconds)

    def observe_retry(self, upstream: str, cause: str) -> None:
        """Count a retry after an attempt that failed with `cause`, a reason or a status."""
        self.retries[upstream, cause] += 1

    def observe_key_fetch(self, issuer: str, *, succeeded: bool) -> None:
        """Count a fetch of the keys of an issuer of tokens."""
        self.key_fetches[issuer, "success" if succeeded else "failure"] += 1

    def observe_hook(self, extension: str, hook: str, result: str, took_ns: int) -> None:
        """Count a call of a hook of an extension; `result` is ok, error or timeout."""
        self.hook_calls[extension, hook, result] += 1
        self.hook_ns[extension, hook] += took_ns

    def expect_mirrored(self, routes: Iterable[str], results: Sequence[str]) -> None:
        """Add the series of routes whose requests are copied, with the value zero unless they exist."""
        for route in routes:
            self.mirrored_in_flight.setdefault(route, 0)
            for result in results:
                self.mirrored.setdefault((route, result), 0)

    def observe_mirrored(self, route: str, result: str) -> None:
        """Count a copy of a request of a route, by what became of it."""
        self.mirrored[route, result] += 1

    def observe_denial(self, upstream: str, reason: str) -> None:
        """Count a failed attempt that was not retried; `reason` is a `RetryDenied`."""
        self.retries_denied[upstream, reason] += 1


def is_timed(exchange: Exchange) -> bool:
    """Return whether the duration of an exchange counts: it has reached an upstream, and is not a tunnel."""
    return exchange.sent_at is not None and exchange.status != SWITCHED


def _refusing_keys(exchange: Exchange, decision: Decision) -> list[str]:
    """Return the keys of all buckets, counters and slots that refuse an exchange."""
    if len(decision.violated) < 2:  # noqa: PLR2004 - one
        return [decision.key]
    slots = getattr(exchange.charges, "slots", ())  # of the charges that a higher layer has for slots
    return [one.key for one in (*exchange.charges, *slots) if one.quota in decision.violated]


def _add(mine: Counter[Label], other: Counter[Label]) -> None:
    """Add counts. Unlike `Counter.__iadd__`, this keeps counts of zero, which are shown, too."""
    for label, count in other.items():
        mine[label] += count


def _changed(series: Mapping[str, WindowedSeries], since: int) -> list[tuple[str, WindowedSeries]]:
    """Return the series with counts in slice `since` or later; all if `since` is 0."""
    return [(name, one) for name, one in series.items() if not since or one.has_changed(since)]
