"""One interface to the responses of all transports: the gateway's own and httpx's."""

import asyncio
from collections.abc import AsyncIterable

import httpx

from api_gateway.http1.headers import Fields, fields_of
from api_gateway.models import HeaderList
from api_gateway.transport.lean_response import LeanResponse
from api_gateway.transport.response import UpstreamResponse


class HttpxBody:
    """The body of another transport's response, with the interface of `UpstreamResponse`."""

    is_ready = False
    trailers: HeaderList = []  # noqa: RUF012 - there are none

    def __init__(self, stream: AsyncIterable[bytes], version: str) -> None:
        self.version = version  # of HTTP, as in `UpstreamResponse`
        self._pieces = aiter(stream)
        self._clock = asyncio.get_running_loop().time
        self._read_at = self._clock()
        self.reader_waited = 0.0  # seconds between calls of `read`, in which nothing was read from the upstream

    def __repr__(self) -> str:
        return f"<HttpxBody [reader waited {self.reader_waited:.3f} s]>"

    async def read(self) -> tuple[bytes, bool]:
        """Return the next piece and whether more may follow. Raises httpx.TransportError."""
        self.reader_waited += self._clock() - self._read_at
        try:
            return await anext(self._pieces), True
        except StopAsyncIteration:
            return b"", False
        finally:
            self._read_at = self._clock()


def fields_in(response: httpx.Response) -> Fields:
    """Return the header fields of a response by name."""
    return response.incoming.fields if isinstance(response, LeanResponse) else fields_of(response.headers.raw)


def parts_of(response: httpx.Response) -> tuple[HeaderList, Fields, UpstreamResponse | HttpxBody]:
    """Return the header fields of a response as a list and by name, and its body."""
    if isinstance(response, LeanResponse):
        stream = response.incoming
        return stream.headers, stream.fields, stream
    headers = response.headers.raw
    version = response.http_version.removeprefix("HTTP/")
    return headers, fields_of(headers), HttpxBody(response.stream, version)  # type: ignore[arg-type]  # an async one


async def close_response(response: httpx.Response) -> None:
    """Close a response, and its connection if the response is incomplete."""
    if isinstance(response, LeanResponse):
        response.incoming.close()
    else:
        await response.stream.aclose()  # type: ignore[union-attr]  # an async transport's stream is an async one
