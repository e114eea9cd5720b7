"""The documents: their links resolve, and the settings, metrics, commands, files and names that they mention exist."""

import ast
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from api_gateway.config import GatewayConfig
from api_gateway.metrics import Recorder
from api_gateway.reload.changes import NEEDS_RESTART
from api_gateway.reporting.process_figures import FIGURES
from api_gateway.reporting.prometheus import PrometheusExposition
from api_gateway.reporting.snapshot import WorkerSnapshot
from api_gateway.reporting.upstream_schema import HealthView
from api_gateway.resilience.concurrency_limit import ConcurrencyLimit
from api_gateway.resilience.fair_shares import share_refusal
from api_gateway.resilience.priorities import PriorityClasses
from benchmarks.screenshots import SHOWN
from tests import sources
from tests.cases import each

ROOT = Path(__file__).parents[2]
NAMES = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")),
]
MAINTAINERS = [
    name
    for name in NAMES
    if name in ("CONTRIBUTING.md", "docs/architecture.md", "docs/releasing.md") or "/decisions/" in name
]
FENCE = re.compile(r"^ *```.*?^ *```", flags=re.DOTALL | re.MULTILINE)
RENAMED = re.compile(r"^### Names\n.*?(?=^##)", re.DOTALL | re.MULTILINE)  # names that no longer exist
FILE = re.compile(r"\.?[\w.-]+(/[\w.-]+)+/?|[\w.-]+\.(py|md|lock|yaml)")
SETTING = re.compile(r"([a-z_]+(?:\.[a-z_]+)+)(?:: .+)?")
NAME = re.compile(r"(_?[A-Z]+[a-z]+[A-Z]\w+|_[A-Z]{3,}|[A-Z]+_[A-Z_]+)(\.\w+)?(\(.*\))?|[A-Z][a-z]+\.[a-z_]+")
OURS = ("api_gateway/", "benchmarks/", "docs/", "examples/", "tests/", ".ci/")
FOREIGN = {"AsyncClient", "AsyncBaseTransport", "AsyncHTTPTransport", "BaseHTTPMiddleware"}  # of httpx and Starlette


def prose(name: str) -> str:
    """Return a page without its code blocks."""
    return RENAMED.sub("", FENCE.sub("", (ROOT / name).read_text()))


def code(name: str) -> list[str]:
    """Return what the prose of a page has in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(name))


def anchors(name: str) -> set[str]:
    """Return the anchors that a renderer gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(name), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each("name", NAMES)
