"""How the targets of an upstream are kept up to date: which are used and checked after a DNS response, and the log."""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

import pytest

from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.resilience.breaker_policy import BreakerPolicy
from api_gateway.resilience.retry import RetryPolicy
from api_gateway.transport.http1_transport import UpstreamTransport
from api_gateway.upstreams.dns import HostName
from api_gateway.upstreams.health_checks import HealthPolicy
from api_gateway.upstreams.load_balancing import round_robin
from api_gateway.upstreams.monitor import UpstreamMonitor
from api_gateway.upstreams.upstream import Upstream
from api_gateway.upstreams.upstream_client import Timeouts, UpstreamClient
from tests.kit import FakeClock, RawUpstream

POLICY = HealthPolicy("/health", 5, 2, healthy_threshold=2, unhealthy_threshold=3, statuses=(range(200, 400),))

NOW = 1000.0


async def nobody(_host: str, _port: int) -> Sequence[str]:
    """Answer never."""
    await asyncio.get_running_loop().create_future()
    return ()


def kept(policy: HealthPolicy | None = None) -> tuple[UpstreamMonitor, UpstreamClient, HostName, HostName]:
    """Return the upkeep of an upstream with two names."""
    one, other = HostName("http://one.test"), HostName("http://other.test", 2)
    breaker = CircuitBreaker(BreakerPolicy(), NOW)
    upstream = Upstream("users", [*one.targets, *other.targets], breaker, round_robin)
    service = UpstreamClient(upstream, UpstreamTransport(), Timeouts(1, 1, 1, None))
    upkeep = UpstreamMonitor(
        service,
        policy=policy,
        names=[one, other],
        resolve=nobody,
        clock=FakeClock(NOW),
        source=random.Random(1),
    )
    return upkeep, service, one, other


def urls(service: UpstreamClient) -> list[str]:
    return [target.url for target in service.upstream.targets]


def test_each_name_keeps_its_place_and_its_weight() -> None:
    upkeep, service, one, other = kept()
    upkeep._on_resolution(other.update(["10.0.0.2", "10.0.0.1"], NOW))
    assert urls(service) == ["http://one.test", "http://10.0.0.1:80", "http://10.0.0.2:80"]
    assert [target.weight for target in service.upstream.targets] == [1, 2, 2]
    upkeep._on_resolution(one.update(["10.0.0.9"], NOW))
    assert urls(service) == ["http://10.0.0.9:80", "http://10.0.0.1:80", "http://10.0.0.2:80"]
    assert set(service.origins) == set(service.upstream.targets)


def test_a_removed_target_is_released_after_its_last_request() -> None:
    upkeep, service, one, _ = kept()
    upkeep._on_resolution(one.update(["10.0.0.1"], NOW))
    gone, other = service.upstream.targets
    lease = service.upstream.acquire(NOW, "", [other])
    assert lease.target is gone
    upkeep._on_resolution(one.update(["10.0.0.2"], NOW))
    assert lease.target in service.origins, "a request that has not been sent yet finds its way"
    upkeep._on_resolution(one.update(["10.0.0.2"], NOW))
    assert lease.target in service.origins
    lease.release(NOW)
    upkeep._on_resolution(one.update(["10.0.0.2"], NOW))
    assert lease.target not in service.origins


def test_each_change_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    upkeep, _, one, _ = kept()
    for error in ("no such host", "no such host", "no response within 30 s"):
        upkeep._on_resolution(one.fail(error, NOW))
    for addresses in (["10.0.0.1"], ["10.0.0.1"], ["10.0.0.2"]):
        upkeep._on_resolution(one.update(addresses, NOW))
    upkeep._on_resolution(one.fail("no such host", NOW))
    upkeep._on_resolution(one.update(["10.0.0.2"], NOW))
    assert caplog.messages == [
        "upstream users: one.test cannot be resolved, keeping the name itself: no such host",
        "upstream users: one.test cannot be resolved, keeping the name itself: no response within 30 s",
        "upstream users: one.test is 10.0.0.1 (+10.0.0.1)",
        "upstream users: one.test is 10.0.0.2 (+10.0.0.2 -10.0.0.1)",
        "upstream users: one.test cannot be resolved, keeping 10.0.0.2: no such host",
        "upstream users: one.test is resolved again: 10.0.0.2",
    ]


async def test_checks_go_through_a_transport_of_their_own_and_keep_no_connection(
    upstream: Callable[..., RawUpstream],
) -> None:
    """Names come and go, and with them what is connected to."""
    up = upstream()
    one = HostName(up.url)
    service = UpstreamClient(
        Upstream("users", one.targets, CircuitBreaker(BreakerPolicy(), NOW), round_robin),
        UpstreamTransport(),
        Timeouts(1, 1, 1, None),
    )
    own = UpstreamTransport()
    upkeep = UpstreamMonitor(
        service,
        policy=POLICY,
        transport=own,
        resolve=nobody,
        clock=FakeClock(NOW),
        source=random.Random(1),
    )
    assert await upkeep._send_probe(one.targets[0])(f"{up.url}/health", 1.0) == 200
    assert repr(own) == repr(service.transport) == "<UpstreamTransport {}>"
    await upkeep.close()


@pytest.mark.parametrize(
    ("host_header", "expected"), [("target", "{target}"), ("client", "{target}"), ("up.internal:1", "up.internal:1")]
)
async def test_checks_have_the_host_of_requests_also_after_a_reload(
    upstream: Callable[..., RawUpstream], host_header: str, expected: str
) -> None:
    """That of the target if requests have their client's."""
    up = upstream()
    one, timeouts = HostName(up.url), Timeouts(1, 1, 1, None)
    before = UpstreamClient(
        Upstream("users", one.targets, CircuitBreaker(BreakerPolicy(), NOW), round_robin),
        UpstreamTransport(),
        timeouts,
        host_header="before.internal",
    )
    upkeep = UpstreamMonitor(before, policy=POLICY, resolve=nobody, clock=FakeClock(NOW), source=random.Random(1))
    send_probe = upkeep._send_probe(one.targets[0])
    after = before.succeeded_by(timeouts, RetryPolicy(), None, before.transport, host_header)
    assert await send_probe(f"{up.url}/health", 1.0) == 200
    upkeep.change(after, POLICY, None, (), 0.0)
    assert await send_probe(f"{up.url}/health", 1.0) == 200
    hosts = [request.all("host") for request in up.requests]
    assert hosts == [[b"before.internal"], [expected.format(target=up.url.removeprefix("http://")).encode()]]
    await after.transport.aclose()


def test_its_repr_shows_checks_and_names() -> None:
    upkeep, *_ = kept(POLICY)
    assert repr(upkeep) == (
        "<UpstreamMonitor of 'users' [<HealthChecker [0 targets]>, [<HostName 'one.test' [not resolved]>,"
        " <HostName 'other.test' [not resolved]>]]>"
    )
