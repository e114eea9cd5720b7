"""Quantities as people write them: durations such as `10s`, sizes such as `64KiB`, and rates such as `5/min`.

Each function returns plain numbers unchanged, also as text, so that numbers keep their meaning: seconds, bytes, and
tokens per second.
"""

import re
from fractions import Fraction
from typing import Any

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_SECONDS = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600), "d": Fraction(86_400)}
_BYTES = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_PERIODS = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "day": 86_400}

# The forms of the texts, as regular expressions of JSON Schema.
DURATION_TEXT = rf"^({_NUMBER} ?(ms|s|m|h|d))+$"
SIZE_TEXT = rf"^{_NUMBER} ?([KkMmGg]i?)?[Bb]$"
RATE_TEXT = rf"^{_NUMBER} ?/ ?(s|sec|second|m|min|minute|h|hour|day)$"
NUMBER_TEXT = r"^[+-]?([0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"

_PART = re.compile(rf"({_NUMBER}) ?(ms|s|m|h|d)")
_SIZE = re.compile(rf"({_NUMBER}) ?((?:[kmg]i?)?b)", re.IGNORECASE)
_RATE = re.compile(rf"({_NUMBER}) ?/ ?([a-z]+)")


def seconds_of(value: Any) -> Any:
    """Return the seconds of a duration such as `500ms`, `10s`, `5m` or `1h30m`. Raises ValueError."""
    if not _is_quantity(value):
        return value
    if re.fullmatch(DURATION_TEXT, value) is None:
        raise ValueError("must be seconds, or a duration such as 500ms, 10s, 5m or 1h")
    return float(sum(Fraction(number) * _SECONDS[unit] for number, unit in _PART.findall(value)))


def bytes_of(value: Any) -> Any:
    """Return the bytes of a size such as `64KiB` (1024 bytes each) or `10MB` (1000 * 1000 each). Raises ValueError."""
    if not _is_quantity(value):
        return value
    found = _SIZE.fullmatch(value)
    size = None if found is None else Fraction(found[1]) * _BYTES[found[2].lower()]
    if size is None or size.denominator != 1:
        raise ValueError("must be a whole number of bytes, or a size such as 64KiB or 10MB")
    return int(size)


def rate_of(value: Any) -> Any:
    """Return the rate per second of a rate such as `10/s`, `5/min` or `100/hour`. Raises ValueError."""
    if not _is_quantity(value):
        return value
    found = _RATE.fullmatch(value)
    if found is None or found[2] not in _PERIODS:
        raise ValueError("must be a number per second, or a rate such as 10/s, 5/min or 100/hour")
    return float(Fraction(found[1]) / _PERIODS[found[2]])


def _is_quantity(value: Any) -> bool:
    """Return whether a value is text other than a number; a number is left to the validation that follows."""
    return isinstance(value, str) and re.fullmatch(NUMBER_TEXT, value.strip()) is None
