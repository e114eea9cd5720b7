"""A rate-limiting API gateway: exact token buckets per client, circuit breakers per upstream, metrics.

The public names are imported at their first use, so that importing one module does not import all of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from api_gateway._version import __version__

if TYPE_CHECKING:
    from api_gateway.config import GatewayConfig, load_config
    from api_gateway.extensions.interface import (
        CostHook,
        IdentifyHook,
        Identity,
        RequestClient,
        RequestHook,
        RequestView,
        Respond,
        ResponseHook,
        ResponseView,
    )
    from api_gateway.main import create_app
    from api_gateway.pacing.client_budgets import PacingTimeout
    from api_gateway.pacing.transports import PacingTransport, SyncPacingTransport
    from api_gateway.settings.clients import ClientSection as Client
    from api_gateway.settings.clients import TierSection as Tier
    from api_gateway.settings.diagnostics import ConfigError
    from api_gateway.settings.extensions import ExtensionSection as Extension
    from api_gateway.settings.routes import RouteSection as Route
    from api_gateway.settings.upstream_object import TypedUpstream as Upstream
    from api_gateway.settings.upstreams import TargetSection as Target

__all__ = [
    "Client",
    "ConfigError",
    "CostHook",
    "Extension",
    "GatewayConfig",
    "IdentifyHook",
    "Identity",
    "PacingTimeout",
    "PacingTransport",
    "RequestClient",
    "RequestHook",
    "RequestView",
    "Respond",
    "ResponseHook",
    "ResponseView",
    "Route",
    "SyncPacingTransport",
    "Target",
    "Tier",
    "Upstream",
    "__version__",
    "create_app",
    "load_config",
]

_HOMES = {
    "Client": "settings.clients:ClientSection",
    "ConfigError": "settings.diagnostics:ConfigError",
    "CostHook": "extensions.interface:CostHook",
    "Extension": "settings.extensions:ExtensionSection",
    "GatewayConfig": "config:GatewayConfig",
    "IdentifyHook": "extensions.interface:IdentifyHook",
    "Identity": "extensions.interface:Identity",
    "PacingTimeout": "pacing.client_budgets:PacingTimeout",
    "PacingTransport": "pacing.transports:PacingTransport",
    "RequestClient": "extensions.interface:RequestClient",
    "RequestHook": "extensions.interface:RequestHook",
    "RequestView": "extensions.interface:RequestView",
    "Respond": "extensions.interface:Respond",
    "ResponseHook": "extensions.interface:ResponseHook",
    "ResponseView": "extensions.interface:ResponseView",
    "Route": "settings.routes:RouteSection",
    "SyncPacingTransport": "pacing.transports:SyncPacingTransport",
    "Target": "settings.upstreams:TargetSection",
    "Tier": "settings.clients:TierSection",
    "Upstream": "settings.upstream_object:TypedUpstream",
    "create_app": "main:create_app",
    "load_config": "config:load_config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own = _HOMES[name].partition(":")
    found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), own)
    return found
