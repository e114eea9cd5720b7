"""The page on rate limits: its recipes do what it says."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from joserfc import jwt
from joserfc.jwk import OctKey

from tests.kit import (
    FakeClocks,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    eventually,
    reason,
    reply,
)
from tests.kit import running_gateway as running

PAGE = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
THE_LIST, FIVE_AT_A_TIME = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL))
SECRET = "0123456789abcdef0123456789abcdef"
ROOMY = {name: {"rate": 1000, "capacity": 100_000} for name in ("FREE", "BASIC", "PREMIUM", "ENTERPRISE")}
NOW = 1_800_000_000.0  # on a clock that stands still
HELD = 30.0  # seconds after which a response is sent in any case


@contextmanager
def recipe(shown: dict[str, Any], up: RawUpstream, folder: Path) -> Iterator[RunningGateway]:
    """Run a gateway with a configuration of the page; upstream and issuer are those of the test."""
    (issuer,) = shown["identity"]["jwt"]["issuers"].values()
    identity = shown["identity"] | {"jwt": {"issuers": {"own": issuer | {"secret": SECRET}}}}
    more = {
        "identity": identity,
        "upstreams": {"app": {"targets": [{"url": up.url}]}},
        "tiers": ROOMY,
        "address_limit": {"rate": 0},
        "clients": {"rich": {"tier": "PREMIUM"}},
        "admin": {"local": True},
    }
    with running(shown | more, folder, FakeClocks(wall=NOW).clocks) as gateway:
        yield gateway


def token(shown: dict[str, Any], subject: str, organisation: str) -> str:
    """Return a header field with the token of a user."""
    (issuer,) = shown["identity"]["jwt"]["issuers"].values()
    claims = {"iss": issuer["issuer"], "aud": "gateway", "sub": subject, "exp": NOW + 600}
    encoded = jwt.encode(
        {"alg": "HS256"}, claims | {issuer["organisation_claim"]: organisation}, OctKey.import_key(SECRET)
    )
    return f"Bearer {encoded}"


def spend(gateway: RunningGateway, count: int, path: str, method: str = "GET", **headers: str) -> list[int]:
    """Send requests; return their statuses. `{}` in a header field is the number of the request."""
    found = []
    for number in range(count):
        fields = {name.replace("_", "-"): value.replace("{}", str(number)) for name, value in headers.items()}
        found.append(ask(f"{gateway.url}{path}", method=method, headers=fields).status)
    return found


def test_the_list_of_the_page(tmp_path: Path, upstream: Callable[[], RawUpstream]) -> None:
    """Ten logins a minute by address, an organisation of fifty users, and a tier's own allowance for exports."""
    up = upstream()
    with recipe(THE_LIST, up, tmp_path) as gateway:
        assert spend(gateway, 12, "/api/login", "POST", X_Client_ID="invented-{}") == [200] * 10 + [429] * 2
        assert spend(gateway, 2, "/api/login", "GET", X_Client_ID="anyone") == [200] * 2
        for path in ("/api/exports", "/api/reports"):
            assert spend(gateway, 3, path, X_Client_ID="poor") == [200] * 2 + [429]
        assert spend(gateway, 4, "/api/exports", X_Client_ID="rich") == [200] * 4
        for number in range(500):  # of fifty users, who share a bucket
            assert spend(gateway, 1, "/api/login", Authorization=token(THE_LIST, f"user-{number % 50}", "acme")) == [
                200
            ]
        refused = ask(f"{gateway.url}/api/login", headers={"Authorization": token(THE_LIST, "ann", "acme")})
        assert (refused.status, refused.json()["violated-policies"]) == (429, ["team"])
        assert spend(gateway, 1, "/api/login", Authorization=token(THE_LIST, "eve", "other")) == [200]


def test_five_at_a_time_of_the_page(tmp_path: Path, upstream: Callable[[], RawUpstream]) -> None:
    """Of a client by its tier, and one export of an organisation."""
    release, plain = threading.Event(), reply()

    def hold(wire: Wire, request: RawRequest) -> bool | None:
        release.wait(HELD)
        return plain(wire, request)

    up = upstream()
    up.behave = hold
    with recipe(FIVE_AT_A_TIME, up, tmp_path) as gateway, ExitStack() as stack:
        stack.callback(release.set)

        def begin(path: str, field: str) -> RawClient:
            client = stack.enter_context(RawClient(gateway.port))
            client.request("GET", path, (field,))
            return client

        acme = [f"Authorization: {token(FIVE_AT_A_TIME, user, 'acme')}" for user in ("ann", "bob")]
        other = f"Authorization: {token(FIVE_AT_A_TIME, 'eve', 'other')}"
        open_ = [begin("/api/x", "X-Client-ID: me") for _ in range(5)]
        open_ += [begin("/api/exports", acme[0]), begin("/api/exports", other), begin("/api/x", acme[1])]
        eventually(lambda: len(up.requests) == len(open_), "all of them are with the upstream")
        for path, field in (("/api/x", "X-Client-ID: me"), ("/api/exports", acme[1])):
            assert reason(begin(path, field).answer()) == (429, "concurrency_exceeded")
        release.set()
        assert {one.answer().status for one in open_} == {200}
        assert begin("/api/x", "X-Client-ID: me").answer().status == 200
