"""The shared store, a Redis or Valkey server: how it is connected to, listened to, and its scripts are called.

The only module that knows the client library. Nothing here retries: whether a command may be sent twice is for the
caller to know, and a decision of the limiter may not.
"""

import asyncio
import hashlib
import logging
import math
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

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
from api_gateway.eventloop.tasks import check_cancelled
from api_gateway.settings.store_url import StoreUrl

logger = logging.getLogger(__name__)

StoreClient = Redis | RedisCluster
StoreError = (RedisError, RedisClusterException, OSError, TimeoutError)  # all that a command can fail with
MOVED = (MovedError, AskError, TryAgainError)  # the keys lie elsewhere, or are on their way
WRITE_REFUSALS = ResponseError  # what the server itself answered: the command has changed nothing

OTHER_HOST_NAME = (62, 64)  # what OpenSSL says of a certificate that is for another host name, or another address
RESUBSCRIBE_DELAY = 0.2  # seconds
MAX_QUIET = 0.5  # seconds for which a subscription may hear nothing; it is asked then, and has as long to answer


class ScriptCall:
    """One call of a script: the keys it may touch, and its arguments."""

    __slots__ = ("arguments", "keys")

    def __init__(self) -> None:
        self.keys: dict[str, int] = {}
        self.arguments: list[str | int] = []

    def number(self, key: str) -> int:
        """Return the number of a key among the call's keys, as the script counts them."""
        return self.keys.setdefault(key, len(self.keys) + 1)


