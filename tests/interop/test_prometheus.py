"""Prometheus reads the gateway: the rules are valid and tested, and each panel of the dashboards has data."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.processes import free_port
from tests.docs.test_monitoring import DEPLOY, queries, rules
from tests.interop.alert_series import BEGIN, MINUTES, WRONG, input_series, scrapes
from tests.interop.test_load_balancers import started
from tests.kit import RawUpstream, ask, eventually, reply, running_gateway

pytestmark = pytest.mark.interop

TOKEN = "a-token-of-the-role-read-for-prometheus"
RULES = ("recording.yaml", "alerts.yaml")
# Alerts that fire together, as one problem implies the other.
ALSO = {"GatewayNoHealthyTarget": ["GatewayNoHealthyTarget", "GatewayTargetUnhealthy"]}


def promtool(*arguments: str) -> str:
    """Run promtool in the folder of the rules; return what it printed."""
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool")
    ended = subprocess.run(
        ["promtool", *arguments],
        cwd=DEPLOY / "prometheus",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def test_the_rules_are_valid() -> None:
    assert promtool("check", "rules", *RULES).count("SUCCESS") == len(RULES)


def test_the_configuration_is_valid(tmp_path: Path) -> None:
    config = (DEPLOY / "prometheus" / "prometheus.yaml").read_text()
    (tmp_path / "token").write_text(TOKEN)
    written = tmp_path / "prometheus.yaml"
    written.write_text(config.replace("/etc/prometheus/gateway-token", str(tmp_path / "token")))
    for file in RULES:
        shutil.copy(DEPLOY / "prometheus" / file, tmp_path)
    assert "SUCCESS" in promtool("check", "config", str(written))


def test_each_alert_is_silent_and_fires() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yaml")


def test_each_alert_fires_by_the_series_that_the_gateway_produces_and_no_other_does(tmp_path: Path) -> None:
    """Of one worker and of several, of which one has the problem; of few routes and of many."""
    opened = queries()["upstreams: Openings of breakers within an hour: {{upstream}}"].replace("$job", ".*")
    names = frozenset(re.findall(r"\b(?:gateway|process)_\w+", " ".join([opened, *rules().values()])))
    wrong: dict[str, Any] = {"": None, **WRONG}
    assert {case.partition(":")[0] for case in WRONG} | {"GatewayUnavailable"} == {
        name for name in rules() if name.startswith("Gateway")
    }
    tests: list[dict[str, Any]] = []
    for case, act in wrong.items():
        for is_many, workers in ((False, 1), (True, 1), (False, 4)):
            found = list(scrapes(act, is_many=is_many, workers=workers))
            alert = case.partition(":")[0]
            before = {"expr": 'count(ALERTS{alertstate="firing"}) or vector(0)', "eval_time": f"{BEGIN - 1}m"}
            fired = f'group by (alertname) (max_over_time(ALERTS{{alertstate="firing"}}[{MINUTES}m]))'
            after = {"expr": fired, "eval_time": f"{MINUTES}m"}
            labels = [f'{{alertname="{name}"}}' for name in ALSO.get(alert, [alert] if alert else [])]
            tests.append(
                {
                    "name": f"{case or 'nothing'}, {'many' if is_many else 'few'} routes, {workers} workers",
                    "interval": "1m",
                    "input_series": input_series(found, names),
                    "promql_expr_test": [
                        {**before, "exp_samples": [{"labels": "{}", "value": 0}]},
                        {**after, "exp_samples": [{"labels": one, "value": 1} for one in labels]},
                    ],
                }
            )
            if case == "GatewayBreakerOpen":
                found_by_panel = {"expr": f"sum({opened}) > bool 0", "eval_time": f"{MINUTES}m"}
                tests[-1]["promql_expr_test"].append(found_by_panel | {"exp_samples": [{"labels": "{}", "value": 1}]})
    rule_files = [str(DEPLOY / "prometheus" / file) for file in RULES]
    written = tmp_path / "series.yaml"
    written.write_text(json.dumps({"rule_files": rule_files, "evaluation_interval": "1m", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", str(written))


def sections(good: str, failing: str) -> dict[str, Any]:
    """Return a gateway with an upstream that works and one that fails, each with a health check."""
    check = {"path": "/health", "interval": 0.2}
    return {
        "upstreams": {
            "good": {"targets": [{"url": good}], "health_check": check},
            "failing": {
                "targets": [{"url": failing}],
                "circuit_breaker": {"failure_threshold": 3, "recovery_timeout": 60},
                "concurrency": {"limit": 10},
            },
        },
        "routes": [
            {"name": "good", "path": "/api/good", "upstream": "good"},
            {"name": "failing", "path": "/api/failing", "upstream": "failing"},
        ],
        "tiers": {"FREE": {"rate": 1, "capacity": 10}, "BASIC": {"rate": 1000, "capacity": 100_000}},
        "admin": {"tokens": {"prometheus": {"token": TOKEN, "role": "read"}}},
    }


def configured(folder: Path, port: int) -> Path:
    """Write the configuration of `deploy/`, for this gateway and with short intervals; return its path."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (scrape,) = config["scrape_configs"]
    scrape["authorization"]["credentials_file"] = str(folder / "token")
    scrape["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    (folder / "token").write_text(TOKEN)
    for file in RULES:
        shutil.copy(DEPLOY / "prometheus" / file, folder)
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    return folder / "prometheus.yaml"


@pytest.fixture
def scraped(tmp_path: Path) -> Iterator[str]:
    """Run a gateway with traffic and a Prometheus that reads it; return the URL of Prometheus."""
    good, failing = RawUpstream(reply()), RawUpstream(reply(status=b"500 Internal Server Error"))
    port = free_port()
    with running_gateway(sections(good.url, failing.url), tmp_path / "state") as gateway:
        command = [
            "prometheus",
            f"--config.file={configured(tmp_path, gateway.port)}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with started(command, port) as url:
            for _ in range(8):
                for path in ("good", "good", "failing", "none"):
                    ask(f"{gateway.url}/api/{path}", method="POST", body=b"12345", headers={"X-Client-ID": "acme"})
                time.sleep(1)  # as long as a scrape's interval, so that counters grow from scrape to scrape
            yield url
    good.close()
    failing.close()


def answer_of(url: str, query: str) -> list[Any]:
    """Return the series that Prometheus has for a query."""
    found = ask(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
    assert found.status == 200, (query, found.body)
    result: list[Any] = json.loads(found.body)["data"]["result"]
    return result


def has(url: str, query: str) -> bool:
    """Return whether Prometheus has data for a query."""
    return bool(answer_of(url, query))


def test_every_panel_has_data(scraped: str) -> None:
    eventually(partial(has, scraped, 'up{job="gateway"} == 1'), "Prometheus has read the gateway")
    empty = []
    for name, query in queries().items():
        written = query.replace("$__rate_interval", "10s").replace("$job", ".*")
        assert not re.search(r"\$\w", written), f"{name} has a variable that is not replaced"
        if not has(scraped, written):
            empty.append((name, written))
    assert not empty
    pending = 'ALERTS{alertname="GatewayBreakerOpen", upstream="failing"}'
    for expected in (pending, "route:gateway_http_requests:rate5m", "upstream:gateway_upstream_failures:ratio_rate5m"):
        eventually(partial(has, scraped, expected), f"Prometheus has {expected}")
