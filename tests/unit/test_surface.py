"""What users of the gateway see by name, compared with one readable file, `tests/unit/surface.txt`.

Metrics with their labels, JSON fields, settings, options, log fields and header fields are promises: others build
dashboards, scripts and configuration files on them. After a deliberate change write the file anew with
`python -m tests.unit.test_surface`, and put the change into CHANGELOG.md.
"""

import ast
import json
import re
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric
from pydantic import BaseModel

from api_gateway import cli
from api_gateway.config import GatewayConfig
from api_gateway.errors import GatewayError, Reason, problem
from api_gateway.main import create_app
from api_gateway.metrics import Recorder
from api_gateway.models import Exchange
from api_gateway.observability.access_log import AccessLog
from api_gateway.process.schema_text import schema_text
from api_gateway.reporting.process_figures import FIGURES
from api_gateway.reporting.prometheus import PrometheusExposition
from api_gateway.reporting.snapshot import WorkerSnapshot
from tests import sources

SNAPSHOT = Path(__file__).parent / "surface.txt"
SCHEMA = Path(__file__).parents[2] / "examples" / "gateway.schema.json"
METRICS_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

# Where the names of a table's rows come from data: names of upstreams, tiers, statuses and the like.
ANY = "*"


# Metrics


@cache
def metric_families() -> dict[str, Metric]:
    """Return every metric family by the name that its samples have, for a gateway without traffic."""
    recorder = Recorder((), (), (), (50,), 0.0)
    snapshot = WorkerSnapshot("", recorder, process=dict.fromkeys(FIGURES, 0.0))
    families: dict[str, Metric] = {}
    for family in PrometheusExposition(snapshot, "1.2.3").collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        families.setdefault(f"{family.name}{suffix}", family)
    return families


def labels_of(family: Metric) -> list[str]:
    """Return the label names of a family; of one without labels that it has a sample of, the sample's."""
    names: Sequence[str] = getattr(family, "_labelnames", ())
    return list(names or [name for sample in family.samples[:1] for name in sample.labels])


def metrics() -> Iterator[str]:
    for name, family in metric_families().items():
        labels = labels_of(family)
        yield f"{name}{{{','.join(labels)}}} {family.type}" if labels else f"{name} {family.type}"


# JSON


@cache
def schema() -> dict[str, Any]:
    return create_app(GatewayConfig()).openapi()


