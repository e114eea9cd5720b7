"""The abilities of a store, for `api-gateway doctor`: one connection, a few commands, nothing is written."""

import time
from statistics import median
from typing import Any, NamedTuple

from api_gateway.eventloop.tasks import check_cancelled
from api_gateway.storage.redis_session import WRITE_REFUSALS, Script, StoreError, StoreSession

_PINGS = 5
_SCRIPT = Script("return {1}")


class StoreUnusable(Exception):
    """The store does not respond, or refuses the commands; the message has the cause and no secret."""


class StoreFacts(NamedTuple):
    """Facts about a store; of a cluster the least favourable of its nodes.

    `latency` and `clock_difference` are in seconds; the latter is positive if the clock of the store is ahead.
    """

    server: str
    version: tuple[int, ...]
    evicting_policy: str | None
    is_persistent: bool
    latency: float
    clock_difference: float
    script_error: str | None

    @property
    def shown_version(self) -> str:
        """The version as text."""
        return ".".join(map(str, self.version))


async def probe_store(url: str, *, seconds: float) -> StoreFacts:
    """Return the facts about the store at a URL; `seconds` limits each command. Raises StoreUnusable."""
    try:
        session = StoreSession(url, timeout=seconds)
    except (OSError, ValueError) as error:
        raise StoreUnusable(str(error)) from error
    try:
        return await _facts(session)
    except StoreError as error:
        raise StoreUnusable(str(error) or type(error).__name__) from error
    finally:
        await session.close()


async def _facts(session: StoreSession) -> StoreFacts:
    if session.is_divided:
        await session.nodes()
    script_error = await _script_error(session)
    latency = median([await _ping(session) for _ in range(_PINGS)])
    difference = await _clock_difference(session)
    servers, persistence = await session.information("server"), await session.information("persistence")
    oldest = min(servers, key=_version)
    return StoreFacts(
        "Valkey" if "valkey_version" in oldest else "Redis",
        _version(oldest),
        (await session.evictions()).policy,
        all([await _is_persistent(session, node) for node in persistence]),
        latency,
        difference,
        script_error,
    )


def _version(server: dict[str, Any]) -> tuple[int, ...]:
    text = str(server.get("valkey_version") or server.get("redis_version") or "0")
    return tuple(int(part) for part in text.split(".") if part.isdigit())


async def _is_persistent(session: StoreSession, persistence: dict[str, Any]) -> bool:
    if persistence.get("aof_enabled"):
        return True
    if session.is_divided:
        return True  # replicas keep the keys
    try:
        found = await session.client.config_get("save")
    except WRITE_REFUSALS:  # services that manage a store forbid it: there is nothing to warn of
        return True
    check_cancelled()
    return bool(found.get("save"))


async def _script_error(session: StoreSession) -> str | None:
    nodes = sorted(await session.nodes()) if session.is_divided else [""]
    try:
        connection = await session.script_connection(_SCRIPT, nodes[0])
    except StoreError as error:
        if "NOPERM" in str(error) or "no permissions" in str(error).lower() or "unknown command" in str(error):
            return str(error)
        raise
    connection.abort()
    return None


async def _ping(session: StoreSession) -> float:
    began = time.perf_counter()
    await session.client.ping()
    check_cancelled()
    return time.perf_counter() - began


async def _clock_difference(session: StoreSession) -> float:
    before = time.time()
    found: Any = await session.client.time()
    check_cancelled()
    after = time.time()
    seconds, microseconds = next(iter(found.values())) if isinstance(found, dict) else found
    return float(int(seconds) + int(microseconds) / 1e6 - (before + after) / 2)
