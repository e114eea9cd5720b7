"""The kinds of stores, each with a real server: passwords, TLS, Sentinel, a cluster."""

import asyncio
import re
import ssl
from collections.abc import Iterator

import pytest
from redis import Redis

from api_gateway.models import Quota
from api_gateway.settings.store_url import StoreUrl
from tests.cases import each
from tests.kit import eventually, free_port, soon
from tests.store_kit import StoreServer, asking, charge, gateways, is_older_than_7

SLOW = Quota.per_second("slow", 0.001, 10)


async def spends_ten(url: str) -> None:
    """Two gateways on a store together admit what one bucket holds, by the store's own word."""
    async with gateways(url, SLOW, count=2) as limiters:
        for limiter in limiters:
            limiter.cache.is_trusted = False  # so that the store is asked each time
        decisions = await asyncio.gather(*[asking(limiters[n % 2], charge(SLOW)) for n in range(14)])
        assert await limiters[0]._session.evictions() == (0, None)
    assert {decision.source for decision in decisions} == {"store"}
    assert sum(decision.allowed for decision in decisions) == 10


@pytest.mark.parametrize(
    ("option", "user"), [("requirepass secret", ""), ("user gate on >secret ~* &* +@all", "gate")], ids=["pass", "acl"]
)
async def test_a_password_is_sent(binary: str, option: str, user: str) -> None:
    port = free_port()
    with StoreServer(binary, "bind 127.0.0.1", option, *(["user default off"] if user else []), port=port):
        await spends_ten(f"redis://{user}:secret@127.0.0.1:{port}/3")


async def test_a_wrong_password_is_reported_and_not_shown(binary: str, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with StoreServer(binary, "bind 127.0.0.1", "requirepass secret", port=port):
        async with gateways(f"redis://:wrong-one@127.0.0.1:{port}", SLOW) as (limiter,):
            decision = await asking(limiter, charge(SLOW))

            def is_reported() -> bool:
                text = caplog.text.lower()
                return "invalid username-password pair" in text or "wrongpass" in text

            await soon(is_reported, "it is reported")
    assert decision.source == "local_share"
    assert "wrong-one" not in caplog.text


@pytest.fixture
def cluster(binary: str) -> Iterator[int]:
    """Run a cluster of one node; yield its port."""
    if is_older_than_7(binary):
        pytest.skip("before version 7 a node's second port follows from its first, and may not be free")
    port = free_port()
    options = ["bind 127.0.0.1", "cluster-enabled yes", f"cluster-port {free_port()}"]
    with StoreServer(binary, *options, port=port) as server:
        server.admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        eventually(lambda: server.command("CLUSTER", "INFO").find(b"cluster_state:ok") > 0, "the cluster is up")
        yield port


async def test_a_cluster_on_which_buckets_in_several_slots_are_charged_all_or_none_in_the_end(cluster: int) -> None:
    await spends_ten(f"redis+cluster://127.0.0.1:{cluster}")
    async with gateways(f"redis+cluster://127.0.0.1:{cluster}", SLOW, prefix="joint") as (limiter,):
        limiter.cache.is_trusted = False
        assert (await asking(limiter, charge(SLOW, 8, "client"))).allowed
        joint = charge(SLOW, 4, "peer"), charge(SLOW, 4, "client")
        refused = await asking(limiter, *joint)
        assert (refused.allowed, refused.key, refused.remaining) == (False, "client", 2)
        await asyncio.sleep(0.1)  # what the other bucket took is given back behind the answer
        assert (await asking(limiter, charge(SLOW, 0, "peer"))).remaining == 10
        passed = await asking(limiter, charge(SLOW, 2, "peer"), charge(SLOW, 2, "client"))
        assert (passed.allowed, passed.key, passed.remaining) == (True, "client", 0)  # the tightest
        assert (await asking(limiter, charge(SLOW, 0, "peer"))).remaining == 8


async def test_sentinels_say_which_server_is_the_master(binary: str) -> None:
    port, watcher = free_port(), free_port()
    with StoreServer(binary, "bind 127.0.0.1", port=port):
        watches = ["bind 127.0.0.1", f"sentinel monitor main 127.0.0.1 {port} 1"]
        with StoreServer(binary, *watches, port=watcher, mode=("--sentinel",)):
            admin = Redis(port=watcher)
            eventually(lambda: admin.execute_command("SENTINEL", "MASTER", "main"), "the sentinel answers")  # type: ignore[no-untyped-call]  # theirs
            admin.close()
            await spends_ten(f"redis+sentinel://127.0.0.1:{watcher}/main")


# URLs


@each(
    ("url", "telling"),
    [
        ("mongodb://host", "redis+sentinel://"),
        ("redis://", "must name a host"),
        ("redis://one,two", "+sentinel or +cluster"),
        ("redis://host:port", "has a port that is not a number from 1 to 65535"),
        ("redis://host/name", "the database after the host must be a number"),
        ("redis://host/1/2", "after the number of the database"),
        ("redis+sentinel://host", "must name the master"),
        ("redis+cluster://host/1", "only database 0"),
        ("redis://host?timeout=1", "unknown parameter after '?'; known are db"),
        ("redis://host?ca_file=x", "unknown parameter after '?'; known are db"),
        ("rediss://host?ca_file=", "ca_file="),
        ("rediss://host?key_file=key.pem", "without the cert_file"),
        ("unix://host/path", "absolute path"),
    ],
)
def test_a_mistake_in_the_url_is_named(url: str, telling: str) -> None:
    with pytest.raises(ValueError, match=re.escape(telling)):
        StoreUrl.parse(url)


def test_a_url_is_taken_apart() -> None:
    url = StoreUrl.parse("rediss+sentinel://us%65r:p%40ss@one,two:7/main/2?ca_file=/etc/ca.pem")
    assert (url.kind, url.hosts, url.master) == ("sentinel", (("one", 26379), ("two", 7)), "main")
    assert url.options == {
        "username": "user",
        "password": "p@ss",
        "db": 2,
        "ssl": True,
        "ssl_exclude_verify_flags": [ssl.VERIFY_X509_STRICT],
        "ssl_ca_certs": "/etc/ca.pem",
    }
    assert StoreUrl.parse("unix:///run/a%20b?db=1").path == "/run/a b"
