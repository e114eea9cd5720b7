"""The last transitions of circuit breakers: of one worker's upstreams, and merged from several workers."""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from api_gateway.circuit_breaker import MAX_RECORDS
from api_gateway.resilience.breaker_history import FailedCall, TransitionRecord
from api_gateway.resilience.breaker_policy import Mode, State
from api_gateway.resilience.call_windows import Counts
from api_gateway.upstreams.upstream import Upstream


def transitions_of(upstream: Upstream) -> list[TransitionRecord]:
    """Return the last transitions of the breakers of an upstream and its targets, oldest first."""
    of_targets = (
        (record, target.url)
        for target in upstream.targets
        if target.breaker is not None
        for record in target.breaker.records
    )
    latest = heapq.nlargest(MAX_RECORDS, of_targets, key=lambda one: one[0].at)
    transitions = [*upstream.breaker.records, *(replace(record, target_url=url) for record, url in latest)]
    return sorted(transitions, key=_time_of)


def last_transitions(transitions: Iterable[TransitionRecord], workers: int) -> list[TransitionRecord]:
    """Return the last of the given transitions, oldest first.

    For each worker, `MAX_RECORDS` of the upstream's breaker are kept, and as many of all its targets together: the
    targets' transitions do not displace the upstream's, and the number stays limited while targets change.
    """
    most = MAX_RECORDS * max(1, workers)
    by_time = sorted(transitions, key=_time_of)
    own = [transition for transition in by_time if transition.target_url is None]
    of_targets = [transition for transition in by_time if transition.target_url is not None]
    return sorted(own[-most:] + of_targets[-most:], key=_time_of)


def _time_of(record: TransitionRecord) -> float:
    return record.at


def identity_of(record: TransitionRecord) -> tuple[str, str | None, int, float]:
    """Return the identity of a transition. The time is part of it: a new breaker of a target counts from 1 again."""
    return record.worker, record.target_url, record.number, record.at


def record_from_state(state: Mapping[str, Any]) -> TransitionRecord:
    """Return the record from its state, as `asdict` and JSON represent it."""
    own = {
        "source": State(state["source"]),
        "target": State(state["target"]),
        "mode": Mode(state["mode"]),
        "counts": Counts(*state["counts"]),
        "failures": tuple(FailedCall(**failure) for failure in state["failures"]),
    }
    return TransitionRecord(**{**state, **own})
