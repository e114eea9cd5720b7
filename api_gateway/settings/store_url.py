"""Parses the URL of a shared store.

A URL may contain a password, and in a wrong URL any part may belong to it. So messages say what is wrong and what is
expected, and quote nothing.
"""

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from api_gateway.ip_addresses import is_address
from api_gateway.settings.bind_address import MAX_PORT

MEMORY = "memory://"
Kind = Literal["single", "sentinel", "cluster"]
_KINDS: dict[str, Kind] = {"": "single", "sentinel": "sentinel", "cluster": "cluster"}
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_PORTS: dict[Kind, int] = {"single": 6379, "cluster": 6379, "sentinel": 26379}
_TLS_FILES = {"ca_file": "ssl_ca_certs", "cert_file": "ssl_certfile", "key_file": "ssl_keyfile"}
_HOST = re.compile(r"(\[(?P<ipv6>[^\[\]]*)\]|(?P<name>[A-Za-z0-9._-]+))(:(?P<port>.*))?", re.DOTALL)
_LOOSE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_RESERVED = "in a user name or password, write : / ? # @ % as %3A %2F %3F %23 %40 %25"


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """The location of a store and the options to connect to it.

    `redis://[user:password@]host[:port][/db]`, `rediss://` for TLS, `unix:///path[?db=0]`; with `+sentinel` the hosts
    are sentinels and the path names the master (`/master[/db]`), with `+cluster` they are nodes of the cluster.
    Several hosts are separated by commas. For TLS, `?ca_file=` names the trusted authorities instead of the system's,
    and `&cert_file=` with `&key_file=` the client certificate: PEM files.
    """

    kind: Kind
    hosts: tuple[tuple[str, int], ...]
    path: str | None
    master: str | None
    options: Mapping[str, Any] = field(repr=False)  # the password is among them

    @property
    def place(self) -> str:
        """Where the store is, without what is needed to connect to it."""
        hosts = ",".join(f"{host}:{port}" for host, port in sorted(self.hosts))
        return f"{self.path or hosts}/{self.master or ''}/{self.options.get('db', 0)}"

    @classmethod
    def parse(cls, url: str) -> "StoreUrl":
        """Parse a URL. Raises ValueError, whose message quotes none of it."""
        parts = _split(url)
        options = _options(parts.query, is_tls=parts.scheme.startswith("rediss")) | _credentials(parts.netloc)
        if "ssl_keyfile" in options and "ssl_certfile" not in options:
            raise ValueError("names a key_file without the cert_file that it belongs to")
        if parts.scheme == "unix":
            if not parts.path or parts.netloc.rpartition("@")[2]:
                raise ValueError("must contain the absolute path of a socket, as in unix:///run/store.sock")
            return cls("single", (), unquote(parts.path), None, options)
        kind = _KINDS[parts.scheme.partition("+")[2]]
        hosts = _hosts(parts.netloc, _PORTS[kind])
        if kind == "single" and len(hosts) > 1:
            raise ValueError("names several hosts, which requires +sentinel or +cluster in its scheme")
        path = [unquote(piece) for piece in parts.path.split("/") if piece]
        master = path.pop(0) if kind == "sentinel" and path else None
        if kind == "sentinel" and master is None:
            raise ValueError("must name the master, as in redis+sentinel://host:26379/mymaster")
        if path:
            options["db"] = _number(path.pop(0), "the database after the host")
        if path or (kind == "cluster" and options.get("db")):
            raise ValueError("must end after the number of the database, and a cluster has only database 0")
        return cls(kind, hosts, None, master, options)


def _split(url: str) -> SplitResult:
    scheme, separator, _ = url.partition("://")
    if not separator or scheme.lower() not in SCHEMES:
        raise ValueError(f"must be memory:// or begin with {', '.join(f'{name}://' for name in SCHEMES)}")
    if any(character.isspace() or not character.isprintable() for character in url):
        raise ValueError("must not contain spaces, line ends or control characters")  # urlsplit drops some of them
    try:
        parts = urlsplit(url)
    except ValueError:  # its message quotes the URL
        parts = None
    if parts is None:
        raise ValueError(f"is no valid URL; {_RESERVED}")
    if "#" in url or "@" in parts.path + parts.query:
        raise ValueError(f"has '#', or '@' after the host; {_RESERVED}")
    return parts


def _options(query: str, *, is_tls: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name == "db":
            options["db"] = _number(value, "db")
        elif name in _TLS_FILES and is_tls:
            if not value:
                raise ValueError(f"must name a PEM file by {name}=, got none")
            options[_TLS_FILES[name]] = value
        else:
            raise ValueError(
                f"has an unknown parameter after '?'; known are db, and with TLS {', '.join(_TLS_FILES)}; {_RESERVED}"
            )
    return options | ({"ssl": True, "ssl_exclude_verify_flags": [ssl.VERIFY_X509_STRICT]} if is_tls else {})


def _credentials(netloc: str) -> dict[str, str]:
    given, at, _ = netloc.rpartition("@")
    if _LOOSE_PERCENT.search(given):
        raise ValueError(f"has a '%' that is not followed by two hexadecimal digits; {_RESERVED}")
    user, _, password = given.partition(":")
    named = {"username": unquote(user), "password": unquote(password)} if at else {}
    return {name: value for name, value in named.items() if value}


def _hosts(netloc: str, default_port: int) -> tuple[tuple[str, int], ...]:
    return tuple(_host(place, default_port) for place in netloc.rpartition("@")[2].split(","))


def _host(place: str, default_port: int) -> tuple[str, int]:
    if not place or place.startswith(":"):
        raise ValueError("must name a host")
    found = _HOST.fullmatch(place)
    if found is None or not (found["ipv6"] is None or is_address(found["ipv6"], version=6)):
        raise ValueError(f"must name hosts by name or address, an IPv6 address in brackets; {_RESERVED}")
    port = found["port"] or str(default_port)
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= MAX_PORT):
        raise ValueError(f"has a port that is not a number from 1 to {MAX_PORT}; {_RESERVED}")
    return (found["ipv6"] or found["name"]).lower(), int(port)


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{what} must be a number; {_RESERVED}")
    return int(text)
