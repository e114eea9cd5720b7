"""Gateways that share a store are one gateway for an operator: a tier set at one applies at the others."""

import json
import time
from collections.abc import Callable
from typing import Any

from tests.kit import PATIENCE, RawClient, RawUpstream, RunningGateway, ask, eventually, in_front_of
from tests.store_kit import StoreServer

GatewayStarter = Callable[[dict[str, Any]], RunningGateway]


def sections(upstream: RawUpstream, server: StoreServer, **store: Any) -> dict[str, Any]:
    return in_front_of(upstream.url) | {"store": {"url": server.url, "decision_timeout": 10, **store}}


def change(gateway: RunningGateway, client_id: str, what: str, **body: Any) -> Any:
    headers = {"Content-Type": "application/json"}
    answer = ask(
        f"{gateway.url}/clients/{client_id}/{what}", method="POST", headers=headers, body=json.dumps(body).encode()
    )
    return answer.json() | {"http": answer.status}


def limit(gateway: RunningGateway, client_id: str) -> int:
    """Have the client ask on a connection that stays, and return the capacity it is told of."""
    with RawClient(gateway.port) as client:
        return int(client.get("/api/x", (f"X-Client-ID: {client_id}",)).all("x-ratelimit-limit")[0])


def test_a_tier_and_a_grant_set_at_one_gateway_hold_at_the_other_within_a_second(
    upstream: Callable[..., RawUpstream], gateway: GatewayStarter, store_server: StoreServer
) -> None:
    origin = upstream()
    one, other = gateway(sections(origin, store_server)), gateway(sections(origin, store_server))
    assert limit(other, "acme") == 100_000
    assert change(one, "acme", "tier", tier="BASIC")["http"] == 200
    eventually(lambda: limit(other, "acme") == 50, "the other follows")
    began = time.time()
    assert change(other, "acme", "grants", tier="PREMIUM", duration_seconds=1.5)["http"] == 200
    eventually(lambda: limit(one, "acme") == 200, "the other follows")
    eventually(lambda: limit(one, "acme") == limit(other, "acme") == 50, "it ends on both")
    assert 1.5 <= time.time() - began < 3
    assert change(one, "acme", "reset")["http"] == 200


def test_more_clients_than_fit_are_looked_up_on_the_fast_path_too(
    upstream: Callable[..., RawUpstream], gateway: GatewayStarter, store_server: StoreServer
) -> None:
    """The first request of a client that is not remembered is limited by its own tier already."""
    running = gateway(sections(upstream(), store_server, max_cached_clients=10, decision_timeout=PATIENCE))
    for number in range(25):
        change(running, f"client-{number}", "tier", tier="PREMIUM")
    with RawClient(running.port) as client:
        for number in range(25):
            for _ in range(2):
                answer = client.get("/api/x", (f"X-Client-ID: client-{number}",))
                assert answer.all("x-ratelimit-limit") == [b"200"], number


def test_while_the_store_is_unavailable_changes_are_refused_with_the_reason_and_a_view_names_its_source(
    upstream: Callable[..., RawUpstream], gateway: GatewayStarter, store_server: StoreServer
) -> None:
    running = gateway(sections(upstream(), store_server, timeout=0.3))
    change(running, "acme", "tier", tier="BASIC")
    store_server.kill()
    refused = change(running, "acme", "tier", tier="PREMIUM")
    assert (refused["http"], refused["reason"]) == (503, "store_unavailable")
    assert "was not made" in refused["detail"]
    assert limit(running, "acme") == 50
    health = ask(f"{running.url}/health").json()
    assert (health["status"], health["client_store"]["status"]) == ("warn", "warn")
    assert health["client_store"]["error"]
    store_server.start()
    eventually(lambda: ask(f"{running.url}/clients/acme").json()["tier_source"] == "default", "it has begun anew")
