"""A configuration in JSON's types, for workers, which get it from the supervisor and do not read files."""

import hashlib
import json
from typing import Any

from api_gateway.config import DEFAULT_TIERS, GatewayConfig, from_values
from api_gateway.settings.secret import revealed

_ORIGINS = "origins of settings"  # no setting has this name


def serialized(config: GatewayConfig, sections: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration in JSON's types, with `sections` replacing its own. It shows the secrets."""
    values: dict[str, Any] = revealed(config.model_dump(), config.model_dump(mode="json"))
    values["tiers"] |= {
        name: None for name in DEFAULT_TIERS if name not in config.tiers
    }  # None removes a default tier
    values[_ORIGINS] = [[list(key_path), origin] for key_path, origin in config.origins.items()]
    return values | sections


def configuration_digest(config: GatewayConfig) -> str:
    """Return 16 hexadecimal digits that are the same for equal configurations, on all machines.

    The state folder does not count, because each machine may have its own, nor do the values of secrets: anyone with
    access to metrics can see the digest, and must not be able to test guesses of a secret by it.
    """
    values = config.model_dump(mode="json", exclude={"state_dir"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def deserialized(values: dict[str, Any]) -> GatewayConfig:
    """Return the configuration from the result of `serialized`."""
    given = {name: value for name, value in values.items() if name != _ORIGINS}
    return from_values(given).with_origins({tuple(key_path): origin for key_path, origin in values.get(_ORIGINS, ())})
