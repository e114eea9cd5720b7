"""What operators are told of stored keys that the configuration makes useless. Pure."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from api_gateway.clients.api_keys import KnownKey
from api_gateway.printable_text import some_of


def warning_of(
    held: Mapping[str, KnownKey], now: float, *, is_source: bool, routes: AbstractSet[str], is_complete: bool
) -> str | None:
    """Return a warning on the keys held, by digest; None if all of them can be used.

    `is_source`: keys are accepted. `routes` are the names of all routes. `is_complete`: the store has no others.
    """
    if not held:
        return None
    part = "" if is_complete else ", of those in memory; those that only the store has were not examined"
    if not is_source:
        clients = dict.fromkeys(known.client_id for known in held.values())
        return (
            "identity.sources does not name api_key: stored API keys prove nothing, and upstreams receive them"
            f" (keys: {len(held)}, clients: {some_of(clients)}){part}"
        )
    lost = [
        known
        for known in held.values()
        if known.key.routes is not None and not routes >= {*known.key.routes} and known.key.is_valid_at(now)
    ]
    if not lost:
        return None
    names = dict.fromkeys(repr(name) for known in lost for name in known.key.routes or () if name not in routes)
    clients = dict.fromkeys(known.client_id for known in lost)
    return (
        f"API keys are limited to routes that do not exist: {some_of(names)} (keys: {len(lost)}, clients:"
        f" {some_of(clients)}){part}. If a route was renamed, give it its former name, or create other keys"
    )
