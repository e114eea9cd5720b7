"""The files of a configuration: the main one, in YAML or TOML, and those that it includes.

An included file belongs to a team. It may only have the sections of `shared`, whose entries have names, and its limits
are for routes of its own. It may not use variables: otherwise a team could read the gateway's secrets, for instance in
the body of a fallback. The entries of all files are put together; a name that is used twice is an error. Which
requests a file may have is the subject of `route_ownership`.
"""

import glob
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

from api_gateway.settings.diagnostics import ConfigError, KeyPath, Ownership, SettingsFile, path_text
from api_gateway.settings.secret import note_file
from api_gateway.settings.variables import expanded

INCLUDE = "include"
WILDCARDS = "*?["


def read_settings(path: Path, variables: Mapping[str, str], shared: Collection[str]) -> SettingsFile:
    """Read a configuration file and those that it includes. Raises ConfigError if one cannot be read."""
    main = _read(path, variables)
    given = main.values.get(INCLUDE)
    entries = [given] if isinstance(given, str | Mapping) else given
    patterns = [_pattern_of(one) for one in entries] if isinstance(entries, list) else [None]
    if None in patterns:
        return main  # the validation reports what is wrong with it
    merged = _Merged(main, shared)
    unreadable: list[str] = []
    for index, (pattern, entry) in enumerate(zip(patterns, entries or (), strict=True)):
        assert pattern is not None  # noqa: S101 - see above
        whole = Path(glob.escape(str(path.parent))) / pattern
        found = matching_files(whole)
        note_file(whole)
        fault = None if found else _fault_of(path.parent, pattern)
        if fault is not None:
            unreadable.append(f"{merged.place_of_include(index)}: {INCLUDE}[{index}]: {fault}, got {pattern!r}")
        elif not found:
            merged.unmatched[index] = pattern
        for one in found:
            if one.samefile(path):
                fault = "a file cannot include itself; name others, as in teams/*.yaml"
                unreadable.append(f"{merged.place_of_include(index)}: {INCLUDE}[{index}]: {fault}, got {pattern!r}")
                continue
            note_file(one)
            if one in merged.included:  # of several entries for a file, the first one counts
                continue
            try:
                merged.add(_read(one, None), _owns(entry), merged.place_of_include(index))
            except ConfigError as error:
                unreadable += error.problems
    if unreadable:
        raise ConfigError([*main.problems, *merged.problems, *unreadable])
    return merged.file()


def _pattern_of(entry: Any) -> str | None:
    """Return the path of an entry, None if it is not valid."""
    found = entry.get("path") if isinstance(entry, Mapping) else entry
    owns = entry.get("owns", []) if isinstance(entry, Mapping) else []
    is_valid = isinstance(found, str) and isinstance(owns, list) and all(isinstance(one, str) for one in owns)
    return str(found) if is_valid else None


def _fault_of(folder: Path, pattern: str) -> str | None:
    """Return why a path stands for no file; None if it has wildcards, and the folder before them exists."""
    if any(one in pattern for one in WILDCARDS):
        plain = list(takewhile(lambda part: not any(one in part for one in WILDCARDS), Path(pattern).parts))
        place = folder.joinpath(*plain)
        return None if place.is_dir() else f"no such folder as {str(Path(*plain))!r}"
    if (folder / pattern).is_dir():
        return f"is a folder; include the files in it, as in {Path(pattern) / '*.yaml'}"
    return "no such file"


def _owns(entry: Any) -> list[str]:
    return entry.get("owns", []) if isinstance(entry, Mapping) else []


def matching_files(pattern: Path) -> list[Path]:
    """Return the files that a path with wildcards stands for, sorted; hidden ones are left out."""
    return [path for path in map(Path, sorted(glob.glob(str(pattern), recursive=True))) if path.is_file()]  # noqa: PTH207 - the pattern may be absolute


