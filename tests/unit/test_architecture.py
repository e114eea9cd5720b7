"""The shape of the package: what each package may import, which libraries it knows, and the picture in the docs.

A package imports itself and lower layers, never sideways, never up; a module at the top of `api_gateway` counts as a
package of its own. `python -m tests.unit.test_architecture` draws the picture in docs/architecture.md again.
"""

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from tests import sources
from tests.cases import each
from tests.sources import PACKAGE

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- layers: begin -->\n", "<!-- layers: end -->"

# Lowest first; `api_gateway` is what the package itself offers (`api_gateway/__init__.py`).
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_version", "demo", "errors", "eventloop", "ip_addresses", "models", "pacing", "printable_text"),
    ("http1", "observability", "rate_limiter", "system"),
    ("extensions", "resilience", "settings"),
    ("circuit_breaker", "config", "downstream", "metrics", "sections", "storage", "transport"),
    ("clients", "limits", "reload", "upstreams", "usage"),
    ("proxy", "reporting"),
    ("router",),
    ("middleware",),
    ("exchanges",),
    ("admin",),
    ("assembly",),
    ("main", "replay"),
    ("api_gateway", "process"),
    ("doctor",),
    ("cli", "server", "testing"),
    ("__main__",),
)
LIBRARIES = {
    "cryptography": {"clients"},
    "fastapi": {"admin", "main"},
    "hiredis": {"storage"},
    "httptools": {"downstream", "transport"},
    "httpx": {"assembly", "exchanges", "main", "pacing", "proxy", "transport", "upstreams"},
    "joserfc": {"clients"},
    "opentelemetry": {"observability"},
    "prometheus_client": {"reporting"},
    "pydantic": {"admin", "config", "doctor", "models", "reload", "reporting", "settings"},
    "pydantic_settings": {"config"},
    "redis": {"storage"},
    "sqlite3": {"storage"},
    "starlette": {"admin"},
    "uvicorn": {"demo", "downstream", "process"},
    "yaml": {"settings"},
}
# The decision layers: packages and modules that get the time as an argument. They read no clock and do not wait.
NO_CLOCK = (
    "admin.cross_site",
    "admin.locality",
    "admin.operator_limits",
    "admin.operators",
    "admin.pages",
    "circuit_breaker",
    "clients.bloom_filter",
    "clients.cache",
    "clients.claim_paths",
    "clients.grant_expiry",
    "clients.identity",
    "clients.jose",
    "clients.jwt_reader",
    "clients.jwt_verifier",
    "clients.records",
    "errors",
    "http1.fast_parser",
    "http1.headers",
    "http1.methods",
    "http1.request_paths",
    "http1.serializer",
    "limits.deny_cache",
    "limits.fallback_limiter",
    "limits.period_counters",
    "limits.quota_state",
    "limits.periods",
    "limits.quota_decisions",
    "limits.ratelimit_headers",
    "limits.refusal",
    "metrics",
    "models",
    "observability.heavy_hitters",
    "pacing.client_budget",
    "pacing.cost_estimates",
    "pacing.quota_estimate",
    "pacing.stated_limits",
    "observability.latency_series",
    "observability.trace_context",
    "observability.trace_encoding",
    "observability.tracing",
    "proxy.attribution",
    "proxy.deadline",
    "proxy.failure_record",
    "proxy.fallback",
    "proxy.route_table",
    "proxy.candidate_limits",
    "proxy.url_rewriting",
    "proxy.websocket_frames",
    "rate_limiter",
    "reload.changes",
    "reload.outcome",
    "reporting.merge",
    "reporting.overview",
    "reporting.problems",
    "reporting.traffic_history",
    "resilience",
    "settings",
    "upstreams.load_balancing",
    "upstreams.outlier_detection",
    "upstreams.target",
    "upstreams.upstream",
)
MAX_LINES = 400  # of a module, unless its docstring contains the words below, in any case
REASON = "long because "


def module_name(path: Path) -> str:
    """Return the dotted name of a module below `api_gateway`; the package itself has its own name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or PACKAGE.name


RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def package_of(module: str) -> str:
    """Return the package that a module belongs to."""
    return module.partition(".")[0]


@cache
def modules() -> dict[str, ast.Module]:
    """Return the modules by name; not read before a test needs them, as every process collects this file."""
    return {module_name(path): tree for path, tree in sources.trees().items()}


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Return each node with the name of its module."""
    return [(name, node) for name, tree in modules().items() for node in sources.nodes()[_paths()[tree]]]


@cache
def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Return each function with the name of its module."""
    return [(name, node) for name, node in nodes() if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@cache
def imports(tree: ast.Module) -> frozenset[str]:
    """Return every module imported, wherever the import stands, with imported names as if they were modules."""
    found: set[str] = set()
    for node in sources.nodes()[_paths()[tree]]:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@cache
def _paths() -> dict[ast.Module, Path]:
    return {tree: path for path, tree in sources.trees().items()}


def own_imports(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of the package that are imported, as dotted names below `api_gateway`."""
    for name in imports(tree):
        below = name.removeprefix(f"{PACKAGE.name}.")
        while below != name and below:
            if below in modules():
                yield below
                break
            below = below.rpartition(".")[0]
        if name.startswith(f"{PACKAGE.name}.") and not below:
            yield PACKAGE.name  # a public name of the package itself


