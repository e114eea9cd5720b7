"""Rules on the credentials of clients: API keys of the configuration."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from api_gateway.settings.clients import ClientSection
from api_gateway.settings.diagnostics import KeyPath, path_text
from api_gateway.settings.routes import RouteSection


class CredentialSections(Protocol):
    """The sections that the rules read."""

    @property
    def clients(self) -> Mapping[str, ClientSection]: ...  # noqa: D102 - see `GatewayConfig`
    @property
    def routes(self) -> Sequence[RouteSection]: ...  # noqa: D102


def key_findings(config: CredentialSections) -> Iterator[tuple[KeyPath, str, tuple[KeyPath, ...]]]:
    """Yield each mistake of an API key: its place, the message, and what it depends on."""
    known = [route.name for route in config.routes]
    places: dict[str, KeyPath] = {}  # by digest
    for client_id, client in config.clients.items():
        for label, key in client.keys.items():
            place: KeyPath = ("clients", client_id, "keys", label)
            first = places.setdefault(key.digest, place)
            if first != place:
                yield (*place, "digest"), f"is the same key as {path_text(first)}; remove one of them", (first,)
            for number, name in enumerate(key.routes or ()):
                if name not in known:
                    message = f"no such route, got {name!r}; the routes are {', '.join(known)}"
                    yield (*place, "routes", str(number)), message, (("routes",),)
