"""The JSON Schema of configuration files, as text."""

import json

from api_gateway.config import GatewayConfig
from api_gateway.settings.file_schema import file_schema


def schema_text() -> str:
    """Return the schema as indented JSON with a line break at the end."""
    return json.dumps(file_schema(GatewayConfig, "Configuration of api-gateway"), indent=2) + "\n"
