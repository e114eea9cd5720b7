"""Counts and logs requests that claim an id without proving it, and those that `identity.mode: observe` admits."""

import logging
from collections.abc import Callable

from api_gateway.errors import GatewayError
from api_gateway.metrics import Recorder
from api_gateway.models import Charge, Client, Quota
from api_gateway.proxy.admission import RequestPlan
from api_gateway.rate_limiter import MemoryLimiter

logger = logging.getLogger(__name__)

OBSERVED_LINES = Quota.per_second("log lines of observed requests", 0.2, 10)


class IdentityObserver:
    """The callbacks of the stages that identify clients."""

    def __init__(self, recorder: Recorder, clock_ns: Callable[[], int], *, is_enforced: bool) -> None:
        self._recorder = recorder
        self._clock_ns = clock_ns
        self._is_enforced = is_enforced
        self._lines = MemoryLimiter([OBSERVED_LINES])
        self._unlogged = 0

    def __repr__(self) -> str:
        return f"<IdentityObserver [{'enforcing' if self._is_enforced else 'observing'}]>"

    def on_bare(self, client: Client) -> None:
        """Count a request that claims the id of a client with keys, or that is verified only, without a proof."""
        is_refused = client.is_verified_only and self._is_enforced
        self._recorder.bare_client_ids["refused" if is_refused else "admitted"] += 1
        self._recorder.bare_by_client.add(client.key)

    def on_observed(self, plan: RequestPlan, error: GatewayError) -> None:
        """Count a request that would be refused, and log it, within a limit on log lines."""
        self._recorder.identity_would_refuse[error.reason] += 1
        charge = Charge("", OBSERVED_LINES, OBSERVED_LINES.cost_ns(1))
        if not self._lines.decide([charge], self._clock_ns()).allowed:
            self._unlogged += 1
            return
        unlogged, self._unlogged = self._unlogged, 0
        logger.warning(
            "identity.mode observe: a request from %s would be refused: %s: %s%s",
            plan.facts.client_address,
            error.reason.value,
            error.detail,
            f" ({unlogged} such requests not logged since the last line)" if unlogged else "",
        )
