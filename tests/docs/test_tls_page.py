"""The page on TLS and its example: every setting with its default, the numbers of the code, and working gateways."""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml

from api_gateway.config import from_values
from api_gateway.downstream.tls_terminator import HANDSHAKE_FAILURES
from api_gateway.process.server_certificates import FILE_POLL_INTERVAL
from api_gateway.settings.tls import ClientCertificatesSection, ServerTlsSection
from tests.kit import RawClient, RawUpstream, free_port, in_front_of, running_gateway
from tests.tls_kit import HOST, Authority, TlsClient

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tls.md").read_text()
EXAMPLE = yaml.safe_load((ROOT / "examples" / "tls.yaml").read_text())
BLOCKS = [
    yaml.safe_load(dedent(block)) for block in re.findall(r"^ *```yaml\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
]


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    server = RawUpstream()
    yield server
    server.close()


def test_the_example_has_every_setting_with_its_default() -> None:
    given = EXAMPLE["server"]["tls"]
    assert set(given) == set(ServerTlsSection.model_fields)
    for name, field in ServerTlsSection.model_fields.items():
        if name != "certificates":
            assert given[name] == field.default, name
    assert set(given["certificates"][0]) == {"certificate", "key"}
    assert from_values(EXAMPLE).server.tls is not None
    text = (ROOT / "examples" / "tls.yaml").read_text()
    assert all(f"{name}: " in text for name in ClientCertificatesSection.model_fields)


def test_the_numbers_and_reasons_are_those_of_the_code() -> None:
    page = " ".join(PAGE.split())
    assert FILE_POLL_INTERVAL == 5
    assert "every five seconds" in page
    for name in ("handshake_timeout", "max_handshakes", "expiry_warning_days"):
        assert f"`{name}` ({ServerTlsSection.model_fields[name].default})" in page
    assert all(f"`{reason}`" in page for reason in HANDSHAKE_FAILURES)


def test_its_first_configuration_serves_redirects_and_responds_to_challenges(
    upstream: RawUpstream, tmp_path: Path
) -> None:
    authority, port = Authority(tmp_path), free_port()
    (tmp_path / "token").write_text("token.key")
    tls: dict[str, Any] = BLOCKS[0]["server"]["tls"]
    assert BLOCKS[0]["server"]["port"] == 443
    tls |= {"redirect_from": f"127.0.0.1:{port}", "acme_challenges": str(tmp_path), "redirect_port": 443}
    tls["certificates"] = [authority.issue("one", HOST).setting]
    with running_gateway(in_front_of(upstream.url) | {"server": {"tls": tls}}, tmp_path / "state") as gateway:
        with TlsClient(gateway.port, authority.context()) as client:
            assert client.get().status == 200
        with RawClient(port) as plain:
            assert plain.get("/.well-known/acme-challenge/token").body == b"token.key"
            assert plain.get("/api/x").all("location") == [b"https://gateway.test/api/x"]


def test_its_route_requires_a_certificate_which_identifies_the_client(upstream: RawUpstream, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    sections = BLOCKS[1]
    sections["server"]["tls"]["certificates"] = [authority.issue("one", HOST).setting]
    sections["server"]["tls"]["client_certificates"]["ca"] = str(authority.file)
    sections["upstreams"]["internal"] = {"targets": [{"url": upstream.url}]}
    with running_gateway(sections, tmp_path / "state") as gateway:
        for client_pair, status in ((None, 403), (authority.issue("jane"), 200)):
            with TlsClient(gateway.port, authority.context(client_pair)) as client:
                assert client.get("/api/internal/x").status == status