class Script:
    """A script and the name by which servers know it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Evictions(NamedTuple):
    """How many keys a store has thrown out for want of memory, and the policy by which it would, None if it would not.

    On a cluster the sum, and the policy of any node.
    """

    keys: int
    policy: str | None


class StoreSession:
    """What one process needs to talk to the store for as long as it lives."""

    def __init__(self, url: str, *, timeout: float) -> None:
        """`timeout` (seconds) bounds ordinary commands and connecting.

        Raises ValueError, and OSError if the files that the URL names cannot be used.
        """
        self._place = StoreUrl.parse(url)
        _check_files(self._place.options)
        self.client = connect(url, timeout=timeout)
        self.is_divided = isinstance(self.client, RedisCluster)  # then a call takes keys of one slot only

    def __repr__(self) -> str:
        return f"<StoreSession [{type(self.client).__name__}]>"

    async def script_connection(self, script: Script, node: str = "") -> "ScriptConnection":
        """Connect and make the script known; `node` is one of `nodes`, where there are several.

        Raises one of `StoreError`, which names the setting that may be wrong.
        """
        with self._hinting():
            connection = self._connection(node)
            connection.socket_timeout = None  # the caller's deadline is the only one
            carrier = ScriptConnection(
                connection, script, self.client if isinstance(self.client, RedisCluster) else None
            )
            try:
                await connection.connect()  # type: ignore[no-untyped-call]  # theirs
                await carrier.introduce()
                check_cancelled()
            except BaseException:
                carrier.abort()
                raise
            return carrier

    async def nodes(self) -> set[str]:
        """Ask a cluster anew which servers hold its keys, and return their names. Raises one of `StoreError`."""
        assert isinstance(self.client, RedisCluster)  # noqa: S101 - nothing else is divided
        with self._hinting():
            if self.client.get_nodes():
                await self.client.nodes_manager.initialize()
            else:
                await self.client.initialize()
            check_cancelled()
        return {node.name for node in self.client.get_primaries()}

    def node_of(self, key: str) -> str:
        """Return the name of the server on which a cluster keeps a key, "" if none is known."""
        assert isinstance(self.client, RedisCluster)  # noqa: S101 - nothing else is divided
        owners = self.client.nodes_manager.slots_cache.get(key_slot(key.encode()))
        return owners[0].name if owners else ""

    def _connection(self, node: str) -> AbstractConnection:
        if not isinstance(self.client, RedisCluster):
            made: AbstractConnection = self.client.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # theirs
            return made
        known = self.client.get_node(node_name=node)
        if known is None:
            raise RedisClusterException(f"{node} has left the cluster")
        return known.connection_class(**{**known.connection_kwargs, "retry": Retry(NoBackoff(), 0)})

    @contextmanager
    def _hinting(self) -> Iterator[None]:
        """Name the setting in an error that it may have caused."""
        try:
            yield
        except StoreError as error:
            hint = _hint(error, self._place)
            if hint is None:
                raise
            raise Broken(f"{error} {hint}") from error

    async def listen(self, channel: str, on_message: Callable[[str], None], on_state: Callable[[bool], None]) -> None:
        """Hand on what is published on a channel, until cancelled; reconnects by itself.

        `on_state` tells when listening begins and when it has broken off: in between nothing is missed, but for what
        a connection that has died without a sign loses within 2 * MAX_QUIET.
        """
        while True:
            pubsub = self.client.pubsub()
            try:
                if isinstance(self.client, RedisCluster):
                    await self.client.initialize()  # or it raises KeyError for a slot it knows nothing of
                await pubsub.subscribe(channel)
                check_cancelled()
                async for message in _received(pubsub):
                    if message["type"] == "subscribe":
                        on_state(True)
                    elif message["type"] == "message":
                        on_message(message["data"].decode(errors="replace"))
            except StoreError:
                logger.debug("listening on %s broke off", channel, exc_info=True)
            finally:
                on_state(False)
                await pubsub.aclose()  # type: ignore[no-untyped-call]  # theirs
            await asyncio.sleep(RESUBSCRIBE_DELAY)

    async def evictions(self) -> Evictions:
        """Ask what the store throws out. Raises one of `StoreError`."""
        found = [await self._info("stats"), await self._info("memory")]
        keys = sum(node["evicted_keys"] for node in found[0])
        policies = {node["maxmemory_policy"] for node in found[1] if node["maxmemory"]} - {"noeviction"}
        return Evictions(keys, min(policies, default=None))

    async def _info(self, section: str) -> list[dict[str, Any]]:
        """Return what every server that holds keys tells of itself."""
        if not isinstance(self.client, RedisCluster):
            return [await self.client.info(section)]
        found = await self.client.info(section, target_nodes=RedisCluster.PRIMARIES)
        return list(found.values()) if all(isinstance(node, dict) for node in found.values()) else [found]

    async def close(self) -> None:
        """Close the client."""
        await disconnect(self.client)


class ScriptConnection:
    """A connection to one server, outside of any pool, on which one script can be called.

    Nothing that may have been executed is sent twice.
    """

    def __init__(self, connection: AbstractConnection, script: Script, cluster: RedisCluster | None) -> None:
        """If the server is one of a cluster, a call takes keys of one slot only."""
        self._connection = connection
        self._script = script
        self._cluster = cluster
        self.is_divided = cluster is not None

    def slot(self, key: str) -> int:
        """Return the slot in which a cluster keeps a key."""
        return key_slot(key.encode())

    async def introduce(self) -> None:
        """Load the script: one that was loaded is kept, while servers since Valkey 8 forget those only seen."""
        await self._connection.send_command("SCRIPT", "LOAD", self._script.text)
        await self._connection.read_response(timeout=math.inf)

    async def run(self, calls: Sequence[ScriptCall]) -> list[list[int]]:
        """Call the script, all calls in one write, and return the replies.

        Raises one of `StoreError`; the carrier is of no use then.
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
        """Call once more, if the refusal proves that nothing has been executed; else raise it."""
        if isinstance(refusal, NoScriptError):  # the server has forgotten its scripts
            command = _packed("EVAL", self._script.text, call)
            await self._connection.send_packed_command([command], check_health=False)
            reply: list[int] = await self._connection.read_response(timeout=math.inf)
        elif isinstance(refusal, MOVED) and self._cluster is not None:  # its client follows, and learns
            reply = await self._cluster.eval(self._script.text, len(call.keys), *call.keys, *call.arguments)
            check_cancelled()
        else:
            raise refusal
        return reply

    def abort(self) -> None:
        """Let go of the connection at once."""
        self._connection._close()  # type: ignore[no-untyped-call]  # noqa: SLF001 - `disconnect`, less the waiting


