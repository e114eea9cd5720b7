"""The series that a gateway produces while something is wrong, as input for promtool: one table of all alerts."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from api_gateway.eventloop.steps import run_at_once
from api_gateway.metrics import Recorder
from api_gateway.models import LimiterState
from api_gateway.reload.outcome import ReloadState
from api_gateway.reporting.merge import merge
from api_gateway.reporting.prometheus import MAX_DETAILED, PrometheusExposition
from api_gateway.reporting.snapshot import UpstreamSnapshot, WorkerSnapshot
from api_gateway.resilience.breaker_policy import BreakerPolicy
from api_gateway.resilience.fair_shares import ResourceState
from api_gateway.upstreams.upstream import Upstream
from tests.unit.test_metrics import START, TIERS, ended, people, trip

MINUTES, BEGIN = 40, 3  # of the simulation, and when something goes wrong
_SAMPLE = re.compile(r"^((?:gateway|process)_\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class Worker:
    """A worker whose figures a case changes."""

    def __init__(self, name: str, *, is_many: bool) -> None:
        routes = ["users", *(f"route-{number}" for number in range(MAX_DETAILED * is_many))]
        lines: Counter[str] = Counter({"stdout": 0, "stderr": 0})  # as of `Output`
        self.recorder = Recorder(routes, ["people"], TIERS, [50], START, dropped_lines=lines)
        self.upstream = people(BreakerPolicy(failure_threshold=1))
        for target in self.upstream.targets:
            target.is_healthy = True
        process = {"process_open_fds": 300.0, "process_max_fds": 1000.0}
        resources = [ResourceState("connections", None, 100, 10, 0)]
        self.snapshot = WorkerSnapshot(name, self.recorder, process=process, resources=resources)

    def seen(self) -> WorkerSnapshot:
        """Return what is reported of the worker now."""
        return replace(self.snapshot, upstreams={"people": UpstreamSnapshot.of(self.upstream, START)})


def _requests(count: int, **fields: Any) -> Callable[[Worker, int], None]:
    def act(worker: Worker, _: int) -> None:
        for _number in range(count):
            worker.recorder.observe(ended(**fields))

    return act


def _once(act: Callable[[Worker], object]) -> Callable[[Worker, int], None]:
    def first(worker: Worker, minute: int) -> None:
        if minute == BEGIN:
            act(worker)

    return first


def _sets(**figures: Any) -> Callable[[Worker, int], None]:
    def act(worker: Worker) -> None:
        worker.snapshot = replace(worker.snapshot, **figures)

    return _once(act)


def _unhealthy(upstream: Upstream, count: int) -> None:
    for target in upstream.targets[:count]:
        target.is_healthy = False


def _count(name: str, label: Any, *, lasting: bool = False) -> Callable[[Worker, int], None]:
    def act(worker: Worker) -> None:
        getattr(worker.recorder, name)[label] += 1

    return (lambda worker, _: act(worker)) if lasting else _once(act)


def _attempts(worker: Worker, _: int) -> None:
    worker.recorder.observe_attempt("people", "5xx", 0.1, START)


def _shed(worker: Worker, _: int) -> None:
    worker.recorder.shed["people"]["FREE"] += 1


# By alert, several after a colon: what goes wrong in one worker, each minute from `BEGIN` on.
WRONG: Mapping[str, Callable[[Worker, int], None]] = {
    "GatewayBreakerOpen": _once(lambda worker: trip(worker.upstream)),
    "GatewayNoHealthyTarget": _once(lambda worker: _unhealthy(worker.upstream, 2)),
    "GatewayTargetUnhealthy": _once(lambda worker: _unhealthy(worker.upstream, 1)),
    "GatewayUpstreamFailures": _attempts,
    "GatewayErrors": _requests(1, status=503, source="gateway"),
    "GatewaySlow": _requests(5, seconds=2.9),
    "GatewayTierLimited": _requests(5, allowed=False, status=429, source="gateway"),
    "GatewayStoreUnavailable": _sets(limiter=LimiterState("local_share")),
    "GatewayStoreEvictsKeys": _sets(limiter=LimiterState("store", evicted_keys=5)),
    "GatewayShedsLoad": _shed,
    "GatewayEventLoopLag": _sets(lag=0.2),
    "GatewayResourceAlmostExhausted": _sets(resources=[ResourceState("connections", None, 100, 95, 0)]),
    "GatewayFileDescriptorsAlmostExhausted": _sets(process={"process_open_fds": 900.0, "process_max_fds": 1000.0}),
    "GatewayReloadFailed": _sets(configuration=ReloadState(problems=("line 3: wrong",))),
    "GatewayStateNotWritten": _sets(unwritten={"quotas": "disk is full", "usage": None}),
    "GatewayDefect: connection": _count("illegal_events", "data"),
    "GatewayDefect: exchange": _count("illegal_exchange_events", ("admitting", "data")),
    "GatewayOutputLost": _count("dropped_lines", "stdout"),
    "GatewayTracesLost": _count("trace_spans", "failed", lasting=True),
}


def scrapes(act: Callable[[Worker, int], None] | None, *, is_many: bool, workers: int) -> Iterator[dict[str, str]]:
    """Yield the series and values of a scrape for each minute; all workers but one have light traffic only."""
    crowd = [Worker(str(number), is_many=is_many) for number in range(workers)]
    for minute in range(MINUTES):
        for worker in crowd:
            worker.recorder.observe(ended())
            worker.recorder.observe_attempt("people", "2xx", 0.01, START)
            worker.recorder.trace_spans["exported"] += 1
        if act is not None and minute >= BEGIN:
            act(crowd[0], minute)
        seen = [worker.seen() for worker in crowd]
        whole = seen[0] if workers == 1 else replace(merge(seen), configuration=seen[0].configuration)
        text, _ = run_at_once(PrometheusExposition(whole, "1.0").render("text/plain"))
        yield {
            f'{name}{{job="gateway",instance="a"{labels and ","}{labels}}}': value
            for name, labels, value in _SAMPLE.findall(text.decode())
        }


def input_series(found: list[dict[str, str]], names: frozenset[str]) -> list[dict[str, str]]:
    """Return promtool's input of the families `names`; a series that a scrape does not have is `_` there."""
    series = dict.fromkeys(one for scrape in found for one in scrape if one.partition("{")[0] in names)
    return [{"series": one, "values": " ".join(scrape.get(one, "_") for scrape in found)} for one in series]
