"""The rate limiter whose buckets lie in a shared store: the same decisions as in memory, for any number of processes.

The store is asked once for a decision, and what it says of a bucket is also remembered: a bucket that was so empty
that it must still be is refused here, without asking, and the answer is what the store's would have been. While the
store cannot be used, decisions are made here by the policy that is configured, and the store is told afterwards.
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

from api_gateway.errors import StoreUnavailable
from api_gateway.eventloop.tasks import cancel_and_wait, check_cancelled
from api_gateway.limits.cluster_batcher import ClusterScriptBatcher
from api_gateway.limits.deny_cache import DenyCache
from api_gateway.limits.fallback_limiter import FallbackLimiter
from api_gateway.limits.script_batcher import ScriptBatcher
from api_gateway.limits.script_ops import ChargeOp, MultiNodeCharge, PeekOp, SettleOp, refund_message
from api_gateway.models import NANOSECONDS, Charge, Clock, Decision, DecisionSource, LimiterState, Quota
from api_gateway.rate_limiter import (
    Refunds,
    decision_after,
    decision_of,
    joint_decision,
    settled,
    take_each,
)
from api_gateway.storage.redis_session import REFUSALS, Evictions, Script, StoreError, StoreSession

logger = logging.getLogger(__name__)

Policy = Literal["local_share", "deny", "allow"]

TOKEN_BUCKET_SCRIPT = Script(files("api_gateway.limits").joinpath("token_bucket.lua").read_text())
HEARTBEAT_INTERVAL = 2.0  # seconds between heartbeats
DEAD_AFTER = 3 * HEARTBEAT_INTERVAL
MESSAGE_NS = NANOSECONDS // 10  # a refund is heard of within this time
REFUNDS_KEPT_NS = 600 * NANOSECONDS  # longer than a request lasts between its charge and its settlement, as a rule
MEMORY_OF_PROCESSES = 3600.0  # seconds for which a process that has gone is still counted

# Counts who has been heard of lately. KEYS[1] the processes by the time of their last beat; ARGV: name, seconds.
HEARTBEAT_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZADD', KEYS[1], string.format('%.3f', now), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.3f', now - ARGV[2]))
redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[2] * 10))
return redis.call('ZCARD', KEYS[1])
"""


