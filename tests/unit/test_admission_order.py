"""One admission: the server's own protocol, the ASGI application and `/explain` decide alike, in whatever order.

The stages are those that `assembly.data_plane` builds of a configuration with nearly everything that has a stage.
"""

import asyncio
import json
import math
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import unquote

import pytest

from api_gateway.admin.explain_schema import ExplainRequest
from api_gateway.admin.explainer import Explainer
from api_gateway.assembly.data_plane import data_plane_of
from api_gateway.assembly.extensions import LoadedExtension
from api_gateway.assembly.gateway import Assembly, Gateway
from api_gateway.clients.api_keys import digest_of, new_key
from api_gateway.config import GatewayConfig
from api_gateway.downstream.connection import DownstreamConnection
from api_gateway.errors import GatewayError
from api_gateway.extensions.interface import Identity, RequestView, Respond
from api_gateway.http1.asgi import Message, Receive, Scope
from api_gateway.http1.fast_parser import lines_of
from api_gateway.http1.request_head import RequestHead
from api_gateway.limits.concurrency import ConcurrencyQuota
from api_gateway.models import ConcurrencySlot, Exchange, HeaderList
from api_gateway.proxy.admission import Admission
from api_gateway.resilience.event_loop_limit import LAG_SAMPLES, PRIORITY_WIDTH, EventLoopShedder
from api_gateway.settings.extensions import ExtensionSection
from api_gateway.transport.response import UpstreamResponse
from tests.jwt_kit import AUDIENCE, ISSUER, claims_of, key_for, key_set, signed
from tests.kit import FakeClocks, case, soon

Figures = dict[str, Any]

KEY, KEY_OF_ROUTE, EXPIRED = (new_key(bytes([number]) * 32) for number in range(3))
READER, WRITER = (signed(claims_of(sub=name, scope=name)).decode() for name in ("read", "write"))
APP = "https://app.test"
OWN_STATUS = 299
PREFLIGHT = {"Origin": APP, "Access-Control-Request-Method": "GET"}

# What has a request refused, by the stage that refuses it, in their order: changes of the request, and how the detail
# begins. `part` is a part of the name of the route.
REFUSED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "AmbiguityStage": ({"host": "not/valid"}, "The request is ambiguous"),
    "PreflightStage": ({"method": "OPTIONS", "headers": {**PREFLIGHT, "Origin": "https://evil.test"}}, "CORS: "),
    "CredentialStage": ({"headers": {"X-API-Key": "agw_wrong"}}, "The API key is malformed"),
    "ExtensionIdentityStage": ({"client_id": "not valid"}, "X-Client-ID must be"),
    "AddressStage": ({"address": "198.51.100.7"}, "The address 198.51.100.7 is denied."),
    "RouteStage": ({"name": "none", "method": "GET"}, "No route matches"),
    "PathRewritingStage": ({"below": "/api//"}, "The prefix /api/"),
    "HeadLimitStage": (
        {"part": "heads", "headers": {"X-A": "1", "X-B": "2", "X-C": "3"}},
        "The request has more than",
    ),
    "ExtensionCostStage": ({"headers": {"X-Fail": "cost"}}, "The extension 'own' failed in cost."),
    "RouteAddressStage": ({"part": "office", "address": "192.0.2.8"}, "The address 192.0.2.8 is denied on the route"),
    "CredentialRouteStage": ({"headers": {"X-API-Key": KEY_OF_ROUTE}}, "The API key is not valid for route"),
    "RequirementStage": ({"part": "scoped"}, "The route '"),
    "DeadlineStage": ({"headers": {"X-Request-Timeout": "soon"}}, "X-Request-Timeout must be"),
    "LoadSheddingStage": ({"is_late": True}, "The gateway itself is overloaded"),
    "ConcurrencyStage": ({"headers": {"X-Cost": "500"}}, "Client '"),
}
# Stages that refuse nothing: they choose, or respond.
OTHERS = {"CorsStage", "SplitStage", "FinalRecipientStage", "ExtensionRequestStage", "DirectResponseStage"}
# What must precede a stage, because it uses what that stage finds out.
NEEDS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("PathRewritingStage", "HeadLimitStage", "ExtensionCostStage"), ("RouteStage",)),
    **dict.fromkeys(("RouteAddressStage", "DeadlineStage"), ("RouteStage",)),
    **dict.fromkeys(("CredentialRouteStage", "RequirementStage"), ("CredentialStage", "RouteStage")),
    "ExtensionIdentityStage": ("CredentialStage",),
    "LoadSheddingStage": ("ExtensionIdentityStage",),
    "ConcurrencyStage": ("ExtensionIdentityStage", "RouteStage", "ExtensionCostStage"),
}
PARTS = ("heads", "office", "scoped")


