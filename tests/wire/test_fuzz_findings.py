"""Findings of the fuzzer, each in its smallest form, and similar cases."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.cases import each
from tests.kit import RawClient, RawRequest, RawUpstream, RunningGateway, Wire, in_front_of

FINAL = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    """Run a gateway with a route over the fast path and one over the general path."""
    breaker = {"failure_threshold": 1000, "minimum_calls": 1000, "per_target": False}
    sections: dict[str, Any] = in_front_of(shared.url, circuit_breaker=breaker, retry={"attempts": 1})
    sections["routes"].append({"name": "timed", "path": "/api/timed", "upstream": "up", "timeout": 20})
    return sections


def sending(data: bytes) -> Callable[[Wire, RawRequest], None]:
    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(data)

    return behave


@each("target", ["/api/x", "/api/timed"])
@each("final", [FINAL, CHUNKED], ids=["counted", "chunked"])
@each(
    "interim",
    [
        b"HTTP/1.1 199 Odd\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 104 Odd\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 199 Odd\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Smuggled: 1\r\n\r\n",
    ],
    ids=["counted", "chunked", "trailers alone"],
)
def test_what_an_interim_response_contains_never_becomes_part_of_the_final_one(
    running: RunningGateway,
    up: RawUpstream,
    target: str,
    interim: bytes,
    final: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    up.behave = sending(interim + final)
    with RawClient(running.port) as client:
        found = client.get(target)
    assert found.status == 502
    assert b'"reason": "upstream_protocol_error"' in found.body
    assert found.all("x-smuggled") == []
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("target", ["/api/x", "/api/timed"])
@pytest.mark.parametrize(
    "interim",
    [b"HTTP/1.1 103 Hints\r\nLink: </x>\r\n\r\n", b"HTTP/1.1 199 Odd\r\nContent-Length: 0\r\n\r\n"],
    ids=["none announced", "a length of zero"],
)
def test_an_interim_response_without_content_is_followed_by_the_final_one(
    running: RunningGateway, up: RawUpstream, target: str, interim: bytes
) -> None:
    up.behave = sending(interim + FINAL)
    with RawClient(running.port) as client:
        found = client.get(target)
    assert (found.status, found.body) == (200, b"ok")
