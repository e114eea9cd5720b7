"""The PROXY protocol, versions 1 and 2: the first bytes of a connection, by which a load balancer names the client.

Source: HAProxy's proxy-protocol.txt. The protocol authenticates nothing: a header is only read from trusted peers,
whose connections must begin with one. Pure functions on bytes.
"""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from api_gateway.ip_addresses import unmapped

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"  # of version 2
MAX_LINE = 107  # bytes of a header of version 1, with its line break
MAX_HEADER = 16_384  # bytes of a header of version 2, with its TLVs
_ADDRESS = rb"([0-9A-Fa-f:.]{2,39})"  # without a zone, which means nothing on another machine
_LINE = re.compile(rb"PROXY (TCP[46]) %b %b ([0-9]{1,5}) ([0-9]{1,5})" % (_ADDRESS, _ADDRESS))
_UNKNOWN = b"PROXY UNKNOWN"
_FIXED = 16  # bytes before the addresses of version 2
_VERSION, _LOCAL, _PROXY = 2, 0, 1
_MAX_PORT = 65_535
_STREAMS = {0x11: 4, 0x21: 16}  # size of an address by family and protocol; others name no client of TCP
_MAX_FAMILY, _MAX_TRANSPORT = 3, 2


class ProxyHeader(NamedTuple):
    """A header: address and port of the client, and the bytes that it takes.

    `source` None: the peer itself has made the connection, such as for a health check, or it does not know the client.
    """

    source: tuple[str, int] | None
    size: int


class ProxyHeaderError(ValueError):
    """The connection does not begin with a valid header; the message says why, in words."""


def parse_proxy_header(received: bytes | bytearray) -> ProxyHeader | None:
    """Return the header with which a connection begins, None if it is not complete. Raises ProxyHeaderError."""
    start = bytes(received[: len(SIGNATURE)])
    if SIGNATURE.startswith(start):
        return None if len(start) < len(SIGNATURE) else _binary(received)
    if start[:6] == b"PROXY "[: len(start)]:
        return _text(bytes(received[:MAX_LINE]))
    raise ProxyHeaderError("it does not begin with a PROXY protocol header")


def _text(received: bytes) -> ProxyHeader | None:
    """Read a header of version 1."""
    line, end, _ = received.partition(b"\r\n")
    if not end:
        if len(received) < MAX_LINE:
            return None
        raise ProxyHeaderError(f"its PROXY protocol header is longer than {MAX_LINE} bytes")
    size = len(line) + len(end)
    if line == _UNKNOWN or line.startswith(_UNKNOWN + b" "):
        return ProxyHeader(None, size)
    found = _LINE.fullmatch(line)
    if found is None:
        raise ProxyHeaderError("its PROXY protocol header of version 1 is malformed")
    family, *addresses, source_port, target_port = (part.decode("latin-1") for part in found.groups())
    try:
        source, _ = ((IPv4Address if family == "TCP4" else IPv6Address)(address) for address in addresses)
    except ValueError:
        raise ProxyHeaderError(f"its PROXY protocol header has an invalid {family} address") from None
    if max(int(source_port), int(target_port)) > _MAX_PORT:
        raise ProxyHeaderError(f"its PROXY protocol header has a port above {_MAX_PORT}")
    return ProxyHeader((str(unmapped(source)), int(source_port)), size)


def _binary(received: bytes | bytearray) -> ProxyHeader | None:
    """Read a header of version 2. Its TLVs are skipped."""
    if len(received) < _FIXED:
        return None
    version, command = divmod(received[12], 16)
    family, transport = divmod(received[13], 16)
    length = int.from_bytes(received[14:16])
    if version != _VERSION or command not in (_LOCAL, _PROXY):
        raise ProxyHeaderError(f"its PROXY protocol header has the unknown version and command {received[12]:#04x}")
    if family > _MAX_FAMILY or transport > _MAX_TRANSPORT:
        raise ProxyHeaderError(f"its PROXY protocol header has the unknown address family {received[13]:#04x}")
    if _FIXED + length > MAX_HEADER:
        raise ProxyHeaderError(f"its PROXY protocol header is longer than {MAX_HEADER} bytes")
    size = _STREAMS.get(received[13], 0) if command == _PROXY else 0
    if length < 2 * size + 4 * bool(size):
        raise ProxyHeaderError(f"its PROXY protocol header has {length} bytes of addresses, too few")
    if len(received) < _FIXED + length:
        return None
    if not size:
        return ProxyHeader(None, _FIXED + length)
    packed = bytes(received[_FIXED : _FIXED + size])
    port = int.from_bytes(received[_FIXED + 2 * size : _FIXED + 2 * size + 2])
    return ProxyHeader((str(unmapped(ip_address(packed))), port), _FIXED + length)
