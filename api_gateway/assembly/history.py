"""The limits of the history of requests under a configuration."""

from api_gateway.config import GatewayConfig
from api_gateway.observability.request_history import HistoryLimits


def history_limits(config: GatewayConfig) -> HistoryLimits:
    """Return the limits; nothing is kept while the history is disabled."""
    section = config.history
    if not section.enabled:
        return HistoryLimits(0, 0, 0, section.max_bytes, section.max_age)
    return HistoryLimits(
        section.successes,
        section.refusals,
        section.errors,
        section.max_bytes,
        section.max_age,
        (section.successes_per_second, section.refusals_per_second, section.errors_per_second),
    )