async def _received(pubsub: PubSub) -> AsyncIterator[dict[str, Any]]:
    """Yield what a subscription hears, for as long as it proves to be alive. Raises one of `StoreError`."""
    is_asked = False
    while True:
        message = await pubsub.get_message(timeout=MAX_QUIET)
        check_cancelled()
        if message is not None:
            is_asked = False
            yield message
        elif is_asked:
            raise TimeoutError(f"nothing was heard for {2 * MAX_QUIET:g} s")
        else:
            await pubsub.ping()
            is_asked = True


def _packed(verb: str, script: str, call: ScriptCall) -> bytes:
    parts: tuple[Any, ...] = (verb, script, len(call.keys), *call.keys, *call.arguments)
    packed: bytes = pack_command(parts)
    return packed


def connect(url: str, *, timeout: float) -> StoreClient:
    """Return a client of the store that connects when it is used, for commands that may take `timeout` seconds.

    It never repeats a command by itself and raises one of `StoreError`. Replies are bytes. Raises ValueError.
    """
    place = StoreUrl.parse(url)
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
        sentinel = Sentinel(list(place.hosts), sentinel_kwargs=watchers, **options)  # type: ignore[no-untyped-call]  # theirs
        master: Redis = sentinel.master_for(place.master or "")
        return master
    ((host, port),) = place.hosts
    return Redis(host=host, port=port, **options)


async def disconnect(client: StoreClient) -> None:
    """Close a client, and with it the sentinels it has asked."""
    await client.aclose()
    if isinstance(client, RedisCluster):  # which after a failure takes itself for closed, whatever it has open
        for group in ("nodes_cache", "startup_nodes"):
            await client.nodes_manager.aclose(group)
    sentinel = None if isinstance(client, RedisCluster) else getattr(client.connection_pool, "sentinel_manager", None)
    for watcher in sentinel.sentinels if sentinel is not None else ():
        await watcher.aclose()


def _check_files(options: Mapping[str, Any]) -> None:
    """Find out now, and with a name, that a PEM file cannot be used: later it would be a store that is away."""
    named = [options[option] for option in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") if option in options]
    for file in named:
        with open(file, "rb"):  # noqa: PTH123 - what is opened is nothing to read here
            pass
    if not named:  # a context takes its time
        return
    try:
        context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
    except ssl.SSLError as error:
        raise OSError(f"{options['ssl_ca_certs']}: {error}") from error
    if "ssl_certfile" in options:
        try:
            context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
        except ssl.SSLError as error:
            raise OSError(f"{options['ssl_certfile']} with its key: {error}") from error


def _hint(error: BaseException, place: StoreUrl) -> str | None:
    """Return what about the URL may be why the store could not be connected to, None if nothing points there."""
    is_tls = "ssl" in place.options
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            if cause.verify_code in OTHER_HOST_NAME:
                return "The host in store.url must be one that the server's certificate is for."
            return "The authority of the server's certificate must be the system's, or ?ca_file= in store.url."
        is_broken_off = isinstance(cause, ConnectionResetError) or "closed by server" in str(cause)
        if is_broken_off and not is_tls and place.path is None:
            return "If the server expects TLS, store.url must begin with rediss."
        if (is_broken_off or "CERTIFICATE_REQUIRED" in str(cause)) and is_tls and "ssl_certfile" not in place.options:
            return "If the server asks for a certificate, it is ?cert_file= and &key_file= in store.url."
    return None


def _introduction(secrets: Sequence[str]) -> Callable[[AbstractConnection], Awaitable[None]]:
    """Return what introduces a connection to the server, whose refusal may quote the command with the password."""

    async def introduce(connection: AbstractConnection) -> None:
        refusal: ResponseError | AuthenticationError | None = None
        try:
            await connection.on_connect()
        except (ResponseError, AuthenticationError) as error:
            if not any(secret in str(error) for secret in secrets):
                raise
            refusal = error
        if refusal is not None:
            raise type(refusal)("the server has refused the user or the password of store.url, or knows no users")

    return introduce


def _common(timeout: float) -> dict[str, Any]:
    """Return what differs from the library's defaults: no retries, and no changes to timeouts by the server."""
    return {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
