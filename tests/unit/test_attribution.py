"""The attribution table decides every end of an attempt in one way, and docs/circuit-breakers.md shows it.

`python -m tests.unit.test_attribution` writes the table in the page again. `tests/wire/test_attribution.py` has a test
on real sockets for each row.
"""

import itertools
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.errors import GatewayError
from api_gateway.models import Exchange, Outcome
from api_gateway.proxy.attribution import (
    ATTRIBUTIONS,
    MAX_CLIENT_PAUSE,
    Attribution,
    Cause,
    ClientProgress,
    ClientState,
    ResponsibleParty,
    attribution,
    attribution_table,
    cause_of,
    cause_of_deadline,
    outcome_of_abort,
)
from api_gateway.proxy.deadline import Deadline
from api_gateway.proxy.outcome_reporter import OutcomeReporter
from api_gateway.resilience.breaker_policy import BreakerPolicy
from api_gateway.transport.error_mapping import translate
from api_gateway.transport.local_resources import LocalResourcesExhausted
from api_gateway.upstreams.load_balancing import round_robin
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Attempt, Upstream
from tests.cases import each
from tests.kit import FakeClock

PAGE = Path(__file__).parents[2] / "docs" / "circuit-breakers.md"
BEGIN, END = "<!-- attribution: begin -->\n", "<!-- attribution: end -->"

PUNCTUAL = ClientProgress()
DELAYED = ClientProgress(waited=MAX_CLIENT_PAUSE)
SENDING = ClientProgress(has_sent_all=False)  # and the upstream does not read on
AWAITED = ClientProgress(has_sent_all=False, is_awaited=True, waited=0.1)
CLIENTS = (PUNCTUAL, DELAYED, SENDING, AWAITED)
SUCCESS, FAILURE, IGNORED = Outcome.SUCCESS, Outcome.FAILURE, Outcome.IGNORED

# The error of the transport; then the outcome before a head and after one, for a client in each of the four states
OUTCOMES: tuple[tuple[type[httpx.TransportError], tuple[Outcome, ...], tuple[Outcome, ...]], ...] = (
    (httpx.ReadError, (FAILURE, IGNORED, IGNORED, IGNORED), (FAILURE, SUCCESS, SUCCESS, SUCCESS)),
    (httpx.RemoteProtocolError, (FAILURE, IGNORED, IGNORED, IGNORED), (FAILURE, SUCCESS, SUCCESS, SUCCESS)),
    (httpx.ReadTimeout, (FAILURE, FAILURE, FAILURE, IGNORED), (FAILURE, FAILURE, FAILURE, SUCCESS)),
    (httpx.LocalProtocolError, (IGNORED,) * 4, (SUCCESS,) * 4),
    (httpx.ConnectError, (FAILURE,) * 4, (FAILURE,) * 4),
    (httpx.ConnectTimeout, (FAILURE,) * 4, (FAILURE,) * 4),
    (httpx.UnsupportedProtocol, (FAILURE,) * 4, (FAILURE,) * 4),
    (httpx.PoolTimeout, (IGNORED,) * 4, (IGNORED,) * 4),
    (LocalResourcesExhausted, (IGNORED,) * 4, (IGNORED,) * 4),
)
CASES = [
    pytest.param(error, client, has_head, outcome, id=f"{error.__name__}, {ClientState.of(client).name}, {has_head}")
    for error, *by_head in OUTCOMES
    for has_head, outcomes in zip((False, True), by_head, strict=True)
    for client, outcome in zip(CLIENTS, outcomes, strict=True)
]


def test_the_states_of_a_client() -> None:
    assert [ClientState.of(client) for client in CLIENTS] == [
        ClientState.PUNCTUAL,
        ClientState.DELAYED,
        ClientState.SENDING,
        ClientState.AWAITED,
    ]


