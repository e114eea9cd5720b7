"""What routes do with requests and responses: nothing that a request contains changes more than it should."""

import re
import sys
import zlib
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from api_gateway.assembly.route_actions import compression_of, mirroring_of
from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.config import GatewayConfig
from api_gateway.errors import BadRequest, StartupError
from api_gateway.http1.fast_parser import pairs_of
from api_gateway.http1.headers import fields_of
from api_gateway.models import Exchange, HeaderList
from api_gateway.observability.selected_lines import at_level, by_route
from api_gateway.proxy.compression import (
    GZIP,
    MOST_FREE_CONTEXTS,
    VARIES,
    ZSTD,
    Compression,
    GzipEncoder,
    ZstdContexts,
    weights_of,
)
from api_gateway.proxy.direct_responses import DirectResponse
from api_gateway.proxy.edited_lines import NOTHING_EDITED
from api_gateway.proxy.head_editing import HeadEditor, HeaderEdits
from api_gateway.proxy.mirroring import BODY_TOO_LARGE, BUSY, INCOMPLETE, CopiedHead, Mirrors
from api_gateway.proxy.path_rewriting import PathRewriting
from api_gateway.proxy.upstream_split import chosen
from api_gateway.proxy.value_template import ValueTemplate, path_parameters
from api_gateway.resilience.breaker_policy import BreakerPolicy
from api_gateway.settings.route_actions import (
    CompressionSection,
    MirrorSection,
    RedirectSection,
    RequestHeadersSection,
    ResponseHeadersSection,
)
from api_gateway.transport.http1_transport import UpstreamTransport
from api_gateway.upstreams.load_balancing import round_robin
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Upstream
from api_gateway.upstreams.upstream_client import Timeouts, UpstreamClient
from tests.cases import each

TARGETS = st.lists(
    st.sampled_from(
        ["/", "//", "a", "..", ".", "%2F", "%5C", "\\", "%252F", "%00", "%0d%0a", ";", "@", ":", "x.test"]
    ),
    max_size=6,
).map(lambda parts: "/" + "".join(parts))


# Redirects


@each(
    "to",
    [
        *("{path}", "//x.test", "/\\x.test", "/{path}", "https://", "https://{id}", "https://x.test{id}", "x.test/a"),
        *(
            "https://x.test{query}",
            "https://{path}",
            "javascript:{path}",
            "https://user@x.test/",
            "/a/{path}",
            "/{",
            "",
        ),
    ],
)
def test_a_redirect_whose_host_a_request_could_choose_is_refused(to: str) -> None:
    with pytest.raises(ValidationError):
        RedirectSection(to=to)


@given(
    TARGETS,
    st.sampled_from(["https://www.test{path}{query}", "/new{path}", "/{id}", "/to/{id}{query}", "/?to={path}"]),
)
def test_no_request_chooses_the_host_of_a_redirect_or_ends_its_line(target: str, to: str) -> None:
    RedirectSection(to=to)
    answer = DirectResponse(308, location=ValueTemplate.of(to), path="/{id}")
    try:
        fields = dict(answer.fields(target.encode()))
    except BadRequest:
        return
    location = fields[b"location"].decode()
    assert location.isascii()
    assert location.isprintable()
    assert "\\" not in location
    if to.startswith("https"):
        assert location.startswith("https://www.test/")
    else:
        assert location.startswith("/")
        assert not location.startswith("//")


# Paths


@given(TARGETS)
def test_a_rewritten_path_has_the_segments_of_its_template_for_every_server(target: str) -> None:
    rewriting = PathRewriting("/u/{id}", template=ValueTemplate.of("/internal/{id}/x"))
    try:
        found = rewriting.target_of(f"/u{target}".encode()).decode()
    except BadRequest:
        return
    first, inner, middle, last = found.split("/")
    assert (first, inner, last) == ("", "internal", "x")
    assert middle.strip(".; ") or not middle


@pytest.mark.parametrize("prefix", [b"", b"/v2"])
def test_no_request_has_its_path_for_the_upstream_begin_with_a_host(prefix: bytes) -> None:
    rewriting = PathRewriting("/api", prefix=prefix)
    for target in (b"/api//x.test/a?b=//c", b"/api///x.test/a?b=//c"):
        found = rewriting.target_of(target)
        assert not found.startswith(b"//")
        assert found.endswith(b"/x.test/a?b=//c")


