"""Traces of processes: several workers, a reload that turns tracing on and off, and what is exported at the end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import RawUpstream, ask, eventually
from tests.process.test_reload import LONG, Site, in_front_of, site
from tests.trace_kit import SERVER, Collector, collector


@pytest.fixture
def receiver() -> Iterator[Collector]:
    with collector() as found:
        yield found


def send(one: Site, count: int = 8) -> None:
    for _ in range(count):
        assert ask(f"{one.running.url}/api/x").status == 200


def exchanges(receiver: Collector) -> int:
    return sum(span.kind == SERVER for span in receiver.spans)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_turns_tracing_on_changes_it_and_turns_it_off(
    tmp_path: Path, receiver: Collector, up: RawUpstream, workers: int
) -> None:
    with site(tmp_path, in_front_of(up.url), "--workers", str(workers)) as one:
        send(one)
        one.sections["tracing"] = {"enabled": True, "endpoint": receiver.url}
        changed = {change["setting"] for change in one.reload()["changes"]}
        assert changed == {"tracing.enabled", "tracing.endpoint"}
        send(one)
        eventually(lambda: exchanges(receiver) == 8, "the exchanges since the reload are exported", LONG)
        assert len({span.resource["service.instance.id"] for span in receiver.spans}) <= workers
        eventually(lambda: one.counters()['gateway_tracing_spans_total{result="exported"}'] == 16, "all count", LONG)
        one.sections["tracing"]["ratio"] = 0
        one.reload()
        send(one)
        one.sections["tracing"] = {"enabled": False}
        one.reload()
        send(one)
    assert exchanges(receiver) == 8, "not sampled, and off"
    assert len([request for request in up.requests if request.all("traceparent")]) == 16


def test_what_waits_is_exported_when_the_gateway_stops(tmp_path: Path, receiver: Collector, up: RawUpstream) -> None:
    with site(tmp_path, in_front_of(up.url) | {"tracing": {"enabled": True, "endpoint": receiver.url}}) as one:
        send(one)
    assert exchanges(receiver) == 8


def test_a_collector_that_is_down_does_not_hold_up_the_end(tmp_path: Path, up: RawUpstream) -> None:
    settings = {"enabled": True, "endpoint": "http://127.0.0.1:1", "headers": "Authorization=Bearer%20not-shown"}
    with site(tmp_path, in_front_of(up.url) | {"tracing": settings}) as one:
        send(one)
        eventually(lambda: "tracing: spans cannot be delivered" in one.running.errors, "it is logged", LONG)
        errors = one.running.errors
    assert errors.count("tracing: spans cannot be delivered") == 1
    assert "not-shown" not in errors
