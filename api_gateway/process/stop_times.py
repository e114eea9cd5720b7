"""How long a process may take to stop by its settings, and the watchdog that ends it after that."""

from api_gateway.errors import BLOCKED, DRAIN_INCOMPLETE
from api_gateway.process.watchdog import Watchdog
from api_gateway.settings.server import ServerSection

PROCESS_STOP_MARGIN = 3.0  # seconds that the process may take after its drain time


def stop_within(section: ServerSection, margin: float = PROCESS_STOP_MARGIN) -> float:
    """Return the seconds after a stop signal within which a process must have ended."""
    return section.drain_delay + section.drain_timeout + margin


def watchdog_of(section: ServerSection, margin: float = PROCESS_STOP_MARGIN) -> Watchdog:
    """Return the watchdog of a process with these settings."""
    return Watchdog(section.worker_timeout, stop_within(section, margin), blocked=BLOCKED, overdue=DRAIN_INCOMPLETE)
