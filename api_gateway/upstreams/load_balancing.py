"""Load balancing policies: round robin, least requests, and hash of a key.

Pure functions, except that round robin keeps its credit on the targets; the random source is passed in.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence

from api_gateway.upstreams.target import Target

Picker = Callable[[Sequence[Target], str], Target]

LOAD_BOUND = 1.25  # times a target's fair share of requests in flight, above which a key goes to another target


def round_robin(targets: Sequence[Target], _key: str) -> Target:
    """Smooth weighted round robin, as in nginx: weights 2:1 give a b a, not a a b."""
    if len(targets) == 1:
        return targets[0]
    chosen, total = targets[0], 0
    for target in targets:
        total += target.weight
        target.credit += target.weight
        if target.credit > chosen.credit:
            chosen = target
    chosen.credit -= total
    return chosen


def least_requests(source: random.Random) -> Picker:
    """Return a picker of the less loaded of two random targets, by requests in flight per weight.

    Two choices are within a constant of the optimum (Mitzenmacher 2001) and, unlike the exact minimum, do not make all
    gateways choose the same target at once.
    """
    draw = source.random

    def picker(targets: Sequence[Target], _key: str) -> Target:
        count = len(targets)
        if count == 1:
            return targets[0]
        first, second = int(draw() * count), int(draw() * (count - 1))  # cheaper than `sample`
        one, other = targets[first], targets[second if second < first else second + 1]
        return one if one.in_flight * other.weight <= other.in_flight * one.weight else other

    return picker


def rendezvous_hash(targets: Sequence[Target], key: str) -> Target:
    """Return the target of a key: the same one while it is offered and not overloaded.

    Highest random weight (Thaler and Ravishankar 1998), with the logarithmic method for weights: when a target is
    removed, only its keys move. If a target exceeds LOAD_BOUND, the next best one gets the key (consistent hashing
    with bounded loads, Mirrokni, Thorup and Zadimoghaddam 2017).
    """
    in_flight = weight = 0
    for target in targets:
        in_flight += target.in_flight
        weight += target.weight
    bound = LOAD_BOUND * (in_flight + 1) / weight
    raw = key.encode()
    best, highest = targets[0], -1.0
    for target in targets:
        if target.in_flight < bound * target.weight:
            score = target.weight / -math.log(_unit(target.url.encode(), raw))
            if score > highest:
                best, highest = target, score
    return best


def share_of_key(target: Target, key: str) -> float:
    """Return a number between 0 and 1 that depends only on key and target, independent of the load balancing hash."""
    return _unit(target.url.encode(), b"slow start|" + key.encode())


def _unit(name: bytes, key: bytes) -> float:
    """Return a hash as a number between 0 and 1, both excluded."""
    digest = hashlib.blake2b(b"%b|%b" % (name, key), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52
