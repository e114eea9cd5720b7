"""A FastAPI application with routes of its own and two gateways, each with its clients, limits and upstreams."""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from api_gateway import GatewayConfig, Route, Tier, Upstream, create_app

STATE = Path(os.environ.get("EXAMPLE_STATE", "state"))

public = create_app(
    GatewayConfig(
        upstreams={"users": Upstream(targets=[os.environ.get("USERS", "http://127.0.0.1:9001")])},
        routes=[Route(name="users", path="/api/users", upstream="users", cost=2)],
        tiers={"FREE": Tier(rate=1, capacity=10)},
        state_dir=STATE / "public",
    )
)
partners = create_app(
    GatewayConfig(
        upstreams={"orders": Upstream(targets=[os.environ.get("ORDERS", "http://127.0.0.1:9002")])},
        tiers={"FREE": Tier(rate=100, capacity=1000)},
        state_dir=STATE / "partners",
    )
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Start both gateways, which frameworks do not do for mounted applications."""
    async with AsyncExitStack() as stack:
        for gateway in (public, partners):
            await stack.enter_async_context(gateway.router.lifespan_context(gateway))
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/hello")
async def hello() -> dict[str, str]:
    """Respond beside the gateways."""
    return {"hello": "world"}


app.mount("/public", public)
app.mount("/partners", partners)
