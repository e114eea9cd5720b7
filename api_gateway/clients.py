"""Which client has which tier: in memory for the request path, in SQLite for the next start.

A change is written to disk first and then takes effect, so what was confirmed survives `kill -9`, and what failed
changed nothing.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from api_gateway.errors import StoreUnavailable
from api_gateway.models import Client, Quota

T = TypeVar("T")

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FILE_NAME = "clients.sqlite3"
_CLIENT, _ADDRESS = "client:", "address:"  # what the keys of their buckets begin with


class ClientStore:
    """The table of registered clients in one SQLite file (WAL, full sync), used from a thread of its own.

    Every method raises OSError when the file cannot be used.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / FILE_NAME
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="client-store")
        self._connection: sqlite3.Connection | None = None

    def __repr__(self) -> str:
        return f"<ClientStore [{self.path}]>"

    async def open(self) -> dict[str, str]:
        """Create or open the file and return its clients, id to tier. Raises OSError."""
        return await self._run(self._open)

    async def put(self, client_id: str, tier: str) -> None:
        """Store one client's tier; on return it is on disk."""
        await self._run(
            self._execute,
            "INSERT INTO clients (id, tier, changed_at) VALUES (?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET tier = excluded.tier, changed_at = excluded.changed_at",
            (client_id, tier, time.time()),
        )

    async def delete(self, client_id: str) -> None:
        """Remove one client; on return that is on disk."""
        await self._run(self._execute, "DELETE FROM clients WHERE id = ?", (client_id,))

    async def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            await self._run(self._connection.close)
            self._connection = None
        self._thread.shutdown(wait=False)

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        except (sqlite3.Error, RuntimeError) as error:  # RuntimeError: the thread has ended, the store is closed
            raise OSError(f"{self.path}: {error}") from error

    def _open(self) -> dict[str, str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=5.0, check_same_thread=False)
        try:
            clients = self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return clients

    def _prepare(self, connection: sqlite3.Connection) -> dict[str, str]:
        """Bring the file to the current schema and read it."""
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise OSError(f"{self.path} was written by a newer gateway (schema {version}, known is {SCHEMA_VERSION})")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS clients"
            " (id TEXT PRIMARY KEY, tier TEXT NOT NULL, changed_at REAL NOT NULL) WITHOUT ROWID"
        )
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return dict(connection.execute("SELECT id, tier FROM clients"))

    def _execute(self, statement: str, parameters: tuple[object, ...]) -> None:
        if self._connection is None:
            raise sqlite3.ProgrammingError("the client store is not open")
        self._connection.execute(statement, parameters)


class ClientRegistry:
    """Answers who a client is. Registered by the API beats configured, which beats the default tier."""

    def __init__(
        self, tiers: Mapping[str, Quota], default_tier: str, configured: Mapping[str, str], store: ClientStore
    ) -> None:
        """Hold `tiers` (upper-case name to quota) and `configured` (client id to tier name)."""
        self.tiers = dict(tiers)
        self.default = self.tiers[default_tier]
        self._configured = {
            client_id: Client(client_id, bucket_key(client_id), self.tiers[tier], "configured")
            for client_id, tier in configured.items()
        }
        self.version = 0  # goes up with every change, so that who has looked a client up knows to look again
        self._registered: dict[str, Client] = {}
        self._store = store
        self._change = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<ClientRegistry [{len(self._registered)} registered, {len(self._configured)} configured]>"

    async def load(self) -> None:
        """Read the registered clients from disk. Raises OSError."""
        self.version += 1
        for client_id, tier in (await self._store.open()).items():
            if tier in self.tiers:
                self._registered[client_id] = self._register(client_id, tier)
            else:
                logger.warning("client %r is registered for tier %r, which is not configured", client_id, tier)

    async def close(self) -> None:
        """Close the store."""
        await self._store.close()

    def named(self, client_id: str) -> Client:
        """Return the client that calls itself `client_id`."""
        known = self._registered.get(client_id) or self._configured.get(client_id)
        return known or Client(client_id, bucket_key(client_id), self.default, "default")

    def unnamed(self, address: str) -> Client:
        """Return the client that gave no name: it is its address."""
        return Client(address, f"{_ADDRESS}{address}", self.default, "address")

    def keyed(self, key: str) -> Client:
        """Return the client whose bucket has this key."""
        return self.unnamed(key[len(_ADDRESS) :]) if key.startswith(_ADDRESS) else self.named(key[len(_CLIENT) :])

    async def set_tier(self, client_id: str, tier: str) -> tuple[Client, Client]:
        """Register `client_id` for `tier` (a configured name), durably. Returns it as it was and as it is.

        Raises StoreUnavailable when it could not be stored; nothing has changed then.
        """
        async with self._change:
            await self._persist(self._store.put(client_id, tier))
            before = self.named(client_id)
            self._registered[client_id] = self._register(client_id, tier)
            self.version += 1
        return before, self._registered[client_id]

    async def forget(self, client_id: str) -> tuple[Client, Client]:
        """Remove the registration of `client_id`, durably. Returns it as it was and as it is; see `set_tier`."""
        async with self._change:
            await self._persist(self._store.delete(client_id))
            before = self.named(client_id)
            self._registered.pop(client_id, None)
            self.version += 1
        return before, self.named(client_id)

    def _register(self, client_id: str, tier: str) -> Client:
        return Client(client_id, bucket_key(client_id), self.tiers[tier], "registered")

    async def _persist(self, write: Awaitable[None]) -> None:
        try:
            await write
        except OSError as error:
            raise StoreUnavailable(
                f"The change could not be written to {FILE_NAME} and was not made.", retry_after=5
            ) from error


def bucket_key(client_id: str) -> str:
    """Return the key of a named client's bucket, which no address can have."""
    return f"{_CLIENT}{client_id}"
