"""Concurrency limits: how many requests of one key may be in flight at the same time. Pure, but for the counters.

A request takes one slot of each limit that applies to it, or none, and returns them when its exchange ends.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from api_gateway.models import NANOSECONDS, Charge, ConcurrencySlot, Decision, Exchange, Quota
from api_gateway.rate_limiter import RateLimiter, joint_refusal

SHORTEST_HINT, LONGEST_HINT = 1.0, 60.0  # seconds of `Retry-After`
DURATIONS = 9  # of a key's last requests, whose median is the hint


@dataclass(frozen=True, slots=True)
class ConcurrencyQuota(Quota):
    """At most `capacity` requests of one key in flight. It has no rate, and costs do not count."""

    @classmethod
    def of(cls, name: str, concurrent: int, policy: str = "") -> "ConcurrencyQuota":
        """Return the quota of so many requests."""
        return cls(name, 0.0, concurrent, 1, concurrent, policy)


class SlottedCharges(list[Charge]):
    """The charges of a request that also takes slots.

    `slots` are computed with the charges, and remembered with them. `policies` are the items of the slots for
    `RateLimit-Policy`, with a comma before each.
    """

    __slots__ = ("policies", "slots")

    def __init__(self, charges: Iterable[Charge], slots: tuple[ConcurrencySlot, ...]) -> None:
        super().__init__(charges)
        self.slots = slots
        self.policies = "".join([f", {policy_of(slot.quota)}" for slot in slots]).encode()


def slot_share(concurrent: int, processes: int) -> int:
    """Return how many requests in flight each of so many processes admits while the store is unavailable."""
    return max(concurrent // processes, 1)


def policy_of(quota: Quota) -> str:
    """Return the item of a concurrency limit for `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-11)."""
    return f'"{quota.policy}";q={quota.capacity};qu="concurrent-requests"'


class SlotUse(NamedTuple):
    """A slot as it is now: how many requests of its key are in flight, and whether another one would be admitted.

    `processes` is set while shared slots are not known: so many processes share them, and the requests in flight are
    those of this process. By `share`, it may have so many of them; None: as many as the limit.
    """

    slot: ConcurrencySlot
    in_flight: int
    processes: int | None = None
    share: int | None = None

    @property
    def concurrent(self) -> int:
        """Maximum number of requests in flight."""
        return self.slot.quota.capacity if self.share is None else self.share

    @property
    def is_free(self) -> bool:
        """True if another request would be admitted."""
        return self.in_flight < self.concurrent


class SlotCounter:
    """The requests of one key that are in flight in this process, and how long its last ones took, in seconds."""

    __slots__ = ("durations", "in_flight")

    def __init__(self) -> None:
        self.in_flight = 0
        self.durations: deque[float] | None = None

    def __repr__(self) -> str:
        return f"<SlotCounter [{self.in_flight} in flight]>"


class LocalSlots:
    """The slots that requests of this process hold. Outlives reloads, so that limits are adopted by name.

    A key has an entry while it has requests in flight, so the table is not larger than their number. A slot is taken
    by `take` and returned by `release`, which may be called for each exchange, and more than once. `ended` has the
    durations of the last requests of keys that no longer have any in flight, by the name of the limit.
    """

    def __init__(self, in_flight: Counter[str]) -> None:
        """`in_flight` counts the requests in flight by the name of the limit."""
        self.counters: dict[str, SlotCounter] = {}
        self.ended: dict[str, deque[float]] = {}
        self._in_flight = in_flight

    def __repr__(self) -> str:
        return f"<LocalSlots [{len(self.counters)} keys]>"

    async def start(self) -> None:
        """Begin to share slots with other processes, if they are shared."""

    async def close(self) -> None:
        """End what `start` has begun."""

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
        """Have the limiter charge a request and count it. Only for shared slots: others are decided at once.

        `is_candidate`: of candidates, which are decided on also if the exchange has ended meanwhile.
        """
        raise NotImplementedError

    def follow(self, names: Iterable[str]) -> None:
        """Add a count of 0 for each limit, so that limits without requests are shown."""
        for name in names:
            self._in_flight.setdefault(name, 0)

    def refusal(self, slots: Sequence[ConcurrencySlot], now_ns: int) -> Decision | None:
        """Return the refusal of a request that takes these slots; None if all are free."""
        counters = self.counters
        for slot in slots:
            counter = counters.get(slot.key)
            if counter is not None and counter.in_flight >= slot.quota.capacity:
                return refusal_of_slots([SlotUse(one, self.in_flight(one.key)) for one in slots], self, now_ns)
        return None

    def refusal_by_all(self, charges: SlottedCharges, limiter: RateLimiter, now_ns: int) -> Decision | None:
        """Return the refusal of a request that lacks a slot, None if all are free; of the limits of tokens, too.

        So a client that waits this long is not refused afterwards by a limit that would have refused it now.
        """
        refused = self.refusal(charges.slots, now_ns)
        return None if refused is None else joint_refusal(refused, limiter.refusal(charges, now_ns))

    def take(self, exchange: Exchange, slots: tuple[ConcurrencySlot, ...]) -> None:
        """Let an exchange hold slots, in addition to those that it holds, until `release`."""
        counters, in_flight = self.counters, self._in_flight
        for slot in slots:
            counter = counters.get(slot.key)
            if counter is None:
                counter = counters[slot.key] = SlotCounter()
            counter.in_flight += 1
            in_flight[slot.quota.policy] += 1
        exchange.slots += slots

    def release(self, exchange: Exchange) -> None:
        """Return the slots of an exchange that has ended; nothing if it holds none."""
        slots = exchange.slots
        if slots:
            exchange.slots = ()
            self._return(slots, exchange.finished - exchange.started)

    def give_back(self, exchange: Exchange, slots: tuple[ConcurrencySlot, ...]) -> None:
        """Return those of these slots that an exchange holds: it was not admitted."""
        held = tuple([slot for slot in exchange.slots if slot in slots])
        exchange.slots = tuple([slot for slot in exchange.slots if slot not in slots])
        self._return(held, None)

    def _return(self, slots: tuple[ConcurrencySlot, ...], seconds: float | None) -> None:
        """Release slots, and record how long the request took (None: it was not admitted)."""
        counters, in_flight = self.counters, self._in_flight
        for slot in slots:
            counter = counters[slot.key]
            counter.in_flight -= 1
            in_flight[slot.quota.policy] -= 1
            if seconds is not None:
                self._durations(slot, counter).append(seconds)
            if not counter.in_flight:
                del counters[slot.key]

    def _durations(self, slot: ConcurrencySlot, counter: SlotCounter) -> deque[float]:
        """Return the durations of a key; of its limit if it no longer has any in flight."""
        if not counter.in_flight:
            durations = self.ended.get(slot.quota.policy)
            if durations is None:
                durations = self.ended[slot.quota.policy] = deque(maxlen=DURATIONS)
            return durations
        if counter.durations is None:
            counter.durations = deque(maxlen=DURATIONS)
        return counter.durations

    def in_flight(self, key: str) -> int:
        """Return the number of requests of a key that are in flight in this process."""
        counter = self.counters.get(key)
        return 0 if counter is None else counter.in_flight

    def hint(self, slot: ConcurrencySlot) -> float:
        """Return seconds after which a request may be admitted: an estimate.

        It is the median duration of the last requests of the key or, if it has none, of other keys of the limit.
        """
        counter = self.counters.get(slot.key)
        durations = (None if counter is None else counter.durations) or self.ended.get(slot.quota.policy)
        if not durations:
            return SHORTEST_HINT
        return min(max(sorted(durations)[len(durations) // 2], SHORTEST_HINT), LONGEST_HINT)

    async def look(self, slots: Sequence[ConcurrencySlot]) -> list[SlotUse]:
        """Return each slot as it is now."""
        return [SlotUse(slot, self.in_flight(slot.key)) for slot in slots]


def refusal_of_slots(uses: Sequence[SlotUse], local: LocalSlots, now_ns: int) -> Decision:
    """Return the decision on a request one of whose slots is not free: that of the longest estimate."""
    full = [use.slot for use in uses if not use.is_free]
    slot = max(full, key=local.hint)
    wait_ns = int(local.hint(slot) * NANOSECONDS)
    violated = tuple([one.quota for one in full])
    return Decision(slot.key, slot.quota, False, 0, wait_ns, wait_ns, now_ns, violated=violated)
