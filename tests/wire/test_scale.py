"""A thousand routes to a thousand upstreams: what the start builds, and what a request does, for each of them."""

import asyncio
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import yaml

from api_gateway.assembly import upstreams as assembly
from api_gateway.assembly.gateway import Assembly, Gateway
from api_gateway.assembly.installation import snapshot_of
from api_gateway.assembly.upstreams import Tls, TlsByFiles, plan_upstream
from api_gateway.config import GatewayConfig, from_values, load_config
from api_gateway.main import GatewayApp, create_app
from api_gateway.settings.upstreams import UpstreamSection
from api_gateway.system.build import variant
from api_gateway.system.clocks import SYSTEM_CLOCKS
from api_gateway.transport.upstream_connection import UpstreamConnection
from benchmarks.scale import as_yaml, configuration
from tests.wire.test_steps import LIMIT, longest

RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
LINEAR = 4.0  # times the ratio of two sizes, by which the ratio of their times may differ on a busy machine


def config_of(count: int, folder: Path, **settings: Any) -> GatewayConfig:
    return from_values(configuration(count, folder, 0, 9, **settings))


# The start


def test_a_file_is_parsed_once_and_by_the_parser_in_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not yaml.__with_libyaml__:
        pytest.skip("PyYAML was built without LibYAML")
    loaders: list[object] = []
    compose = yaml.compose

    def composed(text: str, Loader: Any) -> Any:  # noqa: N803 - the library's signature
        loaders.append(Loader)
        return compose(text, Loader=Loader)

    monkeypatch.setattr(yaml, "compose", composed)
    path = tmp_path / "gateway.yaml"
    path.write_text(as_yaml(configuration(2, tmp_path, 0, 9)))
    assert list(load_config(path).upstreams) == ["upstream-0001", "upstream-0002"]
    assert loaders == [yaml.CSafeLoader]