def route(name: str, parts: Sequence[str], **changes: Any) -> dict[str, Any]:
    """Return the section of a route that refuses what each of these parts names."""
    section: dict[str, Any] = {
        "name": name,
        "path": f"/api/{name}",
        "upstream": "up",
        "rewrite": {"prefix": "/v2"},
        "costs": [{"path": f"/api/{name}/export", "cost": 4.5}],
    }
    if "heads" in parts:
        section["max_header_lines"] = 3
    if "office" in parts:
        section["addresses"] = {"deny": ["192.0.2.8/32"]}
    if "scoped" in parts:
        section["require"] = {"scopes": ["read"]}
    return section | changes


LIMITS = [
    {"name": "team", "key": "header:x-team", "rate": 3, "capacity": 9},
    {
        "name": "posts",
        "key": ["client", "route"],
        "tiers": {"FREE": {"rate": 1, "capacity": 4}, "BASIC": {"rate": 2, "capacity": 8}},
        "routes": ["plain", "split"],
        "methods": ["POST"],
        "cost": 1,
    },
    {"name": "all", "key": "route", "rate": 30, "capacity": 60, "routes": ["plain"]},
    {"name": "daily", "key": "header:x-team", "quota": 400, "period": "day"},
    {"name": "at-once", "key": "client", "concurrent": 1},
]
SECTIONS = {
    "log": {"access": False},
    "identity": {
        "sources": ["api_key", "jwt", "header", "address"],
        "jwt": {"issuers": {"one": {"issuer": ISSUER, "audiences": [AUDIENCE], "jwks_file": "keys.json"}}},
    },
    "tiers": {"FREE": {"rate": 1, "capacity": 10}, "BASIC": {"rate": 10, "capacity": 40}},
    "address_limit": {"rate": 2, "capacity": 12},
    "addresses": {"deny": ["198.51.100.0/24"]},
    "cors": {"origins": [APP]},
    "clients": {
        "paid": {"tier": "BASIC"},
        "bare": {"verified_only": True},
        "keyed": {
            "tier": "BASIC",
            "keys": {
                "all": {"digest": f"sha256:{digest_of(KEY.encode())}"},
                "one": {"digest": f"sha256:{digest_of(KEY_OF_ROUTE.encode())}", "routes": ["split"]},
                "old": {"digest": f"sha256:{digest_of(EXPIRED.encode())}", "expires_at": "2020-01-01T00:00:00Z"},
            },
        },
    },
    "upstreams": {name: {"targets": [{"url": f"http://127.0.0.1:{port}"}]} for name, port in (("up", 1), ("new", 2))},
    "routes": [
        route("plain", (), methods=["GET", "POST", "HEAD"]),
        *(route("-".join(parts), parts) for count in (1, 2, 3) for parts in combinations(PARTS, count)),
        route("split", (), host="split.test", upstream=None, upstreams=[{"name": "up"}, {"name": "new"}]),
        route("said", (), upstream=None, rewrite=None, respond={"status": 203, "body": "said"}),
    ],
}


