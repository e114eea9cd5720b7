"""The client is the tenant in the path: `/api/TENANT/…` is a request of the client `tenant:TENANT`."""

from collections.abc import Mapping
from typing import Any

from api_gateway import Identity, RequestView


class Tenants:
    """Options: `segment`, the number of the path segment with the tenant (2), and `tiers`, by tenant."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._segment = int(options.get("segment", 2))
        self._tiers: Mapping[str, str] = options.get("tiers", {})

    def identify(self, request: RequestView) -> Identity | None:
        """Return the tenant; None for a path without one, so that the gateway identifies the client."""
        segments = request.path.split("/")
        tenant = segments[self._segment] if len(segments) > self._segment else ""
        if not tenant.isalnum() or not tenant.isascii():
            return None
        return Identity(f"tenant:{tenant}", self._tiers.get(tenant))
