"""Requests to upstreams: the origin, the request as an httpx object, and the serialised head."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx

from api_gateway.models import HeaderList


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port of a target, computed once. `netloc` is the value of `Host`.

    `host` is the name in the certificate, `address` the address to connect to: equal unless the name was resolved.
    `key` identifies the pool.
    """

    url: httpx.URL
    scheme: str
    host: str
    port: int
    netloc: bytes
    address: str
    key: tuple[str, str, int, str] = field(compare=False)

    @classmethod
    def of(cls, url: httpx.URL, address: str | None = None) -> "Origin":
        """Return the origin of `url`; `address` replaces its host for connecting."""
        port = url.port or (443 if url.scheme == "https" else 80)
        place = address or url.host
        return cls(url, url.scheme, url.host, port, url.netloc, place, (url.scheme, url.host, port, place))

    def plain_request(self, method: str, headers: HeaderList, target: bytes, **options: Any) -> httpx.Request:
        """Return a request for any httpx transport, with the address in its URL and the host in `sni_hostname`."""
        url = self.url.copy_with(raw_path=target)
        if self.address != self.host:
            url = url.copy_with(host=self.address)
            options["extensions"] = {**options["extensions"], "sni_hostname": self.host}
        return httpx.Request(method, url, headers=headers, **options)


class LeanRequest(httpx.Request):
    """A request whose header fields remain byte pairs; `headers` converts them to httpx's mapping on first use.

    `framing` is b"chunked", b"length", or None for a request without a body. `has_begun`: connecting was started for
    it. `is_sent`: a part of it was written to a connection.
    """

    has_begun = is_sent = False

    def __init__(  # does not call httpx's constructor, which computes fields that are not needed here
        self,
        method: str,
        origin: Origin,
        pairs: HeaderList,
        stream: httpx.AsyncByteStream,
        framing: bytes | None,
        extensions: dict[str, Any],
    ) -> None:
        self.method = method
        self.url = origin.url
        self.origin = origin
        self.pairs = pairs
        self.stream = stream
        self.framing = framing
        self.extensions = extensions

    @classmethod
    def of(cls, request: httpx.Request) -> "LeanRequest":
        """Convert a request of httpx."""
        pairs = request.headers.raw
        stream: Any = request.stream
        extensions = dict(request.extensions)
        return cls(request.method, Origin.of(request.url), pairs, stream, _framing(pairs), extensions)

    @cached_property
    def headers(self) -> httpx.Headers:  # type: ignore[override]  # httpx has an attribute here
        """The header fields as httpx's mapping."""
        return httpx.Headers(self.pairs)


class NoBody(httpx.AsyncByteStream):
    """The body of a request without content."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield nothing."""
        return
        yield b""  # pragma: no cover - makes this an iterator


NO_BODY = NoBody()


def _framing(headers: HeaderList) -> bytes | None:
    framing = None
    for name, value in headers:
        lower = name.lower()
        if lower == b"transfer-encoding":
            return b"chunked"
        if lower == b"content-length" and value.strip(b"0"):
            framing = b"length"
    return framing


def length_of(headers: HeaderList) -> int:
    """Return the value of Content-Length in bytes; 0 if it is absent."""
    return next((int(value) for name, value in headers if name.lower() == b"content-length"), 0)


def render_request_head(request: LeanRequest) -> bytes:
    """Return the serialised request line and header section.

    Raises LocalProtocolError if a field contains a line break (request splitting).
    """
    target = request.extensions.get("target") or request.url.raw_path
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), target)]
    lines += map(b": ".join, request.pairs)
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
        raise httpx.LocalProtocolError("a header field contains a line break")
    return head + b"\r\n\r\n"