class RedisLimiter:
    """Token buckets in a Redis or Valkey; see `RateLimiter`."""

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
        """Ask within `deadline` seconds. `processes` is how many gateways there are at least.

        `bucket_limit` bounds what is remembered here, `prefix` begins every key in the store.
        """
        quotas = list(quotas)
        self.policy: Policy = policy
        self.bucket_limit = bucket_limit
        self.overflowed = 0
        asker = ClusterScriptBatcher if session.is_divided else ScriptBatcher
        self.dispatcher: ScriptBatcher | ClusterScriptBatcher = asker(
            session, TOKEN_BUCKET_SCRIPT, deadline=deadline, clock=clock, source=source, on_error=self._on_trouble
        )
        self.share = FallbackLimiter(quotas, bucket_limit=bucket_limit)
        self.share.processes = processes
        self._session = session
        self._configured_processes = processes
        self._seen: dict[int, float] = {}  # numbers of processes, and when each was last seen
        self._evictions = Evictions(0, None)
        self._warning: str | None = None
        self._write_refusal: str | None = None  # of writes, while the store refuses them
        self._name = f"{source.getrandbits(64):016x}"
        self._prefix = prefix
        self.refunds = f"{prefix}:refunds"  # the channel on which they are told
        self._clock = clock
        self.clock_ns = clock_ns
        self.cache = DenyCache(bucket_limit, clock_ns)
        self._given_back = Refunds()  # by the store's clock, which is ahead of ours by
        self.offset_ns = 0
        self._refunds_turn_ns = 0
        self._listener: asyncio.Task[None] | None = None
        self._heart: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self.store_key = lru_cache(maxsize=65_536)(self._hashed)

    def __repr__(self) -> str:
        return f"<RedisLimiter [{self.mode}, {len(self)} buckets remembered]>"

    def __len__(self) -> int:
        """Return how many buckets are remembered in this process."""
        return len(self.cache) + len(self.share)

    @property
    def mode(self) -> DecisionSource:
        """What decisions (on a cluster: some of them) rest on: the store, or the policy for when it cannot be used."""
        return "store" if self.dispatcher.is_whole and self._write_refusal is None else self.policy

    def state(self) -> LimiterState:
        """See `RateLimiter`."""
        dispatcher = self.dispatcher
        return LimiterState(
            decision_source=self.mode,
            gateway_processes=self.share.processes,
            calls=dispatcher.batches,
            operations=dispatcher.questions,
            failures=dispatcher.failures,
            last_error=dispatcher.last_error,
            evicted_keys=self._evictions.keys,
            warning=self._write_refusal or self._warning,
        )

    async def start(self) -> None:
        """Connect to the store. Returns once it has answered, or has had its time to."""
        await self.dispatcher.start()
        self._listener = self._listen()
        self._heart = asyncio.create_task(self._beat(), name="store heartbeat")

    async def close(self) -> None:
        """Disconnect."""
        tasks = [task for task in (self._listener, self._heart, *self._retiring) if task is not None]
        self._listener = self._heart = None
        await cancel_and_wait(*tasks)
        await self.dispatcher.close()
        await self._session.close()

    # Decisions

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """See `RateLimiter`."""
        if not self.dispatcher.is_usable:
            return self.without_store(charges, now_ns)
        if self.cache.is_trusted:
            for charge in charges:
                if self.cache.tat(charge, now_ns) + charge.increment_ns > now_ns + charge.quota.burst_ns:
                    return self._refusal(charges, now_ns)
        return None

    def decide_async(self, charges: Sequence[Charge], now_ns: int, answer: Callable[[Decision], None]) -> None:
        """See `RateLimiter`."""
        if len(charges) > 1 and self._session.is_divided:
            MultiNodeCharge(self, charges, now_ns, answer).submit()
        else:
            self.dispatcher.submit(ChargeOp(self, charges, now_ns, answer))

    async def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]:
        """See `RateLimiter`."""
        return list(await asyncio.gather(*[self._inspect(charge, now_ns) for charge in charges]))

    async def _inspect(self, charge: Charge, now_ns: int) -> Decision:
        if not self.dispatcher.is_usable:
            return self.share.inspect(charge, self.cache.last_tat(charge), now_ns)
        seen: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self.dispatcher.submit(PeekOp(self, charge, now_ns, seen))
        return await seen

    def settle(self, charges: Sequence[Charge], decision: Decision, now_ns: int) -> Decision:
        """See `RateLimiter`. The store is told, and not waited for; what is returned is as of the decision."""
        if decision.source != "store":
            return self.share.settle(charges, decision, now_ns)
        at_ns = decision.at_ns
        debts_ns = []
        for charge, debt_ns in zip(charges, (decision.reset_ns, *decision.others_ns), strict=True):
            tat_ns = at_ns + debt_ns
            charged_ns = tat_ns - self._given_back.since(charge.key, at_ns)
            self.dispatcher.submit(SettleOp(self, charge, charged_ns))
            debts_ns.append(settled(tat_ns, charge.quota.burst_ns, charge.increment_ns, charged_ns, at_ns) - at_ns)
            if charge.increment_ns < 0:
                self._note_refund(charge.key, -charge.increment_ns)
        return decision_after(decision, debts_ns, at_ns)

    async def refill(self, key: str) -> None:
        """See `RateLimiter`. Raises StoreUnavailable; the bucket may or may not be full then."""
        try:
            await self._session.client.delete(self.store_key(key))
            await self._tell_others(key)
        except StoreError as error:
            raise StoreUnavailable("The store did not confirm that the bucket was refilled.", retry_after=1) from error
        self._note_refund(key, 0)
        self.share.reset(key)

    async def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """See `RateLimiter`. In the store a bucket carries its budget, and moves when it is next used."""
        self.change_quota(key, old, new, now_ns)
        if old.burst_ns != new.burst_ns:  # others have to forget what the store said of it under the old one
            with suppress(*StoreError):
                await self._tell_others(key)

    async def _tell_others(self, key: str) -> None:
        """Have everybody forget what the store said of a bucket."""
        await self._session.client.publish(self.refunds, refund_message(key, 0))

    def change_quota(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Take what this process knows of a bucket from one quota to another."""
        self.share.change_quota(key, old, new, now_ns)
        if old.burst_ns != new.burst_ns:
            self._note_refund(key, 0)

    def requote(self, quotas: Iterable[Quota], quota_of: Callable[[str, Quota], Quota], now_ns: int) -> None:
        """Hold buckets of other quotas. In the store a bucket carries its budget, and is converted when it is used."""
        self.share.requote(quotas, quota_of, now_ns)
        self.cache.renew(is_trusted=self.cache.is_trusted)  # what the store said was about other budgets

    def change_terms(self, policy: Policy, processes: int, bucket_limit: int) -> None:
        """Take another policy for when the store is unavailable, and other bounds."""
        self.policy = policy
        self._configured_processes = processes
        self.share.processes = max(processes, *self._seen) if self._seen else processes
        self.bucket_limit = self.cache.limit = bucket_limit
        self.share.limit_buckets(bucket_limit)

    def without_store(self, charges: Sequence[Charge], now_ns: int, *, may_be_charged: bool = False) -> Decision:
        """Decide by the policy for when the store cannot be used, though it `may_be_charged` there."""
        if self.policy == "local_share":
            known = [self.cache.last_tat(charge) for charge in charges]
            return self.share.decide(charges, known, now_ns, may_be_charged=may_be_charged)
        first = charges[0]
        if self.policy == "deny":
            return Decision(first.key, first.quota, False, 0, NANOSECONDS, 0, now_ns, (), "deny")
        if not may_be_charged:
            self.share.record_unsynced(charges, now_ns)
        others_ns = tuple(charge.increment_ns for charge in charges[1:])
        return decision_of(first, now_ns + first.increment_ns, 0, now_ns, "allow", others_ns)

    # Refusals without asking, and refunds

    def _refusal(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """Refuse by the cached readings of the store; None if they would not refuse after all."""
        taken = take_each([self.cache.tat(charge, now_ns) for charge in charges], charges, now_ns)
        decision = joint_decision(charges, taken, now_ns, "deny_cache")
        if decision.allowed:
            return None
        cached = self.cache.get(next(charge for charge in charges if charge.key == decision.key))
        if cached is not None and decision.wait_ns > 0:  # a client that waits as long as it was told must get through
            decision.wait_ns += cached.latest_ns(now_ns) - cached.earliest_ns(now_ns)
        return decision

    def _on_refund(self, message: str) -> None:
        """Hear of a refund; see `refund_message`."""
        given, _, key = message.partition(" ")
        if key and given.isdecimal():
            self._note_refund(key, int(given))

    def _note_refund(self, key: str, given_ns: int) -> None:
        """Take note that a bucket holds more than the store said, and may say still in replies under way.

        What was charged before lies so much nearer: see `Refunds`. On the store's clock that was now, or later by as
        much as the message took; who is charged meanwhile is given back less.
        """
        now_ns = self.cache.drop(key)
        if given_ns:
            if self._refunds_turn_ns <= now_ns:
                self._given_back.turn()
                self._refunds_turn_ns = now_ns + REFUNDS_KEPT_NS
            self._given_back.note(key, now_ns + self.offset_ns + MESSAGE_NS, given_ns)

    def _on_listening(self, is_listening: bool) -> None:  # noqa: FBT001 - a callback's argument
        """Trust cached readings only while refunds are heard of."""
        self.cache.renew(is_trusted=is_listening)

    def _on_trouble(self) -> None:
        """Listen anew: what broke one connection may have silenced the other."""
        self._on_listening(False)
        if self._listener is not None:
            retiring = asyncio.create_task(cancel_and_wait(self._listener), name="end of store refunds")
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)
            self._listener = self._listen()

    def _listen(self) -> asyncio.Task[None]:
        listening = self._session.listen(self.refunds, self._on_refund, self._on_listening)
        return asyncio.create_task(listening, name="store refunds")

    # Keys

    def _hashed(self, key: str) -> str:
        """Return the name of a bucket in the store: of one length, telling nothing, and free to lie in any slot."""
        return f"{self._prefix}:bucket:{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"

    # How many there are

    async def _beat(self) -> None:
        """Tell that this process lives, and learn how many do."""
        while True:
            try:
                alive = await self._session.client.eval(
                    HEARTBEAT_SCRIPT, 1, f"{self._prefix}:processes", self._name, str(DEAD_AFTER)
                )
            except REFUSALS as refusal:  # it is full (OOM), a replica (READONLY), or cannot save (MISCONF)
                self._note_write_refusal(f"the store refuses writes: {refusal}")
            except StoreError:
                logger.debug("no heartbeat", exc_info=True)
            else:
                self._note_write_refusal(None)
                self.note_processes(int(alive), self._clock())
            await self._look_for_evictions()  # also of a store so full that it refuses the heartbeat
            check_cancelled()
            await asyncio.sleep(HEARTBEAT_INTERVAL)

    def _note_write_refusal(self, refusal: str | None) -> None:
        """Note that the store refuses writes, or takes them again, and log each once."""
        before, self._write_refusal = self._write_refusal, refusal
        if refusal is not None and before is None:
            logger.warning("%s", refusal)
        elif refusal is None and before is not None:
            logger.warning("the store takes writes again")

    async def _look_for_evictions(self) -> None:
        """Learn whether the store forgets buckets, and say so once. Who may not ask (by an ACL) does without."""
        try:
            self._evictions = await self._session.evictions()
        except StoreError:
            logger.debug("evictions are not known", exc_info=True)
            return
        before, self._warning = self._warning, _warning(self._evictions.policy)
        if self._warning is not None and before is None:
            logger.warning("%s", self._warning)

    def note_processes(self, alive: int, now: float) -> None:
        """Count gateways: the most that were alive at once within the last hour, and no fewer than configured."""
        self._seen[alive] = now
        self._seen = {number: at for number, at in self._seen.items() if now - at <= MEMORY_OF_PROCESSES}
        self.share.processes = max(self._configured_processes, *self._seen)


def _warning(policy: str | None) -> str | None:
    if policy is None or policy == "volatile-ttl":  # which throws out first what is fullest, and so forgives least
        return None
    return f"the store has maxmemory-policy {policy}: a bucket it evicts is full again; it should be noeviction"
