"""The warning about stored API keys that cannot be used under the configuration. Pure."""

from collections.abc import Sequence

from api_gateway.clients.api_keys import ApiKey, KnownKey
from api_gateway.eventloop.steps import Steps
from api_gateway.printable_text import some_of

_STEP = 100  # keys


def warning_of(
    held: Sequence[KnownKey], now: float, *, is_source: bool, routes: frozenset[str], is_complete: bool
) -> Steps[str | None]:
    """Return a warning on the keys held; None if all of them can be used.

    `is_source`: keys are accepted. `routes` are the names of all routes. `is_complete`: the store has no others.
    """
    count, clients, unknown = 0, dict[str, None](), dict[str, None]()
    for number, known in enumerate(held):
        if number % _STEP == 0:
            yield
        if is_source:
            lacking = _lacking(known.key, routes, now)
            if not lacking:
                continue
            unknown.update(lacking)
        count += 1
        clients[known.client_id] = None
    if not count:
        return None
    part = "" if is_complete else ", of those in memory; those that only the store has were not examined"
    found = f"(keys: {count}, clients: {some_of(clients)}){part}"
    if not is_source:
        useless = "stored API keys prove nothing, and upstreams receive them"
        return f"identity.sources does not name api_key: {useless} {found}"
    return (
        f"API keys are limited to routes that do not exist: {some_of(map(repr, unknown))} {found}. If a route was"
        " renamed, give it its former name, or create other keys"
    )


def _lacking(key: ApiKey, routes: frozenset[str], now: float) -> dict[str, None]:
    """Return the names of routes that a valid key is limited to and that do not exist."""
    if key.routes is None or routes.issuperset(key.routes) or not key.is_valid_at(now):
        return {}
    return dict.fromkeys(name for name in key.routes if name not in routes)
