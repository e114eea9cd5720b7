"""Times in views: UTC in ISO 8601 with milliseconds."""

from datetime import UTC, datetime

from api_gateway.system.clocks import Moment


def utc(at: float, now: Moment) -> str:
    """Return a monotonic time, in seconds, as UTC wall-clock time in ISO 8601 with milliseconds."""
    return wall_time(now.wall_of(at))


def wall_time(at: float) -> str:
    """Return seconds since the epoch as UTC in ISO 8601 with milliseconds."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
