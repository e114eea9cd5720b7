"""Address of a listener: a host and a port, or the path of a Unix socket."""

import re
from dataclasses import dataclass
from ipaddress import ip_address

UNIX_PREFIX = "unix:"
MAX_PATH = 107  # bytes in the path of a Unix socket (unix(7))
MAX_PORT = 65_535
EVERY_PERMISSION = 0o777
_WITH_PORT = re.compile(r"(\[[^\]]*\]|[^:]*):[^:]*")


@dataclass(frozen=True, slots=True)
class BindAddress:
    """Either `path`, for a Unix socket whose file gets the permissions `mode`, or `host` and `port`."""

    host: str = ""
    port: int = 0
    path: str = ""
    mode: int = 0o600

    @classmethod
    def of(cls, host: str, port: int, mode: int) -> "BindAddress":
        """Return the address for `host`, which may be `unix:/path`; `port` and `mode` apply to one kind each.

        Raises ValueError.
        """
        if not host.startswith(UNIX_PREFIX):
            return cls(host.removeprefix("[").removesuffix("]"), port)
        path = host.removeprefix(UNIX_PREFIX)
        if not path.startswith("/") or len(path.encode()) > MAX_PATH:
            raise ValueError(f"must be unix: and an absolute path of at most {MAX_PATH} bytes")
        return cls(path=path, mode=mode)

    @classmethod
    def parse(cls, text: str, mode: int) -> "BindAddress":
        """Parse `host:port` or `unix:/path`. Raises ValueError."""
        if text.startswith(UNIX_PREFIX):
            return cls.of(text, 0, mode)
        host, _, port = text.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()) or int(port) > MAX_PORT:
            raise ValueError("must be host:port or unix:/path, such as 127.0.0.1:9901")
        if ":" in host and not (host.startswith("[") and host.endswith("]")):
            raise ValueError("needs brackets around an IPv6 address, as in [::1]:9901")
        return cls.of(host, int(port), mode)

    def collides_with(self, other: "BindAddress") -> bool:
        """Return whether the two cannot be listeners of one machine, as far as is known without resolving names."""
        if self.path or other.path:
            return self.path == other.path
        if self.port != other.port or self.port == 0:  # 0: any free one
            return False
        ours, theirs = _hosts(self.host), _hosts(other.host)
        return any(_covers(one, two) or _covers(two, one) for one in ours for two in theirs)

    def __str__(self) -> str:
        return f"{UNIX_PREFIX}{self.path}" if self.path else authority(self.host, self.port)


def _hosts(host: str) -> tuple[str, ...]:
    """Return the addresses that a host stands for; a name that is not known here stands for itself."""
    low = host.lower()
    if low == "localhost":
        return ("127.0.0.1", "::1")
    try:
        return (str(ip_address(low)),)
    except ValueError:
        return (low,)


def _covers(host: str, other: str) -> bool:
    """Return whether a listener on `host` has the connections to `other` too."""
    return host in (other, "::") or (host == "0.0.0.0" and ":" not in other)  # noqa: S104 - compared, not bound


def authority(host: str, port: int) -> str:
    """Return the authority of a URL (RFC 3986, section 3.2): an IPv6 address is put in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def checked_host(host: str) -> str:
    """Return `host` if `BindAddress.of` accepts it. Raises ValueError.

    An empty host, for instance from an unset variable, is refused: it would mean every address.
    """
    if not host:
        raise ValueError("must name an address to listen on, such as 127.0.0.1, or '::' for every address")
    if not host.startswith(UNIX_PREFIX) and ("/" in host or _WITH_PORT.fullmatch(host)):
        raise ValueError("must be only an address, such as 0.0.0.0; set the port as server.port")
    BindAddress.of(host, 0, 0)
    return host


def checked_listen(text: str) -> str:
    """Return `text` if `BindAddress.parse` accepts it. Raises ValueError."""
    BindAddress.parse(text, 0)
    return text


def file_mode(value: object) -> int:
    """Return file permissions. Text is octal; YAML has already converted an unquoted 0660. Raises ValueError."""
    if isinstance(value, str) and re.fullmatch("0?[0-7]{3}", value):
        return int(value, 8)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= EVERY_PERMISSION:
        raise ValueError("must be octal permissions such as 0660")
    return value
