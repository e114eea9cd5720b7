"""Extensions in a running gateway, on its own server and by ASGI: the examples, failures, reloads and `/explain`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_gateway import GatewayConfig, create_app
from tests.kit import (
    RawClient,
    RawUpstream,
    RunningGateway,
    ask,
    in_front_of,
    reason,
    reply,
    running_gateway,
)

EXAMPLES = Path(__file__).parents[2] / "examples" / "extensions"
HOOKS = """
import asyncio, time

class Hooks:
    def __init__(self, options):
        self.options = options
        self.seen = []

    def identify(self, request):
        assert request.client is None and not request.headers.get("X-Wrong")
        return None

    async def cost(self, request, route):
        assert route == "all"
        if "slow" in request.query:
            await asyncio.sleep(600)
        return {"five": 5, "bad": "x"}.get(request.query)

    async def on_request(self, request):
        await asyncio.sleep(0)
        if request.query == "inject":
            return {"X-Note": "a" + chr(13) + chr(10) + "X-Injected: b"}
        if request.query == "frame":
            return {"Content-Length": "5"}
        return {"X-Seen": f"{request.client.id} {request.route} {request.cost:g}", "X-Secret": None}

    async def on_response(self, request, response):
        if request.query == "fail":
            raise RuntimeError("no")
        if request.query == "hang":
            await asyncio.sleep(600)
        await asyncio.sleep(0)
        return {"X-Status": str(response.status), "X-Internal": None}
