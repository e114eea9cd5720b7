"""The shared store, a Redis or Valkey server: how it is connected to, listened to, and its scripts are called.

The only module that knows the client library. Nothing here retries: whether a command may be sent twice is for the
caller to know, and a decision of the limiter may not.
"""

import asyncio
import hashlib
import logging
import math
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from hiredis import pack_command
from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import ConnectionError as Broken
from redis.exceptions import NoScriptError, RedisClusterException, RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from api_gateway.store_url import StoreUrl
from api_gateway.tasks import not_cancelled

logger = logging.getLogger(__name__)

Client = Redis | RedisCluster
StoreError = (RedisError, RedisClusterException, OSError, TimeoutError)  # all that a command can fail with
REFUSALS = ResponseError  # what the server itself answered: the command has changed nothing

OTHER_NAME = (62, 64)  # what OpenSSL says of a certificate that is for another host name, or another address
RELISTEN_AFTER = 0.2  # seconds
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


class Carrier(Protocol):
    """A connected way to the store on which one script can be called. Nothing is ever sent twice."""

    is_divided: bool  # True if keys lie on several servers; a call then takes keys of one slot only

    def slot(self, key: str) -> int:
        """Return the slot in which a key lies."""
        ...

    async def run(self, calls: Sequence[ScriptCall]) -> list[list[int]]:
        """Call the script and return the replies. Raises one of `StoreError`; the carrier is of no use then."""
        ...

    def abort(self) -> None:
        """Let go of the connection at once."""
        ...


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

    async def carrier(self, script: Script) -> Carrier:
        """Connect and make the script known. Raises one of `StoreError`, which names the setting that may be wrong."""
        try:
            return await self._carrier(script)
        except StoreError as error:
            hint = _hint(error, self._place)
            if hint is None:
                raise
            raise Broken(f"{error} {hint}") from error

    async def _carrier(self, script: Script) -> Carrier:
        if isinstance(self.client, RedisCluster):
            await self.client.initialize()
            not_cancelled()
            return _ClusterCarrier(self.client, script)
        connection = self.client.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # theirs
        connection.socket_timeout = None  # the caller's deadline is the only one
        carrier = _Connection(connection, script)
        try:
            await connection.connect()
            await carrier.introduce()
            not_cancelled()
        except BaseException:
            carrier.abort()
            raise
        return carrier

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
                not_cancelled()
                async for message in _heard(pubsub):
                    if message["type"] == "subscribe":
                        on_state(True)
                    elif message["type"] == "message":
                        on_message(message["data"].decode(errors="replace"))
            except StoreError:
                logger.debug("listening on %s broke off", channel, exc_info=True)
            finally:
                on_state(False)
                await pubsub.aclose()  # type: ignore[no-untyped-call]  # theirs
            await asyncio.sleep(RELISTEN_AFTER)

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


class _Connection:
    """A connection to one server, by itself: outside of any pool."""

    is_divided = False

    def __init__(self, connection: AbstractConnection, script: Script) -> None:
        self._connection = connection
        self._script = script

    def slot(self, key: str) -> int:  # noqa: ARG002 - all keys lie on one server
        """See `Carrier`."""
        return 0

    async def introduce(self) -> None:
        """Load the script: one that was loaded is kept, while servers since Valkey 8 forget those only seen."""
        await self._connection.send_command("SCRIPT", "LOAD", self._script.text)
        await self._connection.read_response(timeout=math.inf)

    async def run(self, calls: Sequence[ScriptCall]) -> list[list[int]]:
        """See `Carrier`."""
        return [await self._run(call) for call in calls]

    async def _run(self, call: ScriptCall) -> list[int]:
        try:
            return await self._ask(_packed("EVALSHA", self._script.sha, call))
        except NoScriptError:  # nothing has been executed: the server has forgotten its scripts
            return await self._ask(_packed("EVAL", self._script.text, call))

    async def _ask(self, command: bytes) -> list[int]:
        await self._connection.send_packed_command([command], check_health=False)
        reply: list[int] = await self._connection.read_response(timeout=math.inf)
        return reply

    def abort(self) -> None:
        """See `Carrier`."""
        self._connection._close()  # type: ignore[no-untyped-call]  # noqa: SLF001 - `disconnect`, less the waiting


