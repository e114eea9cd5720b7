"""The rate limiter with buckets in a shared store: the same decisions as in memory, for any number of processes.

A decision takes one operation in the store. The results of the store are cached. If a cached result proves that a
bucket has too few tokens, the request is refused without asking the store, which would refuse it too. While the store
is unavailable, the configured policy decides, and admitted costs are charged in the store afterwards.
"""

import asyncio
import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from typing import Literal

from api_gateway.errors import ChangeUnconfirmed
from api_gateway.eventloop.tasks import cancel_and_wait, check_cancelled
from api_gateway.limits.cluster_batcher import ClusterScriptBatcher
from api_gateway.limits.deny_cache import DenyCache
from api_gateway.limits.fallback_limiter import FallbackLimiter
from api_gateway.limits.script_batcher import MAX_BATCH, ScriptBatcher
from api_gateway.limits.script_ops import ChargeOp, MultiNodeCharge, PeekOp, RefundOp, SettleOp
from api_gateway.limits.store_refunds import StoreRefunds, invalidation
from api_gateway.models import NANOSECONDS, Charge, Clock, Decision, DecisionSource, LimiterState, Quota
from api_gateway.rate_limiter import (
    NEVER_NS,
    Refund,
    debts_of,
    decision_after,
    joint_decision,
    settled,
    take_each,
)
from api_gateway.storage.evictions import Evictions
from api_gateway.storage.redis_session import WRITE_REFUSALS, Script, StoreError, StoreSession

logger = logging.getLogger(__name__)

Policy = Literal["local_share", "deny", "allow"]

TOKEN_BUCKET_SCRIPT = Script(files("api_gateway.limits").joinpath("token_bucket.lua").read_text())
HEARTBEAT_INTERVAL = 2.0  # seconds between heartbeats
REPORTS_PER_HEARTBEAT = 50  # batches of debts, at most
REPORT_PAUSE = 0.02  # seconds after each
DEAD_AFTER = 3 * HEARTBEAT_INTERVAL
REPLY_NS = NANOSECONDS // 10  # time within which the store executes a refund, if it does not reply
PROCESS_COUNT_MEMORY = 3600.0  # seconds for which a process that has ended is still counted

