"""The merged snapshots of several workers equal that of one worker that had handled everything."""

import json
import random
from dataclasses import replace
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from api_gateway.circuit_breaker import MAX_RECORDS, CircuitBreaker
from api_gateway.eventloop.steps import run_at_once
from api_gateway.metrics import Recorder
from api_gateway.models import Client, Decision, Exchange, LimiterState, Outcome, Quota
from api_gateway.observability.latency_series import SLICE
from api_gateway.reporting.issuer_snapshot import IssuerSnapshot
from api_gateway.reporting.merge import merge
from api_gateway.reporting.metrics_view import metrics_view
from api_gateway.reporting.prometheus import PrometheusExposition
from api_gateway.reporting.snapshot import (
    BreakerSnapshot,
    HostNameSnapshot,
    OutlierSnapshot,
    UpstreamSnapshot,
    WorkerSnapshot,
    oldest_changed,
)
from api_gateway.reporting.transitions import transitions_of
from api_gateway.resilience.breaker_policy import BreakerPolicy, Mode, State
from api_gateway.resilience.concurrency_limit import ConcurrencyLimit, ConcurrencyState
from api_gateway.resilience.fair_shares import ResourceState
from api_gateway.upstreams.dns import HostName
from api_gateway.upstreams.load_balancing import round_robin
from api_gateway.upstreams.outlier_detection import OutlierDetector
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Upstream

START = 1000.0
FREE = Quota.per_second("FREE", 1, 10)
PERCENTILES = (50, 99)
KINDS: dict[str, dict[str, Any]] = {
    "fine": {"status": 200, "source": "upstream", "route": "users"},
    "failed": {"status": 502, "source": "gateway", "route": "orders", "reason": "upstream_reset"},
    "broken": {"status": 500, "source": "upstream", "route": "orders"},
    "limited": {"status": 429, "source": "gateway", "route": "users", "reason": "rate_limited"},
    "lost": {"status": 404, "source": "gateway", "route": None, "reason": "no_route"},
}


def recorder() -> Recorder:
    return Recorder(["users", "orders"], ["people"], ["FREE"], PERCENTILES, START)


def exchange(kind: str, seconds: float, at: float) -> Exchange:
    made = Exchange("id", "GET", "/api/x", "192.0.2.7", at - seconds, Client("a", "client:a", FREE, "default"))
    made.finished, made.sent_at = at, made.started if KINDS[kind]["source"] == "upstream" else None
    if kind != "lost":
        made.decision = Decision("client:a", FREE, kind != "limited", 0, 0, 0)
    for name, value in KINDS[kind].items():
        setattr(made, name, value)
    return made


def count(one: Recorder, kind: str, seconds: float, at: float) -> None:
    one.observe(exchange(kind, seconds, at))
    if KINDS[kind]["source"] == "upstream":
        one.observe_attempt("people", f"{KINDS[kind]['status'] // 100}xx", seconds, at)


def shown(report: WorkerSnapshot, now: float) -> tuple[Any, ...]:
    """Return all that is made of a recorder."""
    found = report.recorder
    view = run_at_once(
        metrics_view(found, now, report.upstreams, buckets=0, bucket_limit=0, overflowed=0, limiter=LimiterState())
    )
    text, _ = run_at_once(PrometheusExposition(WorkerSnapshot("", found, report.upstreams), "1").render("text/plain"))
    return view.model_dump(), sorted(text.decode().splitlines())


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    travelled: dict[str, Any] = json.loads(json.dumps(state))
    return travelled


# Durations are sums of powers of two, so that adding them in another order gives the same.
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 2),  # which worker
        st.sampled_from(list(KINDS)),
        st.integers(1, 4096).map(lambda ticks: ticks / 1024),
        st.one_of(st.just(0.0), st.floats(0, 3), st.floats(0, 700)),  # seconds since the event before
        st.sampled_from(["", "", "", "report", "die"]),  # what the worker does after it
    ),
    max_size=40,
)


