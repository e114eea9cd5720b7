"""The operations of token_bucket.lua on leases: how many requests of a key each worker has in flight.

The leases of a key are one value: for each worker its name, the epoch, the number of requests, and the end of the
lease in milliseconds since 1970. A request is counted by the script call that charges its buckets. Its end is
another operation, whose reply no request waits for.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Protocol

from api_gateway.limits.cluster_batcher import ClusterScriptBatcher
from api_gateway.limits.quota_ops import MAX_ASKED, VALUES_OF_COUNTER, QuotaChargeOp
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.limits.script_batcher import ScriptBatcher, ScriptOp
from api_gateway.limits.script_ops import ChargeOp
from api_gateway.limits.store_quota_limiter import StoreQuotaLimiter
from api_gateway.models import Charge, ConcurrencySlot, Decision
from api_gateway.storage.redis_session import ScriptCall

LEASE = 10.0  # seconds after which the requests of a worker that does not renew its leases no longer count
LEASE_MS = int(LEASE * 1000)
_NONE = -1

StoreLimiter = RedisLimiter | StoreQuotaLimiter


class LeasePort(Protocol):
    """The parts of the slots that the operations use. `worker` is the name of this one."""

    worker: str
    unwritten: set[str]
    under_way: Counter[str]  # operations on the lease of a key that are written and have no reply

    def epoch(self, key: str) -> int:
        """Return the epoch of the lease of a key."""
        ...

    @property
    def lease_key(self) -> Callable[[str], str]:
        """Maps a key to its key in the store."""
        ...

    def in_flight(self, key: str) -> int:
        """Return the number of requests of a key that this worker has in flight."""
        ...

    def mark(self, key: str) -> None:
        """Begin another epoch of a lease, and set it in the store: its number there may be wrong."""
        ...

    def note_held(self, key: str, epoch: int) -> None:
        """Note that the store has the lease of an epoch."""
        ...

    def is_share_used(self, slots: Sequence[ConcurrencySlot]) -> bool:
        """Return whether a request needs more than this worker's share of a limit while the store is unavailable."""
        ...


def charge_op(
    limiter: StoreLimiter, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]
) -> ChargeOp | QuotaChargeOp:
    """Return the operation that charges buckets, and counters if there are any."""
    if isinstance(limiter, RedisLimiter):
        return ChargeOp(limiter, charges, now_ns, on_decision)
    if any(isinstance(charge.quota, PeriodQuota) for charge in charges):
        return QuotaChargeOp(limiter, charges, now_ns, on_decision)
    return ChargeOp(limiter.buckets, charges, now_ns, on_decision)


