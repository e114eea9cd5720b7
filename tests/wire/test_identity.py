"""Who a client is, on the wire: ids that need a proof, on the fast path and on the ASGI path."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.kit import Answer, RawUpstream, RunningGateway, ask, in_front_of

Gateway = Callable[[dict[str, Any]], RunningGateway]
VERIFIED = {"clients": {"acme": {"tier": "PREMIUM", "verified_only": True}, "open": {"tier": "PREMIUM"}}}
GET, POST = {"method": "GET"}, {"method": "POST", "body": b"x"}  # the second is streamed, on the ASGI path


def told(answer: Answer) -> tuple[int, str | None]:
    """Return status and reason of a response."""
    return answer.status, answer.json()["reason"] if answer.status >= 400 else None


@pytest.mark.parametrize("method", ["GET", "TRACK"])
def test_an_id_that_must_be_proved_is_refused_on_both_paths(gateway: Gateway, up: RawUpstream, method: str) -> None:
    running = gateway(in_front_of(up.url) | VERIFIED)
    for _ in range(3):
        answer = ask(f"{running.url}/api/x", method=method, headers={"X-Client-ID": "acme"})
        assert told(answer) == (401, "credentials_required")
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="api-gateway"'
        assert "'acme'" in answer.json()["detail"]
        assert ask(f"{running.url}/api/x", method=method, headers={"X-Client-ID": "open"}).status == 200
    assert len(up.requests) == 3


def test_observing_refuses_nothing(gateway: Gateway, up: RawUpstream) -> None:
    running = gateway(in_front_of(up.url) | VERIFIED | {"identity": {"mode": "observe"}})
    for _ in range(3):
        assert ask(f"{running.url}/api/x", headers={"X-Client-ID": "acme"}).status == 200
