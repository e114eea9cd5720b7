"""Certificates in files: their names and dates, read from DER (RFC 5280), and their keys.

Python's `ssl` reports these only for a peer's certificate. OpenSSL validates a certificate when it is loaded; this
reader raises ValueError for input that it cannot read.
"""

import base64
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from os import PathLike

StrPath = str | PathLike[str]
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
PRIVATE_KEY = b"PRIVATE KEY-----"  # in a PEM file of any kind of key
_OID, _UTC_TIME = 0x06, 0x17
_VERSION, _EXTENSIONS = 0xA0, 0xA3
_DNS, _ADDRESS = 0x82, 0x87  # kinds of a GeneralName
_SUBJECT_ALT_NAME = b"\x55\x1d\x11"
_COMMON_NAME = b"\x55\x04\x03"
_CENTURY = 50  # years of UTCTime from here on are of the 20th century (RFC 5280 section 4.1.2.5.1)
_LONG = 0x80  # a length whose size follows
_MAX_SIZE_BYTES = 4


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """Names (lower case; those of wildcards begin with `*.`), and validity in seconds since the epoch."""

    names: tuple[str, ...]
    not_before: float
    not_after: float


def verifying_context(ca_file: StrPath | None = None) -> ssl.SSLContext:
    """Return a context that verifies servers by the system's authorities, or by those in a PEM file. Blocks.

    Python's default demands, since 3.13, extensions that many private authorities lack, such as one that
    `openssl req -x509` creates. Here they are verified alike by all versions, as OpenSSL does by default. Raises
    OSError (ssl.SSLError is a subclass) if the file cannot be used.
    """
    context = ssl.create_default_context(cafile=ca_file)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def load_pair(context: ssl.SSLContext, certificate: StrPath, key: StrPath | None = None) -> None:
    """Load a certificate and its key into a context. An encrypted key is an error (ssl.SSLError).

    OpenSSL would ask for its passphrase on the terminal, and the process would wait for it.
    """
    context.load_cert_chain(certificate, key, lambda: "")


def facts_of_pem(text: bytes) -> CertificateFacts:
    """Return the facts of the first certificate in a PEM file. Raises ValueError."""
    found = _PEM.search(text)
    if found is None:
        raise ValueError("contains no PEM certificate")
    return facts_of_der(base64.b64decode(b"".join(found[1].split()), validate=True))


def facts_of_der(der: bytes) -> CertificateFacts:
    """Return the facts of a certificate. Raises ValueError."""
    try:
        return _facts(der)
    except (IndexError, StopIteration, UnicodeDecodeError) as error:
        raise ValueError("is not a certificate") from error


def _facts(der: bytes) -> CertificateFacts:
    body = list(_items(next(_items(next(_items(der))[1]))[1]))  # of the TBSCertificate
    if body[0][0] == _VERSION:
        del body[0]
    _serial, _algorithm, _issuer, validity, subject = body[:5]
    begin, end = (_time(tag, content) for tag, content in _items(validity[1]))
    names = [name for tag, content in body[5:] if tag == _EXTENSIONS for name in _alternative_names(content)]
    return CertificateFacts(tuple(dict.fromkeys(names or _common_names(subject[1]))), begin, end)


def _items(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each value."""
    place = 0
    while place < len(content):
        tag, size = content[place], content[place + 1]
        place += 2
        if size & _LONG:
            count = size & ~_LONG
            if not 0 < count <= _MAX_SIZE_BYTES:
                raise ValueError("is not a certificate")
            size = int.from_bytes(content[place : place + count], "big")
            place += count
        if place + size > len(content):
            raise ValueError("is not a complete certificate")
        yield tag, content[place : place + size]
        place += size


def _time(tag: int, content: bytes) -> float:
    text = content.decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if int(text[:2]) >= _CENTURY else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _alternative_names(content: bytes) -> Iterator[str]:
    for _, extension in _items(next(_items(content))[1]):
        parts = list(_items(extension))
        if parts[0] == (_OID, _SUBJECT_ALT_NAME):
            for tag, value in _items(next(_items(parts[-1][1]))[1]):
                if tag == _DNS:
                    yield value.decode("ascii").lower()
                elif tag == _ADDRESS:
                    yield str(ip_address(value))


def _common_names(subject: bytes) -> Iterator[str]:
    """Yield the common names, which older certificates have instead of alternative names."""
    for _, relative in _items(subject):
        for _, attribute in _items(relative):
            (_, kind), (_, value) = list(_items(attribute))[:2]
            if kind == _COMMON_NAME:
                yield value.decode("utf-8").lower()
