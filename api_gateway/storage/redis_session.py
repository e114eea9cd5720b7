"""Sessions with the shared store, a Redis or Valkey server: connections, script calls and subscriptions.

Nothing is retried here: only the caller knows whether a command may be sent twice; a decision of the limiter must not
be.
"""

import asyncio
import hashlib
import logging
import math
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from hiredis import pack_command
from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthenticationError,
    MovedError,
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as Broken
from redis.maint_notifications import MaintNotificationsConfig

from api_gateway.errors import causes
from api_gateway.eventloop.tasks import check_cancelled, run_to_completion
from api_gateway.settings.store_url import StoreUrl
from api_gateway.storage.evictions import Evictions
from api_gateway.storage.store_connections import StoreClient, close_client, make_prompt
from api_gateway.system.x509 import load_pair, verifying_context

logger = logging.getLogger(__name__)

StoreError = (RedisError, RedisClusterException, OSError, TimeoutError)  # all errors of a command
MOVED = (MovedError, AskError, TryAgainError)  # the keys are on another node, or are being moved
WRITE_REFUSALS = ResponseError  # an error reply of the server: the command has changed nothing

OTHER_HOST_NAME = (62, 64)  # OpenSSL's codes for a certificate of another host name or address
RESUBSCRIBE_DELAY = 0.2  # seconds between two subscriptions
MAX_QUIET = 0.5  # seconds of silence after which a subscription is pinged, and again for the response


class ScriptCall:
    """One call of a script: its keys and arguments."""

    __slots__ = ("arguments", "keys")

    def __init__(self) -> None:
        self.keys: dict[str, int] = {}
        self.arguments: list[str | int] = []

    def number(self, key: str) -> int:
        """Add a key unless it is present; return its number in KEYS, from 1."""
        return self.keys.setdefault(key, len(self.keys) + 1)


