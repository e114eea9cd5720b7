"""What a worker has to say of itself, and what the reports of several come to.

Values only: the live breakers and targets are looked at once, when a report is made. Times are monotonic seconds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from api_gateway.balancer import Upstream
from api_gateway.circuit_breaker import BreakerPolicy, CircuitBreaker, State
from api_gateway.metrics import SLICE, Recorder
from api_gateway.models import LimiterState
from api_gateway.overload import Concurrency

Status = Literal["pass", "warn", "fail"]

_BADNESS = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}
_GRAVITY: dict[Status, int] = {"pass": 0, "warn": 1, "fail": 2}
_EXACT = frozenset({"memory", "store"})
_EVER = float("inf")


@dataclass(frozen=True, slots=True)
class BreakerReport:
    """A circuit breaker. `workers` holds its state in each worker, where there are several."""

    state: State
    since: float
    consecutive_failures: int
    window_calls: int
    window_failures: int
    probes_in_flight: int
    opened_total: int
    rejected_total: int
    next_probe_at: float | None
    opened_at: float | None
    opened_cause: str
    policy: BreakerPolicy
    workers: dict[str, State] = field(default_factory=dict)

    @classmethod
    def of(cls, breaker: CircuitBreaker, now: float) -> "BreakerReport":
        """Look at a breaker, after the moves that time has made."""
        breaker.advance(now)
        calls, failures = breaker.window_totals(now)
        opened = breaker.last_opened
        return cls(
            state=breaker.state,
            since=breaker.since,
            consecutive_failures=breaker.consecutive_failures,
            window_calls=calls,
            window_failures=failures,
            probes_in_flight=breaker.probes_in_flight,
            opened_total=breaker.opened_total,
            rejected_total=breaker.rejected_total,
            next_probe_at=now + breaker.retry_after(now) if breaker.state is State.OPEN else None,
            opened_at=None if opened is None else opened.at,
            opened_cause="" if opened is None else opened.cause,
            policy=breaker.policy,
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "BreakerReport":
        """Build the report that `asdict` and JSON have made this of."""
        workers = {name: State(word) for name, word in state["workers"].items()}
        own = {"state": State(state["state"]), "policy": BreakerPolicy(**state["policy"]), "workers": workers}
        return cls(**{**state, **own})


@dataclass(frozen=True, slots=True)
class TargetReport:
    """A target of an upstream."""

    url: str
    is_healthy: bool
    in_flight: int
    is_checked: bool
    last_check: str | None


@dataclass(frozen=True, slots=True)
class UpstreamReport:
    """An upstream: `pass` while every target is healthy, `fail` when none is or its breaker is open."""

    status: Status
    breaker: BreakerReport
    targets: tuple[TargetReport, ...]
    concurrency: Concurrency = Concurrency()  # noqa: RUF009 - frozen

    @classmethod
    def of(cls, upstream: Upstream, now: float) -> "UpstreamReport":
        """Look at an upstream."""
        breaker = BreakerReport.of(upstream.breaker, now)
        healthy = sum(target.is_healthy for target in upstream.targets)
        status: Status = "pass"
        if healthy == 0 or breaker.state is State.OPEN:
            status = "fail"
        elif healthy < len(upstream.targets) or breaker.state is State.HALF_OPEN:
            status = "warn"
        targets = [
            TargetReport(target.url, target.is_healthy, target.in_flight, target.is_checked, target.last_check)
            for target in upstream.targets
        ]
        return cls(status, breaker, tuple(targets), upstream.concurrency)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "UpstreamReport":
        """Build the report that `asdict` and JSON have made this of."""
        targets = tuple(TargetReport(**target) for target in state["targets"])
        concurrency = Concurrency(**state["concurrency"])
        return cls(state["status"], BreakerReport.from_state(state["breaker"]), targets, concurrency)


@dataclass(slots=True)
class Report:
    """One worker, or several together.

    `is_over` marks a worker that serves no more: its counters count, and its breakers and targets say nothing of the
    present.
    """

    worker: str
    recorder: Recorder
    upstreams: dict[str, UpstreamReport] = field(default_factory=dict)
    buckets: int = 0
    bucket_limit: int = 0
    overflowed: int = 0
    limiter: LimiterState = LimiterState()  # noqa: RUF009 - frozen
    client_trouble: str | None = None  # why the client store cannot be used, while it cannot
    is_over: bool = False
    lag: float = 0.0  # seconds by which the event loop runs late

    @classmethod
    def blank(cls, worker: str = "", percentiles: Sequence[float] = ()) -> "Report":
        """Return a report of nothing, to be updated or merged into."""
        recorder = Recorder((), (), (), percentiles, _EVER)
        recorder.routes.clear()
        return cls(worker, recorder)

    def state(self, since: int = 0) -> dict[str, Any]:
        """Return the report as JSON can hold it; see `Recorder.state`."""
        return {
            "recorder": self.recorder.state(since),
            "upstreams": {name: asdict(upstream) for name, upstream in self.upstreams.items()},
            "buckets": self.buckets,
            "bucket_limit": self.bucket_limit,
            "overflowed": self.overflowed,
            "limiter": asdict(self.limiter),
            "client_trouble": self.client_trouble,
            "lag": self.lag,
        }

    def update(self, state: Mapping[str, Any]) -> None:
        """Become what another report's `state` says, given every state of it since its first."""
        self.recorder.update(state["recorder"])
        self.upstreams = {name: UpstreamReport.from_state(upstream) for name, upstream in state["upstreams"].items()}
        self.buckets, self.bucket_limit = state["buckets"], state["bucket_limit"]
        self.overflowed = state["overflowed"]
        self.limiter = LimiterState(**state["limiter"])
        self.client_trouble = state["client_trouble"]
        self.lag = state["lag"]

    def end(self) -> None:
        """Keep what was counted and drop what was going on: the worker has ended."""
        self.is_over = True
        self.recorder.in_flight = self.buckets = 0
        self.lag = 0.0


