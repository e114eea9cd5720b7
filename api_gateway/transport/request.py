"""What is sent to an upstream: where to, the request as httpx has it, and its head as it goes over the wire."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx

from api_gateway.models import HeaderList


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port of a target, worked out once. `netloc` is what belongs into `Host`.

    `host` is whom the certificate must name, `address` where to connect: the same, unless the name was resolved.
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
        """Take `url` apart."""
        port = url.port or (443 if url.scheme == "https" else 80)
        place = address or url.host
        return cls(url, url.scheme, url.host, port, url.netloc, place, (url.scheme, url.host, port, place))

    def plain_request(self, method: str, headers: HeaderList, target: bytes, **options: Any) -> httpx.Request:
        """Return a request as any transport takes it: where to connect is in its URL, whom to expect beside it."""
        url = self.url.copy_with(raw_path=target)
        if self.address != self.host:
            url = url.copy_with(host=self.address)
            options["extensions"] = {**options["extensions"], "sni_hostname": self.host}
        return httpx.Request(method, url, headers=headers, **options)


class LeanRequest(httpx.Request):
    """A request whose headers stay byte pairs until somebody asks for the mapping that httpx makes of them.

    `framing` is b"chunked", b"length", or None for a request without a body. `has_begun`: a connection was opened for
    it, or the attempt to. `is_sent`: some of it is on its way.
    """

    has_begun = is_sent = False

    def __init__(  # it sets all that a request has, and leaves out what httpx would work out for people
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
        """Return any request of httpx as one of these."""
        pairs = request.headers.raw
        stream: Any = request.stream
        extensions = dict(request.extensions)
        return cls(request.method, Origin.of(request.url), pairs, stream, _framing(pairs), extensions)

    @cached_property
    def headers(self) -> httpx.Headers:  # type: ignore[override]  # httpx has an attribute here
        """The headers as httpx has them."""
        return httpx.Headers(self.pairs)


class NoBody(httpx.AsyncByteStream):
    """The body of a request that has none."""

    is_started = False
    is_finished = True
    is_awaited = False  # by the gateway, from the client
    waited = 0.0  # seconds, for the client
    is_kept = True  # it can be sent from its start, whether it has been before or not

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
    """Return the length these headers announce; 0 if none."""
    return next((int(value) for name, value in headers if name.lower() == b"content-length"), 0)


def render_request_head(request: LeanRequest) -> bytes:
    """Return request line and headers as they go out; raises LocalProtocolError if they hide a line of their own."""
    target = request.extensions.get("target") or request.url.raw_path
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), target)]
    lines += map(b": ".join, request.pairs)
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
        raise httpx.LocalProtocolError("a header holds a line break")
    return head + b"\r\n\r\n"
