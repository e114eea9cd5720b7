"""The page on routing: each of its examples does what stands below it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from api_gateway.config import GatewayConfig
from benchmarks.routing import FEATURES, sections
from tests.kit import RawAnswer, RawClient, RawRequest, RawUpstream, Wire, case, running_gateway

PAGE = (Path(__file__).parents[2] / "docs" / "routing.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```\n+```text\n(.*?)```", PAGE, flags=re.DOTALL)
LINE = re.compile(r"(\S+) (\S+)((?: \[[^\]]+\])*) -> (.*)")


def named(name: str) -> Any:
    """Return the behaviour of an upstream that says who it is, and what it has got."""

    def behave(wire: Wire, request: RawRequest) -> None:
        body = b"%b | %b" % (name.encode(), b" | ".join(request.head.rstrip().split(b"\r\n")))
        lines = b"Content-Type: text/plain\r\nX-Powered-By: Tests\r\nContent-Length: %d" % len(body)
        wire.send(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (lines, body))

    return behave


def asked(client: RawClient, method: str, target: str, fields: list[str]) -> RawAnswer:
    hosts = [field for field in fields if field.startswith("Host: ")] or ["Host: gateway.test"]
    lines = [*hosts, *(field for field in fields if not field.startswith("Host: "))]
    client.send("\r\n".join((f"{method} {target} HTTP/1.1", *lines, "\r\n")).encode())
    return client.answer(method)


def outcome(answer: RawAnswer) -> str:
    """Return what a line of the page says of a response: the upstream, or the status and the reason."""
    if answer.all("content-type") == [b"application/problem+json"]:
        return f"{answer.status} {json.loads(answer.body)['reason']}"
    if answer.all("location"):
        return f"{answer.status} {answer.all('location')[0].decode()}"
    return answer.body.decode().partition(" | ")[0]


@pytest.fixture
def upstreams() -> Iterator[list[RawUpstream]]:
    started: list[RawUpstream] = []
    yield started
    for up in started:
        up.close()


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) == PAGE.count("```text")


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_each_request_has_the_result_that_the_page_states(
    number: int, upstreams: list[RawUpstream], tmp_path: Path
) -> None:
    """`UPSTREAM`, then parts of the request that it gets or of the response; or status and reason; or Location."""
    text, lines = EXAMPLES[number]
    config: dict[str, Any] = yaml.safe_load(text)
    config.setdefault("tiers", {"FREE": {"rate": 1000, "capacity": 100_000}})
    for name, section in config["upstreams"].items():
        upstreams.append(RawUpstream(named(name)))
        section["targets"] = [{"url": upstreams[-1].url}]
    with running_gateway(config, tmp_path) as running:
        for line in lines.splitlines():
            found = LINE.fullmatch(line)
            assert found is not None, line
            method, target, fields, expected = found.groups()
            with case(line), RawClient(running.port) as client:
                answer = asked(client, method, target, re.findall(r"\[([^\]]+)\]", fields))
                first, *parts = expected.split(", ")
                assert outcome(answer) == first
                for part in parts:
                    assert part.encode().lower() in (answer.head + answer.body).lower()


def test_each_feature_whose_cost_is_measured_is_on_the_page_and_has_a_valid_configuration() -> None:
    for name, feature in FEATURES.items():
        assert f"| {name} |" in PAGE
        config = GatewayConfig.model_validate(sections(feature, 9))
        assert config.routes[0].name == "all"