def packages_imported_by(package: str) -> set[str]:
    """Return the other packages that the modules of a package import."""
    trees = [tree for name, tree in modules().items() if package_of(name) == package]
    return {package_of(other) for tree in trees for other in own_imports(tree)} - {package}


def test_every_package_has_one_layer() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))
    assert set(names) == set(map(package_of, modules()))


def test_a_package_imports_itself_and_lower_layers() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in sorted(set(own_imports(tree)))
        if package_of(other) != package_of(name) and RANK[package_of(other)] >= RANK[package_of(name)]
    ]
    assert not wrong


def test_modules_have_no_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a cycle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for other in set(own_imports(modules()[module])) - {module}:
                visit(other, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_imports_stand_at_the_top() -> None:
    inside = {(name, line) for name, one in functions() for line in range(one.lineno, (one.end_lineno or 0) + 1)}
    hidden = [
        f"{name}, line {node.lineno}"
        for name, node in nodes()
        if isinstance(node, ast.Import | ast.ImportFrom) and (name, node.lineno) in inside
    ]
    assert not hidden, "imports inside functions"


@each("library", sorted(LIBRARIES))
def test_a_library_is_known_to_its_packages_only(library: str) -> None:
    users = {
        package_of(name)
        for name, tree in modules().items()
        if library in {found.partition(".")[0] for found in imports(tree)}
    }
    assert users == LIBRARIES[library], f"{library} is imported by {sorted(users)}"


@each("part", NO_CLOCK)
def test_what_decides_reads_no_clock_and_does_not_wait(part: str) -> None:
    parts = {name: tree for name, tree in modules().items() if name == part or package_of(name) == part}
    assert parts, f"there is no {part}"
    for name, tree in parts.items():
        assert not imports(tree) & {"time", "asyncio"}, f"{name} imports a clock"


def test_no_handler_swallows_everything() -> None:
    broad = [
        f"{name}, line {node.lineno}"
        for name, node in nodes()
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]
    assert not broad, "handlers that swallow every exception"


def test_functions_stay_short() -> None:
    long = {
        f"{name}: {node.name}": length
        for name, node in functions()
        if (length := (node.end_lineno or 0) - node.lineno - len((ast.get_docstring(node) or "").split("\n"))) > 60
    }
    assert not long


def test_a_module_says_what_it_is_for_and_why_it_is_long() -> None:
    lengths = {module_name(path): len(path.read_text().splitlines()) for path in sources.trees()}
    for name, tree in modules().items():
        text = ast.get_docstring(tree) or ""
        assert text.splitlines()[:1] != [], f"{name} has no docstring"
        assert lengths[name] <= MAX_LINES or REASON in text.lower(), (
            f"{name} has {lengths[name]} lines, and no sentence says why"
        )


def test_a_package_holds_nothing_but_its_purpose() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        assert len(ast.parse(path.read_text()).body) == 1, f"{path.parent.name}/__init__.py holds code"
        assert len(path.read_text().splitlines()) <= 4


def picture() -> str:
    """Return the layers as a picture, highest first, and a row for each package."""
    layers = [
        [f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py" for name in layer if name not in HIDDEN]
        for layer in LAYERS
    ]
    rows = ["   ".join(layer) for layer in reversed(layers) if layer]
    width = max(map(len, rows))
    line = f"+-{'-' * width}-+"
    box = "\n".join(f"{line}\n| {row:^{width}} |" for row in rows)
    return f"```text\n{box}\n{line}\n```\n\n| package | what it is for | imports |\n|---|---|---|\n{''.join(_rows())}"


HIDDEN = ("api_gateway", "_version", "__main__")  # from the picture, where they would say nothing


def _rows() -> Iterable[str]:
    for layer in reversed(LAYERS):
        for name in layer:
            if (PACKAGE / name).is_dir():
                purpose = " ".join((ast.get_docstring(modules()[name]) or "").split())
                lower = sorted(packages_imported_by(name) - set(HIDDEN), key=lambda one: (RANK[one], one))
                yield f"| `{name}/` | {purpose} | {', '.join(lower)} |\n"


def page_with(drawn: str) -> str:
    """Return the page with the picture between its markers."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{PAGE} has lost its markers"
    assert end, f"{PAGE} has lost its markers"
    return before + BEGIN + drawn + END + after


def test_the_picture_in_the_docs_is_this_one() -> None:
    assert PAGE.read_text() == page_with(picture()), "run `python -m tests.unit.test_architecture`"


if __name__ == "__main__":
    PAGE.write_text(page_with(picture()))
