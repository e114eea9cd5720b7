"""Settings: defaults, precedence of sources, and one line for each error."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from api_gateway.config import GatewayConfig, load_config
from api_gateway.settings.diagnostics import ConfigError
from tests.cases import each

WHOLE = """
server:    {host: 0.0.0.0, port: 8001, workers: 4, max_body_bytes: 1048576, max_header_bytes: 32768,
            header_timeout: 11, keep_alive_timeout: 76, drain_timeout: 31, trusted_proxies: [10.0.0.0/8, "::1"]}
store:     {url: "memory://", on_failure: deny, decision_timeout: 0.03}
state_dir: state
admin:     {token: a-long-enough-token}
identity:  {mode: observe, header: X-Key, sources: [address]}
tiers:     {FREE: {rate: 2, capacity: 11}, BASIC: {rate: 6, capacity: 51},
            PREMIUM: {rate: 21, capacity: 201}, ENTERPRISE: {rate: 101, capacity: 1001}}
default_tier: BASIC
clients:   {acme: {tier: ENTERPRISE}}
upstreams:
  users:
    targets: [{url: "http://127.0.0.1:9001", weight: 2}]
    balance: least_requests
    timeouts: {connect: 3, response: 29, idle: 59, total: 120}
    pool: {max_connections: 511, idle_timeout: 61}
    health_check: {path: /alive, interval: 6, timeout: 3, healthy_threshold: 4, unhealthy_threshold: 7}
    circuit_breaker: {failure_threshold: 6, failure_rate: 0.6, minimum_calls: 21, window: 33, recovery_timeout: 34,
                      half_open_max_calls: 2, slow_call_duration: 1.5, slow_call_rate: 0.7, window_calls: 99,
                      max_recovery_timeout: 350, jitter: 0.2, ramp: 11}
    retry: {attempts: 3, budget: 0.3}
routes:
  - {name: users, path: /api/users, upstream: users, strip_prefix: /api, methods: [get, POST], host: Example.ORG,
     cost: 2, costs: [{methods: [POST], path: /api/users/export, cost: 5}]}
metrics:   {percentiles: [51, 99.9]}
"""

ONE_UPSTREAM: dict[str, Any] = {"users": {"targets": [{"url": "http://127.0.0.1:9001"}]}}


def one_route(**keys: Any) -> dict[str, Any]:
    """Return sections with one upstream and one route, some of whose keys are given."""
    route = {"name": "users", "path": "/api/users", "upstream": "users", **keys}
    return {"upstreams": ONE_UPSTREAM, "routes": [route]}


def leaves(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every scalar of nested sections with its place."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield place, value
        return
    for key, inner in pairs:
        yield from leaves(inner, (*place, str(key)))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a configuration file of these sections, or of this text."""

    def write(sections: Any, name: str = "gateway.yaml") -> Path:
        path = tmp_path / name
        path.write_text(sections if isinstance(sections, str) else yaml.safe_dump(sections), encoding="utf-8")
        return path

    return write


def limited(concurrency: dict[str, Any]) -> dict[str, Any]:
    """Return sections whose one upstream has this limit."""
    return {"upstreams": {"users": {**ONE_UPSTREAM["users"], "concurrency": concurrency}}}


