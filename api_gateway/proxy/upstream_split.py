"""The upstream of a request of a route with several ones, by weight. Pure.

Rendezvous hashing with weights (Schindelhauer, Schomaker 2005): each client has a number for each upstream, which
depends on both alone, and gets the upstream whose number, divided by its weight, is the smallest. If a weight grows
from 5 to 10 percent, only the clients that this upstream gains move.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_ASSIGNED = 65_536  # clients whose upstream is remembered
_SPACE = float(1 << 64)


@dataclass(frozen=True, slots=True)
class UpstreamSplit:
    """The upstreams of a route, as pairs of name and weight. Weights of 0 get no requests."""

    weights: tuple[tuple[str, float], ...]
    _known: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def upstream_of(self, key: str) -> str:
        """Return the upstream for a client. The same client has the same upstream as long as weights do not change."""
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= MAX_ASSIGNED:
                self._known.clear()
            known = self._known[key] = chosen(self.weights, key)
        return known


def chosen(weights: Sequence[tuple[str, float]], key: str) -> str:
    """Return the upstream for a key."""
    return min(weights, key=lambda pair: _distance(pair[0], key) / pair[1] if pair[1] else math.inf)[0]


def _distance(name: str, key: str) -> float:
    """Return an exponentially distributed number that depends on both alone."""
    digest = hashlib.blake2b(f"{name}\0{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return -math.log((int.from_bytes(digest) + 1) / (_SPACE + 1))
