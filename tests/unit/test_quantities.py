"""Durations, sizes and rates as people write them; numbers keep their meaning."""

from typing import Any

import pytest

from api_gateway.config import load_config
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.quantities import bytes_of, rate_of, seconds_of
from tests.cases import each


@each(
    ("text", "seconds"),
    [("500ms", 0.5), ("10s", 10), ("5m", 300), ("1h", 3600), ("1d", 86_400), ("1h30m", 5400), ("1.5 s", 1.5)],
)
def test_a_duration_is_in_seconds(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@each(
    ("text", "size"),
    [("64KiB", 65_536), ("10MB", 10_000_000), ("1GiB", 2**30), ("1.5kib", 1536), ("7B", 7), ("2 kB", 2000)],
)
def test_a_size_is_in_bytes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@each(
    ("text", "rate"), [("10/s", 10), ("5/min", 5 / 60), ("100/hour", 100 / 3600), ("1.5 / sec", 1.5), ("86400/day", 1)]
)
def test_a_rate_is_per_second(text: str, rate: float) -> None:
    assert rate_of(text) == rate


@each("read", [seconds_of, bytes_of, rate_of])
@each("value", [3, 0.25, "3", " 1.5e3 ", "-1", None, True])
def test_a_number_is_returned_as_it_is(read: Any, value: Any) -> None:
    assert read(value) is value


def error_of(sections: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"upstreams": {"users": "http://127.0.0.1:9001"}, **sections})
    (line,) = caught.value.problems
    return line.removeprefix("command line: ")


@each(
    ("sections", "line"),
    [
        (
            {"server": {"idle_timeout": "10 minutes"}},
            "server.idle_timeout: must be seconds, or a duration such as 500ms, 10s, 5m or 1h, got '10 minutes'",
        ),
        (
            {"server": {"max_body_bytes": "10M"}},
            "server.max_body_bytes: must be a whole number of bytes, or a size such as 64KiB or 10MB, got '10M'",
        ),
        (
            {"server": {"max_body_bytes": "0.3B"}},
            "server.max_body_bytes: must be a whole number of bytes, or a size such as 64KiB or 10MB, got '0.3B'",
        ),
        (
            {"tiers": {"FREE": {"rate": "5/month"}}},
            "tiers.FREE.rate: must be a number per second, or a rate such as 10/s, 5/min or 100/hour, got '5/month'",
        ),
        ({"server": {"idle_timeout": "2d"}}, "server.idle_timeout: must be less than or equal to 86400, got 172800.0"),
        (
            {"upstreams": {"users": 9001}},
            (
                "upstreams.users: must be a section of keys and values, such as {targets: ...} or"
                " http://127.0.0.1:9001, got 9001"
            ),
        ),
        (
            {"upstreams": {"users": "127.0.0.1:9001"}},
            "upstreams.users.targets[0].url: must be http://host[:port] or https://host[:port], got '127.0.0.1:9001'",
        ),
    ],
)
def test_a_quantity_that_cannot_be_read_is_named_with_an_example(sections: dict[str, Any], line: str) -> None:
    assert error_of(sections) == line


def test_a_url_is_an_upstream_with_one_target_and_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_UPSTREAMS__ORDERS", "http://127.0.0.1:9002")
    config = load_config(None, {"upstreams": {"users": "http://127.0.0.1:9001", "more": {"targets": ["http://a"]}}})
    targets = {name: [target.url for target in one.targets] for name, one in config.upstreams.items()}
    assert targets == {
        "users": ["http://127.0.0.1:9001"],
        "more": ["http://a"],
        "orders": ["http://127.0.0.1:9002"],
    }
    assert {route.path for route in config.routes} == {"/api/users", "/api/more", "/api/orders"}