@each("segment", ["..", "%2e%2e", "%252e.", "..;x", "a%2Fb", "a%5cb", "a%252fb", "%00", ".%20", ""])
def test_a_segment_that_servers_read_differently_is_no_parameter(segment: str) -> None:
    with pytest.raises(BadRequest):
        path_parameters("/u/{id}/x", f"/u/{segment}/x".encode())


# Header fields


@each(
    "name",
    [
        *("Host", "Content-Length", "Transfer-Encoding", "Connection", "TE", "Upgrade", "Via", "Expect", "Trailer"),
        *("X-Forwarded-For", "Forwarded", "X-Request-ID", "X-Request-Timeout", "X-Gateway-Cost", "RateLimit"),
    ],
)
def test_fields_that_the_gateway_depends_on_cannot_be_changed(name: str) -> None:
    for given_fields in ({"set": {name: "x"}}, {"add": {name: "x"}}, {"remove": [name]}):
        with pytest.raises(ValidationError, match="by the gateway itself"):
            RequestHeadersSection.model_validate(given_fields)
    for name_of_response in (
        "Content-Length",
        "Connection",
        "Date",
        "Content-Encoding",
        "Access-Control-Allow-Origin",
    ):
        with pytest.raises(ValidationError, match="by the gateway itself"):
            ResponseHeadersSection.model_validate({"set": {name_of_response: "x"}})
    with pytest.raises(ValidationError, match="credentials"):
        RequestHeadersSection.model_validate({"set": {"Authorization": "Bearer x"}})
    with pytest.raises(ValidationError):
        RequestHeadersSection.model_validate({"set": {"X-A": "a\r\nX-B: c"}})


class Facts:
    """What belongs to the header fields of requests, see `EditedLinesCache`."""

    edited = NOTHING_EDITED


def test_values_of_a_request_end_no_line_and_fields_are_replaced_by_name_alone() -> None:
    editor = HeadEditor(
        HeaderEdits(frozenset({b"x-gone"}), ((b"X-Set", ValueTemplate.of("<{client}>")),)),
        HeaderEdits(frozenset(), (), ((b"X-Id", ValueTemplate.of("{request_id}")),)),
    )
    exchange = Exchange("r1", "GET", "/api", "peer", 0.0)
    exchange.client = type("Named", (), {"id": "a\r\nX-Evil: \u00e9 1"})()
    lines = b"\r\nX-GONE: 1\r\nx-set: old\r\nX-Sets: kept\r\nA: X-Gone: 2\r\n"
    expected = b"\r\nX-Sets: kept\r\nA: X-Gone: 2\r\nX-Set: <a%0D%0AX-Evil:%20%C3%A9%201>\r\n"
    assert editor.edited(lines, Facts(), exchange, b"/api") == expected
    for forged in (b"\r\nX_Set: admin\r\n", b"\r\nx_SET: admin\r\nX_Gone: 1\r\n"):  # CGI reads X_Set as X-Set
        assert editor.edited(forged, Facts(), exchange, b"/api") == b"\r\nX-Set: <a%0D%0AX-Evil:%20%C3%A9%201>\r\n"
    assert editor.request.kept([(b"X_Set", b"1"), (b"X-Sets", b"2")]) == [(b"X-Sets", b"2")]


@pytest.mark.parametrize("text", ["fixed", "<{request_id}>"])
def test_lines_that_are_kept_with_a_header_section_are_those_of_the_same_route_and_lines(text: str) -> None:
    def editor_of(name: bytes) -> HeadEditor:
        return HeadEditor(HeaderEdits(frozenset({b"x-gone"}), ((name, ValueTemplate.of(text)),)), HeaderEdits())

    facts, editors = Facts(), (editor_of(b"X-One"), editor_of(b"X-Two"))
    for number, lines in enumerate([b"\r\nA: 1\r\nX-Gone: 1\r\n", b"\r\nA: 2\r\n", b"\r\n"] * 2):
        for _ in range(2):
            for name, editor in zip((b"X-One", b"X-Two"), editors, strict=True):
                exchange = Exchange(f"r{number}", "GET", "/api", "peer", 0.0)
                value = text.format(request_id=exchange.id).encode()
                expected = lines.replace(b"X-Gone: 1\r\n", b"") + name + b": " + value + b"\r\n"
                assert editor.edited(lines, facts, exchange, b"/api") == expected
    assert HeadEditor(HeaderEdits(), HeaderEdits()).edited(b"\r\n", facts, exchange, b"/api") == b"\r\n"


