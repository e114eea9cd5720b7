"""Certificates of clients on the wire: who they are, which routes require one, and when one is refused."""

import json
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from api_gateway.downstream.client_certificate import certificate_of
from api_gateway.downstream.tls_terminator import TLS_COUNTERS
from api_gateway.process.server_certificates import ServerCertificates
from tests.kit import RawClient, RawUpstream, RunningGateway, eventually, in_front_of, reason, running_gateway
from tests.tls_kit import HOST, Authority, Pair, TlsClient
from tests.wire.test_fast_path import ODD


def is_refused(port: int, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> bool:
    """Return whether TLS refuses a client; with TLS 1.3 it learns that only when it reads."""
    try:
        with TlsClient(port, context, session=session) as client:
            client.request()
            return not client.tls.read(1)
    except (ssl.SSLError, ConnectionError):
        return True


WAYS = {"fast path": (), "general parser": (ODD,)}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def jane(authority: Authority) -> Pair:
    return authority.issue("jane", x509.UniformResourceIdentifier("spiffe://test/jane"), subject="Jane Doe")


@pytest.fixture(scope="module")
def sections(shared: RawUpstream, authority: Authority, jane: Pair) -> dict[str, Any]:
    other = authority.issue("revoked", x509.UniformResourceIdentifier("spiffe://test/old"))
    clients = {"ca": str(authority.file), "mode": "optional", "crl": str(authority.revoke(other))}
    found = in_front_of(shared.url)
    found["routes"].append(
        {"name": "internal", "path": "/api/internal", "upstream": "up", "require_certificate": True}
    )
    tls = {"certificates": [authority.issue("server", HOST).setting], "client_certificates": clients}
    identity = {"sources": ["certificate", "api_key", "header", "address"], "certificate": {"by": "uri"}}
    registered = {"spiffe://test/jane": {"tier": "PREMIUM", "verified_only": True}}
    assert jane.certificate.exists()
    return found | {"server": {"tls": tls}, "identity": identity, "clients": registered}


@pytest.fixture
def certified(running: RunningGateway, authority: Authority, jane: Pair) -> Iterator[TlsClient]:
    with TlsClient(running.port, authority.context(jane)) as client:
        yield client


@pytest.fixture
def anonymous(running: RunningGateway, authority: Authority) -> Iterator[TlsClient]:
    with TlsClient(running.port, authority.context()) as client:
        yield client


@pytest.mark.parametrize("odd", WAYS.values(), ids=WAYS)
def test_the_name_in_the_certificate_is_the_client_and_nobody_else_can_claim_it(
    certified: TlsClient, anonymous: TlsClient, odd: tuple[str, ...]
) -> None:
    for headers in (odd, odd, (*odd, "X-Client-ID: spiffe://test/jane"), (*odd, "X-More: 1")):
        assert b"premium" in certified.get(headers=headers).all("ratelimit-policy")[0], headers
        assert b"premium" not in anonymous.get(headers=odd).all("ratelimit-policy")[0]
    assert reason(anonymous.get(headers=(*odd, "X-Client-ID: spiffe://test/jane"))) == (401, "credentials_required")
    assert reason(certified.get(headers=(*odd, "X-Client-ID: other"))) == (400, "client_id_invalid")


def test_a_described_certificate_is_explained_as_a_real_one_is_decided(
    running: RunningGateway, certified: TlsClient, authority: Authority
) -> None:
    """Each description gets the outcome that requests on a connection with such a certificate have got."""
    token = (running.config.state_dir / "state" / "operator-token").read_text().strip()
    fields = (f"Authorization: Bearer {token}", "Content-Type: application/json")

    def explained(status: int = 200, **described: Any) -> Any:
        body = json.dumps({"client_id": None, "path": "/api/internal/x", **described}).encode()
        with TlsClient(running.port, authority.context()) as client:
            client.request("POST", "/explain", (*fields, f"Content-Length: {len(body)}"), body)
            answer = client.answer()
            assert answer.status == status, answer.body
            return json.loads(answer.body)

    jane = {"uri": "spiffe://test/jane", "common_name": "Jane Doe"}
    assert certified.get("/api/internal/x").status == 200
    found = explained(certificate=jane)
    assert found["result"]["decision"] == "allowed"
    client = found["client"]
    assert (client["id"], client["proved_by"]) == ("spiffe://test/jane", "certificate")
    assert client["tier"]["name"] == "PREMIUM"
    for described, status, why in (
        ({}, 403, "certificate_required"),
        ({"certificate": jane, "client_id": "other"}, 400, "client_id_invalid"),
        ({"certificate": jane | {"not_after": "2026-01-01T00:00:00Z"}}, 401, "credentials_invalid"),
        ({"certificate": {"uri": "x" * 129}}, 401, "credentials_invalid"),
    ):
        result = explained(**described)["result"]
        assert (result["status"], result["reason"]) == (status, why), described
    without = explained(certificate={"common_name": "Jane Doe"})  # identity.certificate.by is uri
    assert (without["client"]["tier_source"], without["result"]["decision"]) == ("address", "allowed")
    assert "certificate.ury" in explained(422, certificate={"ury": "x"})["detail"]


@pytest.mark.parametrize("odd", WAYS.values(), ids=WAYS)
def test_a_route_can_require_a_certificate(certified: TlsClient, anonymous: TlsClient, odd: tuple[str, ...]) -> None:
    for _ in range(2):
        assert certified.get("/api/internal/x", odd).status == 200
        assert reason(anonymous.get("/api/internal/x", odd)) == (403, "certificate_required")
        assert anonymous.get("/api/x", odd).status == 200


def test_a_request_that_comes_by_asgi_has_the_certificate_of_its_connection(
    certified: TlsClient, anonymous: TlsClient
) -> None:
    for client, status in ((certified, 200), (anonymous, 403)):
        client.send(b"GET /api/internal/x HTTP/1.0\r\nHost: a.test\r\n\r\n")
        assert client.answer().status == status


def test_pipelined_requests_have_it_too(certified: TlsClient) -> None:
    certified.send(b"GET /api/internal/x HTTP/1.1\r\nHost: a.test\r\n\r\n" * 3)
    assert [certified.answer().status for _ in range(3)] == [200] * 3


@pytest.mark.parametrize("fault", ["revoked", "of another authority"])
def test_a_certificate_that_is_not_valid_is_refused(
    running: RunningGateway, authority: Authority, tmp_path: Path, fault: str
) -> None:
    pair = Pair(authority.folder / "revoked.pem", authority.folder / "revoked.key")
    if fault != "revoked":
        pair = Authority(tmp_path, "other").issue("stranger", HOST)
    before = TLS_COUNTERS.failures["certificate_invalid"]
    assert is_refused(running.port, authority.context(pair))
    assert TLS_COUNTERS.failures["certificate_invalid"] == before + 1


def test_a_resumed_session_keeps_the_client(running: RunningGateway, authority: Authority, jane: Pair) -> None:
    context = authority.context(jane)
    with TlsClient(running.port, context) as first:
        assert first.get("/api/internal/x").status == 200
        session = first.tls.session
    with TlsClient(running.port, context, session=session) as second:
        assert second.tls.session_reused
        assert b"premium" in second.get("/api/internal/x").all("ratelimit-policy")[0]


def test_every_connection_can_need_one_and_a_change_of_authorities_ends_sessions(
    authority: Authority, shared: RawUpstream, jane: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerCertificates.__init__, "__defaults__", (time.time, 0.05))
    trusted = tmp_path / "clients.pem"
    trusted.write_bytes(authority.file.read_bytes())
    tls = {
        "certificates": [authority.issue("strict", HOST).setting],
        "client_certificates": {"ca": str(trusted), "mode": "required"},
    }
    with running_gateway(in_front_of(shared.url) | {"server": {"tls": tls}}, tmp_path) as gateway:
        before = TLS_COUNTERS.failures["certificate_missing"]
        assert is_refused(gateway.port, authority.context())
        eventually(lambda: TLS_COUNTERS.failures["certificate_missing"] == before + 1, "it is counted")
        context = authority.context(jane)
        with TlsClient(gateway.port, context) as client:
            assert client.get().status == 200
            session = client.tls.session
        trusted.write_bytes(Authority(tmp_path, "new").file.read_bytes())

        eventually(
            lambda: is_refused(gateway.port, context, session),
            "the session of a client of the former authority is not resumed",
        )


def test_plain_http_has_no_certificate(shared: RawUpstream, tmp_path: Path) -> None:
    sections = in_front_of(shared.url)
    sections["routes"][0]["require_certificate"] = True
    with running_gateway(sections, tmp_path) as gateway, RawClient(gateway.port) as client:
        forged = ("X-Client-Cert: x", "X-Forwarded-Client-Cert: By=x", "SSL-Client-Cert: x")
        assert reason(client.get(headers=forged)) == (403, "certificate_required")


def test_names_of_certificates_are_ids_without_ambiguity() -> None:
    subject = (
        (("countryName", "DE"),),
        (("organizationName", "A, B=C + D%20"),),
        (("commonName", "Jane Doe"),),
    )
    names = (("DNS", "a.test"), ("DNS", "b.test"), ("URI", "spiffe://x"), ("email", "j@x.test"), ("IP Address", "::1"))
    found = certificate_of({"subject": subject, "subjectAltName": names, "notAfter": "Jan  5 09:34:43 2030 GMT"})
    assert found is not None
    assert found.first("common_name") == "Jane%20Doe"
    assert found.first("subject") == "CN=Jane%20Doe,O=A\\,%20B\\=C%20\\+%20D%2520,C=DE"
    assert [found.first(kind) for kind in ("dns", "uri", "email", "ip")] == ["a.test", "spiffe://x", "j@x.test", None]
    assert found.not_after == 1893836083
    twice = certificate_of({"subject": (subject[2], subject[2]), "notAfter": "Jan  5 09:34:43 2030 GMT"})
    assert twice is not None
    assert twice.first("common_name") is None
    assert certificate_of(None) is None
    assert certificate_of({}) is None


def test_two_names_of_the_subject_in_one_part_or_in_two_are_two_clients() -> None:
    """RFC 4514 section 2.2 joins the attributes of one part by a plus sign."""
    unit, name = ("organizationalUnitName", "b"), ("commonName", "a")
    found = [
        certificate_of({"subject": subject, "notAfter": "Jan  5 09:34:43 2030 GMT"})
        for subject in (((unit,), (name,)), ((unit, name),))
    ]
    assert [one and one.first("subject") for one in found] == ["CN=a,OU=b", "CN=a+OU=b"]