@given(EVENTS, st.floats(0, 400))
@example([(0, "fine", 0.5, 0.0, ""), (1, "fine", 0.5, 300.0, "report"), (0, "fine", 0.5, 0.0, "die")], 0.0)
@example([(0, "fine", 0.5, 4.999, "report"), (0, "fine", 0.25, 0.002, "report")], 0.0)
def test_the_sum_of_the_workers_is_what_one_would_have_counted(
    events: list[tuple[int, str, float, float, str]], rest: float
) -> None:
    whole, parts = recorder(), [recorder() for _ in range(3)]
    mirrors, since = [WorkerSnapshot.blank(str(name)) for name in range(3)], [0, 0, 0]
    gone, now = merge([]), START

    def report(worker: int) -> None:
        state = WorkerSnapshot("", parts[worker]).state(since[worker])
        since[worker] = oldest_changed(now)
        mirrors[worker].update(through_json(state))

    for worker, kind, seconds, pause, then in events:
        now += pause
        count(whole, kind, seconds, now)
        count(parts[worker], kind, seconds, now)
        if then:
            report(worker)
        if then == "die":
            mirrors[worker].end()
            gone = merge([gone, mirrors[worker]])
            parts[worker], mirrors[worker], since[worker] = recorder(), WorkerSnapshot.blank(str(worker)), 0
    now += rest
    for worker in range(3):
        report(worker)
    told = WorkerSnapshot.blank(percentiles=PERCENTILES)
    told.update(through_json(merge([gone, *mirrors]).state()))
    assert shown(told, now) == shown(WorkerSnapshot("", whole), now)


@given(EVENTS)
def test_a_recorder_that_was_put_together_can_go_on_counting(
    events: list[tuple[int, str, float, float, str]],
) -> None:
    whole, moved, now = recorder(), recorder(), START
    for _, kind, seconds, pause, then in events:
        now += pause
        count(whole, kind, seconds, now)
        count(moved, kind, seconds, now)
        if then:
            again = recorder()
            again.update(through_json(moved.state()))
            moved = again
    assert shown(WorkerSnapshot("", moved), now) == shown(WorkerSnapshot("", whole), now)


def test_a_report_between_two_holds_what_has_changed_only() -> None:
    one = recorder()
    for step in range(50):
        count(one, "fine", 0.5, START + step * SLICE)
    now = START + 49 * SLICE
    assert len(one.state()["routes"]["users"]["slices"]) == 50
    assert len(one.state(oldest_changed(now))["routes"]["users"]["slices"]) == 2


def test_what_has_ended_keeps_its_counts_and_runs_nothing() -> None:
    one = WorkerSnapshot("1", recorder(), buckets=5, overflowed=2)
    count(one.recorder, "fine", 0.5, START)
    one.recorder.in_flight = 3
    one.end()
    both = merge([merge([]), one])
    assert (both.recorder.in_flight, both.buckets) == (0, 0)
    assert (both.recorder.requests.total(), both.overflowed) == (1, 2)


# Breakers and targets


def upstream(*, failures: int = 0, at: float = START, healthy: int = 2) -> Upstream:
    breaker = CircuitBreaker(BreakerPolicy(failure_threshold=3, recovery_timeout=10), START)
    for _ in range(failures):
        ticket = breaker.admit(at)
        assert ticket is not None
        breaker.settle(ticket, Outcome.FAILURE, at, "status 500")
    targets = [Target(f"http://127.0.0.1:{port}", in_flight=1) for port in (9001, 9002)]
    for target in targets[healthy:]:
        target.is_healthy = False
        target.checks.note(at, is_good=False, finding="refused")
    return Upstream("people", targets, breaker, round_robin)


def report_of(worker: str, now: float, **state: Any) -> WorkerSnapshot:
    one = WorkerSnapshot(worker, recorder(), {"people": UpstreamSnapshot.of(upstream(**state), now)})
    other = WorkerSnapshot.blank(worker)
    other.update(through_json(one.state()))
    assert other.upstreams == one.upstreams, "nothing is lost on the way"
    return other


