"""The pages need no token and hold no data; the events that they watch need one and cover what is shown."""

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from api_gateway.admin import dashboard, feed
from api_gateway.admin.pages import CONTENT_SECURITY_POLICY
from api_gateway.admin.settings_view import settings_of
from api_gateway.config import GatewayConfig, load_config
from api_gateway.downstream import listener
from api_gateway.reporting import traffic_history
from tests.kit import PATIENCE, RawUpstream, RunningGateway, ask, eventually, in_front_of, running_gateway

OPERATOR, READER = "correct-horse-battery-staple", "correct-horse-battery-reader"
TOKENS = {"alice": {"token": OPERATOR, "role": "operate"}, "bob": {"token": READER, "role": "read"}}
JSON = {"Content-Type": "application/json"}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def gateway(shared: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    sections = in_front_of(shared.url) | {"admin": {"tokens": TOKENS}}
    with running_gateway(sections, tmp_path_factory.mktemp("dashboard")) as running:
        yield running


@pytest.fixture(autouse=True)
def _quick_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames and points come more often."""
    monkeypatch.setattr(dashboard, "_TURN", 0.05)
    for module in (dashboard, feed):
        monkeypatch.setattr(module, "FRAME_SECONDS", 0.2)
    for module in (traffic_history, feed):
        monkeypatch.setattr(module, "POINT_SECONDS", 1.0)


class Events:
    """The events of a stream, one after another."""

    def __init__(self, gateway: RunningGateway, token: str = READER) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=PATIENCE)
        self.connection.request("GET", "/dashboard/events", headers=bearer(token))
        self.response = self.connection.getresponse()
        assert self.response.status == 200, self.response.read()

    def next(self) -> tuple[str, Any]:
        """Return the name and the value of the next event. Raises EOFError at the end of the stream."""
        lines = []
        while (line := self.response.readline()) != b"\n":
            if not line:
                raise EOFError
            lines.append(line.decode())
        assert [line.partition(":")[0] for line in lines] == ["event", "data"]
        return lines[0].removeprefix("event: ").strip(), json.loads(lines[1].removeprefix("data: "))

    def frame(self) -> dict[str, Any]:
        """Return the events up to the end of the next frame."""
        found: dict[str, Any] = {}
        while "frame" not in found:
            name, value = self.next()
            found[name] = found.get(name, []) + value if name in ("upstreams", "points") else value
        return found

    def until_end(self) -> None:
        """Read to the end of the stream."""
        with suppress(EOFError):
            while True:
                self.next()


@contextmanager
def watching(gateway: RunningGateway, token: str = READER) -> Iterator[Events]:
    events = Events(gateway, token)
    try:
        yield events
    finally:
        events.connection.close()


# Pages


@pytest.mark.parametrize(
    "path", ["/", "/dashboard", "/docs", "/dashboard/app.js", "/dashboard/style.css", "/dashboard/vendor/uPlot.js"]
)
def test_pages_need_no_token_and_forbid_everything_else(gateway: RunningGateway, path: str) -> None:
    answer = ask(gateway.url + path)
    assert answer.status == 200
    assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["content-type"].startswith("text/")
    assert int(answer.headers["content-length"]) == len(answer.body) > 100
    again = ask(gateway.url + path, headers={"If-None-Match": f'"other", W/{answer.headers["etag"]}'})
    assert (again.status, again.body) == (304, b"")
    assert ask(gateway.url + path, headers={"If-None-Match": '"other"'}).status == 200
    head = ask(gateway.url + path, method="HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", answer.headers["content-length"])
    assert ask(gateway.url + path, method="OPTIONS").headers["allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/x.js",
        "/dashboard/../config.py",
        "/dashboard/%2e%2e/config.py",
        "/dashboard/..%2fconfig.py",
        "/dashboard/vendor/LICENSE.md",
        "/index.html",
    ],
)
def test_nothing_else_is_served(gateway: RunningGateway, path: str) -> None:
    assert ask(gateway.url + path).status in (401, 404)
    assert ask(gateway.url + path, headers=bearer(OPERATOR)).status == 404


def test_a_link_leads_to_a_page_and_no_page_of_another_origin_embeds_one(gateway: RunningGateway) -> None:
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    embedded = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}
    for path in ("/", "/dashboard", "/docs"):
        assert ask(gateway.url + path, headers=followed).status == 200
        assert ask(gateway.url + path, headers=followed | {"Sec-Fetch-Dest": "iframe"}).status == 403
    assert ask(f"{gateway.url}/dashboard/app.js", headers=embedded).status == 403
    assert ask(f"{gateway.url}/dashboard/events", headers=followed | bearer(READER)).status == 403


def test_what_is_not_a_read_needs_an_operator(gateway: RunningGateway) -> None:
    assert ask(f"{gateway.url}/dashboard", method="POST", headers=JSON, body=b"{}").status == 401
    assert ask(f"{gateway.url}/", method="POST", headers=JSON, body=b"{}").status == 404
    assert ask(f"{gateway.url}/dashboard", method="POST", headers=JSON | bearer(OPERATOR), body=b"{}").status in (
        404,
        405,
    )


# Events


def test_events_need_a_token(gateway: RunningGateway) -> None:
    assert ask(f"{gateway.url}/dashboard/events").status == 401
    assert ask(f"{gateway.url}/dashboard/events", headers=bearer("wrong-wrong-wrong")).status == 401
    assert ask(f"{gateway.url}/dashboard/events?token={READER}").status == 401


def test_a_page_gets_everything_first_and_then_what_changes(gateway: RunningGateway, up: RawUpstream) -> None:
    with watching(gateway) as events:
        assert events.response.headers["content-type"].startswith("text/event-stream")
        assert events.response.headers["cache-control"] == "no-store"
        name, hello = events.next()
        assert name == "hello"
        assert (hello["operator"], hello["role"]) == ("bob", "read")
        first = events.frame()
        assert first["overview"].keys() >= {"requests_per_second", "limited", "errors", "p50", "p90", "p99", "status"}
        (row,) = first["upstreams"]
        assert (row["name"], row["status"], row["breaker"]["state"], row["override"]) == ("up", "pass", "CLOSED", None)
        assert row["targets"][0]["url"] == up.url
        assert "upstreams" not in events.frame(), "nothing has changed"
        assert ask(f"{gateway.url}/api/x").status == 200
        eventually(lambda: any(one["calls"] for one in events.frame().get("upstreams", ())), "the call is shown")
        change = json.dumps({"mode": "forced_open", "duration_seconds": 600, "comment": "<b>moved</b>"}).encode()
        set_mode = {"method": "POST", "headers": JSON | bearer(OPERATOR)}
        assert ask(f"{gateway.url}/circuit-breakers/up", body=change, **set_mode).status == 200  # type: ignore[arg-type]
        frames: list[dict[str, Any]] = []
        eventually(lambda: "problems" in (frames.append(events.frame()) or frames[-1]), "the problem is shown")  # type: ignore[func-returns-value]
        (problem,) = frames[-1]["problems"]
        assert (problem["severity"], problem["link"]) == ("fail", "#/upstreams/up")
        (row,) = frames[-1]["upstreams"]
        assert row["override"]["comment"] == "<b>moved</b>"
        assert row["override"]["set_by"].startswith("token 'alice'")
        assert ask(f"{gateway.url}/circuit-breakers/up", body=b'{"mode": "auto"}', **set_mode).status == 200  # type: ignore[arg-type]


def test_pages_share_what_is_gathered_and_their_number_is_limited(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = gateway.server._app.state.admin_context.feed
    eventually(lambda: shared.watchers == 0, "earlier pages have gone")
    monkeypatch.setattr(dashboard, "MAX_WATCHERS", 2)
    with watching(gateway) as one, watching(gateway) as other:
        assert one.frame()["frame"] <= other.frame()["frame"] <= shared._frame.number
        refused = ask(f"{gateway.url}/dashboard/events", headers=bearer(READER))
        assert (refused.status, refused.headers["retry-after"]) == (429, "10")
    eventually(lambda: shared.watchers == 0, "a page that has gone is not counted")


def test_a_stream_ends_when_the_gateway_stops(
    up: RawUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "DRAIN_LINGER", 0.1)  # the page closes its connection later
    running = RunningGateway(in_front_of(up.url) | {"admin": {"tokens": TOKENS}}, tmp_path)
    with watching(running) as events:
        events.frame()
        running.stop()
        events.until_end()


def test_a_reload_ends_the_stream_of_a_token_that_is_not_valid_any_more(up: RawUpstream, tmp_path: Path) -> None:
    sections = in_front_of(up.url) | {"state_dir": tmp_path, "server": {"port": 0, "max_event_loop_lag": None}}
    fewer = GatewayConfig.model_validate(sections | {"admin": {"tokens": {"alice": TOKENS["alice"]}}})
    running = RunningGateway(sections | {"admin": {"tokens": TOKENS}}, tmp_path, read=lambda: fewer)
    try:
        with watching(running) as events:
            events.frame()
            assert ask(f"{running.url}/reload", method="POST", headers=bearer(OPERATOR)).status == 200
            events.until_end()
        assert ask(f"{running.url}/dashboard/events", headers=bearer(READER)).status == 401
    finally:
        running.stop()


def test_points_are_sampled_and_sent_once(up: RawUpstream, tmp_path: Path) -> None:
    with running_gateway(in_front_of(up.url) | {"admin": {"tokens": TOKENS}}, tmp_path) as running:
        history = running.server._app.state.traffic_history
        ask(f"{running.url}/api/x")
        eventually(lambda: len(history.points) > 0, "a point is sampled")
        eventually(lambda: sum(point["requests"] for point in history.points) == 1, "the request is in a point")
        with watching(running) as events:
            sent = events.frame()["points"]
            assert sent[0] == history.points[0]
            assert "points" not in events.frame() or len(history.points) > len(sent)


# Configuration


def test_a_password_in_a_url_is_not_shown() -> None:
    config = GatewayConfig.model_validate({"store": {"url": "redis://me:a-password@store.example/0"}})
    found = settings_of(config, with_defaults=False)
    assert [(one.value, one.secret) for one in found if one.setting == "store.url"] == [(None, True)]
    assert "a-password" not in str(found)


TEXT = """admin: {tokens: {alice: {role: operate, token: TOKEN}}}
server: {port: 0, max_event_loop_lag: null}
tiers:
  free: {rate: RATE, capacity: 70}
upstreams:
  up:
    targets:
      - url: URL
"""


def test_the_settings_in_force_say_where_they_were_set_and_hide_secrets(
    up: RawUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, overrides = tmp_path / "gateway.yaml", {"state_dir": str(tmp_path / "state"), "log": {"access": False}}
    text = TEXT.replace("TOKEN", OPERATOR).replace("URL", up.url)
    file.write_text(text.replace("RATE", "7"))
    monkeypatch.setenv("GATEWAY_TIERS__BASIC__RATE", "9")

    def read() -> GatewayConfig:
        return load_config(file, overrides)

    running = RunningGateway(read(), tmp_path, read=read)
    try:

        def view(query: str = "") -> Any:
            return ask(f"{running.url}/configuration{query}", headers=bearer(OPERATOR))

        answer = view()
        assert OPERATOR not in answer.body.decode()
        settings = {one["setting"]: one for one in answer.json()["settings"]}
        assert settings["tiers.FREE.rate"]["value"] == 7
        assert settings["tiers.FREE.rate"]["origin"] == f"{file}:4"
        assert settings["tiers.BASIC.rate"]["origin"] == "environment GATEWAY_TIERS__BASIC__RATE"
        assert settings["upstreams.up.targets[0].url"]["origin"] == f"{file}:8"
        assert settings["log.access"]["origin"] == "command line"
        assert settings["admin.tokens.alice.token"] | {"setting": ""} == {
            "setting": "",
            "value": None,
            "secret": True,
            "default": False,
            "origin": f"{file}:1",
        }
        assert "server.host" not in settings
        every = {one["setting"]: one for one in view("?defaults=true").json()["settings"]}
        assert every["server.host"]["default"] is True
        assert every["server.host"]["origin"] is None
        assert len(every) > 3 * len(settings)

        file.write_text(text.replace("RATE", "8"))
        assert ask(f"{running.url}/reload", method="POST", headers=bearer(OPERATOR)).status == 200
        file.write_text("upstreams: 7")
        assert ask(f"{running.url}/reload", method="POST", headers=bearer(OPERATOR)).status == 422
        after = view().json()
        assert {one["setting"]: one["value"] for one in after["settings"]}["tiers.FREE.rate"] == 8
        failed, applied = after["reloads"]
        assert (failed["result"], failed["errors"]) == ("invalid", after["errors"])
        assert applied["origin"] == "POST /reload by token 'alice', from 127.0.0.1"
        assert [(one["setting"], one["old"], one["new"]) for one in applied["changes"]] == [
            ("tiers.FREE.rate", 7.0, 8.0)
        ]
    finally:
        running.stop()
