"""The source of the package as syntax trees, which many tests read: parsed once in each process."""

import ast
import gc
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "api_gateway"


@cache
def trees() -> dict[Path, ast.Module]:
    """Return the tree of each module of the package, by path."""
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def nodes() -> dict[Path, list[ast.AST]]:
    """Return all nodes of each module of the package, by path."""
    found = {path: list(ast.walk(tree)) for path, tree in trees().items()}
    gc.freeze()  # hundreds of thousands, which every later collection would visit
    return found