def test_of_states_the_worst_is_shown_and_counts_are_summed() -> None:
    now = START + 5
    workers = [
        report_of("1", now, failures=2, at=START + 4),
        report_of("2", now, failures=3, at=START + 2),
        report_of("3", now, failures=3, at=START + 1),
    ]
    breaker = merge(workers).upstreams["people"].breaker
    assert breaker == BreakerSnapshot(
        state=State.OPEN,
        since=START + 1,
        consecutive_failures=2,
        window_calls=2,
        window_failures=2,
        window_slow=0,
        probes_in_flight=0,
        opened_total=2,
        rejected_total=0,
        slow_total=0,
        would_open_total=0,
        would_reject_total=0,
        mode=Mode.AUTO,
        ramp_share=None,
        next_probe_at=START + 11,
        opened_at=START + 2,
        opened_cause="3 consecutive failures; last: status 500",
        policy=BreakerPolicy(failure_threshold=3, recovery_timeout=10),
        workers={"1": State.CLOSED, "2": State.OPEN, "3": State.OPEN},
    )


def test_half_open_is_worse_than_closed_and_better_than_open() -> None:
    now = START + 10
    half, closed = report_of("1", now, failures=3), report_of("2", now)
    assert merge([closed, half]).upstreams["people"].breaker.state is State.HALF_OPEN
    assert merge([closed, half]).upstreams["people"].status == "warn"
    still_open = report_of("3", now, failures=3, at=START + 5)
    assert merge([half, closed, still_open]).upstreams["people"].breaker.state is State.OPEN


def test_a_target_is_healthy_when_every_worker_finds_it_so() -> None:
    both = merge([report_of("1", START), report_of("2", START, healthy=1)]).upstreams["people"]
    assert [(target.is_healthy, target.in_flight, target.checks.finding) for target in both.targets] == [
        (True, 2, None),
        (False, 2, "refused"),
    ]
    assert both.status == "warn"


def ejecting(worker: str, now: float, *, failures: int, names: tuple[HostNameSnapshot, ...] = ()) -> WorkerSnapshot:
    """Return the report of a worker on whose first target so many attempts have failed; three eject it."""
    policy = BreakerPolicy(failure_threshold=3, recovery_timeout=10)
    outliers = OutlierDetector(make_breaker=lambda at: CircuitBreaker(policy, at))
    whole = CircuitBreaker(BreakerPolicy(failure_threshold=100), START)
    people = Upstream(
        "people",
        [Target("http://127.0.0.1:9001"), Target("http://127.0.0.1:9002")],
        whole,
        round_robin,
        outliers=outliers,
    )
    for _ in range(failures):
        people.acquire(now, "", people.targets[1:]).release(now, Outcome.FAILURE)
    seen = replace(UpstreamSnapshot.of(people, now), names=names)
    one, other = WorkerSnapshot(worker, recorder(), {"people": seen}), WorkerSnapshot.blank(worker)
    other.update(through_json(one.state()))
    assert other.upstreams == one.upstreams, "nothing is lost on the way"
    return other


def test_a_targets_response_time_is_the_mean_of_those_workers_that_have_one() -> None:
    reports = [report_of(name, START) for name in "123"]
    for report, seconds in zip(reports, (0.1, None, 0.3), strict=True):
        people = report.upstreams["people"]
        report.upstreams["people"] = replace(
            people, targets=tuple(replace(target, response_time=seconds) for target in people.targets)
        )
    assert [target.response_time for target in merge(reports).upstreams["people"].targets] == [0.2, 0.2]
    assert [target.response_time for target in merge(reports[1:2]).upstreams["people"].targets] == [None, None]


def test_a_targets_response_time_follows_its_last_responses() -> None:
    target = Target("http://127.0.0.1:9001")
    target.note_response(3)
    assert target.response_time == 3
    for _ in range(200):
        target.note_response(1)
    assert target.response_time is not None
    assert 1 < target.response_time < 1.01


