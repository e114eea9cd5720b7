"""An upstream that fails on demand, in all known manners, and then serves again on the same port."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from select import POLLRDHUP, poll

from tests.kit import PATIENCE, Behaviour, RawRequest, RawUpstream, Wire, reply

HEAD = b"HTTP/1.1 200 OK\r\n"
COUNTED = HEAD + b"Content-Length: 9\r\n\r\nhalf"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"
UNTIL_CLOSE = HEAD + b"Connection: close\r\n\r\nhalf"
WHOLE = HEAD + b"Content-Length: 2\r\n\r\nok"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"


class Listening(Enum):
    """The result of attempts to connect."""

    ACCEPTS = auto()
    REFUSES = auto()
    IS_FULL = auto()  # the kernel drops SYN packets: connecting never ends


@dataclass(frozen=True)
class Fault:
    """One kind of failure: of connecting, or after the head of a request (after its body, if `reads_body`)."""

    name: str
    behave: Behaviour = field(default_factory=reply)
    listening: Listening = Listening.ACCEPTS
    reads_body: bool = True


class FaultyUpstream(RawUpstream):
    """A raw upstream that has a fault within a block, and otherwise responds to every request."""

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Apply the fault within this block, to existing and new connections."""
        self.behave, self.reads_body = fault.behave, fault.reads_body
        try:
            if fault.listening is Listening.ACCEPTS:
                yield
            else:
                with self._deaf(is_listening=fault.listening is Listening.IS_FULL):
                    yield
        finally:
            self.behave, self.reads_body = reply(), True

    @contextmanager
    def _deaf(self, *, is_listening: bool) -> Iterator[None]:
        """Keep the port bound without accepting, and close all connections."""
        for wire in self.wires:
            with suppress(OSError):  # already closed
                wire.sock.shutdown(socket.SHUT_RDWR)  # also wakes the thread that reads from it
        self.close()
        with socket.socket() as holder:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", self.port))
            if is_listening:
                holder.listen(0)
            with socket.socket() as one, socket.socket() as other:
                for filler in (one, other) if is_listening else ():
                    filler.setblocking(False)
                    filler.connect_ex(("127.0.0.1", self.port))
                yield
        self.listen(self.port)


# Behaviours of an upstream


def says(*pieces: bytes, then: str = "goes on", every: float = 0.0) -> Behaviour:
    """Send these pieces, each after the previous one was read and a delay of `every` seconds.

    `then` the connection `goes on`, `ends`, `resets` or `stalls`.
    """

    def behave(wire: Wire, _request: RawRequest) -> bool | None:
        for number, piece in enumerate(pieces):
            time.sleep(every if number else 0)
            wire.send(piece)
            _wait_until_read(wire)
        if then == "resets":
            wire.reset()
        elif then == "stalls":
            _stall(wire)
        return None if then == "goes on" else False

    return behave


def _wait_until_read(wire: Wire) -> None:
    """Wait until the peer has read: otherwise it would get pieces together, and a reset before them."""
    while wire.unread_by_peer():
        time.sleep(0.002)
    time.sleep(0.02)


def _stall(wire: Wire) -> None:
    """Neither read nor write until the peer has closed."""
    watch = poll()
    watch.register(wire.sock, POLLRDHUP)
    watch.poll(PATIENCE * 1000)


def shuts_its_side(*pieces: bytes) -> Behaviour:
    """Send these pieces, shut down the sending side, and keep reading."""

    def behave(wire: Wire, _request: RawRequest) -> bool:
        for piece in pieces:
            wire.send(piece)
        wire.sock.shutdown(socket.SHUT_WR)
        _stall(wire)
        return False

    return behave


def repeats(piece: bytes, every: float, *, after: bytes = b"") -> Behaviour:
    """Send one piece repeatedly while the peer is connected."""

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(after)
        end = time.monotonic() + PATIENCE
        with suppress(OSError):
            while time.monotonic() < end and not wire.is_closed(max(every, 0.0001)):
                wire.send(piece)
        return False

    return behave
