"""The fast grammar and the general parser yield the same head: the fast one declines a head, or equals the other.

A million heads are a command of their own: `make heads`.
"""

import random
import sys
from dataclasses import dataclass, replace

from api_gateway.downstream.request_reader import RequestReader
from api_gateway.errors import GatewayError
from api_gateway.http1.fast_parser import pairs_of, parse_request_head
from api_gateway.http1.request_head import RequestHead
from api_gateway.models import HeaderList
from api_gateway.proxy.header_facts import HeaderReader
from tests.cases import each
from tests.kit import LIMITS, attributes_of

HEADS = 16_000
PARTS = tuple(attributes_of(RequestHead("GET", b"/", [], "1.1", 0, keep_alive=True)))
LIMITED = replace(LIMITS, header_bytes=2048, header_lines=12)
READER = HeaderReader(id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=1_000_000)

METHODS = (b"GET", b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH")
ODD_METHODS = (
    b"get",
    b"PROPFIND",
    b"TRACE",
    b"CONNECT",
    b"PRI",
    b"GE",
    b"G\xffT",
    b"A" * 65,
    b"M-SEARCH",
    b" GET",
    b"\r\nGET",
)
PATHS = (
    b"/api",
    b"/api/x",
    b"/api/%41",
    b"/",
    b"/api/a;b=c",
    b"/api/.//..",
    b"/api/~'()*!$&,+=:@-_.",
    b'/api/"<>[]^`{|}\\',
)
ODD_PATHS = (
    b"*",
    b"api",
    b"http://h/api",
    b"HTTPS://u@h/x",
    b"//h/x",
    b"/a b",
    b"/a\tb",
    b"/\xe4",
    b"/a\x7f",
    b"",
    b"/a\0",
)
QUERIES = (b"", b"", b"?", b"?a=b&c=%20", b"?a?b", b'?"<>{}|\\^`')
ODD_QUERIES = (b"#x", b"?a#b", b"?\xe4", b"? ", b"?\x01")
VERSIONS = (b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"http/1.1", b"HTTP/1.1 ", b"HTTP/11", b"")
FIELDS = (
    *(
        b"Host: a",
        b"host: gateway.test:80",
        b"Accept: */*",
        b"User-Agent: x/1 (y; z)",
        b"X-Client-ID: me",
        b"Cookie: a=b",
    ),
    *(b"X-Request-ID: 1-2", b"Via: 1.1 x", b"X: \xe4\xff", b"!#$%&'*+.^_`|~: ~", b"X-Forwarded-For: 1", b"DNT: 1"),
)
CONNECTIONS = (
    b"",
    b"",
    b"",
    b"Connection: close",
    b"Connection: keep-alive",
    b"connection: Keep-Alive",
    b"CONNECTION: CLOSE",
)
BODIES = (
    *(
        (b"", b""),
        (b"", b""),
        (b"Content-Length: 0", b""),
        (b"Content-Length: 2", b"ok"),
        (b"content-length: 02", b"ok"),
    ),
    *((b"CONTENT-LENGTH: 0000", b""), (b"Content-Length: 300", b"z" * 300)),
)
ODD_BODIES = (
    *(
        (b"", b"ok"),
        (b"Content-Length: 3", b"ok"),
        (b"Content-Length: 2", b"okGET / HTTP/1.1\r\n\r\n"),
        (b"", b"\r\n"),
    ),
    *((b"Content-Length: 2\r\nContent-Length: 2", b"ok"), (b"Connection: close\r\nConnection: close", b"")),
    *((b"Transfer-Encoding: chunked", b"2\r\nok\r\n0\r\n\r\n"), (b"", b"GET / HTTP/1.1\r\n")),
)
ODD_FIELDS = (
    *(b"Transfer-Encoding: chunked", b"transfer-encoding: identity", b"Transfer-Encoding: gzip, chunked"),
    *(b"Content-Length: 2, 2", b"Content-Length: +2", b"Content-Length: 2 ", b"Content_Length: 9"),
    *(b"Content-Length: 99999999999999999999", b"Content-Length:", b"Content-Length: 0x2", b"Content-Length:2"),
    *(b"Content-Length : 2", b"Connection: close, x", b"Connection: x", b"Connection: upgrade", b"Connection:"),
    *(b"Connection: keep-alive, close", b"Expect: 100-continue", b"Proxy-Connection: close", b"Upgrade: h2c"),
    *(b"Upgrade: websocket", b"TE: trailers", b"Max-Forwards: 1", b"Trailer: x", b"X: " + b"y" * 2100),
    *(b"X:", b"X: ", b"X:  a", b"X: a ", b"X: a\tb", b"X: \0", b"X: a\rb", b"X: a\nb", b" X: a", b"X", b": a"),
    *(b"\xff: a", b"X: a\r\n b", b"Ho st: a", b"X-Client\xe4: a", b"X: a\x7f", b"X: \x01"),
)
BREAKS = (b"\n", b"\r", b"\r\r\n", b" \r\n", b"\n\r\n", b"\r\n\r\n")


def generate(source: random.Random, odd: float) -> bytes:
    """Return a head with what may follow it; `odd` is the probability, 0 to 1, that a part of it is unusual."""
    chance, choice = source.random, source.choice
    method = choice(ODD_METHODS if chance() < odd else METHODS)
    path = choice(ODD_PATHS if chance() < odd else PATHS)
    query = choice(ODD_QUERIES if chance() < odd else QUERIES)
    version = choice(VERSIONS) if chance() < odd else b"HTTP/1.1"
    parts = [method, b" ", path, query, b" ", version, choice(BREAKS) if chance() < odd else b"\r\n"]
    for _ in range(source.randrange(14) if chance() < odd else source.randrange(6)):
        field = choice(ODD_FIELDS if chance() < odd else FIELDS)
        parts += (field, choice(BREAKS) if chance() < odd / 2 else b"\r\n")
    length, body = choice(ODD_BODIES if chance() < odd else BODIES)
    parts += [b"%b\r\n" % field for field in (length, choice(CONNECTIONS)) if field]
    parts += (b"\r\n", body)
    message = b"".join(parts)
    if chance() < odd / 2:  # one byte is another one
        at = source.randrange(len(message))
        message = message[:at] + bytes((source.randrange(256),)) + message[at + 1 :]
    return message


def by_fast_grammar(received: bytes) -> tuple[RequestHead, bytes] | None:
    """Return head and body if the fast path takes the request, see `FastPath.try_handle`."""
    parts = parse_request_head(received)
    if parts is None:
        return None
    method, path, query, lines, body = parts
    headers = READER.read_lines("192.0.2.1", "http", lines, LIMITED.header_lines)
    if headers is None or len(body) != headers.facts.length or len(received) - len(body) > LIMITED.header_bytes:
        return None
    facts = headers.facts
    head = RequestHead(method, path + query, pairs_of(lines), "1.1", facts.length, keep_alive=facts.keep_alive)
    head.expects_continue, head.has_body_begun = bool(facts.expectation), bool(body)
    return head, body


@dataclass(slots=True)
class Sink:
    """Collects what a reader reports."""

    heads: list[RequestHead]
    body: bytes = b""
    complete: int = 0
    error: GatewayError | None = None
    reader: RequestReader | None = None

    def on_head_begun(self) -> None:
        pass

    def on_request(self, head: RequestHead, _trailers: HeaderList) -> None:
        self.heads.append(head)

    def on_body_piece(self, piece: bytes) -> None:
        self.body += piece

    def on_body_announced(self, size: int) -> None:
        pass

    def on_body_complete(self) -> None:
        self.complete += 1

    def on_handshake(self) -> None:
        pass

    def refuse(self, error: GatewayError) -> None:
        self.error = self.error or error
        if self.reader is not None:
            self.reader.stop()


def by_general_parser(received: bytes) -> Sink:
    """Return what the general parser reports."""
    sink = Sink([])
    sink.reader = reader = RequestReader(LIMITED, sink)
    view = reader.begin(received)
    while view and sink.error is None:
        size = reader.feed(view)
        if not size:
            break
        view = view[size:]
    if sink.error is None:
        reader.check_sizes()
    reader.close()
    sink.reader = None
    return sink


def compare(received: bytes) -> bool:
    """Return whether the fast grammar takes the head; fails if the general parser yields another one."""
    fast = by_fast_grammar(received)
    if fast is None:
        return False
    head, body = fast
    sink = by_general_parser(received)
    assert sink.error is None, f"{sink.error} refuses {received!r}"
    assert (len(sink.heads), sink.complete, sink.body) == (1, 1, body), f"another framing: {received!r}"
    other = sink.heads[0]
    for name in PARTS:
        assert getattr(head, name) == getattr(other, name), f"{name} differs: {received!r}"
    return True


def compare_many(count: int, seed: int) -> int:
    """Compare that many generated heads; return how many the fast grammar takes."""
    source = random.Random(seed)
    return sum(compare(generate(source, source.choice((0.0, 0.02, 0.1, 0.3)))) for _ in range(count))


@each("seed", range(4))
def test_the_fast_grammar_declines_a_head_or_equals_the_general_parser(seed: int) -> None:
    taken = compare_many(HEADS // 4, seed)
    assert HEADS // 4 * 0.3 < taken < HEADS // 4 * 0.9, "both outcomes are frequent"


def test_a_difference_is_found() -> None:
    """The comparison is of something: a head that both take, with one byte changed, is another head."""
    plain = b"POST /api HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok"
    assert compare(plain)
    first, second = by_general_parser(plain).heads[0], by_general_parser(plain.replace(b": a", b": b")).heads[0]
    assert first.headers != second.headers


@each("cut", range(1, 60, 7))
def test_the_general_parser_yields_the_same_head_however_it_is_cut(cut: int) -> None:
    received = b"POST /api/x?y HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nok"
    whole = by_general_parser(received)
    sink = Sink([])
    sink.reader = reader = RequestReader(LIMITED, sink)
    for piece in (received[:cut], received[cut:]):
        view = reader.begin(piece)
        while view:
            view = view[reader.feed(view) :]
    for name in PARTS:
        assert getattr(sink.heads[0], name) == getattr(whole.heads[0], name)
    assert (sink.body, sink.complete) == (b"ok", 1)
    assert sink.heads[0].expects_continue


if __name__ == "__main__":
    amount, chosen = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    number = compare_many(amount, chosen)
    print(f"{amount} heads, seed {chosen}: {number} taken by the fast grammar, all equal to the general parser's")
