"""Access logs that have fewer fields, or fewer lines."""

import json
import random
from collections.abc import Callable, Collection, Mapping

from api_gateway.models import Exchange

_ERROR = 400  # the first status of an error


def with_fields(line: Callable[[Exchange, float], str], fields: Collection[str]) -> Callable[[Exchange, float], str]:
    """Return a renderer of the lines of `line`, in JSON, with only these fields, in their order."""

    def selected(exchange: Exchange, now: float) -> str:
        members = {name: value for name, value in json.loads(line(exchange, now)).items() if name in fields}
        return f"{json.dumps(members, separators=(',', ':'))}\n"

    return selected


def sampled(
    write: Callable[[Exchange, float], None], share: float, draw: Callable[[], float] = random.random
) -> Callable[[Exchange, float], None]:
    """Return an observer that writes every response with an error or a reason, and a random share of the others."""

    def write_some(exchange: Exchange, now: float) -> None:
        if exchange.status >= _ERROR or exchange.reason is not None or draw() < share:
            write(exchange, now)

    return write_some


def by_route(
    write: Callable[[Exchange, float], None], others: Mapping[str, Callable[[Exchange, float], None]]
) -> Callable[[Exchange, float], None]:
    """Return an observer that passes exchanges of routes in `others` to their observer, and all others to `write`."""

    def write_one(exchange: Exchange, now: float) -> None:
        others.get(exchange.route or "", write)(exchange, now)

    return write_one


def at_level(write: Callable[[Exchange, float], None], level: str | float) -> Callable[[Exchange, float], None]:
    """Return an observer of the exchanges of a route with a level.

    `none` writes nothing, `errors` only errors, a number errors and this share of the others.
    """
    if level == "none":
        return _write_nothing
    return sampled(write, 0.0 if isinstance(level, str) else level)


def _write_nothing(_exchange: Exchange, _now: float) -> None:
    """Write nothing."""
