"""What a start imports: the modules that only some gateways need are left to those, as each takes time and memory."""

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from textwrap import dedent
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from api_gateway.admin import endpoints as endpoints_module
from api_gateway.admin import late_framework
from api_gateway.admin.endpoints import Endpoints
from api_gateway.admin.late_framework import LateFramework
from api_gateway.admin.routers import ROUTERS
from api_gateway.errors import InternalError
from api_gateway.eventloop import late_imports
from tests.processes import ROOT, START

VIEWS = ("metrics", "health", "circuit-breakers", "clients", "limits", "tiers", "audit", "history", "configuration")
# Serves a request and prints all modules that the process then has, and again after health checks; then the status of
# each view, asked for at once.
SCRIPT = f"""
    import os, signal, sys, threading, time
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    from urllib.request import Request, urlopen
    from api_gateway.cli import main
    from tests.kit import free_port

    port = free_port()

    def status(path):
        (token,) = (file.read_text().strip() for file in Path("state").rglob("operator-token"))
        request = Request(f"http://127.0.0.1:{{port}}/{{path}}", headers={{"Authorization": f"Bearer {{token}}"}})
        with urlopen(request) as response:
            return response.status

    def look():
        while True:
            try:
                urlopen(f"http://127.0.0.1:{{port}}/api/users").read()
            except OSError:
                time.sleep(0.05)
            else:
                break
        print("modules", *sys.modules, flush=True)
        print("health", *map(status, ["health", "healthz", "readyz"]), flush=True)
        print("probed", *sys.modules, flush=True)
        with ThreadPoolExecutor(16) as pool:
            print("views", *pool.map(status, {VIEWS * 2}), flush=True)

    def observe():
        try:
            look()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=observe, daemon=True).start()
    raise SystemExit(main(["--port", str(port)]))
"""