@given(TARGETS.map(str.encode))
def test_parameters_of_a_plain_path_are_what_the_closer_look_finds(raw_path: bytes) -> None:
    def outcome(template: str, path: bytes) -> dict[str, bytes] | str:
        try:
            found = path_parameters(template, path)
        except BadRequest as error:
            return str(error)
        return {name: value.replace(b"%61", b"a") for name, value in found.items()}

    # A character that is encoded leaves the fast way, and stands for itself. A digit of an encoding stays.
    encoded = re.sub(rb"(?s)(%.?.?)|a", lambda found: found[1] or b"%61", raw_path)
    for template in ("/{id}", "/a/{id}", "/{one}/{two}"):
        assert outcome(template, raw_path) == outcome(template, encoded)


# Weights


def test_changed_weights_move_as_few_clients_as_necessary_and_only_to_the_upstream_that_grows() -> None:
    clients = [f"id:{number}" for number in range(20_000)]
    before = {client: chosen([("a", 95), ("b", 5)], client) for client in clients}
    after = {client: chosen([("a", 90), ("b", 10)], client) for client in clients}
    assert Counter(before.values())["b"] == pytest.approx(1_000, rel=0.15)
    assert Counter(after.values())["b"] == pytest.approx(2_000, rel=0.15)
    assert all(after[client] == "b" for client, name in before.items() if name == "b")
    assert {chosen([("a", 1), ("b", 0)], client) for client in clients[:1_000]} == {"a"}


# Compression


def gzip_encoder(flushes: bool) -> GzipEncoder:  # noqa: FBT001 - see `NewEncoder`
    return GzipEncoder(5, flushes)


POLICY = Compression(((ZSTD, gzip_encoder), (GZIP, gzip_encoder)), frozenset({b"text/*", b"application/json"}), 100)


@each(
    ("accepted", "expected"),
    [
        ([], None),
        ([b"gzip"], GZIP),
        ([b"GZip"], GZIP),
        ([b"x-gzip"], GZIP),
        ([b"*"], ZSTD),
        ([b"gzip, zstd"], ZSTD),
        ([b"gzip", b"zstd;q=0.9"], GZIP),
        ([b"zstd;q=0, *"], GZIP),
        ([b"*;q=0"], None),
        ([b"gzip;q=0.5, identity"], None),
        ([b"gzip;q=0.5, identity;q=0.1"], GZIP),
        ([b"gzip;q=2"], None),
        ([b"gzip;q="], None),
        ([b"gzip;level=1"], None),
        ([b",, gzip ;Q=1.000,"], GZIP),
        ([b"br, deflate"], None),
    ],
)
def test_the_coding_is_the_one_with_the_highest_weight(accepted: list[bytes], expected: bytes | None) -> None:
    found = POLICY.coding(accepted)
    assert (None if found is None else found[0]) == expected


@pytest.mark.parametrize("flushes", [False, True])
def test_a_zstd_context_is_used_again_after_a_complete_response_only(*, flushes: bool) -> None:
    """An aborted response leaves its bytes in its context, which no other client may receive."""
    zstandard = pytest.importorskip("zstandard")
    contexts = ZstdContexts(zstandard, 3)

    def decoded(sent: bytes) -> bytes:
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        content: bytes = decompressor.decompress(sent)
        assert (decompressor.eof, decompressor.unused_data) == (True, b"")
        return content

    aborted = contexts.encoder(flushes)
    aborted.encode(b"secret" * 100)
    assert repr(contexts) == "<ZstdContexts [0 free]>"
    first, second = contexts.encoder(flushes), contexts.encoder(flushes)
    parts = [first.encode(b"one"), second.encode(b"two")]
    assert decoded(parts[0] + first.end()) == b"one"
    third = contexts.encoder(flushes)
    assert repr(contexts) == "<ZstdContexts [0 free]>", "the context of the first response"
    with pytest.raises(AttributeError):
        first.encode(b"of a response that has ended")
    with pytest.raises(AttributeError):
        first.end()
    assert decoded(third.encode(b"three") + third.end()) == b"three"
    assert decoded(parts[1] + second.end()) == b"two"
    assert repr(contexts) == "<ZstdContexts [2 free]>"
    many = [contexts.encoder(flushes) for _ in range(MOST_FREE_CONTEXTS + 2)]
    assert [decoded(one.encode(b"x" * 5_000) + one.end()) for one in many] == [b"x" * 5_000] * len(many)
    assert repr(contexts) == f"<ZstdContexts [{MOST_FREE_CONTEXTS} free]>"