class Script:
    """A Lua script, and the SHA-1 digest by which servers identify it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class StoreSession:
    """The access of one process to the store. It connects when it is used; `close` ends it."""

    def __init__(self, url: str, *, timeout: float) -> None:
        """`timeout` is the limit in seconds for a command of `client`, and for connecting.

        Raises ValueError if the URL is invalid, and OSError if a file that it names cannot be used.
        """
        self._place = StoreUrl.parse(url)
        _check_files(self._place.options)
        self.client = connect(url, timeout=timeout)
        self.is_divided = isinstance(self.client, RedisCluster)  # then the keys of a call must be in one slot

    def __repr__(self) -> str:
        return f"<StoreSession [{type(self.client).__name__}]>"

    async def script_connection(self, script: Script, node: str = "") -> "ScriptConnection":
        """Connect and load the script. `node` is one of `nodes`; empty unless the store is a cluster.

        Raises one of `StoreError`; the message names the setting that may be wrong.
        """
        with self._hinting():
            connection = self._connection(node)
            connection.socket_timeout = None  # only the caller's deadline applies
            carrier = ScriptConnection(
                connection, script, self.client if isinstance(self.client, RedisCluster) else None
            )
            try:
                await connection.connect()  # type: ignore[no-untyped-call]  # untyped in redis-py
                await carrier.introduce()
                check_cancelled()
            except BaseException:
                carrier.abort()
                raise
            return carrier

    async def nodes(self) -> set[str]:
        """Query a cluster for its primaries, and return their names. Raises one of `StoreError`."""
        assert isinstance(self.client, RedisCluster)  # noqa: S101 - called only if `is_divided`
        with self._hinting():
            if self.client.get_nodes():
                await self.client.nodes_manager.initialize()
            else:
                await self.client.initialize()
            check_cancelled()
        return {node.name for node in self.client.get_primaries()}

    def node_of(self, key: str) -> str:
        """Return the name of the cluster node of a key; empty if it is unknown."""
        assert isinstance(self.client, RedisCluster)  # noqa: S101 - called only if `is_divided`
        owners = self.client.nodes_manager.slots_cache.get(key_slot(key.encode()))
        return owners[0].name if owners else ""

    def _connection(self, node: str) -> AbstractConnection:
        if not isinstance(self.client, RedisCluster):
            made: AbstractConnection = self.client.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # untyped in redis-py
            return made
        known = self.client.get_node(node_name=node)
        if known is None:
            raise RedisClusterException(f"{node} has left the cluster")
        return known.connection_class(**{**known.connection_kwargs, "retry": Retry(NoBackoff(), 0)})

    @contextmanager
    def _hinting(self) -> Iterator[None]:
        """Add to an error the setting that may have caused it."""
        try:
            yield
        except StoreError as error:
            hint = _hint(error, self._place)
            if hint is None:
                raise
            raise Broken(f"{error} {hint}") from error

    async def listen(self, channel: str, on_message: Callable[[str], None], on_state: Callable[[bool], None]) -> None:
        """Pass messages on a channel to `on_message` until cancelled; reconnects after errors.

        `on_state` is called with True when the subscription begins, and with False when it has ended. In between no
        message is missed, except for up to 2 * MAX_QUIET seconds before a connection that died silently is detected.
        """
        while True:
            pubsub = self.client.pubsub()
            try:
                if isinstance(self.client, RedisCluster):
                    await self.client.initialize()  # otherwise `subscribe` raises KeyError for an unknown slot
                await pubsub.subscribe(channel)
                check_cancelled()
                async for message in _messages(pubsub):
                    if message["type"] == "subscribe":
                        on_state(True)
                    elif message["type"] == "message":
                        on_message(message["data"].decode(errors="replace"))
            except StoreError:
                logger.debug("subscription to %s failed", channel, exc_info=True)
            finally:
                on_state(False)
                await pubsub.aclose()  # type: ignore[no-untyped-call]  # untyped in redis-py
            await asyncio.sleep(RESUBSCRIBE_DELAY)

    async def set_once(self, key: str, text: str) -> str:
        """Set a key that has no value, and return its value. Raises one of `StoreError`."""
        await self.client.set(key, text, nx=True)
        found = await self.client.get(key)
        check_cancelled()
        return found.decode(errors="replace") if isinstance(found, bytes) else text

    async def evictions(self) -> Evictions:
        """Query evictions and the eviction policy. Raises one of `StoreError`."""
        found = [await self.information("stats"), await self.information("memory")]
        keys = sum(node["evicted_keys"] for node in found[0])
        policies = {node["maxmemory_policy"] for node in found[1] if node["maxmemory"]} - {"noeviction"}
        return Evictions(keys, min(policies, default=None))

    async def information(self, section: str) -> list[dict[str, Any]]:
        """Return a section of INFO of every primary."""
        if not isinstance(self.client, RedisCluster):
            return [await self.client.info(section)]
        found = await self.client.info(section, target_nodes=RedisCluster.PRIMARIES)
        return list(found.values()) if all(isinstance(node, dict) for node in found.values()) else [found]

    async def close(self) -> None:
        """Close all connections of the client, to the end: also if the caller is cancelled meanwhile."""
        await run_to_completion(close_client(self.client))


class ScriptConnection:
    """A connection to one server, outside of any pool, for calls of one script.

    A call that may have been executed is never repeated. After an error the connection can no longer be used.
    """

    def __init__(self, connection: AbstractConnection, script: Script, cluster: RedisCluster | None) -> None:
        """With `cluster`, the server is one of its nodes, and the keys of a call must be in one slot."""
        self._connection = connection
        self._script = script
        self._cluster = cluster
        self.is_divided = cluster is not None

    def __repr__(self) -> str:
        return f"<ScriptConnection [{'connected' if self._connection.is_connected else 'closed'}]>"

    def slot(self, key: str) -> int:
        """Return the cluster slot of a key."""
        return key_slot(key.encode())

    async def introduce(self) -> None:
        """Load the script. Servers keep loaded scripts, but since Valkey 8 may evict those known from EVAL only."""
        await self._connection.send_command("SCRIPT", "LOAD", self._script.text)
        await self._connection.read_response(timeout=math.inf)

    async def run(self, calls: Sequence[ScriptCall]) -> list[list[int]]:
        """Send all calls in one write, and return their replies.

        Raises one of `StoreError`, after which the connection must be aborted.
        """
        commands = [_packed("EVALSHA", self._script.sha, call) for call in calls]
        await self._connection.send_packed_command(commands, check_health=False)
        replies = [await self._reply() for _ in calls]
        for number, (call, reply) in enumerate(zip(calls, replies, strict=True)):
            if isinstance(reply, ResponseError):
                replies[number] = await self._repeat(call, reply)
        return cast("list[list[int]]", replies)

    async def _reply(self) -> list[int] | ResponseError:
        try:
            reply: list[int] = await self._connection.read_response(timeout=math.inf)
        except ResponseError as refusal:
            return refusal
        return reply

    async def _repeat(self, call: ScriptCall, refusal: ResponseError) -> list[int]:
        """Repeat a call if the refusal proves that it was not executed; else raise the refusal."""
        if isinstance(refusal, NoScriptError):  # the server's scripts have been flushed
            command = _packed("EVAL", self._script.text, call)
            await self._connection.send_packed_command([command], check_health=False)
            reply: list[int] = await self._connection.read_response(timeout=math.inf)
        elif isinstance(refusal, MOVED) and self._cluster is not None:  # the cluster's client follows redirections
            reply = await self._cluster.eval(self._script.text, len(call.keys), *call.keys, *call.arguments)
            check_cancelled()
        else:
            raise refusal
        return reply

    def abort(self) -> None:
        """Close the connection at once."""
        self._connection._close()  # type: ignore[no-untyped-call]  # noqa: SLF001 - `disconnect` would wait


async def _messages(pubsub: PubSub) -> AsyncIterator[dict[str, Any]]:
    """Yield the messages of a subscription while it responds. Raises one of `StoreError`."""
    is_pinged = False
    while True:
        message = await pubsub.get_message(timeout=MAX_QUIET)
        check_cancelled()
        if message is not None:
            is_pinged = False
            yield message
        elif is_pinged:
            raise TimeoutError(f"no message and no response to a ping for {2 * MAX_QUIET:g} s")
        else:
            await pubsub.ping()
            is_pinged = True


def _packed(verb: str, script: str, call: ScriptCall) -> bytes:
    parts: tuple[Any, ...] = (verb, script, len(call.keys), *call.keys, *call.arguments)
    packed: bytes = pack_command(parts)
    return packed


def connect(url: str, *, timeout: float) -> StoreClient:
    """Return a client of the store, which connects when it is used; `timeout` is the limit in seconds for a command.

    The client never repeats a command, raises one of `StoreError`, and returns bytes. Its connections are closed at
    once. Raises ValueError if the URL is invalid.
    """
    client = _client(StoreUrl.parse(url), timeout)
    make_prompt(client)
    return client


def _client(place: StoreUrl, timeout: float) -> StoreClient:
    options = {**place.options, **_common(timeout)}
    introduction = _introduction([options[name] for name in ("password", "username") if name in options])
    if place.path is not None:
        return Redis(unix_socket_path=place.path, **options)
    if place.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in place.hosts]
        cluster = RedisCluster(startup_nodes=nodes, **options)
        manager = cluster.nodes_manager
        known = (node.connection_kwargs for node in manager.startup_nodes.values())
        for kwargs in (cluster.connection_kwargs, manager.connection_kwargs, *known):
            kwargs["redis_connect_func"] = introduction
        return cluster
    options["redis_connect_func"] = introduction
    if place.kind == "sentinel":
        watchers = {
            key: value
            for key, value in options.items()
            if key not in ("db", "username", "password", "redis_connect_func")
        }
        sentinel = Sentinel(list(place.hosts), sentinel_kwargs=watchers, **options)  # type: ignore[no-untyped-call]  # untyped in redis-py
        master: Redis = sentinel.master_for(place.master or "")
        return master
    ((host, port),) = place.hosts
    return Redis(host=host, port=port, **options)


def _check_files(options: Mapping[str, Any]) -> None:
    """Raise OSError, with the path, if a PEM file cannot be used; later the error would look like an outage."""
    named = [options[option] for option in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") if option in options]
    for file in named:
        with open(file, "rb"):  # noqa: PTH123 - only the permission is checked
            pass
    if not named:  # creating a context is slow
        return
    try:
        context = verifying_context(options.get("ssl_ca_certs"))
    except ssl.SSLError as error:
        raise OSError(f"{options['ssl_ca_certs']}: {error}") from error
    if "ssl_certfile" in options:
        try:
            load_pair(context, options["ssl_certfile"], options.get("ssl_keyfile"))
        except ssl.SSLError as error:
            raise OSError(f"{options['ssl_certfile']} with its key: {error}") from error


def _hint(error: BaseException, place: StoreUrl) -> str | None:
    """Return the setting in the URL that may have caused a failed connection; None if there is no indication."""
    is_tls = "ssl" in place.options
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            if cause.verify_code in OTHER_HOST_NAME:
                return "The host in store.url must be one of those in the server's certificate."
            return "The server's certificate must be issued by a CA of the system, or by ?ca_file= in store.url."
        is_broken_off = isinstance(cause, ConnectionResetError) or "closed by server" in str(cause)
        if is_broken_off and not is_tls and place.path is None:
            return "If the server expects TLS, store.url must begin with rediss."
        if (is_broken_off or "CERTIFICATE_REQUIRED" in str(cause)) and is_tls and "ssl_certfile" not in place.options:
            return "If the server requires a client certificate, set ?cert_file= and &key_file= in store.url."
    return None


def _introduction(secrets: Sequence[str]) -> Callable[[AbstractConnection], Awaitable[None]]:
    """Return the function that authenticates a connection, without secrets in its errors.

    A server may quote the command with the password in its refusal.
    """

    async def introduce(connection: AbstractConnection) -> None:
        refusal: ResponseError | AuthenticationError | None = None
        try:
            await connection.on_connect()
        except (ResponseError, AuthenticationError) as error:
            if not any(secret in str(error) for secret in secrets):
                raise
            refusal = error
        if refusal is not None:
            raise type(refusal)("the server refused the user or password in store.url, or does not support users")

    return introduce


def _common(timeout: float) -> dict[str, Any]:
    """Return the common options: no retries, and no changes of timeouts by the server."""
    return {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