class Own:
    """An extension that does what fields of the request say; at once, or in a coroutine."""

    def identify(self, request: RequestView) -> Any:
        """Identify the client that X-Own names."""
        name = request.headers.get("x-own")
        return self._when(request, None if name is None else Identity(name, "basic"))

    def cost(self, request: RequestView, _route: str) -> Any:
        """Set the cost to X-Cost, or fail."""
        if request.headers.get("x-fail") == "cost":
            raise ValueError("as asked for")
        cost = request.headers.get("x-cost")
        return self._when(request, None if cost is None else float(cost))

    def on_request(self, request: RequestView) -> Any:
        """Respond to X-Respond."""
        return self._when(request, Respond(OWN_STATUS, "own") if "x-respond" in request.headers else None)

    def _when(self, request: RequestView, found: Any) -> Any:
        async def later() -> Any:
            return found

        return later() if "x-wait" in request.headers else found


class InstantCall:
    """A call of an upstream whose response is complete at once."""

    def __init__(self, _principal: str | None) -> None:
        pass

    def start(self, response: UpstreamResponse, _request: bytes) -> None:
        response.set_head(200, b"OK", [], {})
        response.is_complete = response.keeps_alive = True
        response.on_progress()


class OwnClient:
    """The client's side of the server's own protocol, as far as it is used: keeps what is sent."""

    abilities = DownstreamConnection.abilities
    limits = SimpleNamespace(header_bytes=10_000, header_lines=100)
    scheme = "http"
    certificate = last_headers = None
    is_write_paused = is_draining = False

    def __init__(self, address: str) -> None:
        self.client = (address, 50_000)
        self.loop = asyncio.get_running_loop()
        self.sent = b""
        self.transport = self

    def write(self, data: bytes) -> None:
        self.sent += data

    def write_response(self, data: bytes, *, keep_alive: bool, is_last: bool) -> None:
        self.sent += data

    def begin_exchange(self, _exchange: object) -> None:
        """Do nothing."""

    def end_exchange(self, *, keep_alive: bool) -> None:
        """Do nothing."""