def test_weights_are_limited_to_valid_ones() -> None:
    assert weights_of([b"a;q=0.123, b;q=0.1234, c;q=-1, d"]) == {b"a": 0.123, b"b": 0.0, b"c": 0.0, b"d": 1.0}


@each(
    ("status", "changes", "expected"),
    [
        (200, {}, True),
        (404, {}, True),
        (200, {b"content-length": [b"99"]}, False),
        (200, {b"content-length": []}, True),
        (200, {b"content-type": [b"Text/HTML; charset=utf-8"]}, True),
        (200, {b"content-type": [b"image/png"]}, False),
        (200, {b"content-type": []}, False),
        (200, {b"content-encoding": [b"br"]}, False),
        (200, {b"content-encoding": [b"identity"]}, True),
        (200, {b"cache-control": [b"public, No-Transform"]}, False),
        (200, {b"content-range": [b"bytes 0-1/2"]}, False),
        (200, {b"repr-digest": [b"sha-256=:x:"]}, False),
        (206, {}, False),
        (204, {}, False),
        (304, {}, False),
    ],
)
def test_only_what_may_be_changed_is_compressed(
    status: int, changes: dict[bytes, list[bytes]], *, expected: bool
) -> None:
    fields = {b"content-type": [b"application/json"], b"content-length": [b"100"], **changes}
    assert POLICY.concerns(status, {name: values for name, values in fields.items() if values}) is expected


def test_the_head_of_a_compressed_response_says_so() -> None:
    headers = [(b"ETag", b'"x"'), (b"Content-Length", b"9"), (b"Accept-Ranges", b"bytes"), (b"Vary", b"Origin")]
    assert POLICY.headers(headers, GZIP) == [
        (b"ETag", b'W/"x"'),
        (b"Vary", b"Origin"),
        (b"vary", b"Accept-Encoding"),
        (b"content-encoding", b"gzip"),
    ]
    assert POLICY.headers(headers, None) == [*headers, (b"vary", b"Accept-Encoding")]
    kept = [(b"Vary", b"Origin, ACCEPT-encoding"), (b"ETag", b'W/"x"')]
    assert POLICY.headers(kept, None) == kept
    assert POLICY.headers(kept, GZIP) == [*kept, (b"content-encoding", b"gzip")]


RESPONSE_FIELDS = st.lists(
    st.sampled_from(
        [
            *[(b"Content-Type", one) for one in (b"text/html; charset=utf-8", b"TEXT/plain", b"image/png")],
            *[(b"content-length", one) for one in (b"99", b"100", b"1000")],
            *[(b"ETag", b'"x"'), (b"etag", b'W/"x"'), (b"Accept-Ranges", b"bytes"), (b"X-Vary", b"1")],
            *[(b"VARY", b"Origin"), (b"Vary", b"accept-encoding"), (b"Cache-Control", b"public")],
            *[(b"cache-control", b"max-age=1, No-Transform"), (b"Content-Encoding", b"br"), (b"Digest", b"x")],
        ]
    ),
    max_size=5,
    unique_by=lambda pair: pair[0].lower(),
)


@given(headers=RESPONSE_FIELDS, status=st.sampled_from([200, 204, 206, 304, 404]))
def test_a_plain_head_is_judged_and_changed_as_its_fields_are(headers: HeaderList, status: int) -> None:
    head = b"HTTP/1.1 %d OK" % status + b"".join([b"\r\n%b: %b" % pair for pair in headers])
    found = POLICY.concerns_plain(status, head)
    if found is None:  # the fields have to be looked at
        return
    assert found is POLICY.concerns(status, fields_of(headers))

    def in_any_order(given: HeaderList) -> list[tuple[bytes, bytes]]:
        return sorted((name.lower(), value) for name, value in given)

    if found:
        assert in_any_order(pairs_of(head + VARIES)) == in_any_order(POLICY.headers(headers, None))
        compressed = pairs_of(POLICY.plain_head(head, GZIP))
        assert in_any_order(compressed) == in_any_order(POLICY.headers(headers, GZIP))


