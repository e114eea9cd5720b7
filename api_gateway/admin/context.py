"""The context of the operator endpoints: the live objects that they read and change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from api_gateway.admin.audit_log import AuditLog
from api_gateway.admin.breaker_overrides import BreakerOverrides
from api_gateway.admin.feed import Feed
from api_gateway.admin.health_cache import HealthCache
from api_gateway.clients.registry import ClientRegistry
from api_gateway.config import GatewayConfig
from api_gateway.eventloop.late_imports import late_import
from api_gateway.limits.concurrency import LocalSlots
from api_gateway.limits.quota_book import QuotaBook
from api_gateway.observability.decision_numbers import DecisionNumbers
from api_gateway.observability.request_history import RequestHistory
from api_gateway.rate_limiter import RateLimiter
from api_gateway.reporting.worker_channel import Aggregator
from api_gateway.system.clocks import Clocks
from api_gateway.usage.ledger import UsageLedger

if TYPE_CHECKING:
    from api_gateway.admin.explainer import Explainer
    from api_gateway.reporting.upstream_schema import HealthView


class Lifecycle(StrEnum):
    """Phases of the gateway, in this order; none is entered twice."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(slots=True)
class AdminContext:
    """The objects that the operator endpoints read and change.

    A reload replaces `make_explainer`, `route_names` (of all routes), `accepts_keys` (API keys are a source of
    identities) and `configuration`.
    """

    version: str
    limiter: RateLimiter
    clients: ClientRegistry
    aggregator: Aggregator
    clocks: Clocks
    make_explainer: Callable[[], "Explainer"]
    overrides: BreakerOverrides
    audit: AuditLog
    route_names: Sequence[str]
    accepts_keys: bool
    quotas: Callable[[], QuotaBook]
    configuration: GatewayConfig
    numbers: DecisionNumbers
    history: RequestHistory
    slots: LocalSlots
    usage: UsageLedger | None = None
    lifecycle: Lifecycle = Lifecycle.STARTING
    health: HealthCache = field(init=False)
    feed: Feed = field(init=False)

    def __post_init__(self) -> None:
        self.health = HealthCache(self._health_view, self.clocks.monotonic)
        self.feed = Feed(self.aggregator, self.clocks, self.overrides)

    @property
    def explainer(self) -> "Explainer":
        """The explainer of the configuration in force."""
        return self.make_explainer()

    async def _health_view(self) -> "HealthView":
        module = await late_import("api_gateway.admin.health_view")
        view: HealthView = await module.health_view(self.aggregator, self.clocks, self.version)
        return view
