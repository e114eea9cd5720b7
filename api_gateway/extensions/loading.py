"""Loads extensions: from an entry point, a module or a file, by a factory, with its options; checks their hooks."""

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

GROUP = "api_gateway.extensions"
HOOKS = {"identify": 1, "cost": 2, "on_request": 1, "on_response": 2}  # with the number of their arguments
_LIKENESS = 0.8  # from which the name of a method is taken for a misspelt hook


class ExtensionError(Exception):
    """An extension cannot be used; the message says why."""


def load_extension(name: str, use: str, options: Mapping[str, Any], configured: Collection[str] = ()) -> object:
    """Return the extension that the factory in `use` makes of `options`. Raises ExtensionError.

    `configured` are the hooks that have settings, so the extension must have them.
    `use` is `module:object`, `path/to/file.py:object`, or the name of an entry point of the group GROUP. A file is
    executed anew each time; a module is imported once in a process.
    """
    try:
        factory = _factory(name, use)
        extension: object = factory(dict(options))
    except ExtensionError:
        raise
    except SystemExit as error:
        raise ExtensionError(f"has ended the program: SystemExit({error.code})") from error
    except Exception as error:  # whatever the code of the extension raises
        raise ExtensionError(f"{type(error).__name__}: {error}") from error
    check_hooks(extension, configured)
    return extension


def hooks_of(extension: object) -> list[str]:
    """Return the names of the hooks that an extension has."""
    return [name for name in HOOKS if callable(getattr(extension, name, None))]


def check_hooks(extension: object, configured: Collection[str] = ()) -> None:
    """Raise ExtensionError unless the extension has hooks, whose names and arguments are right.

    `configured` are hooks that it must have.
    """
    found, kind = hooks_of(extension), type(extension).__name__
    for wrong, right in _misspelt(extension, found):
        raise ExtensionError(
            f"{kind} has {wrong!r}, which is no hook; did you mean {right!r}? Begin the name with '_' if it is no hook"
        )
    if not found:
        raise ExtensionError(f"{kind} has no hook; an extension has one or more of {', '.join(HOOKS)}")
    for name in configured:
        if name not in found:
            raise ExtensionError(f"hooks has settings of {name!r}, and {kind} has only {', '.join(found)}")
    for name in found:
        try:
            signature = inspect.signature(getattr(extension, name))
            signature.bind(*([None] * HOOKS[name]))
        except (TypeError, ValueError) as error:
            raise ExtensionError(f"{name} must take {HOOKS[name]} positional arguments: {error}") from error


def _misspelt(extension: object, found: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the methods whose names are similar to hooks that the extension lacks, each with that hook."""
    absent = [name for name in HOOKS if name not in found]
    for name in dir(extension):
        if name.startswith("_") or name in HOOKS:
            continue
        similar = difflib.get_close_matches(name, absent, n=1, cutoff=_LIKENESS)
        if similar and callable(getattr(extension, name, None)):
            yield name, similar[0]


def _factory(name: str, use: str) -> Callable[[dict[str, Any]], object]:
    place, colon, attribute = use.rpartition(":")
    if not colon:
        return _entry_point(use)
    is_file = place.endswith(".py") or "/" in place
    found: Any = _module_of_file(name, Path(place)) if is_file else importlib.import_module(place)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ExtensionError(f"{place} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise ExtensionError(f"{use} is not callable; it must return the extension for its options")
    return found  # type: ignore[no-any-return]  # whatever it returns is checked


def _entry_point(use: str) -> Callable[[dict[str, Any]], object]:
    points = importlib.metadata.entry_points(group=GROUP)
    found = points.select(name=use)
    if not found:
        known = ", ".join(sorted(points.names)) or "none is installed"
        raise ExtensionError(f"there is no entry point {use!r} in the group {GROUP} ({known}), and it has no ':'")
    return next(iter(found)).load()  # type: ignore[no-any-return]  # as above


def _module_of_file(name: str, path: Path) -> object:
    if not path.is_file():
        raise ExtensionError(f"there is no file {path}")
    full = f"api_gateway_extension_{name}".replace("-", "_").replace(".", "_")
    spec = importlib.util.spec_from_file_location(full, path)
    if spec is None or spec.loader is None:
        raise ExtensionError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module
