"""A public name is defined in one module of the package, and a module has a name of its own, or there is a reason."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from tests import sources
from tests.sources import PACKAGE

REASONS = {
    "T": "a type variable, whose name says nothing by convention",
    "logger": "every module that logs has its own, by convention",
    "main": "the entry point of a program: the command line, a worker, the embedded store's guardian",
    "router": "each module of operator endpoints has its own FastAPI router, by convention",
}

# Modules of several packages with one name. Three packages divide one subject in the same way: `settings` has its
# section of the configuration, `assembly` builds its live objects, `admin` has its operator endpoints.
OF_ONE_SUBJECT = "one subject, by package: `settings` its section, `assembly` its construction, `admin` its endpoints"
COMMAND = "`doctor` and `replay` are commands of one form: what runs the command, and its options"
MODULE_REASONS = {
    "__init__": "what a package is for",
    "clients": OF_ONE_SUBJECT,
    "cors": "the section of the configuration, and the policy by which the proxy decides",
    "errors": "the errors of the gateway, and those of a replay, which runs without a gateway",
    "extensions": OF_ONE_SUBJECT,
    "history": OF_ONE_SUBJECT,
    "identity": OF_ONE_SUBJECT + ", `clients` its decisions",
    "limits": OF_ONE_SUBJECT,
    "metrics": "the recorder that the brief names, and the endpoints that show it",
    "command": COMMAND,
    "options": COMMAND,
    "quotas": OF_ONE_SUBJECT,
    "route_actions": OF_ONE_SUBJECT,
    "routes": OF_ONE_SUBJECT,
    "server": "what a program starts in its own process, the server of a worker, and the section of the configuration",
    "tracing": OF_ONE_SUBJECT + ", `observability` its decisions",
    "upstreams": OF_ONE_SUBJECT,
    "usage": OF_ONE_SUBJECT,
}


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Yield the public classes, functions and constants that a module defines at its top level."""
    for node in tree.body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names = [name]
            case ast.Assign(targets=targets):
                names = [found.id for target in targets for found in ast.walk(target) if isinstance(found, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names = [name]
            case _:
                names = []
        yield from (name for name in names if not name.startswith("_"))


@cache
def duplicates_of_the_package() -> dict[str, list[str]]:
    """Return the names that several modules of the package define, and which modules those are."""
    return duplicates(sources.trees(), PACKAGE)


def duplicates(trees: Mapping[Path, ast.Module], folder: Path) -> dict[str, list[str]]:
    """Return the names that several of these modules below a folder define, and which modules those are."""
    modules = defaultdict(list)
    for path, tree in trees.items():
        for name in set(defined_names(tree)):
            modules[name].append(path.relative_to(folder).as_posix())
    return {name: found for name, found in modules.items() if len(found) > 1}


def test_a_public_name_is_defined_once_or_has_a_reason() -> None:
    unexplained = {name: found for name, found in duplicates_of_the_package().items() if name not in REASONS}
    assert not unexplained, "rename all but one of them, or state in REASONS why they share the name"


def test_every_reason_is_still_needed() -> None:
    assert not REASONS.keys() - duplicates_of_the_package().keys()


def test_a_module_has_a_name_of_its_own_or_a_reason() -> None:
    found = Counter(path.stem for path in sources.trees())
    shared = {name for name, count in found.items() if count > 1}
    assert not shared - MODULE_REASONS.keys(), "rename all but one of them, or state in MODULE_REASONS why"
    assert not MODULE_REASONS.keys() - shared, "reasons that are no longer needed"


def test_the_first_lines_of_test_modules_name_tests_that_exist() -> None:
    """With `...` at its end, a name is the beginning of one."""
    modules = {path: path.read_text() for path in Path(__file__).parents[1].rglob("*.py")}
    names = {path.stem for path in modules}
    names.update(
        name for text in modules.values() for name in re.findall(r"^ *(?:async )?def (\w+)", text, re.MULTILINE)
    )
    for path, text in modules.items():
        beginning = re.match(r'"""(.*?)"""', text, re.DOTALL)
        for name, is_begun in re.findall(r"\b(test_\w+)(\.\.\.)?", beginning[1] if beginning else ""):
            assert name in names or (is_begun and any(one.startswith(name) for one in names)), (path, name)


def test_definitions_are_found_in_every_form(tmp_path: Path) -> None:
    tree = ast.parse("class A: ...\ndef b(): ...\nasync def c(): ...\nD, E = 1, 2\nF: int = 3\n_g = 4\n")
    both = {tmp_path / module: tree for module in ("one.py", "two.py")}
    assert duplicates(both, tmp_path) == {name: ["one.py", "two.py"] for name in "AbcDEF"}
    assert not duplicates({tmp_path / "one.py": tree}, tmp_path)
