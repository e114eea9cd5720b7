"""Slots of concurrency limits on several servers of a cluster, and the charges of the request that takes them.

The leases of a key are one value, so a slot is taken on one server. A request takes its slots first, each on its
server, and is charged when it has all of them. If one is missing, or the charge is refused, the slots are returned;
until then other requests may find too few slots, never too many. A request that a concurrency limit refuses is
therefore charged nothing, as with one server: a slot is returned exactly, but tokens that are refilled meanwhile are
not refunded. A request waits for two replies, one after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, Protocol

from api_gateway.limits.concurrency import SlotUse
from api_gateway.limits.concurrency_ops import LEASE_MS, LeasePort, end_of_operation
from api_gateway.limits.quota_ops import MAX_ASKED
from api_gateway.limits.script_batcher import ScriptOp
from api_gateway.models import NANOSECONDS, ConcurrencySlot, Decision, DecisionSource, Exchange
from api_gateway.rate_limiter import joint_refusal
from api_gateway.storage.redis_session import ScriptCall

OnDecision = Callable[[Decision], None]


class SlotsPort(LeasePort, Protocol):
    """The parts of the slots that a claim uses."""

    @property
    def policy(self) -> Literal["local_share", "deny", "allow"]:
        """`store.on_failure` in force: `local_share`, `deny` or `allow`."""
        ...

    def submit(self, op: ScriptOp) -> None:
        """Send an operation."""
        ...

    def take(self, exchange: Exchange, slots: tuple[ConcurrencySlot, ...]) -> None:
        """Let an exchange hold slots that the store does not know of."""
        ...

    def take_confirmed(self, exchange: Exchange, slots: tuple[ConcurrencySlot, ...]) -> None:
        """Let an exchange hold slots that the store has counted."""
        ...

    def give_back(self, exchange: Exchange, slots: tuple[ConcurrencySlot, ...]) -> None:
        """Return those of these slots that an exchange holds: it was not admitted."""
        ...

    def release(self, exchange: Exchange) -> None:
        """Return all slots of an exchange that has ended."""
        ...

    def refuse(self, uses: Sequence[SlotUse], source: DecisionSource, now_ns: int) -> Decision:
        """Return the refusal of a request, one of whose slots is not free."""
        ...


class TakeOp(ScriptOp):
    """Takes a slot of one limit if it is free.

    `on_total` is called with the requests in flight before; with None if it is not known whether a slot was taken.
    """

    __slots__ = ("_asked", "_epoch", "_on_total", "_port", "_slot")

    def __init__(
        self, port: SlotsPort, slot: ConcurrencySlot, on_total: Callable[[int | None], None], asked: int = 1
    ) -> None:
        super().__init__(port.lease_key(slot.key))
        self._port = port
        self._slot = slot
        self._on_total = on_total
        self._asked = asked
        self._epoch = 0

    def write(self, call: ScriptCall) -> None:
        """Append the claim, and a charge of no buckets, which passes if the slot is free."""
        port, slot = self._port, self._slot
        self._epoch = port.epoch(slot.key)
        call.arguments += ("slots", port.worker, LEASE_MS, 1, call.number(self.key), self._epoch)
        call.arguments += (port.in_flight(slot.key), slot.quota.capacity, 0)
        port.under_way[slot.key] += 1

    def read(self, clock_us: int, reply: Iterator[int]) -> None:  # noqa: ARG002 - no time is needed
        """Pass on the number; ask again if the store has a lease of another epoch."""
        total = next(reply)
        if self.is_over:
            return
        port, slot = self._port, self._slot
        end_of_operation(port, slot.key)
        is_same = port.epoch(slot.key) == self._epoch
        if total < 0:
            if is_same:
                port.mark(slot.key)
            self._ask_again()
            return
        if not is_same and total < slot.quota.capacity:  # the lease was set meanwhile, without this request
            port.mark(slot.key)
        self._on_total(total)

    def _ask_again(self) -> None:
        if self._asked < MAX_ASKED:
            self._port.submit(TakeOp(self._port, self._slot, self._on_total, self._asked + 1))
        else:
            self._on_total(None)

    def fail(self) -> None:
        """Set the lease if the store may have taken the slot."""
        if self.is_sent:
            end_of_operation(self._port, self._slot.key)
            self._port.mark(self._slot.key)
        self._on_total(None)


class MultiNodeClaim:
    """Takes a slot of each limit on its server, then has the request charged: in the end all or nothing.

    A slot whose server does not respond is taken or refused by the policy for outages.
    """

    def __init__(
        self,
        port: SlotsPort,
        exchange: Exchange,
        slots: tuple[ConcurrencySlot, ...],
        charge: Callable[[OnDecision], None],
        refusal: Callable[[], Decision | None],
        now_ns: int,
        on_decision: OnDecision,
        *,
        is_candidate: bool = False,
    ) -> None:
        """`charge` has the charges of the request decided on, and calls back with the decision.

        `refusal` returns the refusal of the charges by what this process knows, None if that allows them.
        `is_candidate`: it is charged also if the exchange has ended: its decision is counted.
        """
        self._port = port
        self._exchange = exchange
        self._slots = slots
        self._charge = charge
        self._refusal_of_charges = refusal
        self._now_ns = now_ns
        self._callback = on_decision
        self._is_candidate = is_candidate
        self._uses: list[SlotUse | None] = [None] * len(slots)
        self._source: DecisionSource = "local_share"  # of a refusal

    def __repr__(self) -> str:
        return f"<MultiNodeClaim [{self._uses.count(None)} of {len(self._slots)} slots pending]>"

    def submit(self) -> None:
        """Ask for all slots."""
        for index, slot in enumerate(self._slots):
            self._port.submit(TakeOp(self._port, slot, partial(self._on_total, index)))

    def _on_total(self, index: int, total: int | None) -> None:
        slot, exchange = self._slots[index], self._exchange
        if total is None:
            total = self._without_store(slot)
        elif total < slot.quota.capacity:
            self._port.take_confirmed(exchange, (slot,))
        else:
            self._source = "store"
        if exchange.finished:  # while the store was asked
            self._port.release(exchange)
        self._uses[index] = SlotUse(slot, total)
        uses = [use for use in self._uses if use is not None]
        if len(uses) == len(self._slots):
            self._on_all(uses)

    def _without_store(self, slot: ConcurrencySlot) -> int:
        """Take a slot by the policy for outages; return the number of requests in flight, as if the store knew it."""
        if self._port.policy == "deny" or self._port.is_share_used([slot]):
            return slot.quota.capacity
        self._port.take(self._exchange, (slot,))
        return 0

    def _on_all(self, uses: Sequence[SlotUse]) -> None:
        if not all(use.is_free for use in uses):
            self._port.give_back(self._exchange, self._slots)
            self._callback(self._refusal(uses))
        elif self._exchange.finished and not self._is_candidate:  # the decision has no reader, and nothing was charged
            first = self._slots[0]
            self._callback(Decision(first.key, first.quota, False, 0, 0, 0, self._now_ns))
        else:
            self._charge(self._on_charged)

    def _refusal(self, uses: Sequence[SlotUse]) -> Decision:
        if self._source == "local_share" and self._port.policy == "deny":
            first = self._slots[0]
            return Decision(first.key, first.quota, False, 0, NANOSECONDS, 0, self._now_ns, (), "deny")
        return joint_refusal(self._port.refuse(uses, self._source, self._now_ns), self._refusal_of_charges())

    def _on_charged(self, decision: Decision) -> None:
        if not decision.allowed:
            self._port.give_back(self._exchange, self._slots)
        self._callback(decision)