def keys(row: Attribution) -> set[tuple[Cause, bool, ClientState]]:
    heads = (False, True) if row.phase.has_head is None else (row.phase.has_head,)
    return set(itertools.product([row.cause], heads, row.client.states))


def test_every_cause_has_one_row_for_each_state_of_the_client() -> None:
    every = [key for row in ATTRIBUTIONS for key in keys(row)]
    assert len(every) == len(set(every))
    for cause in Cause:
        states = [(head, state) for found, head, state in every if found is cause]
        heads = {head for head, _ in states}
        assert set(states) == set(itertools.product(heads, ClientState)), cause


def test_after_the_head_of_a_response_nothing_leaves_an_attempt_without_an_outcome() -> None:
    """Except the end of what counted when it began, and what can only happen before."""
    ignored = {row.cause for row in ATTRIBUTIONS if row.outcome is IGNORED and row.phase.has_head is not False}
    assert ignored == {Cause.NOT_ATTEMPTED, Cause.NO_CONNECTION, Cause.SERVER_ERROR, Cause.STREAM_ENDED}


def test_only_what_happened_before_a_connection_is_attributed_to_the_target() -> None:
    assert {row.cause for row in ATTRIBUTIONS if row.party is ResponsibleParty.TARGET} == {
        Cause.CONNECT_ERROR,
        Cause.CONNECT_TIMEOUT,
    }


@each(("error", "client", "has_head", "outcome"), CASES)
def test_the_outcome_of_an_error(
    error: type[httpx.TransportError], client: ClientProgress, outcome: Outcome, *, has_head: bool
) -> None:
    cause = cause_of(translate(error("x"), "up"))
    assert attribution(cause, has_head=has_head, client=client).outcome is outcome


@each(("client", "outcome"), list(zip(CLIENTS, (FAILURE, FAILURE, IGNORED, IGNORED), strict=True)))
def test_the_outcome_of_a_server_error(client: ClientProgress, outcome: Outcome) -> None:
    assert attribution(Cause.SERVER_ERROR, has_head=True, client=client).outcome is outcome


@each(
    ("source", "spent", "client", "cause"),
    [
        ("client", 10, PUNCTUAL, Cause.CLIENT_DEADLINE),
        ("route", 5, PUNCTUAL, Cause.UPSTREAM_DEADLINE),
        ("route", 4.9, PUNCTUAL, Cause.SHARED_DEADLINE),
        ("upstream", 10, AWAITED, Cause.SHARED_DEADLINE),
    ],
)
def test_the_cause_of_a_deadline(source: Any, spent: float, client: ClientProgress, cause: Cause) -> None:
    assert cause_of_deadline(Deadline(100, 10, source, "x", is_forwarded=True), spent, client) is cause


def test_the_outcome_of_an_attempt_that_is_aborted() -> None:
    """It is the same whoever aborted it, which the reporter is not told."""
    for cause in (Cause.ABORTED_BY_CLIENT, Cause.ABORTED_BY_GATEWAY):
        outcomes = [attribution(cause, has_head=has_head).outcome for has_head in (False, True)]
        assert outcomes == [outcome_of_abort(has_head=has_head) for has_head in (False, True)] == [IGNORED, SUCCESS]


# What the reporter makes of it


