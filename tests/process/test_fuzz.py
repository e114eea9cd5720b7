"""The fuzzer's own parts: what it draws, what it recognises, and how it makes a finding small."""

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tests.cases import each
from tests.fuzz.case import FIN, PAUSE, RESET, SEND, Case, Step, read, write
from tests.fuzz.generator import Generator
from tests.fuzz.mutation import ended, mutated, paced
from tests.fuzz.peers import Upstream, _wrong, without_body
from tests.fuzz.reduction import reduced
from tests.fuzz.session import Found, Session

MINE, OTHER = b"N" + b"a" * 16, b"N" + b"b" * 16
OWNERS = {MINE: 1, OTHER: 2}
ASKED = Case((Step(SEND, b"GET"),), (MINE,), expected=(("GET", 200, MINE),))


def answer(nonce: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nX-Nonce: %b\r\nContent-Length: %d\r\n\r\n%b" % (nonce, len(body), body)


def drawn(seed: int, number: int = 300) -> list[Case]:
    generator = Generator(seed)
    return [generator.draw() for _ in range(number)]


def test_one_seed_draws_the_same_cases() -> None:
    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)


def test_cases_contain_every_kind_of_step_on_both_sides_and_some_expect_responses() -> None:
    cases = drawn(1)
    kinds = {SEND, PAUSE, FIN, RESET}
    assert {step.kind for case in cases for step in case.client} == kinds
    assert {step.kind for case in cases for script in case.responses.values() for step in script} == kinds
    assert 20 < sum(bool(case.expected) for case in cases) < 150


def test_a_finding_is_read_as_it_was_written(tmp_path: Path) -> None:
    cases = drawn(3)
    write(tmp_path / "finding.json", 3, "something", cases)
    assert read(tmp_path / "finding.json") == cases


def test_a_pace_changes_no_byte() -> None:
    source = random.Random(5)
    for _ in range(200):
        data = source.randbytes(source.randrange(300))
        assert b"".join(step.data for step in paced(source, data)) == data


def test_mutations_accept_any_bytes() -> None:
    source = random.Random(6)
    for data in (b"", b"\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 50):
        for _ in range(200):
            mutated(source, data)
            ended(source, [Step(SEND, data)])


@each(
    ("received", "what"),
    [
        (answer(OTHER, OTHER), "another client"),
        (answer(MINE, MINE + OTHER), "another client"),
        (answer(MINE, MINE)[:-1], "was not answered"),
        (b"", "was not answered"),
        (answer(MINE, b"else"), "was answered"),
        (b"HTTP/1.1 2x0 OK\r\n\r\n", "not HTTP"),
        (answer(MINE, MINE), None),
        (b"HTTP/1.1 103 Hints\r\n\r\n" + answer(MINE, MINE), None),
    ],
)
def test_wrong_responses_are_recognised(received: bytes, what: str | None) -> None:
    found = _wrong(ASKED, received, OWNERS)
    assert found is None if what is None else what in (found or "")


def test_responses_out_of_order_are_recognised() -> None:
    case = replace(ASKED, nonces=(MINE, OTHER), expected=())
    assert _wrong(case, answer(MINE, MINE) + answer(OTHER, OTHER), OWNERS) is None
    assert "out of order" in str(_wrong(case, answer(OTHER, OTHER) + answer(MINE, MINE), OWNERS))


def test_a_request_made_of_what_two_clients_sent_is_recognised() -> None:
    upstream = Upstream(owners=OWNERS)
    upstream._check(b"POST /" + MINE)
    assert upstream.findings == []
    upstream._check(b"POST /" + MINE + OTHER)
    assert len(upstream.findings) == 1


async def test_a_finding_is_made_small() -> None:
    cases = drawn(9, 20)
    cases[13] = Case((Step(PAUSE, seconds=0.1), Step(SEND, b"a" * 50 + b"!" + b"b" * 50), Step(FIN)), (MINE,))

    async def shows(some: list[Case]) -> bool:
        return any(b"!" in step.data for case in some for step in case.client)

    found = await reduced(cases, shows, 10)
    assert [case.client for case in found] == [(Step(SEND, b"!"),)]


async def test_valid_cases_are_answered_and_leave_nothing(tmp_path: Path) -> None:
    session = Session(tmp_path)
    await session.start()
    try:
        await session.run(islice((case for case in drawn(2, 200) if case.expected), 20))
        await session.settle()
    except Found:
        session.kill()
        raise
    assert await session.close() is None


def test_a_response_to_head_ends_with_its_head_in_any_pieces() -> None:
    data = b"HTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 200 OK\r\nX-Nonce: N1\r\n\r\n"
    pieces = [
        Step(SEND, data[:40]),
        Step(PAUSE, seconds=0.1),
        Step(SEND, data[40:] + b"bo"),
        Step(SEND, b"dy"),
        Step(FIN),
    ]
    kept = without_body(tuple(pieces))
    assert b"".join(step.data for step in kept) == data
    assert [step.kind for step in kept] == [SEND, PAUSE, SEND, FIN]
