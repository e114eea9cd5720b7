"""What a request of HTTP/2 costs the package h2, and a request of HTTP/1.1 the gateway's own parser. In memory.

`python -m benchmarks.http2` reads a request head and writes a response of 16 bytes with six header fields, on one kept
connection, without sockets: what a server of Python could do at best. Needs `pip install h2`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import h2.config
import h2.connection
import h2.events

from api_gateway.http1.fast_parser import parse_request_head

FIELDS = (
    ("user-agent", "Mozilla/5.0"),
    ("accept", "application/json"),
    ("accept-encoding", "gzip"),
    ("x-client-id", "acme"),
)
PSEUDO = ((":method", "GET"), (":scheme", "https"), (":authority", "api.example.com"), (":path", "/api/users/42?a=1"))
RESPONSE = (
    ("content-type", "application/json"),
    ("content-length", "16"),
    ("x-request-id", "0123456789abcdef"),
    ("ratelimit-policy", '"free";q=100;w=100'),
    ("ratelimit", '"free";r=99;t=1'),
    ("date", "Sun, 29 Nov 2026 23:22:03 GMT"),
)
BODY = b'{"status": "ok"}'


def http1(count: int) -> float:
    """Return the CPU seconds of so many requests: the parser, and the comparison with the lines before."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in FIELDS)
    head = f"GET /api/users/42?a=1 HTTP/1.1\r\nhost: api.example.com\r\n{lines}\r\n".encode()
    fields = "".join(f"{name}: {value}\r\n" for name, value in RESPONSE).encode()
    last, size = b"", 0
    began = time.process_time()
    for _ in range(count):
        parts = parse_request_head(head)
        if parts is None:
            raise RuntimeError("the head is not plain")
        if parts[3] != last:
            last = parts[3]
        size += len(b"HTTP/1.1 200 OK\r\n%b\r\n%b" % (fields, BODY))
    return time.process_time() - began


def http2(count: int, *, validates: bool) -> float:
    """Return the CPU seconds of so many requests, with the validation of header fields that h2 offers or without."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=False))
    client.initiate_connection()
    beginning, requests = client.data_to_send(), []
    for _ in range(count):
        stream = client.get_next_available_stream_id()
        client.send_headers(stream, [*PSEUDO, *FIELDS], end_stream=True)
        requests.append(client.data_to_send())
        client.streams.pop(stream)  # as if it had got its response
    server = h2.connection.H2Connection(
        h2.config.H2Configuration(
            client_side=False,
            header_encoding=False,
            validate_inbound_headers=validates,
            normalize_inbound_headers=validates,
            validate_outbound_headers=validates,
            normalize_outbound_headers=validates,
        )
    )
    server.initiate_connection()
    server.receive_data(beginning)
    server.data_to_send()
    began = time.process_time()
    for request in requests:
        for event in server.receive_data(request):
            if isinstance(event, h2.events.RequestReceived):
                server.send_headers(event.stream_id, [(":status", "200"), *RESPONSE])
                server.send_data(event.stream_id, BODY, end_stream=True)
        server.data_to_send()
    return time.process_time() - began


CASES: dict[str, Callable[[int], float]] = {
    "HTTP/1.1, the gateway's parser": http1,
    "HTTP/2, h2": lambda count: http2(count, validates=True),
    "HTTP/2, h2 without validation": lambda count: http2(count, validates=False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure in turns, and print the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http2", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=3_000, help="of each measurement (default: 3000)")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    options = parser.parse_args(arguments)
    costs: dict[str, list[float]] = {title: [] for title in CASES}
    for _ in range(options.rounds):
        for title, run in CASES.items():
            costs[title].append(run(options.requests) / options.requests * 1_000_000)
    base = statistics.median(costs["HTTP/1.1, the gateway's parser"])
    lines = ["| | CPU µs/request | ratio |", "|---|---:|---:|"]
    for title, found in costs.items():
        lines.append(f"| {title} | {statistics.median(found):.1f} | {statistics.median(found) / base:.0f} |")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