def test_the_coding_of_a_request_is_found_in_its_lines_and_remembered_within_a_limit() -> None:
    for _ in range(2):
        for accepted, expected in ((b"gzip", GZIP), (b"br", None)):
            lines = b"\r\nA: 1\r\naccept-ENCODING: %b\r\nX-Accept-Encoding: zstd\r\n" % accepted
            found = POLICY.coding_for(lines)
            assert (None if found is None else found[0]) == expected
    assert POLICY.coding_for(b"\r\n") is None
    both = POLICY.coding_for(b"\r\nAccept-Encoding: gzip;q=0.1\r\nAccept-Encoding: zstd\r\n")
    assert both is not None
    assert both[0] == ZSTD
    for number in range(1_000):
        POLICY.coding_for(b"\r\nAccept-Encoding: gzip;q=0.%03d\r\n" % number)
    assert len(POLICY._known) <= 64


def test_an_encoder_that_flushes_holds_nothing_back() -> None:
    encoder, reader = gzip_encoder(True), zlib.decompressobj(31)
    for piece in (b"data: 1\n\n", b"data: 2\n\n"):
        assert reader.decompress(encoder.encode(piece)) == piece
    assert encoder.encode(b"") == b""
    reader.decompress(encoder.end())
    assert reader.eof


def test_zstd_needs_a_library_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compression", "compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(StartupError, match=r"route 'users': compression by zstd needs .*api-gateway\[zstd\]"):
        compression_of("users", CompressionSection(codings=["zstd"]))


@pytest.mark.parametrize("flushes", [False, True])
def test_zstd_compresses_with_the_library_that_is_there(*, flushes: bool) -> None:
    zstandard = pytest.importorskip("zstandard")
    ((name, new),) = compression_of("users", CompressionSection(codings=["zstd"])).codings
    encoder, pieces = new(flushes), [b"data: %d\n\n" % number for number in range(100)]
    reader = zstandard.ZstdDecompressor().decompressobj()
    seen = []
    for piece in pieces:
        seen.append(reader.decompress(encoder.encode(piece)))
        assert not flushes or seen[-1] == piece
    seen.append(reader.decompress(encoder.end()))
    assert (name, b"".join(seen)) == (ZSTD, b"".join(pieces))


# Mirroring


@each(
    ("route", "message"),
    [
        ({"mirror": {"upstream": "nxet"}}, "no such upstream, got 'nxet'; did you mean 'next'"),
        ({"mirror": {"upstream": "users"}}, "for copies alone, but route 'users' sends requests to 'users'"),
        ({"mirror": {"upstream": "spare"}}, "for copies alone, but route 'other' sends requests to 'spare'"),
        ({"upstream": None, "respond": {}, "mirror": {"upstream": "next"}}, "needs a route with an upstream"),
        ({"mirror": {"upstream": "next", "share": 1.5}}, "less than or equal to 1"),
        ({"mirror": {"upstream": "next", "max_in_flight": 0}}, "greater than or equal to 1"),
    ],
)
def test_a_mirror_whose_copies_would_disturb_others_or_reach_nothing_is_refused(
    route: dict[str, Any], message: str
) -> None:
    upstreams = {name: {"targets": [{"url": f"http://{name}.test"}]} for name in ("users", "next", "spare")}
    other = {"name": "other", "path": "/api/o", "upstream": "users", "fallback": {"upstream": "spare"}}
    routes = [{"name": "users", "path": "/api", "upstream": "users", **route}, other]
    with pytest.raises(ValidationError, match=re.escape(message)):
        GatewayConfig.model_validate({"upstreams": upstreams, "routes": routes})


def test_a_share_of_requests_is_copied_and_only_what_is_within_the_limits() -> None:
    draws, ends = iter((0.24, 0.25, 0.9, 0.0, 0.0, 0.0)), []
    in_flight: Counter[str] = Counter()
    mirrors = Mirrors(
        clock=lambda: 0.0, draw=lambda: next(draws), observe=lambda *end: ends.append(end), in_flight=in_flight
    )
    mirroring = mirroring_of(MirrorSection(upstream="next", share=0.25, max_in_flight=1, max_body_bytes=10))
    assert mirroring is not None
    assert [mirrors.admits("r", mirroring, None) for _ in range(3)] == [True, False, False]
    upstream = Upstream("next", [Target("http://next")], CircuitBreaker(BreakerPolicy(), 0.0), round_robin)
    client = UpstreamClient(upstream, UpstreamTransport(), Timeouts(1, 1, 1, None))
    head = CopiedHead("POST", b"/", b"h", b"", "k")
    copy = mirrors.begin("r", mirroring, client, head)
    assert not mirrors.admits("r", mirroring, 10)
    assert not mirrors.admits("r", mirroring, 11)
    copy.add(b"12345")
    copy.add(b"678901")
    copy.add(b"after its end")
    copy.drop(INCOMPLETE)
    assert ends == [("r", BUSY), ("r", BODY_TOO_LARGE), ("r", BODY_TOO_LARGE)]
    assert (in_flight["r"], bytes(copy.body)) == (0, b"")
    assert mirrors.admits("r", mirroring, 10)


