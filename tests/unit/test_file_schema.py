"""The JSON Schema of configuration files: it accepts what the loader accepts, and refuses what is wrong in itself."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from api_gateway.config import GatewayConfig, load_config
from api_gateway.process.schema_text import schema_text
from api_gateway.settings.diagnostics import ConfigError
from tests.cases import each

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
SCHEMA: dict[str, Any] = json.loads(schema_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
FIRST_LINE = re.compile(r"# yaml-language-server: \$schema=(\S+)\n")

UPSTREAM = "upstreams: {users: http://127.0.0.1:9001}\n"
VALID = {
    "shorthands": "upstreams: {a: http://a:1, b: {targets: ['https://b', {url: http://c, weight: 2}]}}",
    "durations": f"{UPSTREAM}server: {{header_timeout: 10s, idle_timeout: 1m30s, max_event_loop_lag: 250ms}}",
    "sizes": f"{UPSTREAM}server: {{max_body_bytes: 10MB, max_header_bytes: 64KiB}}",
    "rates": f"{UPSTREAM}tiers: {{FREE: {{rate: 5/min, capacity: 10}}, BASIC: {{rate: 10/s}}}}",
    "a rate of a limit": f"{UPSTREAM}limits: [{{name: a, rate: 100/hour, capacity: 5}}]",
    "numbers and yes in quotes": f"{UPSTREAM}server: {{port: '8001', idle_timeout: '1.5'}}\nlog: {{access: 'no'}}",
    "a removed tier, and a part of another": f"{UPSTREAM}tiers: {{enterprise: null, free: {{rate: 2}}}}",
    "null for the state": f"{UPSTREAM}state_dir: null",
    "a key as text": f"{UPSTREAM}limits: [{{name: a, key: 'header:X-Tenant', rate: 1, capacity: 5}}]",
    "tiers as a list": f"{UPSTREAM}limits: [{{name: a, tiers: [free, BASIC], rate: 1, capacity: 5}}]",
    "a status as a number": "upstreams: {a: {targets: [http://a], health_check: {statuses: [204, 300-399]}}}",
    "one value of a claim": (
        f"{UPSTREAM}identity: {{sources: [jwt], jwt: {{issuers: {{a: {{issuer: https://sso, audiences: [b]}}}}}}}}\n"
        "routes: [{name: a, path: /api/a, upstream: users, require: {claims: {team: red}}}]"
    ),
    "permissions in quotes": f"{UPSTREAM}server: {{socket_mode: '0600'}}",
    "variables": (
        "include: conf.d/*.yaml\nserver: {port: '${P:-80}', header_timeout: '${T:-5s}', via: '${V:-a}'}\n"
        "log: {level: '${L:-info}', access: '${A:-no}'}\n"
        "upstreams: {a: '${U:-http://a}', b: {targets: ['${U:-http://b}']}}"
    ),
    "a condition as text": (
        f"{UPSTREAM}routes: [{{name: a, path: /api/a, upstream: users, match: {{headers: {{X-Team: red}}}}}}]"
    ),
    "merged sections": "upstreams: {a: &a {targets: [http://a]}, b: {<<: *a, balance: hash}}",
}
INVALID = {
    "an unknown key": f"{UPSTREAM}sever: {{port: 8000}}",
    "an unknown key below": f"{UPSTREAM}server: {{prot: 8000}}",
    "a number that is too large": f"{UPSTREAM}server: {{port: 70000}}",
    "a duration without a unit that exists": f"{UPSTREAM}server: {{header_timeout: 10x}}",
    "a duration of nothing": f"{UPSTREAM}server: {{header_timeout: 0}}",
    "a size without its unit": f"{UPSTREAM}server: {{max_body_bytes: 10 M}}",
    "a rate by the fortnight": f"{UPSTREAM}tiers: {{FREE: {{rate: 5/fortnight}}}}",
    "text for a number": f"{UPSTREAM}server: {{workers: many}}",
    "an unknown choice": f"{UPSTREAM}log: {{level: loud}}",
    "a section that is a number": "upstreams: {users: 9001}",
    "a target that is no URL": "upstreams: {users: {targets: [127.0.0.1]}}",
    "an upstream without targets": "upstreams: {users: {balance: hash}}",
    "a name that none can have": "upstreams: {'a b': http://a}",
    "a route without a path": f"{UPSTREAM}routes: [{{name: a, upstream: users}}]",
    "a list for a section": f"{UPSTREAM}server: [1]",
    "a section without a value": f"{UPSTREAM}server:",
    "a key of a limit that does not exist": f"{UPSTREAM}limits: [{{name: a, key: colour, rate: 1, capacity: 5}}]",
    "an unknown key of a nested section": "upstreams: {a: {targets: [http://a], retry: {times: 3}}}",
}


def values_of(text: str) -> Any:
    """Return the values of a YAML text in JSON's types."""
    return json.loads(json.dumps(yaml.safe_load(text), default=str))


