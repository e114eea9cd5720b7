"""A rate-limiting API gateway: exact token buckets per client, circuit breakers per upstream, metrics."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["GatewayConfig", "__version__", "create_app", "load_config"]

if TYPE_CHECKING:
    from api_gateway.config import GatewayConfig, load_config
    from api_gateway.main import create_app
else:
    _MODULES = {
        "GatewayConfig": "api_gateway.config",
        "load_config": "api_gateway.config",
        "create_app": "api_gateway.main",
    }

    def __getattr__(name: str) -> object:
        """Import what the package offers when it is first asked for: it takes seconds; see `held_signals`."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value
