"""A rate-limiting API gateway: exact token buckets per client, circuit breakers per upstream, metrics."""

__version__ = "0.1.0"

from api_gateway.config import GatewayConfig, load_config
from api_gateway.main import create_app

__all__ = ["GatewayConfig", "__version__", "create_app", "load_config"]
