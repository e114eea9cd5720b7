"""The costs of requests, learned by method and path from the tokens that are missing after them. Reads no clock."""

import math
import re
from collections import OrderedDict

MOST_ENDPOINTS = 1024  # whose cost is remembered
MOST_MEASURED = 64  # endpoints; of further ones, the first request is not measured alone
_VARIABLE = re.compile(r"/(?:\d+|[0-9a-fA-F]{16,}|[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})(?=/|$)")
_NEAR = 1e-6


class _Range:
    """The cost of one endpoint: `expected` lies between `low` and `high`; `other` is a range that contradicts them."""

    __slots__ = ("expected", "high", "is_settled", "low", "other")

    def __init__(self, expected: float) -> None:
        self.expected = expected
        self.low, self.high = -math.inf, math.inf
        self.is_settled = False
        self.other: tuple[float, float] | None = None


class CostEstimates:
    """The expected cost of requests by endpoint: the method, and the path with `*` for numbers and identifiers."""

    def __init__(self, default: float = 1.0) -> None:
        """`default` is the cost of an endpoint that nothing is known of."""
        self._default = default
        self._ranges: OrderedDict[str, _Range] = OrderedDict()

    def __repr__(self) -> str:
        return f"<CostEstimates of {len(self._ranges)} endpoints>"

    @staticmethod
    def endpoint_of(method: str, path: str) -> str:
        """Return the name by which the cost of a request is remembered."""
        return f"{method} {_VARIABLE.sub('/*', path)}"

    def expected(self, endpoint: str) -> float:
        """Return the expected cost of a request."""
        found = self._ranges.get(endpoint)
        return self._default if found is None else found.expected

    def is_doubtful(self, endpoint: str) -> bool:
        """Return True if a request of this endpoint should be measured alone: none was, or the cost was wrong."""
        found = self._ranges.get(endpoint)
        return len(self._ranges) < MOST_MEASURED if found is None else not found.is_settled

    def doubt(self, endpoint: str) -> None:
        """Have the next request of this endpoint measured alone."""
        self._range(endpoint).is_settled = False

    def learn(self, endpoint: str, low: float, high: float) -> None:
        """Narrow the cost of an endpoint to a range that was measured.

        Two ranges that contradict the earlier ones, and not each other, replace them: the cost has been changed. A
        single one is ignored: another process has spent tokens of the client.
        """
        found = self._range(endpoint)
        found.is_settled = True
        if _overlap((low, high), (found.low, found.high)):
            found.low, found.high, found.other = max(low, found.low), min(high, found.high), None
        elif found.other is not None and _overlap((low, high), found.other):
            found.low, found.high, found.other = max(low, found.other[0]), min(high, found.other[1]), None
        else:
            found.other = low, high
        found.expected = _chosen(found)

    def set(self, endpoint: str, cost: float) -> None:
        """Set the cost that a server has stated."""
        found = self._range(endpoint)
        found.low = found.high = found.expected = cost
        found.is_settled = True

    def _range(self, endpoint: str) -> _Range:
        found = self._ranges.get(endpoint)
        if found is None:
            if len(self._ranges) >= MOST_ENDPOINTS:
                self._ranges.popitem(last=False)
            found = self._ranges[endpoint] = _Range(self._default)
        self._ranges.move_to_end(endpoint)
        return found


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return max(one[0], other[0]) <= min(one[1], other[1]) + _NEAR


def _chosen(found: _Range) -> float:
    """Return the number in the range that is nearest to what was expected, a whole one above `low` if there is one.

    `low` itself is excluded: the server has rounded down what is left.
    """
    if found.low < found.expected <= found.high + _NEAR:
        return found.expected
    if found.expected > found.high:
        whole = float(math.floor(found.high + _NEAR))
        return max(0.0, whole if whole > found.low else found.high)
    whole = float(math.floor(found.low + _NEAR)) + 1
    return max(0.0, min(whole, found.high))