def problems(sections: dict[str, Any]) -> list[str]:
    """Return the lines that these sections are refused with."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, sections)
    return [line.removeprefix("command line: ") for line in caught.value.problems]


# Defaults


def test_nothing_configured_is_the_demo_with_the_documented_tiers() -> None:
    config = load_config()
    assert {name: (tier.rate, tier.capacity) for name, tier in config.tiers.items()} == {
        "FREE": (1, 10),
        "BASIC": (5, 50),
        "PREMIUM": (20, 200),
        "ENTERPRISE": (100, 1000),
    }
    assert config.default_tier == "FREE"
    assert config.is_demo


def test_the_defaults_are_those_of_the_documentation() -> None:
    config = load_config(None, {"upstreams": ONE_UPSTREAM})
    assert config.server.model_dump() == {
        "host": "127.0.0.1",
        "port": 8000,
        "socket_mode": 0o660,
        "workers": 1,
        "max_body_bytes": 104_857_600,
        "max_header_bytes": 65_536,
        "max_header_lines": 200,
        "max_connections": None,
        "max_connections_per_peer": 0,
        "header_timeout": 10,
        "idle_timeout": 60,
        "min_body_rate": 240,
        "min_body_rate_grace": 10,
        "keep_alive_timeout": 75,
        "drain_delay": 0,
        "drain_timeout": 30,
        "worker_timeout": 30,
        "max_event_loop_lag": 0.25,
        "via": None,
        "forwarded": {"read": "x-forwarded-for", "send": "x-forwarded"},
        "proxy_protocol": [],
        "trusted_proxies": [],
        "tls": None,
    }
    assert config.store.url.get_secret_value() == "memory://"
    assert config.state_dir == Path(os.environ["XDG_STATE_HOME"], "api-gateway", "default")
    assert config.admin.token is None
    assert (config.identity.mode, config.identity.header) == ("enforce", "X-Client-ID")
    assert config.metrics.percentiles == [50, 90, 95, 99]
    assert config.upstreams["users"].timeouts.model_dump() == {
        "connect": 2,
        "response": 30,
        "idle": 60,
        "total": None,
        "tunnel": 3600,
    }
    assert config.upstreams["users"].tls.model_dump() == {"ca_file": None, "cert_file": None, "key_file": None}
    assert not config.upstreams["users"].http2
    assert config.upstreams["users"].pool.model_dump() == {
        "max_connections": 512,
        "max_tunnels": 4096,
        "idle_timeout": 4,
        "max_requests": None,
        "max_age": None,
    }
    assert config.upstreams["users"].health_check is None
    assert config.upstreams["users"].circuit_breaker.model_dump() == {
        "failure_threshold": 5,
        "failure_rate": 0.5,
        "slow_call_duration": None,
        "slow_call_rate": None,
        "minimum_calls": 20,
        "window": 30,
        "window_calls": None,
        "recovery_timeout": 30,
        "max_recovery_timeout": None,
        "jitter": 0.1,
        "half_open_max_calls": 1,
        "ramp": 10,
        "per_target": True,
        "max_ejected_ratio": 0.5,
    }
    users = config.upstreams["users"]
    assert (users.dns_refresh_interval, users.balance, users.hash_on, users.slow_start) == (
        None,
        "round_robin",
        "client",
        10,
    )
    assert config.upstreams["users"].retry.model_dump() == {
        "attempts": 2,
        "budget": 0.2,
        "min_retries_per_second": 1,
        "backoff": {"base": 0.025, "cap": 0.25},
        "max_retry_after": 1,
        "statuses": [502, 503, 504],
        "max_body_bytes": 65_536,
    }
    assert users.concurrency is None


@each(
    ("keys", "problem"),
    [
        (
            {"recovery_timeout": 60, "max_recovery_timeout": 20},
            "max_recovery_timeout: must be at least recovery_timeout (60), got 20",
        ),
        ({"slow_call_rate": 0.5}, "slow_call_rate: needs slow_call_duration, got 0.5 alone"),
        ({"slow_call_duration": 2}, "slow_call_duration: needs slow_call_rate, got 2 alone"),
        (
            {"window_calls": 10, "minimum_calls": 11},
            "window_calls: must be at least minimum_calls (11), or no rate is ever computed, got 10",
        ),
    ],
)
def test_keys_of_a_breaker_that_contradict_each_other_are_named(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(None, {"upstreams": {"users": {**ONE_UPSTREAM["users"], "circuit_breaker": keys}}})
    assert raised.value.problems == [f"command line: upstreams.users.circuit_breaker.{problem}"]


def test_an_adaptive_limit_has_defaults_once_it_is_asked_for() -> None:
    section = load_config(None, limited({"adaptive": {}})).upstreams["users"].concurrency
    assert section is not None
    assert section.model_dump() == {"limit": None, "adaptive": {"min_limit": 10, "max_limit": 1000, "tolerance": 1.4}}


def test_a_health_check_has_defaults_once_it_is_asked_for() -> None:
    config = load_config(None, {"upstreams": {"users": {**ONE_UPSTREAM["users"], "health_check": {}}}})
    check = config.upstreams["users"].health_check
    assert check is not None
    assert check.model_dump() == {
        "path": "/health",
        "interval": 5,
        "timeout": 2,
        "healthy_threshold": 2,
        "unhealthy_threshold": 3,
        "statuses": ["200-399"],
    }


def of_users(**keys: Any) -> dict[str, Any]:
    return {"upstreams": {"users": {**ONE_UPSTREAM["users"], **keys}}}


def test_a_health_check_takes_statuses_and_ranges_of_them() -> None:
    config = load_config(None, of_users(health_check={"statuses": [204, "401", "500-503"]}))
    check = config.upstreams["users"].health_check
    assert check is not None
    assert check.statuses == ["204-204", "401-401", "500-503"]


@each("status", [0, 99, 600, True, 200.5, "2xx", "399-200", "200-", "200-600", "-", ""])
def test_a_status_that_is_none_is_refused(status: Any) -> None:
    (line,) = problems(of_users(health_check={"statuses": [status]}))
    assert "upstreams.users.health_check.statuses[0]: " in line
    assert line.endswith(f", got {status!r}")


@each("hash_on", ["header:", "header:X Name", "cookie:a", "Client", ""])
def test_what_a_hash_cannot_go_by_is_refused(hash_on: str) -> None:
    (line,) = problems(of_users(balance="hash", hash_on=hash_on))
    assert "upstreams.users.hash_on: " in line


@each("host", ["", "Client:x", "a b", "\xfc.example", "http://a", "a/b", "a:0", "a:70000", "[::g]", "a\r\nb"])
def test_what_cannot_be_a_host_is_no_host_header(host: str) -> None:
    (line,) = problems(of_users(host_header=host))
    assert "upstreams.users.host_header: must be target, client, or a host" in line


@each("host", ["target", "client", "users.internal", "users.internal:8080", "[::1]:80", "10.0.0.1"])
def test_a_host_header_is_a_choice_or_a_host(host: str) -> None:
    assert load_config(None, of_users(host_header=host)).upstreams["users"].host_header == host


@each("domains", [{"a b": "c"}, {"a": "b c"}, {"": "a"}, {"a": "*"}, {"**": ""}, {"a": "b;c"}])
def test_what_cannot_be_a_domain_is_refused(domains: dict[str, str]) -> None:
    route = {"name": "users", "path": "/api/users", "upstream": "users", "cookie_domains": domains}
    (line,) = problems({"upstreams": ONE_UPSTREAM, "routes": [route]})
    assert "cookie_domains" in line
    assert "must be a domain" in line


def test_a_header_to_hash_on_needs_hashing() -> None:
    assert load_config(None, of_users(balance="hash", hash_on="header:X-Tenant"))
    (line,) = problems(of_users(hash_on="header:X-Tenant"))
    assert line.endswith("upstreams.users.hash_on: needs balance: hash, got 'header:X-Tenant' with 'round_robin'")


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_config().server.port = 1  # type: ignore[misc]  # that it is refused is the test


# The whole contract


def test_the_whole_example_loads_and_every_value_arrives(file: Callable[[Any], Path]) -> None:
    arrived = load_config(file(WHOLE)).model_dump()
    arrived["admin"]["token"] = arrived["admin"]["token"].get_secret_value()
    arrived["store"]["url"] = arrived["store"]["url"].get_secret_value()
    expected = yaml.safe_load(WHOLE)
    expected["state_dir"] = Path("state")
    expected["server"]["trusted_proxies"] = [IPv4Network("10.0.0.0/8"), IPv6Network("::1/128")]
    expected["routes"][0] |= {"host": "example.org", "methods": ["GET", "POST"]}
    found = dict(leaves(arrived))
    for place, value in leaves(expected):
        assert found[place] == value, place


def test_the_whole_example_says_nothing_by_way_of_a_default(file: Callable[[Any], Path]) -> None:
    """Every value of the example differs from its default, or the test above could not see it arrive."""
    same = {"store.url"}
    upstreams = {"users": {"targets": [{"url": "http://127.0.0.1:9001"}], "health_check": {}}}
    routes = [{"name": "users", "path": "/api/users", "upstream": "users"}]
    default = dict(leaves(load_config(None, {"upstreams": upstreams, "routes": routes}).model_dump()))
    required = {"upstreams.users.targets.0.url", *(f"routes.0.{key}" for key in ("name", "path", "upstream"))}
    for place, value in leaves(yaml.safe_load(WHOLE)):
        name = ".".join(place)
        assert name in same | required or default.get(place) != value, name


def test_a_configured_upstream_turns_the_demo_off() -> None:
    assert not load_config(None, {"upstreams": ONE_UPSTREAM}).is_demo


def test_an_upstream_without_routes_gets_its_own() -> None:
    routes = load_config(None, {"upstreams": {**ONE_UPSTREAM, "orders": ONE_UPSTREAM["users"]}}).routes
    assert [(route.name, route.path, route.upstream, route.strip_prefix) for route in routes] == [
        ("users", "/api/users", "users", "/api"),
        ("orders", "/api/orders", "orders", "/api"),
    ]


def test_routes_that_are_configured_are_the_only_ones() -> None:
    assert [route.path for route in load_config(None, one_route(path="/api/people")).routes] == ["/api/people"]


@pytest.mark.parametrize(("given", "kept"), [("/api/users/", "/api/users"), ("/api/", "/api")])
def test_a_trailing_slash_of_a_route_says_nothing(given: str, kept: str) -> None:
    assert load_config(None, one_route(path=given)).routes[0].path == kept


def test_a_trailing_slash_of_a_target_says_nothing() -> None:
    upstreams = {"users": {"targets": [{"url": "https://[::1]:9001/"}]}}
    assert load_config(None, {"upstreams": upstreams}).upstreams["users"].targets[0].url == "https://[::1]:9001"


def test_the_admin_token_is_not_shown_by_the_configuration() -> None:
    config = load_config(None, {"admin": {"token": "very-secret-token"}})
    assert "very-secret-token" not in f"{config!r} {config}"


# Tiers


def test_a_part_of_a_tier_set_by_the_environment_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_TIERS__PREMIUM__RATE", "25")
    tiers = load_config().tiers
    assert list(tiers) == ["FREE", "BASIC", "PREMIUM", "ENTERPRISE"]
    assert (tiers["PREMIUM"].rate, tiers["PREMIUM"].capacity) == (25, 200)
    assert (tiers["FREE"].rate, tiers["FREE"].capacity) == (1, 10)


def test_tier_names_may_come_in_any_case() -> None:
    config = load_config(
        None,
        {
            "tiers": {"Premium": {"rate": 25}, "gold": {"rate": 7, "capacity": 70}},
            "default_tier": "basic",
            "clients": {"acme": {"tier": "Gold"}},
        },
    )
    assert list(config.tiers) == ["FREE", "BASIC", "PREMIUM", "ENTERPRISE", "GOLD"]
    assert (config.tiers["PREMIUM"].rate, config.default_tier, config.clients["acme"].tier) == (25, "BASIC", "GOLD")


@pytest.mark.parametrize("name", ["FREE", "free"])
def test_null_removes_a_tier(name: str) -> None:
    config = load_config(None, {"tiers": {name: None}, "default_tier": "BASIC"})
    assert list(config.tiers) == ["BASIC", "PREMIUM", "ENTERPRISE"]


def test_null_for_an_unknown_tier_is_accepted() -> None:
    assert "GOLD" not in load_config(None, {"tiers": {"GOLD": None}}).tiers


def test_a_new_tier_needs_both_of_its_terms() -> None:
    assert problems({"tiers": {"GOLD": {"rate": 7}}}) == ["tiers.GOLD.capacity: is missing"]


@each("tiers", [3, ["FREE"], {"FREE": 3}])
def test_tiers_of_the_wrong_shape_are_refused_and_not_lost(tiers: Any) -> None:
    (line,) = problems({"tiers": tiers})
    assert "tiers" in line
    assert line.endswith(f"got {tiers if not isinstance(tiers, dict) else 3!r}")


# Precedence: each source beats the ones after it


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Callable[[Any], Path]) -> Callable[..., int]:
    """Return the port that these sources together give."""

    def port(
        *, line: int | None = None, env: int | None = None, dotenv: int | None = None, in_file: int | None = None
    ) -> int:
        if env is not None:
            monkeypatch.setenv("GATEWAY_SERVER__PORT", str(env))
        if dotenv is not None:
            (tmp_path / ".env").write_text(f"GATEWAY_SERVER__PORT={dotenv}\n", encoding="utf-8")
        path = None if in_file is None else file({"server": {"port": in_file, "host": "::"}})
        config = load_config(path, None if line is None else {"server": {"port": line}})
        assert config.server.host == ("127.0.0.1" if in_file is None else "::")  # what nobody overrides stays
        return config.server.port

    return port


def test_the_command_line_beats_the_environment(sources: Callable[..., int]) -> None:
    assert sources(line=1, env=2, dotenv=3, in_file=4) == 1


def test_the_environment_beats_the_env_file(sources: Callable[..., int]) -> None:
    assert sources(env=2, dotenv=3, in_file=4) == 2


def test_the_env_file_beats_the_configuration_file(sources: Callable[..., int]) -> None:
    assert sources(dotenv=3, in_file=4) == 3


def test_the_configuration_file_beats_the_defaults(sources: Callable[..., int]) -> None:
    assert sources(in_file=4) == 4


def test_precedence_holds_for_tiers_however_they_are_spelt(
    monkeypatch: pytest.MonkeyPatch, file: Callable[[Any], Path]
) -> None:
    """Variables come in lower case, files and callers in upper: the spelling must not decide who wins."""
    monkeypatch.setenv("GATEWAY_TIERS__FREE__RATE", "3")
    path = file({"tiers": {"FREE": {"rate": 2, "capacity": 22}}})
    assert load_config(path, {"tiers": {"FREE": {"rate": 4}}}).tiers["FREE"].model_dump() == {
        "rate": 4,
        "capacity": 22,
        "priority": None,
        "candidate": None,
        "verified_only": False,
    }


def test_the_mode_of_earlier_versions_means_the_default() -> None:
    assert load_config(None, {"identity": {"mode": "header"}}).identity == load_config().identity


def test_what_is_passed_to_the_class_itself_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_SERVER__PORT", "2")
    assert GatewayConfig.model_validate({"server": {"port": 1}}).server.port == 1
    assert GatewayConfig().server.port == 2


def test_a_list_in_the_environment_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_UPSTREAMS__USERS__TARGETS", json.dumps([{"url": "http://127.0.0.1:9001"}]))
    monkeypatch.setenv("GATEWAY_SERVER__TRUSTED_PROXIES", '["10.0.0.0/8"]')
    config = load_config()
    assert config.upstreams["users"].targets[0].url == "http://127.0.0.1:9001"
    assert config.server.trusted_proxies == [IPv4Network("10.0.0.0/8")]


# Which file


def test_gateway_config_names_the_file(monkeypatch: pytest.MonkeyPatch, file: Callable[[Any], Path]) -> None:
    monkeypatch.setenv("GATEWAY_CONFIG", str(file({"server": {"port": 4}})))
    assert load_config().server.port == 4


def test_gateway_config_may_stand_in_the_env_file(tmp_path: Path, file: Callable[[Any], Path]) -> None:
    (tmp_path / ".env").write_text(f"GATEWAY_CONFIG={file({'server': {'port': 4}})}\n", encoding="utf-8")
    assert load_config().server.port == 4


def test_a_file_that_is_named_directly_beats_gateway_config(
    monkeypatch: pytest.MonkeyPatch, file: Callable[..., Path]
) -> None:
    monkeypatch.setenv("GATEWAY_CONFIG", str(file({"server": {"port": 4}}, "other.yaml")))
    assert load_config(str(file({"server": {"port": 5}}))).server.port == 5


def test_a_file_read_once_leaves_nothing_behind(file: Callable[[Any], Path]) -> None:
    load_config(file({"server": {"port": 4}}))
    with pytest.raises(ConfigError):
        load_config(file({"server": {"port": "none"}}))
    assert load_config().server.port == 8000


# Variables


def test_unknown_variables_warn_and_stop_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Platforms set variables such as GATEWAY_PORT=tcp://10.0.0.1:80 by themselves."""
    monkeypatch.setenv("GATEWAY_SERVR__PORT", "9000")
    monkeypatch.setenv("GATEWAY_CONFIG", "")
    monkeypatch.setenv("GATEWAY_SERVER__HOST", "::")
    with caplog.at_level(logging.WARNING):
        config = load_config()
    assert (config.server.host, config.server.port) == ("::", 8000)
    (record,) = caplog.records
    assert "GATEWAY_SERVR__PORT" in record.getMessage()
    assert "GATEWAY_SERVER" in record.getMessage()


