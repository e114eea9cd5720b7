"""Header lines that differ from those of an earlier request in one value mean the same as if read anew."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api_gateway.proxy.header_facts import MAX_FIRST, MAX_REMEMBERED_BYTES, HeaderFacts, HeaderReader, RewrittenHeaders

MOST = 100
PEER = "192.0.2.1"
NAMES = ("X-Client-ID", "x-client-id", "X_Client_ID", "Host", "X-Note", "Connection", "Via", "X-Request-ID")
VALUES = ("acme", "bench", "bench", "a b", "é", "x" * 128, "x" * 129, "close", "1.1 other", "X-Client-ID: acme", "")
PAIRS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), min_size=1, max_size=5)


def lines_of(pairs: list[tuple[str, str]]) -> bytes:
    return "".join(["\r\n", *(f"{name}: {value}\r\n" for name, value in pairs)]).encode("latin-1")


def reader() -> HeaderReader:
    return HeaderReader(id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=1_000)


def meaning(headers: RewrittenHeaders | None) -> object:
    """Return all that the stages and the exchange use of header lines."""
    if headers is None:
        return None
    facts: HeaderFacts = headers.facts
    return (
        *(
            headers.received,
            headers.sent,
            facts.name,
            facts.name_error,
            facts.host,
            facts.client_address,
            facts.ambiguity,
        ),
        *(facts.is_loop, facts.timeout, facts.length, facts.keep_alive, facts.request_id, facts.host_field),
        *(facts.dropped, facts.added, facts.claim, facts.credentials),
    )


@given(PAIRS, PAIRS, st.booleans(), st.integers(0, 4), st.sampled_from(VALUES))
@example([("X-Note", "bench"), ("X-Client-ID", "bench")], [], True, 0, "acme")
@example([("X-Client-ID", "bench"), ("X-Note", "bench")], [], True, 1, "acme")
@example([("X-Client-ID", "bench"), ("Host", "a")], [], True, 0, "acme\r\nX-Client-ID: acme")
def test_lines_mean_the_same_whatever_came_before_on_the_connection(
    earlier: list[tuple[str, str]],
    other: list[tuple[str, str]],
    is_similar: bool,  # noqa: FBT001 - generated
    place: int,
    value: str,
) -> None:
    """`is_similar`: the last header section is the first one with another value in one line, and so is one between."""
    later = [*earlier] if is_similar else other
    between = [*earlier]
    if is_similar and place < len(later):
        later[place] = (later[place][0], value)
        between[place] = (between[place][0], "between")
    first = reader()
    before = first.read_lines(PEER, "http", lines_of(earlier), MOST)
    before = first.read_lines(PEER, "http", lines_of(between), MOST, before) or before
    found = first.read_lines(PEER, "http", lines_of(later), MOST, before)
    assert meaning(found) == meaning(reader().read_lines(PEER, "http", lines_of(later), MOST))


@pytest.mark.parametrize("name", ["traceparent", "X-Client-ID"])
def test_lines_that_differ_in_one_value_from_two_earlier_requests_are_not_parsed(name: str) -> None:
    """A value that the gateway does not inspect, or the client id; neither a credential nor a malformed value."""
    one = reader()
    before = None
    for value in ("1", "22", "333"):
        section = lines_of([("Host", "a"), (name, value), ("X-Note", "x"), ("Via", "1.1 other")])
        before = one.read_lines(PEER, "http", section, MOST, before)
        assert before is not None
        assert meaning(before) == meaning(reader().read_lines(PEER, "http", section, MOST))
    assert before is not None
    assert before.varying is not None
    assert before.varying.name == name.encode()
    for value in (" 1", "1 ", "1\r\nVia: 1.1 x", "1\n", "\0", ""):
        section = lines_of([("Host", "a"), (name, value), ("X-Note", "x"), ("Via", "1.1 other")])
        found = one.read_lines(PEER, "http", section, MOST, before)
        assert meaning(found) == meaning(reader().read_lines(PEER, "http", section, MOST))


def test_a_value_that_the_gateway_inspects_is_read_each_time() -> None:
    one = reader()
    before = None
    for value in ("1-1", "1-2", "1-3"):
        section = lines_of([("Host", "a"), ("X-Request-ID", value)])
        before = one.read_lines(PEER, "http", section, MOST, before)
        assert before is not None
        assert before.varying is None
        assert before.facts.request_id == value


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("...", True), (".a", True), ("x" * 128, True), (".", False), ("..", False), ("a b", False), ("x" * 129, False)],
)
def test_a_request_id_is_kept_if_it_can_be_a_segment_of_a_path(given: str, is_kept: bool) -> None:  # noqa: FBT001 - a case
    """Browsers and other clients resolve the segments `.` and `..`, so no URL of /explain could name them."""
    found = reader().read_lines(PEER, "http", lines_of([("Host", "a"), ("X-Request-ID", given)]), MOST)
    assert found is not None
    assert found.facts.request_id == (given if is_kept else None)


@pytest.mark.parametrize("count", [2, 1_000])
def test_clients_share_the_facts_of_their_other_fields_and_keep_their_own(count: int) -> None:
    """What is found out about a client, such as its tier, is remembered for its next request by either way."""
    one = reader()
    sections = [lines_of([("Host", "a"), ("X-Client-ID", f"client-{number}")]) for number in range(count)]
    facts, before = [], None
    for section in sections:
        before = one.read_lines(PEER, "http", section, MOST, before)
        assert before is not None
        facts.append(before.facts)
    assert len({id(fact.rest) for fact in facts}) == 1
    assert [fact.name for fact in facts] == [f"client-{number}" for number in range(count)]
    for section, fact in zip(sections, facts, strict=True):
        again = one.read_lines(PEER, "http", section, MOST)
        assert again is not None
        assert again.facts is fact


def test_a_reader_with_another_configuration_reads_the_lines_anew() -> None:
    section = lines_of([("Host", "a"), ("X-Client-ID", "acme")])
    before = reader().read_lines(PEER, "http", section, MOST)
    other = reader()
    found = other.read_lines(PEER, "http", lines_of([("Host", "a"), ("X-Client-ID", "bench")]), MOST, before)
    assert found is not None
    assert found.facts.owner is other


def test_the_header_lines_of_first_requests_are_remembered_as_a_whole() -> None:
    """By address, scheme and permitted number of lines; up to a size, and up to a number of them."""
    one = reader()
    section = lines_of([("Host", "a"), ("X-Client-ID", "acme"), ("X-Note", "bench")])
    found = one.read_lines(PEER, "http", section, MOST)
    assert one.read_lines(PEER, "http", bytes(bytearray(section)), MOST) is found
    for other in (
        one.read_lines("192.0.2.2", "http", section, MOST),
        one.read_lines(PEER, "https", section, MOST),
    ):
        assert other is not None
        assert found is not None
        assert other.sent != found.sent
    assert one.read_lines(PEER, "http", section, 2) is None
    long = lines_of([("Host", "a"), ("X-Note", "x" * MAX_REMEMBERED_BYTES)])
    assert one.read_lines(PEER, "http", long, MOST) is not one.read_lines(PEER, "http", long, MOST)
    for number in range(2 * MAX_FIRST):
        one.read_lines(PEER, "http", lines_of([("X-Note", f"{number}")]), MOST)
    assert one._first.cache_info().currsize == MAX_FIRST
