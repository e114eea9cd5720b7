"""A store with TLS, a real server: what is trusted, what is refused, and the message."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import RedisError

from api_gateway import GatewayConfig, create_app
from api_gateway.errors import StartupError
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.limits import script_batcher
from api_gateway.limits.redis_limiter import TOKEN_BUCKET_SCRIPT
from api_gateway.models import Quota
from api_gateway.storage.redis_session import StoreError, StoreSession
from tests.kit import PATIENCE, RawClient, RawUpstream, RunningGateway, ask, eventually, free_port, in_front_of, soon
from tests.store_kit import Proxy, StoreServer, asking, charge, gateways, speaks_tls

SLOW = Quota.per_second("slow", 0.001, 10)
Serve = Callable[..., StoreServer]


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handshake may take longer than a gateway waits: on a busy machine, a server makes one after the other."""
    monkeypatch.setattr(script_batcher, "CONNECT_TIMEOUT", PATIENCE)


@pytest.fixture
def serve(binary: str, certificates: Path) -> Iterator[Serve]:
    """Start servers that speak nothing but TLS on their port; they are ended in the end."""
    if not speaks_tls(binary):
        pytest.skip("this server was built without TLS")
    started: list[StoreServer] = []

    def start(name: str = "here", *, asks: bool = False) -> StoreServer:
        port = free_port()
        files = [f"tls-cert-file {certificates}/{name}.pem", f"tls-key-file {certificates}/{name}.key"]
        trust = [f"tls-ca-cert-file {certificates}/{name}.pem", f"tls-auth-clients {'yes' if asks else 'no'}"]
        server = StoreServer(binary, "bind 127.0.0.1", f"tls-port {port}", *files, *trust)
        server.__enter__()
        server.port = port
        started.append(server)
        return server

    yield start
    for server in started:
        server.__exit__()


def url_of(server: StoreServer, certificates: Path, **files: str) -> str:
    query = "&".join(f"{name}={certificates / file}" for name, file in files.items())
    return f"rediss://127.0.0.1:{server.port}?{query}"


# What works


@pytest.mark.usefixtures("_patient")
async def test_gateways_decide_and_hear_of_each_other_through_tls(serve: Serve, certificates: Path) -> None:
    """Decisions, and a refill that is published."""
    server = serve()
    async with gateways(
        url_of(server, certificates, ca_file="here.pem"), SLOW, count=2, deadline=PATIENCE
    ) as limiters:
        await soon(lambda: all(limiter.cache.is_trusted for limiter in limiters), "they listen")
        decisions = [await asking(limiters[n % 2], charge(SLOW)) for n in range(12)]
        assert [decision.allowed for decision in decisions] == [True] * 10 + [False] * 2
        assert {decision.source for decision in decisions[:11]} == {"store"}
        assert (await asking(limiters[1], charge(SLOW))).source == "deny_cache"
        await limiters[0].refill("client")
        await soon(lambda: limiters[1].cache.tat(charge(SLOW), time.monotonic_ns()) == 0, "it is heard of")
        assert (await asking(limiters[1], charge(SLOW))).allowed


@pytest.mark.usefixtures("_patient")
async def test_a_certificate_is_shown_to_a_server_that_asks_for_one(serve: Serve, certificates: Path) -> None:
    server = serve(asks=True)
    url = url_of(server, certificates, ca_file="here.pem", cert_file="here.pem", key_file="here.key")
    async with gateways(url, SLOW, deadline=PATIENCE) as (limiter,):
        assert (await asking(limiter, charge(SLOW))).source == "store"


@pytest.mark.usefixtures("_patient")
def test_the_client_store_writes_and_is_notified_through_tls(
    serve: Serve, certificates: Path, upstream: Callable[..., RawUpstream], gateway: Callable[..., RunningGateway]
) -> None:
    server = serve()
    url = url_of(server, certificates, ca_file="here.pem")
    sections = in_front_of(upstream().url) | {"store": {"url": url, "decision_timeout": PATIENCE, "timeout": PATIENCE}}
    one, other = gateway(sections), gateway(sections)
    eventually(lambda: len(server.connections("pubsub")) == 4, "limiters and clients of both are listening")
    json = {"Content-Type": "application/json"}
    changed = ask(f"{one.url}/clients/acme/tier", method="POST", headers=json, body=b'{"tier": "BASIC"}')
    assert changed.status == 200
    with RawClient(other.port) as client:

        def limit() -> list[bytes]:
            return client.get("/api/x", ("X-Client-ID: acme",)).all("x-ratelimit-limit")

        eventually(lambda: limit() == [b"50"], "the other follows")


# What is closed


Ends = Callable[[StoreSession, Proxy], Awaitable[None]]
FAREWELL = 30.0  # seconds that asyncio waits for the end of TLS; without TLS a socket is never closed before


def sockets() -> set[int]:
    """The descriptors of the sockets of this process."""
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it is that of the folder itself
            if str(file.readlink()).startswith("socket:"):
                found.add(int(file.name))
    return found


async def _abort_a_script_connection(session: StoreSession, proxy: Proxy) -> None:
    connection = await session.script_connection(TOKEN_BUCKET_SCRIPT)
    proxy.is_deaf = True
    connection.abort()


async def _cancel_during_the_handshake(session: StoreSession, proxy: Proxy) -> None:
    proxy.is_deaf = True
    connecting = asyncio.ensure_future(session.script_connection(TOKEN_BUCKET_SCRIPT))
    await soon(lambda: proxy.accepted > 0, "it has connected")
    await cancel_and_wait(connecting)