class Scene:
    """One attempt on an upstream with two targets, and the reporter of its outcome."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        policy = BreakerPolicy(failure_threshold=100, minimum_calls=100, window=3600)
        breaker = CircuitBreaker(policy, self.clock())
        self.upstream = Upstream("up", [Target("a")], breaker, round_robin)
        self.seen: list[str] = []
        self.reporter = OutcomeReporter(
            clock=self.clock,
            observe_attempt=lambda _upstream, result, _latency, _now: self.seen.append(result),
            on_transition=lambda _upstream, _transition: None,
            on_target_transition=lambda _upstream, _target, _transition: None,
        )
        self.attempt: Attempt = self.upstream.acquire(self.clock(), "", principal="client")
        self.exchange = Exchange("1", "GET", "/api/x", "192.0.2.1", self.clock(), sent_at=self.clock())

    def counts(self) -> tuple[int, int, int]:
        """Return calls, failures and slow calls."""
        return tuple(self.upstream.breaker.window_counts(self.clock()))  # type: ignore[return-value]  # three numbers

    def head(self, status: int, after: float = 0.0) -> None:
        self.reporter.on_head(self.exchange, self.attempt, status, self.clock.advance(after))


EXPECTED = {SUCCESS: (1, 0, 0), FAILURE: (1, 1, 0), IGNORED: (0, 0, 0)}


@each(("error", "client", "has_head", "outcome"), CASES)
def test_an_error_settles_its_attempt_once_by_the_table(
    error: type[httpx.TransportError], client: ClientProgress, outcome: Outcome, *, has_head: bool
) -> None:
    scene = Scene()
    if has_head:
        scene.head(200)
        found: GatewayError = scene.reporter.on_broken_body(scene.exchange, scene.attempt, error("x"), client)
    else:
        found = scene.reporter.on_failure(scene.exchange, scene.attempt, error("x"), client)
    row = attribution(cause_of(found), has_head=has_head, client=client)
    assert scene.counts() == EXPECTED[outcome]
    assert scene.attempt.principal == (None if row.party is ResponsibleParty.TARGET else "client")
    scene.reporter.release(scene.exchange, scene.attempt)
    assert scene.counts() == EXPECTED[outcome], "the first outcome counts"
    assert scene.upstream.targets[0].in_flight == 0


@each("status", [101, 200, 304, 400, 401, 403, 404, 408, 429, 499])
def test_a_head_below_500_is_a_success_however_the_attempt_ends(status: int) -> None:
    scene = Scene()
    scene.head(status)
    scene.reporter.release(scene.exchange, scene.attempt)
    assert scene.counts() == (1, 0, 0)


@each("status", [500, 501, 503, 504, 599])
def test_a_head_from_500_on_is_a_failure(status: int) -> None:
    scene = Scene()
    scene.head(status)
    scene.reporter.release(scene.exchange, scene.attempt)
    assert scene.counts() == (1, 1, 0)


def test_an_attempt_that_is_aborted_before_its_head_is_not_counted() -> None:
    scene = Scene()
    scene.reporter.release(scene.exchange, scene.attempt)
    assert scene.counts() == (0, 0, 0)


@pytest.mark.parametrize("status", [200, 404])
def test_a_slow_head_counts_as_slow_whatever_ends_the_response(status: int) -> None:
    scene = Scene()
    scene.upstream.breaker.slow_after = 2.0
    scene.head(status, after=2.0)
    scene.reporter.release(scene.exchange, scene.attempt)
    assert scene.counts() == (1, 0, 1)


def test_a_time_for_the_client_that_is_too_long_makes_no_latency_negative() -> None:
    """The clock of the event loop, by which the client's time is measured, is coarser."""
    scene = Scene()
    latencies: list[float | None] = []
    scene.reporter._observe_attempt = lambda _upstream, _result, latency, _now: latencies.append(latency)
    scene.exchange.sent_at = scene.clock() + 0.002  # moved by the client's time
    scene.head(200, after=0.001)
    assert latencies == [0.0]
    assert scene.exchange.sent_at == scene.exchange.head_at == scene.clock()


# The page


def page_with(table: str) -> str:
    """Return the page with the table between its markers."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{PAGE} has lost its markers"
    assert end, f"{PAGE} has lost its markers"
    return f"{before}{BEGIN}{table}\n{END}{after}"


def test_the_table_in_the_docs_is_this_one() -> None:
    assert PAGE.read_text() == page_with(attribution_table()), "run `python -m tests.unit.test_attribution`"


if __name__ == "__main__":
    PAGE.write_text(page_with(attribution_table()))
