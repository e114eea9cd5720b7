"""The arithmetic of calendar quotas: what a counter has used of its allowance, and what that lets a request cost.

Amounts are integers, in thousandths of a token; instants are integer microseconds or seconds since the epoch. Nothing
here reads a clock or waits, so a decision is atomic on one thread.

A period has one count, so its allowance is granted once. A counter keeps the count of the latest period that it has
been used in, and of the one before. If the clock steps back, requests are charged to the count of the period that it
shows; if that is earlier than both, to the earlier one. So a step back gains no second allowance, and a step forward
and back loses none. A counter is forgotten two periods and a day after its last period; a longer step is not undone.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple
from zoneinfo import ZoneInfo

from api_gateway.limits.periods import PERIOD_LENGTHS, Calendar, CalendarPeriod, Unit
from api_gateway.models import Quota

UNITS_PER_TOKEN = 1000
MICROSECONDS = 1_000_000
NEVER_US = -1
KEPT = 2  # periods for which a counter is kept after its last one has ended, and `KEPT_LONGER` seconds
KEPT_LONGER = 86_400
UTC_MONTHS = Calendar("month", ZoneInfo("UTC"))


@dataclass(frozen=True, slots=True)
class PeriodQuota(Quota):
    """An allowance of `capacity` tokens in each period of a calendar.

    It has the units of this module: `emission_ns` is one token and `burst_ns` the allowance, both in thousandths of a
    token. So the cost of a charge (`increment_ns`) is in thousandths too, and shares of a bucket and of an allowance
    can be compared. `rate` is the mean in tokens per second.

    `is_from_start`: periods begin with the client's first request instead of those of the calendar. At most
    `carry_over` tokens that are left at the end of a period are added to the next one, and only to that. `warn_at` are
    shares of the allowance, in ascending order, that are reported once in each period when they are reached.
    """

    is_calendar: ClassVar[bool] = True

    calendar: Calendar = UTC_MONTHS
    is_from_start: bool = False
    carry_over: int = 0
    warn_at: tuple[float, ...] = ()

    @classmethod
    def of(cls, name: str, tokens: int, calendar: Calendar, policy: str = "", **more: Any) -> "PeriodQuota":
        """Return the quota of an allowance in whole tokens."""
        rate = tokens / PERIOD_LENGTHS[calendar.unit]
        return cls(name, rate, tokens, UNITS_PER_TOKEN, tokens * UNITS_PER_TOKEN, policy, calendar, **more)

    def period(self, began: int, now: int) -> CalendarPeriod:
        """Return the period that contains `now`, for a client whose first request was at `began`."""
        return self.calendar.since(began, now) if self.is_from_start else self.calendar.at(now)


@dataclass(slots=True)
class QuotaCount:
    """The use in the period from `start`: of the allowance, and (`drawn`) of the balance of top-ups.

    `carried` was left over from the period before. `peak` is the highest use, before refunds.
    """

    start: int
    used: int = 0
    carried: int = 0
    drawn: int = 0
    peak: int = 0


@dataclass(slots=True)
class QuotaCounter:
    """The counts of one client and quota, and the balance of its top-ups, which can be used until `until`.

    `end` is that of the period of `count`. `began` is when the client's first period began. A counter of another unit
    than the quota's is replaced by a new one; another time zone applies from the next period on. `is_unverified`: its
    key may have been invented. `resets` counts those by operators, after which a share can be reached again.
    """

    unit: Unit
    began: int
    count: QuotaCount
    end: int
    before: QuotaCount | None = None
    balance: int = 0
    until: int = 0
    is_unverified: bool = False
    resets: int = 0

    def valid_balance(self, now: int) -> int:
        """Return the part of the top-ups that has not expired."""
        return self.balance if now < self.until else 0


class Adjustment(NamedTuple):
    """A change of a counter by an operator: a top-up with its end, a carry-over, or a reset of the count.

    `carried` -1 leaves what was carried over; `is_reset` 1 sets the used tokens to 0.
    """

    amount: int = 0
    until: int = 0
    carried: int = -1
    is_reset: int = 0


@dataclass(slots=True)
class QuotaState:
    """A counter at one instant: the count that a request is charged to, the end of its period, and what is left.

    `is_new`: the count is not part of the counter until it is charged. `is_unverified`: see `Charge`.
    """

    key: str
    quota: PeriodQuota
    counter: QuotaCounter
    count: QuotaCount
    end: int
    left: int
    is_new: bool
    is_unverified: bool = False

    def kept(self, start: int) -> QuotaCount | None:
        """Return the count of the period from `start`; None if the counter does not have it."""
        counter = self.counter
        if self.is_new and self.count is counter.count:  # the counter itself is new
            return None
        return next((one for one in (counter.count, counter.before) if one is not None and one.start == start), None)

    def wait_us(self, cost: int, now_us: int) -> int:
        """Return 0 if a cost is allowed, else the time until it would be; NEVER_US if it exceeds the allowance."""
        if cost <= self.left or cost == 0:
            return 0
        counter, quota = self.counter, self.quota
        if cost > quota.burst_ns:
            return NEVER_US
        end, latest = self.end, counter.count
        if latest.start == end and cost > quota.burst_ns + latest.carried - latest.used:
            end = quota.period(
                counter.began, end
            ).end  # the clock has stepped back, and the next period is used up too
        return end * MICROSECONDS - now_us


class QuotaWarning(NamedTuple):
    """A share of an allowance was reached for the first time in a period. Amounts are thousandths of a token."""

    key: str
    quota: PeriodQuota
    share: float
    period: CalendarPeriod
    used: int
    allowance: int
    resets: int = 0


def is_past(counter: QuotaCounter, now: int) -> bool:
    """Return whether a counter no longer has an effect, even if the clock steps back by a period."""
    return past_at(counter) < now


def past_at(counter: QuotaCounter) -> int:
    """Return from when on a counter has no effect."""
    return max(counter.end + KEPT * (counter.end - counter.count.start) + KEPT_LONGER, counter.until)


def standing_of(key: str, quota: PeriodQuota, counter: QuotaCounter | None, now: int) -> QuotaState:
    """Return the standing of a counter, or of a new one if there is none of the quota's unit; nothing is changed."""
    if counter is not None and (counter.unit != quota.calendar.unit or is_past(counter, now)):
        counter = None
    if counter is None:
        period = quota.period(now, now)
        count = QuotaCount(period.start)
        new = QuotaCounter(quota.calendar.unit, now, count, period.end)
        return QuotaState(key, quota, new, count, period.end, quota.burst_ns, True)
    count, end, is_new = counter.count, counter.end, False
    if not count.start <= now < end:
        count, end, is_new = _elsewhere(quota, counter, now)
    left = quota.burst_ns + count.carried - count.used
    if counter.balance:
        left = max(left, 0) + counter.valid_balance(now)
    return QuotaState(key, quota, counter, count, end, left, is_new)


