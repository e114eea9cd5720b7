"""The limits of a downstream connection."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of one downstream connection, in bytes, lines and seconds.

    `connections_per_peer` 0 means unlimited. `body_rate` is the minimum rate of a request body in bytes per second, 0
    for none; `body_grace` is the time in seconds by which a body may be behind that rate. `drain_linger` is the time
    for which an idle connection accepts one more request during a drain.
    """

    header_bytes: int
    header_lines: int
    header_timeout: float
    keep_alive_timeout: float
    idle_timeout: float
    drain_linger: float
    connections_per_peer: int
    body_rate: float
    body_grace: float
