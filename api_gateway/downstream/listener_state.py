"""The state that all connections of one listener share: limits, slots and counters."""

from collections import Counter

from api_gateway.downstream.connection_limits import ConnectionLimits
from api_gateway.downstream.slots import ConnectionSlots
from api_gateway.models import HeaderList


class ListenerState:
    """The limits of new connections, which keep them, the slots in use, and the refusals by reason.

    `secure_fields` are header fields of all responses over TLS.
    """

    def __init__(self, limits: ConnectionLimits, refused: Counter[str], slots: ConnectionSlots) -> None:
        self.limits = limits
        self.refused = refused
        self.slots = slots
        self.secure_fields: HeaderList = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} [{self.slots!r}]>"
