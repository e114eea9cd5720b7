"""Snapshots: the figures and states of one worker as values, for merging and for views.

Times are monotonic seconds, on the one clock of all workers of a machine. Long because it has all kinds of snapshots.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.eventloop.steps import Steps, each, run_at_once
from api_gateway.metrics import Recorder
from api_gateway.models import LimiterState
from api_gateway.observability.latency_series import SLICE
from api_gateway.reload.outcome import ReloadState
from api_gateway.reporting.issuer_snapshot import IssuerSnapshot
from api_gateway.reporting.process_figures import figures_at_end
from api_gateway.reporting.tls_snapshot import WITHOUT_TLS, TlsSnapshot
from api_gateway.reporting.traffic_history import Point
from api_gateway.reporting.transitions import identity_of, last_transitions, record_from_state
from api_gateway.resilience.breaker_history import TransitionRecord
from api_gateway.resilience.breaker_policy import BreakerPolicy, Mode, State
from api_gateway.resilience.concurrency_limit import ConcurrencyState
from api_gateway.resilience.fair_shares import ResourceState
from api_gateway.upstreams.dns import HostName
from api_gateway.upstreams.target import CheckRecord, Target
from api_gateway.upstreams.upstream import Upstream

Status = Literal["pass", "warn", "fail"]

_EVER = float("inf")


@dataclass(frozen=True, slots=True)
class BreakerSnapshot:
    """A circuit breaker. `workers` has its state in each worker if there are several.

    `one_principal`: the breaker stays CLOSED because all failures are one principal's, and others call, too.
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
        """Return the snapshot of a breaker, after transitions that are due at `now`."""
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
        """Return the snapshot from its state, as `asdict` and JSON represent it."""
        workers = {name: State(word) for name, word in state["workers"].items()}
        policy = BreakerPolicy(**state["policy"])
        own = {"state": State(state["state"]), "mode": Mode(state["mode"]), "policy": policy, "workers": workers}
        return cls(**{**state, **own})


