"""The costs that this gateway has admitted without the store, and the part that it has still to report.

Share i of N starts with the debt of the store's last result, and is refilled at 1/N of the rate. Costs are multiplied
by N here, so that a debt is a TAT like that of a bucket. Of a share's debt, the store holds the old debt, which it
refills by itself; the rest is unreported. While the old debt lasts, an unreported debt is not refilled, because the
store refills the bucket already; afterwards each share refills 1/N of the rate. So the store's debt and the unreported
debts of all N shares together decrease as the debt of one bucket does: docs/limits.md has the proof.
"""

from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

from api_gateway.models import Charge, Quota
from api_gateway.rate_limiter import TatTable


class ShareDebt(NamedTuple):
    """The debt of this gateway's share of a bucket, as TATs with costs times `processes`.

    `owed_ns` is the whole debt, `held_ns` the part of it that the store holds, or may hold if a response was lost.
    `begun_ns` is the time of the first charge, `changed_ns` that of the last charge or report.
    """

    owed_ns: int
    held_ns: int
    processes: int
    quota: Quota
    begun_ns: int
    changed_ns: int

    def unreported_ns(self, now_ns: int) -> int:
        """Return the debt that the store does not hold, with costs times `processes`."""
        return max(self.owed_ns, now_ns) - max(self.held_ns, now_ns)


class ShareDebts:
    """The debts of this gateway's shares, by bucket; an entry is dropped when the store has confirmed it."""

    def __init__(self, period_ns: int, limit: int) -> None:
        """`period_ns` is the longest budget, `limit` the maximum number of entries."""
        self.table: TatTable[ShareDebt] = TatTable(period_ns, limit)

    def __repr__(self) -> str:
        return f"<ShareDebts of {len(self)} buckets>"

    def __len__(self) -> int:
        return len(self.table)

    def charge(self, charge: Charge, known_ns: int, processes: int, now_ns: int, *, is_held: bool) -> None:
        """Add an admitted cost to a debt that starts with the last known TAT of the store.

        `is_held`: the store may have been charged too. The debt is limited to two budgets of the whole bucket.
        """
        debt = self._get(charge.key, charge.quota, processes, now_ns)
        if debt is None:
            debt = ShareDebt(known_ns, known_ns, processes, charge.quota, now_ns, now_ns)
        cost_ns, most_ns = charge.increment_ns * processes, now_ns + 2 * charge.quota.burst_ns * processes
        owed_ns = max(debt.owed_ns, min(max(debt.owed_ns, now_ns) + cost_ns, most_ns))
        held_ns = min(max(debt.held_ns, now_ns) + cost_ns, owed_ns) if is_held else debt.held_ns
        self._put(charge.key, debt._replace(owed_ns=owed_ns, held_ns=held_ns, changed_ns=now_ns), now_ns)

    def release(self, charge: Charge, processes: int, now_ns: int) -> bool:
        """Regard a held cost as unreported: the store has refused it. Return False if there is no debt."""
        debt = self._get(charge.key, charge.quota, processes, now_ns)
        if debt is None:
            return False
        held_ns = debt.held_ns - charge.increment_ns * processes
        self._put(charge.key, debt._replace(held_ns=held_ns, changed_ns=now_ns), now_ns)
        return True

    def until(self, charge: Charge, processes: int, now_ns: int) -> int:
        """Return the TAT of a debt; 0 if there is none."""
        debt = self._get(charge.key, charge.quota, processes, now_ns)
        return 0 if debt is None else debt.owed_ns

    def includes(self, key: str, at_ns: int, now_ns: int) -> bool:
        """Return whether a charge of `at_ns` is in a debt.

        Earlier ones were reported; the store's clock is another.
        """
        debt = self.table.get(key)
        return debt is not None and debt.begun_ns <= at_ns <= now_ns

    def refund(self, charge: Charge, end_ns: int, processes: int, now_ns: int) -> None:
        """Refund (increment below 0) a cost that is in a debt, as far as it is unreported.

        `end_ns` is the current end of the charge (see `Refunds`): what lies before that time, and is neither refilled
        nor held by the store, may be this charge's.
        """
        debt = self._get(charge.key, charge.quota, processes, now_ns)
        if debt is not None:
            unreported_ns = min(end_ns, debt.owed_ns) - max(debt.held_ns, now_ns)
            owed_ns = debt.owed_ns - max(min(-charge.increment_ns * processes, unreported_ns), 0)
            self._put(charge.key, debt._replace(owed_ns=owed_ns, changed_ns=now_ns), now_ns)

    def report(self, charge: Charge, processes: int, now_ns: int) -> int:
        """Return the unreported debt of a bucket, and regard it as held by the store from now on."""
        debt = self._get(charge.key, charge.quota, processes, now_ns)
        if debt is None:
            return 0
        unreported_ns = -(-debt.unreported_ns(now_ns) // processes)
        self._put(charge.key, debt._replace(held_ns=debt.owed_ns, changed_ns=now_ns), now_ns)
        return unreported_ns

    def confirm(self, key: str, asked_ns: int) -> bool:
        """Drop a debt if it has not changed since `asked_ns`, the time of a query that the store has answered."""
        debt = self.table.get(key)
        if debt is None or debt.changed_ns > asked_ns:
            return False
        self.table.drop(key)
        return True

    def drop(self, key: str) -> None:
        """Forget a bucket, because it is full."""
        self.table.drop(key)

    def some(self, count: int) -> list[tuple[str, Quota]]:
        """Return up to `count` buckets with a debt, and their quotas."""
        items: Iterator[tuple[str, ShareDebt]] = chain(self.table.current.items(), self.table.previous.items())
        return [(key, debt.quota) for key, debt in islice(items, count)]

    def _get(self, key: str, quota: Quota, processes: int, now_ns: int) -> ShareDebt | None:
        """Return a debt, converted to another quota (same filled fraction) or number of processes."""
        self.table.advance(now_ns)
        debt = self.table.get(key)
        if debt is None or (debt.processes == processes and debt.quota.burst_ns == quota.burst_ns):
            return debt
        times, by = quota.burst_ns * processes, debt.quota.burst_ns * debt.processes
        owed_ns, held_ns = (now_ns + max(tat_ns - now_ns, 0) * times // by for tat_ns in (debt.owed_ns, debt.held_ns))
        return ShareDebt(owed_ns, held_ns, processes, quota, debt.begun_ns, debt.changed_ns)

    def _put(self, key: str, debt: ShareDebt, now_ns: int) -> None:
        self.table.period_ns = max(
            self.table.period_ns, debt.owed_ns - now_ns
        )  # an entry is kept until it is refilled
        self.table.put(key, debt)
