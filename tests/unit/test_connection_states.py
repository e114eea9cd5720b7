"""The tables of a downstream connection: what can be reached, what is illegal, and the diagrams in the docs.

`python -m tests.unit.test_connection_states` draws the diagrams in docs/architecture.md again.
"""

import logging
from collections.abc import Iterator, Mapping
from enum import IntEnum

import pytest

from api_gateway.downstream.connection import DownstreamConnection
from api_gateway.downstream.states import (
    ILLEGAL_EVENTS,
    INPUT,
    INPUTS_BY_SERVICE,
    PERSISTENCE,
    SERVICE,
    START,
    ConnectionEvent,
    ConnectionState,
    IllegalConnectionEvent,
    InputState,
    Persistence,
    Service,
)
from tests.downstream_kit import FakeBody, Harness
from tests.unit.test_architecture import PAGE

BEGIN, END = "<!-- connection states: begin -->\n", "<!-- connection states: end -->"
TABLES: dict[str, Mapping[IntEnum, Mapping[ConnectionEvent, IntEnum]]] = {
    "Input": INPUT,  # type: ignore[dict-item]  # the keys of a Mapping are invariant
    "Service": SERVICE,  # type: ignore[dict-item]
    "Persistence": PERSISTENCE,  # type: ignore[dict-item]
}


def reachable() -> list[ConnectionState]:
    """Return all states that can be reached."""
    found, pending = {START}, [START]
    while pending:
        for state in pending.pop().after.values():
            if state not in found:
                found.add(state)
                pending.append(state)
    return list(found)


STATES = reachable()


def test_every_state_of_each_table_can_be_reached_in_every_combination() -> None:
    assert {(state.input, state.service) for state in STATES} == {
        (input_state, service) for service, input_states in INPUTS_BY_SERVICE.items() for input_state in input_states
    }
    assert {state.persistence for state in STATES} == set(Persistence)


def test_every_event_is_legal_somewhere() -> None:
    assert {event for state in STATES for event in state.after} == set(ConnectionEvent)


def test_every_transition_of_each_table_is_used() -> None:
    for name, table in TABLES.items():
        for before, row in table.items():
            for event, after in row.items():
                attribute = name.lower()
                assert any(
                    getattr(state, attribute) is before and getattr(state.after.get(event), attribute, None) is after
                    for state in STATES
                ), f"{name} {before.name} never gets {event.name}"


def test_every_connection_can_end_and_a_lost_one_stays_lost() -> None:
    for state in STATES:
        if state.is_lost:
            assert all(after.is_lost for after in state.after.values())
        else:
            assert state.after[ConnectionEvent.LOST].is_lost
            assert state.service is Service.TUNNELLING or state.after[ConnectionEvent.CLOSE].is_ending


def test_nothing_is_served_once_a_connection_is_ending() -> None:
    for state in STATES:
        if state.is_ending:
            assert all(after.is_ending for after in state.after.values())
            assert ConnectionEvent.HEAD_COMPLETE not in state.after
            assert ConnectionEvent.HEAD_BEGUN not in state.after


def test_a_state_says_what_it_is() -> None:
    assert str(START) == "input new, service idle, persistence persistent"


# Illegal events


@pytest.fixture
def harness() -> Iterator[Harness]:
    with Harness() as found:
        yield found


def test_an_illegal_event_raises_in_tests(harness: Harness) -> None:
    try:
        with pytest.raises(
            IllegalConnectionEvent, match="body_complete in state input new, service idle, persistence pers"
        ):
            harness.connection.move(ConnectionEvent.BODY_COMPLETE)
    finally:
        ILLEGAL_EVENTS.counts.clear()