def test_a_target_is_ejected_when_any_worker_finds_it_so() -> None:
    now = START + 5
    workers = [ejecting("1", now, failures=2), ejecting("2", now - 1, failures=3), ejecting("3", now, failures=3)]
    merged = merge(workers).upstreams["people"]
    first, second = (target.passive for target in merged.targets)
    assert first == OutlierSnapshot(
        state=State.OPEN,
        is_ejected=True,
        withheld=0,
        consecutive_failures=0,
        next_probe_at=now + 9,
        opened_at=now - 1,
        opened_cause="3 consecutive failures",
        ejections_total=2,
    )
    assert second is not None
    assert (second.state, second.is_ejected, second.ejections_total) == (State.CLOSED, False, 0)
    assert (merged.status, merged.breaker.state) == ("warn", State.CLOSED)


def test_ejections_by_a_worker_that_has_ended_still_count() -> None:
    ended = ejecting("1", START, failures=3)
    ended.end()
    target = merge([ended, ejecting("1", START + 1, failures=1)]).upstreams["people"].targets[0]
    assert target.passive is not None
    assert (target.passive.is_ejected, target.passive.ejections_total) == (False, 1)


def test_a_name_that_any_worker_cannot_resolve_is_shown_with_its_error() -> None:
    fine = HostNameSnapshot("users.test", 80, ("10.0.0.1",), START, None)
    broken = replace(fine, error="no such host")
    reports = [ejecting(str(number), START, failures=0, names=(one,)) for number, one in enumerate((broken, fine))]
    assert merge(reports).upstreams["people"].names == (broken,)


def test_a_worker_that_has_ended_counts_and_has_no_say_in_the_state() -> None:
    ended = report_of("1", START + 1, failures=3)
    ended.end()
    breaker = merge([merge([merge([]), ended]), report_of("1", START + 1)]).upstreams["people"].breaker
    assert (breaker.state, breaker.opened_total, breaker.workers) == (State.CLOSED, 1, {"1": State.CLOSED})


def limited_report(worker: str, places: float, taken: int, shed: int, lag: float) -> WorkerSnapshot:
    """A worker with so many places, as another process gets to know it."""
    live, found = upstream(), recorder()
    live.limit = ConcurrencyLimit(places, source=random.Random(1))
    live.limit._slots.in_use = taken
    found.shed["people"]["FREE"] += shed
    found.shed["_gateway"]["FREE"] += 1
    other = WorkerSnapshot.blank(worker)
    told = WorkerSnapshot(worker, found, {"people": UpstreamSnapshot.of(live, START)}, lag=lag, tasks=int(lag * 100))
    other.update(through_json(told.state()))
    return other


def test_places_and_what_was_shed_are_summed_and_the_latest_loop_is_shown() -> None:
    both = merge([limited_report("1", 40, 7, 5, 0.01), limited_report("2", 30.5, 3, 2, 0.4)])
    assert both.upstreams["people"].concurrency == ConcurrencyState(70.5, 10)
    assert both.recorder.shed == {"people": {"FREE": 7}, "_gateway": {"FREE": 2}}
    assert (both.lag, both.tasks) == (0.4, 41)
    ended = limited_report("3", 100, 9, 4, 9.0)
    ended.end()
    after = merge([both, ended])
    assert after.upstreams["people"].concurrency == ConcurrencyState(70.5, 10)
    assert after.recorder.shed["people"] == {"FREE": 11}
    assert (after.lag, after.tasks) == (0.4, 41)


def test_without_a_limit_requests_in_flight_are_summed() -> None:
    both = merge([report_of("1", START), report_of("2", START)])
    assert both.upstreams["people"].concurrency == ConcurrencyState(None, 4)


def test_an_upstream_that_no_worker_has_any_more_is_not_shown() -> None:
    ended = report_of("1", START)
    ended.end()
    assert merge([ended, replace(report_of("1", START), upstreams={})]).upstreams == {}


