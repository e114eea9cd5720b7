"""The context that all connections of one running server share."""

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.server import ServerState


@dataclass(frozen=True, slots=True)
class ServerContext:
    """The application and its root path, uvicorn's state, the state of the application's lifespan, and the loop."""

    app: Any
    root_path: str
    state: ServerState
    app_state: dict[str, Any]
    loop: asyncio.AbstractEventLoop
