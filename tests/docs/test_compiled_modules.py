"""What `make compiled` compiles: the modules of the request path, each written so that mypyc can compile it."""

import ast
import tomllib
from pathlib import Path

from tests import sources

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def compiled_modules() -> list[str]:
    """Return the modules that mypyc compiles."""
    hook = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["mypyc"]
    assert not hook["enable-by-default"]
    compiled: list[str] = hook["include"]
    return compiled


# What compiled modules import, or what creates the connections of clients, and is not compiled; and why.
INTERPRETED = {
    "it has the bodies of operator endpoints too, whose classes pydantic reads": ("models.py",),
    "its classes inherit from errors or quotas, which are interpreted": (
        "errors.py",
        "limits/concurrency.py",
        "limits/limit_reached.py",
        "limits/quota_state.py",
    ),
    "its classes have base classes of asyncio, httpx or collections": (
        "extensions/fields.py",
        "proxy/websocket_tunnel.py",
        "transport/httpx_call.py",
        "transport/local_resources.py",
        "transport/request.py",
    ),
    "it has protocols or values only, which run no code for a request": (
        "clients/records.py",
        "downstream/connection_limits.py",
        "downstream/listener_state.py",
        "downstream/owner.py",
        "downstream/server_context.py",
        "exchanges/client_port.py",
        "extensions/interface.py",
        "http1/asgi.py",
        "proxy/edited_lines.py",
        "resilience/breaker_history.py",
    ),
    "what it finds out is remembered with the header set, and it has a protocol that is checked at run time": (
        "clients/api_keys.py",
        "proxy/identity_sources.py",
        "proxy/jwt_source.py",
    ),
    "a look-up is one of a dictionary; the rest waits for the store": ("clients/registry.py",),
    "it serves what comes by ASGI, whose time is that of tasks; tests replace its methods": (
        "downstream/request_cycle.py",
        "exchanges/asgi_downstream.py",
    ),
    "it runs once for a connection": (
        "downstream/client_certificate.py",
        "downstream/proxied_connection.py",
        "downstream/tls_terminator.py",
        "downstream/uvicorn_server.py",
        "eventloop/receive_buffer.py",
        "transport/http1_transport.py",
    ),
    "it runs when something ends or fails": (
        "downstream/last_request.py",
        "eventloop/resetting.py",
        "eventloop/tasks.py",
        "transport/error_mapping.py",
    ),
    "it runs once in a calendar period": ("limits/periods.py",),
    "it runs in a thread of its own, or for operators": (
        "eventloop/steps.py",
        "observability/trace_exporter.py",
    ),
    "it takes what JSON of other workers contains, which has lists instead of tuples": (
        "observability/heavy_hitters.py",
    ),
    "it inherits from a type of the interpreter, and has no method of its own": ("observability/label_counter.py",),
    "it is of the log for people": ("printable_text.py",),
}
BEGINNING = "api_gateway/downstream/connection_factory.py"  # interpreted, and runs once for a connection