def test_two_names_of_one_address_are_two_targets_and_two_ports_of_one_host_two_names() -> None:
    targets = [Target("http://10.0.0.1:80", named=f"http://{name}.test:80", address="10.0.0.1") for name in "ab"]
    targets[1].is_healthy = False
    targets[0].checks.note(START, is_good=True, finding="status 200")
    people = Upstream("people", targets, CircuitBreaker(BreakerPolicy(), START), round_robin)
    names = [HostName("http://a.test:80"), HostName("http://a.test:81")]
    for name in names:
        name.update(["10.0.0.1"], START)
    seen = UpstreamSnapshot.of(people, START, names)
    merged = merge([WorkerSnapshot(worker, recorder(), {"people": seen}) for worker in ("1", "2")]).upstreams["people"]
    found = [(target.key, target.is_healthy) for target in merged.targets]
    assert found == [("http://a.test:80 (http://10.0.0.1:80)", True), ("http://b.test:80 (http://10.0.0.1:80)", False)]
    assert [(name.host, name.port) for name in merged.names] == [("a.test", 80), ("a.test", 81)]
    text, _ = run_at_once(
        PrometheusExposition(WorkerSnapshot("", recorder(), {"people": merged}), "1.2.3").render("text/plain")
    )
    for key, is_healthy in found:
        assert f'gateway_upstream_healthy{{target="{key}",upstream="people"}} {float(is_healthy)}' in text.decode()


# Histories


def history_of(worker: str, moves: int, at: float = START) -> WorkerSnapshot:
    """Return the report of a worker whose breaker opened and half-opened by turns, so many moves in all."""
    breaker = CircuitBreaker(BreakerPolicy(failure_threshold=1, recovery_timeout=1), START)
    for number in range(moves):
        now = at + number
        ticket = breaker.admit(now)
        if ticket is not None and number % 2 == 0:
            breaker.settle(ticket, Outcome.FAILURE, now, "status 500", duration=0.5, route="users", request_id="r")
    return WorkerSnapshot(
        worker,
        recorder(),
        {"people": report_of(worker, at).upstreams["people"]},
        histories={"people": list(breaker.records)},
    )


def test_a_history_is_sent_completely_and_no_transition_twice() -> None:
    live = history_of("1", 9)
    mirror = WorkerSnapshot.blank("1")
    mirror.update(through_json(live.state()))
    assert mirror.histories == live.histories
    since = oldest_changed(live.histories["people"][-1].at)
    again = live.state(since)
    assert 0 < len(again["histories"]["people"]) <= len(live.histories["people"])
    mirror.update(through_json(again))
    assert mirror.histories == live.histories
    mirror.update(through_json(live.state(since + 10)))
    assert mirror.histories == live.histories


def test_the_histories_of_several_are_merged_by_time_and_say_whose_each_move_is() -> None:
    merged = merge([history_of("1", 5), history_of("2", 5, START + 0.5)])
    moves = merged.histories["people"]
    assert {move.worker for move in moves} == {"1", "2"}
    assert [move.at for move in moves] == sorted(move.at for move in moves)
    told = WorkerSnapshot.blank()
    told.update(through_json(merged.state()))
    assert told.histories == merged.histories


def test_the_moves_of_a_worker_that_has_ended_are_kept_up_to_a_bound() -> None:
    gone = merge([])
    for life in range(20):
        ended = history_of("1", 60, START + 100 * life)
        ended.end()
        gone = merge([gone, ended])
    moves = merge([gone, history_of("1", 2, START + 5000)]).histories["people"]
    assert len(moves) <= 3 * MAX_RECORDS
    assert moves[-1].at >= START + 5000
    assert moves[0].worker == "1"


def moving(breaker: CircuitBreaker, moves: int, at: float = START) -> None:
    """Open and half-open it by turns, once a second."""
    for number in range(moves):
        ticket = breaker.admit(at + number)
        if ticket is not None and number % 2 == 0:
            breaker.settle(ticket, Outcome.FAILURE, at + number, "status 500")


def with_targets(moves: int, target_moves: int) -> Upstream:
    """Return an upstream whose breaker has moved so often, and that of its first target."""
    policy = BreakerPolicy(failure_threshold=1, recovery_timeout=1)
    people = Upstream(
        "people",
        [Target("http://127.0.0.1:9001"), Target("http://127.0.0.1:9002")],
        CircuitBreaker(policy, START),
        round_robin,
        outliers=OutlierDetector(make_breaker=lambda at: CircuitBreaker(policy, at)),
    )
    moving(people.breaker, moves)
    breaker = people.targets[0].breaker
    assert breaker is not None
    moving(breaker, target_moves, START + 0.5)
    return people


