"""The reply of a transport, whichever it is: asked for, taken apart and let go of in one way."""

import asyncio
from collections.abc import AsyncIterable

import httpx

from api_gateway.http1.headers import Fields, fields_of
from api_gateway.models import HeaderList
from api_gateway.transport.http1_transport import UpstreamTransport
from api_gateway.transport.request import LeanRequest
from api_gateway.transport.response import LeanResponse, UpstreamResponse


class HttpxBody:
    """The body of an answer that another transport gave, read as our own are."""

    is_ready = False
    trailers: HeaderList = []  # noqa: RUF012 - there are none

    def __init__(self, stream: AsyncIterable[bytes]) -> None:
        self._pieces = aiter(stream)
        self._clock = asyncio.get_running_loop().time
        self._read_at = self._clock()
        self.reader_waited = 0.0  # seconds between two readings, in which nothing was read from the upstream

    async def read(self) -> tuple[bytes, bool]:
        """Return the next piece and whether more may follow."""
        self.reader_waited += self._clock() - self._read_at
        try:
            return await anext(self._pieces), True
        except StopAsyncIteration:
            return b"", False
        finally:
            self._read_at = self._clock()


async def send_request(
    transport: httpx.AsyncBaseTransport, request: httpx.Request, answer: UpstreamResponse | None
) -> httpx.Response:
    """Send the request, unless it has an answer under way already, and return the response."""
    if answer is not None and isinstance(transport, UpstreamTransport) and isinstance(request, LeanRequest):
        return await transport.response_to(request, answer)
    return await transport.handle_async_request(request)


def fields_in(response: httpx.Response) -> Fields:
    """Return the headers of an answer by name."""
    return response.stream.fields if isinstance(response, LeanResponse) else fields_of(response.headers.raw)


def parts_of(response: httpx.Response) -> tuple[HeaderList, Fields, UpstreamResponse | HttpxBody]:
    """Return the headers of an answer, the same by name, and its body."""
    if isinstance(response, LeanResponse):
        answer = response.stream
        return answer.headers, answer.fields, answer
    headers = response.headers.raw
    return headers, fields_of(headers), HttpxBody(response.stream)  # type: ignore[arg-type]  # an async one


async def close_response(response: httpx.Response) -> None:
    """Close an answer: what has not fully arrived takes its connection with it."""
    if isinstance(response, LeanResponse):
        response.stream.close()
    else:
        await response.stream.aclose()  # type: ignore[union-attr]  # an async transport's stream is an async one