def oldest_changed(now: float) -> int:
    """Return the number of the first slice that may change after `now`."""
    return max(0, int(now / SLICE) - 1)


def merge(reports: Sequence[Report]) -> Report:
    """Return what the reports come to: counts summed, and of states the worst."""
    merged = Report.blank()
    for report in reports:
        merged.recorder.absorb(report.recorder)
        merged.buckets += report.buckets
        merged.bucket_limit = max(merged.bucket_limit, report.bucket_limit)
        merged.overflowed += report.overflowed
        merged.lag = max(merged.lag, report.lag)
    merged.limiter = _merge_limiters(reports)
    merged.client_trouble = next((it.client_trouble for it in reports if it.client_trouble and not it.is_over), None)
    merged.is_over = all(report.is_over for report in reports)
    names = dict.fromkeys(name for report in reports for name in report.upstreams)
    for name in names:
        found = [report for report in reports if name in report.upstreams]
        present = [report for report in found if not report.is_over]
        if present or merged.is_over:
            merged.upstreams[name] = _merge_upstream(name, found, present or found)
    return merged


def _merge_limiters(reports: Sequence[Report]) -> LimiterState:
    states = [report.limiter for report in reports]
    present = [report.limiter for report in reports if not report.is_over] or states
    return LimiterState(
        mode=min((state.mode for state in present), key=_EXACT.__contains__, default="memory"),
        processes=max((state.processes for state in present), default=1),
        batches=sum(state.batches for state in states),
        questions=sum(state.questions for state in states),
        failures=sum(state.failures for state in states),
        last_error=next((state.last_error for state in present if state.last_error), None),
    )


def _merge_upstream(name: str, found: Sequence[Report], present: Sequence[Report]) -> UpstreamReport:
    upstreams = [report.upstreams[name] for report in present]
    breaker = replace(
        _worst([upstream.breaker for upstream in upstreams]),
        opened_total=sum(report.upstreams[name].breaker.opened_total for report in found),
        rejected_total=sum(report.upstreams[name].breaker.rejected_total for report in found),
        workers={report.worker: report.upstreams[name].breaker.state for report in present},
    )
    status = max((upstream.status for upstream in upstreams), key=_GRAVITY.__getitem__)
    urls = dict.fromkeys(target.url for upstream in upstreams for target in upstream.targets)
    targets = (_merge_target(url, upstreams) for url in urls)
    return UpstreamReport(status, breaker, tuple(targets), _merge_concurrency(upstreams))


def _merge_concurrency(upstreams: Sequence[UpstreamReport]) -> Concurrency:
    """Return what workers may have under way together: each has a limit of its own."""
    found = [upstream.concurrency for upstream in upstreams]
    limits = [concurrency.limit for concurrency in found if concurrency.limit is not None]
    return Concurrency(sum(limits) if limits else None, sum(concurrency.in_flight for concurrency in found))


def _worst(breakers: Sequence[BreakerReport]) -> BreakerReport:
    """Return the worst of the states, with what the others add to it; the totals are left to the caller."""
    worst = max(breakers, key=lambda breaker: (_BADNESS[breaker.state], -breaker.since))
    probes = [breaker.next_probe_at for breaker in breakers if breaker.next_probe_at is not None]
    latest = max(breakers, key=lambda breaker: -_EVER if breaker.opened_at is None else breaker.opened_at)
    return replace(
        worst,
        consecutive_failures=max(breaker.consecutive_failures for breaker in breakers),
        window_calls=sum(breaker.window_calls for breaker in breakers),
        window_failures=sum(breaker.window_failures for breaker in breakers),
        probes_in_flight=sum(breaker.probes_in_flight for breaker in breakers),
        next_probe_at=min(probes, default=None),
        opened_at=latest.opened_at,
        opened_cause=latest.opened_cause,
    )


def _merge_target(url: str, upstreams: Iterable[UpstreamReport]) -> TargetReport:
    targets = [target for upstream in upstreams for target in upstream.targets if target.url == url]
    telling = min(targets, key=lambda target: (target.is_healthy, not target.is_checked))
    return replace(telling, in_flight=sum(target.in_flight for target in targets))
