"""The limits that a response states: `RateLimit-Policy`, `RateLimit`, `Retry-After`.

The first two are those of draft-ietf-httpapi-ratelimit-headers-11.

Items that are not valid are left out: a client must not fail because a server states nonsense.
"""

import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import NamedTuple

MOST_POLICIES = 32  # of one response
_ITEM = re.compile(r'"((?:[^"\\]|\\.)*)"((?:\s*;\s*[a-z*][a-z0-9_.*-]*(?:=(?:"(?:[^"\\]|\\.)*"|[^;,"]*))?)*)')
_PARAMETER = re.compile(r";\s*([a-z*][a-z0-9_.*-]*)=(-?\d{1,15})(?=\s*(?:;|$))")


class StatedPolicy(NamedTuple):
    """A quota: `quota` tokens in `window` seconds."""

    name: str
    quota: int
    window: int


class Remaining(NamedTuple):
    """The rest of a quota: `tokens` now; `seconds` until the quota is restored, as the server understands it."""

    name: str
    tokens: int
    seconds: int | None


def policies_of(headers: Mapping[str, str]) -> tuple[StatedPolicy, ...]:
    """Return the valid items of `RateLimit-Policy`, in their order."""
    found = []
    for name, parameters in _items(headers.get("ratelimit-policy", "")):
        quota, window = parameters.get("q", 0), parameters.get("w", 0)
        if quota > 0 and window > 0:
            found.append(StatedPolicy(name, quota, window))
    return tuple(found)


def remaining_of(headers: Mapping[str, str]) -> tuple[Remaining, ...]:
    """Return the valid items of `RateLimit`, in their order."""
    return tuple(
        Remaining(name, parameters["r"], parameters.get("t"))
        for name, parameters in _items(headers.get("ratelimit", ""))
        if parameters.get("r", -1) >= 0
    )


def stated_retry_after(headers: Mapping[str, str], wall_time: float) -> float | None:
    """Return the seconds of `Retry-After`, which may be a date (RFC 9110 section 10.2.3); None if there are none."""
    given = headers.get("retry-after", "").strip()
    if given.isascii() and given.isdigit():
        return float(given[:9])
    try:
        date = parsedate_to_datetime(given)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - wall_time)


def _items(text: str) -> list[tuple[str, dict[str, int]]]:
    found = _ITEM.findall(text[:8192])[:MOST_POLICIES]
    return [
        (re.sub(r"\\(.)", r"\1", name), {key: int(value) for key, value in _PARAMETER.findall(parameters)})
        for name, parameters in found
    ]