def _read(path: Path, variables: Mapping[str, str] | None) -> SettingsFile:
    """Read one file and replace its variables."""
    read: SettingsFile
    if path.suffix.lower() == ".toml":  # what reads a format is imported for a file, as many starts have none
        read = import_module("api_gateway.settings.toml_file").read_toml(path)
    else:
        read = import_module("api_gateway.settings.yaml_file").read_yaml(path)
    found = expanded(read.values, variables)
    lower = {tuple(map(str.lower, place)): names for place, names in found.variables.items()}
    problems = [f"{read.place(place)}{path_text(place)}: {problem}" for place, problem in found.problems.items()]
    return SettingsFile(path, found.values, read.places, (*read.problems, *problems), lower, frozenset(found.problems))


@dataclass(slots=True)
class _Merged:
    """The main file with the entries of the included ones."""

    main: SettingsFile
    shared: Collection[str]
    values: dict[str, Any] = field(init=False)
    places: dict[KeyPath, str] = field(init=False)
    variables: dict[KeyPath, str] = field(init=False)
    problems: list[str] = field(init=False)
    unset: set[KeyPath] = field(init=False)
    included: list[Path] = field(default_factory=list)
    without_routes: list[tuple[int, str]] = field(default_factory=list)  # files without routes, and their upstreams
    route_files: list[int] = field(default_factory=list)  # the number of each route's file, see `Ownership`
    owns: dict[int, list[str]] = field(default_factory=dict)
    granted_at: dict[int, str] = field(default_factory=dict)
    unmatched: dict[int, str] = field(default_factory=dict)  # entries of `include` without a file, by index

    def __post_init__(self) -> None:
        self.values, self.places = dict(self.main.values), dict(self.main.places)
        self.variables, self.problems = dict(self.main.variables), list(self.main.problems)
        self.unset = set(self.main.unset)
        self._note_routes(self.main)
        routes = self.values.get("routes")
        self.route_files = [0] * len(routes) if isinstance(routes, list) else []

    def place_of_include(self, index: int) -> str:
        """Return where an entry of `include` was set."""
        return self.places.get((INCLUDE, str(index))) or self.places.get((INCLUDE,), str(self.main.path))

    def add(self, file: SettingsFile, owns: list[str], granted_at: str) -> None:
        """Add the entries of an included file, and what it owns by the place `granted_at` of the main one."""
        self.included.append(file.path or Path())
        if owns:
            self.owns[len(self.included)], self.granted_at[len(self.included)] = owns, granted_at
        self.problems += [*file.problems, *self._strange_sections(file), *_strange_limits(file)]
        self._note_routes(file)
        for section in (name for name in file.values if name in self.shared):
            given = file.values[section]
            if isinstance(given, Mapping):
                self._add_named(file, section, given)
            elif isinstance(given, list):
                self._add_listed(file, section, given)
            else:
                kind = "null" if given is None else type(given).__name__
                self.problems.append(f"{file.place((section,))}{section}: must have entries, got {kind}")

    def file(self) -> SettingsFile:
        """Return all of it. If one file has routes, upstreams of the others get their own, as with one file alone."""
        routes = self.values.get("routes")
        if self.without_routes and (routes or ("routes" not in self.values and self.owns)):
            taken = {one.get("name") for one in routes or () if isinstance(one, Mapping)}
            made = [(number, default_route(name)) for number, name in self.without_routes if name not in taken]
            self.values["routes"] = [*(routes or ()), *(route for _, route in made)]
            self.route_files += [number for number, _ in made]
        return SettingsFile(
            self.main.path,
            self.values,
            self.places,
            tuple(self.problems),
            self.variables,
            frozenset(self.unset),
            tuple(self.included),
            tuple(
                f"{self.place_of_include(index)}: {INCLUDE}[{index}]: no file matches, got {pattern!r}"
                for index, pattern in self.unmatched.items()
            ),
            Ownership([str(self.main.path), *map(str, self.included)], self.route_files, self.owns, self.granted_at),
        )

    def _note_routes(self, file: SettingsFile) -> None:
        upstreams = file.values.get("upstreams")
        if not file.values.get("routes"):
            self.without_routes += [(len(self.included), name) for name in _names(upstreams)]

    def _strange_sections(self, file: SettingsFile) -> Iterator[str]:
        known = ", ".join(sorted(self.shared))
        for name in file.values:
            if name not in self.shared:
                where = file.place((str(name),))
                yield f"{where}{name}: an included file may only have {known}; set it in {self.main.path}"

    def _add_named(self, file: SettingsFile, section: str, given: Mapping[str, Any]) -> None:
        entries = self.values.setdefault(section, {})
        if not isinstance(entries, Mapping):
            return  # the validation reports the section
        merged = dict(entries)
        for name, entry in given.items():
            if name in merged:
                first = self.places.get((section, str(name).lower()), str(self.main.path))
                self.problems.append(f"{file.place((section, name))}{section}.{name}: is already set at {first}")
                continue
            merged[name] = entry
            self._copy(file, (section, str(name)), (section, str(name)))
        self.values[section] = merged
        self.places.setdefault((section,), file.places.get((section,), str(file.path)))

    def _add_listed(self, file: SettingsFile, section: str, given: list[Any]) -> None:
        entries = self.values.setdefault(section, [])
        if not isinstance(entries, list):
            return
        merged = list(entries)
        first = {_name(entry): index for index, entry in reversed(list(enumerate(merged))) if _name(entry) is not None}
        for index, entry in enumerate(given):
            place, name = (section, str(index)), _name(entry)
            if name is not None and name in first:
                other = self.places.get((section, str(first[name]), "name"), str(self.main.path))
                where = file.place((*place, "name"))
                self.problems.append(f"{where}{section}[{index}].name: {name!r} is already a name at {other}")
                continue
            self._copy(file, place, (section, str(len(merged))))
            merged.append(entry)
            if section == "routes":
                self.route_files.append(len(self.included))
        self.values[section] = merged
        self.places.setdefault((section,), file.places.get((section,), str(file.path)))

    def _copy(self, file: SettingsFile, old: KeyPath, new: KeyPath) -> None:
        """Take over where the values below `old` were set, now below `new`."""
        old, new = tuple(map(str.lower, old)), tuple(map(str.lower, new))
        for source, target in ((file.places, self.places), (file.variables, self.variables)):
            for place, text in source.items():
                if place[: len(old)] == old:
                    target[(*new, *place[len(old) :])] = text
        for place in file.unset:
            if tuple(map(str.lower, place[: len(old)])) == old:
                self.unset.add((*new, *place[len(old) :]))


