"""The ways to choose among the targets that are offered: by turns, by load, by key.

Pure but for the turns, which are counted on the targets; the random source is handed in.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence

from api_gateway.upstreams.target import Target

Picker = Callable[[Sequence[Target], str], Target]

LOAD_BOUND = 1.25  # times its fair share of requests in flight, that a target may have before a key passes it by


def round_robin(targets: Sequence[Target], _key: str) -> Target:
    """Take turns by weight, interleaved (nginx's smooth weighted round robin): 2:1 gives a b a, never a a b."""
    if len(targets) == 1:
        return targets[0]
    chosen, most, total = targets[0], -math.inf, 0
    for target in targets:
        total += target.weight
        target.credit += target.weight
        if target.credit > most:
            chosen, most = target, target.credit
    chosen.credit -= total
    return chosen


def least_requests(source: random.Random) -> Picker:
    """Return a pick of the less loaded of two random targets, by requests in flight per weight.

    Two choices get within a constant of the best (Mitzenmacher 2001) and, unlike the exact minimum, do not send every
    gateway to the same target at once.
    """

    def picker(targets: Sequence[Target], _key: str) -> Target:
        if len(targets) == 1:
            return targets[0]
        one, other = source.sample(targets, 2)
        return one if one.in_flight * other.weight <= other.in_flight * one.weight else other

    return picker


def rendezvous_hash(targets: Sequence[Target], key: str) -> Target:
    """Send one key to one target for as long as that is offered and not overloaded.

    Highest random weight (Thaler and Ravishankar 1998), by the logarithmic method for weights: losing a target moves
    only the keys it had. A target with its bound of requests in flight passes the key to the next best (consistent
    hashing with bounded loads, Mirrokni, Thorup and Zadimoghaddam 2017).
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
    """Return a number from 0 to 1 that is the same for this key and target every time, and alike for no other."""
    return _unit(target.url.encode(), b"slow start|" + key.encode())


def _unit(name: bytes, key: bytes) -> float:
    """Return a hash as a number between 0 and 1, neither of them included."""
    digest = hashlib.blake2b(b"%b|%b" % (name, key), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52