# Counts processes with a recent heartbeat. KEYS[1]: processes by time of the last heartbeat; ARGV: name, seconds.
HEARTBEAT_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZADD', KEYS[1], string.format('%.3f', now), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.3f', now - ARGV[2]))
redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[2] * 10))
return redis.call('ZCARD', KEYS[1])
"""


class RedisLimiter:
    """Token buckets on a Redis or Valkey server. Implements `RateLimiter`.

    `mode` is the state: `store`, while the store responds in time and accepts writes, else the policy `local_share`
    (each process applies its share of the limits), `deny` or `allow`. The limiter changes its mode itself.
    """

    def __init__(
        self,
        session: StoreSession,
        quotas: Iterable[Quota],
        *,
        policy: Policy,
        deadline: float,
        processes: int,
        bucket_limit: int,
        prefix: str,
        clock: Clock,
        clock_ns: Callable[[], int],
        source: random.Random,
    ) -> None:
        """`deadline` is the time in seconds for an operation of the store, `processes` the minimum number of gateways.

        `bucket_limit` is the maximum number of cached buckets, `prefix` the beginning of every key in the store.
        """
        quotas = list(quotas)
        self.policy: Policy = policy
        self.bucket_limit = bucket_limit
        self.overflowed = 0
        batcher = ClusterScriptBatcher if session.is_divided else ScriptBatcher
        self.batcher: ScriptBatcher | ClusterScriptBatcher = batcher(
            session, TOKEN_BUCKET_SCRIPT, deadline=deadline, clock=clock, source=source, on_error=self._on_store_error
        )
        self.fallback = FallbackLimiter(quotas, bucket_limit=bucket_limit)
        self.fallback.processes = processes
        self._session = session
        self._configured_processes = processes
        self._process_counts: dict[int, float] = {}  # number of live processes to the last time it was observed
        self._evictions = Evictions(0, None)
        self._warning: str | None = None
        self._write_refusal: str | None = None  # while the store refuses writes
        self._name = f"{source.getrandbits(64):016x}"
        self._prefix = prefix
        self.channel = f"{prefix}:refunds"  # of the notifications of refunds
        self._clock = clock
        self.clock_ns = clock_ns
        self.cache = DenyCache(bucket_limit, clock_ns)
        self.refunds = StoreRefunds(self._name, clock_ns)
        self.on_reset: Callable[[str, int], None] = self.forget  # of a reset at another process: key and number
        self.offset_ns = 0  # of the store's clock, which is ahead of this process's by this time
        self._listener: asyncio.Task[None] | None = None
        self._heartbeat_task: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self.store_key = lru_cache(maxsize=65_536)(self._hashed)

    def __repr__(self) -> str:
        return f"<RedisLimiter [{self.mode}, {len(self)} buckets cached]>"

    def __len__(self) -> int:
        """Return the number of entries in this process."""
        return len(self.cache) + len(self.fallback)

    @property
    def mode(self) -> DecisionSource:
        """Source of decisions: `store`, or the policy for outages (on a cluster, of some buckets only)."""
        return "store" if self.batcher.is_whole and self._write_refusal is None else self.policy

    def state(self) -> LimiterState:
        """Return the source of decisions, and the figures of the store."""
        batcher = self.batcher
        return LimiterState(
            decision_source=self.mode,
            gateway_processes=self.fallback.processes,
            calls=batcher.calls,
            operations=batcher.operations,
            failures=batcher.failures,
            last_error=batcher.last_error,
            evicted_keys=self._evictions.keys,
            warning=self._write_refusal or self._warning,
        )

    async def start(self) -> None:
        """Connect to the store. Returns when it has responded, or after `CONNECT_TIMEOUT`."""
        await self.batcher.start()
        self._listener = self._listen()
        self._heartbeat_task = asyncio.create_task(self._send_heartbeats(), name="store heartbeat")

    async def close(self) -> None:
        """Disconnect from the store; pending operations fail."""
        tasks = [task for task in (self._listener, self._heartbeat_task, *self._retiring) if task is not None]
        self._listener = self._heartbeat_task = None
        await cancel_and_wait(*tasks)
        await self.batcher.close()
        await self._session.close()

    # Decisions

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """Refuse from the cache, or decide by the policy while the store is unavailable; None to ask the store."""
        if not self.batcher.is_usable:
            return self.decide_without_store(charges, now_ns)
        if self.cache.is_trusted:
            for charge in charges:
                if self.cache.tat(charge, now_ns) + charge.increment_ns > now_ns + charge.quota.burst_ns:
                    return self._refusal(charges, now_ns)
        return None

    @property
    def is_divided(self) -> bool:
        """True if the store is a cluster: the keys of a script call must be in one slot."""
        return self._session.is_divided

    def decide_async(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        """Have the store decide; call `on_decision` within the deadline, if necessary with the policy's decision."""
        if len(charges) > 1 and self._session.is_divided:
            MultiNodeCharge(self, charges, now_ns, on_decision).submit()
        else:
            self.batcher.submit(ChargeOp(self, charges, now_ns, on_decision))

    def refusal(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """Return the refusal by the cache or, while the store is unavailable, by this process's share, if any."""
        if self.batcher.is_usable:
            return self._refusal(charges, now_ns) if self.cache.is_trusted else None
        if self.policy != "local_share" or all(self.inspect_without_store(one, now_ns).allowed for one in charges):
            return None
        return self.decide_without_store(charges, now_ns)

    async def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]:
        """Return the store's decision on each charge, without charging; while it is unavailable, the policy's."""
        return list(await asyncio.gather(*[self._inspect(charge, now_ns) for charge in charges]))

    async def _inspect(self, charge: Charge, now_ns: int) -> Decision:
        if not self.batcher.is_usable:
            return self.inspect_without_store(charge, now_ns)
        seen: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self.batcher.submit(PeekOp(self, charge, now_ns, seen))
        return await seen

    def settle(
        self, changes: Sequence[Charge], decision: Decision, now_ns: int, settled_to: Sequence[Charge] = ()
    ) -> Decision:
        """Send the settlement to the store without waiting for it; the result is as of the time of the decision."""
        if decision.source != "store":
            known = [self.cache.last_tat(charge) for charge in changes]
            return self.fallback.settle(changes, known, decision, now_ns, settled_to)
        at_ns = decision.at_ns
        debts_ns = []
        for charge, debt_ns in zip(changes, debts_of(decision), strict=True):
            if not charge.increment_ns:  # a limit with a cost of its own
                debts_ns.append(debt_ns)
                continue
            tat_ns = at_ns + debt_ns
            end_ns = self.refunds.recent.end_of(charge.key, at_ns, tat_ns)
            if charge.increment_ns > 0:
                self.batcher.submit(SettleOp(self, charge))
            else:
                made_ns = self.cache.drop(charge.key) + self.offset_ns + REPLY_NS
                refund = Refund(at_ns, tat_ns, made_ns, -charge.increment_ns)
                self.refunds.note(charge.key, refund)
                self.batcher.submit(RefundOp(self, charge, refund, end_ns))
            debts_ns.append(settled(tat_ns, charge.quota.burst_ns, charge.increment_ns, end_ns, at_ns) - at_ns)
        return decision_after(decision, settled_to or changes, debts_ns, at_ns, is_chosen_anew=bool(settled_to))

    async def refill(self, key: str) -> None:
        """Fill a bucket. Raises ChangeUnconfirmed, after which the bucket may or may not be full."""
        try:
            await self._session.client.delete(self.store_key(key))
            await self._session.client.publish(self.channel, invalidation(key))  # for gateways of earlier versions
            await self.publish_reset(key)
        except StoreError as error:
            raise ChangeUnconfirmed(retry_after=1) from error
        self.forget(key)

    async def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Convert a bucket. The store keeps the budget with a bucket, and converts it at its next use."""
        self.change_quota(key, old, new, now_ns)
        if old.burst_ns != new.burst_ns:  # readings under the old quota are invalid in all processes
            with suppress(*StoreError):
                await self._session.client.publish(self.channel, invalidation(key))

    async def publish_reset(self, key: str, resets: int = 0) -> None:
        """Have all other processes forget what they know of a key, and what they admitted without the store."""
        await self._session.client.publish(self.channel, self.refunds.reset_message(key, resets))

    def forget(self, key: str, _resets: int = 0) -> None:
        """Treat a bucket as full, whatever this process knows of it or has admitted without the store."""
        self.cache.forget(key)
        self.fallback.reset(key)

    def change_quota(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Convert this process's entries for a bucket to another quota."""
        self.fallback.change_quota(key, old, new, now_ns)
        if old.burst_ns != new.burst_ns:
            self.cache.drop(key)

    def change_quotas(self, quotas: Iterable[Quota], quota_of: Callable[[str, Quota], Quota], now_ns: int) -> None:
        """Apply other quotas. The store keeps the budget with a bucket, and converts it at its next use."""
        self.fallback.change_quotas(quotas, quota_of, now_ns)
        self.cache.renew(is_trusted=self.cache.is_trusted)  # readings under other budgets are invalid

    def reconfigure(self, policy: Policy, processes: int, bucket_limit: int) -> None:
        """Apply another policy for outages, minimum number of processes and limit of buckets, after a reload."""
        self.policy = policy
        self._configured_processes = processes
        self.fallback.processes = max(processes, *self._process_counts) if self._process_counts else processes
        self.bucket_limit = self.cache.limit = bucket_limit
        self.fallback.limit_buckets(bucket_limit)

    def decide_without_store(
        self, charges: Sequence[Charge], now_ns: int, *, may_be_charged: bool = False
    ) -> Decision:
        """Decide by the policy for outages; the request `may_be_charged` in the store if its response was lost."""
        known = [self.cache.last_tat(charge) for charge in charges]
        if self.policy == "local_share":
            return self.fallback.decide(charges, known, now_ns, may_be_charged=may_be_charged)
        first = charges[0]
        if self.policy == "deny":
            return Decision(first.key, first.quota, False, 0, NANOSECONDS, 0, now_ns, (), "deny")
        self.fallback.record(charges, known, now_ns, may_be_charged=may_be_charged)
        return joint_decision(charges, [(now_ns + charge.increment_ns, 0) for charge in charges], now_ns, "allow")

    def inspect_without_store(self, charge: Charge, now_ns: int) -> Decision:
        """Return the decision of the policy for outages on a charge, with the tokens of this process's share."""
        return self.fallback.inspect(charge, self.cache.last_tat(charge), now_ns, self.policy)

    # Refusals from the cache, and refunds

    def _refusal(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """Refuse by the cached readings of the store; None if all of them together allow the request."""
        taken = take_each([self.cache.tat(charge, now_ns) for charge in charges], charges, now_ns)
        decision = joint_decision(charges, taken, now_ns, "deny_cache")
        if decision.allowed:
            return None
        if decision.wait_ns != NEVER_NS:  # a client that waits for `wait_ns` must then be allowed by every bucket
            for charge in charges:
                cached = self.cache.get(charge)
                if cached is not None:
                    latest_ns = cached.latest_ns(now_ns) + charge.increment_ns - now_ns - charge.quota.burst_ns
                    decision.wait_ns = max(decision.wait_ns, latest_ns)
        return decision

    def _on_refund(self, message: str) -> None:
        """Drop a bucket's readings, also those in replies still to arrive: it has more tokens than they state."""
        reset = self.refunds.read_reset(message)
        if reset is not None:
            self.on_reset(*reset)
        elif (key := self.refunds.read(message)) is not None:
            self.cache.drop(key)

    def _on_subscription(self, is_listening: bool) -> None:  # noqa: FBT001 - a callback's argument
        """Trust cached readings only while notifications of refunds are received."""
        self.cache.renew(is_trusted=is_listening)

    def _on_store_error(self) -> None:
        """Subscribe again after an error on another connection: the subscription may have failed without a sign."""
        self._on_subscription(False)
        if self._listener is not None:
            retiring = asyncio.create_task(cancel_and_wait(self._listener), name="end of store refunds")
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)
            self._listener = self._listen()

    def _listen(self) -> asyncio.Task[None]:
        listening = self._session.listen(self.channel, self._on_refund, self._on_subscription)
        return asyncio.create_task(listening, name="store refunds")

    # Keys

    def _hashed(self, key: str) -> str:
        """Return the key of a bucket in the store: of fixed length, without the client's id, for any slot."""
        return f"{self._prefix}:bucket:{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"

    # Number of processes, and state of the store

    async def _send_heartbeats(self) -> None:
        """Send heartbeats, and read the number of live processes and the evictions, until cancelled."""
        while True:
            try:
                alive = await self._session.client.eval(
                    HEARTBEAT_SCRIPT, 1, f"{self._prefix}:processes", self._name, str(DEAD_AFTER)
                )
            except WRITE_REFUSALS as refusal:  # full (OOM), a replica (READONLY), or unable to save (MISCONF)
                self._note_write_refusal(f"the store refuses writes: {refusal}")
            except StoreError:
                logger.debug("heartbeat failed", exc_info=True)
            else:
                self._note_write_refusal(None)
                self.note_processes(int(alive), self._clock())
                await self._report_debts()
            await self._check_evictions()  # also if the store refuses the heartbeat because it is full
            check_cancelled()
            await asyncio.sleep(HEARTBEAT_INTERVAL)

    async def _report_debts(self) -> None:
        """Charge the store for what was admitted without it, also for clients that send no further requests here.

        In batches, with a pause after each, so that neither the store nor the event loop is blocked by many clients.
        """
        charges = self.fallback.unreported(REPORTS_PER_HEARTBEAT * MAX_BATCH)
        for first in range(0, len(charges), MAX_BATCH):
            if not self.batcher.is_usable:
                return
            now_ns = self.clock_ns()
            for charge in charges[first : first + MAX_BATCH]:
                self.batcher.submit(ChargeOp(self, [charge], now_ns, _ignore))
            await asyncio.sleep(REPORT_PAUSE)

    def _note_write_refusal(self, refusal: str | None) -> None:
        """Set whether the store refuses writes (None: it does not), and log each change."""
        before, self._write_refusal = self._write_refusal, refusal
        if refusal is not None and before is None:
            logger.warning("%s", refusal)
        elif refusal is None and before is not None:
            logger.warning("the store accepts writes again")

    async def _check_evictions(self) -> None:
        """Read the store's evictions, and log once if it may evict buckets. Skipped if an ACL forbids the query."""
        try:
            self._evictions = await self._session.evictions()
        except StoreError:
            logger.debug("query of evictions failed", exc_info=True)
            return
        before, self._warning = self._warning, self._evictions.warning
        if self._warning is not None and before is None:
            logger.warning("%s", self._warning)

    def note_processes(self, alive: int, now: float) -> None:
        """Update the number of processes: the most that were alive at once within an hour, at least as configured."""
        self._process_counts[alive] = now
        self._process_counts = {
            number: at for number, at in self._process_counts.items() if now - at <= PROCESS_COUNT_MEMORY
        }
        self.fallback.processes = max(self._configured_processes, *self._process_counts)


def _ignore(_decision: Decision) -> None:
    """Ignore the decision: the operation only reports a debt."""
