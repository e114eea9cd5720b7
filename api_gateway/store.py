"""The shared store, a Redis or Valkey server: how its URL is read and how it is connected to.

The only module that knows the client library. Nothing here retries: whether a command may be sent twice is for the
caller to know, and a decision of the limiter may not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

Client = Redis | RedisCluster
StoreError = (RedisError, OSError, TimeoutError)  # all that a command can fail with
REFUSALS = ResponseError  # what the server itself answered: the command has changed nothing

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_PORTS = {"single": 6379, "cluster": 6379, "sentinel": 26379}
_TLS_FILES = {"ca_file": "ssl_ca_certs", "certificate": "ssl_certfile", "key": "ssl_keyfile"}


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """Where a store is, read from its URL.

    `redis://[user:password@]host[:port][/db]`, `rediss://` for TLS, `unix:///path[?db=0]`; with `+sentinel` the hosts
    are sentinels and the path names the master (`/master[/db]`), with `+cluster` they are any nodes of the cluster.
    Several hosts are parted by commas. `?ca_file=`, `?certificate=` and `?key=` name PEM files for TLS.
    """

    kind: Literal["single", "sentinel", "cluster"]
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
        _, _, variant = parts.scheme.partition("+")
        kind: Literal["single", "sentinel", "cluster"] = "single"
        if variant == "sentinel":
            kind = "sentinel"
        elif variant == "cluster":
            kind = "cluster"
        options = _options(parts.query, is_tls=parts.scheme.startswith("rediss"))
        options |= _credentials(parts.netloc)
        if parts.scheme == "unix":
            if not parts.path or parts.hostname:
                raise ValueError("must name a socket by its whole path, as in unix:///run/store.sock")
            return cls(kind, (), unquote(parts.path), None, options)
        path = [unquote(piece) for piece in parts.path.split("/") if piece]
        master = None
        if kind == "sentinel":
            if not path:
                raise ValueError("must name the master, as in redis+sentinel://host:26379/mymaster")
            master = path.pop(0)
        if path:
            options["db"] = _number(path.pop(0), "the database")
        if path or (kind == "cluster" and options.get("db")):
            raise ValueError("must end behind the database's number, and a cluster has only database 0")
        hosts = _hosts(parts.netloc, _PORTS[kind])
        if kind == "single" and len(hosts) > 1:
            raise ValueError("names several hosts, which takes +sentinel or +cluster in its scheme")
        return cls(kind, hosts, None, master, options)


def _options(query: str, *, is_tls: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name == "db":
            options["db"] = _number(value, "db")
        elif name in _TLS_FILES and is_tls:
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


def connect(url: str, *, timeout: float) -> Client:
    """Return a client of the store that connects when it is used, for commands that may take `timeout` seconds.

    It never repeats a command by itself and raises one of `StoreError`. Replies are bytes. Raises ValueError.
    """
    place = StoreUrl.parse(url)
    options = {**place.options, **_common(timeout)}
    if place.path is not None:
        return Redis(unix_socket_path=place.path, **options)
    if place.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in place.hosts]
        return RedisCluster(startup_nodes=nodes, cluster_error_retry_attempts=0, **options)
    if place.kind == "sentinel":
        watchers = {key: value for key, value in options.items() if key not in ("db", "username", "password")}
        sentinel = Sentinel(list(place.hosts), sentinel_kwargs=watchers, **options)  # type: ignore[no-untyped-call]  # theirs
        master: Redis = sentinel.master_for(place.master or "")
        return master
    ((host, port),) = place.hosts
    return Redis(host=host, port=port, **options)


def _common(timeout: float) -> dict[str, Any]:
    """Return what differs from the library's defaults: no retries, and no changes to timeouts by the server."""
    return {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
