"""Connections to the store that are closed at once, and not at all opened once their session is closed.

The client library closes a connection in order: it sends what is buffered, and with TLS waits for the server to do so
too. It has then forgotten the connection, and the socket stays open while the server does not respond. A connection
that is being established when its pool is closed stays open as well. An orderly close is not needed here: every
command has had its reply, or its outcome is unknown anyway.
"""

from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as Broken

StoreClient = Redis | RedisCluster


class PromptConnection(AbstractConnection):
    """The changes to a connection of the library. Each client has subclasses of its own."""

    is_over = False  # of the class: the session is closed

    async def _connect(self) -> None:
        """Open the socket. Raises the library's ConnectionError once the session is closed."""
        if not self.is_over:
            await super()._connect()  # type: ignore[no-untyped-call, safe-super]  # untyped in redis-py, see `_prompt`
        if self.is_over:  # perhaps meanwhile
            self._close()
            raise Broken("the session is closed")

    async def disconnect(self, *arguments: Any, **options: Any) -> None:
        """Close the connection at once; return when that is noticed."""
        self._abort()
        await super().disconnect(*arguments, **options)

    def _close(self) -> None:
        self._abort()
        super()._close()  # type: ignore[no-untyped-call]  # untyped in redis-py

    def _abort(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()


def make_prompt(client: StoreClient) -> None:
    """Make a client that has not connected yet use prompt connections, also those to its sentinels."""
    if isinstance(client, RedisCluster):
        manager = client.nodes_manager
        made = _prompt(client.connection_kwargs["connection_class"])
        for kwargs in (client.connection_kwargs, manager.connection_kwargs):
            kwargs["connection_class"] = made
        for node in manager.startup_nodes.values():
            node.connection_class = made
        return
    for each in (client, *_sentinels(client)):
        each.connection_pool.connection_class = _prompt(each.connection_pool.connection_class)


async def close_client(client: StoreClient) -> None:
    """Close a client, and its connections to sentinels; none is opened afterwards."""
    if isinstance(client, RedisCluster):
        client.connection_kwargs["connection_class"].is_over = True
        await client.aclose()
        for group in ("nodes_cache", "startup_nodes"):  # after a failure its `aclose` does nothing
            await client.nodes_manager.aclose(group)
        return
    for each in (client, *_sentinels(client)):
        made: Any = each.connection_pool.connection_class
        made.is_over = True
        await each.aclose()


def _sentinels(client: Redis) -> list[Redis]:
    manager = getattr(client.connection_pool, "sentinel_manager", None)
    return list(manager.sentinels) if manager is not None else []


def _prompt(base: type[AbstractConnection]) -> Any:
    return type(f"Prompt{base.__name__}", (PromptConnection, base), {})
