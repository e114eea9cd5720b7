"""The response of an upstream in the form of an httpx object.

A module of its own, because mypyc does not compile asynchronous generators, and these classes have bases of httpx.
"""

from collections.abc import AsyncIterator
from functools import cached_property

import httpx

from api_gateway.transport.response import SWITCHING, UpstreamResponse


class ResponseStream(httpx.AsyncByteStream):
    """The body of a response, as httpx reads it."""

    def __init__(self, response: UpstreamResponse) -> None:
        self._response = response

    def __repr__(self) -> str:
        return f"<ResponseStream of {self._response!r}>"

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body in the pieces that `UpstreamResponse.read` returns."""
        more = True
        while more:
            body, more = await self._response.read()
            if body:
                yield body

    async def aclose(self) -> None:
        """See `UpstreamResponse.close`."""
        self._response.close()


class LeanResponse(httpx.Response):
    """A response whose header fields remain byte pairs; `headers` converts them to httpx's mapping on first use."""

    is_closed = False
    is_stream_consumed = False
    next_request = None
    default_encoding = "utf-8"
    _request = None
    _num_bytes_downloaded = 0

    def __init__(self, response: UpstreamResponse) -> None:  # does not call httpx's constructor, see `LeanRequest`
        self.status_code = response.status
        self.pairs = response.headers
        self.incoming = response
        self.extensions = {"reason_phrase": response.reason, "http_version": b"HTTP/1.1"}
        if response.status == SWITCHING:
            self.extensions["switched"] = response
        self.history: list[httpx.Response] = []

    @cached_property
    def headers(self) -> httpx.Headers:  # type: ignore[override]  # httpx has an attribute here
        """The header fields as httpx's mapping."""
        return httpx.Headers(self.pairs)

    @cached_property
    def stream(self) -> ResponseStream:  # type: ignore[override]  # httpx has an attribute here
        """The body."""
        return ResponseStream(self.incoming)