def test_in_production_an_illegal_event_ends_that_connection_alone(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ILLEGAL_EVENTS, "raises", False)
    other = harness.connect()
    try:
        with caplog.at_level(logging.ERROR):
            harness.connection.move(ConnectionEvent.BODY_COMPLETE)
        assert ILLEGAL_EVENTS.counts == {"body_complete": 1}
    finally:
        ILLEGAL_EVENTS.counts.clear()
    assert "illegal event body_complete in state input new, service idle" in caplog.text
    harness.turn()
    assert harness.connection.state.is_lost
    assert not other.connection.state.is_ending
    other.receive(b"GET /w1 HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"200 OK" in other.sent


def test_an_illegal_event_within_a_callback_of_the_parser_is_not_taken_for_an_error_of_the_request(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DownstreamConnection, "cycle_of", lambda self, _head: self.move(ConnectionEvent.SWITCH))
    try:
        with pytest.raises(IllegalConnectionEvent):
            harness.client.receive(b"GET /l1 HTTP/1.1\r\nHost:a\r\n\r\n")
    finally:
        ILLEGAL_EVENTS.counts.clear()


def test_a_long_read_of_a_chunked_body_lets_other_connections_read(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one client with chunks of a byte each would occupy the event loop as long as it sends."""
    monkeypatch.setattr(FakeBody, "feed", lambda *_: False)
    client, transport = harness.client, harness.client.transport
    client.receive(b"POST /e1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    client.receive(b"1\r\nx\r\n" * 100)
    assert transport.is_reading(), "a short read"
    client.receive(b"1\r\nx\r\n" * 11_000)
    assert not transport.is_reading()
    harness.turn()
    assert transport.is_reading()
    client.receive(b"1\r\nx\r\n" * 11_000)
    harness.connection.pause_reading()
    harness.turn()
    assert not transport.is_reading(), "the upstream reads more slowly"
    harness.connection.resume_reading()
    assert transport.is_reading()


def test_a_tunnel_that_begins_after_the_loss_releases_the_slot_once(harness: Harness) -> None:
    """A tunnel tells the connection of a loss, because its transport no longer does."""
    harness.client.receive(
        b"GET /h1 HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    harness.turn()
    harness.client.lose(ConnectionResetError())
    harness.connection.detach_transport(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
    harness.connection.connection_lost(None)
    assert harness.factory.slots.shares.in_use == 0
    assert not harness.factory.slots.peers


# The diagrams


def diagram(name: str) -> str:
    """Return one table as a Mermaid diagram; transitions between the same two states are one arrow."""
    table = TABLES[name]
    lines = [f"**{name}**", "", "```mermaid", "stateDiagram-v2"]
    first = next(iter(table))
    lines.append(f"    [*] --> {first.name.lower()}")
    for before, row in table.items():
        arrows: dict[str, list[str]] = {}
        for event, after in row.items():
            if after is not before:
                arrows.setdefault(after.name.lower(), []).append(event.name.lower())
        lines += [f"    {before.name.lower()} --> {after}: {', '.join(events)}" for after, events in arrows.items()]
    return "\n".join([*lines, "```", ""])


def combinations() -> str:
    """Return the legal combinations as a table."""
    rows = [
        f"| {service.name.lower()} | {', '.join(input_state.name.lower() for input_state in input_states)} |"
        for service, input_states in INPUTS_BY_SERVICE.items()
    ]
    return "\n".join(["| service | combined with input |", "|---|---|", *rows, ""])


def page_with_diagrams() -> str:
    """Return the page with the diagrams between their markers."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{PAGE} has lost its markers"
    assert end, f"{PAGE} has lost its markers"
    return before + BEGIN + "\n".join([*map(diagram, TABLES), combinations()]) + END + after


def test_the_diagrams_in_the_docs_are_these() -> None:
    assert PAGE.read_text() == page_with_diagrams(), "run `python -m tests.unit.test_connection_states`"


def test_readings_and_services_have_different_tables() -> None:
    assert set(INPUT) == set(InputState)
    assert set(SERVICE) == set(Service)
    assert set(PERSISTENCE) == set(Persistence)


if __name__ == "__main__":
    PAGE.write_text(page_with_diagrams())
