"""The budgets of a transport: one for each client at each server."""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable

import httpx

from api_gateway.pacing.client_budget import ClientBudget

MOST_BUDGETS = 1024
IDENTIFYING_FIELDS = ("authorization", "x-client-id", "x-api-key")
KeyOf = Callable[[httpx.Request], Hashable]


class PacingTimeout(httpx.TimeoutException):
    """A request was not sent, because the client's limits would have delayed it for longer than `max_wait`."""


def key_of_request(request: httpx.Request) -> Hashable:
    """Return the key of a request's client: the server, and the fields that commonly identify a client."""
    url, headers = request.url, request.headers
    return (url.scheme, url.host, url.port, *(headers.get(name) for name in IDENTIFYING_FIELDS))


class ClientBudgets:
    """Budgets by key. Of more than MOST_BUDGETS, the one that was unused for longest is forgotten."""

    def __init__(self, key_of: KeyOf) -> None:
        self._key_of = key_of
        self._budgets: OrderedDict[Hashable, ClientBudget] = OrderedDict()

    def __repr__(self) -> str:
        return f"<ClientBudgets {len(self._budgets)}>"

    def of(self, request: httpx.Request) -> ClientBudget:
        """Return the budget that a request belongs to."""
        key = self._key_of(request)
        found = self._budgets.get(key)
        if found is None:
            found = self._budgets[key] = ClientBudget()
            if len(self._budgets) > MOST_BUDGETS:
                self._budgets.popitem(last=False)
        self._budgets.move_to_end(key)
        return found


def is_replayable(request: httpx.Request) -> bool:
    """Return True if the body of a request can be sent again: it is in memory, or there is none."""
    return isinstance(request.stream, httpx.ByteStream)


def stated_cost(response: httpx.Response) -> float | None:
    """Return the cost that the problem details of a 429 state; None if there is none. The body must be read."""
    if response.headers.get("content-type", "").partition(";")[0] != "application/problem+json":
        return None
    try:
        details = response.json()
    except ValueError:
        return None
    cost = details.get("cost") if isinstance(details, dict) else None
    if not isinstance(cost, int | float) or isinstance(cost, bool):
        return None
    return float(cost) if math.isfinite(cost) and cost >= 0 else None
