"""Requests at a fixed high rate, from one client id or from as many ids as requests: `python -m benchmarks.flood`.

One thread with epoll(7); requests are written from a template, and only the status and the last byte of a response are
checked, so that the generator needs little CPU. It sends each request when it is due, on a connection without a
request in flight, and prints the statuses and the total time.
"""

import argparse
import json
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

MOST_CONNECTIONS = 512
_NAP = 50e-6  # seconds between checks of due requests and received responses
_PATIENCE = 30.0  # seconds without a response
_REQUEST = b"GET /api/small HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Client-ID: %b\r\n\r\n"


@dataclass(frozen=True)
class Flooded:
    """Results of a flood: requests, their total time in seconds, and responses by status."""

    requests: int
    seconds: float
    statuses: dict[str, int]


def client_id(number: int) -> bytes:
    """Return an id; all have the same length."""
    return b"id-%09d" % number


class Flood:
    """Connections to one server, and the numbers of requests sent and of responses."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._idle: list[socket.socket] = []
        self.statuses: Counter[str] = Counter()
        self.answered = 0

    def __repr__(self) -> str:
        return f"<Flood [{len(self._sockets)} connections, {self.answered} answered]>"

    def close(self) -> None:
        """Close all connections."""
        for sock in self._sockets.values():
            sock.close()
        self._epoll.close()

    def send(self, request: bytes) -> bool:
        """Send a request; return False if all connections have one in flight and no more are permitted."""
        if self._idle:
            sock = self._idle.pop()
        elif len(self._sockets) < MOST_CONNECTIONS:
            sock = self._connect()
        else:
            return False
        sock.sendall(request)
        return True

    def receive(self, wait: float) -> None:
        """Process received responses. Raises ConnectionError."""
        for number, _ in self._epoll.poll(wait):
            sock = self._sockets[number]
            received = sock.recv(65_536)
            while not received.endswith(b"}"):  # as all responses here do; several parts are rare
                more = sock.recv(65_536)
                if not more:
                    raise ConnectionError("the connection was closed before the response")
                received += more
            self.statuses[received[9:12].decode("ascii")] += 1
            self.answered += 1
            self._idle.append(sock)

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self._port), _PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets[sock.fileno()] = sock
        self._epoll.register(sock, select.EPOLLIN)
        return sock


def flood(port: int, *, rate: float, count: int, first: int, ids: int) -> Flooded:
    """Send `count` requests at `rate` per second, in turn from `ids` ids, beginning with number `first`."""
    clock = time.perf_counter
    with closing(Flood(port)) as under_way:
        start, sent = clock(), 0
        while under_way.answered < count:
            due = min(count, int((clock() - start) * rate) + 1)
            while sent < due and under_way.send(_REQUEST % client_id(first + sent % ids)):
                sent += 1
            under_way.receive(0 if sent < count else _PATIENCE)
            time.sleep(_NAP)
        return Flooded(count, clock() - start, dict(under_way.statuses))


def main(arguments: Sequence[str] | None = None) -> int:
    """Flood a server, and print the results as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flood", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--count", type=int, required=True, help="requests")
    parser.add_argument("--first", type=int, default=0, help="number of the first id (default: %(default)s)")
    parser.add_argument("--ids", type=int, default=1, help="number of ids used in turn (default: %(default)s)")
    options = parser.parse_args(arguments)
    done = flood(options.port, rate=options.rate, count=options.count, first=options.first, ids=options.ids)
    sys.stdout.write(json.dumps(asdict(done)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
