"""The two peers of the gateway: sockets that follow a script, byte by byte and end by end."""

import asyncio
import re
import socket
import struct
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from tests.fuzz.case import FIN, PAUSE, RESET, SEND, Case, Script, Step

_NONCE = re.compile(rb"N[0-9a-f]{16}")
_SHORTEST_SLEEP = 0.001  # seconds: what the event loop's timers can tell apart
_QUIET = 0.03  # seconds without a byte after which nothing more is expected of a mutated case
_ANSWERED_WITHIN = 15.0  # seconds a valid case may take
_UNKNOWN = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nunknown"
_CONTINUE = Step(SEND, b"HTTP/1.1 100 Continue\r\n\r\n")
_FAULTY_HEAD = b"HEAD /api/x"  # to an upstream that may misbehave, whose connections others do not share
_RESET = struct.pack("ii", 1, 0)


def nonces_in(data: bytes) -> list[bytes]:
    """Return all nonces, in their order, without immediate repetitions."""
    found = _NONCE.findall(data)
    return [nonce for at, nonce in enumerate(found) if at == 0 or found[at - 1] != nonce]


def without_body(script: Script) -> Script:
    """Return the script up to the end of the head that has the nonce: the response to HEAD."""
    sent = b"".join(step.data for step in script)
    end = sent.find(b"\r\n\r\n", max(0, sent.find(b"X-Nonce:")))
    left = len(sent) if end < 0 else end + 4
    steps: list[Step] = []
    for step in script:
        data = step.data[:left]
        left -= len(data)
        if data or step.kind != SEND:
            steps.append(replace(step, data=data))
    return tuple(steps)


class Closed(Exception):
    """The script has ended the connection."""


async def follow(sock: socket.socket, script: Script) -> None:
    """Do what a script says. Raises Closed after a reset, and OSError when the other side has ended."""
    loop = asyncio.get_running_loop()
    for step in script:
        if step.kind == SEND:
            await loop.sock_sendall(sock, step.data)
        elif step.kind == PAUSE and step.seconds < _SHORTEST_SLEEP:
            time.sleep(step.seconds)  # noqa: ASYNC251 - shorter than a timer can be
        elif step.kind == PAUSE:
            await asyncio.sleep(step.seconds)
        elif step.kind == FIN:
            sock.shutdown(socket.SHUT_WR)
        elif step.kind == RESET:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            raise Closed


