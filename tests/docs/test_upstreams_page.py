"""The page on upstreams: its example is a valid configuration that says what the page says."""

import re
from pathlib import Path

import yaml

from api_gateway.config import GatewayConfig

PAGE = (Path(__file__).parents[2] / "docs" / "upstreams.md").read_text()


def test_its_example_is_valid() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    users = GatewayConfig.model_validate(yaml.safe_load(example)).upstreams["users"]
    assert (users.dns_refresh_interval, users.hash_on, users.slow_start) == (30, "header:X-Tenant", 20)


def test_it_names_every_metric_and_setting_of_targets() -> None:
    for name in ("healthy", "ejected", "ejections_total"):
        assert f"gateway_upstream_{name}" in PAGE
    for setting in ("per_target", "max_ejected_ratio", "slow_start", "hash_on", "dns_refresh_interval", "statuses"):
        assert f"`{setting}" in PAGE or f".{setting}" in PAGE, setting