class ClaimOp(ScriptOp):
    """Takes a slot of each limit and charges all buckets and counters of a request, or does nothing.

    `on_full` is called with the requests in flight of each key if a slot is missing, and the refusal of the charges if
    they are refused, too; with None and None if this worker's share of a limit is used. `on_decision` is called with
    the decision on the charges otherwise, or that of the policy for outages.
    """

    __slots__ = (
        "_asked",
        "_charges",
        "_epochs",
        "_inner",
        "_limiter",
        "_now_ns",
        "_on_decision",
        "_on_full",
        "_port",
        "_slots",
    )

    def __init__(
        self,
        port: LeasePort,
        limiter: StoreLimiter,
        slots: Sequence[ConcurrencySlot],
        charges: Sequence[Charge],
        now_ns: int,
        on_decision: Callable[[Decision], None],
        on_full: Callable[[Sequence[int] | None, Decision | None], None],
        asked: int = 1,
    ) -> None:
        self._inner = charge_op(limiter, charges, now_ns, on_decision)
        super().__init__(self._inner.key)
        self._port = port
        self._limiter = limiter
        self._slots = slots
        self._charges = charges
        self._now_ns = now_ns
        self._on_decision = on_decision
        self._on_full = on_full
        self._asked = asked
        self._epochs: list[int] = []

    def write(self, call: ScriptCall) -> None:
        """Append the claim, and the charge that passes only with it."""
        port, arguments = self._port, call.arguments
        arguments += ("slots", port.worker, LEASE_MS, len(self._slots))
        self._epochs = [port.epoch(slot.key) for slot in self._slots]
        for slot, epoch in zip(self._slots, self._epochs, strict=True):
            number = call.number(port.lease_key(slot.key))
            arguments += (number, epoch, port.in_flight(slot.key), slot.quota.capacity)
            port.under_way[slot.key] += 1
        self._inner.write(call)
        self._inner.is_sent = True

    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """Pass on the decision, or that a slot is missing; send the operation again after an inconclusive reply."""
        if not self.is_over:
            self._end()
        totals = [next(reply) for _ in self._slots]
        counters = sum(isinstance(charge.quota, PeriodQuota) for charge in self._charges)
        buckets = len(self._charges) - counters
        values = [next(reply) for _ in range(buckets + VALUES_OF_COUNTER * counters)]
        is_stale = -1 in totals
        is_full = not is_stale and any(
            total >= slot.quota.capacity for total, slot in zip(totals, self._slots, strict=True)
        )
        must_ask = any(values[buckets::VALUES_OF_COUNTER])
        if self.is_over or is_stale or is_full or must_ask:
            refused = self._read_silently(clock_us, iter(values), may_be_charged=not (is_stale or is_full or must_ask))
            if self.is_over:
                return
            if is_full:
                self._on_full(totals, refused)
            else:
                self._ask_again(totals)
            return
        changed = [slot.key for slot, is_same in self._with_epochs() if not is_same]
        self._inner.read(clock_us, iter(values))
        for key in changed:  # the lease was set meanwhile, without this request if it was admitted
            self._port.mark(key)

    def _end(self) -> None:
        for slot in self._slots:
            end_of_operation(self._port, slot.key)

    def _with_epochs(self) -> Iterator[tuple[ConcurrencySlot, bool]]:
        """Yield each slot, and whether the epoch of its lease is that in which the operation was written."""
        for slot, epoch in zip(self._slots, self._epochs, strict=True):
            yield slot, self._port.epoch(slot.key) == epoch

    def _read_silently(self, clock_us: int, values: Iterator[int], *, may_be_charged: bool) -> Decision | None:
        """Have a reply noted whose decision is not passed on; return the refusal of charges that were not made."""
        if not may_be_charged:
            return self._inner.read_uncharged(clock_us, values)
        self._inner.is_over = True
        self._inner.read(clock_us, values)
        return None

    def _ask_again(self, totals: Sequence[int]) -> None:
        for (slot, is_same), total in zip(list(self._with_epochs()), totals, strict=True):
            if total < 0 and is_same:
                self._port.mark(slot.key)
        if self._asked >= MAX_ASKED:
            self.is_sent = self._inner.is_sent = False  # nothing was charged
            self.fail()
            return
        again = ClaimOp(
            self._port,
            self._limiter,
            self._slots,
            self._charges,
            self._now_ns,
            self._on_decision,
            self._on_full,
            self._asked + 1,
        )
        batcher_of(self._limiter).submit(again)

    def fail(self) -> None:
        """Complete by the policy for outages: first on the slots, so that a refusal charges nothing."""
        if self.is_sent:
            self._end()
            for slot in self._slots:
                self._port.mark(slot.key)
        if self._port.is_share_used(self._slots):
            self._inner.lose_reports()
            self._on_full(None, None)
        else:
            self._inner.fail()


