"""A request costs a token for every hundred items that it asks for by `?limit=`."""

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

from api_gateway import RequestView


class PageCost:
    """Options: `per_token`, the items for one token (100), and `most`, the highest cost (50)."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._per_token = int(options.get("per_token", 100))
        self._most = int(options.get("most", 50))

    def cost(self, request: RequestView, route: str) -> float | None:  # noqa: ARG002 - the cost is that of any route
        """Return the cost by the query; None without a valid limit, so that the route's cost applies."""
        given = parse_qs(request.query).get("limit", [""])[-1]
        if not given.isascii() or not given.isdigit():
            return None
        return max(1, min(self._most, math.ceil(int(given[:9]) / self._per_token)))
