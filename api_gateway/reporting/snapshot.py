"""What a worker has to say of itself.

Values only: the live breakers and targets are looked at once, when a report is made. Times are monotonic seconds.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from api_gateway.circuit_breaker import MAX_RECORDS, CircuitBreaker
from api_gateway.eventloop.pacing import Steps, completed, each
from api_gateway.metrics import Recorder
from api_gateway.models import LimiterState
from api_gateway.observability.latency_series import SLICE
from api_gateway.reload.outcome import ReloadState
from api_gateway.resilience.breaker_history import FailedCall, TransitionRecord
from api_gateway.resilience.breaker_policy import BreakerPolicy, Mode, State
from api_gateway.resilience.call_windows import Counts
from api_gateway.resilience.concurrency_limit import ConcurrencyState
from api_gateway.resilience.fair_shares import ResourceState
from api_gateway.upstreams.dns import HostName
from api_gateway.upstreams.target import CheckRecord, Target
from api_gateway.upstreams.upstream import Upstream

Status = Literal["pass", "warn", "fail"]

_EVER = float("inf")


@dataclass(frozen=True, slots=True)
class BreakerSnapshot:
    """A circuit breaker. `workers` holds its state in each worker, where there are several.

    `one_principal`: it stays CLOSED because the failures are one client's and others call, too.
    """

    state: State
    since: float
    consecutive_failures: int
    window_calls: int
    window_failures: int
    window_slow: int
    probes_in_flight: int
    opened_total: int
    rejected_total: int
    slow_total: int
    would_open_total: int
    would_reject_total: int
    mode: Mode
    ramp_share: float | None
    next_probe_at: float | None
    opened_at: float | None
    opened_cause: str
    policy: BreakerPolicy
    one_principal: bool = False
    workers: dict[str, State] = field(default_factory=dict)

    @classmethod
    def of(cls, breaker: CircuitBreaker, now: float) -> "BreakerSnapshot":
        """Look at a breaker, after the moves that time has made."""
        breaker.advance(now)
        calls, failures, slow = breaker.window_counts(now)
        opened = breaker.last_opened
        return cls(
            state=breaker.state,
            since=breaker.since,
            consecutive_failures=breaker.consecutive_failures,
            window_calls=calls,
            window_failures=failures,
            window_slow=slow,
            probes_in_flight=breaker.probes_in_flight,
            opened_total=breaker.opened_total,
            rejected_total=breaker.rejected_total,
            slow_total=breaker.slow_total,
            would_open_total=breaker.would_open_total,
            would_reject_total=breaker.would_reject_total,
            mode=breaker.mode,
            ramp_share=breaker.ramp_share(now),
            next_probe_at=breaker.next_probe_at(),
            opened_at=None if opened is None else opened.at,
            opened_cause="" if opened is None else opened.cause,
            policy=breaker.policy,
            one_principal=breaker.has_one_failing_principal(now),
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "BreakerSnapshot":
        """Build the report that `asdict` and JSON have made this of."""
        workers = {name: State(word) for name, word in state["workers"].items()}
        policy = BreakerPolicy(**state["policy"])
        own = {"state": State(state["state"]), "mode": Mode(state["mode"]), "policy": policy, "workers": workers}
        return cls(**{**state, **own})


@dataclass(frozen=True, slots=True)
class OutlierSnapshot:
    """What live requests have shown of a target. `withheld` failures in a row did not eject it: it may not be."""

    state: State
    is_ejected: bool
    withheld: int
    consecutive_failures: int
    next_probe_at: float | None
    opened_at: float | None
    opened_cause: str
    ejections_total: int
    one_principal: bool = False  # see `BreakerSnapshot`

    @classmethod
    def of(cls, upstream: Upstream, target: Target, now: float) -> "OutlierSnapshot | None":
        """Look at a target's breaker, if it has one."""
        breaker = target.breaker
        if breaker is None:
            return None
        opened, state = breaker.last_opened, breaker.state_at(now)
        return cls(
            state=state,
            is_ejected=upstream.outliers.is_ejected(upstream.targets, target, now),
            withheld=target.withheld,
            consecutive_failures=breaker.consecutive_failures,
            next_probe_at=now + breaker.retry_after(now) if state is State.OPEN else None,
            opened_at=None if opened is None else opened.at,
            opened_cause="" if opened is None else opened.cause,
            ejections_total=target.ejections_total,
            one_principal=breaker.has_one_failing_principal(now),
        )


