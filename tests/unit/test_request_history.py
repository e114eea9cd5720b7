"""The history of requests: bounded in number and bytes, divided among clients, and free of what is not recorded."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.models import AttemptFailure, Charge, Client, Decision, Exchange, Quota, Trace
from api_gateway.observability.request_history import (
    MAX_SUCCESS_PATH,
    FairRing,
    HistoryLimits,
    RequestHistory,
    request_result,
)
from api_gateway.observability.request_record import REQUEST_RESULTS, HistoryRecord
from tests.cases import each

QUOTA = Quota.per_second("FREE", 1, 10)
LIMITS = HistoryLimits(successes=20, refusals=10, errors=10, max_bytes=1_000_000, max_age=60)


def ended(name: str = "acme", **fields: Any) -> Exchange:
    """Return an exchange that has ended, by default with a response of the upstream."""
    exchange = Exchange(fields.pop("id", "one"), "GET", fields.pop("path", "/api/x"), "10.0.0.1", 5.0)
    exchange.client = Client(name, f"client:{name}", QUOTA, "default")
    exchange.charges = [Charge(f"client:{name}", QUOTA, QUOTA.cost_ns(1))]
    exchange.decision = Decision(f"client:{name}", QUOTA, True, 9, 0, 10**9, 0)
    exchange.status, exchange.source, exchange.finished = 200, "upstream", 5.5
    for field, value in fields.items():
        setattr(exchange, field, value)
    return exchange


def kept(history: RequestHistory, now: float = 100.0, after: int = 0) -> list[HistoryRecord]:
    found = [record for record in history.records(now, after) if record is not None]
    return sorted(found, key=lambda record: record.ended)


def test_each_outcome_has_a_ring_of_its_own() -> None:
    """However many requests succeed or are refused, errors stay."""
    history = RequestHistory(LIMITS)
    history.record(ended(id="failed", status=502, reason="upstream_reset", source="gateway"), 1)
    history.record(ended(id="broken", reason="upstream_reset"), 2)  # within the body of a response with status 200
    history.record(ended(id="left", status=499, reason="client_disconnected", source="gateway"), 3)
    history.record(ended(id="own", status=500), 4)  # the upstream's
    history.record(ended(id="refused", status=429, reason="rate_limited", source="gateway"), 5)
    history.record(ended(id="unknown", status=404), 6)  # the upstream's, which is not a failure
    for number in range(100):
        history.record(ended(f"client-{number}", id=str(number)), 10 + number / 10)
    results = {record.id: record.result for record in kept(history, 20)}
    assert [results[name] for name in ("failed", "broken", "left", "own")] == ["error"] * 4
    assert results["refused"] == "refusal"
    assert "unknown" not in results
    assert {name: count for name, (count, _) in history.sizes().items()} == {"success": 20, "refusal": 1, "error": 4}


def test_one_client_does_not_remove_the_records_of_others() -> None:
    history, refused = RequestHistory(LIMITS), {"status": 429, "reason": "rate_limited", "source": "gateway"}
    for number in range(5):
        history.record(ended(f"quiet-{number}", id=f"quiet-{number}", **refused), 1 + number)
    for number in range(1000):
        history.record(ended("busy", id=f"busy-{number}", **refused), 20 + number / 100)
    ids = [record.id for record in kept(history, 30)]
    assert [one for one in ids if one.startswith("quiet")] == [f"quiet-{number}" for number in range(5)]
    assert [one for one in ids if one.startswith("busy")] == [f"busy-{number}" for number in range(995, 1000)]


@pytest.mark.parametrize("refused", [{}, {"status": 429, "reason": "rate_limited", "source": "gateway"}])
def test_without_competition_one_client_has_the_whole_ring(refused: dict[str, Any]) -> None:
    history = RequestHistory(HistoryLimits(20, 20, 20, 1_000_000, 60))
    for number in range(25):
        history.record(ended(id=str(number), **refused), number)
    assert [record.id for record in kept(history, 30)] == [str(number) for number in range(5, 25)]


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 300)), max_size=200),
    st.integers(0, 20),
    st.integers(1, 1000),
)
def test_a_ring_is_never_larger_than_its_limits(added: list[tuple[int, int]], most: int, max_bytes: int) -> None:
    """Its figures are the sums of what it has, each client's records stay in order, and the newest is kept."""
    ring = FairRing(most, max_bytes)
    exchange = ended()
    for number, (holder, size) in enumerate(added):
        record = (float(number), exchange, size)
        ring.add(str(holder), record)
        lists = ring.lists()
        assert all(lists), "no client without records is kept"
        assert sum(map(len, lists)) == ring.count <= most
        assert sum(one[2] for held in lists for one in held) == ring.size <= max_bytes
        assert all([one[0] for one in held] == sorted(one[0] for one in held) for held in lists)
        if most and size <= max_bytes:
            assert any(record in held for held in lists)
    ring.limit(most // 2, max_bytes // 2)
    assert ring.count <= most // 2
    assert ring.size <= max_bytes // 2


def test_bytes_are_limited_also_if_each_record_is_large() -> None:
    limits = HistoryLimits(10_000, 10_000, 10_000, max_bytes=900_000, max_age=1e9)
    history = RequestHistory(limits)
    for number in range(1000):
        history.record(ended(f"c{number % 7}", path="/api/" + "x" * 3_000), number)
        failures = (AttemptFailure("up", "http://u", 1.0, 2.0, None, "upstream_reset", "e" * 500),)
        failed = ended(f"c{number % 7}", status=502, reason="upstream_reset", detail="d" * 3_000, failures=failures)
        history.record(failed, number)
    records = kept(history, 1000)
    assert sum(size for _, size in history.sizes().values()) <= 900_000
    assert sum(len(one.path) + len(one.detail or "") for one in records) <= 900_000
    assert {len(one.path) for one in records if one.result == "success"} == {MAX_SUCCESS_PATH + 3}
    assert len(records) > 30


def test_a_reload_changes_the_limits() -> None:
    history = RequestHistory(LIMITS)
    for number in range(20):
        history.record(ended(f"c{number}", id=str(number)), number)
    history.change(HistoryLimits(5, 10, 10, 1_000_000, 60))
    assert [record.id for record in kept(history, 20)] == ["15", "16", "17", "18", "19"]
    history.change(HistoryLimits(0, 0, 0, 1_000_000, 60))
    history.record(ended(), 21)
    assert kept(history, 22) == []


def test_records_have_different_numbers_in_the_order_of_their_ends() -> None:
    """Also if the wall clock stands still or steps back, and after a reader has noted a position."""
    history, numbers = RequestHistory(LIMITS), []
    for now in (1_800_000_000.0, 1_800_000_000.0, 1_799_999_999.0, 1_800_000_000.000001):
        history.record(ended(), now)
        numbers.append(history.number_at(now))
    found = [record.number for record in kept(history, 1_800_000_001.0)]
    assert found == sorted(set(found))
    assert all(a <= b < c for a, b, c in zip(found, numbers, found[1:], strict=False))
    for position, rest in zip(numbers, (3, 2, 1, 0), strict=True):
        assert len(kept(history, 1_800_000_001.0, position)) == rest


def test_old_records_are_not_shown() -> None:
    history = RequestHistory(LIMITS)
    history.record(ended(), 10)
    assert len(kept(history, 69)) == 1
    assert kept(history, 71) == []


@pytest.mark.parametrize("organisation", [None, "acme"])
def test_a_kept_exchange_has_no_credential_but_its_organisation(organisation: str | None) -> None:
    """A token may be large, and is not part of a record; the access log may not have rendered the organisation yet."""
    history = RequestHistory(LIMITS)
    exchange = ended(credential=SimpleNamespace(organisation=organisation, fields=[(b"authorization", b"secret")]))
    history.record(exchange, 1)
    left = exchange.credential
    assert (
        left is None if organisation is None else left is not None and (left.organisation, left.fields) == ("acme", [])
    )


def test_what_the_budget_has_no_place_for_is_counted_by_its_outcome() -> None:
    """Each result has a budget: a flood of refusals leaves that of successes as it is."""
    history = RequestHistory(HistoryLimits(100, 8, 100, 1_000_000, 60, (10, 1, 10)))
    refused: dict[str, Any] = {"status": 429, "reason": "rate_limited", "source": "gateway"}
    taken = [history.takes(ended(id=str(number), **refused)) for number in range(10)]
    assert taken == [True] * 3 + [False] * 7  # half of the burst of half a ring, and the one that reaches it
    assert history.takes(ended("quiet", **refused))
    assert history.takes(ended())
    assert history.not_kept == {"success": 0, "refusal": 7, "error": 0}
    history.change(HistoryLimits(100, 8, 100, 1_000_000, 60, (10, 1000, 10)))
    assert history.takes(ended(finished=6.5, **refused))


@each("status", [200, 304, 404, 429, 499, 500, 503])
@each("reason", [None, "rate_limited", "upstream_reset"])
@each("source", ["gateway", "upstream"])
def test_a_request_uses_the_budget_of_the_outcome_that_its_record_has(
    status: int, reason: str | None, source: str
) -> None:
    history = RequestHistory(HistoryLimits(0, 0, 0, 1_000_000, 60, (0.001, 0.001, 0.001)))
    exchange = ended(status=status, reason=reason, source=source)
    assert [history.takes(exchange) for _ in range(2)] == [True, False]
    history.observer(lambda: 1)(exchange)
    assert history.not_kept == {name: 2 * (name == request_result(exchange)) for name in REQUEST_RESULTS}


def test_a_client_that_was_not_identified_is_held_by_its_address() -> None:
    history = RequestHistory(LIMITS)
    history.record(ended(client=None, decision=None, status=401, reason="credentials_invalid", source="gateway"), 1)
    (record,) = kept(history, 2)
    assert (record.client_address, record.client_id, record.decision) == ("10.0.0.1", None, None)
    assert [held[0][1].id for held in history._rings["refusal"].lists()] == ["one"]


def test_a_record_names_the_trace_of_its_request() -> None:
    history, trace = RequestHistory(LIMITS), Trace()
    trace.fields = b"\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    history.record(ended(trace=trace), 1)
    history.record(ended(), 2)
    assert [record.trace_id for record in kept(history, 3)] == ["0af7651916cd43dd8448eb211c80319c", None]
