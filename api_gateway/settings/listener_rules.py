"""Rules on the addresses of listeners: no two of them may be the same, or connections would arrive at either."""

from collections.abc import Iterator
from typing import Protocol

from api_gateway.settings.admin import AdminSection
from api_gateway.settings.bind_address import BindAddress
from api_gateway.settings.diagnostics import KeyPath, path_text
from api_gateway.settings.server import ServerSection

_PUBLIC: tuple[KeyPath, ...] = (("server", "host"), ("server", "port"))


class ListenerSections(Protocol):
    """The sections that the rules read."""

    @property
    def admin(self) -> AdminSection: ...  # noqa: D102 - see `GatewayConfig`
    @property
    def server(self) -> ServerSection: ...  # noqa: D102


def listener_findings(config: ListenerSections) -> Iterator[tuple[KeyPath, str, tuple[KeyPath, ...]]]:
    """Yield each listener that has the address of another one: its place, the message, and what it depends on."""
    server = config.server
    earlier = [("server.host and server.port", BindAddress.of(server.host, server.port, 0), _PUBLIC)]
    places: list[tuple[KeyPath, str | None]] = [
        (("admin", "listen"), config.admin.listen),
        (("server", "tls", "redirect_from"), None if server.tls is None else server.tls.redirect_from),
    ]
    for place, text in places:
        if text is None:
            continue
        address = BindAddress.parse(text, 0)
        for name, other, depends_on in earlier:
            if address.collides_with(other):
                yield place, f"needs another address than {name} ({other}), got {text!r}", depends_on
                break
        earlier.append((path_text(place), address, (place,)))