def is_loaded(text: str, folder: Path) -> bool:
    path = folder / "gateway.yaml"
    path.write_text(text)
    (folder / "conf.d").mkdir(exist_ok=True)  # for `include`
    try:
        load_config(path)
    except ConfigError:
        return False
    return True


def test_it_is_a_schema_of_the_dialect_that_it_names() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]


@each("path", EXAMPLES, ids=lambda path: path.name)
def test_each_example_is_valid_and_names_the_schema_beside_it(path: Path) -> None:
    text = path.read_text()
    found = FIRST_LINE.match(text)
    assert found, "the first line tells editors where the schema is"
    schema = json.loads((path.parent / found[1]).read_text())
    jsonschema.Draft202012Validator(schema).validate(values_of(text))


@pytest.mark.parametrize("text", VALID.values(), ids=VALID)
def test_what_the_loader_accepts_is_valid(text: str, tmp_path: Path) -> None:
    assert is_loaded(text, tmp_path)
    VALIDATOR.validate(values_of(text))


@pytest.mark.parametrize("text", INVALID.values(), ids=INVALID)
def test_what_is_wrong_in_itself_is_refused_by_the_schema_and_by_the_loader(text: str, tmp_path: Path) -> None:
    assert not is_loaded(text, tmp_path)
    assert not VALIDATOR.is_valid(values_of(text))


def schemas_of_settings(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each setting with its schema."""
    sections = {"": node, **node.get("$defs", {})}
    for name, section in sections.items():
        for one in section.get("anyOf", [section]):
            for key, inner in one.get("properties", {}).items():
                yield f"{name}.{key}", inner


def test_every_setting_is_described_and_every_secret_is_write_only() -> None:
    """A setting that is a section has the description of that section."""
    settings = dict(schemas_of_settings(SCHEMA))
    undescribed = [
        name for name, one in settings.items() if "description" not in one and "$ref" not in json.dumps(one)
    ]
    assert len(settings) > 200
    assert not undescribed
    secrets = {name for name, one in settings.items() if '"password"' in json.dumps(one)}
    assert {"Admin.token", "Store.url", "Webhook.secret"} <= {name.replace("Section", "") for name in secrets}
    assert all('"writeOnly": true' in json.dumps(settings[name]) for name in secrets)


def test_every_secret_can_be_in_a_file() -> None:
    settings = dict(schemas_of_settings(SCHEMA))
    secrets = {name for name, one in settings.items() if '"password"' in json.dumps(one)}
    assert {f"{name}_file" for name in secrets} <= settings.keys()


def test_no_default_of_the_schema_is_a_secret_or_differs_from_the_loader() -> None:
    defaults = {name: one["default"] for name, one in SCHEMA["properties"].items() if "default" in one}
    assert "******" not in json.dumps(SCHEMA)
    shown = GatewayConfig().model_dump(mode="json")
    assert {name: shown[name] for name in ("default_tier", "limits", "cors")} == {
        name: defaults[name] for name in ("default_tier", "limits", "cors")
    }