"""


def extension(name: str, use: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "use": use, **settings}


@pytest.fixture(scope="module")
def service() -> Iterator[RawUpstream]:
    server = RawUpstream(reply(b"hello", headers=((b"X-Internal", b"i"), (b"Server", b"up"))))
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("extensions")
    (found / "accounts.json").write_text('{"tenant:acme": "A-1"}')
    (found / "hooks.py").write_text(HOOKS)
    return found


@pytest.fixture(scope="module")
def examples(service: RawUpstream, folder: Path) -> Iterator[RunningGateway]:
    """Run a gateway with the four examples."""
    sections = in_front_of(service.url) | {
        "extensions": [
            extension("tenants", f"{EXAMPLES}/tenants.py:Tenants", options={"tiers": {"big": "PREMIUM"}}),
            extension("pages", f"{EXAMPLES}/page_cost.py:PageCost"),
            extension(
                "lookup", f"{EXAMPLES}/lookup.py:Lookup", options={"table": str(folder / "accounts.json")}, budget=60
            ),
            extension("maintenance", f"{EXAMPLES}/maintenance.py:Maintenance", options={"file": str(folder / "off")}),
        ]
    }
    with running_gateway(sections, folder / "state") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def hooked(service: RawUpstream, folder: Path) -> Iterator[RunningGateway]:
    """Run a gateway with an extension that fails on demand."""
    budgets = {"cost": {"budget": 0.05, "on_timeout": "ignore"}, "on_response": {"budget": 0.2}}
    section = extension("hooks", f"{folder}/hooks.py:Hooks", budget=60, hooks=budgets)
    with running_gateway(in_front_of(service.url) | {"extensions": [section]}, folder / "state2") as gateway:
        yield gateway


def test_the_examples_identify_charge_and_change_fields(examples: RunningGateway, service: RawUpstream) -> None:
    answer = ask(f"{examples.url}/api/acme/x?limit=250", headers={"X-Account": "forged"})
    assert (answer.status, answer.body) == (200, b"hello")
    assert answer.headers["X-Region"] == "local"
    assert "Server" not in answer.headers
    assert service.requests[-1].all("x-account") == [b"A-1"]
    assert answer.headers["X-RateLimit-Remaining"] == str(100_000 - 3)
    other = ask(f"{examples.url}/api/big/x", headers={"X-Client-ID": "ignored", "X-Account": "forged"})
    assert other.headers["X-RateLimit-Limit"] == "200"
    assert service.requests[-1].all("x-account") == []


def test_an_identity_is_not_remembered_with_a_header_set(examples: RunningGateway) -> None:
    with RawClient(examples.port) as client:
        limits = [client.get(f"/api/{name}/x").all("x-ratelimit-limit") for name in ("a1", "big", "a1", "big")]
    assert limits == [[b"100000"], [b"200"]] * 2


def test_the_maintenance_example_responds_in_place_of_the_upstream(folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "maintenance"}
    exec((EXAMPLES / "maintenance.py").read_text(), namespace)  # noqa: S102 - our own example
    now = [0.0]
    switch = namespace["Maintenance"]({"file": str(folder / "off2")}, lambda: now[0])
    assert switch.on_request(None) is None
    (folder / "off2").touch()
    assert switch.on_request(None) is None  # looked for a moment ago
    now[0] = 1.0
    found = switch.on_request(None)
    assert (found.status, found.headers) == (503, {"Retry-After": "120"})


def test_fields_of_requests_and_responses_change_after_coroutines(
    hooked: RunningGateway, service: RawUpstream
) -> None:
    with RawClient(hooked.port) as client:
        for body in (b"", b"abc"):
            fields = ("X-Client-ID: me", "X-Secret: s", *([f"Content-Length: {len(body)}"] if body else []))
            client.request("POST" if body else "GET", "/api/x?five", fields, body)
            answer = client.answer()
            assert (answer.status, answer.body) == (200, b"hello")
            assert answer.all("x-status") == [b"200"]
            assert answer.all("x-internal") == []
            assert service.requests[-1].all("x-seen") == [b"me all 5"]
            assert service.requests[-1].all("x-secret") == []
            assert service.requests[-1].body == body


@pytest.mark.parametrize(
    ("query", "hook"),
    [
        ("bad", "cost"),
        ("inject", "on_request"),
        ("frame", "on_request"),
        ("fail", "on_response"),
        ("hang", "on_response"),
    ],
)
def test_a_hook_that_fails_refuses_its_request_and_harms_nothing_else(
    hooked: RunningGateway, service: RawUpstream, query: str, hook: str
) -> None:
    with RawClient(hooked.port) as client:
        answer = client.get(f"/api/x?{query}")
        assert reason(answer) == (500, "extension_failed")
        assert "'hooks'" in json.loads(answer.body)["detail"]
        assert hook in json.loads(answer.body)["detail"]
        assert client.get("/api/x").status == 200
    assert all(b"X-Injected" not in request.head for request in service.requests)


def test_a_coroutine_that_exceeds_its_budget_can_be_ignored(hooked: RunningGateway, service: RawUpstream) -> None:
    with RawClient(hooked.port) as client:
        assert client.get("/api/x?slow", ("X-Client-ID: s",)).status == 200
    assert service.requests[-1].all("x-seen") == [b"s all 1"]
    text = ask(f"{hooked.url}/metrics?format=prometheus").body.decode()
    assert 'gateway_extension_calls_total{extension="hooks",hook="cost",result="timeout"}' in text
    assert 'gateway_extension_seconds_total{extension="hooks",hook="cost"}' in text


def test_a_client_that_leaves_while_a_hook_is_awaited_leaves_nothing_behind(hooked: RunningGateway) -> None:
    with RawClient(hooked.port) as client:
        client.request("GET", "/api/x?hang")
        client.reset()
    with RawClient(hooked.port) as client:
        assert client.get("/api/x").status == 200


def explained(gateway: RunningGateway, **request: Any) -> Any:
    body = json.dumps({"client_id": None, "path": "/api/x", **request}).encode()
    return ask(f"{gateway.url}/explain", method="POST", headers={"Content-Type": "application/json"}, body=body).json()


def test_explain_shows_what_extensions_decide_and_calls_no_hook_with_effects(
    examples: RunningGateway, service: RawUpstream
) -> None:
    before = len(service.requests)
    found = explained(examples, path="/api/acme/x?limit=300")
    assert found["client"]["id"] == "tenant:acme"
    assert (found["route"]["cost"], found["route"]["cost_source"]) == (3, "extension")
    calls = {(one["extension"], one["hook"]): one["result"] for one in found["extensions"]}
    assert "tenant:acme" in calls["tenants", "identify"]
    assert calls["pages", "cost"] == "3"
    assert calls["maintenance", "on_request"].startswith("not evaluated")
    assert calls["lookup", "on_response"].startswith("not evaluated")
    assert len(service.requests) == before


async def test_extensions_work_by_asgi(service: RawUpstream, folder: Path, tmp_path: Path) -> None:
    section = extension("hooks", f"{folder}/hooks.py:Hooks", budget=60)
    sections = in_front_of(service.url) | {"extensions": [section], "state_dir": tmp_path, "log": {"access": False}}
    app = create_app(GatewayConfig.model_validate(sections))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway.test") as client:
            answer = await client.get("/api/x?five", headers={"X-Client-ID": "asgi"})
    assert (answer.status_code, answer.text, answer.headers["x-status"]) == (200, "hello", "200")
    assert service.requests[-1].all("x-seen") == [b"asgi all 5"]


async def test_a_reload_with_a_bad_extension_is_refused_and_the_running_configuration_stays(
    service: RawUpstream, tmp_path: Path
) -> None:
    path = tmp_path / "changing.py"
    good = (
        "class make:\n    def __init__(self, options): ...\n"
        "    def on_request(self, request):\n        return {{'X-Version': '{}'}}\n"
    )
    path.write_text(good.format(1))
    sections = in_front_of(service.url) | {
        "extensions": [extension("changing", f"{path}:make", load_timeout=30)],
        "state_dir": tmp_path,
        "log": {"access": False},
    }
    config = GatewayConfig.model_validate(sections)
    app = create_app(config, read=lambda: config)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway.test") as client:

            async def version() -> bytes:
                assert (await client.get("/api/x")).status_code == 200
                return service.requests[-1].all("x-version")[0]

            installation = app.state.admin_context.aggregator
            assert await version() == b"1"
            path.write_text("import sys\nsys.exit(1)\n")
            outcome = await installation.reload("test")
            assert "extensions[0].use: the extension 'changing' cannot be loaded: has ended the program" in str(
                outcome.problems
            )
            assert await version() == b"1"
            path.write_text(good.format(2) + "\n")
            assert not (await installation.reload("test")).problems
            assert await version() == b"2"
