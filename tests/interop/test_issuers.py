"""Tokens of real issuers, which rotate their keys, go down and return."""

import base64
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import free_port
from tests.kit import PATIENCE, RawUpstream, RunningGateway, ask, eventually, in_front_of

pytestmark = pytest.mark.interop

Gateway = Callable[[dict[str, Any]], RunningGateway]
AUDIENCE = "https://api.test"
NODE_PACKAGES = "INTEROP_NODE_MODULES"  # the variable with the folder node_modules that has oauth2-mock-server
ALGORITHMS = ("RS256", "PS256", "ES256", "ES384", "EdDSA")


def trusting(upstream: RawUpstream, issuer: str, audience: str) -> dict[str, Any]:
    """Return the sections of a gateway that asks an issuer for its keys every second if it must."""
    one = {"issuer": issuer, "audiences": [audience], "unknown_key_interval": 1, "refresh_interval": 3600}
    identity = {"sources": ["jwt", "header", "address"], "jwt": {"issuers": {"one": one}}}
    return in_front_of(upstream.url) | {"identity": identity}


def status(running: RunningGateway, token: str) -> int:
    return ask(f"{running.url}/api/x", headers={"Authorization": f"Bearer {token}"}).status


def becomes(running: RunningGateway, token: str, expected: int) -> None:
    """Wait until a token is answered so: a fetch of keys may be due in a second only."""
    eventually(lambda: status(running, token) == expected, f"the status becomes {expected}")


class NodeIssuer:
    """A process of `issuer.mjs`."""

    def __init__(self, folder: Path, port: int) -> None:
        script = Path(__file__).with_name("issuer.mjs")
        command = ["node", str(script), str(folder / "oauth2-mock-server"), str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, action: str, **arguments: Any) -> Any:
        """Have the process do something; return its result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": action, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the issuer ended"
        return json.loads(line)

    def token(self, kid: str, **claims: Any) -> str:
        """Return a token that is signed with a key."""
        found: str = self.tell("token", kid=kid, claims={"aud": AUDIENCE, "sub": "acme", **claims})
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def node_issuer() -> Iterator[NodeIssuer]:
    folder = Path(os.environ.get(NODE_PACKAGES, ""))
    if shutil.which("node") is None or not (folder / "oauth2-mock-server").is_dir():
        pytest.skip(f"needs node, and oauth2-mock-server in the folder that {NODE_PACKAGES} names")
    issuer = NodeIssuer(folder, free_port())
    yield issuer
    issuer.close()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_oauth2_mock_server_rotates_goes_down_and_returns(
    node_issuer: NodeIssuer, gateway: Gateway, upstream: Callable[..., RawUpstream], algorithm: str
) -> None:
    first = node_issuer.tell("rotate", algorithm=algorithm)
    url = node_issuer.tell("start")
    running = gateway(trusting(upstream(), url, AUDIENCE))
    assert status(running, node_issuer.token(first)) == 200
    assert status(running, node_issuer.token(first, aud="https://elsewhere.test")) == 401
    assert status(running, node_issuer.token(first, iss="https://elsewhere.test")) == 200  # the upstream's
    second = node_issuer.tell("rotate", algorithm=algorithm)
    becomes(running, node_issuer.token(second), 200)
    assert status(running, node_issuer.token(first)) == 200
    node_issuer.tell("stop")
    third = node_issuer.tell("rotate", algorithm=algorithm)
    assert status(running, node_issuer.token(second, sub="other")) == 200
    becomes(running, node_issuer.token(third), 503)
    node_issuer.tell("start")
    becomes(running, node_issuer.token(third), 200)


# oidc-provider-mock: its access tokens are opaque, its ID tokens are for the client


@contextmanager
def python_issuer(port: int) -> Iterator[str]:
    """Run oidc-provider-mock; yield its URL. Each process has a new key, which has no id."""
    command = [sys.executable, "-m", "oidc_provider_mock", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: serves(url) or process.poll() is not None, "the issuer serves")
        assert process.poll() is None, "the issuer did not start"
        yield url
    finally:
        process.kill()
        process.wait()


def serves(url: str) -> bool:
    try:
        return ask(f"{url}/.well-known/openid-configuration").status == 200
    except urllib.error.URLError:
        return False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def logged_in(issuer: str, name: str) -> dict[str, str]:
    """Return the tokens of a user after the authorization code flow."""
    redirect = "http://127.0.0.1/callback"
    query = {"client_id": "app", "redirect_uri": redirect, "response_type": "code", "scope": "openid"}
    form = urllib.parse.urlencode({"sub": name}).encode()
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        opener.open(f"{issuer}/oauth2/authorize?{urllib.parse.urlencode(query)}", form, PATIENCE).close()
        raise AssertionError("no redirection")
    except urllib.error.HTTPError as error:
        with error:
            location = error.headers["Location"]
    code = urllib.parse.parse_qs(urllib.parse.urlsplit(location).query)["code"][0]
    exchange = {"grant_type": "authorization_code", "code": code, "redirect_uri": redirect}
    secret = base64.b64encode(b"app:secret").decode()
    headers = {"Authorization": f"Basic {secret}", "Content-Type": "application/x-www-form-urlencoded"}
    answer = ask(
        f"{issuer}/oauth2/token", method="POST", headers=headers, body=urllib.parse.urlencode(exchange).encode()
    )
    assert answer.status == 200, answer.body
    found: dict[str, str] = answer.json()
    return found


@pytest.mark.skipif(importlib.util.find_spec("oidc_provider_mock") is None, reason="needs oidc-provider-mock")
def test_oidc_provider_mock_goes_down_and_returns_with_another_key(
    gateway: Gateway, upstream: Callable[..., RawUpstream]
) -> None:
    port = free_port()
    with python_issuer(port) as issuer:
        running = gateway(trusting(upstream(), issuer, "app"))
        first = logged_in(issuer, "alice")
        assert status(running, first["id_token"]) == 200
        assert "client:alice" in set(running.live.limiter._table.current)
        assert status(running, first["access_token"]) == 200  # opaque, so it is the upstream's
        forged = first["id_token"].rpartition(".")[0] + ".c2lnbmF0dXJl"
        assert status(running, forged) == 401
    bob = first["id_token"]
    assert status(running, bob) == 200
    time.sleep(1.1)  # `unknown_key_interval`
    assert status(running, forged + "AA") == 503  # a key without id may have been replaced, and cannot be fetched
    with python_issuer(port) as issuer:
        second = logged_in(issuer, "bob")
        becomes(running, second["id_token"], 200)
        becomes(running, first["id_token"], 401)