async def _close_the_pool(session: StoreSession, proxy: Proxy) -> None:
    await session.client.ping()
    proxy.is_deaf = True


async def _end_a_subscription(session: StoreSession, proxy: Proxy) -> None:
    received: list[str] = []
    states: list[bool] = []
    listening = asyncio.create_task(session.listen("channel", received.append, states.append))
    await soon(lambda: states == [True], "it listens")
    proxy.is_deaf = True
    await cancel_and_wait(listening)


async def _close_while_a_command_connects(session: StoreSession, proxy: Proxy) -> None:
    proxy.delay = 0.2
    asking = asyncio.ensure_future(session.client.ping())
    await soon(lambda: proxy.accepted > 0, "it has connected")
    await session.close()
    with pytest.raises(StoreError):
        await asking


async def _use_a_closed_session(session: StoreSession, proxy: Proxy) -> None:
    await session.client.ping()
    await session.close()
    with pytest.raises(StoreError, match="closed"):
        await session.client.ping()
    with pytest.raises(StoreError, match="closed"):
        await session.script_connection(TOKEN_BUCKET_SCRIPT)


ENDS: dict[str, Ends] = {
    "a script connection is aborted": _abort_a_script_connection,
    "cancelled during the handshake": _cancel_during_the_handshake,
    "the pool is closed": _close_the_pool,
    "a subscription ends": _end_a_subscription,
    "closed while a command connects": _close_while_a_command_connects,
    "used after it was closed": _use_a_closed_session,
}


@pytest.mark.parametrize("speaks_tls", [True, False], ids=["TLS", "plain"])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_no_socket_is_left_open_by_a_session_whose_server_has_become_silent(
    serve: Serve, store: StoreServer, certificates: Path, end: Ends, *, speaks_tls: bool
) -> None:
    """The library would wait for the server's farewell, and would forget a socket that is connecting."""
    server = serve() if speaks_tls else store
    before = sockets()
    async with Proxy(server, speaks_tls=speaks_tls) as proxy:
        query = f"?ca_file={certificates}/here.pem" if speaks_tls else ""
        session = StoreSession(proxy.url + query, timeout=PATIENCE)
        await end(session, proxy)
        await session.close()
        await soon(lambda: sockets() <= before | proxy.descriptors(), "its sockets are closed", FAREWELL / 2)


# What does not, and what it says

WRONG: dict[str, tuple[str, bool, dict[str, str], list[str]]] = {
    "another authority": (
        "here",
        False,
        {"ca_file": "other.pem"},
        ["self-signed certificate", "?ca_file=", "store.url"],
    ),
    "the system's": ("here", False, {}, ["self-signed certificate", "?ca_file=", "store.url"]),
    "another host": ("other", False, {"ca_file": "other.pem"}, ["not valid for '127.0.0.1'", "host in store.url"]),
    "no certificate": ("here", True, {"ca_file": "here.pem"}, ["?cert_file=", "store.url"]),
}


@pytest.mark.parametrize(("name", "asks", "files", "telling"), WRONG.values(), ids=WRONG)
async def test_a_store_with_a_failed_tls_handshake_is_unavailable_and_the_setting_is_named(
    serve: Serve, certificates: Path, *, name: str, asks: bool, files: dict[str, str], telling: list[str]
) -> None:
    session = StoreSession(url_of(serve(name, asks=asks), certificates, **files), timeout=30)
    with pytest.raises(RedisError) as refused:
        await session.script_connection(TOKEN_BUCKET_SCRIPT)
    assert [words for words in telling if words not in str(refused.value)] == []
    await session.close()


def test_without_tls_to_a_port_that_expects_it_the_policy_decides_and_health_says_why(
    serve: Serve, upstream: Callable[..., RawUpstream], gateway: Callable[..., RunningGateway]
) -> None:
    server = serve()
    store = {"url": f"redis://127.0.0.1:{server.port}", "clients": "sqlite"}
    running = gateway(in_front_of(upstream().url) | {"store": store})
    assert ask(f"{running.url}/api/x").status == 200

    def health() -> dict[str, Any]:
        found: dict[str, Any] = ask(f"{running.url}/health").json()
        return found

    assert (health()["status"], health()["store"]["decision_source"]) == ("warn", "local_share")
    cause = "If the server expects TLS, store.url must begin with rediss"
    eventually(lambda: cause in (health()["store"]["last_error"] or ""), "it is not just late")


# Files


UNUSABLE: dict[str, tuple[dict[str, str], list[str]]] = {
    "missing": ({"ca_file": "nowhere.pem"}, ["No such file", "nowhere.pem"]),
    "no certificate in it": ({"ca_file": "here.key"}, ["here.key", "no certificate"]),
    "without its key": ({"ca_file": "here.pem", "cert_file": "here.pem"}, ["here.pem with its key"]),
    "another's key": ({"cert_file": "here.pem", "key_file": "other.key"}, ["here.pem with its key", "mismatch"]),
}


@pytest.mark.parametrize(("files", "telling"), UNUSABLE.values(), ids=UNUSABLE)
async def test_files_that_cannot_be_used_are_named_at_the_start(
    certificates: Path, files: dict[str, str], telling: list[str]
) -> None:
    query = "&".join(f"{name}={certificates / file}" for name, file in files.items())
    sections: dict[str, Any] = {"store": {"url": f"rediss://127.0.0.1:1?{query}"}}
    with pytest.raises(StartupError, match=r"store\.url: the files cannot be used: ") as refused:
        async with (app := create_app(GatewayConfig.model_validate(sections))).router.lifespan_context(app):
            pass
    assert [words for words in telling if words not in str(refused.value)] == []
