"""Until when a certificate is valid, from its DER or PEM form (RFC 5280 section 4.1.2.5)."""

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

_SEQUENCE, _VERSION, _UTC_TIME = 0x30, 0xA0, 0x17
_LONG = 0x80  # of a length
_CENTURY = 50  # a year of two digits below it is in the 21st
_END = "-----END CERTIFICATE-----"


def end_of_validity(certificate: bytes) -> datetime:
    """Return notAfter of a certificate in DER. Raises ValueError."""
    ((_, whole),) = _items(certificate)
    _, signed = next(_items(whole))
    fields = [content for tag, content in _items(signed) if tag != _VERSION]
    try:
        tag, text = list(_items(fields[3]))[1]  # after the serial number, the algorithm and the issuer
    except IndexError:
        raise ValueError("is no certificate") from None
    return _time(tag, text.decode("ascii"))


def end_of_validity_in(path: Path) -> datetime:
    """Return notAfter of the first certificate in a PEM file. Raises OSError or ValueError."""
    text = path.read_text(encoding="ascii", errors="replace")
    start = text.find("-----BEGIN CERTIFICATE-----")
    end = text.find(_END, start)
    if start < 0 or end < 0:
        raise ValueError("contains no certificate")
    return end_of_validity(ssl.PEM_cert_to_DER_cert(text[start : end + len(_END)]))


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each element (X.690, definite lengths)."""
    at = 0
    while at < len(data):
        try:
            tag, length, at = data[at], data[at + 1], at + 2
        except IndexError:
            raise ValueError("is no certificate") from None
        if length & _LONG:
            count = length & ~_LONG
            length, at = int.from_bytes(data[at : at + count], "big"), at + count
        if at + length > len(data):
            raise ValueError("is no certificate")
        yield tag, data[at : at + length]
        at += length


def _time(tag: int, text: str) -> datetime:
    if tag == _UTC_TIME:
        text = ("20" if int(text[:2]) < _CENTURY else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