def test_an_unknown_key_below_a_known_section_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_SERVER__PROT", "9000")
    (line,) = problems({})
    assert line.startswith("environment GATEWAY_SERVER__PROT: server.prot: unknown key")
    assert "'port'" in line


def test_bad_json_in_a_variable_is_a_mistake_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_ROUTES", "[{")
    (line,) = problems({})
    assert line.startswith("environment")
    assert "routes" in line


# Mistakes of one value


def test_an_admin_token_needs_eight_characters() -> None:
    (line,) = problems({"admin": {"token": "1234567"}})
    assert "admin.token: " in line
    token = load_config(None, {"admin": {"token": "12345678"}}).admin.token
    assert token is not None
    assert token.get_secret_value() == "12345678"


def test_a_number_is_no_network() -> None:
    """Python would take 10 for 0.0.0.10."""
    assert "server.trusted_proxies[0]" in problems({"server": {"trusted_proxies": [10]}})[0]


@each(
    ("place", "key", "suggestion"),
    [
        ((), "upstream", "upstreams"),
        (("server",), "prot", "port"),
        (("tiers", "FREE"), "capcity", "capacity"),
        (("clients", "acme"), "teir", "tier"),
        (("upstreams", "users"), "target", "targets"),
        (("upstreams", "users", "health_check"), "pth", "path"),
        (("upstreams", "users", "targets", 0), "wieght", "weight"),
        (("upstreams", "users"), "concurency", "concurrency"),
        (("routes", 0), "strip_prefx", "strip_prefix"),
        (("routes", 0, "costs", 0), "method", "methods"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(place: tuple[str | int, ...], key: str, suggestion: str) -> None:
    sections: Any = yaml.safe_load(WHOLE)
    section = sections
    for part in place:
        section = section[part]
    section[key] = 1
    spelt = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in (*place, key))[1:]
    (line,) = problems(sections)
    assert f"{spelt}: unknown key" in line
    assert f"did you mean {suggestion!r}" in line


def test_an_unknown_key_like_no_other_names_them_all() -> None:
    (line,) = problems({"metrics": {"zzz": 1}})
    assert "metrics.zzz: unknown key" in line
    assert "percentiles" in line


@each(
    ("sections", "place", "value"),
    [
        ({"server": {"port": 65_536}}, "server.port", "65536"),
        ({"server": {"header_timeout": 0}}, "server.header_timeout", "0"),
        ({"server": {"trusted_proxies": ["10.0.0.0/33"]}}, "server.trusted_proxies[0]", "'10.0.0.0/33'"),
        ({"server": {"trusted_proxies": [1.5]}}, "server.trusted_proxies[0]", "1.5"),
        ({"server": {"max_event_loop_lag": 0}}, "server.max_event_loop_lag", "0"),
        ({"tiers": {"FREE": {"priority": -1}}}, "tiers.FREE.priority", "-1"),
        (limited({"limit": 0}), "upstreams.users.concurrency.limit", "0"),
        (limited({"adaptive": {"min_limit": 0}}), "upstreams.users.concurrency.adaptive.min_limit", "0"),
        (limited({"adaptive": {"tolerance": 1}}), "upstreams.users.concurrency.adaptive.tolerance", "1"),
        ({"identity": {"mode": "jwt"}}, "identity.mode", "'jwt'"),
        ({"identity": {"sources": ["header", "header"]}}, "identity.sources", "['header', 'header']"),
        ({"identity": {"sources": ["address", "header"]}}, "identity.sources", "['address', 'header']"),
        ({"identity": {"sources": []}}, "identity.sources", "[]"),
        ({"identity": {"sources": ["password"]}}, "identity.sources[0]", "'password'"),
        ({"identity": {"header": "X Client"}}, "identity.header", "'X Client'"),
        ({"tiers": {"FREE": {"rate": 0}}}, "tiers.FREE.rate", "0"),
        ({"tiers": {"a b": {"rate": 1, "capacity": 1}}}, "tiers.A B", "'A B'"),
        ({"default_tier": 3}, "default_tier", "3"),
        ({"clients": {"a b": {"tier": "FREE"}}}, "clients.a b", "'a b'"),
        ({"upstreams": {"users": {"targets": []}}}, "upstreams.users.targets", "[]"),
        (
            {"upstreams": {"users": {**ONE_UPSTREAM["users"], "dns_refresh_interval": 0.5}}},
            "upstreams.users.dns_refresh_interval",
            "0.5",
        ),
        (
            {"upstreams": {"users": {**ONE_UPSTREAM["users"], "slow_start": -1}}},
            "upstreams.users.slow_start",
            "-1",
        ),
        (
            {"upstreams": {"users": {**ONE_UPSTREAM["users"], "circuit_breaker": {"max_ejected_ratio": 1.1}}}},
            "upstreams.users.circuit_breaker.max_ejected_ratio",
            "1.1",
        ),
        ({"metrics": {"percentiles": [50, 100]}}, "metrics.percentiles[1]", "100"),
        (one_route(methods=[]), "routes[0].methods", "[]"),
        (one_route(methods=["G T"]), "routes[0].methods[0]", "'G T'"),
        (one_route(path="api/users"), "routes[0].path", "'api/users'"),
        (one_route(path="/api/users?x"), "routes[0].path", "'/api/users?x'"),
        (one_route(path="/api/users#x"), "routes[0].path", "'/api/users#x'"),
        (one_route(cost=-1), "routes[0].cost", "-1"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_itself(sections: dict[str, Any], place: str, value: str) -> None:
    lines = problems(sections)
    assert any(line.removeprefix("command line: ").startswith(f"{place}: ") for line in lines), lines
    assert any(line.endswith(f", got {value}") for line in lines), lines


@each(
    "url",
    [
        "127.0.0.1:9001",
        "ftp://127.0.0.1",
        "http://",
        "http://127.0.0.1/v1",
        "http://127.0.0.1?x=1",
        "http://127.0.0.1#x",
        "http://user:secret@127.0.0.1",
        "http://127.0.0.1:0",
        "http://127.0.0.1:70000",
    ],
)
def test_a_target_is_scheme_host_and_port_only(url: str) -> None:
    (line,) = problems({"upstreams": {"users": {"targets": [{"url": url}]}}})
    assert "upstreams.users.targets[0].url: " in line


# Rules between sections


@each(
    ("sections", "telling"),
    [
        (one_route(upstream="user"), ["routes[0] (users).upstream", "'user'", "did you mean 'users'"]),
        (one_route(path="/metrics/x"), ["routes[0] (users).path", "admin.listen", "/api", "'/metrics/x'"]),
        (one_route(match={"path": "template"}), ["routes[0] (users).path", "no placeholder", "'/api/users'"]),
        (one_route(path="/api/{a}/{a}", match={"path": "template"}), ["path", "{a} twice", "'/api/{a}/{a}'"]),
        (one_route(path="/api/x{a}", match={"path": "template"}), ["path", "not a whole segment", "'/api/x{a}'"]),
        (one_route(match={"headers": {"X-A": {}}}), ["match.headers.X-A", "one of exact, prefix and present"]),
        (one_route(match={"headers": {"Authorization": "x"}}), ["match.headers", "cannot have a condition"]),
        (one_route(match={"headers": {"X_A": "x"}}), ["match.headers", "as in X-A"]),
        (one_route(match={"headers": {"X-Client-ID": "x"}}), ["match.headers.X-Client-ID", "identifies clients"]),
        (one_route(match={"headers": {"A" + "-b" * 9: "x"}}), ["match.headers", "at most 8 hyphens"]),
        (one_route(match={"query": {"a": {"exact": " x"}}}), ["match.query.a", "neither begin nor end with a space"]),
        (one_route(strip_prefix="/v1"), ["routes[0] (users).strip_prefix", "'/api/users'", "'/v1'"]),
        (one_route(strip_prefix="/api/use"), ["routes[0] (users).strip_prefix", "'/api/use'"]),
        (one_route(cost=1001), ["routes[0] (users).cost", "1000", "got 1001"]),
        (one_route(costs=[{"cost": 1}, {"cost": 1001}]), ["routes[0] (users).costs[1].cost", "got 1001"]),
        ({"default_tier": "GOLD"}, ["default_tier", "'GOLD'", "FREE, BASIC, PREMIUM, ENTERPRISE"]),
        ({"tiers": {"FREE": None}}, ["default_tier", "'FREE'"]),
        ({"clients": {"acme": {"tier": "GOLD"}}}, ["clients.acme.tier", "'GOLD'"]),
        ({"tiers": {"BASIC": {"priority": 1}}}, ["tiers.FREE.priority", "got None"]),
        (limited({}), ["upstreams.users.concurrency", "limit or adaptive", "got neither"]),
        (limited({"limit": 1, "adaptive": {}}), ["upstreams.users.concurrency", "limit or adaptive", "got both"]),
        (
            limited({"adaptive": {"min_limit": 20, "max_limit": 19}}),
            ["upstreams.users.concurrency.adaptive.min_limit", "max_limit, 19", "got 20"],
        ),
        ({"store": {"url": "postgres://127.0.0.1"}}, ["store.url: must be memory://", "redis://"]),
        ({"store": {"url": "redis:127.0.0.1"}}, ["store.url: must be memory://"]),
        ({"store": {"url": "redis://"}}, ["store.url: must name a host"]),
        ({"store": {"url": "memory://elsewhere"}}, ["store.url: must be memory://"]),
        (
            {"store": {"url": "redis://127.0.0.1"}, "tiers": {"FREE": {"rate": 0.001, "capacity": 3000}}},
            ["tiers.FREE", "3e+06 s to fill", "2000000"],
        ),
    ],
)
def test_sections_that_contradict_each_other_are_refused(sections: dict[str, Any], telling: list[str]) -> None:
    (line,) = problems(sections)
    assert [part for part in telling if part not in line] == []


@each("url", ["memory://", "redis://cache:6379/1", "rediss://cache", "unix:///run/store.sock"])
def test_a_store_may_be_shared_by_several_workers(url: str) -> None:
    config = load_config(None, {"store": {"url": url}, "server": {"workers": 4}})
    assert (config.store.url.get_secret_value(), config.server.workers) == (url, 4)


@each("prefix", ["/", "/api", "/api/", "/api/users"])
def test_a_prefix_of_the_path_may_be_stripped(prefix: str) -> None:
    assert load_config(None, one_route(strip_prefix=prefix)).routes[0].strip_prefix is not None


def test_a_cost_that_one_tier_can_pay_is_accepted() -> None:
    assert load_config(None, one_route(cost=1000)).routes[0].cost == 1000


def test_two_routes_of_one_name_are_refused() -> None:
    routes = [{"name": "a", "path": f"/api/{path}", "upstream": "users"} for path in ("x", "y")]
    (line,) = problems({"upstreams": ONE_UPSTREAM, "routes": routes})
    assert line.startswith("routes[1] (a).name: ")
    assert "routes[0]" in line


@each(
    ("one", "other"),
    [
        ({}, {}),
        ({"methods": ["GET", "POST"]}, {"methods": ["put", "post"]}),
        ({"host": "example.org"}, {"host": "EXAMPLE.org"}),
        ({"path": "/api/x"}, {"path": "/api/x/"}),
        ({}, {"methods": ["PUT"]}),
        ({"host": "example.org"}, {"host": "example.org."}),
    ],
)
def test_two_routes_for_the_same_requests_are_refused(one: dict[str, Any], other: dict[str, Any]) -> None:
    routes = [
        {"name": name, "path": "/api/x", "upstream": "users", **keys} for name, keys in (("a", one), ("b", other))
    ]
    (line,) = problems({"upstreams": ONE_UPSTREAM, "routes": routes})
    assert line.startswith("routes[1] (b).path: ")
    assert "'a'" in line
    assert "'/api/x'" in line


def test_routes_that_differ_in_host_or_method_may_share_a_path() -> None:
    differing: list[dict[str, Any]] = [{"methods": ["GET"]}, {"methods": ["PUT"]}, {}, {"host": "example.org"}]
    routes = [
        {"name": f"r{index}", "path": "/api/x", "upstream": "users", **keys} for index, keys in enumerate(differing)
    ]
    assert len(load_config(None, {"upstreams": ONE_UPSTREAM, "routes": routes}).routes) == 4


def test_several_mistakes_give_several_lines() -> None:
    lines = problems({"server": {"port": -1, "prot": 1}, "tiers": {"FREE": {"rate": 0}}, "rotes": []})
    assert len(lines) == 4
    for place in ("server.port", "server.prot", "tiers.FREE.rate", "rotes"):
        assert sum(line.startswith(f"{place}: ") for line in lines) == 1


def test_several_contradictions_give_several_lines() -> None:
    sections = one_route(upstream="none", path="/metrics", cost=5000)
    lines = problems({**sections, "default_tier": "GOLD"})
    assert [line.partition(":")[0] for line in lines] == [
        "default_tier",
        "routes[0] (users).upstream",
        "routes[0] (users).path",
        "routes[0] (users).cost",
    ]


def test_a_key_is_for_routes_that_exist() -> None:
    key = {"digest": "0" * 64, "routes": ["users", "user"]}
    (line,) = problems({**one_route(), "clients": {"acme": {"keys": {"laptop": key}}}})
    assert line == "clients.acme.keys.laptop.routes[1]: no such route, got 'user'; the routes are users"


def test_a_key_instead_of_its_digest_is_refused_and_not_shown() -> None:
    key = "agw_" + "a" * 49
    for keys in ({"laptop": {"digest": key}}, {"laptop": {"digest": f"sha256:{key}"}}, {"laptop": key}):
        (line,) = problems({"clients": {"acme": {"keys": keys}}})
        assert line.startswith("clients.acme.keys.laptop")
        assert key not in line
        assert "a key" in line or "an API key" in line