class LeaseOp(ScriptOp):
    """An operation on this worker's lease of one key, with the epoch in which it began."""

    __slots__ = ("_epoch", "_key", "_port")
    verb: ClassVar[str]

    def __init__(self, port: LeasePort, key: str) -> None:
        super().__init__(port.lease_key(key))
        self._port = port
        self._key = key
        self._epoch = port.epoch(key)

    def write(self, call: ScriptCall) -> None:
        """Append the operation."""
        call.arguments += (self.verb, self._port.worker, LEASE_MS, call.number(self.key), self._epoch)

    def read(self, clock_us: int, reply: Iterator[int]) -> None:  # noqa: ARG002 - no time is needed
        """Set the lease if the store has another one; nothing if it was set meanwhile anyway."""
        if next(reply) != 1 and not self.is_over:
            self._mark()

    def fail(self) -> None:
        """Set the lease: the store may have executed the operation."""
        self._mark()

    def _mark(self) -> None:
        if self._port.epoch(self._key) == self._epoch:
            self._port.mark(self._key)


def end_of_operation(port: LeasePort, key: str) -> None:
    """Note that an operation on the lease of a key has its reply, or has missed its deadline."""
    port.under_way[key] -= 1
    if not port.under_way[key]:
        del port.under_way[key]


class ReturnOp(LeaseOp):
    """Releases a slot."""

    verb = "return"

    def write(self, call: ScriptCall) -> None:
        """Append the operation."""
        super().write(call)
        self._port.under_way[self._key] += 1

    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """See `LeaseOp`."""
        if not self.is_over:
            end_of_operation(self._port, self._key)
        super().read(clock_us, reply)

    def fail(self) -> None:
        """See `LeaseOp`."""
        if self.is_sent:
            end_of_operation(self._port, self._key)
        super().fail()


class RenewOp(LeaseOp):
    """Renews a lease, and compares its number with that of this worker if no other operation on it is under way."""

    verb = "renew"

    def write(self, call: ScriptCall) -> None:
        """Append the operation."""
        super().write(call)
        is_quiet = self._key not in self._port.under_way
        call.arguments.append(self._port.in_flight(self._key) if is_quiet else _NONE)

    def read(self, clock_us: int, reply: Iterator[int]) -> None:  # noqa: ARG002 - no time is needed
        """Set the lease if the store has another one: also another number, unless it may have changed since."""
        found = next(reply)
        if not self.is_over and (found == 0 or (found == _NONE and self._key not in self._port.under_way)):
            self._mark()

    def fail(self) -> None:
        """Do nothing: the next one renews it."""


class HoldOp(LeaseOp):
    """Sets a lease to the number of requests in flight at the time of writing."""

    verb = "hold"

    def write(self, call: ScriptCall) -> None:
        """Append the operation, unless another epoch has begun."""
        super().write(call)
        call.arguments.append(self._port.in_flight(self._key))
        if self._port.epoch(self._key) == self._epoch:
            self._port.unwritten.discard(self._key)

    def read(self, clock_us: int, reply: Iterator[int]) -> None:  # noqa: ARG002 - no time is needed
        """Note that the lease is in force."""
        if next(reply) == 1:
            self._port.note_held(self._key, self._epoch)
        elif not self.is_over:
            self._mark()

    def fail(self) -> None:
        """Do nothing: leases that are not set are set by the next heartbeat."""


class HeldOp(ScriptOp):
    """Reads how many requests of a key are in flight."""

    __slots__ = ("_seen",)

    def __init__(self, key: str, seen: asyncio.Future[int | None]) -> None:
        """`key` is that in the store. None is the result if the store does not respond."""
        super().__init__(key)
        self._seen = seen

    def write(self, call: ScriptCall) -> None:
        """Append the operation."""
        call.arguments += ("held", call.number(self.key))

    def read(self, clock_us: int, reply: Iterator[int]) -> None:  # noqa: ARG002 - no time is needed
        """Complete with the number."""
        found = next(reply)
        if not self._seen.done():
            self._seen.set_result(found)

    def fail(self) -> None:
        """Complete without."""
        if not self._seen.done():
            self._seen.set_result(None)


def batcher_of(limiter: StoreLimiter) -> ScriptBatcher | ClusterScriptBatcher:
    """Return the batcher that sends the operations of a limiter."""
    return limiter.batcher if isinstance(limiter, RedisLimiter) else limiter.buckets.batcher
