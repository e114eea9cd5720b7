"""What a worker is told when it starts: the configuration as the supervisor has read it, and what it inherits.

The configuration is handed over and not read again, so that a worker that takes another's place in the middle of an
edit of the file is what the others are. It travels through a pipe: it may hold a secret.
"""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

# Modules are looked for where the supervisor finds them, however it was started.
ENTRY = (
    "import json, sys; brief = json.load(sys.stdin); sys.path[:] = brief['path'];"
    " from api_gateway.process.worker import main; raise SystemExit(main(brief))"
)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """`config` is what `hand_over` returns; the others are file descriptors, `admin_listeners` those for operators."""

    number: int
    config: dict[str, Any]
    channel: int
    listeners: list[int]
    admin_listeners: list[int]

    def encode(self) -> bytes:
        """Return what `ENTRY` reads."""
        return json.dumps({"path": sys.path, **asdict(self)}).encode()
