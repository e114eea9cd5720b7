"""httpx transports that delay requests so that the server need not refuse them: `PacingTransport` and its sync twin.

See docs/pacing.md.
"""

import math
import threading
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

import anyio
import httpx

from api_gateway.pacing.client_budget import UNTIL_CHANGE, ClientBudget, SentRequest
from api_gateway.pacing.client_budgets import (
    ClientBudgets,
    KeyOf,
    PacingTimeout,
    is_replayable,
    key_of_request,
    stated_cost,
)
from api_gateway.pacing.stated_limits import stated_retry_after

_REFUSED = 429
_MOST_PROBLEM_BYTES = 65_536
_NO_RETRY_AFTER = 1.0  # seconds that are waited after a 429 that states no time


class _Settings:
    """The state that both transports share: the budgets, the limits of waiting, the clocks."""

    def __init__(self, key: KeyOf, max_wait: float, max_retries: int, clock: Callable[[], float]) -> None:
        if not max_wait >= 0:
            raise ValueError(f"max_wait must be >= 0, got {max_wait}")
        if max_retries < 0:
            raise ValueError(f"max_retries must be >= 0, got {max_retries}")
        self.budgets = ClientBudgets(key)
        self.max_wait = max_wait
        self.max_retries = max_retries
        self.clock = clock

    def may_wait(self, budget: ClientBudget, endpoint: str, deadline: float) -> float:
        """Return the seconds to wait before a request. Raises PacingTimeout if they end after the deadline."""
        now = self.clock()
        wait = budget.wait(endpoint, now)
        if wait > 0 and now + wait > deadline:
            raise PacingTimeout(f"{endpoint} would have to wait {wait:.1f} s; max_wait is {self.max_wait:g} s")
        return wait

    def retry_after(self, response: httpx.Response) -> float:
        """Return the seconds to wait that a 429 states."""
        given = stated_retry_after(response.headers, time.time())
        return _NO_RETRY_AFTER if given is None else given

    def take(self, budget: ClientBudget, ticket: SentRequest, response: httpx.Response) -> None:
        """Learn from a response, of which a 429 has been read if it is short."""
        if response.status_code != _REFUSED:
            budget.finish(ticket, response.headers, self.clock())
            return
        cost = stated_cost(response) if response.is_closed else None
        after = self.retry_after(response)
        budget.refuse(ticket, response.headers, self.clock(), retry_after=after, cost=cost)

    def is_retried(self, request: httpx.Request, response: httpx.Response, retries: int, deadline: float) -> bool:
        """Return True if a request is sent again after this response."""
        return (
            response.status_code == _REFUSED
            and retries < self.max_retries
            and is_replayable(request)
            and self.clock() + self.retry_after(response) <= deadline
        )


def _is_short_refusal(response: httpx.Response) -> bool:
    length = response.headers.get("content-length", "")
    is_short = length.isascii() and length.isdigit() and int(length[:9]) <= _MOST_PROBLEM_BYTES
    return response.status_code == _REFUSED and is_short


