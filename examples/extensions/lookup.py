"""Tells upstreams what a table knows about a client, and clients from which region they were served.

The table is a JSON file. A real extension would read a database here; the hook is a coroutine for that reason.
"""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api_gateway import RequestView, ResponseView


class Lookup:
    """Options: `table`, a JSON file with the account of each client, and `region`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._accounts: dict[str, str] = json.loads(Path(options["table"]).read_text(encoding="utf-8"))
        self._region = str(options.get("region", "local"))

    async def on_request(self, request: RequestView) -> Mapping[str, str | None]:
        """Set X-Account, and remove one that the client has sent."""
        await asyncio.sleep(0)  # where the database is asked
        client = request.client
        return {"X-Account": None if client is None else self._accounts.get(client.id)}

    def on_response(self, request: RequestView, response: ResponseView) -> Mapping[str, str | None]:  # noqa: ARG002
        """Set X-Region, and hide which software responded."""
        return {"X-Region": self._region, "Server": None}
