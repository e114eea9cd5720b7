"""A request that returns to its gateway is refused at once; a chain of gateways is not a loop."""

import re
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kit import (
    RawClient,
    RawUpstream,
    RunningGateway,
    ask,
    eventually,
    in_front_of,
    reason,
    running_gateway,
)

Start = Callable[[dict[str, Any]], RunningGateway]


def pseudonym(client: RawClient) -> str:
    """Return the name of the gateway in the `Via` of a response."""
    version, name = client.get().all("via")[-1].decode().split(" ")
    assert version == "1.1"
    return name


@pytest.mark.parametrize("unusual", [(), ("X-Odd:  two blanks",)])  # on the fast path and on the ASGI path
@pytest.mark.parametrize("via", ["1.1 {}", "1.0 other, HTTP/1.1 {} (x)", "1.1 other\r\nVia: 1.0 {}"])
def test_a_request_with_the_gateways_own_entry_is_refused(
    client: RawClient, up: RawUpstream, via: str, unusual: tuple[str, ...]
) -> None:
    own = pseudonym(client)
    up.requests.clear()
    for _ in range(2):
        answer = client.get(headers=(f"Via: {via.format(own)}", *unusual))
        assert reason(answer) == (508, "loop_detected")
        assert own in answer.body.decode()
    assert up.requests == []
    assert client.get(headers=("Via: 1.1 other", *unusual)).status == 200


def test_a_gateway_that_is_its_own_upstream_is_asked_twice_for_one_request(gateway: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    running = gateway(in_front_of(f"http://127.0.0.1:{port}") | {"server": {"port": port}})
    answer = ask(f"{running.url}/api/x")
    assert (answer.status, answer.json()["reason"]) == (508, "loop_detected")
    eventually(lambda: sum(running.live.recorder.requests.values()) == 2, "both are recorded")
    assert running.live.recorder.refusals["loop_detected"] == 1


def test_a_chain_of_gateways_is_no_loop_unless_they_have_one_name(gateway: Start, upstream: Any) -> None:
    origin = upstream()
    inner = gateway(in_front_of(origin.url))
    outer = gateway(in_front_of(inner.url))
    assert ask(f"{outer.url}/api/x").status == 200
    entries = origin.requests[-1].all("via")
    assert len(entries) == len(set(entries)) == 2
    named = {"server": {"via": "edge-1"}}
    inner = gateway(in_front_of(origin.url) | named)
    outer = gateway(in_front_of(inner.url) | named)
    assert ask(f"{inner.url}/api/x").status == 200
    assert origin.requests[-1].all("via") == [b"1.1 edge-1"]
    assert ask(f"{outer.url}/api/x").status == 508


def test_the_name_is_random_and_survives_a_restart(shared: RawUpstream, tmp_path: Path) -> None:
    names = []
    for folder in ("one", "one", "other"):
        with running_gateway(in_front_of(shared.url), tmp_path / folder) as running, RawClient(running.port) as client:
            names.append(pseudonym(client))
    assert names[0] == names[1] != names[2]
    assert re.fullmatch("api-gateway-[0-9a-f]{12}", names[0])
    assert stat.S_IMODE((tmp_path / "one" / "state" / "via").stat().st_mode) == 0o600


def test_a_file_that_holds_no_name_is_not_used(shared: RawUpstream, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "via").write_text("a b\n")
    with running_gateway(in_front_of(shared.url), tmp_path) as running, RawClient(running.port) as client:
        assert pseudonym(client).startswith("api-gateway-")


def test_via_names_the_version_in_which_a_response_was_received(client: RawClient, up: RawUpstream) -> None:
    up.behave = lambda wire, _request: wire.send(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")
    (via,) = client.get().all("via")
    assert via.startswith(b"1.0 api-gateway-")
