"""Mutations of messages that know the grammar, and the paces at which a message can be sent."""

import random
import re

from tests.fuzz.case import FIN, PAUSE, RESET, SEND, Script, Step

TOKENS = (
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b":",
    b"\xff",
    b"#",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"-1\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive, Upgrade\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n",
    b"Upgrade: h2c\r\n",
    b"Expect: 100-continue\r\n",
    b"Expect: something\r\n",
    b"Host: other.test\r\n",
    b"X-Client-ID: a b\r\n",
    b"X-Folded: a\r\n b\r\n",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"junk\r\n\r\n",
    b"\x88\x02\x03\xe8",
    b"X-Long: " + b"x" * 20_000 + b"\r\n",
)
_NUMBER = re.compile(rb"(?<![0-9A-Za-z.])[0-9]{1,6}(?![0-9A-Za-z.])")
_NUMBERS = (b"0", b"1", b"-1", b"+3", b"0x10", b"99999999999999999999", b"18446744073709551616", b"1, 1", b"")
_SHORT = 600  # bytes that may be sent one by one


def mutated(source: random.Random, data: bytes) -> bytes:
    """Return the message with one to three things about it changed."""
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        data = source.choice(_MUTATIONS)(source, data)
    return data


def _cut(source: random.Random, data: bytes) -> bytes:
    return data[: source.randrange(len(data) + 1)]


def _drop(source: random.Random, data: bytes) -> bytes:
    at = source.randrange(len(data) + 1)
    return data[:at] + data[at + source.choice((1, 1, 2, 4, 30)) :]


def _repeat(source: random.Random, data: bytes) -> bytes:
    at = source.randrange(len(data) + 1)
    return data[:at] + data[at : at + source.choice((1, 2, 8, 40))] * 2 + data[at:]


def _replace(source: random.Random, data: bytes) -> bytes:
    at = source.randrange(len(data) + 1)
    return data[:at] + bytes([source.choice(b"\0\r\n :\t\xff;,A0-")]) + data[at + 1 :]


def _insert(source: random.Random, data: bytes) -> bytes:
    at = source.randrange(len(data) + 1)
    return data[:at] + source.choice(TOKENS) + data[at:]


def _append(source: random.Random, data: bytes) -> bytes:
    return data + source.choice(TOKENS)


def _lines(source: random.Random, data: bytes) -> bytes:
    """Drop, repeat, swap or add a line of the head."""
    lines = data.split(b"\r\n")
    at = source.randrange(len(lines))
    what = source.randrange(4)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(at, lines[at])
    elif what == 2:
        other = source.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines.insert(max(1, at), source.choice(TOKENS).strip(b"\r\n"))
    return b"\r\n".join(lines)


def _number(source: random.Random, data: bytes) -> bytes:
    found = list(_NUMBER.finditer(data))
    if not found:
        return _replace(source, data)
    one = source.choice(found)
    near = (b"%d" % (int(one[0]) + 1), b"%d" % max(0, int(one[0]) - 1))
    return data[: one.start()] + source.choice((*near, *_NUMBERS)) + data[one.end() :]


_MUTATIONS = (_cut, _drop, _repeat, _replace, _insert, _insert, _append, _append, _lines, _lines, _number)


def paced(source: random.Random, data: bytes) -> list[Step]:
    """Return the steps that send a message: at once, in a few segments, or byte by byte."""
    way = source.randrange(8)
    if way == 0 and len(data) <= _SHORT:
        return [Step(SEND, data[at : at + 1]) for at in range(len(data))]
    cuts = sorted(source.randrange(len(data) + 1) for _ in range(source.choice((0, 0, 0, 1, 1, 2, 4))))
    steps: list[Step] = []
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        if start < end:
            steps += [Step(SEND, data[start:end]), *pause(source)]
    return steps


def pause(source: random.Random) -> list[Step]:
    """Return no pause, or one short enough to come between two steps of what the other side does."""
    if source.random() < 0.5:
        return []
    return [Step(PAUSE, seconds=round(10 ** source.uniform(-4.7, -2.3), 6))]


def ended(source: random.Random, steps: list[Step]) -> list[Step]:
    """Return the steps with an end of the connection behind, or in the midst of, them; or as they are."""
    way = source.randrange(10)
    if way < 4:
        return steps
    kind = FIN if way < 8 else RESET
    at = len(steps) if way in (4, 5, 6, 8) else source.randrange(len(steps) + 1)
    return [*steps[:at], *pause(source), Step(kind)]


def broken_at(data: bytes, at: int, kind: str) -> Script:
    """Return the script that sends a message up to one of its bytes, then pauses or ends the connection there."""
    if kind == PAUSE:
        return (Step(SEND, data[:at]), Step(PAUSE, seconds=0.0005), Step(SEND, data[at:]))
    return (Step(SEND, data[:at]), Step(kind))
