"""The slots of concurrency limits that all workers and machines with one store share.

Each worker counts its own requests, and has a lease for each key in the store, with their number. The script call that
charges a request also admits it: if the sum of all leases is below the limit, the worker's lease is incremented. It is
decremented when the request ends. So the sum is never above a limit while the store responds. A worker renews its
leases every `RENEWAL_INTERVAL` seconds; a lease ends `LEASE` seconds after its last renewal. Until then the requests
of a killed worker count.

On a cluster a key is on one server, and the charges of a request are on others, see `multi_node_claims`.

If it is not known whether an operation was executed, the worker raises the epoch of the lease, which makes all earlier
operations void, and sets the number of its requests anew. That is repeated until the store has confirmed it.

States of a lease (by key): in force, if the key is in none of the sets; `unwritten`, from `mark` until the operation
that sets it is written, during which requests that end are not reported; `unconfirmed`, from `mark` until the store
confirms it.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import count
from math import ceil
from typing import Literal

from api_gateway.eventloop.tasks import cancel_and_wait, check_cancelled
from api_gateway.limits.concurrency import LocalSlots, SlottedCharges, SlotUse, refusal_of_slots, slot_share
from api_gateway.limits.concurrency_ops import LEASE, ClaimOp, HeldOp, HoldOp, RenewOp, ReturnOp
from api_gateway.limits.multi_node_claims import MultiNodeClaim
from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.limits.script_batcher import MAX_BATCH, ScriptOp
from api_gateway.limits.store_quota_limiter import StoreQuotaLimiter
from api_gateway.models import ConcurrencySlot, Decision, DecisionSource, Exchange
from api_gateway.rate_limiter import RateLimiter, joint_refusal

RENEWAL_INTERVAL = 2.0  # seconds
RENEWAL_PAUSE = 0.01  # seconds after each batch


class LeasedSlots(LocalSlots):
    """The slots of this worker, with leases in the store; see the module."""

    def __init__(self, in_flight: Counter[str], buckets: RedisLimiter, *, worker: str, prefix: str) -> None:
        """`worker` is the name of this one, in hexadecimal digits; `prefix` begins every key in the store."""
        super().__init__(in_flight)
        self.worker = worker
        self.epochs: dict[str, int] = {}  # used since the last renewal
        self._older: dict[str, int] = {}  # used before it, and not since
        self.unwritten: set[str] = set()
        self.unconfirmed: dict[str, int] = {}  # and at which heartbeat the epoch began
        self.under_way: Counter[str] = Counter()
        self._buckets = buckets
        self._prefix = prefix
        self._next_epoch = count(1).__next__
        self._beats = 0
        self._task: asyncio.Task[None] | None = None
        self.lease_key = lru_cache(maxsize=65_536)(self._hashed)

    def __repr__(self) -> str:
        return f"<LeasedSlots [{len(self.counters)} keys, {len(self.unconfirmed)} leases unconfirmed]>"

    async def start(self) -> None:
        """Renew leases until `close`."""
        self._task = asyncio.create_task(self._renew(), name="leases of concurrency limits")

    async def close(self) -> None:
        """Stop renewing."""
        task, self._task = self._task, None
        if task is not None:
            await cancel_and_wait(task)

    # Requests

    def refusal(self, slots: Sequence[ConcurrencySlot], now_ns: int) -> Decision | None:
        """Return the refusal of a request if this worker's own requests fill a limit; None if they do not.

        While the store is unavailable, also if they fill this worker's share.
        """
        refused = super().refusal(slots, now_ns)
        if refused is None and not self._buckets.batcher.is_usable and self.is_share_used(slots):
            refused = self._refusal_by_share(slots, now_ns)
        return refused

    def take(self, exchange: Exchange, slots: tuple[ConcurrencySlot, ...]) -> None:
        """Let an exchange hold slots that the store does not know of: it was admitted without it."""
        super().take(exchange, slots)
        for slot in slots:
            self.mark(slot.key)

    def ask(
        self,
        exchange: Exchange,
        limiter: RateLimiter,
        charges: SlottedCharges,
        now_ns: int,
        on_decision: Callable[[Decision], None],
        *,
        is_candidate: bool = False,
    ) -> None:
        """Have the store charge a request and count it, and let the exchange hold the slots if that is allowed."""
        if self._buckets.is_divided:
            charge = partial(limiter.decide_async, charges, now_ns)
            refusal = partial(limiter.refusal, charges, now_ns)
            claim = MultiNodeClaim(
                self, exchange, charges.slots, charge, refusal, now_ns, on_decision, is_candidate=is_candidate
            )
            claim.submit()
            return
        assert isinstance(limiter, RedisLimiter | StoreQuotaLimiter)  # noqa: S101 - of the same store
        op = ClaimOp(
            self,
            limiter,
            charges.slots,
            charges,
            now_ns,
            partial(self._on_decision, exchange, charges.slots, on_decision),
            partial(self._on_full, charges, limiter, now_ns, on_decision),
        )
        self._buckets.batcher.submit(op)

    def _on_decision(
        self,
        exchange: Exchange,
        slots: tuple[ConcurrencySlot, ...],
        on_decision: Callable[[Decision], None],
        decision: Decision,
    ) -> None:
        if decision.allowed:
            if decision.source == "store":
                self.take_confirmed(exchange, slots)
            else:
                self.take(exchange, slots)
            if exchange.finished:  # while the store was asked
                self.release(exchange)
        on_decision(decision)

    def _on_full(
        self,
        charges: SlottedCharges,
        limiter: RateLimiter,
        now_ns: int,
        on_decision: Callable[[Decision], None],
        totals: Sequence[int] | None,
        by_tokens: Decision | None,
    ) -> None:
        if totals is None:
            refused, by_tokens = self._refusal_by_share(charges.slots, now_ns), limiter.refusal(charges, now_ns)
        else:
            uses = [SlotUse(slot, total) for slot, total in zip(charges.slots, totals, strict=True)]
            refused = self.refuse(uses, "store", now_ns)
        on_decision(joint_refusal(refused, by_tokens))

    def take_confirmed(self, exchange: Exchange, slots: tuple[ConcurrencySlot, ...]) -> None:
        """Let an exchange hold slots that the store has counted."""
        super().take(exchange, slots)

    def refuse(self, uses: Sequence[SlotUse], source: DecisionSource, now_ns: int) -> Decision:
        """Return the refusal of a request, one of whose slots is not free."""
        refused = refusal_of_slots(uses, self, now_ns)
        refused.source = source
        if source == "local_share":
            refused.processes = self._buckets.fallback.processes
        if source == "store":
            refused.at_ns = now_ns + self._buckets.offset_ns
        return refused

    def _return(self, slots: tuple[ConcurrencySlot, ...], seconds: float | None) -> None:
        super()._return(slots, seconds)
        for slot in slots:
            if slot.key in self.unwritten:
                continue
            if self._buckets.batcher.is_usable:
                self._buckets.batcher.submit(ReturnOp(self, slot.key))
            else:
                self.mark(slot.key)

    def is_share_used(self, slots: Sequence[ConcurrencySlot]) -> bool:
        """See `concurrency_ops.LeasePort`."""
        return self._buckets.policy == "local_share" and any(
            self.in_flight(slot.key) >= self._share(slot) for slot in slots
        )

    def _share(self, slot: ConcurrencySlot) -> int:
        """Return how many requests this worker may have in flight while the store is unavailable."""
        return slot_share(slot.quota.capacity, self._buckets.fallback.processes)

    def _refusal_by_share(self, slots: Sequence[ConcurrencySlot], now_ns: int) -> Decision:
        used = [slot for slot in slots if self.in_flight(slot.key) >= self._share(slot)]
        return self.refuse([SlotUse(slot, slot.quota.capacity) for slot in used], "local_share", now_ns)

    async def look(self, slots: Sequence[ConcurrencySlot]) -> list[SlotUse]:
        """Return each slot as it is in all workers; while the store is unavailable, as it is in this one."""
        if not self._buckets.batcher.is_usable:
            return [self._own_use(slot) for slot in slots]
        return list(await asyncio.gather(*map(self._look, slots)))

    async def _look(self, slot: ConcurrencySlot) -> SlotUse:
        seen: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self.submit(HeldOp(self.lease_key(slot.key), seen))
        total = await seen
        return self._own_use(slot) if total is None else SlotUse(slot, total)

    def _own_use(self, slot: ConcurrencySlot) -> SlotUse:
        share = self._share(slot) if self._buckets.policy == "local_share" else None
        return SlotUse(slot, self.in_flight(slot.key), self._buckets.fallback.processes, share)

    # Leases

    @property
    def policy(self) -> Literal["local_share", "deny", "allow"]:
        """`store.on_failure` in force: `local_share`, `deny` or `allow`."""
        return self._buckets.policy

    def submit(self, op: ScriptOp) -> None:
        """Send an operation to the store."""
        self._buckets.batcher.submit(op)

    def epoch(self, key: str) -> int:
        """See `concurrency_ops.LeasePort`. Epochs of one key ascend, also if it was forgotten meanwhile."""
        epoch = self.epochs.get(key)
        if epoch is None:
            epoch = self._older.get(key)
            epoch = self.epochs[key] = self._next_epoch() if epoch is None else epoch
        return epoch

    def mark(self, key: str) -> None:
        """See `concurrency_ops.LeasePort`."""
        self.epochs[key] = self._next_epoch()
        self.unwritten.add(key)
        self.unconfirmed[key] = self._beats
        if self._buckets.batcher.is_usable:  # otherwise the next heartbeat sets it
            self._buckets.batcher.submit(HoldOp(self, key))

    def note_held(self, key: str, epoch: int) -> None:
        """See `concurrency_ops.LeasePort`."""
        if self.epoch(key) == epoch:
            self.unconfirmed.pop(key, None)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEWAL_INTERVAL)
            self.note_beat()
            keys = [*self.counters, *(key for key in self.unconfirmed if key not in self.counters)]
            for first in range(0, len(keys), MAX_BATCH):
                self.renew(keys[first : first + MAX_BATCH])
                await asyncio.sleep(RENEWAL_PAUSE)
                check_cancelled()

    def note_beat(self) -> None:
        """Forget epochs of keys that are no longer used, and leases of no requests that must have ended.

        Those are leases that their server has not confirmed for longer than a lease lasts.
        """
        self.epochs, self._older = {}, self.epochs
        for key in (*self.counters, *self.unconfirmed):
            self.epochs[key] = self._older.get(key) or self._next_epoch()
        self._beats += 1
        oldest = self._beats - ceil(LEASE / RENEWAL_INTERVAL) - 1
        for key in [key for key, beat in self.unconfirmed.items() if beat < oldest and not self.in_flight(key)]:
            del self.unconfirmed[key]
            self.unwritten.discard(key)

    def renew(self, keys: Sequence[str]) -> None:
        """Renew the leases of keys, and set those that the store has not confirmed."""
        batcher = self._buckets.batcher
        if not batcher.is_usable:
            return
        for key in keys:
            if key in self.unconfirmed:
                batcher.submit(HoldOp(self, key))
            elif key in self.counters:
                batcher.submit(RenewOp(self, key))

    def _hashed(self, key: str) -> str:
        """Return the key of leases in the store: of fixed length, without the client's id."""
        return f"{self._prefix}:slots:{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"
