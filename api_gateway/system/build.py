"""The running build: version, commit, and variant (pure Python, or with a compiled request path)."""

import platform
import re
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

from api_gateway._version import __version__

COMMIT_FILE = "commit.txt"  # in the package, written by the build (`hatch_build.py`)
_PACKAGE = Path(__file__).parents[1]
_COMPILED = "api_gateway.rate_limiter"  # one of the modules that `pyproject.toml` names for mypyc
_COMMIT = re.compile(r"[0-9a-f]{40}(-modified)?")


@cache
def variant() -> str:
    """Return `compiled` or `pure Python`. Nothing is imported for it."""
    spec = find_spec(_COMPILED)
    is_compiled = spec is not None and str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES))
    return "compiled" if is_compiled else "pure Python"


def version_line() -> str:
    """Return version, variant and Python in one line."""
    return f"api-gateway {__version__} ({variant()}, {platform.python_implementation()} {platform.python_version()})"


def commit_of(package: Path = _PACKAGE) -> str | None:
    """Return the commit that the package was built from, or that its clone has checked out; None if it is unknown.

    That of a build has the suffix `-modified` if files differed from it. In a clone, changed files are not noticed.
    """
    try:
        found = _built_from(package) or _checked_out(package.parent / ".git")
    except (OSError, UnicodeDecodeError):
        return None
    return found if found is not None and _COMMIT.fullmatch(found) else None


def _built_from(package: Path) -> str | None:
    file = package / COMMIT_FILE
    return file.read_text("ascii").strip() if file.is_file() else None


def _checked_out(git: Path) -> str | None:
    """Return the commit of HEAD, from the files that gitrepository-layout(5) describes: Git may not be installed."""
    if git.is_file():  # a worktree
        git = git.parent / git.read_text().strip().removeprefix("gitdir: ")
    if not git.is_dir():
        return None
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    name, common = head.removeprefix("ref: "), git
    if (git / "commondir").is_file():
        common = git / (git / "commondir").read_text().strip()
    for folder in (git, common):
        if (folder / name).is_file():
            return (folder / name).read_text().strip()
    packed = common / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.partition(" ")[0] for line in lines if line.endswith(f" {name}")), None)
