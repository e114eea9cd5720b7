"""The demo upstreams."""

import pytest

from api_gateway.config import GatewayConfig
from api_gateway.demo import DEMO_NAMES, DemoUpstreams, banner
from tests.kit import ask


@pytest.fixture
async def demo() -> DemoUpstreams:
    return DemoUpstreams()


async def test_each_service_responds_to_its_health_check_and_stops(demo: DemoUpstreams) -> None:
    await demo.start()
    try:
        assert [ask(f"{demo.urls[name]}/health").json() for name in DEMO_NAMES] == [{"status": "ok"}] * 4
        assert ask(f"{demo.urls['users']}/users/9").status == 404
        assert ask(f"{demo.urls['slow']}/slow?seconds=never").status == 400
        posted = ask(f"{demo.urls['orders']}/orders", method="POST", body=b'{"item": "tape"}')
        assert (posted.status, posted.json()) == (201, {"created": {"item": "tape"}})
    finally:
        await demo.stop()
    with pytest.raises(OSError, match="refused"):
        ask(f"{demo.urls['users']}/health")


async def test_flaky_fails_by_its_switch_and_recovers(demo: DemoUpstreams) -> None:
    url = demo.urls["flaky"]
    await demo.start()
    try:
        assert ask(f"{url}/flaky").status == 200
        assert ask(f"{url}/flaky?fail=1").status == 500
        assert ask(f"{url}/flaky/fail", method="POST").json() == {"failing": True}
        assert ask(f"{url}/flaky").status == 500
        assert ask(f"{url}/flaky/recover", method="POST").json() == {"failing": False}
        assert ask(f"{url}/flaky").status == 200
    finally:
        await demo.stop()


async def test_its_sections_are_a_valid_configuration(demo: DemoUpstreams) -> None:
    config = GatewayConfig.model_validate(demo.sections())
    assert [route.path for route in config.routes] == [f"/api/{name}" for name in DEMO_NAMES]
    assert not config.is_demo
    demo.close()


async def test_the_banner_names_every_service_and_three_lines_to_paste() -> None:
    text = banner("127.0.0.1:1234", "http://localhost:1234")
    assert all(f"http://localhost:1234/api/{name}" in text for name in DEMO_NAMES)
    assert sum(line.startswith(("  curl", "  for")) for line in text.splitlines()) == 3
