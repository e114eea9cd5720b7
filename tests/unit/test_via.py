"""The entry in `Via`: which values contain it, and what the gateway remembers of a request that returns."""

from api_gateway.errors import LoopDetected
from api_gateway.http1.headers import fields_of
from api_gateway.http1.via import Via
from api_gateway.models import HeaderList
from api_gateway.proxy.admission import Admission
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.stages import AmbiguityStage
from tests.cases import each


@each(
    ("values", "expected"),
    [
        ([b"1.1 edge-1"], True),
        ([b"1.0 fred, 1.1 edge-1"], True),
        ([b"1.0 fred", b"HTTP/1.1 edge-1 (a comment)"], True),
        ([b"1.1\tEDGE-1"], True),
        ([b"2 edge-1,1.1 x"], True),
        ([], False),
        ([b""], False),
        ([b"edge-1"], False),
        ([b"1.1 edge-12"], False),
        ([b"1.1 x (edge-1)"], False),
        ([b"1.1 edge-1:80"], False),
        ([b", ,1.1 , edge-1"], False),
    ],
)
def test_only_an_entry_with_the_pseudonym_counts(values: list[bytes], *, expected: bool) -> None:
    assert Via("edge-1").is_in(values) is expected


@each("version", ["1.0", "1.1", "2", "3"])
def test_an_entry_names_the_received_version(version: str) -> None:
    name, value = Via("edge-1").field(version)
    assert (name, value) == (b"via", f"{version} edge-1".encode())
    assert Via("edge-1").is_in([value])


@each(
    ("headers", "is_loop"),
    [
        ([(b"Via", b"1.1 edge-1")], True),
        ([(b"VIA", b"1.1 other, 1.0 edge-1")], True),
        ([(b"Via", b"1.1 other"), (b"X-Client-ID", b"me"), (b"via", b"1.1 edge-1")], True),
        ([(b"Via", b"1.1 other")], False),
        ([(b"X-Via", b"1.1 edge-1")], False),
        ([], False),
    ],
)
def test_a_request_that_returns_is_known_by_its_plain_lines_and_by_its_fields(
    headers: HeaderList, *, is_loop: bool
) -> None:
    reader = HeaderReader(id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=0, via=Via("edge-1"))
    headers = [(b"Host", b"h"), *headers]
    lines = b"\r\n" + b"".join(b"%b: %b\r\n" % pair for pair in headers)
    for _ in range(2):  # read, then remembered
        plain = reader.read_lines("192.0.2.7", "http", lines, 100)
        assert plain is not None
        for facts in (plain.facts, reader.read("192.0.2.7", fields_of(headers), "1.1")):
            error = AmbiguityStage().decide(Admission.plan(facts, "GET", "/api", b"/api", 0))
            assert facts.is_loop is is_loop
            assert isinstance(error, LoopDetected) if is_loop else error is None
        assert plain.sent.endswith(b"via: 1.1 edge-1\r\n")
        assert all(b"%b: %b\r\n" % pair in plain.sent for pair in headers if pair[0].lower() == b"via")