def test_the_time_to_read_a_configuration_grows_with_its_length(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"

    def seconds(count: int) -> float:
        path.write_text(as_yaml(configuration(count, tmp_path, 0, 9)))
        took = []
        for _ in range(3):
            began = time.thread_time()
            assert len(load_config(path).routes) == count
            took.append(time.thread_time() - began)
        return min(took)

    assert seconds(1000) / seconds(100) < 10 * LINEAR


def test_upstreams_with_the_same_files_share_a_tls_context(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading the system's certificates takes milliseconds. HTTP/2 negotiates by its context, so it has its own."""
    made: list[ssl.SSLContext] = []

    def tls_context(*_files: Path | None) -> ssl.SSLContext:
        made.append(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        return made[-1]

    monkeypatch.setattr(assembly, "tls_context", tls_context)
    created: TlsByFiles = {}

    def planned(**settings: Any) -> Tls:
        section = UpstreamSection.model_validate({"targets": [{"url": "https://127.0.0.1:9"}], **settings})
        return plan_upstream("up", section, None, None, created).tls

    shared = planned()
    assert [planned() for _ in range(100)] == [shared] * 100
    trusting = planned(tls={"ca_file": certificates / "here.pem"})
    assert planned(tls={"ca_file": certificates / "here.pem"}) is trusting
    assert len({id(one.context) for one in (shared, trusting)}) == len(made) == 2
    pytest.importorskip("h2")
    assert planned(http2=True) is planned(http2=True)
    assert len(made) == 3


@asynccontextmanager
async def live(config: GatewayConfig) -> AsyncIterator[Gateway]:
    async def resolve(_host: str, _port: int) -> Sequence[str]:
        return ()

    async with Assembly(Counter(), {}, resolve, SYSTEM_CLOCKS).live(config) as gateway:
        await asyncio.sleep(0)
        yield gateway


@pytest.mark.parametrize(
    ("settings", "each"), [({}, 1), ({"health_check": {}}, 3)], ids=["no health checks", "health checks"]
)
async def test_an_upstream_has_no_task_that_has_nothing_to_do(
    tmp_path: Path, settings: dict[str, Any], each: int
) -> None:
    """One for the upstream, and with health checks one for all checks and one for each target."""
    counts = []
    for count in (1, 21):
        async with live(config_of(count, tmp_path / str(count), **settings)):
            await asyncio.sleep(0)
            counts.append(len(asyncio.all_tasks()))
    assert counts[1] - counts[0] == 20 * each


async def test_the_time_to_build_all_upstreams_grows_with_their_number(tmp_path: Path) -> None:
    async def seconds(count: int) -> float:
        config = config_of(count, tmp_path / str(count))
        took = []
        for _ in range(3):
            began = time.process_time()  # a part of it is in another thread
            async with live(config):
                took.append(time.process_time() - began)
        return min(took)

    assert await seconds(1000) / await seconds(100) < 10 * LINEAR


async def test_the_report_of_many_upstreams_is_made_in_short_steps(tmp_path: Path) -> None:
    """See `test_steps`; this is the step before the exposition."""
    async with live(config_of(1000, tmp_path)) as gateway:
        took, report = min((longest(snapshot_of(gateway)) for _ in range(5)), key=lambda one: one[0])
    assert len(report.upstreams) == 1000
    assert took < LIMIT


# Requests


class SilentTransport:
    """The transport of a connection without a socket."""

    def write(self, _data: bytes) -> None:
        """Take no notice."""

    def abort(self) -> None:
        """Take no notice."""


class SilentClient:
    """A downstream connection as the fast path uses it."""

    client = ("127.0.0.1", 5)
    transport = SilentTransport()
    scheme = "http"
    certificate = None
    last_headers = None
    is_write_paused = False
    limits = SimpleNamespace(header_bytes=60_000, header_lines=100)

    def __init__(self) -> None:
        self.ended = 0  # exchanges with a complete response

    def begin_exchange(self, exchange: Any) -> None:
        """Take no notice."""

    def end_exchange(self, *, keep_alive: bool) -> None:
        assert keep_alive
        self.ended += 1


def calls_of_a_request(app: GatewayApp, name: str) -> int:
    """Return how many functions the fast path calls to forward a request of a route, once it has been used."""
    gateway: Gateway = app.state.gateway
    upstream_client = gateway.upstreams[f"upstream-{name}"].upstream_client
    transport: Any = upstream_client.transport
    (target,) = upstream_client.upstream.targets
    pool, connection = transport.pool(upstream_client.origins[target]), UpstreamConnection(asyncio.get_running_loop())
    connection.pool = pool
    connection.connection_made(SilentTransport())  # type: ignore[arg-type]  # as far as it is used
    request = b"GET /api/small/route-%b/7 HTTP/1.1\r\nHost: gateway\r\n\r\n" % name.encode()
    client, calls = SilentClient(), 0
    assert app.fast_path is not None

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    pool.shares.acquire(None)
    pool.release(connection)
    for number in range(1, 4):
        calls = 0
        sys.setprofile(count)
        try:
            handled = app.fast_path.current.try_handle(client, request)
        finally:
            sys.setprofile(None)
        assert handled
        connection.get_buffer(-1)[: len(RESPONSE)] = RESPONSE
        connection.buffer_updated(len(RESPONSE))
        assert client.ended == number
    connection.close()
    return calls


async def test_a_request_takes_as_many_steps_with_many_routes_as_with_one(tmp_path: Path) -> None:
    found = []
    for count in (1, 200):
        app = create_app(config_of(count, tmp_path / str(count)))
        async with app.router.lifespan_context(app):
            found.append({name: calls_of_a_request(app, name) for name in ("0001", f"{count:04d}")})
    assert found[0]["0001"] > (20 if variant() == "pure Python" else 0)  # compiled functions call each other unseen
    assert set(found[1].values()) == set(found[0].values())
