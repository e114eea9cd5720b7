"""Two listeners never have one address: the rule on `server`, `admin.listen` and `server.tls.redirect_from`."""

from typing import Any

import pytest
from pydantic import ValidationError

from api_gateway.config import GatewayConfig
from api_gateway.settings.bind_address import BindAddress
from tests.kit import case


def collide(one: str, other: str) -> bool:
    first, second = BindAddress.parse(one, 0), BindAddress.parse(other, 0)
    assert first.collides_with(second) is second.collides_with(first)
    return first.collides_with(second)


def test_addresses_collide_if_a_connection_could_arrive_at_either() -> None:
    rows = {
        ("127.0.0.1:1", "127.0.0.1:1"): True,
        ("127.0.0.1:1", "127.0.0.1:2"): False,
        ("127.0.0.1:1", "127.0.0.2:1"): False,
        ("127.0.0.1:0", "127.0.0.1:0"): False,
        ("0.0.0.0:1", "127.0.0.1:1"): True,
        ("0.0.0.0:1", "[::1]:1"): False,
        ("0.0.0.0:1", "a.test:1"): True,
        ("[::]:1", "127.0.0.1:1"): True,
        ("[::]:1", "[::1]:1"): True,
        ("[::1]:1", "[0:0:0:0:0:0:0:1]:1"): True,
        ("LOCALHOST:1", "[::1]:1"): True,
        ("localhost:1", "127.0.0.1:1"): True,
        ("localhost:1", "10.0.0.1:1"): False,
        ("a.test:1", "A.test:1"): True,
        ("a.test:1", "b.test:1"): False,
        ("unix:/a", "unix:/a"): True,
        ("unix:/a", "unix:/b"): False,
        ("unix:/a", "127.0.0.1:1"): False,
    }
    for (one, other), expected in rows.items():
        with case(f"{one} {other}"):
            assert collide(one, other) is expected


@pytest.mark.parametrize(
    ("listen", "redirect_from", "problems"),
    [
        ("127.0.0.1:8001", "127.0.0.1:8002", []),
        ("127.0.0.1:8000", None, [("admin.listen", "server.host and server.port (0.0.0.0:8000)", "127.0.0.1:8000")]),
        (None, "[::]:8000", [("server.tls.redirect_from", "server.host and server.port", "[::]:8000")]),
        ("127.0.0.1:1", "0.0.0.0:1", [("server.tls.redirect_from", "admin.listen (127.0.0.1:1)", "0.0.0.0:1")]),
    ],
)
def test_the_rule_names_both_listeners(
    listen: str | None, redirect_from: str | None, problems: list[tuple[str, str, str]]
) -> None:
    tls = {"certificates": [{"certificate": "a.pem"}], "redirect_from": redirect_from}
    sections: dict[str, Any] = {"server": {"host": "0.0.0.0", "tls": tls}, "admin": {"listen": listen}}
    if not problems:
        GatewayConfig.model_validate(sections)
        return
    with pytest.raises(ValidationError) as caught:
        GatewayConfig.model_validate(sections)
    for place, other, value in problems:
        assert f"{place}: needs another address than {other}" in str(caught.value)
        assert repr(value) in str(caught.value)
