"""Valid and nearly valid messages: what mutation begins with."""

import base64
import gzip
import random
from collections.abc import Callable

from tests.fuzz.case import FIN, SEND, Script, Step

ROUTES = ("fast", "timed", "fallback", "retry", "limited")
HOST = b"Host: gateway.test\r\n"
HANDSHAKE = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
BAD_ID = b"X-Client-ID: a b\r\n"
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
)


def nonce_of(source: random.Random) -> bytes:
    """Return a new nonce."""
    return b"N%016x" % source.getrandbits(64)


def _get(target: bytes, fields: bytes = b"", method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"%b %b HTTP/%b\r\n%b%b\r\n" % (method, target, version, HOST, fields)


def _chunked(pieces: list[bytes], trailers: bytes = b"", extension: bytes = b"") -> bytes:
    lines = [b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces]
    return b"".join([*lines, b"0\r\n", trailers, b"\r\n"])


def _post(target: bytes, nonce: bytes, times: int, fields: bytes = b"") -> bytes:
    body = nonce * times
    return _get(target, b"%bContent-Length: %d\r\n" % (fields, len(body)), b"POST") + body


def _chunked_post(target: bytes, nonce: bytes, fields: bytes = b"", trailers: bytes = b"") -> bytes:
    head = _get(target, fields + b"Transfer-Encoding: chunked\r\n", b"POST")
    return head + _chunked([nonce, nonce * 3], trailers, b";a=b" if trailers else b"")


Request = Callable[[bytes, bytes], bytes]  # of target and nonce

# Requests that a correct upstream answers with what it sends, and their methods.
PLAIN: tuple[tuple[str, Request], ...] = (
    ("GET", lambda target, _: _get(target)),
    ("GET", lambda target, _: _get(target, b"X-Client-ID: someone\r\nAccept: */*\r\n")),
    ("GET", lambda target, _: _get(target, b"TE: trailers\r\nConnection: TE\r\n")),
    ("GET", lambda target, _: _get(b"http://gateway.test" + target)),
    ("HEAD", lambda target, _: _get(target, method=b"HEAD")),
    ("DELETE", lambda target, _: _get(target, method=b"DELETE")),
    ("GET", lambda target, _: _get(target, b"X-Request-Timeout: 20\r\n")),
    ("GET", lambda target, _: _get(target, b"Connection: Upgrade\r\nUpgrade: h2c\r\n")),
    ("POST", lambda target, nonce: _post(target, nonce, 1)),
    ("POST", lambda target, nonce: _post(target, nonce, 5000)),
    ("POST", _chunked_post),
    ("POST", lambda target, nonce: _chunked_post(target, nonce, b"Trailer: X-T\r\n", b"X-T: 1\r\n")),
    ("POST", lambda target, nonce: _post(target, nonce, 2, b"Expect: 100-continue\r\n")),
)
# Further ones: refused, ended early, or in another protocol.
OTHER: tuple[Request, ...] = (
    lambda target, _: _get(target, HANDSHAKE),
    lambda target, _: _get(target, HANDSHAKE + BAD_ID),
    lambda _target, _nonce: _get(b"/nowhere", HANDSHAKE),
    lambda target, nonce: _get(target, HANDSHAKE) + b"\x81%c%b" % (128 + len(nonce), b"\0\0\0\0" + nonce),
    lambda target, _: _get(target, BAD_ID),
    lambda _target, _nonce: _get(b"/nowhere"),
    lambda target, nonce: _post(target, nonce, 2, BAD_ID),
    lambda target, nonce: _post(target, nonce, 2, b"Connection: Upgrade\r\nUpgrade: h2c\r\n"),
    lambda target, _: _get(target, b"Connection: close\r\n"),
    lambda target, _: _get(target, version=b"1.0"),
    lambda target, _: _get(target, b"Connection: keep-alive\r\n", version=b"1.0"),
    lambda target, _: _get(target, b"X-Request-Timeout: 0.002\r\n"),
    lambda target, _: _get(target, b"Max-Forwards: 0\r\n", b"OPTIONS"),
    lambda _target, _nonce: _get(b"*", method=b"OPTIONS"),
    lambda _target, _nonce: b"CONNECT gateway.test:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    lambda _target, _nonce: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    lambda _target, _nonce: _get(b"/metrics"),
    lambda target, nonce: _get(target, b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", b"POST") + nonce,
)


def _head(nonce: bytes, fields: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nX-Nonce: %b\r\n%b\r\n" % (status, nonce, fields)


def _counted(nonce: bytes, body: bytes, fields: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return _head(nonce, b"%bContent-Length: %d\r\n" % (fields, len(body)), status) + body


Response = Callable[[bytes], tuple[bytes, int, bytes]]  # of a nonce: what is sent, and status and body it means

COMPLETE: tuple[Response, ...] = (
    lambda nonce: (_counted(nonce, nonce), 200, nonce),
    lambda nonce: (_counted(nonce, nonce * 4000), 200, nonce * 4000),
    lambda nonce: (_counted(nonce, b""), 200, b""),
    lambda nonce: (_counted(nonce, nonce, b"Date: Sat, 01 Jan 2000 00:00:00 GMT\r\n", b"404 No"), 404, nonce),
    lambda nonce: (
        _head(nonce, b"Transfer-Encoding: chunked\r\n") + _chunked([nonce] * 4, b"X-T: 1\r\n"),
        200,
        nonce * 4,
    ),
    lambda nonce: (_head(nonce, b"Content-Length: 5\r\n", b"304 Same"), 304, b""),
    lambda nonce: (_head(nonce, b"", b"204 None"), 204, b""),
    lambda nonce: (b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + _counted(nonce, nonce), 200, nonce),
    lambda nonce: (b"HTTP/1.1 100 Continue\r\n\r\n" + _counted(nonce, nonce), 200, nonce),
    lambda nonce: (_zipped(nonce), 200, gzip.compress(nonce, mtime=0)),
    lambda nonce: (_counted(nonce, nonce, b"Connection: close\r\n"), 200, nonce),
)
# Responses that a correct upstream may send to other requests than `PLAIN`.
SPECIAL: tuple[Callable[[bytes], bytes], ...] = (
    lambda nonce: _counted(nonce, nonce, status=b"503 Unavailable"),
    lambda nonce: SWITCH + b"X-Nonce: %b\r\n\r\n" % nonce + b"\x81%c%b" % (len(nonce), nonce),
)
FAULTY: tuple[Callable[[bytes], bytes], ...] = (
    *SPECIAL,
    lambda nonce: _head(nonce, b"") + nonce * 3,  # to the end of the connection
    lambda nonce: _head(nonce, b"Content-Type: text/event-stream\r\n") + b"data: %b\n\n" % nonce * 3,
    lambda nonce: SWITCH + b"\r\n",
    lambda nonce: _counted(nonce, nonce) + _counted(nonce, nonce),  # one response more than there are requests
    lambda nonce: _head(nonce, b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n") + nonce,
    lambda nonce: b"HTTP/1.0 200 OK\r\nX-Nonce: %b\r\n\r\n" % nonce + base64.b64encode(nonce),
    lambda nonce: b"HTTP/1.1 102 Processing\r\nX-Nonce: %b\r\n\r\n" % nonce * 40,
)


def _zipped(nonce: bytes) -> bytes:
    return _counted(nonce, gzip.compress(nonce, mtime=0), b"Content-Encoding: gzip\r\n")


def whole(data: bytes, *, ends: bool = False) -> Script:
    """Return the script that sends this at once."""
    return (Step(SEND, data), Step(FIN)) if ends else (Step(SEND, data),)
