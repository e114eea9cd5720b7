"""The counts of a replay: by client, by tier, by limit and over time, and its agreement with the log."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from api_gateway.models import NANOSECONDS, Decision
from api_gateway.replay.log_lines import (
    AT_NS,
    DECISION,
    ID_OF_CLIENT,
    KIND,
    LIMIT,
    REMAINING,
    SETTLEMENT,
    SOURCE,
    TIER,
    TIER_SOURCE,
    WAIT_NS,
    LogEvent,
)
from api_gateway.replay.simulation import Simulation

SLOTS = 120  # of the time that the log covers
EXACT = ("memory", "store")  # sources of decisions that the same configuration makes again


class ClientTally:
    """The figures of one client in one tier. Times are nanoseconds since the epoch."""

    __slots__ = (
        "first_ns",
        "last_ns",
        "limited",
        "limited_before",
        "limited_ns",
        "limits",
        "longest_wait_ns",
        "newly_allowed",
        "newly_limited",
        "not_evaluable",
        "refused_since_ns",
        "requests",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.limited_before = 0  # in the log, or by the current configuration
        self.limited = 0
        self.newly_limited = 0
        self.newly_allowed = 0
        self.not_evaluable = 0  # may have had another route, or was refused by a limit that is not evaluated
        self.first_ns = self.last_ns = 0  # of those that are newly limited
        self.longest_wait_ns = 0
        self.limited_ns = 0  # from a refusal to the next admission, summed
        self.refused_since_ns = 0
        self.limits: Counter[str] | None = None  # refusals by limit

    def __repr__(self) -> str:
        return f"<ClientTally [{self.newly_limited} of {self.requests} newly limited]>"

    def refuse(self, outcome: Decision, at_ns: int, *, is_new: bool) -> None:
        """Count a request that the candidate refuses."""
        self.limited += 1
        self.longest_wait_ns = max(self.longest_wait_ns, outcome.wait_ns)
        if self.limits is None:
            self.limits = Counter()
        self.limits[outcome.quota.name] += 1
        if not self.refused_since_ns:
            self.refused_since_ns = at_ns
        if is_new:
            self.newly_limited += 1
            self.first_ns = self.first_ns or at_ns
            self.last_ns = at_ns

    def admit(self, at_ns: int) -> None:
        """Count the time until the client is admitted again."""
        self.limited_ns += at_ns - self.refused_since_ns
        self.refused_since_ns = 0

    def figures(self, client: str, tier: str) -> dict[str, Any]:
        """Return the figures by name, as `--fail-if` and the reports name them."""
        return {
            "client": client,
            "tier": tier,
            "requests": self.requests,
            "limited_before": self.limited_before,
            "limited": self.limited,
            "newly_limited": self.newly_limited,
            "newly_allowed": self.newly_allowed,
            "not_evaluable": self.not_evaluable,
            "longest_wait_seconds": self.longest_wait_ns / NANOSECONDS,
            "limited_seconds": self.limited_ns / NANOSECONDS,
            "first_ns": self.first_ns,
            "last_ns": self.last_ns,
            "limits": dict(self.limits or ()),
        }


class Agreement:
    """How many decisions of a configuration are the log's: the outcome alone, and with limit, wait and remainder."""

    def __init__(self) -> None:
        self.compared = self.same_decision = self.same = 0
        self.first_difference: tuple[LogEvent, Decision | None] | None = None

    def add(self, other: "Agreement") -> None:
        """Add the counts of other clients."""
        self.compared += other.compared
        self.same_decision += other.same_decision
        self.same += other.same
        if self.first_difference is None or (
            other.first_difference is not None and other.first_difference[0] < self.first_difference[0]
        ):
            self.first_difference = other.first_difference


