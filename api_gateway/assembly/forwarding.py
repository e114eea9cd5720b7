"""Builds the terms of forwarding fields from their section."""

from api_gateway.http1.forwarded import Forwarding
from api_gateway.settings.addresses import ForwardedSection


def forwarding_of(section: ForwardedSection) -> Forwarding:
    """Return which field reports clients, and which forms upstreams get."""
    return Forwarding(section.read.encode(), section.send != "forwarded", section.send != "x-forwarded")
