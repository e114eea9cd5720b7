"""The calendar periods of quotas: the hour, day, week or month that contains an instant.

An instant is an integer number of seconds since the epoch, because offsets from UTC are whole seconds. Periods have no
gap and no overlap: a period ends with the first second of the next one. Reads no clock.
"""

import calendar
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

Unit = Literal["hour", "day", "week", "month"]
UNITS: tuple[Unit, ...] = ("hour", "day", "week", "month")

HOUR = 3600
# The lengths of periods in seconds, without changes of clocks; of months, the longest.
PERIOD_LENGTHS: dict[Unit, int] = {"hour": HOUR, "day": 24 * HOUR, "week": 168 * HOUR, "month": 744 * HOUR}
_DAYS: dict[Unit, int] = {"day": 1, "week": 7}


class CalendarPeriod(NamedTuple):
    """From `start` to the second before `end`. `earlier` is the start of the period before."""

    start: int
    end: int
    earlier: int


class Calendar:
    """The periods of one unit in one time zone; those of a client may begin at an instant of its own.

    A day begins with the first instant of its date. If that date has no midnight, because clocks are set forward then,
    it begins when they are; if it has two, it begins at the first. A date that a zone has skipped has no period. Weeks
    begin on Monday. An hour ends when local clocks show a full hour, or are changed by less than an hour: of the hour
    that clocks repeat in autumn, each one is a period.
    """

    def __init__(self, unit: Unit, zone: ZoneInfo) -> None:
        self.unit: Unit = unit
        self.zone = zone
        self._last = CalendarPeriod(0, 0, 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calendar) and (self.unit, self.zone.key) == (other.unit, other.zone.key)

    def __hash__(self) -> int:
        return hash((self.unit, self.zone.key))

    def __repr__(self) -> str:
        return f"<Calendar [{self.unit}, {self.zone.key}]>"

    def at(self, now: int) -> CalendarPeriod:
        """Return the period that contains `now`."""
        last = self._last
        if not last.start <= now < last.end:
            last = self._last = self._hour(now) if self.unit == "hour" else self._days(now)
        return last

    def since(self, began: int, now: int) -> CalendarPeriod:
        """Return the period that contains `now`, of those that begin at `began` and one unit after another.

        Days, weeks and months begin at the local time of `began`; a month without its day, on the last day that the
        month has. Hours have 3,600 seconds.
        """
        if self.unit == "hour":
            start = now - (now - began) % HOUR
            return CalendarPeriod(start, start + HOUR, start - HOUR)
        first = self._local(began)
        passed = self._local(now) - first
        if self.unit == "month":
            index = passed.days // 31  # at most the true one
            later: Callable[[datetime, int], datetime] = _months_later
        else:
            index = passed.days // _DAYS[self.unit]
            days = _DAYS[self.unit]

            def later(first: datetime, count: int) -> datetime:
                return first + timedelta(days=days * count)

        def begin(count: int) -> int:
            return began if count == 0 else self.instant(later(first, count))

        return _containing(begin, index, now)

    def instant(self, local: datetime) -> int:
        """Return the first instant at which local clocks show `local` (without a zone) or later."""
        # Of a time that clocks show twice, fold=0 is the first.
        found = _seconds(local.replace(tzinfo=self.zone, fold=0))
        if self._local(found) == local:
            return found
        # Clocks skip this time. With the offset after the change it would be before it (fold=1), and vice versa.
        return self._first(
            lambda at: self._local(at) >= local, _seconds(local.replace(tzinfo=self.zone, fold=1)), found
        )

    def _days(self, now: int) -> CalendarPeriod:
        local = self._local(now)
        midnight = local.replace(hour=0, minute=0, second=0)
        if self.unit == "month":
            first = midnight.replace(day=1)
            return _containing(lambda count: self.instant(_months_later(first, count)), 0, now)
        days = _DAYS[self.unit]
        monday = midnight - timedelta(days=midnight.weekday() if self.unit == "week" else 0)
        return _containing(lambda count: self.instant(monday + timedelta(days=days * count)), 0, now)

    def _hour(self, now: int) -> CalendarPeriod:
        start, end = self._hour_of(now)
        return CalendarPeriod(start, end, self._hour_of(start - 1)[0])

    def _hour_of(self, now: int) -> tuple[int, int]:
        offset = self._offset(now)
        start = now - (now + offset) % HOUR
        end = start + HOUR
        if self._offset(start) != offset:  # clocks were changed within this hour
            start = self._first(lambda at: self._offset(at) == offset, start, now)
        if self._offset(end - 1) != offset:
            end = self._first(lambda at: self._offset(at) != offset, now, end - 1)
        return start, end

    def _local(self, at: int) -> datetime:
        """Return the local time at an instant, without its zone."""
        return datetime.fromtimestamp(at, self.zone).replace(tzinfo=None, fold=0)

    def _offset(self, at: int) -> int:
        offset = datetime.fromtimestamp(at, self.zone).utcoffset()
        return 0 if offset is None else offset // timedelta(seconds=1)

    @staticmethod
    def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
        """Return the first instant after `low` at which a condition holds; it does at `high`, and stays true."""
        while high - low > 1:
            middle = (low + high) // 2
            if holds(middle):
                high = middle
            else:
                low = middle
        return high


def _containing(begin: Callable[[int], int], index: int, now: int) -> CalendarPeriod:
    """Return the period that contains `now`; `begin` gives when each begins, and `index` is one that is near."""
    start, end = begin(index), begin(index + 1)
    while now >= end:
        index += 1
        start, end = end, begin(index + 1)
    while now < start:
        index -= 1
        start, end = begin(index), start
    earlier = begin(index - 1)
    while earlier == start:  # a skipped date has no period
        index -= 1
        earlier = begin(index - 1)
    return CalendarPeriod(start, end, earlier)


def _months_later(first: datetime, count: int) -> datetime:
    years, month = divmod(first.year * 12 + first.month - 1 + count, 12)
    month += 1
    return first.replace(year=years, month=month, day=min(first.day, calendar.monthrange(years, month)[1]))


def _seconds(local: datetime) -> int:
    return int((local.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1))