def imported_by(path: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    found: set[str] = set()
    for one in sources.nodes()[ROOT / path]:
        if isinstance(one, ast.ImportFrom) and (one.module or "").startswith("api_gateway"):
            place = (one.module or "").replace(".", "/")
            names = [f"{place}/{name.name}.py" for name in one.names]
            found.update(name if (ROOT / name).is_file() else f"{place}.py" for name in names)
    return found


def test_what_compiled_modules_import_is_compiled_or_has_a_reason_not_to_be() -> None:
    compiled = set(compiled_modules())
    found = {other for path in (*compiled, BEGINNING) for other in imported_by(path)} - compiled
    named = [f"api_gateway/{path}" for paths in INTERPRETED.values() for path in paths]
    assert sorted(named) == sorted(found)


def test_what_is_compiled_exists_and_has_nothing_that_mypyc_cannot_compile() -> None:
    compiled = compiled_modules()
    assert compiled == sorted(set(compiled))
    assert [path for path in compiled if not (ROOT / path).is_file()] == []
    for path in compiled:
        source = (ROOT / path).read_text()
        assert "cached_property" not in source, path
        assert "from copy import" not in source, path
        assert "@runtime_checkable" not in source, path
        nodes = sources.nodes()[ROOT / path]
        for scope in (one for one in nodes if isinstance(one, ast.AsyncFunctionDef)):
            assert not any(isinstance(one, ast.Yield) for one in ast.walk(scope)), f"{path}: {scope.name}"
        for kind in (one for one in nodes if isinstance(one, ast.ClassDef)):
            several = [one for one in kind.body if isinstance(one, ast.Assign) and len(one.targets) > 1]
            assert not several, f"{path}: {kind.name} assigns several names at once"
            if any(base.endswith("Enum") for base in map(ast.unparse, kind.bases)):
                methods = {one.name for one in kind.body if isinstance(one, ast.FunctionDef)}
                assert not methods & {"__init__", "__new__"}, f"{path}: {kind.name} has a constructor"


def test_no_test_inherits_from_what_is_compiled() -> None:
    """An interpreted class cannot: see decision 6. A protocol and a named tuple are ordinary classes."""
    compiled: set[str] = set()
    for path in compiled_modules():
        for one in sources.nodes()[ROOT / path]:
            if isinstance(one, ast.ClassDef):
                bases = {ast.unparse(base).partition("[")[0] for base in one.bases}
                compiled |= set() if bases & {"Protocol", "NamedTuple", "Exception"} else {one.name}
    for file in sorted((ROOT / "tests").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        imports = [one for one in nodes if isinstance(one, ast.ImportFrom)]
        named = {name.name for one in imports if (one.module or "").startswith("api_gateway") for name in one.names}
        for one in nodes:
            if isinstance(one, ast.ClassDef):
                bases = {ast.unparse(base).partition("[")[0] for base in one.bases}
                assert not bases & named & compiled, f"{file.relative_to(ROOT)}: {one.name}"


MAPPINGS = ("fields", "names")  # the ends of the names of mappings and sets of bytes

# Expressions with slices that cannot end before their start, and why.
SLICES = {
    "data[end - 2:end]": "at least the two bytes of the line break are expected",
    "data[position:end]": "the end is searched from the position on",
    "data[at:at + 1]": "of one byte, before the end of the data",
    "data[start:end]": "the end is behind the start, and not behind the end of the data",
    "fields[_RANDOM_START:_RANDOM_END]": "the line is complete",
    "head[13:head.index(b'\\r')]": "a plain status line has a space after the status, the 13th byte",
    "piece[at:at + _SLICE]": "the start is within the piece",
    "piece[at:end]": "the end is that of a match from `at` on",
    "piece[at:end if found is None else found.start()]": "the end is searched from `at` on, which is before the last",
    "received[start:end + 2]": "the end is searched from the start on",
    "received[start:following]": "the end is searched from the start on, and -1 excluded",
    "lines[start:end]": "the order is checked before",
    "path[len(prefix):len(prefix) + 1]": "of one byte, behind a prefix that the path has",
    "raw_path[len(own):len(own) + 1]": "of one byte, behind a prefix that the path has",
    "target[len(prefix):len(prefix) + 1]": "of one byte",
    "value[special + 1:end]": "the search goes from the end to the start",
    "value[special:special + 1]": "of one byte that was found",
    "trace.fields[_SPAN_START:_SPAN_END]": "the line is complete",
}


def test_no_slice_of_bytes_in_what_is_compiled_ends_before_its_start() -> None:
    """Interpreted, such a slice is empty. Compiled, it raises SystemError (mypyc 2.4: `CPyBytes_GetSlice`)."""
    found: set[str] = set()
    for path in compiled_modules():
        for one in sources.nodes()[ROOT / path]:
            if isinstance(one, ast.Subscript) and isinstance(one.slice, ast.Slice):
                has_both = one.slice.lower is not None and one.slice.upper is not None
                found.update({ast.unparse(one)} if has_both and ast.unparse(one.slice) != "1:-1" else ())
    assert found == set(SLICES)


def test_nothing_that_is_compiled_searches_bytes_by_in() -> None:
    """`b"x" in data` tries `b"x"` as a number first: an error is raised and dropped, which takes ten times as long."""
    for path in compiled_modules():
        for one in sources.nodes()[ROOT / path]:
            if isinstance(one, ast.Compare) and isinstance(one.ops[0], ast.In | ast.NotIn):
                sought, among = one.left, ast.unparse(one.comparators[0])
                is_bytes = isinstance(sought, ast.Constant) and isinstance(sought.value, bytes)
                assert not is_bytes or among.endswith(MAPPINGS), f"{path}: {ast.unparse(one)}"


def test_what_is_compiled_has_the_same_attributes_of_classes() -> None:
    """Compiled, an attribute of a class is one of its objects, unless it is a `ClassVar`."""
    for path in compiled_modules():
        for kind in (one for one in sources.nodes()[ROOT / path] if isinstance(one, ast.ClassDef)):
            if not any(base.endswith("Enum") for base in map(ast.unparse, kind.bases)):
                assigned = [ast.unparse(one.targets[0]) for one in kind.body if isinstance(one, ast.Assign)]
                constants = [name for name in assigned if name.isupper()]
                assert not constants, f"{path}: {constants} of {kind.name} must be ClassVar"


def test_no_data_class_that_is_compiled_has_class_variables() -> None:
    """Compiled, `dataclass` takes a `ClassVar` for a field, whose value cannot be set."""
    for path in compiled_modules():
        for kind in (one for one in sources.nodes()[ROOT / path] if isinstance(one, ast.ClassDef)):
            if any("dataclass" in ast.unparse(one) for one in kind.decorator_list):
                assert "ClassVar" not in ast.unparse(kind), f"{path}: {kind.name}"


def test_what_is_compiled_has_no_default_that_mypyc_drops() -> None:
    """In the body of a class, None is dropped if the type is a compiled protocol or one of several classes (2.4)."""
    classes = [
        (path, one)
        for path in compiled_modules()
        for one in sources.nodes()[ROOT / path]
        if isinstance(one, ast.ClassDef)
    ]
    protocols = {one.name for _, one in classes if "Protocol" in map(ast.unparse, one.bases)}
    for path, kind in classes:
        if any("dataclass" in ast.unparse(one) for one in kind.decorator_list):
            continue
        for one in kind.body:
            if isinstance(one, ast.AnnAssign) and one.value is not None and ast.unparse(one.value) == "None":
                names = set(ast.unparse(one.annotation).split(" | "))
                drops = len(names) > 2 or names & protocols
                assert not drops, f"{path}: {kind.name}.{ast.unparse(one.target)} must be set in the constructor"


def test_nothing_inherits_from_a_named_tuple() -> None:
    """A compiled function unpacks a named tuple, so it would not use what a subclass overrides."""
    classes = [
        (path, one) for path, nodes in sources.nodes().items() for one in nodes if isinstance(one, ast.ClassDef)
    ]
    named = {one.name for _, one in classes if "NamedTuple" in map(ast.unparse, one.bases)}
    for path, one in classes:
        assert named.isdisjoint(map(ast.unparse, one.bases)), f"{path}: {one.name}"


def test_no_class_inherits_across_the_border_of_what_is_compiled() -> None:
    """An interpreted class cannot inherit from a compiled one, and a compiled one would become an ordinary class.

    Named tuples are ordinary classes in any case.
    """
    compiled = set(compiled_modules())
    places: dict[str, list[str]] = {}
    classes: list[tuple[str, ast.ClassDef]] = []
    for path, nodes in sources.nodes().items():
        for one in nodes:
            if isinstance(one, ast.ClassDef) and "NamedTuple" not in map(ast.unparse, one.bases):
                classes.append((str(path.relative_to(ROOT)), one))
                places.setdefault(one.name, []).append(classes[-1][0])
    for place, one in classes:
        for base in one.bases:
            name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
            for other in places.get(name, ()):
                assert (place in compiled) == (other in compiled), f"{place}: {one.name}, and {name} of {other}"
