"""Batches of operations for a cluster: one `ScriptBatcher`, with its own circuit breaker, for each node.

A failed node affects only the buckets on it: operations on them fail at once. After every error the nodes are
discovered again, because another may have taken over.
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

DISCOVERY_INTERVAL = 10.0  # seconds between two discoveries of the nodes
DISCOVERY_DELAY = 1.0  # seconds before a discovery, which takes 5 ms of the event loop's time


class ClusterScriptBatcher:
    """Sends the operations of one process to the nodes of a cluster. Has the interface of `ScriptBatcher`."""

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
        """See `ScriptBatcher`. `on_error` is called for errors of nodes that were connected before."""
        self._session = session
        self._make = partial(ScriptBatcher, session, script, deadline=deadline, clock=clock, source=source)
        self._on_error = on_error
        self._nodes: dict[str, ScriptBatcher] = {}
        self._retired_counts = [0, 0, 0]  # batches, operations and failures of removed nodes
        self._discovery_due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._error: str | None = None

    def __repr__(self) -> str:
        usable = sum(node.is_usable for node in self._nodes.values())
        return f"<ClusterScriptBatcher [{usable} of {len(self._nodes)} nodes]>"

    @property
    def is_usable(self) -> bool:
        """True while some node is usable."""
        return any(node.is_usable for node in self._nodes.values())

    @property
    def is_whole(self) -> bool:
        """True while all nodes are known and usable."""
        return bool(self._nodes) and all(node.is_usable for node in self._nodes.values())

    @property
    def connections(self) -> int:
        """Number of usable connections to all nodes."""
        return sum(node.connections for node in self._nodes.values())

    @property
    def calls(self) -> int:
        """Number of calls with a response in time."""
        return self._retired_counts[0] + sum(node.calls for node in self._nodes.values())

    @property
    def operations(self) -> int:
        """Number of operations in these calls."""
        return self._retired_counts[1] + sum(node.operations for node in self._nodes.values())

    @property
    def failures(self) -> int:
        """Number of calls without a response in time, and of failed attempts to connect."""
        return self._retired_counts[2] + sum(node.failures for node in self._nodes.values())

    @property
    def last_error(self) -> str | None:
        """The last error of a node, of an unusable one first; None if there was none."""
        nodes = sorted(self._nodes.values(), key=lambda node: node.is_usable)
        return next((node.last_error for node in nodes if node.last_error), self._error)

    async def start(self) -> None:
        """Connect to all nodes, and discover nodes until `close`. Returns after each has responded or failed."""
        await self._discover()
        self._task = asyncio.create_task(self._run(), name="cluster nodes")

    async def close(self) -> None:
        """Disconnect; pending operations fail."""
        if self._task is not None:
            await cancel_and_wait(self._task)
        await asyncio.gather(*[node.close() for node in self._nodes.values()])

    def submit(self, op: ScriptOp) -> None:
        """Send an operation. It completes or fails within the deadline; it fails at once if its node is unusable."""
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
        """Query the nodes, and have one batcher for each."""
        try:
            names = await self._session.nodes()
        except StoreError as error:
            self._retired_counts[2] += 1
            self._error = str(error) or type(error).__name__
            self._discovery_due.set()
            logger.debug("discovery of the cluster's nodes failed", exc_info=True)
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
        """Schedule a discovery after an error, and report it unless it is a failed attempt to connect."""
        self._discovery_due.set()
        node = self._nodes.get(name)
        if node is not None and node.connections:
            self._on_error()