# Limits


@each(
    ("route", "message"),
    [
        ({"max_header_bytes": 70_000}, "max_header_bytes: must be at most server.max_header_bytes, 65536, got 70000"),
        ({"max_header_lines": 300}, "max_header_lines: must be at most server.max_header_lines, 200, got 300"),
        (
            {"max_body_bytes": "1GB"},
            "max_body_bytes: must be at most server.max_body_bytes, 104857600, got 1000000000",
        ),
        ({"response_timeout": 9, "timeout": 5}, "response_timeout: must be at most the route's timeout, 5, got 9"),
        ({"upstream": None, "respond": {}, "response_timeout": 9}, "response_timeout: needs a route with an upstream"),
        ({"response_timeout": 0}, "greater than 0"),
        ({"max_header_lines": 0}, "greater than or equal to 1"),
    ],
)
def test_limits_of_a_route_that_have_no_effect_are_errors(route: dict[str, Any], message: str) -> None:
    upstreams = {"users": {"targets": [{"url": "http://users.test"}]}}
    with pytest.raises(ValidationError, match=re.escape(message)):
        GatewayConfig.model_validate(
            {"upstreams": upstreams, "routes": [{"name": "a", "path": "/api", "upstream": "users", **route}]}
        )


OF_FORWARDING: dict[str, Any] = {
    "rewrite": {"prefix": "/v2"},
    "strip_prefix": "/api",
    "rewrite_urls": False,
    "rewrite_cookies": True,
    "cookie_domains": {"a.test": ""},
    "request_headers": {"set": {"X-A": "1"}},
    "response_headers": {"set": {"X-A": "1"}},
    "compression": {},
    "cost_from": {"pointer": "/a"},
    "timeout": 1,
    "response_timeout": 1,
    "fallback": {"status": 200},
    "mirror": {"upstream": "users"},
    "forward_credentials": True,
}


@each("setting", list(OF_FORWARDING))
@each("destination", [{"respond": {"body": "x"}}, {"redirect": {"to": "/y"}}])
def test_what_applies_to_forwarding_is_an_error_where_the_gateway_itself_responds(
    setting: str, destination: dict[str, Any]
) -> None:
    """Otherwise it would be ignored. With its default value, as in a complete configuration, it is none."""
    sections: dict[str, Any] = {"upstreams": {"users": {"targets": [{"url": "http://users.test"}]}}}
    route = {"name": "a", "path": "/api", **destination}
    whole = GatewayConfig.model_validate(sections | {"routes": [route]}).model_dump()
    GatewayConfig.model_validate(whole)
    hint = "; set respond.headers" if setting == "response_headers" and "respond" in destination else ""
    message = f"routes[0] (a).{setting}: needs a route with an upstream, as the gateway itself responds{hint}"
    with pytest.raises(ValidationError, match=re.escape(f"{message} ")):
        GatewayConfig.model_validate(sections | {"routes": [route | {setting: OF_FORWARDING[setting]}]})


# The access log


def test_the_access_log_of_a_route_has_what_its_level_says() -> None:
    lines: list[Any] = []

    def write_line(exchange: Exchange, _: float) -> None:
        lines.append((exchange.route, exchange.status))

    levels: dict[str, str | float] = {"e": "errors", "n": "none", "o": 1.0, "z": 0.0}
    write = by_route(write_line, {name: at_level(write_line, level) for name, level in levels.items()})
    for route in ("e", "n", "o", "z", "a", None):
        for status in (200, 500):
            exchange = Exchange("1", "GET", "/", "p", 0.0)
            exchange.route, exchange.status = route, status
            write(exchange, 0.0)
    assert lines[:4] == [("e", 500), ("o", 200), ("o", 500), ("z", 500)]
    assert lines[4:] == [("a", 200), ("a", 500), (None, 200), (None, 500)]
