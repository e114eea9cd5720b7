"""The message after the start: bound addresses, and a URL or command to reach the gateway.

It is printed, or logged if the log is JSON, because each line on standard output is then an object.
"""

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from api_gateway.admin.operator_token import token_file
from api_gateway.assembly.identity import claim_notice
from api_gateway.assembly.routes import conditions_of
from api_gateway.config import GatewayConfig
from api_gateway.demo import banner
from api_gateway.process.listeners import WorkerSockets
from api_gateway.settings.bind_address import UNIX_PREFIX, authority
from api_gateway.settings.routes import RouteSection

logger = logging.getLogger(__name__)

_REACHED_AS_LOCALHOST = ("127.0.0.1", "0.0.0.0", "::")  # noqa: S104 - compared, not bound


@dataclass(frozen=True, slots=True)
class ReachableAddress:
    """A listener's bound address, a URL to reach it, and the curl command for that URL."""

    bound: str
    url: str
    curl: str = "curl"

    @classmethod
    def of(cls, sockets: Sequence[socket.socket], scheme: str = "http") -> "ReachableAddress":
        """Return the address of the sockets of one listener: several IP addresses, or one path."""
        first = sockets[0]
        if first.family == socket.AF_UNIX:
            path = first.getsockname()
            return cls(f"{UNIX_PREFIX}{path}", f"{scheme}://localhost", f"curl --unix-socket {path}")
        names = [sock.getsockname()[:2] for sock in sockets]
        host, port = names[0]
        reached = "localhost" if host in _REACHED_AS_LOCALHOST else host
        return cls(" and ".join(authority(*name) for name in names), f"{scheme}://{authority(reached, port)}")

    def __str__(self) -> str:
        return f"{self.bound} ({self.url if self.curl == 'curl' else f'{self.curl} {self.url}'})"


def _destination(route: RouteSection) -> str:
    """Return where the requests of a route go, in words."""
    if route.redirect is not None:
        return f"{route.redirect.status} {route.redirect.to}"
    return ", ".join(route.upstream_names) or f"{200 if route.respond is None else route.respond.status}"


def _matched(route: RouteSection) -> str:
    """Return what a route matches, by which it differs from others with the same path."""
    how = [] if route.match.path == "prefix" else [route.match.path]
    conditions = ", ".join([*how, *(route.methods or ()), *map(str, conditions_of(route.match))])
    return f"{route.host or ''}{route.path}{f' ({conditions})' if conditions else ''}"


def announce_start(config: GatewayConfig, sockets: WorkerSockets, workers: int = 1) -> None:
    """Print the startup message; with `log.format: json`, log each of its lines instead."""
    text = startup_banner(config, sockets, workers)
    if config.log.format != "json":
        print(text, flush=True)  # noqa: T201 - it is for standard output
        return
    for line in text.splitlines():
        logger.info("%s", line.strip())


def startup_banner(config: GatewayConfig, sockets: WorkerSockets, workers: int = 1) -> str:
    """Return the startup message: addresses, routes, where the operator token is, and which ids anyone can claim."""
    notice = claim_notice(config)
    place = ReachableAddress.of(sockets.public, "http" if config.server.tls is None else "https")
    operators = place
    if sockets.admin:
        operators = ReachableAddress.of(sockets.admin, "https" if config.admin.tls else "http")
    routes = [f"  {_matched(route)} -> {_destination(route)}" for route in config.routes]
    lines = [f"Listening on {place}", *routes]
    if config.is_demo:
        lines = [banner(str(place), place.url, place.curl, f"{operators.curl} {operators.url}")]
    if sockets.admin:
        lines.append(f"Operator endpoints on {operators}")
    if sockets.redirect:
        lines.append(f"Plain HTTP on {ReachableAddress.of(sockets.redirect)} is redirected")
    token = token_file(config.state_dir)
    if token.exists():
        lines.append(f"Operator token in {token}")
    if notice:
        lines.append(notice)
    if workers > 1:
        lines.append(f"{workers} workers")
    return "\n".join(lines)