def told_by(worker: str, people: Upstream) -> WorkerSnapshot:
    """Return what the supervisor knows of a worker."""
    seen = {"people": UpstreamSnapshot.of(people, START)}
    live, mirror = (
        WorkerSnapshot(worker, recorder(), seen, histories={"people": transitions_of(people)}),
        WorkerSnapshot.blank(worker),
    )
    mirror.update(through_json(live.state()))
    return mirror


def test_transitions_of_a_targets_breaker_are_listed_with_its_url() -> None:
    people = with_targets(2, 2)
    url = people.targets[0].url
    merged = merge([told_by("1", people), told_by("2", people)]).histories["people"]
    assert [(move.at, move.target_url) for move in merged if move.worker == "2"] == [
        (START, None),
        (START + 0.5, url),
        (START + 1, None),
        (START + 1.5, url),
    ]
    assert [move for move in merged if move.worker == "1"] == [
        replace(move, worker="1") for move in merged if move.worker == "2"
    ]


def test_the_first_move_of_a_targets_new_breaker_is_not_mistaken_for_that_of_the_old_one() -> None:
    people = with_targets(0, 1)
    mirror = told_by("1", people)
    target = people.targets[0]
    target.breaker = CircuitBreaker(people.breaker.policy, START)
    moving(target.breaker, 1, START + 60)
    mirror.update(through_json(WorkerSnapshot("1", recorder(), histories={"people": transitions_of(people)}).state()))
    assert [(move.number, move.at) for move in mirror.histories["people"]] == [(1, START + 0.5), (1, START + 60)]


def test_a_target_that_moves_often_hides_no_move_of_the_upstreams() -> None:
    merged = merge([told_by(worker, with_targets(3, 500)) for worker in ("1", "2")]).histories["people"]
    assert [move.target_url for move in merged].count(None) == 6
    assert len(merged) == 6 + 2 * MAX_RECORDS
    assert merged[-1].at > START + 490


def test_how_resources_stand_gets_to_other_processes_and_only_refusals_outlive_a_worker() -> None:
    def worker(name: str, in_use: int, refused: int) -> WorkerSnapshot:
        states = [
            ResourceState("connections", None, 10, in_use, refused),
            ResourceState("tunnels", "up", 4, in_use, refused),
        ]
        told, other = WorkerSnapshot(name, recorder(), resources=states), WorkerSnapshot.blank(name)
        other.update(json.loads(json.dumps(told.state())))
        assert other.resources == states
        return other

    one, ended = worker("1", 3, 1), worker("2", 4, 2)
    assert merge([one, ended]).resources == [
        ResourceState("connections", None, 20, 7, 3, fullest=0.4),
        ResourceState("tunnels", "up", 8, 7, 3, fullest=1.0),
    ]
    ended.end()
    assert merge([one, ended]).resources == [
        ResourceState("connections", None, 10, 3, 3, fullest=0.3),
        ResourceState("tunnels", "up", 4, 3, 3, fullest=0.75),
    ]


def test_the_keys_of_an_issuer_are_shown_as_the_worker_has_them_that_has_least() -> None:
    def worker(name: str, **issuers: IssuerSnapshot) -> WorkerSnapshot:
        told, other = WorkerSnapshot(name, recorder(), issuers=issuers), WorkerSnapshot.blank(name)
        other.update(json.loads(json.dumps(told.state())))
        assert other.issuers == issuers
        return other

    whole, stale = IssuerSnapshot(2, 50.0, None), IssuerSnapshot(1, 20.0, "timeout")
    workers = [worker("1", sso=whole, new=whole), worker("2", sso=stale, new=IssuerSnapshot(0, None, None))]
    for order in (workers, workers[::-1]):
        assert merge(order).issuers == {
            "sso": IssuerSnapshot(1, 20.0, "timeout"),
            "new": IssuerSnapshot(0, None, None),
        }
    workers[1].end()
    assert merge(workers).issuers == {"sso": whole, "new": whole}
