"""The start parameters of a worker: the configuration that the supervisor has read, and inherited descriptors.

A worker does not read the configuration itself, so that all workers have the same one, even if a
file was edited meanwhile. The parameters are sent through a pipe, because they may contain secrets.
"""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from api_gateway._version import __version__

# Workers use the module search path of the supervisor, however that was started. `collection_paused` does the same.
ENTRY = (
    "import gc, json, sys; gc.disable(); config = json.load(sys.stdin); sys.path[:] = config['path'];"
    " from api_gateway.process.worker import main; raise SystemExit(main(config))"
)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """`config` is the result of `serialized`; `channel` and the listeners are file descriptors.

    `version` is that of the supervisor. A worker of another one does not start: their messages may differ.
    """

    number: int
    config: dict[str, Any]
    channel: int
    listeners: list[int]
    admin_listeners: list[int]
    redirect_listeners: list[int]
    version: str = __version__

    def encode(self) -> bytes:
        """Return the JSON that `ENTRY` reads."""
        return json.dumps({"path": sys.path, **asdict(self)}).encode()