def default_route(upstream: str) -> dict[str, str]:
    """Return the route of an upstream that has none."""
    return {"name": upstream, "path": f"/api/{upstream}", "upstream": upstream, "strip_prefix": "/api"}


def _name(entry: Any) -> str | None:
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return name if isinstance(name, str) else None


def _names(entries: Any) -> list[str]:
    return list(map(str, entries)) if isinstance(entries, Mapping) else []


def _strange_limits(file: SettingsFile) -> Iterator[str]:
    """Yield a line for each limit of an included file that is not for routes of the same file."""
    limits, routes = file.values.get("limits"), file.values.get("routes")
    upstreams = file.values.get("upstreams")
    named = routes if isinstance(routes, list) else [{"name": name} for name in _names(upstreams)]
    own = [name for name in map(_name, named) if name is not None]
    for index, limit in enumerate(limits if isinstance(limits, list) else ()):
        given = limit.get("routes") if isinstance(limit, Mapping) else None
        others = [one for one in given if one not in own] if isinstance(given, list) else None
        if others is None or others or not given:
            place = ("limits", str(index), "routes")
            got = "none" if not given else ", ".join(map(repr, others or ()))
            rule = "a limit of an included file must name routes of that file"
            yield f"{file.place(place)}{path_text(place)}: {rule} ({', '.join(own) or 'it has none'}), got {got}"