@dataclass
class Upstream:
    """Answers each request as the script of its nonce says, on every target's port."""

    findings: list[str] = field(default_factory=list)
    scripts: dict[bytes, Script] = field(default_factory=dict)
    owners: dict[bytes, int] = field(default_factory=dict)  # the case of each nonce
    progress: dict[bytes, str] = field(default_factory=dict)  # of the last request with each nonce
    ports: list[int] = field(default_factory=list)
    _listeners: list[socket.socket] = field(default_factory=list)
    _open: set[socket.socket] = field(default_factory=set)
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    def listen(self) -> None:
        """Listen on one more port."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        listener.setblocking(False)
        self._listeners.append(listener)
        self.ports.append(listener.getsockname()[1])
        self._start(self._accept(listener))

    def hang_up(self) -> None:
        """End every connection."""
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop."""
        for task in self._tasks:
            task.cancel()
        for sock in (*self._listeners, *self._open):
            sock.close()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open.add(sock)
            self._start(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        try:
            with suppress(OSError, Closed, EOFError, ValueError):
                await self._answer_all(sock)
        finally:
            self._open.discard(sock)
            sock.close()

    async def _answer_all(self, sock: socket.socket) -> None:
        reader = _Reader(sock)
        while True:
            head = await reader.until(b"\r\n\r\n")
            found = nonces_in(head.partition(b"\r\n")[0])
            nonce = found[0] if found else b""
            script = self.scripts.get(nonce)
            self.progress[nonce] = "its head has come"
            body = b""
            if b"upgrade: websocket" not in head.lower():
                if b"100-continue" in head.lower():
                    await follow(sock, (_CONTINUE,))
                body = await reader.body(head)
            self._check(head + body)
            self.progress[nonce] = "it has come"
            if script is None:
                await asyncio.get_running_loop().sock_sendall(sock, _UNKNOWN)
                continue
            if head.startswith(b"HEAD ") and not head.startswith(_FAULTY_HEAD):
                # A mutated client may have made HEAD of a GET: a body would harm the next request of the connection.
                script = without_body(script)
            await follow(sock, script)
            self.progress[nonce] = "it is answered"
            if any(step.kind == FIN for step in script) or b" 101 " in b"".join(step.data for step in script)[:13]:
                await reader.rest()
                return

    def _check(self, request: bytes) -> None:
        """Find a request that is made of what different clients have sent."""
        owners = {self.owners[nonce] for nonce in nonces_in(request) if nonce in self.owners}
        if len(owners) > 1:
            self.findings.append(f"a request holds what {len(owners)} clients have sent: {request[:400]!r}")


class _Reader:
    """Reads requests, which the gateway always frames well."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._held = b""

    async def _fill(self) -> None:
        data = await asyncio.get_running_loop().sock_recv(self._sock, 65_536)
        if not data:
            raise EOFError
        self._held += data

    async def until(self, mark: bytes) -> bytes:
        while mark not in self._held:
            await self._fill()
        found, _, self._held = self._held.partition(mark)
        return found + mark

    async def exactly(self, size: int) -> bytes:
        while len(self._held) < size:
            await self._fill()
        found, self._held = self._held[:size], self._held[size:]
        return found

    async def rest(self) -> None:
        """Read to the end."""
        with suppress(EOFError):
            while True:
                self._held = b""
                await self._fill()

    async def body(self, head: bytes) -> bytes:
        fields = head.lower().split(b"\r\n")
        if any(line.startswith(b"transfer-encoding:") for line in fields):
            pieces = []
            while size := int((await self.until(b"\r\n")).split(b";")[0], 16):
                pieces.append(await self.exactly(size))
                await self.exactly(2)
            while await self.until(b"\r\n") != b"\r\n":
                pass
            return b"".join(pieces)
        lengths = [line.partition(b":")[2] for line in fields if line.startswith(b"content-length:")]
        return await self.exactly(int(lengths[0])) if lengths else b""


async def run(case: Case, port: int, owners: Mapping[bytes, int]) -> str | None:
    """Be the client of a case; return what is wrong with the responses, None if nothing is.

    `owners` tells the case of each nonce.
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    received = bytearray()
    try:
        async with asyncio.timeout(_ANSWERED_WITHIN):
            await loop.sock_connect(sock, ("127.0.0.1", port))
            reading = loop.create_task(_read(sock, received))
            try:
                with suppress(Closed):
                    with suppress(OSError):
                        await follow(sock, case.client)
                    await _settle(case, reading, received)
            finally:
                reading.cancel()
                await asyncio.wait({reading})
    except OSError as error:  # TimeoutError, too
        return f"no connection, or no end of it: {error!r}"
    finally:
        sock.close()
    return _wrong(case, bytes(received), owners)


async def _read(sock: socket.socket, received: bytearray) -> None:
    loop = asyncio.get_running_loop()
    with suppress(OSError):
        while data := await loop.sock_recv(sock, 65_536):
            received += data


async def _settle(case: Case, reading: "asyncio.Task[None]", received: bytearray) -> None:
    """Wait until everything that is expected has come, or else for a short quiet."""
    if case.expected:
        until = time.monotonic() + _ANSWERED_WITHIN - 1
        while not reading.done() and time.monotonic() < until:
            if len(responses_in(bytes(received), case)) >= len(case.expected):
                return
            await asyncio.wait({reading}, timeout=0.005)
        return
    size = -1
    while not reading.done() and size != len(received):
        size = len(received)
        await asyncio.wait({reading}, timeout=_QUIET)


def responses_in(data: bytes, case: Case) -> list[tuple[int, bytes, bytes]]:
    """Return the complete final responses as status, head and body, as far as they are well-formed."""
    found: list[tuple[int, bytes, bytes]] = []
    while len(found) < len(case.expected):
        head, mark, rest = data.partition(b"\r\n\r\n")
        if not mark:
            break
        status = int(head[9:12])
        if status >= 200:
            body, rest = _body(head, rest, is_bodiless=case.expected[len(found)][0] == "HEAD" or status in (204, 304))
            if body is None:
                break
            found.append((status, head, body))
        data = rest
    return found


def _body(head: bytes, data: bytes, *, is_bodiless: bool) -> tuple[bytes | None, bytes]:
    """Return a body and what comes behind it; None if it is not complete."""
    if is_bodiless:
        return b"", data
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    if b"content-length" in fields:
        size = int(fields[b"content-length"])
        return (data[:size], data[size:]) if len(data) >= size else (None, data)
    body = b""
    while True:
        line, mark, rest = data.partition(b"\r\n")
        if not mark:
            return None, data
        size = int(line.split(b";")[0], 16)
        if size == 0:
            if rest.startswith(b"\r\n"):
                return body, rest[2:]
            _, mark, behind = rest.partition(b"\r\n\r\n")
            return (body, behind) if mark else (None, data)
        if len(rest) < size + 2:
            return None, data
        body, data = body + rest[:size], rest[size + 2 :]


def _wrong(case: Case, received: bytes, owners: Mapping[bytes, int]) -> str | None:
    """Compare what has come with what was asked for.

    A nonce that is not in `owners` is a mutated one, or from an upstream that may answer more than it was asked.
    """
    order = {nonce: number for number, nonce in enumerate(case.nonces)}
    found = nonces_in(received)
    numbers = [order[nonce] for nonce in found if nonce in order]
    if any(nonce in owners and nonce not in order for nonce in found):
        return f"a response holds what another client was sent: {received[:400]!r}"
    if numbers != sorted(numbers):
        return f"responses are out of order: {received[:400]!r}"
    return _unexpected(case, received)


def _unexpected(case: Case, received: bytes) -> str | None:
    """Compare the responses with those that are expected, if any are."""
    try:
        found = responses_in(received, case)
    except ValueError as error:
        return f"a response is not HTTP ({error}): {received[:400]!r}"
    for number, (method, status, body) in enumerate(case.expected):
        what = f"request {number + 1} of {len(case.expected)} ({method})"
        if number >= len(found):
            return f"{what} was not answered: {received[-400:]!r}"
        if (found[number][0], found[number][2]) != (status, body):
            return f"{what} was answered {found[number][1][:400]!r} {found[number][2][:400]!r}"
        if case.nonces[number] not in found[number][1]:
            return f"{what} has the response of another: {found[number][1]!r}"
    return None
