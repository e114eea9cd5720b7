"""The shape of the package: imports point to lower layers, without cycles, and stand at the top of the module."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "api_gateway"

# Lowest first. Within a layer a module may import those to its left where a `<` says so.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "models",
        "headers",
        "heads",
        "diagnosis",
        "environment",
        "bind_address",
        "store_url",
        "state_folder",
        "secret",
        "lifeline",
        "held_signals",
        "output",
        "pacing",
        "frames",
        "id_filter",
        "local_resources",
        "breaker_policy",
        "upstream_bodies",
        "metrics_bodies",
        "explanation_bodies",
        "reload_bodies",
        "reload_state",
    ),
    (
        "client_records",
        "client_copy",
        "endings",
        "config",
        "config_sections",
        "config_rules",
        "config_repair",
        "route_rules",
        "rate_limiter",
        "local_share",
        "call_window",
        "principals",
        "ramp",
        "breaker_records",
        "circuit_breaker",
        "gradient",
        "overload",
        "targets",
        "picks",
        "rotation",
        "balancer",
        "retry",
        "fallback",
        "routes",
        "deadline",
        "auth",
        "operators",
        "locality",
        "cross_site",
        "operator_limits",
        "request_paths",
        "limit_fields",
        "shares",
        "sketch",
    ),
    (
        "store",
        "dispatcher",
        "cluster_dispatcher",
        "redis_limiter",
        "tasks",
        "client_look_ups",
        "sqlite_clients",
        "redis_clients",
        "clients",
        "alarm",
        "lag",
        "watchdog",
        "heap",
        "send_queue",
        "clocks",
        "receive_buffer",
        "pool",
        "outgoing",
        "answer",
        "connection",
        "transport",
        "failures",
        "verdicts",
        "reply",
        "guarded",
        "tunnel",
        "event_stream",
        "health",
        "breaker_modes",
        "resolution",
        "metrics",
        "exposition",
        "report",
        "merging",
        "crew",
        "health_cache",
        "access_log",
        "link",
        "cycle",
        "protocol",
        "brief",
        "config_changes",
        "reload",
        "listening",
        "socket_table",
        "peer_process",
        "local_operator",
        "operator_token",
        "embedded",
    ),
    (
        "service",
        "upkeep",
        "request",
        "stand_in",
        "router",
        "shadow",
        "settlement",
        "middleware",
        "operator_body",
        "operator_gate",
        "express",
        "explanation",
    ),
    ("target_views", "reload_views", "admin", "admin_listener", "demo"),
    ("assembly_access", "assembly_upstreams", "assembly_routes", "assembly_stores", "assembly_data_plane", "assembly"),
    ("installation",),
    ("main",),
    ("welcome",),
    ("start_check",),
    ("config_watch",),
    ("server", "staff"),
    ("worker", "supervisor"),
    ("cli",),
    ("__main__",),
)
SIBLINGS = {
    ("local_resources", "errors"),
    ("reload_bodies", "models"),
    ("upstream_bodies", "reload_bodies"),
    ("reload", "config_changes"),
    ("reload_views", "target_views"),
    ("admin", "reload_views"),
    ("assembly", "assembly_routes"),
    ("connection", "receive_buffer"),
    ("connection", "send_queue"),
    ("protocol", "send_queue"),
    ("tunnel", "receive_buffer"),
    ("peer_process", "socket_table"),
    ("local_operator", "peer_process"),
    ("local_operator", "socket_table"),
    ("local_operator", "link"),
    ("local_operator", "locality"),
    ("assembly", "assembly_stores"),
    ("assembly", "assembly_upstreams"),
    ("assembly_data_plane", "assembly"),
    ("local_share", "rate_limiter"),
    ("dispatcher", "store"),
    ("dispatcher", "tasks"),
    ("store", "tasks"),
    ("cluster_dispatcher", "dispatcher"),
    ("cluster_dispatcher", "store"),
    ("cluster_dispatcher", "tasks"),
    ("redis_limiter", "cluster_dispatcher"),
    ("redis_limiter", "dispatcher"),
    ("redis_limiter", "tasks"),
    ("redis_limiter", "store"),
    ("upstream_bodies", "models"),
    ("metrics_bodies", "models"),
    ("metrics_bodies", "upstream_bodies"),
    ("explanation_bodies", "models"),
    ("headers", "models"),
    ("heads", "headers"),
    ("client_copy", "client_records"),
    ("endings", "client_records"),
    ("client_look_ups", "tasks"),
    ("clients", "client_look_ups"),
    ("redis_clients", "store"),
    ("redis_clients", "tasks"),
    ("clients", "tasks"),
    ("heads", "models"),
    ("express", "middleware"),
    ("express", "request"),
    ("express", "router"),
    ("express", "service"),
    ("breaker_records", "call_window"),
    ("circuit_breaker", "breaker_records"),
    ("circuit_breaker", "call_window"),
    ("circuit_breaker", "principals"),
    ("circuit_breaker", "ramp"),
    ("balancer", "breaker_records"),
    ("balancer", "circuit_breaker"),
    ("balancer", "picks"),
    ("balancer", "rotation"),
    ("balancer", "targets"),
    ("picks", "targets"),
    ("rotation", "breaker_records"),
    ("rotation", "circuit_breaker"),
    ("rotation", "picks"),
    ("rotation", "targets"),
    ("targets", "circuit_breaker"),
    ("routes", "fallback"),
    ("retry", "ramp"),
    ("deadline", "routes"),
    ("config", "config_sections"),
    ("diagnosis", "secret"),
    ("environment", "diagnosis"),
    ("config", "config_rules"),
    ("config", "config_repair"),
    ("config_rules", "config_sections"),
    ("config_rules", "route_rules"),
    ("config_rules", "routes"),
    ("route_rules", "config_sections"),
    ("route_rules", "routes"),
    ("reply", "answer"),
    ("reply", "outgoing"),
    ("reply", "transport"),
    ("balancer", "overload"),
    ("overload", "gradient"),
    ("merging", "report"),
    ("report", "metrics"),
    ("report", "resolution"),
    ("admin", "target_views"),
    ("exposition", "metrics"),
    ("crew", "report"),
    ("middleware", "request"),
    ("middleware", "router"),
    ("request", "service"),
    ("upkeep", "service"),
    ("router", "request"),
    ("router", "service"),
    ("router", "stand_in"),
    ("failures", "pool"),
    ("overload", "shares"),
    ("verdicts", "failures"),
    ("stand_in", "request"),
    ("stand_in", "service"),
    ("middleware", "shadow"),
    ("operator_body", "request"),
    ("operator_gate", "middleware"),
    ("operator_gate", "operator_body"),
    ("operator_limits", "operators"),
    ("operator_limits", "rate_limiter"),
    ("operator_gate", "request"),
    ("explanation", "middleware"),
    ("explanation", "router"),
    ("protocol", "cycle"),
    ("answer", "alarm"),
    ("event_stream", "answer"),
    ("event_stream", "link"),
    ("connection", "alarm"),
    ("connection", "answer"),
    ("connection", "outgoing"),
    ("connection", "pool"),
    ("transport", "answer"),
    ("transport", "connection"),
    ("transport", "outgoing"),
    ("transport", "pool"),
    ("tunnel", "alarm"),
    ("protocol", "alarm"),
    ("protocol", "link"),
}
OUTSIDE = {
    "httpx": {
        "local_resources",
        "pool",
        "outgoing",
        "answer",
        "connection",
        "transport",
        "failures",
        "verdicts",
        "reply",
        "guarded",
        "service",
        "request",
        "router",
        "assembly",
        "assembly_upstreams",
        "main",
    },
    "httptools": {"connection", "protocol"},
    "fastapi": {"admin", "main", "server"},
    "starlette": {"admin", "installation"},
    "prometheus_client": {"exposition"},
    "redis": {"store"},
    "hiredis": {"store"},
    "sqlite3": {"sqlite_clients"},
    "pydantic": {
        "config_rules",
        "models",
        "upstream_bodies",
        "metrics_bodies",
        "explanation_bodies",
        "config",
        "config_changes",
        "config_sections",
        "config_repair",
        "environment",
        "diagnosis",
        "reload_bodies",
        "secret",
    },
    "pydantic_settings": {"config"},
    "yaml": {"diagnosis"},
    "uvicorn": {"protocol", "demo", "server"},
}
NO_CLOCK = {name for layer in LAYERS[:2] for name in layer} - {"config", "output", "pacing"}

MODULES = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(tree: ast.Module) -> set[str]:
    """Return every module imported, with its names as sub-modules of our own package resolved."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(tree: ast.Module) -> set[str]:
    """Return the modules of the package that are imported."""
    names = {name.split(".")[1] for name in imports(tree) if name.startswith("api_gateway.")}
    return names & set(MODULES)


