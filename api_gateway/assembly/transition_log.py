"""Logs the transitions of circuit breakers: those of upstreams, and the ejections and returns of targets."""

import logging

from api_gateway.resilience.breaker_history import Transition
from api_gateway.resilience.breaker_policy import Mode
from api_gateway.upstreams.target import Target

logger = logging.getLogger(__name__)


def log_transition(upstream: str, transition: Transition) -> None:
    """Log a transition of the breaker of an upstream."""
    level = logging.WARNING if transition.target == "OPEN" else logging.INFO
    logger.log(
        level,
        "circuit breaker %s%s: %s -> %s: %s",
        upstream,
        " (mode observe)" if transition.mode is Mode.OBSERVE else "",
        transition.source,
        transition.target,
        transition.cause,
    )


def log_target_transition(upstream: str, target: Target, transition: Transition) -> None:
    """Log that a target is ejected, or returns."""
    if transition.target == "OPEN":
        words = "is" if transition.source == "CLOSED" else "stays"
        logger.warning("upstream %s: target %s %s ejected: %s", upstream, target.url, words, transition.cause)
    else:
        logger.info("upstream %s: target %s returns: %s", upstream, target.url, transition.cause)
