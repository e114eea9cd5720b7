"""The public names: each is documented, imported lazily, and usable by an application of a user."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from pydantic import BaseModel

import api_gateway
from api_gateway import sections
from api_gateway.settings.upstream_object import TypedUpstream
from api_gateway.settings.upstreams import UpstreamSection
from tests.kit import RawUpstream, reply

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python-api.md"


def test_every_public_name_is_documented_and_no_other() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(api_gateway.__all__)


def reachable(annotation: Any) -> set[type[BaseModel]]:
    """Return the sections that a type has, with all sections below them."""
    found: set[type[BaseModel]] = set()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        found = {annotation}.union(*(reachable(one.annotation) for one in annotation.model_fields.values()))
    return found.union(*map(reachable, get_args(annotation)))


def test_every_section_is_public_and_documented() -> None:
    named = {api_gateway.Client, api_gateway.Extension, api_gateway.Route, api_gateway.Target, api_gateway.Tier}
    others = reachable(api_gateway.GatewayConfig) - named - {api_gateway.GatewayConfig, UpstreamSection}
    assert {getattr(sections, name) for name in sections.__all__} == others
    rows = re.findall(r"^\| in `[a-z_]+` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(re.findall(r"\w+", " ".join(rows))) == sorted(sections.__all__)


def test_every_public_name_exists_and_says_what_it_is() -> None:
    for name in api_gateway.__all__:
        found = getattr(api_gateway, name)
        assert name == "__version__" or inspect.getdoc(found), name


def test_a_public_name_imports_only_what_it_needs() -> None:
    code = (
        "import sys, api_gateway; before = set(sys.modules); api_gateway.PacingTransport;"
        "print([one for one in ('fastapi', 'redis', 'uvicorn', 'api_gateway.config') if one in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_the_arguments_of_an_upstream_are_those_of_its_section() -> None:
    source = inspect.getsource(sys.modules[TypedUpstream.__module__])
    declared = re.findall(r"^            (\w+): ", source, re.MULTILINE)
    assert declared == list(UpstreamSection.model_fields)
    assert TypedUpstream(targets=["http://127.0.0.1:1"]).targets[0].url == "http://127.0.0.1:1"


async def test_two_gateways_and_own_routes_in_one_application(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    users, orders = RawUpstream(reply(b"users")), RawUpstream(reply(b"orders"))
    for name, value in (("USERS", users.url), ("ORDERS", orders.url), ("EXAMPLE_STATE", str(tmp_path))):
        monkeypatch.setenv(name, value)
    namespace: dict[str, object] = {"__name__": "two_gateways"}
    exec((ROOT / "examples" / "embedding" / "two_gateways.py").read_text(), namespace)  # noqa: S102 - our own example
    app: api_gateway.main.GatewayApp = namespace["app"]  # type: ignore[assignment]  # of the example
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway.test") as client:
        assert (await client.get("/public/api/users")).status_code == 503  # before the lifespan
        async with app.router.lifespan_context(app):
            first = await client.get("/public/api/users", headers={"X-Client-ID": "me"})
            second = await client.get("/partners/api/orders", headers={"X-Client-ID": "me"})
            assert (first.text, first.headers["x-ratelimit-remaining"]) == ("users", "8")
            assert (second.text, second.headers["x-ratelimit-limit"]) == ("orders", "1000")
            assert (await client.get("/hello")).json() == {"hello": "world"}
            assert (await client.get("/public/health")).status_code == 200
            assert (await client.get("/partners/api/users")).status_code == 404  # a route of the other gateway
    users.close()
    orders.close()