def test_every_relative_link_resolves(name: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        path, _, fragment = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (fragment and fragment not in anchors(str(target.resolve().relative_to(ROOT)))):
            broken.append(link)
    assert not broken


def test_the_index_lists_every_page() -> None:
    linked = re.findall(r"\]\(([^)#]+)", prose("docs/README.md"))
    listed = {str((ROOT / "docs" / link).resolve().relative_to(ROOT)) for link in linked}
    assert set(NAMES) - {"docs/README.md"} <= listed


@each("name", NAMES)
def test_every_metric_it_names_exists(name: str) -> None:
    snapshot = WorkerSnapshot("", Recorder([], [], [], [50], 0.0), process=dict.fromkeys(FIGURES, 0.0))
    exposition = PrometheusExposition(snapshot, "0")
    suffixes = {"counter": "_total", "info": "_info"}
    known = {f"{family.name}{suffixes.get(family.type, '')}" for family in exposition.collect()}
    named = {found[0] for text in code(name) if (found := re.match(r"gateway_[a-z_]+", text))}
    assert named <= known | {"gateway_"}


@cache
def known_settings() -> set[str]:
    """Return the paths of all settings, and of all fields of `/health`, which pages write in the same way."""
    return {*settings(GatewayConfig), *settings(HealthView), "admin.tokens.NAME.token_file"}


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the paths of the settings in a section, whole and as pages write them: without `upstreams.NAME.`."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for section in sections_in(field.annotation):
            yield from settings(section, f"{prefix}{name}.")
            yield from settings(section, f"{name}.")


def sections_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the sections that an annotation holds, such as that in `dict[str, UpstreamSection]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from sections_in(argument)


def is_file(text: str) -> bool:
    """Return whether a text is the path of a file or folder, from the root, the package or the tests."""
    return any((folder / text).exists() for folder in (ROOT, ROOT / "api_gateway", ROOT / "tests"))


@each("name", NAMES)
def test_every_setting_it_names_exists(name: str) -> None:
    known = known_settings()
    sections = {path.partition(".")[0] for path in known if "." in path}
    named = {found[1] for text in code(name) if (found := SETTING.fullmatch(text)) and not is_file(text)}
    assert {path for path in named if path.partition(".")[0] in sections} <= known


@each("name", NAMES)
def test_every_make_target_it_names_exists(name: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {text.split()[1] for text in code(name) if text.startswith("make ")} <= targets


def test_the_table_of_commands_has_every_make_target() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    rows = re.findall(r"^\| (`make .+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    shown = [name for row in rows for name in re.findall(r"`make ([a-z]+)`", row)]
    assert sorted(shown) == sorted(set(targets) - {"help"})


def test_what_needs_a_restart_is_what_the_page_lists() -> None:
    """Settings by their whole names, then the settings of a section: "in the section `store`: `url`, ..."."""
    page = (ROOT / "docs" / "reload.md").read_text()
    names, *sections = page.partition("## What needs a restart\n")[2].partition("The response")[0].split("section ")
    listed = re.findall(r"`(.+?)`", names)
    for one in sections:
        section, *settings = re.findall(r"`(.+?)`", one)
        listed += [f"{section}.{name}" for name in settings]
    assert sorted(listed) == sorted(NEEDS_RESTART)


def test_each_file_to_open_first_has_the_name_that_stands_beside_it() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text().partition("## Where to change what\n")[2]
    pairs = re.findall(r"`([a-z0-9_/]+\.py)`: ((?:`[A-Za-z_.]+`(?:, )?)+)", page)
    named = [(path, name) for path, names in pairs for name in re.findall(r"`(.+?)`", names)]
    assert len(named) > 20
    absent = [
        (path, name)
        for path, name in named
        for part in name.split(".")
        if not re.search(rf"\b{part}\b", (ROOT / "api_gateway" / path).read_text())
    ]
    assert not absent


@each("name", NAMES)
def test_every_file_it_names_exists(name: str) -> None:
    """On pages for maintainers, whatever looks like a path; elsewhere, paths in the folders of the repository."""
    paths = [text for part in code(name) for text in part.split() if FILE.fullmatch(text)]
    checked = [path for path in paths if name in MAINTAINERS or path.startswith(OURS)]
    assert not [path for path in checked if not is_file(path)]


@cache
def defined() -> set[str]:
    """Return the names of all classes, functions, variables and constants of the package."""
    known: set[str] = set()
    for nodes in sources.nodes().values():
        for node in nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                known.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
    return known


@each("name", MAINTAINERS)
def test_every_class_function_and_constant_it_names_exists(name: str) -> None:
    named = [re.sub(r"\(.*\)$", "", text) for text in code(name) if NAME.fullmatch(text)]
    assert not [text for text in named if not set(text.removeprefix("httpx.").split(".")) <= defined() | FOREIGN]


FOREIGN_WORDS = {
    "http_host",
    "proxy_set_header",
    "max_requests",
    "load_test",
    "resource_access",
    "credentials_file",
    "stop_grace_period",
}


@cache
def words() -> set[str]:
    """Return the names that users see, and all words of the package's source."""
    texts = [(ROOT / "tests" / "unit" / "surface.txt").read_text()]
    texts += [path.read_text() for path in (ROOT / "api_gateway").rglob("*.py")]
    return {word.lower() for text in texts for word in re.findall(r"\w+", text)}


@each("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_every_name_with_underscores_exists(name: str) -> None:
    """Settings, fields, labels and values, as they are now: the changelog alone names former ones."""
    named = {word for text in code(name) for word in re.findall(r"(?<![\w./-])[a-z]+(?:_[a-z0-9]+)+(?![\w/-])", text)}
    assert named <= words() | FOREIGN_WORDS


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_it_shows_is_valid(name: str, tmp_path: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL):
        for secret in re.findall(r"/run/secrets/([\w-]+)", block):
            (tmp_path / secret).write_text(f"{secret}-token\n")
        sections = yaml.safe_load(block.replace("/run/secrets", str(tmp_path)))
        if "scrape_configs" not in sections:  # that of Prometheus
            GatewayConfig.model_validate(sections)


def shown(name: str) -> dict[str, Any]:
    """Return the JSON that a page shows."""
    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    found: dict[str, Any] = json.loads(block)
    return found


def test_the_refusal_under_overload_is_the_one_that_its_page_shows() -> None:
    limit = ConcurrencyLimit(100, PriorityClasses({"FREE": 0, "ENTERPRISE": 1}), source=random.Random(1))
    for _ in range(57):
        limit.acquire(1)
    error = limit.refusal("users", 0)
    assert shown("docs/overload.md") == {
        "status": error.status,
        "reason": error.reason,
        "detail": error.detail,
        **error.extra,
    }


def test_the_refusal_of_a_share_is_the_one_that_its_page_shows() -> None:
    assert shown("docs/resource-limits.md")["detail"] == (
        f"Upstream 'users': {share_refusal(256, 256, 512, 'connections to it')}."
    )


def test_every_picture_is_on_a_page_and_is_one_that_the_script_takes() -> None:
    shown = {picture for name in NAMES for picture in re.findall(r"images/([\w-]+)\.png", (ROOT / name).read_text())}
    assert shown == {path.stem for path in (ROOT / "docs" / "images").iterdir()} == set(SHOWN)
