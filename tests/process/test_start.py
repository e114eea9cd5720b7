"""What a start imports: the modules that only some gateways need are left to those, as each takes time and memory."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import pytest
from fastapi import APIRouter

from api_gateway.admin.endpoints import ROUTERS
from tests.processes import ROOT, START

# Serves a request, and prints all modules that the process then has.
SCRIPT = """
    import os, signal, sys, threading, time
    from urllib.request import urlopen
    from api_gateway.cli import main
    from tests.kit import free_port

    port = free_port()

    def look():
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/api/users").read()
            except OSError:
                time.sleep(0.05)
            else:
                break
        print("modules", *sys.modules, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()
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
    "rich": "the command top",
    "textual": "the command top",
    "api_gateway.assembly.shared_store": "a shared store",
    "api_gateway.assembly.store_schema": "a shared store",
    "api_gateway.clients.jose": "tokens",
    "api_gateway.clients.redis_store": "a shared store",
    "api_gateway.doctor": "the command doctor",
    "api_gateway.limits.redis_limiter": "a shared store",
    "api_gateway.observability.trace_encoding": "tracing",
    "api_gateway.replay": "the command replay",
    "api_gateway.settings.file_schema": "the command schema",
    "api_gateway.settings.openapi_routes": "the command init",
    "api_gateway.settings.starter_file": "the command init",
    "api_gateway.testing": "the tests of others",
    **{f"api_gateway.admin.{module}": "operators" for module, _, _ in ROUTERS},
    "api_gateway.admin.views": "operators",
    "api_gateway.admin.health_view": "/health",
    "api_gateway.reporting.history_schema": "operators",
    "api_gateway.reporting.metrics_schema": "operators",
    "api_gateway.reporting.reload_schema": "operators",
    "api_gateway.reporting.upstream_schema": "operators",
    "api_gateway.reporting.usage_schema": "operators",
}


def test_a_start_without_configuration_imports_nothing_that_only_some_gateways_need(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", dedent(SCRIPT)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "GATEWAY_STATE_DIR": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        timeout=START,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (modules,) = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("modules ")]
    assert "api_gateway.exchanges.fast_path" in modules
    needless = {
        f"{prefix}, for {need}"
        for prefix, need in LEFT_OUT.items()
        for module in modules
        if module == prefix or module.startswith(f"{prefix}.")
    }
    assert not needless


@pytest.mark.parametrize("module", sorted({module for module, _, _ in ROUTERS}))
def test_the_table_of_endpoints_has_the_first_segments_of_all_paths(module: str) -> None:
    found = import_module(f"api_gateway.admin.{module}")
    stated = {name: set(segments) for one, name, segments in ROUTERS if one == module}
    routers = {name: value for name, value in vars(found).items() if isinstance(value, APIRouter)}
    assert stated == {
        name: {route.path.split("/")[1] for route in router.routes}  # type: ignore[attr-defined]  # all are routes
        for name, router in routers.items()
    }
