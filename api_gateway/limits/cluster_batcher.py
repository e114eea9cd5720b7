"""Asks a store that is divided among several servers: each has a dispatcher, and a breaker, of its own.

So a server that fails takes with it the buckets that lie on it, and no others: questions for them are given up at
once. Which server a bucket lies on is asked again after every trouble, for another may have taken over.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.limits.script_batcher import ScriptBatcher, ScriptOp, fail_op
from api_gateway.models import Clock
from api_gateway.storage.redis_session import Script, StoreError, StoreSession

logger = logging.getLogger(__name__)

DISCOVERY_INTERVAL = 10.0  # seconds between two looks at which servers there are
DISCOVERY_DELAY = 1.0  # seconds before one after trouble; it takes 5 ms of the event loop's time


class ClusterScriptBatcher:
    """Asks a cluster on behalf of one process. See `ScriptBatcher`."""

    def __init__(
        self,
        session: StoreSession,
        script: Script,
        *,
        deadline: float,
        clock: Clock,
        source: random.Random,
        on_error: Callable[[], None],
    ) -> None:
        """Take what a `ScriptBatcher` does. `on_trouble` is called when something breaks that was well before."""
        self._session = session
        self._make = partial(ScriptBatcher, session, script, deadline=deadline, clock=clock, source=source)
        self._on_error = on_error
        self._nodes: dict[str, ScriptBatcher] = {}
        self._retired_counts = [0, 0, 0]  # what those have counted that are gone: see `_count`
        self._discovery_due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._error: str | None = None

    def __repr__(self) -> str:
        usable = sum(node.is_usable for node in self._nodes.values())
        return f"<ClusterScriptBatcher [{usable} of {len(self._nodes)} nodes]>"

    @property
    def is_usable(self) -> bool:
        """True while a question has a chance of being answered in time, on some node."""
        return any(node.is_usable for node in self._nodes.values())

    @property
    def is_whole(self) -> bool:
        """True while that holds for every question."""
        return bool(self._nodes) and all(node.is_usable for node in self._nodes.values())

    @property
    def connections(self) -> int:
        """Connections that serve, to all nodes."""
        return sum(node.connections for node in self._nodes.values())

    @property
    def calls(self) -> int:
        """Calls that were answered in time."""
        return self._retired_counts[0] + sum(node.calls for node in self._nodes.values())

    @property
    def operations(self) -> int:
        """Questions in them."""
        return self._retired_counts[1] + sum(node.operations for node in self._nodes.values())

    @property
    def failures(self) -> int:
        """Calls that were not, and attempts to connect."""
        return self._retired_counts[2] + sum(node.failures for node in self._nodes.values())

    @property
    def last_error(self) -> str | None:
        """What a node that is not well failed with, or else any."""
        nodes = sorted(self._nodes.values(), key=lambda node: node.is_usable)
        return next((node.last_error for node in nodes if node.last_error), self._error)

    async def start(self) -> None:
        """Connect to all nodes, and go on following them until `close`. Returns once they have answered, or failed."""
        await self._discover()
        self._task = asyncio.create_task(self._run(), name="cluster nodes")

    async def close(self) -> None:
        """Disconnect. What still waits is answered with a failure."""
        if self._task is not None:
            await cancel_and_wait(self._task)
        await asyncio.gather(*[node.close() for node in self._nodes.values()])

    def submit(self, op: ScriptOp) -> None:
        """Have a question answered, or failed, within the deadline; at once if its node cannot be used."""
        node = self._nodes.get(self._session.node_of(op.key))
        if node is None:
            self._discovery_due.set()
        if node is not None and node.is_usable:
            node.submit(op)
        else:
            asyncio.get_running_loop().call_soon(fail_op, op)

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(DISCOVERY_INTERVAL):
                    await self._discovery_due.wait()
            await asyncio.sleep(DISCOVERY_DELAY)
            self._discovery_due.clear()
            await self._discover()

    async def _discover(self) -> None:
        """Have a dispatcher for every node there is."""
        try:
            names = await self._session.nodes()
        except StoreError as error:
            self._retired_counts[2] += 1
            self._error = str(error) or type(error).__name__
            self._discovery_due.set()
            logger.debug("the nodes of the cluster are not known", exc_info=True)
            return
        removed = [self._nodes.pop(name) for name in set(self._nodes) - names]
        new = {name: self._make(on_error=partial(self._note, name), node=name) for name in names - set(self._nodes)}
        self._nodes |= new
        await asyncio.gather(*[node.start() for node in new.values()], *[node.close() for node in removed])
        for node in removed:
            self._retired_counts = [
                self._retired_counts[0] + node.calls,
                self._retired_counts[1] + node.operations,
                self._retired_counts[2] + node.failures,
            ]

    def _note(self, name: str) -> None:
        """See to it that another server is found, if one has taken over; attempts to connect are no news."""
        self._discovery_due.set()
        node = self._nodes.get(name)
        if node is not None and node.connections:
            self._on_error()