class _ClusterCarrier:
    """A cluster: its client keeps a connection to every node."""

    is_divided = True

    def __init__(self, client: RedisCluster, script: Script) -> None:
        self._client = client
        self._script = script

    def slot(self, key: str) -> int:
        """See `Carrier`."""
        return key_slot(key.encode())

    async def run(self, calls: Sequence[ScriptCall]) -> list[list[int]]:
        """See `Carrier`; calls go out at once, each to its node."""
        return await asyncio.gather(*[self._run(call) for call in calls])

    async def _run(self, call: ScriptCall) -> list[int]:
        count, keys, arguments = len(call.keys), call.keys, call.arguments
        try:
            reply: list[int] = await self._client.execute_command(
                "EVALSHA", self._script.sha, count, *keys, *arguments
            )
        except NoScriptError:
            reply = await self._client.execute_command("EVAL", self._script.text, count, *keys, *arguments)
        return reply

    def abort(self) -> None:
        """See `Carrier`: the client has dropped what broke."""


async def _heard(pubsub: PubSub) -> AsyncIterator[dict[str, Any]]:
    """Yield what a subscription hears, for as long as it proves to be alive. Raises one of `StoreError`."""
    is_asked = False
    while True:
        message = await pubsub.get_message(timeout=MAX_QUIET)
        not_cancelled()
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


def connect(url: str, *, timeout: float) -> Client:
    """Return a client of the store that connects when it is used, for commands that may take `timeout` seconds.

    It never repeats a command by itself and raises one of `StoreError`. Replies are bytes. Raises ValueError.
    """
    place = StoreUrl.parse(url)
    options = {**place.options, **_common(timeout)}
    if place.path is not None:
        return Redis(unix_socket_path=place.path, **options)
    if place.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in place.hosts]
        return RedisCluster(startup_nodes=nodes, **options)
    if place.kind == "sentinel":
        watchers = {key: value for key, value in options.items() if key not in ("db", "username", "password")}
        sentinel = Sentinel(list(place.hosts), sentinel_kwargs=watchers, **options)  # type: ignore[no-untyped-call]  # theirs
        master: Redis = sentinel.master_for(place.master or "")
        return master
    ((host, port),) = place.hosts
    return Redis(host=host, port=port, **options)


async def disconnect(client: Client) -> None:
    """Close a client, and with it the sentinels it has asked."""
    await client.aclose()
    sentinel = None if isinstance(client, RedisCluster) else getattr(client.connection_pool, "sentinel_manager", None)
    for watcher in sentinel.sentinels if sentinel is not None else ():
        await watcher.aclose()


def _check_files(options: Mapping[str, Any]) -> None:
    """Find out now, and with a name, that a PEM file cannot be used: later it would be a store that is away."""
    for option in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if option in options:
            with open(options[option], "rb"):  # noqa: PTH123 - what is opened is nothing to read here
                pass
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
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            if cause.verify_code in OTHER_NAME:
                return "The host in store.url must be one that the server's certificate is for."
            return "The authority of the server's certificate must be the system's, or ?ca_file= in store.url."
        is_broken_off = isinstance(cause, ConnectionResetError) or "closed by server" in str(cause)
        if is_broken_off and not is_tls and place.path is None:
            return "If the server expects TLS, store.url must begin with rediss."
        if (is_broken_off or "CERTIFICATE_REQUIRED" in str(cause)) and is_tls and "ssl_certfile" not in place.options:
            return "If the server asks for a certificate, it is ?certificate= and &key= in store.url."
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _common(timeout: float) -> dict[str, Any]:
    """Return what differs from the library's defaults: no retries, and no changes to timeouts by the server."""
    return {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
