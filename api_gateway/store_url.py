"""The URL of a shared store, taken apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

MEMORY = "memory://"
Kind = Literal["single", "sentinel", "cluster"]
_KINDS: dict[str, Kind] = {"": "single", "sentinel": "sentinel", "cluster": "cluster"}
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_PORTS: dict[Kind, int] = {"single": 6379, "cluster": 6379, "sentinel": 26379}
_TLS_FILES = {"ca_file": "ssl_ca_certs", "certificate": "ssl_certfile", "key": "ssl_keyfile"}


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """Where a store is, read from its URL.

    `redis://[user:password@]host[:port][/db]`, `rediss://` for TLS, `unix:///path[?db=0]`; with `+sentinel` the hosts
    are sentinels and the path names the master (`/master[/db]`), with `+cluster` they are any nodes of the cluster.
    Several hosts are parted by commas. For TLS, `?ca_file=` names the authorities to trust instead of the system's,
    and `&certificate=` with its `&key=` what is shown to a server that asks for one: PEM files.
    """

    kind: Kind
    hosts: tuple[tuple[str, int], ...]
    path: str | None
    master: str | None
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, url: str) -> "StoreUrl":
        """Read a URL. Raises ValueError that says what is wrong with it, and never shows a password."""
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise ValueError(f"must be memory:// or begin with {', '.join(f'{name}://' for name in SCHEMES)}")
        options = _options(parts.query, is_tls=parts.scheme.startswith("rediss")) | _credentials(parts.netloc)
        if "ssl_keyfile" in options and "ssl_certfile" not in options:
            raise ValueError("names a key without the certificate that it belongs to")
        if parts.scheme == "unix":
            if not parts.path or parts.hostname:
                raise ValueError("must name a socket by its whole path, as in unix:///run/store.sock")
            return cls("single", (), unquote(parts.path), None, options)
        kind = _KINDS[parts.scheme.partition("+")[2]]
        hosts = _hosts(parts.netloc, _PORTS[kind])
        if kind == "single" and len(hosts) > 1:
            raise ValueError("names several hosts, which takes +sentinel or +cluster in its scheme")
        path = [unquote(piece) for piece in parts.path.split("/") if piece]
        master = path.pop(0) if kind == "sentinel" and path else None
        if kind == "sentinel" and master is None:
            raise ValueError("must name the master, as in redis+sentinel://host:26379/mymaster")
        if path:
            options["db"] = _number(path.pop(0), "the database")
        if path or (kind == "cluster" and options.get("db")):
            raise ValueError("must end behind the database's number, and a cluster has only database 0")
        return cls(kind, hosts, None, master, options)


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
            raise ValueError(f"has the unknown parameter {name!r}; known are db, and with TLS {', '.join(_TLS_FILES)}")
    return options | ({"ssl": True} if is_tls else {})


def _credentials(netloc: str) -> dict[str, str]:
    given, at, _ = netloc.rpartition("@")
    user, _, password = given.partition(":")
    named = {"username": unquote(user), "password": unquote(password)} if at else {}
    return {name: value for name, value in named.items() if value}


def _hosts(netloc: str, default_port: int) -> tuple[tuple[str, int], ...]:
    hosts = []
    for place in netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{place}")
        if not one.hostname:
            raise ValueError("must name a host")
        try:
            hosts.append((one.hostname, one.port or default_port))
        except ValueError:
            raise ValueError(f"has a port that is no port in {place!r}") from None
    return tuple(hosts)


def _number(text: str, what: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{what} must be a number, got {text!r}")
    return int(text)