class Paths:
    """All that decides on requests, on a clock that is moved by hand; `order` are the stages by name."""

    def __init__(self, gateway: Gateway, clocks: FakeClocks, order: Sequence[str] | None = None) -> None:
        self.clocks = clocks
        self.shedder = EventLoopShedder(1.0, gateway.priorities, source=random.Random(1))
        section = ExtensionSection(name="own", use="own:own", budget=60)
        self.gateway = replace(gateway, extensions=(LoadedExtension(section, Own()),), event_loop_shedder=self.shedder)
        for live in gateway.upstreams.values():
            client = live.upstream_client
            client._acquire_idle = dict.fromkeys(client.upstream.targets, InstantCall)  # type: ignore[arg-type]  # as far as it is used
        _, self.fast_path, make_explainer = data_plane_of(self.gateway, frozenset(), has_own_tls=False)
        explainer = cast("Callable[..., Explainer]", make_explainer)
        if order is not None:
            stages = {type(stage).__name__: stage for stage in self.fast_path.admission.stages}
            self.fast_path.admission = Admission([stages[name] for name in order])
            explainer = partial(explainer, admission=self.fast_path.admission)
        self.explainer = explainer()
        self.seen: list[Exchange] = []
        self._holder = Exchange("", "GET", "", "", 0.0)
        self.fast_path.record._observers += (self.seen.append,)

    def shed(self, *tiers: str) -> None:
        """Have all requests of these tiers shed, the lowest first, and none of others."""
        for _ in range(LAG_SAMPLES):
            self.shedder.observe(1.0 + PRIORITY_WIDTH * len(tiers))

    def hold(self, *, is_held: bool) -> None:
        """Have two clients hold their only slot, if there is a limit, or none."""
        slots = self.gateway.slots
        slots.release(self._holder)
        if is_held and self.gateway.quotas.concurrency:
            quota = ConcurrencyQuota.of("at-once", 1)
            slots.take(self._holder, tuple([ConcurrencySlot(f"limit:at-once:client:{name}", quota) for name in "ab"]))

    async def through_the_protocol(self, request: ExplainRequest) -> Figures:
        """Return the figures of a request in the server's own protocol, plain or by the general parser."""
        client = OwnClient(request.address)
        lines = [b"%b: %b" % pair for pair in headers_of(request)]
        head = b"\r\n".join([f"{request.method} {request.path} HTTP/1.1".encode(), *lines, b"", b""])
        if not self.fast_path.try_handle(client, head):  # type: ignore[arg-type]  # as far as it is used
            parsed = RequestHead(request.method, request.path.encode(), headers_of(request), "1.1", 0, keep_alive=True)
            assert self.fast_path.try_head(client, parsed, [])  # type: ignore[arg-type]  # as above
        return await self._ended(lambda: client.sent)

    async def through_asgi(self, request: ExplainRequest) -> Figures:
        """Return the figures of a request by ASGI."""
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        await self.fast_path.serve(scope_of(request), receiver(), send)
        return await self._ended(lambda: b"".join(lines_of(one.get("headers", [])) for one in sent))

    async def _ended(self, sent: Callable[[], bytes]) -> Figures:
        if not self.seen:
            await soon(lambda: bool(self.seen), "the request ends")
        return figures_of(self.seen.pop(), sent())

    async def explained(self, request: ExplainRequest) -> Figures:
        """Return the figures of a request according to `/explain`."""
        try:
            told = await self.explainer.explain(request)
        except GatewayError as error:
            return {"reason": error.reason.value, "status": error.status, "detail": error.detail}
        result = told.result
        return {
            "reason": result.reason,
            "status": result.status or 200,
            "detail": result.detail if result.reason else None,
            "retry_after": None if result.retry_after_seconds is None else math.ceil(result.retry_after_seconds) or 1,
            "client": told.client.id,
            "tier": told.client.tier.name,
            "route": told.route and told.route.name,
            "cost": told.route.cost if told.route else 0.0,
            "charges": [(bucket.key, bucket.cost) for bucket in told.buckets],
        }


def figures_of(exchange: Exchange, sent: bytes) -> Figures:
    """Return the figures of an ended request: those that it has reached, None for the others."""
    client = exchange.client
    wait = re.search(rb"\r\nretry-after: (\d+)", sent)
    is_charged = exchange.route is not None and bool(exchange.charges)
    charges = [(one.key, round(one.increment_ns / one.quota.emission_ns, 6)) for one in exchange.charges]
    return {
        "reason": exchange.reason,
        "status": exchange.status,
        "detail": exchange.detail,
        "retry_after": int(wait[1]) if wait else None,
        "client": client and client.id,
        "tier": client and client.quota.name,
        "route": exchange.route,
        "cost": exchange.cost if is_charged else None,
        "charges": charges if is_charged else None,
    }


def headers_of(request: ExplainRequest) -> HeaderList:
    named = [] if request.client_id is None else [(b"X-Client-ID", request.client_id.encode())]
    others = [(name.encode(), value.encode()) for name, value in request.headers.items()]
    return [(b"Host", request.host.encode()), *named, *others]


def scope_of(request: ExplainRequest) -> Scope:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": request.method,
        "path": unquote(request.path),
        "raw_path": request.path.encode(),
        "query_string": b"",
        "scheme": "http",
        "headers": [(name.lower(), value) for name, value in headers_of(request)],
        "client": (request.address, 50_000),
    }


def receiver() -> Receive:
    """Return the `receive` of a request without a body, whose client stays."""
    messages: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.get_running_loop().create_future()

    return receive


