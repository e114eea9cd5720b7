"""A configuration as JSON can hold it, for a process that is handed one and does not read it again."""

from typing import Any

from api_gateway.config import DEFAULT_TIERS, GatewayConfig, from_values
from api_gateway.settings.secret import revealed


def serialized(config: GatewayConfig, sections: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with `sections` in place of its own, as JSON can hold it. It shows the secrets."""
    values: dict[str, Any] = revealed(config.model_dump(), config.model_dump(mode="json"))
    values["tiers"] |= {name: None for name in DEFAULT_TIERS if name not in config.tiers}  # removed ones stay removed
    return values | sections


def deserialized(values: dict[str, Any]) -> GatewayConfig:
    """Return the configuration that was handed over."""
    return from_values(values)
