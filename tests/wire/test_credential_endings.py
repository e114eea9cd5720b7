"""When a credential ends: open streams, tunnels, and the next request on a kept connection."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from api_gateway.assembly import credential_watch
from api_gateway.clients.api_keys import digest_of, new_key
from tests.jwt_kit import AUDIENCE, Published
from tests.kit import FakeClocks, RawRequest, RawUpstream, RunningGateway, Wire, _config, in_front_of
from tests.tls_kit import HOST, Authority, TlsClient

TOKEN = "operator-token"
KEY = new_key(b"\7" * 32)
JANE = "spiffe://test/jane"
LIFETIME = 3600.0  # seconds of the certificate and the token
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n"
TUNNEL = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nbegun"
UPGRADE = ("Upgrade: websocket", "Connection: Upgrade")

Sections = dict[str, Any]


@dataclass(frozen=True)
class Ending:
    """`credential` is what identifies the client; `change` alters the configuration, or else time passes.

    `sources` are the only ones, then without clients in the configuration.
    `ends`: streams and tunnels end. `then`: status and reason of the next request on a kept connection.
    """

    credential: str
    ends: bool
    then: tuple[int, str | None]
    change: Callable[[Sections], object] | None = None
    sources: tuple[str, ...] = ()


def without(name: str) -> Callable[[Sections], object]:
    return lambda sections: sections["identity"]["sources"].remove(name)


INVALID = (401, "credentials_invalid")
ENDINGS = {
    "certificate expires": Ending("certificate", ends=True, then=INVALID, sources=("certificate",)),
    "certificate is no source any more": Ending(
        "certificate", ends=True, then=(200, None), change=without("certificate")
    ),
    "certificate names the client otherwise": Ending(
        "certificate",
        ends=True,
        then=(200, None),
        change=lambda given: given["identity"]["certificate"].update(by="common_name"),
    ),
    "token expires": Ending("jwt", ends=True, then=INVALID, sources=("jwt",)),
    "its issuer is removed": Ending(
        "jwt", ends=True, then=(200, None), change=lambda given: given["identity"]["jwt"]["issuers"].pop("one")
    ),
    "token is no source any more": Ending("jwt", ends=True, then=(200, None), change=without("jwt")),
    "the audience changes": Ending(
        "jwt",
        ends=True,
        then=INVALID,
        change=lambda given: given["identity"]["jwt"]["issuers"]["one"].update(audiences=["https://other.test"]),
    ),
    "how often keys are fetched changes": Ending(
        "jwt",
        ends=False,
        then=(200, None),
        change=lambda given: given["identity"]["jwt"]["issuers"]["one"].update(refresh_interval=77),
    ),
    "key is removed": Ending(
        "api_key", ends=True, then=INVALID, change=lambda given: given["clients"]["acme"].pop("keys")
    ),
    "key is no source any more": Ending("api_key", ends=True, then=(200, None), change=without("api_key")),
    "the id must be proved": Ending(
        "header",
        ends=False,
        then=(401, "credentials_required"),
        change=lambda given: given["clients"].update(bare={"verified_only": True}),
    ),
    "the tier changes": Ending(
        "api_key", ends=False, then=(200, None), change=lambda given: given["clients"]["acme"].update(tier="PREMIUM")
    ),
}


def behave(wire: Wire, request: RawRequest) -> None:
    if b"/stream" in request.line:
        wire.send(STREAM)
        wire.fill()
    elif b"/tunnel" in request.line:
        wire.send(TUNNEL)
        wire.fill()
    else:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def issuer() -> Iterator[Published]:
    one = Published()
    yield one
    one.server.close()


def sections_of(up: RawUpstream, authority: Authority, issuer: Published, ending: Ending) -> Sections:
    tls = {
        "certificates": [authority.issue("server", HOST).setting],
        "client_certificates": {"ca": str(authority.file)},
    }
    sources = list(ending.sources) or ["certificate", "api_key", "jwt", "header", "address"]
    jwt = {
        "issuers": {
            name: {"issuer": url, "audiences": [AUDIENCE]}
            for name, url in (("one", issuer.issuer), ("two", "https://two.test"))
        }
    }
    return in_front_of(up.url) | {
        "server": {"tls": tls, "port": 0},
        "admin": {"tokens": {"test": {"token": TOKEN, "role": "operate"}}},
        "identity": {"sources": sources, "certificate": {"by": "uri"}, "jwt": jwt},
        "clients": {"acme": {"keys": {"one": {"digest": f"sha256:{digest_of(KEY.encode())}"}}}},
    }


def has_ended(client: TlsClient) -> bool:
    """Return whether a stream ends within a time in which the gateway looks at it several times."""
    client.sock.settimeout(10 * credential_watch.INTERVAL)
    try:
        return not client.fill()
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("name", ENDINGS)
def test_what_ends_with_a_credential(
    name: str, authority: Authority, issuer: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credential_watch, "INTERVAL", 0.05)
    ending, clocks = ENDINGS[name], FakeClocks(wall=time.time())
    jane = authority.issue("jane", x509.UniformResourceIdentifier(JANE), days=LIFETIME / 86_400)
    now = int(time.time())
    token = issuer.signed({"iat": now, "nbf": now, "exp": now + int(LIFETIME)})
    field = {
        "certificate": (),
        "api_key": (f"X-API-Key: {KEY}",),
        "jwt": (f"Authorization: Bearer {token}",),
        "header": ("X-Client-ID: bare",),
    }[ending.credential]
    with ExitStack() as stack:
        up = RawUpstream(behave)
        stack.callback(up.close)
        sections = sections_of(up, authority, issuer, ending)
        if ending.sources:
            sections.pop("clients")
        running = RunningGateway(sections, tmp_path, clocks.clocks, read=lambda: _config(sections, tmp_path))
        stack.callback(running.stop)
        context = authority.context(jane if ending.credential == "certificate" else None)
        stream, tunnel, kept, operator = (
            stack.enter_context(TlsClient(running.port, one))
            for one in (context, context, context, authority.context())
        )
        assert kept.get("/api/x", field).status == 200
        for client, path, more in ((stream, "/api/stream", ()), (tunnel, "/api/tunnel", UPGRADE)):
            client.request("GET", path, (*field, *more))
            assert client.read_until(b"begun") is not None
        if ending.change is None:
            clocks.advance(LIFETIME + 60)
        else:
            ending.change(sections)
            operator.request("POST", "/reload", (f"Authorization: Bearer {TOKEN}", "Content-Length: 0"))
            assert operator.answer().status == 200
        found = has_ended(stream), has_ended(tunnel)
        after = kept.get("/api/x", field)
        reason = json.loads(after.body)["reason"] if after.status >= 400 else None
    assert (found, (after.status, reason)) == ((ending.ends, ending.ends), ending.then)