class PacingTransport(httpx.AsyncBaseTransport):
    """Sends requests by another transport when the limits of the server allow them: `RateLimit`, `Retry-After`.

    Requests wait in the order of their arrival, and only while no tokens remain. The tasks of one client share its
    budget. Cancelling a request that waits costs nothing.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        *,
        key: KeyOf = key_of_request,
        max_wait: float = math.inf,
        max_retries: int = 3,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        """Wrap `transport`, which is closed with this one.

        - `key`: returns the key of a client, by which clients of one server have a budget each; by default the server
          with the fields Authorization, X-Client-ID and X-API-Key.
        - `max_wait`: the longest time in seconds that a request is delayed; instead of a longer delay, PacingTimeout
          is raised, or a 429 is returned.
        - `max_retries`: how often a request is sent again after a 429, if its body can be sent again.
        - `clock`, `sleep`: monotonic seconds, and a coroutine function that waits; for tests.
        """
        self._transport = transport
        self._settings = _Settings(key, max_wait, max_retries, clock)
        self._sleep = sleep
        self._turns: WeakKeyDictionary[ClientBudget, _Turns] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<PacingTransport {self._settings.budgets!r} of {self._transport!r}>"

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._transport.__aexit__(exc_type, exc_value, traceback)

    async def aclose(self) -> None:
        """Close the wrapped transport."""
        await self._transport.aclose()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request as soon as it is allowed. Raises PacingTimeout, and what the wrapped transport raises."""
        settings = self._settings
        budget = settings.budgets.of(request)
        turns = self._turns.setdefault(budget, _Turns())
        endpoint = budget.costs.endpoint_of(request.method, request.url.path)
        deadline, retries = settings.clock() + settings.max_wait, 0
        while True:
            ticket = await self._admitted(budget, turns, endpoint, deadline)
            try:
                response = await self._transport.handle_async_request(request)
                if _is_short_refusal(response):
                    await response.aread()
            except BaseException:
                budget.abort(ticket, settings.clock())
                turns.pass_on()
                raise
            settings.take(budget, ticket, response)
            turns.pass_on()
            if not settings.is_retried(request, response, retries, deadline):
                return response
            retries += 1
            await response.aclose()

    async def _admitted(self, budget: ClientBudget, turns: "_Turns", endpoint: str, deadline: float) -> SentRequest:
        """Wait for the turn of a request, and for its tokens."""
        async with turns.lock:
            while (wait := self._settings.may_wait(budget, endpoint, deadline)) != 0:
                await turns.changed_within(self._sleep, wait)
            return budget.begin(endpoint, self._settings.clock())


class _Turns:
    """The order of the requests of one budget: a fair lock, and an event when something has changed."""

    __slots__ = ("changed", "lock")

    def __init__(self) -> None:
        self.lock = anyio.Lock()
        self.changed = anyio.Event()

    def pass_on(self) -> None:
        """Wake the request that waits."""
        self.changed.set()
        self.changed = anyio.Event()

    async def changed_within(self, sleep: Callable[[float], Awaitable[None]], wait: float) -> None:
        """Wait until something has changed, and no longer than `wait` seconds unless that is UNTIL_CHANGE."""
        changed = self.changed
        if wait == UNTIL_CHANGE:
            await changed.wait()
            return
        async with anyio.create_task_group() as group:

            async def wake() -> None:
                await changed.wait()
                group.cancel_scope.cancel()

            group.start_soon(wake)
            await sleep(wait)
            group.cancel_scope.cancel()


class SyncPacingTransport(httpx.BaseTransport):
    """The same for `httpx.Client`, whose threads share the budget of a client. See `PacingTransport`."""

    def __init__(
        self,
        transport: httpx.BaseTransport,
        *,
        key: KeyOf = key_of_request,
        max_wait: float = math.inf,
        max_retries: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wrap `transport`, which is closed with this one; the arguments are those of `PacingTransport`."""
        self._transport = transport
        self._settings = _Settings(key, max_wait, max_retries, clock)
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<SyncPacingTransport {self._settings.budgets!r} of {self._transport!r}>"

    def __enter__(self) -> Self:
        self._transport.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._transport.__exit__(exc_type, exc_value, traceback)

    def close(self) -> None:
        """Close the wrapped transport."""
        self._transport.close()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request as soon as it is allowed. Raises PacingTimeout, and what the wrapped transport raises."""
        settings = self._settings
        with self._changed:
            budget = settings.budgets.of(request)
        endpoint = budget.costs.endpoint_of(request.method, request.url.path)
        deadline, retries = settings.clock() + settings.max_wait, 0
        while True:
            ticket = self._admitted(budget, endpoint, deadline)
            try:
                response = self._transport.handle_request(request)
                if _is_short_refusal(response):
                    response.read()
            except BaseException:
                with self._changed:
                    budget.abort(ticket, settings.clock())
                    self._changed.notify_all()
                raise
            with self._changed:
                settings.take(budget, ticket, response)
                self._changed.notify_all()
            if not settings.is_retried(request, response, retries, deadline):
                return response
            retries += 1
            response.close()

    def _admitted(self, budget: ClientBudget, endpoint: str, deadline: float) -> SentRequest:
        with self._changed:
            while (wait := self._settings.may_wait(budget, endpoint, deadline)) != 0:
                self._changed.wait(None if wait == UNTIL_CHANGE else wait)
            return budget.begin(endpoint, self._settings.clock())