def test_every_module_has_a_layer() -> None:
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_to_lower_layers(name: str) -> None:
    wrong = {other for other in ours(MODULES[name]) if RANK[other] >= RANK[name] and (name, other) not in SIBLINGS}
    assert not wrong, f"{name} imports {wrong}"


def test_there_are_no_cycles() -> None:
    """Siblings that may import each other do so in one direction only."""
    assert not {(one, other) for one, other in SIBLINGS if (other, one) in SIBLINGS}
    assert all(one not in ours(MODULES[other]) for one, other in SIBLINGS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_stand_at_the_top(name: str) -> None:
    hidden = [
        node.lineno
        for function in ast.walk(MODULES[name])
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not hidden, f"{name} imports inside functions, at lines {hidden}"


@pytest.mark.parametrize("library", sorted(OUTSIDE))
def test_a_library_is_known_to_its_modules_only(library: str) -> None:
    users = {name for name, tree in MODULES.items() if library in {found.split(".")[0] for found in imports(tree)}}
    assert users <= OUTSIDE[library], f"{library} is also imported by {users - OUTSIDE[library]}"


@pytest.mark.parametrize("name", sorted(NO_CLOCK))
def test_what_decides_reads_no_clock_and_does_not_wait(name: str) -> None:
    assert not imports(MODULES[name]) & {"time", "asyncio"}, f"{name} imports a clock"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_handler_swallows_everything(name: str) -> None:
    broad = [
        node.lineno
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]
    assert not broad, f"{name} swallows exceptions at lines {broad}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_functions_stay_short(name: str) -> None:
    long = {
        node.name: length
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno - len((ast.get_docstring(node) or "").split("\n"))) > 60
    }
    assert not long, f"{name} has long functions: {long}"