def resolved(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the schemas a value may have, without those for null."""
    if "$ref" in node:
        return resolved(schema()["components"]["schemas"][node["$ref"].rpartition("/")[2]])
    options = node.get("anyOf", node.get("oneOf"))
    if options is not None:
        return [found for option in options for found in resolved(option)]
    return [] if node.get("type") == "null" else [node]


def fields(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the path of every field below a schema, with its closed list of values if it has one."""
    for option in resolved(node):
        values = option.get("enum") or ([option["const"]] if "const" in option else [])
        if prefix and "properties" not in option and "items" not in option and not option.get("additionalProperties"):
            yield f"{prefix}: {' | '.join(map(str, values))}" if values else prefix
        for name, inner in joined(option.get("properties", {})):
            yield from fields(inner, f"{prefix}.{name}" if prefix else name)
        if "items" in option:
            yield from fields(option["items"], f"{prefix}[]")
        if isinstance(option.get("additionalProperties"), Mapping):
            yield from fields(option["additionalProperties"], f"{prefix}.{ANY}")


def joined(properties: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the properties of a schema; those that refer to the same one together, as `{last_60s,last_5m}`."""
    names: dict[str, list[str]] = {}
    for name, inner in properties.items():
        names.setdefault(inner.get("$ref", name), []).append(name)
    for same in names.values():
        yield (same[0] if len(same) == 1 else f"{{{','.join(same)}}}"), properties[same[0]]


def endpoints() -> Iterator[str]:
    for path, operations in schema()["paths"].items():
        for method, operation in operations.items():
            where = f"{method.upper()} {path}"
            for parameter in operation.get("parameters", ()):
                values = " | ".join(
                    found for option in resolved(parameter["schema"]) for found in option.get("enum", ())
                )
                yield f"{where} {parameter['in']} {parameter['name']}{f': {values}' if values else ''}"
            sides = {"body": operation.get("requestBody", {}), "200": operation["responses"].get("200", {})}
            for side, content in sides.items():
                found = content.get("content", {}).get("application/json", {}).get("schema", {})
                yield from (f"{where} {side} {field}" for field in fields(found))


def problem_members() -> Iterator[str]:
    """Yield the members of problem details: those that every one may have, and those that `extra` adds."""
    members = problem(GatewayError("", retry_after=1.0), instance="/", request_id="1")
    extra = {key for found in sources.nodes().values() for key in _extra_keys(found)}
    yield from sorted({*members, *extra})


def _extra_keys(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        is_named = isinstance(node, ast.keyword) and node.arg == "extra"
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            is_named = any(isinstance(target, ast.Name) and target.id == "extra" for target in targets)
        value = getattr(node, "value", None)
        if is_named and isinstance(value, ast.Dict):
            yield from (str(key.value) for key in value.keys if isinstance(key, ast.Constant))


# Settings, options, logs


def settings(model: type[BaseModel] = GatewayConfig, prefix: str = "") -> Iterator[str]:
    """Yield the path of every setting, from the schema of the configuration."""
    whole = model.model_json_schema()

    def walk(node: Mapping[str, Any], path: str) -> Iterator[str]:
        if "$ref" in node:
            yield from walk(whole["$defs"][node["$ref"].rpartition("/")[2]], path)
            return
        options = [option for option in node.get("anyOf", [node]) if option.get("type") != "null"]
        for option in options if "anyOf" in node else ():
            yield from walk(option, path)
        if "anyOf" in node:
            return
        is_leaf = True
        for name, inner in node.get("properties", {}).items():
            is_leaf = False
            yield from walk(inner, f"{path}.{name}" if path else name)
        tables = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
        for inner in tables:
            if isinstance(inner, Mapping):
                is_leaf = False
                yield from walk(inner, f"{path}.{ANY}")
        if "$ref" in node.get("items", {}):
            is_leaf = False
            yield from walk(node["items"], f"{path}[]")
        if is_leaf:
            values = node.get("enum") or ([node["const"]] if "const" in node else [])
            yield f"{path}: {' | '.join(map(str, values))}" if values else path

    yield from walk(whole, prefix)


def options() -> Iterator[str]:
    parser: ArgumentParser = cli._parser()
    for action in parser._actions:
        yield " ".join(filter(None, (", ".join(action.option_strings), str(action.metavar or ""))))


def log_fields() -> Iterator[str]:
    yield from json.loads(AccessLog().line(Exchange("1", "GET", "/", "192.0.2.1", 0.0), 0.0))


def header_fields() -> Iterator[str]:
    """Yield the gateway's own header fields, which are spelt in its code."""
    found: set[str] = set()
    for nodes in sources.nodes().values():
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, bytes):
                text = node.value.decode("latin-1")
                found.update(re.findall(r"(?:^|\n)((?:x-|ratelimit)[a-z-]*)(?=$|: )", text))
    yield from sorted(found)


SECTIONS = {
    "Prometheus metrics": metrics,
    "Reasons": lambda: (reason.value for reason in Reason),
    "Members of problem details": problem_members,
    "JSON fields": endpoints,
    "Settings": settings,
    "Command line": options,
    "Access log": log_fields,
    "Header fields": header_fields,
}


def surface() -> str:
    """Return all names, a section for each kind."""
    return "\n".join(f"## {title}\n\n" + "\n".join(dict.fromkeys(names())) + "\n" for title, names in SECTIONS.items())


def test_every_name_is_in_the_snapshot() -> None:
    """After a deliberate change: `python -m tests.unit.test_surface`, and a line in CHANGELOG.md."""
    assert SNAPSHOT.read_text().splitlines() == surface().splitlines()


def test_the_page_lists_every_metric_with_its_type_and_labels() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \| ([^|]+) \|$", METRICS_PAGE.read_text(), flags=re.MULTILINE)
    listed = {name: (kind, re.findall(r"`(\w+)`", labels)) for name, kind, labels, _ in rows}
    assert len(rows) == len(listed)
    assert listed == {name: (family.type, labels_of(family)) for name, family in metric_families().items()}


def test_names_of_metrics_follow_the_rules_of_prometheus() -> None:
    """Base units, counters end in `_total`, and a label is never called by two words for one idea."""
    for name, family in metric_families().items():
        assert name.startswith(("gateway_", "process_"))
        assert name.endswith("_total") is (family.type == "counter"), name
        assert not re.search(r"_(ms|milliseconds|percent|kilobytes|mb)(_|$)", name), name
        assert not {"why", "cause", "kind"} & set(labels_of(family)), name


def test_the_schema_beside_the_examples_is_current() -> None:
    """After a change of settings: `python -m tests.unit.test_surface`."""
    assert SCHEMA.read_text() == schema_text(), "generate the file again"


if __name__ == "__main__":
    SNAPSHOT.write_text(surface())
    SCHEMA.write_text(schema_text())
