"""Responds with 503 to everything while a file exists: `touch maintenance` switches the maintenance on."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from api_gateway import RequestView, Respond


class Maintenance:
    """Options: `file`, whose existence is the switch, and `retry_after`, in seconds (120)."""

    def __init__(self, options: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._file = Path(options["file"])
        self._retry_after = int(options.get("retry_after", 120))
        self._clock = clock
        self._checked = float("-inf")
        self._is_on = False

    def on_request(self, request: RequestView) -> Respond | None:  # noqa: ARG002 - all requests are treated alike
        """Look for the file once a second."""
        now = self._clock()
        if now >= self._checked + 1:
            self._is_on, self._checked = self._file.exists(), now
        if not self._is_on:
            return None
        return Respond(503, "Down for maintenance.\n", {"Retry-After": str(self._retry_after)})
