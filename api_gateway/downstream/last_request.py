"""Finds out whether input that is held contains the last request of its connection."""

from api_gateway.downstream.connection_limits import ConnectionLimits
from api_gateway.downstream.request_reader import RequestReader
from api_gateway.errors import GatewayError
from api_gateway.http1.request_head import RequestHead
from api_gateway.models import HeaderList


class _LastRequest:
    """The sink of a reader: it looks for a complete request that announces the end of its connection."""

    is_found = False
    is_over = False  # nothing that follows is a request
    _keep_alive = True  # of the request that is being read

    def on_head_begun(self) -> None:
        """See `RequestSink`."""

    def on_request(self, head: RequestHead, trailers: HeaderList) -> None:  # noqa: ARG002 - of the sink
        """Note whether the request announces the end."""
        self._keep_alive = head.keep_alive

    def on_body_piece(self, piece: bytes) -> None:
        """See `RequestSink`."""

    def on_body_announced(self, size: int) -> None:
        """See `RequestSink`."""

    def on_body_complete(self) -> None:
        """Note the end of the request."""
        if not self._keep_alive:
            self.is_found = self.is_over = True

    def on_handshake(self) -> None:
        """Note that another protocol may follow."""
        self.is_over = True

    def refuse(self, error: GatewayError) -> None:  # noqa: ARG002 - of the sink
        """Note that the connection ends with a refusal."""
        self.is_over = True


def contains_last_request(data: bytes, limits: ConnectionLimits) -> bool:
    """Return whether `data` contains a complete request with `Connection: close`, or one of HTTP/1.0.

    `data` begins with a request, and is read as it will be when it is served: what follows that request is ignored.
    """
    sink = _LastRequest()
    reader = RequestReader(limits, sink)
    view = reader.begin(data)
    while view and not sink.is_over:
        size = reader.feed(view)
        if not size:
            break
        view = view[size:]
    reader.close()
    return sink.is_found
