"""`PacingTransport` in front of a real gateway: no client is refused."""

import asyncio
import time
from typing import Any

import httpx
import pytest

from api_gateway import PacingTransport
from tests.kit import RunningGateway, in_front_of


@pytest.mark.parametrize("seconds", [2.0, pytest.param(60.0, marks=pytest.mark.heavy)])
async def test_fifty_clients_of_a_real_gateway_get_no_429(gateway: Any, upstream: Any, seconds: float) -> None:
    sections = in_front_of(upstream().url) | {"tiers": {"FREE": {"rate": 2, "capacity": 4}}}
    running: RunningGateway = gateway(sections)
    transport = PacingTransport(httpx.AsyncHTTPTransport(), max_retries=0)
    async with httpx.AsyncClient(transport=transport, base_url=running.url, timeout=60) as client:

        async def use(name: str) -> float:
            """Return the share of the budget that a client has used from its first response to its last."""
            statuses, began, end = [], 0.0, time.monotonic() + seconds
            while time.monotonic() < end:
                statuses.append((await client.get("/api/x", headers={"X-Client-ID": name})).status_code)
                began = began or time.monotonic()
            assert set(statuses) == {200}
            return len(statuses) / (4 + 2 * (time.monotonic() - began))

        busy, began = time.process_time(), time.monotonic()
        shares = await asyncio.gather(*(use(f"client-{number}") for number in range(50)))
        busy, took = time.process_time() - busy, time.monotonic() - began
    # Clients, gateway and upstream are one process, which cannot use more than one core.
    print(f"shares of the budget: {min(shares):.3f} to {max(shares):.3f}; {busy / took:.0%} of a core was used")
    if seconds > 2:  # alone on the machine
        assert min(shares) >= 0.98
