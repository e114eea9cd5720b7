"""A rate-limiting API gateway: exact token buckets per client, circuit breakers per upstream, metrics.

The public names are imported at their first use, so that importing one module does not import all of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from api_gateway._version import __version__

if TYPE_CHECKING:
    from api_gateway.config import GatewayConfig, load_config
    from api_gateway.main import create_app
    from api_gateway.pacing.client_budgets import PacingTimeout
    from api_gateway.pacing.transports import PacingTransport, SyncPacingTransport

__all__ = [
    "GatewayConfig",
    "PacingTimeout",
    "PacingTransport",
    "SyncPacingTransport",
    "__version__",
    "create_app",
    "load_config",
]

_HOMES = {
    "GatewayConfig": "config",
    "PacingTimeout": "pacing.client_budgets",
    "PacingTransport": "pacing.transports",
    "SyncPacingTransport": "pacing.transports",
    "create_app": "main",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found