class ReplayTally:
    """Runs events through the simulations of the candidate and, if it is known, of the current configuration.

    A request is newly limited if the candidate refuses it and the current configuration, or else the log, does not.
    """

    def __init__(self, candidate: Simulation, current: Simulation | None, begin_ns: int, end_ns: int) -> None:
        """The events are from `begin_ns` to `end_ns`."""
        self._candidate = candidate
        self._current = current
        self._begin_ns = begin_ns
        self._slot_ns = max((end_ns - begin_ns) // SLOTS + 1, 1)
        self.clients: dict[tuple[str, str, bool], ClientTally] = {}  # id, tier, and whether the id is an address
        self.decisions = self.before_snapshot = 0
        self.limited_in_log = self.limited_by_current = self.limited = 0
        self.refused_otherwise = 0
        self.newly_limited_by: Counter[str] = Counter()
        self.checks_refused = 0
        self.doubts: Counter[str] = Counter()  # requests that may have had a route, by route
        self.refused_unlogged: Counter[str] = Counter()  # by the allowance that refused them, which is not evaluated
        self.agreement, self.current_agreement = Agreement(), Agreement()
        self.timeline = [[0] * SLOTS for _ in range(4)]  # decisions; refused in the log, by current, by the candidate

    def __repr__(self) -> str:
        return f"<ReplayTally [{self.decisions} decisions, {len(self.clients)} clients]>"

    @property
    def slot_seconds(self) -> float:
        """Seconds of one slot of the timeline."""
        return self._slot_ns / NANOSECONDS

    def add(self, event: LogEvent) -> None:
        """Replay one event."""
        kind = event[KIND]
        if kind == DECISION:
            self._decide(event)
            return
        for simulation in self._simulations():
            if kind == SETTLEMENT:
                simulation.settle(event)
            elif not simulation.check(event).allowed and simulation is self._candidate:
                self.checks_refused += 1

    def _simulations(self) -> Iterator[Simulation]:
        yield self._candidate
        if self._current is not None:
            yield self._current

    def _decide(self, event: LogEvent) -> None:
        at_ns, wait_ns = event[AT_NS], event[WAIT_NS]
        self.decisions += 1
        slot = (at_ns - self._begin_ns) // self._slot_ns
        requests, in_log, by_current, by_candidate = self.timeline
        requests[slot] += 1
        is_limited_now = wait_ns != 0
        if is_limited_now:
            self.limited_in_log += 1
            in_log[slot] += 1
        refused_by = event[LIMIT] if is_limited_now else ""
        if self._current is not None:
            if refused_by not in self._current.unlogged:
                current = self._current.decide(event)
                _compare(self.current_agreement, event, current)
                is_limited_now = current is not None and not current.allowed
            if is_limited_now:
                self.limited_by_current += 1
                by_current[slot] += 1
        if refused_by in self._candidate.unlogged:
            self._count_unlogged(event, refused_by, was_limited=is_limited_now)
            return
        outcome = self._candidate.decide(event)
        _compare(self.agreement, event, outcome)
        self._count(event, outcome, by_candidate, slot, was_limited=is_limited_now)

    def _client_of(self, event: LogEvent) -> ClientTally:
        key = event[ID_OF_CLIENT], event[TIER], event[TIER_SOURCE] == "address"
        client = self.clients.get(key)
        if client is None:
            client = self.clients[key] = ClientTally()
        return client

    def _count_unlogged(self, event: LogEvent, refused_by: str, *, was_limited: bool) -> None:
        """Count a request that a limit by values that are not logged refused: it charges nothing."""
        client = self._client_of(event)
        client.requests += 1
        client.not_evaluable += 1
        client.limited_before += was_limited
        self.refused_unlogged[refused_by] += 1

    def _count(
        self, event: LogEvent, outcome: Decision | None, by_candidate: list[int], slot: int, *, was_limited: bool
    ) -> None:
        at_ns, client = event[AT_NS], self._client_of(event)
        client.requests += 1
        client.not_evaluable += bool(self._candidate.routes.doubtful)
        client.limited_before += was_limited
        if outcome is None:
            self.refused_otherwise += 1
        elif outcome.allowed:
            client.newly_allowed += was_limited
            if client.refused_since_ns:
                client.admit(at_ns)
        else:
            self.limited += 1
            by_candidate[slot] += 1
            if not was_limited:
                self.newly_limited_by[outcome.quota.name] += 1
            client.refuse(outcome, at_ns, is_new=not was_limited)

    def merge(self, other: "ReplayTally") -> None:
        """Add the figures of other clients."""
        for key, client in other.clients.items():
            self.clients[key] = client  # a client belongs to one shard
        self.decisions += other.decisions
        self.before_snapshot += other.before_snapshot
        self.limited_in_log += other.limited_in_log
        self.limited_by_current += other.limited_by_current
        self.limited += other.limited
        self.refused_otherwise += other.refused_otherwise
        self.newly_limited_by += other.newly_limited_by
        self.checks_refused += other.checks_refused
        self.doubts += other.doubts
        self.refused_unlogged += other.refused_unlogged
        self.agreement.add(other.agreement)
        self.current_agreement.add(other.current_agreement)
        for mine, others in zip(self.timeline, other.timeline, strict=True):
            mine[:] = [a + b for a, b in zip(mine, others, strict=True)]

    def without_simulations(self) -> "ReplayTally":
        """Drop the simulations, so that the figures can be passed to another process; return the tally."""
        self._current = None
        self.doubts = self._candidate.routes.doubts
        del self._candidate
        return self


def _compare(agreement: Agreement, event: LogEvent, outcome: Decision | None) -> None:
    if event[SOURCE] not in EXACT:
        return
    limit, wait_ns, remaining = event[LIMIT], event[WAIT_NS], event[REMAINING]
    agreement.compared += 1
    if outcome is None:
        agreement.same_decision += wait_ns != 0
    elif (wait_ns == 0) == outcome.allowed:
        agreement.same_decision += 1
        if outcome.wait_ns == wait_ns and outcome.remaining == remaining and outcome.quota.name == limit:
            agreement.same += 1
            return
    if agreement.first_difference is None:
        agreement.first_difference = event, outcome