# By prefix, with what needs them.
LEFT_OUT = {
    "redis": "a shared store",
    "cryptography": "tokens, or generated certificates",
    "joserfc": "tokens",
    "h2": "upstreams with HTTP/2",
    "websockets": "nothing: the protocol serves WebSockets itself",
    "pydantic.v1": "routes of the framework, which looks for models of its former version",
    "textual": "the command top",
    "tomllib": "a file in TOML",
    "yaml": "a file in YAML",
    "fastapi": "operators, and programs that embed the gateway",
    "prometheus_client": "operators, for /metrics",
    "starlette": "as the framework, which is built on it",
    "api_gateway.main": "as the framework",
    "api_gateway.admin.dependencies": "operators",
    "api_gateway.admin.endpoints": "operators",
    "api_gateway.assembly.shared_store": "a shared store",
    "api_gateway.assembly.store_schema": "a shared store",
    "api_gateway.clients.jose": "tokens",
    "api_gateway.clients.redis_store": "a shared store",
    "api_gateway.doctor": "the command doctor",
    "api_gateway.limits.redis_limiter": "a shared store",
    "api_gateway.observability.trace_encoding": "tracing",
    "api_gateway.process.supervisor": "several workers",
    "api_gateway.replay": "the command replay",
    "api_gateway.settings.file_schema": "the command schema",
    "api_gateway.settings.openapi_routes": "the command init",
    "api_gateway.settings.starter_file": "the command init",
    "api_gateway.testing": "the tests of others",
    **{f"api_gateway.admin.{module}": "operators" for module, _, _ in ROUTERS},
    "api_gateway.admin.client_schema": "operators",
    "api_gateway.admin.explainer": "operators",
    "api_gateway.admin.views": "operators",
    "api_gateway.admin.health_view": "/health",
    "api_gateway.reporting.history_schema": "operators",
    "api_gateway.reporting.metrics_schema": "operators",
    "api_gateway.reporting.reload_schema": "operators",
    "api_gateway.reporting.upstream_schema": "operators",
    "api_gateway.reporting.usage_schema": "operators",
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return what SCRIPT prints, by the first word of the line."""
    folder = tmp_path_factory.mktemp("started")
    done = subprocess.run(
        [sys.executable, "-c", dedent(SCRIPT)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "HOME": str(folder), "GATEWAY_STATE_DIR": str(folder / "state")},
        capture_output=True,
        text=True,
        timeout=START,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {words[0]: words[1:] for line in done.stdout.splitlines() if (words := line.split())}


def test_a_start_without_configuration_imports_nothing_that_only_some_gateways_need(
    printed: dict[str, list[str]],
) -> None:
    modules = printed["modules"]
    assert "api_gateway.exchanges.fast_path" in modules
    needless = {
        f"{prefix}, for {need}"
        for prefix, need in LEFT_OUT.items()
        for module in modules
        if module == prefix or module.startswith(f"{prefix}.")
    }
    assert not needless


def test_health_checks_do_not_import_the_framework(printed: dict[str, list[str]]) -> None:
    assert printed["health"] == ["200"] * 3
    assert "api_gateway.admin.health_view" in printed["probed"]
    assert not {"fastapi", "starlette"} & set(printed["probed"])


def test_first_requests_for_all_operator_endpoints_at_once_are_served(printed: dict[str, list[str]]) -> None:
    assert printed["views"] == ["200"] * 2 * len(VIEWS)


async def test_routes_that_many_requests_need_at_once_are_added_once_and_in_order() -> None:
    added, completed = FastAPI(openapi_url=None), FastAPI(openapi_url=None)
    endpoints = Endpoints(added, Counter())
    added.add_api_route("/embedder", lambda: None)
    paths = [f"/{segment}" for _, _, segments in reversed(ROUTERS) for segment in segments]
    await asyncio.gather(*(endpoints.add_for({"type": "http", "path": path}) for path in paths * 2))
    Endpoints(completed, Counter()).complete()
    found = [getattr(route, "path", None) for route in added.router.routes]
    assert found == [*(getattr(route, "path", None) for route in completed.router.routes), "/embedder"]
    assert endpoints.present_routes == len(found) - 1


async def test_an_endpoint_that_cannot_be_imported_names_the_remedy_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an upgrade in place, when the files on the disk are not those of the running process."""
    app = FastAPI(openapi_url=None)
    Endpoints(app, Counter())

    def broken(name: str) -> Any:
        raise AttributeError(f"{name} has no attribute of the new release")

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        with monkeypatch.context() as patched:
            patched.setattr(endpoints_module, "import_gently", broken)
            found = await client.get("/metrics")
            assert (found.status_code, found.json()["reason"]) == (500, "internal_error")
            assert "restart the gateway" in found.json()["detail"]
        assert "of the new release" in caplog.text
        assert (await client.get("/metrics")).status_code == 403, (
            "the route is there, and refuses a request without operator"
        )


async def test_a_framework_that_cannot_be_imported_is_tried_again_and_then_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    framework = LateFramework({}, Counter())

    def broken(name: str) -> Any:
        raise ImportError(f"{name} is gone")

    async with httpx.AsyncClient(transport=httpx.ASGITransport(framework), base_url="http://gateway") as client:
        with monkeypatch.context() as patched:
            patched.setattr(late_framework, "import_gently", broken)
            with pytest.raises(InternalError, match=r"ImportError.* restart the gateway"):
                await client.get("/metrics")
        assert "admin.endpoints is gone" in caplog.text
        answers = await asyncio.gather(*(client.get("/metrics") for _ in range(3)))
        assert [answer.status_code for answer in answers] == [403] * 3, "the endpoint exists, for operators only"
        present = framework._app
        await client.get("/metrics")
        assert framework._app is present


@pytest.mark.parametrize("module", sorted({module for module, _, _ in ROUTERS}))
def test_the_table_of_endpoints_has_the_first_segments_of_all_paths(module: str) -> None:
    found = import_module(f"api_gateway.admin.{module}")
    stated = {name: set(segments) for one, name, segments in ROUTERS if one == module}
    routers = {name: value for name, value in vars(found).items() if isinstance(value, APIRouter)}
    assert stated == {
        name: {route.path.split("/")[1] for route in router.routes}  # type: ignore[attr-defined]  # all are routes
        for name, router in routers.items()
    }


def test_a_module_that_is_known_does_not_wait_for_the_import_of_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop takes routers that were imported for it, while a thread may import those of another request."""
    found = late_imports.import_gently("json")
    begun, is_over = threading.Event(), threading.Event()

    def slow(_: str) -> Any:
        begun.set()
        is_over.wait()

    monkeypatch.setattr(late_imports, "import_module", slow)
    monkeypatch.setattr(late_imports, "_imported", {"json": found})
    with ThreadPoolExecutor() as pool:
        other = pool.submit(late_imports.import_gently, "another")
        begun.wait()
        try:
            assert pool.submit(late_imports.import_gently, "json").result(timeout=START) is found
        finally:
            is_over.set()
        other.result()