def _elsewhere(quota: PeriodQuota, counter: QuotaCounter, now: int) -> tuple[QuotaCount, int, bool]:
    """Return the count that is charged in another period than the latest, its end, and whether it is new."""
    period = quota.period(counter.began, now)
    latest, before = counter.count, counter.before
    if period.start > latest.start:
        return _next(quota, latest, period), period.end, True
    if period.start == latest.start:  # which has another end since a change of the configuration
        return latest, period.end, False
    if before is not None and period.start > before.start:
        return _next(quota, before, period), period.end, True
    count = latest if before is None else before
    return count, quota.period(counter.began, count.start).end, False


def attach(standing: QuotaState) -> bool:
    """Make the count of a standing a part of its counter; return whether the counter itself is new."""
    counter, count = standing.counter, standing.count
    if not standing.is_new:
        return False
    standing.is_new = False
    if count.start > counter.count.start:
        counter.before, counter.count, counter.end = counter.count, count, standing.end
    elif count.start < counter.count.start:
        counter.before = count
    else:
        return True
    return False


def use(standing: QuotaState, cost: int, now: int) -> list[QuotaWarning]:
    """Charge a cost: first to what is free of the allowance, then to the top-ups, then to the allowance again."""
    counter, count, quota = standing.counter, standing.count, standing.quota
    free = max(quota.burst_ns + count.carried - count.used, 0)
    if cost > free and counter.balance:
        drawn = min(cost - free, counter.valid_balance(now))
        counter.balance -= drawn
        count.drawn += drawn
        cost -= drawn
    count.used += cost
    if count.used <= count.peak:
        return []
    peak, count.peak = count.peak, count.used
    return _warnings(standing, peak) if quota.warn_at else []


def settle(standing: QuotaState, kept: QuotaCount | None, change: int, now: int) -> list[QuotaWarning]:
    """Charge or refund a difference in the count `kept`, else (only a charge) in that of the standing."""
    if change <= 0:
        if kept is not None:
            _give_back(standing.counter, kept, -change, now)
        return []
    count, quota = kept or standing.count, standing.quota
    free = quota.burst_ns + count.carried - count.used
    most = max(free + quota.burst_ns, 0) + standing.counter.valid_balance(now)
    return use(replace(standing, count=count), min(change, most), now)


def reached(quota: PeriodQuota, count: QuotaCount) -> int:
    """Return how many shares of the allowance were reached."""
    allowance = quota.burst_ns + count.carried
    return sum(count.peak >= share * allowance for share in quota.warn_at)


def _warnings(standing: QuotaState, peak: int) -> list[QuotaWarning]:
    quota, count = standing.quota, standing.count
    allowance = quota.burst_ns + count.carried
    return [
        QuotaWarning(
            standing.key,
            quota,
            share,
            quota.period(standing.counter.began, count.start),
            count.used,
            allowance,
            standing.counter.resets,
        )
        for share in quota.warn_at
        if peak < share * allowance <= count.peak
    ]


def _next(quota: PeriodQuota, last: QuotaCount, period: CalendarPeriod) -> QuotaCount:
    """Return the count of a period that is not the first; `last` is the one before it that was used."""
    left = quota.burst_ns
    if last.start == period.earlier:
        left += last.carried - last.used
    return QuotaCount(period.start, carried=min(max(left, 0), quota.carry_over * UNITS_PER_TOKEN))


def _give_back(counter: QuotaCounter, count: QuotaCount, amount: int, now: int) -> None:
    """Refund in reverse order; what came from top-ups that have expired since is lost."""
    drawn = min(amount, count.drawn)
    count.drawn -= drawn
    if now < counter.until:
        counter.balance += drawn
    count.used = max(count.used - (amount - drawn), 0)
