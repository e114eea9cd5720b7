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


def test_a_tier_and_a_grant_set_at_one_gateway_hold_at_the_other(
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
    assert time.time() - began >= 1.5
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


def test_the_usage_of_machines_that_share_a_store_is_counted_once_and_adds_up(
    upstream: Callable[..., RawUpstream], gateway: GatewayStarter, store_server: StoreServer
) -> None:
    """Each machine counts what it served, also what the shared bucket refuses."""
    shared = sections(upstream(), store_server) | {
        "usage": {"enabled": True},
        "clients": {"acme": {"tier": "BASIC"}},
        "tiers": {"BASIC": {"rate": 0.001, "capacity": 5}},
    }
    machines = [gateway(shared), gateway(shared)]
    statuses = []
    for number in range(9):
        with RawClient(machines[number % 3 % 2].port) as client:
            statuses.append(client.get("/api/x", ("X-Client-ID: acme",)).status)
    assert sorted(statuses) == [200] * 5 + [429] * 4
    parts = [ask(f"{one.url}/usage?by=client").json()["rows"] for one in machines]
    figures = [(row["requests"], row["limited"], row["tokens"]) for rows in parts for row in rows]
    assert [requests for requests, *_ in figures] == [6, 3]
    assert tuple(map(sum, zip(*figures, strict=True))) == (9, 4, 5)
