"""Builds `Forwarding` from its section: the field that is read, and the forms that are sent."""

from api_gateway.http1.forwarded import Forwarding
from api_gateway.settings.addresses import ForwardedSection


def forwarding_of(section: ForwardedSection) -> Forwarding:
    """Return which field reports clients, and which forms upstreams get."""
    return Forwarding(section.read.encode(), section.send != "forwarded", section.send != "x-forwarded")