@dataclass(frozen=True, slots=True)
class TargetSnapshot:
    """A target of an upstream; `share` is how often it is a candidate, less than 1 while it starts slowly."""

    url: str
    is_healthy: bool
    in_flight: int
    named: str | None = None
    share: float = 1.0
    checks: CheckRecord = field(default_factory=CheckRecord)
    passive: OutlierSnapshot | None = None

    @classmethod
    def of(cls, upstream: Upstream, target: Target, now: float) -> "TargetSnapshot":
        """Look at a target."""
        return cls(
            url=target.url,
            is_healthy=target.is_healthy,
            in_flight=target.in_flight,
            named=target.named,
            share=upstream.outliers.share(target, now),
            checks=replace(target.checks),
            passive=OutlierSnapshot.of(upstream, target, now),
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TargetSnapshot":
        """Build the report that `asdict` and JSON have made this of."""
        passive = state["passive"] and OutlierSnapshot(
            **{**state["passive"], "state": State(state["passive"]["state"])}
        )
        return cls(**{**state, "checks": CheckRecord(**state["checks"]), "passive": passive})

    @property
    def key(self) -> str:
        """What tells it from the upstream's other targets: two names may stand for one address."""
        return self.url if self.named is None else f"{self.named} ({self.url})"

    @property
    def verdict(self) -> bool | None:
        """What health checks say of it; None while none has asked it."""
        return None if self.is_healthy and self.checks.at is None else self.is_healthy

    @property
    def is_in_rotation(self) -> bool:
        """Tell whether it gets requests like any other."""
        return self.is_healthy and (self.passive is None or not self.passive.is_ejected)


@dataclass(frozen=True, slots=True)
class HostNameSnapshot:
    """A name whose addresses are targets."""

    host: str
    port: int
    addresses: tuple[str, ...]
    asked_at: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class UpstreamSnapshot:
    """An upstream: `pass` while all targets are in rotation, `fail` if none is healthy or its breaker refuses all."""

    status: Status
    breaker: BreakerSnapshot
    targets: tuple[TargetSnapshot, ...]
    names: tuple[HostNameSnapshot, ...] = ()
    concurrency: ConcurrencyState = ConcurrencyState()  # noqa: RUF009 - frozen

    @classmethod
    def of(cls, upstream: Upstream, now: float, names: Iterable[HostName] = ()) -> "UpstreamSnapshot":
        """Look at an upstream, and at the `names` that its targets come from."""
        breaker = BreakerSnapshot.of(upstream.breaker, now)
        targets = tuple(TargetSnapshot.of(upstream, target, now) for target in upstream.targets)
        asked = tuple(
            HostNameSnapshot(name.host, name.port, name.addresses, name.asked_at, name.error)
            for name in names
            if not name.is_address
        )
        is_whole = all(target.is_in_rotation for target in targets) and not any(name.error for name in asked)
        status: Status = "pass"
        if not any(target.is_healthy for target in targets) or upstream.breaker.refuses(now):
            status = "fail"
        elif not is_whole or breaker.state is not State.CLOSED:
            status = "warn"
        return cls(status, breaker, targets, asked, upstream.concurrency)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "UpstreamSnapshot":
        """Build the report that `asdict` and JSON have made this of."""
        targets = tuple(map(TargetSnapshot.from_state, state["targets"]))
        names = tuple(HostNameSnapshot(**{**name, "addresses": tuple(name["addresses"])}) for name in state["names"])
        concurrency = ConcurrencyState(**state["concurrency"])
        return cls(state["status"], BreakerSnapshot.from_state(state["breaker"]), targets, names, concurrency)


@dataclass(slots=True)
class WorkerSnapshot:
    """One worker, or several together.

    `is_over` marks a worker that serves no more: its counters count, and its breakers and targets say nothing of the
    present.
    """

    worker: str
    recorder: Recorder
    upstreams: dict[str, UpstreamSnapshot] = field(default_factory=dict)
    buckets: int = 0
    bucket_limit: int = 0
    overflowed: int = 0
    limiter: LimiterState = LimiterState()  # noqa: RUF009 - frozen
    client_store_error: str | None = None  # why the client store cannot be used, while it cannot
    histories: dict[str, list[TransitionRecord]] = field(default_factory=dict)  # by upstream, the oldest move first
    is_over: bool = False
    lag: float = 0.0  # seconds by which the event loop runs late
    tasks: int = 0  # that the event loop has
    configuration: ReloadState = field(default_factory=ReloadState)
    resources: list[ResourceState] = field(default_factory=list)

    @classmethod
    def blank(cls, worker: str = "", percentiles: Sequence[float] = ()) -> "WorkerSnapshot":
        """Return a report of nothing, to be updated or merged into."""
        recorder = Recorder((), (), (), percentiles, _EVER)
        recorder.routes.clear()
        return cls(worker, recorder)

    def state(self, since: int = 0) -> dict[str, Any]:
        """Return the report as JSON can hold it; see `describing`."""
        return completed(self.describing(since, {}))

    def describing(self, since: int, known: Mapping[str, UpstreamSnapshot]) -> Steps[dict[str, Any]]:
        """Return the report as JSON can hold it, without what is known: see `Recorder.describing`.

        Upstreams that are as in `known` are left out.
        """
        recorder = yield from self.recorder.describing(since)
        changed = [(name, upstream) for name, upstream in self.upstreams.items() if known.get(name) != upstream]
        yield
        upstreams = yield from each(changed, lambda _, upstream: asdict(upstream))
        histories = yield from each(
            self.histories.items(),
            lambda _, records: [asdict(record) for record in records if int(record.at / SLICE) >= since],
        )
        return {
            "recorder": recorder,
            "upstreams": upstreams,
            "gone": [name for name in known if name not in self.upstreams],
            "buckets": self.buckets,
            "bucket_limit": self.bucket_limit,
            "overflowed": self.overflowed,
            "limiter": asdict(self.limiter),
            "client_trouble": self.client_store_error,
            "histories": {name: records for name, records in histories.items() if records},
            "lag": self.lag,
            "tasks": self.tasks,
            "configuration": asdict(self.configuration),
            "resources": [asdict(resource) for resource in self.resources],
        }

    def update(self, state: Mapping[str, Any]) -> None:
        """Become what another report's `state` says, given every state of it since its first."""
        completed(self.updating(state))

    def updating(self, state: Mapping[str, Any]) -> Steps[None]:
        """Do the same in steps."""
        yield from self.recorder.updating(state["recorder"])
        self.upstreams |= yield from each(state["upstreams"].items(), lambda _, one: UpstreamSnapshot.from_state(one))
        for name in state["gone"]:
            self.upstreams.pop(name, None)
        self.buckets, self.bucket_limit = state["buckets"], state["bucket_limit"]
        self.overflowed = state["overflowed"]
        self.limiter = LimiterState(**state["limiter"])
        self.client_store_error = state["client_trouble"]
        self.lag = state["lag"]
        self.tasks = state["tasks"]
        self.configuration = ReloadState.from_state(state["configuration"])
        self.resources = [ResourceState(**resource) for resource in state["resources"]]
        for name, records in state["histories"].items():
            self._note(name, [_record(record) for record in records])

    def _note(self, name: str, records: list[TransitionRecord]) -> None:
        """Append the moves that have not been told before."""
        known = self.histories.setdefault(name, [])
        cached = {_identity(record) for record in known}
        known += [record for record in records if _identity(record) not in cached]
        self.histories[name] = last_transitions(known, len({record.worker for record in known}))

    def end(self) -> None:
        """Keep what was counted and drop what was going on: the worker has ended."""
        self.is_over = True
        self.recorder.in_flight = self.buckets = self.tasks = 0
        self.lag = 0.0
        self.resources = [replace(resource, limit=0, in_use=0) for resource in self.resources]


def oldest_changed(now: float) -> int:
    """Return the number of the first slice that may change after `now`."""
    return max(0, int(now / SLICE) - 1)


def transitions_of(upstream: Upstream) -> list[TransitionRecord]:
    """Return the last moves of an upstream's breaker and of its targets' breakers, the oldest first."""
    theirs = (
        (record, target.url)
        for target in upstream.targets
        if target.breaker is not None
        for record in target.breaker.records
    )
    latest = heapq.nlargest(MAX_RECORDS, theirs, key=lambda cached: cached[0].at)
    transitions = [*upstream.breaker.records, *(replace(record, target_url=url) for record, url in latest)]
    return sorted(transitions, key=_moment)


def last_transitions(transitions: Iterable[TransitionRecord], workers: int) -> list[TransitionRecord]:
    """Return the last of the moves, the oldest first.

    For each worker those are KEPT_RECORDS of the upstream's breaker and as many of all its targets': one that moves
    often hides no move of the upstream's, and targets that come and go take no more room.
    """
    most = MAX_RECORDS * max(1, workers)
    by_time = sorted(transitions, key=_moment)
    own = [transition for transition in by_time if transition.target_url is None]
    theirs = [transition for transition in by_time if transition.target_url is not None]
    return sorted(own[-most:] + theirs[-most:], key=_moment)


def _moment(record: TransitionRecord) -> float:
    return record.at


def _identity(record: TransitionRecord) -> tuple[str, str | None, int, float]:
    """Tell one move from others: a target may get a new breaker, which counts from 1 again."""
    return record.worker, record.target_url, record.number, record.at


def _record(state: Mapping[str, Any]) -> TransitionRecord:
    """Build the record that `asdict` and JSON have made this of."""
    own = {
        "source": State(state["source"]),
        "target": State(state["target"]),
        "mode": Mode(state["mode"]),
        "counts": Counts(*state["counts"]),
        "failures": tuple(FailedCall(**failure) for failure in state["failures"]),
    }
    return TransitionRecord(**{**state, **own})
