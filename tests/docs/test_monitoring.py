"""The rules for Prometheus and the dashboards for Grafana: what they name exists, and each alert has a test."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cases import each
from tests.unit.test_surface import labels_of, metric_families

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRIPT = DEPLOY / "grafana" / "dashboards.py"
BOARDS = runpy.run_path(str(SCRIPT))
SELECTOR = re.compile(r"\b((?:gateway|process)_\w+?)(?:_bucket)?(?:\{([^}]*)\})?(?=[^\w:]|$)")
ON_SCRAPE = {"job", "instance", "le"}  # labels that every series has, and that of histograms


def rules() -> dict[str, str]:
    """Return the expression of every rule by its name."""
    return {
        rule.get("alert") or rule["record"]: rule["expr"]
        for file in ("alerts.yaml", "recording.yaml")
        for group in yaml.safe_load((DEPLOY / "prometheus" / file).read_text())["groups"]
        for rule in group["rules"]
    }


def queries() -> dict[str, str]:
    """Return the query of every panel by dashboard, title and legend."""
    return {
        f"{name}: {panel.title}: {legend}": query
        for name, (_, panels) in BOARDS["DASHBOARDS"].items()
        for panel in panels
        for legend, query in panel.queries.items()
    }


EXPRESSIONS = {**rules(), **queries()}


@each("name", EXPRESSIONS)
def test_an_expression_names_metrics_and_labels_that_exist(name: str) -> None:
    known = metric_families()
    recorded = set(rules())
    for found in re.findall(r"\b\w+:gateway_\w+:\w+", EXPRESSIONS[name]):
        assert found in recorded
    plain = re.sub(r"\b\w+:gateway_\w+:\w+", "", EXPRESSIONS[name])
    selected = SELECTOR.findall(plain)
    assert selected or plain != EXPRESSIONS[name] or plain.startswith("up{"), "it names no metric"
    labels: set[str] = set()
    for metric, matchers in selected:
        assert metric in known, f"{metric} does not exist"
        labels |= set(labels_of(known[metric]))
        assert set(re.findall(r"(\w+)\s*[=!]~?\s*\"", matchers)) <= set(labels_of(known[metric])) | ON_SCRAPE
    if selected:
        for group in re.findall(r"\bby \(([^)]*)\)", plain):
            assert {one.strip() for one in group.split(",")} <= labels | ON_SCRAPE


def test_every_alert_has_a_test_and_an_action() -> None:
    alerts = [
        rule
        for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
    ]
    tested = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yaml").read_text())["tests"]
    assert [rule["alert"] for rule in alerts] == [test["name"] for test in tested]
    for rule in alerts:
        assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]


def test_an_alert_names_endpoints_and_documents_that_exist() -> None:
    text = (DEPLOY / "prometheus" / "alerts.yaml").read_text()
    for page in re.findall(r"docs/[\w-]+\.md", text):
        assert (DEPLOY.parent / page).is_file()


@pytest.mark.parametrize("name", BOARDS["DASHBOARDS"])
def test_the_file_of_a_dashboard_is_the_rendered_table(name: str) -> None:
    written = (DEPLOY / "grafana" / f"{name}.json").read_text()
    assert written == BOARDS["text_of"](name), "run `python deploy/grafana/dashboards.py`"


@pytest.mark.parametrize("name", BOARDS["DASHBOARDS"])
def test_panels_of_a_dashboard_do_not_overlap(name: str) -> None:
    board: dict[str, Any] = json.loads((DEPLOY / "grafana" / f"{name}.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + 8)}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["title"] for panel in board["panels"]}) == len(board["panels"])
