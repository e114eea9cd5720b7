"""Builds what calendar quotas need: their counters and the file that keeps them, warnings, and the webhook."""

import hashlib
import logging
import math
import random
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from api_gateway.clients.api_keys import without_keys
from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.limits.limit import LIMIT_PREFIX, Limit
from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.period_store import PeriodJournal, PeriodStore
from api_gateway.limits.quota_book import LocalBook, QuotaBook, StoreBook
from api_gateway.limits.quota_limiter import QuotaLimiter
from api_gateway.limits.quota_state import MICROSECONDS, UNITS_PER_TOKEN, PeriodQuota, QuotaWarning
from api_gateway.metrics import Recorder
from api_gateway.rate_limiter import MemoryLimiter, RateLimiter
from api_gateway.settings.webhook import WebhookSection, signing_key
from api_gateway.system.clocks import Clocks
from api_gateway.system.state_folder import own_folder
from api_gateway.transport.webhook_events import WaitingEvents, WebhookEvent
from api_gateway.transport.webhooks import Webhook

if TYPE_CHECKING:
    from api_gateway.limits.store_quota_limiter import StoreQuotaLimiter

logger = logging.getLogger(__name__)


class QuotaKeeping:
    """The counters of a gateway's quotas, which outlive reloads. Not used until a configuration has a quota.

    Counters are in this process and its file, or in the store of the buckets. States: closed; open, from the first
    `open` with a quota in this process until `close`.
    """

    def __init__(self, config: GatewayConfig, recorder: Recorder, clocks: Clocks) -> None:
        self._recorder = recorder
        self._clocks = clocks
        self._is_open = False
        self._in_store: StoreQuotaLimiter | None = None
        self._webhook: Webhook | None = None
        self._webhook_of: WebhookSection | None = None
        self._events = WaitingEvents(own_folder(config.state_dir))
        self.counters = PeriodCounters(config.store.max_buckets)
        self._journal = PeriodJournal(
            self.counters,
            PeriodStore(own_folder(config.state_dir)),
            clock=clocks.monotonic,
            wall_clock=clocks.wall,
        )

    def __repr__(self) -> str:
        return f"<QuotaKeeping [{'open' if self._is_open else 'closed'}, {self.counters!r}]>"

    @property
    def error(self) -> str | None:
        """Why quotas are not stored, None if they are."""
        return self._journal.error

    @property
    def events_error(self) -> str | None:
        """Why events of the webhook are not stored, None if they are."""
        return self._events.error

    def book(self) -> QuotaBook:
        """Return where operators read and change counters."""
        if self._in_store is not None:
            return StoreBook(self._in_store)
        return LocalBook(self.counters, self._journal, lambda: math.ceil(self._clocks.wall() * MICROSECONDS))

    async def open(self, config: GatewayConfig) -> None:
        """Read the counters if the configuration has quotas, kept in this process. Idempotent. Raises StartupError."""
        has_quotas = any(section.period is not None for section in config.limits)
        if self._is_open or not has_quotas or config.store.is_shared:
            return
        try:
            await self._journal.start()
        except OSError as error:
            raise StartupError(f"state_dir: the file of the quotas cannot be opened: {error}") from error
        self._is_open = True

    async def close(self) -> None:
        """Store what was charged, and the events that wait; close the files."""
        if self._webhook is not None:
            await self._webhook.close()
        await self._events.close()
        await self._journal.close()

    def limiter(self, buckets: RateLimiter, limits: Iterable[Limit], config: GatewayConfig) -> RateLimiter:
        """Return the limiter of a configuration: `buckets` alone, or with counters if one of its limits is a quota."""
        self.counters.limit = config.store.max_buckets
        for section in config.limits:
            if section.warn_at:
                self._recorder.quota_warnings.setdefault(section.name, 0)
        if not any(isinstance(quota, PeriodQuota) for limit in limits for quota in limit.all_quotas):
            return buckets
        if isinstance(buckets, MemoryLimiter):
            return QuotaLimiter(buckets, self.counters, wall_clock=self._clocks.wall, on_warned=self._on_warned)
        if self._in_store is None:  # kept, because it has what is to be charged in the store
            self._in_store = import_module("api_gateway.limits.store_quota_limiter").StoreQuotaLimiter(
                buckets, prefix=config.store.prefix, wall_clock=self._clocks.wall, on_warned=self._on_warned
            )
        return self._in_store

    def follow_webhook(self, section: WebhookSection) -> None:
        """Deliver events to the webhook of the configuration from now on; those that wait, too."""
        if section == self._webhook_of:
            return
        if self._webhook is not None:
            self._webhook.stop()
        self._webhook, self._webhook_of = None, section
        if section.url is not None and section.secret is not None:
            self._webhook = Webhook(
                section.url,
                signing_key(section.secret.get_secret_value()),
                self._events,
                wall_clock=self._clocks.wall,
                source=random.Random(),  # noqa: S311 - spreads attempts, guards nothing
            )
            self._webhook.start()

    def _on_warned(self, warned: Sequence[QuotaWarning]) -> None:
        for one in warned:
            if not one.key.startswith(LIMIT_PREFIX):  # a candidate's
                continue
            holder = without_keys(one.key.removeprefix(f"{LIMIT_PREFIX}{one.quota.policy}:"))
            tokens, allowance = one.used / UNITS_PER_TOKEN, one.allowance // UNITS_PER_TOKEN
            self._recorder.quota_warnings[one.quota.policy] += 1
            logger.warning(
                "quota %s: %s has used %g of %d tokens, %g %%",
                one.quota.policy,
                holder,
                tokens,
                allowance,
                one.share * 100,
            )
            if self._webhook is not None:
                self._events.add(_event(one, holder, self._clocks.wall()))


def _event(warned: QuotaWarning, holder: str, now: float) -> WebhookEvent:
    """Return the event of a warning. Its id depends on what it is about alone, so that it is never a new one.

    A share can be reached again in the same period after a reset, or if the allowance changes: this is another event.
    """
    about = f"{warned.key} {warned.period.start} {warned.share} {warned.allowance} {warned.resets}"
    return WebhookEvent(
        f"quota_{hashlib.blake2b(about.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}",
        "quota.warning",
        now,
        {
            "limit": warned.quota.policy,
            "holder": holder,
            "share": warned.share,
            "used": warned.used / UNITS_PER_TOKEN,
            "quota": warned.allowance / UNITS_PER_TOKEN,
            "period_start": warned.period.start,
            "period_end": warned.period.end,
        },
    )
