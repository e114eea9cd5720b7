"""The fixtures for pytest, which import the gateway when they are used: other test suites do not wait for it.

See docs/testing.md. pytest finds this module by the entry point `api_gateway` of the group `pytest11`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from api_gateway.testing.faulty_upstream import FaultyUpstream, Reply
    from api_gateway.testing.gateway_under_test import GatewayUnderTest


@pytest.fixture
def faulty_upstream() -> Iterator["Callable[..., FaultyUpstream]"]:
    """Start upstreams that respond by a script: `faulty_upstream(Reply(status=503), Reply())`.

    Each request takes the next reply; the last one is repeated. They are stopped at the end of the test.
    """
    module = import_module("api_gateway.testing.faulty_upstream")
    with ExitStack() as stack:

        def start(*script: "Reply") -> "FaultyUpstream":
            upstream: FaultyUpstream = module.FaultyUpstream(*script)
            stack.callback(upstream.stop)
            return upstream

        yield start


@pytest.fixture
def start_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Callable[..., GatewayUnderTest]"]:
    """Start gateways on free ports: `start_gateway(upstreams={"users": upstream.url}, tiers={"FREE": {...}})`.

    The arguments are the sections of the configuration; the environment is not read. With `virtual_clock=True` the
    time of the limits stands still until `advance` is called. The gateways are stopped at the end of the test.
    """
    module = import_module("api_gateway.testing.gateway_under_test")
    with ExitStack() as stack:

        def start(*, virtual_clock: bool = False, **sections: Any) -> "GatewayUnderTest":
            folder = tmp_path_factory.mktemp("gateway")
            gateway: GatewayUnderTest = module.GatewayUnderTest(sections, folder, is_virtual=virtual_clock)
            stack.callback(gateway.stop)
            return gateway

        yield start
