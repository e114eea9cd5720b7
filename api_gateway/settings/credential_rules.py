"""Rules on the credentials of clients: API keys of the configuration, and ids that a credential must prove."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from api_gateway.printable_text import some_of
from api_gateway.settings.clients import ClientSection, TierSection
from api_gateway.settings.diagnostics import KeyPath, path_text
from api_gateway.settings.extensions import ExtensionSection
from api_gateway.settings.identity import IdentitySection
from api_gateway.settings.routes import RouteSection

_PROVING = ("api_key", "jwt", "certificate")  # sources whose credentials prove an id


class CredentialSections(Protocol):
    """The sections that the rules read."""

    @property
    def identity(self) -> IdentitySection: ...  # noqa: D102 - see `GatewayConfig`
    @property
    def tiers(self) -> Mapping[str, TierSection]: ...  # noqa: D102
    @property
    def clients(self) -> Mapping[str, ClientSection]: ...  # noqa: D102
    @property
    def routes(self) -> Sequence[RouteSection]: ...  # noqa: D102
    @property
    def extensions(self) -> Sequence[ExtensionSection]: ...  # noqa: D102


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


def can_prove_ids(config: CredentialSections) -> bool:
    """Return whether a credential, or a hook of an extension, can prove the id of a client."""
    return bool(config.extensions) or not {*_PROVING}.isdisjoint(config.identity.sources)


def unused_credentials(config: CredentialSections) -> Iterator[tuple[KeyPath, str]]:
    """Yield why keys have no effect, and why ids that a credential must prove cannot be proved."""
    sources = config.identity.sources
    place: KeyPath = ("identity", "sources")
    keyed = [f"clients.{client_id}" for client_id, client in config.clients.items() if client.keys]
    if keyed and "api_key" not in sources:
        message = f"does not name api_key: keys of clients prove nothing, and upstreams receive them: {some_of(keyed)}"
        yield place, message
    if can_prove_ids(config):
        return
    closed = [f"tiers.{name}" for name, tier in config.tiers.items() if tier.verified_only]
    closed += [
        f"clients.{client_id}"
        for client_id, client in config.clients.items()
        if client.verified_only or (client.verified_only is None and client.keys)
    ]
    if closed:
        needed = f"{', '.join(_PROVING[:-1])} or {_PROVING[-1]}"
        yield place, f"names no source that proves an id ({needed}), which is required of: {some_of(closed)}"
