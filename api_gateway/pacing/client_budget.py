"""When the next request of one client may be sent. Decides only: reads no clock, does not wait.

The budget knows the quotas that the server has stated, the requests in flight, and what requests cost. If no other
process spends the tokens of the client, and the costs are known, it is exact: the cost of all requests that the server
has decided or may still decide never exceeds the tokens that the quotas certainly have.
"""

from collections.abc import Mapping
from typing import Final

from api_gateway.pacing.cost_estimates import CostEstimates
from api_gateway.pacing.quota_estimate import QuotaEstimate
from api_gateway.pacing.stated_limits import StatedPolicy, policies_of, remaining_of

UNTIL_CHANGE: Final = -1.0  # the wait for a response to a request in flight
MOST_QUOTAS: Final = 64
_IN_DOUBT_SECONDS = 2.0  # after an aborted request, in which the server may still decide it
_LONGEST_MEASUREMENT = 1.0  # seconds for which a request of unknown cost is alone in flight, or waits for that
_ALLOWANCE = 1e-4  # seconds that are added to a wait, for the rounding of timers


class SentRequest:
    """A request in flight: when it was sent, its expected cost, and what was in flight or followed meanwhile."""

    __slots__ = ("cost", "endpoint", "overlap", "sent", "started")

    def __init__(self, endpoint: str, cost: float, sent: float, overlap: float, started: float) -> None:
        self.endpoint = endpoint
        self.cost = cost
        self.sent = sent
        self.overlap = overlap  # the cost of what was in flight when it was sent
        self.started = started  # the cost of all that had been sent until then, itself included


class ClientBudget:
    """The tokens of one client at one server, shared by all tasks that use it."""

    def __init__(self, costs: CostEstimates | None = None) -> None:
        self.costs = CostEstimates() if costs is None else costs
        self.in_flight = 0
        self.is_known = False  # whether a response has come, so that it is known whether there are limits
        self._quotas: dict[StatedPolicy, QuotaEstimate] = {}
        self._cost_in_flight = 0.0
        self._cost_started = 0.0
        self._in_doubt: list[tuple[float, float]] = []
        self._blocked_until = 0.0
        self._measured: SentRequest | None = None  # the request in flight whose cost is to be learned
        self._last_sent = 0.0

    def __repr__(self) -> str:
        return f"<ClientBudget {self.in_flight} in flight, {list(self._quotas.values())}>"

    def wait(self, endpoint: str, now: float) -> float:
        """Return the seconds until a request may be sent, 0 for now, or UNTIL_CHANGE."""
        if self._blocked_until > now:
            return self._blocked_until - now
        if self.in_flight and not self.is_known:
            return UNTIL_CHANGE
        if self.in_flight and self._quotas and (self._measured is not None or self.costs.is_doubtful(endpoint)):
            alone = self._last_sent + _LONGEST_MEASUREMENT - now
            if alone > 0:
                return alone
        cost, longest = self.costs.expected(endpoint), 0.0
        for quota in self._quotas.values():
            quota.advance(now, self._undecided(now))
            longest = max(longest, quota.wait(cost))
        return longest + _ALLOWANCE if longest > 0 else 0.0

    def begin(self, endpoint: str, now: float) -> SentRequest:
        """Count a request that is sent now."""
        cost = self.costs.expected(endpoint)
        overlap = self._undecided(now)
        self._cost_in_flight += cost
        self._cost_started += cost
        self.in_flight += 1
        for quota in self._quotas.values():
            quota.advance(now, overlap)
            quota.charge(cost)
        ticket = SentRequest(endpoint, cost, now, overlap, self._cost_started)
        if self.in_flight == 1 and self._quotas and self.costs.is_doubtful(endpoint):
            self._measured = ticket
        self._last_sent = now
        return ticket

    def abort(self, ticket: SentRequest, now: float) -> None:
        """Count a request as ended without a response. Its tokens are spent, or will be soon."""
        self._end(ticket)
        self._in_doubt.append((now + _IN_DOUBT_SECONDS, ticket.cost))

    def finish(self, ticket: SentRequest, headers: Mapping[str, str], now: float) -> None:
        """Learn from the response to an admitted request."""
        self._take(ticket, headers, now, is_refused=False)

    def refuse(
        self, ticket: SentRequest, headers: Mapping[str, str], now: float, *, retry_after: float, cost: float | None
    ) -> None:
        """Learn from a 429, which has cost nothing: nothing is sent for `retry_after` seconds.

        `cost` is what the response says that the request costs.
        """
        if cost is None:
            self.costs.doubt(ticket.endpoint)
        else:
            self.costs.set(ticket.endpoint, cost)
        self._take(ticket, headers, now, is_refused=True)
        self._blocked_until = max(self._blocked_until, now + retry_after)

    def _undecided(self, now: float) -> float:
        """Return the cost of the requests that the server may not have decided yet."""
        self._in_doubt = [(until, one) for until, one in self._in_doubt if until > now]
        return self._cost_in_flight + sum(one for _, one in self._in_doubt)

    def _end(self, ticket: SentRequest) -> None:
        self.in_flight -= 1
        if self._measured is ticket:
            self._measured = None
        self._cost_in_flight = self._cost_in_flight - ticket.cost if self.in_flight else 0.0

    def _take(self, ticket: SentRequest, headers: Mapping[str, str], now: float, *, is_refused: bool) -> None:
        self._end(ticket)
        self.is_known = True
        uncounted = ticket.overlap + (self._cost_started - ticket.started)
        self._follow(policies_of(headers), now, self._cost_in_flight + (0.0 if is_refused else ticket.cost))
        if is_refused:  # what it states is the time to wait, not what is left for cheaper requests
            return
        for stated in remaining_of(headers):
            quota = next((one for policy, one in self._quotas.items() if policy.name == stated.name), None)
            if quota is None:
                continue
            quota.advance(now, self._undecided(now))
            meanwhile = quota.refilled_in(now - ticket.sent)
            if not uncounted:
                before = quota.low + ticket.cost - meanwhile
                least = before - stated.tokens - 1 if quota.is_stated else 0.0
                self.costs.learn(ticket.endpoint, least, quota.high - stated.tokens)
            if quota.take_statement(stated, uncounted, ticket.sent, now) and uncounted:
                self.costs.doubt(ticket.endpoint)

    def _follow(self, policies: tuple[StatedPolicy, ...], now: float, spent: float) -> None:
        """Keep estimates of the stated policies. One whose figures have changed is another policy.

        `spent` is the cost of the requests that were sent before the quota was first stated.
        """
        for policy in policies:
            if policy in self._quotas:
                continue
            for old in [one for one in self._quotas if one.name == policy.name]:
                del self._quotas[old]
            if len(self._quotas) < MOST_QUOTAS:
                quota = self._quotas[policy] = QuotaEstimate(policy, now)
                quota.charge(spent)
