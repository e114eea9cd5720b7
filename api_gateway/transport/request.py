"""Requests to upstreams: the origin, the request as an httpx object, and the serialised head of a health check."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
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
        request = httpx.Request(method, url, headers=headers, **options)
        request.method = method  # methods are case-sensitive (RFC 9110 section 9.1); httpx writes them in capitals
        return request


class NoBody(httpx.AsyncByteStream):
    """The body of a request without content."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield nothing."""
        return
        yield b""  # pragma: no cover - makes this an iterator


NO_BODY = NoBody()


def render_get(target: bytes, headers: HeaderList) -> bytes:
    """Return the serialised request line and header section of a GET.

    Raises LocalProtocolError if target or a field contains a line break (request splitting).
    """
    lines = [b"GET %b HTTP/1.1" % target, *map(b": ".join, headers)]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
        raise httpx.LocalProtocolError("a header field contains a line break")
    return head + b"\r\n\r\n"