@dataclass(frozen=True, slots=True)
class OutlierSnapshot:
    """Outlier detection of a target.

    `withheld` is the number of consecutive failures that did not count, because the target could not be ejected.
    """

    state: State
    is_ejected: bool
    withheld: int
    consecutive_failures: int
    next_probe_at: float | None
    opened_at: float | None
    opened_cause: str
    ejections_total: int
    one_principal: bool = False  # as in `BreakerSnapshot`

    @classmethod
    def of(cls, upstream: Upstream, target: Target, now: float) -> "OutlierSnapshot | None":
        """Return the snapshot of a target's breaker; None if the target has none."""
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
    """A target of an upstream. `share`, 0 to 1, is how often it is a candidate: below 1 during slow start.

    `response_time` is the mean time to the head of its last responses in seconds, None without one.
    """

    url: str
    is_healthy: bool
    in_flight: int
    named: str | None = None
    share: float = 1.0
    checks: CheckRecord = field(default_factory=CheckRecord)
    passive: OutlierSnapshot | None = None
    response_time: float | None = None

    @classmethod
    def of(cls, upstream: Upstream, target: Target, now: float) -> "TargetSnapshot":
        """Return the snapshot of a target."""
        return cls(
            url=target.url,
            is_healthy=target.is_healthy,
            in_flight=target.in_flight,
            named=target.named,
            share=upstream.outliers.share(target, now),
            checks=replace(target.checks),
            passive=OutlierSnapshot.of(upstream, target, now),
            response_time=target.response_time,
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TargetSnapshot":
        """Return the snapshot from its state, as `asdict` and JSON represent it."""
        passive = state["passive"] and OutlierSnapshot(
            **{**state["passive"], "state": State(state["passive"]["state"])}
        )
        return cls(**{**state, "checks": CheckRecord(**state["checks"]), "passive": passive})

    @property
    def key(self) -> str:
        """Identifier of the target within its upstream, with the name: two names may have one address."""
        return self.url if self.named is None else f"{self.named} ({self.url})"

    @property
    def health(self) -> bool | None:
        """Outcome of the health checks; None before the first result."""
        return None if self.is_healthy and self.checks.at is None else self.is_healthy

    @property
    def is_in_rotation(self) -> bool:
        """Return whether the target is healthy and not ejected."""
        return self.is_healthy and (self.passive is None or not self.passive.is_ejected)


@dataclass(frozen=True, slots=True)
class HostNameSnapshot:
    """A host name whose addresses are targets."""

    host: str
    port: int
    addresses: tuple[str, ...]
    asked_at: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class UpstreamSnapshot:
    """An upstream with its breaker and targets.

    `pass`: all targets are in rotation, all names are resolved, and the breaker is CLOSED. `fail`: no target is
    healthy, or the breaker rejects all requests. Otherwise `warn`.
    """

    status: Status
    breaker: BreakerSnapshot
    targets: tuple[TargetSnapshot, ...]
    names: tuple[HostNameSnapshot, ...] = ()
    concurrency: ConcurrencyState = ConcurrencyState()  # noqa: RUF009 - frozen

    @classmethod
    def of(cls, upstream: Upstream, now: float, names: Iterable[HostName] = ()) -> "UpstreamSnapshot":
        """Return the snapshot of an upstream; `names` are those that its targets were resolved from."""
        upstream.outliers.advance(now)
        breaker = BreakerSnapshot.of(upstream.breaker, now)
        targets = tuple(TargetSnapshot.of(upstream, target, now) for target in upstream.targets)
        resolved = tuple(
            HostNameSnapshot(name.host, name.port, name.addresses, name.asked_at, name.error)
            for name in names
            if not name.is_address
        )
        is_whole = all(target.is_in_rotation for target in targets) and not any(name.error for name in resolved)
        status: Status = "pass"
        if not any(target.is_healthy for target in targets) or upstream.breaker.refuses(now):
            status = "fail"
        elif not is_whole or breaker.state is not State.CLOSED:
            status = "warn"
        return cls(status, breaker, targets, resolved, upstream.concurrency)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "UpstreamSnapshot":
        """Return the snapshot from its state, as `asdict` and JSON represent it."""
        targets = tuple(map(TargetSnapshot.from_state, state["targets"]))
        names = tuple(HostNameSnapshot(**{**name, "addresses": tuple(name["addresses"])}) for name in state["names"])
        concurrency = ConcurrencyState(**state["concurrency"])
        return cls(state["status"], BreakerSnapshot.from_state(state["breaker"]), targets, names, concurrency)


@dataclass(slots=True)
class WorkerSnapshot:
    """One worker, or several merged.

    Two states: the worker serves, or it has ended (`is_over`; `end` is the only transition). Of a worker that has
    ended, the counts remain valid, while its breakers and targets are out of date.
    """

    worker: str
    recorder: Recorder
    upstreams: dict[str, UpstreamSnapshot] = field(default_factory=dict)
    buckets: int = 0
    bucket_limit: int = 0
    overflowed: int = 0
    limiter: LimiterState = LimiterState()  # noqa: RUF009 - frozen
    client_store_error: str | None = None  # why the client store is unavailable
    unwritten: dict[str, str | None] = field(default_factory=dict)  # see `unwritten_state`
    histories: dict[str, list[TransitionRecord]] = field(default_factory=dict)  # by upstream, oldest first
    is_over: bool = False
    lag: float = 0.0  # seconds of event loop lag
    tasks: int = 0  # of the event loop
    configuration: ReloadState = field(default_factory=ReloadState)
    resources: list[ResourceState] = field(default_factory=list)
    process: dict[str, float] = field(default_factory=dict)  # see `process_figures`
    points: list[Point] = field(default_factory=list)  # the traffic of the last hour, of all workers
    tls: TlsSnapshot = WITHOUT_TLS
    issuers: dict[str, IssuerSnapshot] = field(default_factory=dict)  # of tokens, by name
    history: dict[str, int] = field(default_factory=dict)  # records of requests by result, and their `bytes`

    @classmethod
    def blank(cls, worker: str = "", percentiles: Sequence[float] = ()) -> "WorkerSnapshot":
        """Return an empty snapshot, to be updated or merged into."""
        recorder = Recorder((), (), (), percentiles, _EVER)
        recorder.routes.clear()
        return cls(worker, recorder)

    def state(self, since: int = 0) -> dict[str, Any]:
        """Return the state as JSON values, with slices from number `since` on; see `state_in_steps`."""
        return run_at_once(self.state_in_steps(since, {}))

    def state_in_steps(self, since: int, known: Mapping[str, UpstreamSnapshot]) -> Steps[dict[str, Any]]:
        """Return the state as JSON values, in steps, without what the receiver knows.

        Omitted are slices and transitions before slice number `since` (see `Recorder.state_in_steps`), and upstreams
        that are equal to those in `known`.
        """
        recorder = yield from self.recorder.state_in_steps(since)
        changed = [(name, upstream) for name, upstream in self.upstreams.items() if known.get(name) != upstream]
        yield
        upstreams = yield from each(changed, lambda _, upstream: asdict(upstream))
        histories = yield from each(
            self.histories.items(),
            lambda _, records: [asdict(record) for record in records if int(record.at / SLICE) >= since],
        )
        resources = yield from each(enumerate(self.resources), lambda _, resource: asdict(resource))
        return {
            "recorder": recorder,
            "upstreams": upstreams,
            "gone": [name for name in known if name not in self.upstreams],
            "buckets": self.buckets,
            "bucket_limit": self.bucket_limit,
            "overflowed": self.overflowed,
            "limiter": asdict(self.limiter),
            "client_store_error": self.client_store_error,
            "unwritten": self.unwritten,
            "histories": {name: records for name, records in histories.items() if records},
            "lag": self.lag,
            "tasks": self.tasks,
            "configuration": self.configuration.state(),
            "resources": list(resources.values()),
            "process": self.process,
            "points": self.points,
            "tls": asdict(self.tls),
            "issuers": {name: asdict(issuer) for name, issuer in self.issuers.items()},
            "history": self.history,
        }

    def update(self, state: Mapping[str, Any]) -> None:
        """Apply a `state` of another snapshot. Every state since its first must have been applied, in order."""
        run_at_once(self.update_in_steps(state))

    def update_in_steps(self, state: Mapping[str, Any]) -> Steps[None]:
        """Apply a `state` as `update` does, in steps."""
        yield from self.recorder.update_in_steps(state["recorder"])
        self.upstreams |= yield from each(state["upstreams"].items(), lambda _, one: UpstreamSnapshot.from_state(one))
        for name in state["gone"]:
            self.upstreams.pop(name, None)
        self.buckets, self.bucket_limit = state["buckets"], state["bucket_limit"]
        self.overflowed = state["overflowed"]
        self.limiter = LimiterState(**state["limiter"])
        self.client_store_error = state["client_store_error"]
        self.unwritten = state["unwritten"]
        self.lag = state["lag"]
        self.tasks = state["tasks"]
        self.process = state["process"]
        self.points = state["points"]
        self.tls = TlsSnapshot.from_state(state["tls"])
        self.issuers = {name: IssuerSnapshot(**issuer) for name, issuer in state["issuers"].items()}
        self.history = state["history"]
        self.configuration = ReloadState.from_state(state["configuration"])
        resources = yield from each(enumerate(state["resources"]), lambda _, resource: ResourceState(**resource))
        self.resources = list(resources.values())
        for name, records in state["histories"].items():
            self._note(name, [record_from_state(record) for record in records])

    def _note(self, name: str, records: list[TransitionRecord]) -> None:
        """Append the transitions that are not known yet."""
        known = self.histories.setdefault(name, [])
        identities = {identity_of(record) for record in known}
        known += [record for record in records if identity_of(record) not in identities]
        self.histories[name] = last_transitions(known, len({record.worker for record in known}))

    def end(self) -> None:
        """Mark the worker as ended: keep its counts, and clear current figures."""
        self.is_over = True
        self.buckets = self.tasks = 0
        self.recorder.end()
        self.lag = 0.0
        self.process = figures_at_end(self.process)
        self.history = dict.fromkeys(self.history, 0)
        self.resources = [replace(resource, limit=0, in_use=0, fullest=0.0) for resource in self.resources]


def oldest_changed(now: float) -> int:
    """Return the number of the first slice that may change after `now`."""
    return max(0, int(now / SLICE) - 1)