@asynccontextmanager
async def gateway_of(folder: Path, limits: int = len(LIMITS)) -> AsyncIterator[tuple[Gateway, FakeClocks]]:
    """Start the parts of a gateway of `SECTIONS` and the first of `LIMITS`, on a clock that is moved by hand."""
    keys = folder.with_name(f"{folder.name}-keys.json")
    keys.write_bytes(key_set(key_for("ES256")))
    clocks = FakeClocks()
    own = {"state_dir": str(folder), "limits": LIMITS[:limits]}
    sections = json.loads(json.dumps(SECTIONS | own).replace("keys.json", str(keys)))
    assembly = Assembly(Counter(), {}, unresolved, clocks.clocks)
    async with assembly.live(GatewayConfig.model_validate(sections)) as gateway:
        yield gateway, clocks


async def unresolved(*_: Any) -> Any:
    raise AssertionError("no name is resolved")


def merged(*changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return all these changes of a request as one; None if they contradict each other."""
    found: dict[str, Any] = {"headers": {}, "part": frozenset()}
    for one in changes:
        for name, value in one.items():
            if name == "headers":
                if any(found["headers"].get(key, text) != text for key, text in value.items()):
                    return None
                found["headers"] = {**found["headers"], **value}
            elif name == "part":
                found["part"] |= {value}
            elif found.setdefault(name, value) != value:
                return None
    return None if found["part"] and "name" in found else found


def request_of(changes: Mapping[str, Any]) -> ExplainRequest:
    """Return a plain request with these changes."""
    values = {"client_id": None, "address": "192.0.2.7", "below": "/api/", **changes}
    name = values.pop("name", "-".join(sorted(values.pop("part", ()))) or "plain")
    values.pop("is_late", None)
    return ExplainRequest(path=values.pop("below") + name, **values)


def assert_agree(told: Figures, protocol: Figures, asgi: Figures) -> None:
    """Compare all figures of both paths, and what `/explain` told with those that the decision came to."""
    if protocol["reason"] == "overloaded":  # the wait is random
        protocol, asgi, told = ({**one, "retry_after": None} for one in (protocol, asgi, told))
    assert protocol == asgi
    reached = {name: value for name, value in protocol.items() if value is not None}
    if protocol["reason"] == "extension_failed":  # why is for the log only
        reached["detail"] = reached["detail"].partition(" (")[0]
    if protocol["status"] == OWN_STATUS:  # of a hook that is called for real requests only
        del reached["status"]
    if protocol["client"] is None:  # of a preflight `/explain` does not tell the route
        reached.pop("route", None)
    assert {name: told[name] for name in told.keys() & reached} == {
        name: reached[name] for name in told.keys() & reached
    }
    assert (told["reason"], told.get("retry_after")) == (protocol["reason"], protocol["retry_after"])


# Changes of generated requests, besides those with which they are refused.
CHANGES: Sequence[Mapping[str, Any]] = (
    *({"client_id": name} for name in ("a", "b", "paid", "bare", "keyed")),
    *({"method": method} for method in ("POST", "HEAD", "PUT", "OPTIONS", "TRACE", "Post")),
    *({"name": name} for name in ("plain/export", "plain/export;v=1", "plain/x%2F../export", "x/..;/plain", "said")),
    {"name": "split", "host": "split.test"},
    {"name": "split", "host": "split.test:80"},
    {"address": "2001:db8::1"},
    *({"headers": {"X-Team": name}} for name in ("red", "blue")),
    *({"headers": {"X-API-Key": key}} for key in (KEY, KEY, KEY_OF_ROUTE, EXPIRED, new_key(b"3" * 32))),
    *({"headers": {"Authorization": f"Bearer {token}"}} for token in (READER, READER, WRITER, WRITER[:-3] + "AAA")),
    *({"headers": {"X-Own": name}} for name in ("a", "c", "paid")),
    *({"headers": {"X-Cost": cost}} for cost in ("0", "2.5", "9")),
    {"headers": {"X-Wait": "1"}},
    {"headers": {"X-Respond": "1"}},
    {"headers": {"Origin": APP}},
    {"headers": {"Origin": "https://evil.test"}},
    {"method": "OPTIONS", "client_id": None, "headers": PREFLIGHT},
    {"method": "OPTIONS", "headers": {"Max-Forwards": "0"}},
    {"headers": {"X-Request-Timeout": "3"}},
)
EVERY_REASON = {
    *("bad_request", "forbidden", "credentials_invalid", "credentials_required", "credentials_insufficient"),
    *("client_id_invalid", "address_denied", "no_route", "method_not_allowed", "headers_too_large"),
    *("extension_failed", "overloaded", "rate_limited", "concurrency_exceeded", "cost_exceeds_capacity"),
}


@pytest.mark.parametrize(("limits", "count"), [(0, 2_500), (4, 2_500), (5, 5_000)], ids=["tiers", "list", "slots"])
async def test_thousands_of_requests_are_decided_alike_on_all_paths(tmp_path: Path, limits: int, count: int) -> None:
    choose = random.Random(14)
    refused = [changes for changes, _ in REFUSED.values() if "is_late" not in changes]
    reasons: Counter[tuple[int, str | None]] = Counter()
    charged: Counter[int] = Counter()
    async with gateway_of(tmp_path / "a", limits) as one, gateway_of(tmp_path / "b", limits) as other:
        protocol, asgi = both = Paths(*one), Paths(*other)
        while sum(reasons.values()) < count:
            changes = merged(
                *choose.sample(CHANGES, choose.randrange(6)), *choose.sample(refused, choose.randrange(2))
            )
            if changes is None:
                continue
            late = ("FREE",) if sum(reasons.values()) % 1_000 < 100 else ()
            seconds, is_held = choose.choice((0, 0, 1e-9, 0.01, 0.1, 0.5)), choose.random() < 0.5
            for paths in both:
                paths.clocks.advance(seconds)
                paths.shed(*late)
                paths.hold(is_held=is_held)
            request = request_of(changes)
            with case(request):
                told = await protocol.explained(request)
                got = await protocol.through_the_protocol(request)
                assert_agree(told, got, await asgi.through_asgi(request))
            reasons[got["status"], got["reason"]] += 1
            charged[len(got["charges"] or ())] += 1
    assert {reason for _, reason in reasons} == {None, *EVERY_REASON} - (
        {"concurrency_exceeded"} if limits < 5 else set()
    )
    assert {200, 203, 204, OWN_STATUS} == {status for status, reason in reasons if reason is None}
    assert min(reasons.values()) > 10, reasons
    assert max(charged) == {0: 2, 4: 6, 5: 6}[limits]


async def test_the_order_of_any_two_stages_is_the_same_on_all_paths(tmp_path: Path) -> None:
    async with gateway_of(tmp_path) as (gateway, clocks):
        order = [type(stage).__name__ for stage in Paths(gateway, clocks).fast_path.admission.stages]
        assert [name for name in order if name not in OTHERS] == list(REFUSED)
        compared = 0
        for first, second in combinations(REFUSED, 2):
            both = merged(REFUSED[first][0], REFUSED[second][0])
            start, end = order.index(first), order.index(second)
            if both is None or set(NEEDS.get(second, ())).intersection(order[start:end]):
                continue
            moved = [*order[:start], second, *order[start:end], *order[end + 1 :]]
            for stages, refusing in ((order, first), (moved, second)):
                with case(first, second, refusing):
                    paths = Paths(gateway, clocks, stages)
                    paths.shed(*(("FREE", "BASIC") if "is_late" in both else ()))
                    clocks.advance(100)
                    request = request_of(both)
                    told = await paths.explained(request)
                    assert_agree(told, await paths.through_the_protocol(request), await paths.through_asgi(request))
                    assert told["detail"].startswith(REFUSED[refusing][1])
            compared += 1
        assert compared == 46
