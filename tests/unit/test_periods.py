"""Calendar periods: no gap, no overlap, and the boundaries that people expect."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from api_gateway.limits.periods import HOUR, PERIOD_LENGTHS, UNITS, Calendar, CalendarPeriod, Unit
from api_gateway.settings.limits import TimeZone
from tests.cases import each

ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/Sao_Paulo",
    "America/St_Johns",
    "America/Havana",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
    "Pacific/Apia",
    "Pacific/Kwajalein",
    "Africa/Monrovia",
)


def at(text: str, zone: str = "UTC", fold: int = 0) -> int:
    """Return the instant of a local time."""
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp())


def bounds(unit: Unit, zone: str, now: int) -> tuple[str, str]:
    """Return start and end of the period that contains `now`, in UTC."""
    period = Calendar(unit, ZoneInfo(zone)).at(now)
    return _text(period.start), _text(period.end)


def _text(instant: int) -> str:
    return datetime.fromtimestamp(instant, UTC).strftime("%Y-%m-%d %H:%M:%S")


@each(
    ("unit", "zone", "now", "start", "end"),
    [
        ("month", "UTC", "2027-01-31 23:59:59", "2027-01-01 00:00:00", "2027-02-01 00:00:00"),
        ("month", "UTC", "2028-02-29 12:00:00", "2028-02-01 00:00:00", "2028-03-01 00:00:00"),
        ("month", "UTC", "2027-12-31 23:59:59", "2027-12-01 00:00:00", "2028-01-01 00:00:00"),
        ("day", "UTC", "2028-02-29 12:00:00", "2028-02-29 00:00:00", "2028-03-01 00:00:00"),
        ("week", "UTC", "2027-01-03 23:59:59", "2026-12-28 00:00:00", "2027-01-04 00:00:00"),
        ("week", "UTC", "2027-01-04 00:00:00", "2027-01-04 00:00:00", "2027-01-11 00:00:00"),
        # In Berlin, the last Sunday of March has 23 hours, that of October 25.
        ("day", "Europe/Berlin", "2027-03-28 12:00:00", "2027-03-27 23:00:00", "2027-03-28 22:00:00"),
        ("day", "Europe/Berlin", "2027-10-31 12:00:00", "2027-10-30 22:00:00", "2027-10-31 23:00:00"),
        ("month", "Europe/Berlin", "2027-03-31 21:59:59", "2027-02-28 23:00:00", "2027-03-31 22:00:00"),
        ("week", "Europe/Berlin", "2027-03-28 12:00:00", "2027-03-21 23:00:00", "2027-03-28 22:00:00"),
        ("day", "America/New_York", "2027-03-14 12:00:00", "2027-03-14 05:00:00", "2027-03-15 04:00:00"),
        ("day", "America/New_York", "2027-11-07 12:00:00", "2027-11-07 04:00:00", "2027-11-08 05:00:00"),
        # The hour that Berlin's clocks repeat (02 to 03) is two periods.
        ("hour", "Europe/Berlin", "2027-10-31 00:30:00", "2027-10-31 00:00:00", "2027-10-31 01:00:00"),
        ("hour", "Europe/Berlin", "2027-10-31 01:30:00", "2027-10-31 01:00:00", "2027-10-31 02:00:00"),
        # Lord Howe Island changes its clocks by 30 minutes at 2:00: to 1:30 in April, to 2:30 in October.
        ("hour", "Australia/Lord_Howe", "2027-04-03 14:59:59", "2027-04-03 14:00:00", "2027-04-03 15:00:00"),
        ("hour", "Australia/Lord_Howe", "2027-04-03 15:10:00", "2027-04-03 15:00:00", "2027-04-03 15:30:00"),
        ("hour", "Australia/Lord_Howe", "2027-10-02 15:29:59", "2027-10-02 14:30:00", "2027-10-02 15:30:00"),
        ("hour", "Australia/Lord_Howe", "2027-10-02 15:40:00", "2027-10-02 15:30:00", "2027-10-02 16:00:00"),
        ("day", "Australia/Lord_Howe", "2027-04-04 00:00:00", "2027-04-03 13:00:00", "2027-04-04 13:30:00"),
        ("day", "Australia/Lord_Howe", "2027-10-03 00:00:00", "2027-10-02 13:30:00", "2027-10-03 13:00:00"),
        # Samoa had no 30 December 2011.
        ("day", "Pacific/Apia", "2011-12-30 09:59:59", "2011-12-29 10:00:00", "2011-12-30 10:00:00"),
        ("day", "Pacific/Apia", "2011-12-30 10:00:00", "2011-12-30 10:00:00", "2011-12-31 10:00:00"),
        ("week", "Pacific/Apia", "2011-12-31 00:00:00", "2011-12-26 10:00:00", "2012-01-01 10:00:00"),
        ("month", "Pacific/Apia", "2011-12-31 00:00:00", "2011-12-01 10:00:00", "2011-12-31 10:00:00"),
        # In Sao Paulo, 21 October 2012 began at 1:00, and 24 hours of 25 February 2012 were followed by one more.
        ("day", "America/Sao_Paulo", "2012-10-21 12:00:00", "2012-10-21 03:00:00", "2012-10-22 02:00:00"),
        ("day", "America/Sao_Paulo", "2012-02-26 02:30:00", "2012-02-25 02:00:00", "2012-02-26 03:00:00"),
        # In Havana, clocks are set from 1:00 to 0:00, so the day has two midnights.
        ("day", "America/Havana", "2027-11-07 05:30:00", "2027-11-07 04:00:00", "2027-11-08 05:00:00"),
        # In Newfoundland, clocks were set from 0:01 back to the day before.
        ("day", "America/St_Johns", "2010-11-07 02:45:00", "2010-11-07 02:30:00", "2010-11-08 03:30:00"),
        # So the hour that had begun then has one minute.
        ("hour", "America/St_Johns", "2010-11-07 02:30:30", "2010-11-07 02:30:00", "2010-11-07 02:31:00"),
        ("hour", "America/St_Johns", "2010-11-07 02:31:00", "2010-11-07 02:31:00", "2010-11-07 03:30:00"),
        ("hour", "Asia/Kathmandu", "2027-01-01 00:20:00", "2027-01-01 00:15:00", "2027-01-01 01:15:00"),
    ],
)
def test_the_period_of_an_instant_is_the_one_that_a_calendar_shows(
    unit: Unit, zone: str, now: str, start: str, end: str
) -> None:
    assert bounds(unit, zone, at(now)) == (start, end)


@each(
    ("unit", "zone", "began", "begins"),
    [
        # The 31st, in months that have none; each from the first, not from the month before.
        (
            "month",
            "UTC",
            "2027-01-31 08:00:00",
            ["2027-01-31 08:00:00", "2027-02-28 08:00:00", "2027-03-31 08:00:00", "2027-04-30 08:00:00"],
        ),
        ("month", "UTC", "2028-01-30 00:00:00", ["2028-01-30 00:00:00", "2028-02-29 00:00:00", "2028-03-30 00:00:00"]),
        # The same local time in winter and summer.
        (
            "month",
            "Europe/Berlin",
            "2027-02-28 09:00:00",
            ["2027-02-28 09:00:00", "2027-03-28 08:00:00", "2027-04-28 08:00:00"],
        ),
        # 2:30 does not exist on 28 March 2027 in Berlin: the day begins when clocks show 3:00.
        (
            "day",
            "Europe/Berlin",
            "2027-03-27 01:30:00",
            ["2027-03-27 01:30:00", "2027-03-28 01:00:00", "2027-03-29 00:30:00"],
        ),
        # Begun at the second 2:30 of 31 October.
        ("day", "Europe/Berlin", "2027-10-31 01:30:00", ["2027-10-31 01:30:00", "2027-11-01 01:30:00"]),
        ("week", "America/New_York", "2027-03-10 12:00:00", ["2027-03-10 12:00:00", "2027-03-17 11:00:00"]),
        ("hour", "Europe/Berlin", "2027-03-28 00:59:30", ["2027-03-28 00:59:30", "2027-03-28 01:59:30"]),
        ("month", "UTC", "2028-02-29 00:00:00", ["2028-02-29 00:00:00", "2028-03-29 00:00:00", "2028-04-29 00:00:00"]),
    ],
)
def test_periods_from_a_start_keep_its_day_and_local_time(
    unit: Unit, zone: str, began: str, begins: list[str]
) -> None:
    calendar, first = Calendar(unit, ZoneInfo(zone)), at(began)
    now, found = first, []
    for _ in begins:
        period = calendar.since(first, now)
        assert period.start == now
        found.append(_text(period.start))
        now = period.end
    assert found == begins


def test_a_leap_day_as_start_is_the_last_of_february_in_other_years() -> None:
    calendar, began = Calendar("month", ZoneInfo("UTC")), at("2028-02-29 00:00:00")
    assert _text(calendar.since(began, at("2029-02-28 12:00:00")).start) == "2029-02-28 00:00:00"
    assert _text(calendar.since(began, at("2032-02-29 12:00:00")).start) == "2032-02-29 00:00:00"


instants = st.integers(at("1960-01-01 00:00:00"), at("2040-01-01 00:00:00"))


@given(st.sampled_from(UNITS), st.sampled_from(ZONES), instants)
@example("day", "Pacific/Apia", at("2011-12-30 10:00:00"))
@example("hour", "Africa/Monrovia", at("1972-01-07 00:44:30"))
@settings(deadline=None)
def test_periods_have_neither_gap_nor_overlap(unit: Unit, zone: str, now: int) -> None:
    calendar = Calendar(unit, ZoneInfo(zone))
    period = calendar.at(now)
    assert period.start <= now < period.end
    # A fresh object remembers nothing.
    for inside in (period.start, period.end - 1):
        assert Calendar(unit, ZoneInfo(zone)).at(inside) == period
    after = Calendar(unit, ZoneInfo(zone)).at(period.end)
    assert (after.start, after.earlier) == (period.end, period.start)
    assert calendar.at(period.start - 1)[:2] == (period.earlier, period.start)
    assert (
        period.end - period.start <= PERIOD_LENGTHS[unit] + 25 * HOUR
    )  # more than the usual only where a date is repeated


@given(st.sampled_from(UNITS), st.sampled_from(ZONES), instants, instants)
@settings(deadline=None)
def test_periods_from_a_start_have_neither_gap_nor_overlap(unit: Unit, zone: str, began: int, now: int) -> None:
    calendar = Calendar(unit, ZoneInfo(zone))
    period = calendar.since(began, now)
    assert period.start <= now < period.end
    assert calendar.since(began, period.start) == period
    assert calendar.since(began, period.end - 1) == period
    after = calendar.since(began, period.end)
    assert (after.start, after.earlier) == (period.end, period.start)
    assert calendar.since(began, began).start == began


@given(st.sampled_from(("day", "week", "month")), st.sampled_from(ZONES), instants)
@settings(deadline=None)
def test_a_date_belongs_to_one_period(unit: Unit, zone: str, now: int) -> None:
    """All instants of a period have its dates, except where clocks return to the date before."""
    calendar, info = Calendar(unit, ZoneInfo(zone)), ZoneInfo(zone)
    period = calendar.at(now)
    first, last = (datetime.fromtimestamp(one, info) for one in (period.start, period.end - 1))
    if unit == "day":
        assert first.date() == last.date() or zone == "America/St_Johns"
    elif unit == "week":
        assert last.date() - first.date() <= timedelta(days=7)
    else:
        assert first.day == 1 or zone == "America/St_Johns"


def test_a_year_of_days_has_365_of_them() -> None:
    for zone in ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"):
        calendar, now, days = Calendar("day", ZoneInfo(zone)), at("2027-01-01 00:00:00", zone), 0
        lengths = set()
        while now < at("2028-01-01 00:00:00", zone):
            period = calendar.at(now)
            lengths.add((period.end - period.start) / HOUR)
            now, days = period.end, days + 1
        assert days == 365
        assert lengths == {"UTC": {24}, "Australia/Lord_Howe": {23.5, 24, 24.5}}.get(zone, {23, 24, 25})


def test_the_hours_of_a_day_are_its_length() -> None:
    for zone, day, count in (
        ("Europe/Berlin", "2027-03-28 12:00:00", 23),
        ("Europe/Berlin", "2027-10-31 12:00:00", 25),
        ("Australia/Lord_Howe", "2027-04-04 12:00:00", 25),  # one of them has 30 minutes
    ):
        whole = Calendar("day", ZoneInfo(zone)).at(at(day, zone))
        hours, begins = Calendar("hour", ZoneInfo(zone)), [whole.start]
        while begins[-1] < whole.end:
            begins.append(hours.at(begins[-1]).end)
        assert begins[-1] == whole.end
        assert len(begins) - 1 == count
        assert all(0 < later - earlier <= HOUR for earlier, later in pairwise(begins))


def test_an_unknown_zone_is_an_error_that_names_it() -> None:
    zone = TypeAdapter(TimeZone)
    assert zone.validate_python("Europe/Berlin") == "Europe/Berlin"
    for name in ("Mars/Olympus", "", "../etc/passwd", "Europe", "/etc/localtime", "a\0b", "x" * 60):
        with pytest.raises(ValidationError, match="no such time zone"):
            zone.validate_python(name)
    with pytest.raises(ValidationError, match="at most 64"):
        zone.validate_python("x" * 300)


def test_a_calendar_shows_its_unit_and_zone() -> None:
    assert repr(Calendar("month", ZoneInfo("Europe/Berlin"))) == "<Calendar [month, Europe/Berlin]>"
    assert Calendar("month", ZoneInfo("UTC")).at(0) == CalendarPeriod(0, 31 * 24 * HOUR, -31 * 24 * HOUR)
