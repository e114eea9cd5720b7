"""A collector for tests: a server that decodes what it receives with opentelemetry-proto."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.kit import eventually

pytest.importorskip("opentelemetry.proto")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

SERVER, CLIENT = 2, 3  # kinds of spans
UNSET, ERROR = 0, 2  # their status


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as a collector got it."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: int
    start: int
    end: int
    attributes: dict[str, Any]
    status: int
    flags: int
    state: str
    links: list[tuple[str, str]]
    resource: dict[str, Any] = field(repr=False)

    @property
    def reason(self) -> Any:
        """Why the gateway responded, None if it did not."""
        return self.attributes.get("gateway.reason")


def values_of(attributes: Any) -> dict[str, Any]:
    """Return attributes by name; each occurs once."""
    found = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
    assert len(found) == len(attributes), "an attribute is given twice"
    return found


def spans_of(body: bytes) -> list[ReceivedSpan]:
    """Return the spans in the body of a request to a collector, in their order."""
    return [
        ReceivedSpan(
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.name,
            span.kind,
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            values_of(span.attributes),
            span.status.code,
            span.flags,
            span.trace_state,
            [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
            values_of(group.resource.attributes),
        )
        for group in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


class Collector:
    """Receives OTLP over HTTP on a free port. `statuses` are those of the next responses, 200 after them."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.requests: list[tuple[str, dict[str, str]]] = []  # path and header fields
        self.statuses: list[int] = []
        self.content = b""  # of successful responses
        self.fields: dict[str, str] = {}  # of responses
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self._body()
                status = collector.statuses.pop(0) if collector.statuses else 200
                if status == 200:
                    collector.bodies.append(body)
                collector.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                content = collector.content if status == 200 else b"{}"
                self.send_response(status)
                for name, value in collector.fields.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _body(self) -> bytes:
                if "Content-Length" in self.headers:
                    return self.rfile.read(int(self.headers["Content-Length"]))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All spans that have been accepted."""
        return [span for body in list(self.bodies) for span in spans_of(body)]

    def exchanges(self, count: int) -> list[list[ReceivedSpan]]:
        """Wait for so many exchanges; return the spans of each: its own, and those of its attempts."""
        eventually(
            lambda: sum(span.kind == SERVER for span in self.spans) >= count, f"the collector gets {count} exchanges"
        )
        found: list[list[ReceivedSpan]] = []
        for span in self.spans:
            if span.kind == SERVER:
                found.append([span])
            else:
                assert (span.parent_id, span.trace_id) == (found[-1][0].span_id, found[-1][0].trace_id)
                found[-1].append(span)
        assert len(found) == count, [group[0].attributes for group in found]
        return found

    def clear(self) -> None:
        """Forget what was received."""
        self.bodies.clear()
        self.requests.clear()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def collector() -> Iterator[Collector]:
    """Run a collector within this block."""
    found = Collector()
    try:
        yield found
    finally:
        found.close()
