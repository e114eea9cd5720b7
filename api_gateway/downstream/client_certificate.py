"""The certificate of a client, as `ssl` describes one that it has verified."""

import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from api_gateway.models import ClientCertificate

_KINDS = {"URI": "uri", "DNS": "dns", "email": "email"}
_SHORT = {
    "commonName": "CN",
    "countryName": "C",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
}
_VISIBLE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")
_SPECIAL = frozenset(',+"\\<>;=')


def certificate_of(peer: Mapping[str, Any] | None) -> ClientCertificate | None:
    """Return the certificate that `ssl.SSLObject.getpeercert` describes; None if there is none that was verified."""
    if not peer:
        return None
    return ClientCertificate(tuple(_names(peer)), float(ssl.cert_time_to_seconds(peer["notAfter"])))


def _names(peer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names. In those of the subject, what a client id cannot contain is percent-encoded, and so is `%`."""
    for kind, name in peer.get("subjectAltName", ()):
        if kind in _KINDS:
            yield _KINDS[kind], name
    parts = [pair for relative in peer["subject"] for pair in relative]
    common = [value for name, value in parts if name == "commonName"]
    if len(common) == 1:  # of several, none is the name
        yield "common_name", as_client_id(common[0])
    if parts:
        yield "subject", as_client_id(",".join(_relative(one) for one in reversed(peer["subject"])))


def as_client_id(name: str) -> str:
    """Return a name of the subject with what a client id cannot contain, and `%`, percent-encoded."""
    return quote(name, safe=_VISIBLE)


def _relative(pairs: Sequence[tuple[str, str]]) -> str:
    """Return a relative distinguished name, which may have several attributes (RFC 4514 section 2.2)."""
    return "+".join(f"{_SHORT.get(name, name)}={_escaped(value)}" for name, value in reversed(pairs))


def _escaped(value: str) -> str:
    """Return a value of a distinguished name, escaped as in RFC 4514 section 2.4, and `=` too."""
    return "".join(f"\\{one}" if one in _SPECIAL else one for one in value)
