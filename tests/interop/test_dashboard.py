"""The dashboard in a real Chromium: every page and button, many upstreams and clients, failures, and accessibility."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from api_gateway.config import GatewayConfig, load_config
from tests.kit import RawUpstream, RunningGateway, ask, eventually, reply

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPERATOR, READER = "correct-horse-battery-staple", "correct-horse-battery-reader"
PAGES = ("#/", "#/upstreams/flaky", "#/clients/keyed", "#/explain", "#/configuration")
HOSTILE = "<img/src=x/onerror=document.title='owned'>"
SOON = 20_000  # milliseconds
NARROW = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if executable is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs Chromium on the PATH, and the package playwright (extra interop)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


class Site:
    """A gateway with a configuration file, and two upstreams."""

    def __init__(self, folder: Path) -> None:
        self.users, self.orders = RawUpstream(), RawUpstream()
        self.flaky = RawUpstream(reply(status=b"503 Service Unavailable"))
        self.file, self.folder = folder / "gateway.yaml", folder
        self.write(self.sections())
        self.gateway = RunningGateway(self.read(), folder, read=self.read)

    def sections(self, **more: Any) -> dict[str, Any]:
        breaker = {"failure_threshold": 3, "recovery_timeout": 600}
        return {
            "server": {"port": 0, "max_event_loop_lag": None},
            "admin": {
                "tokens": {"alice": {"role": "operate", "token": OPERATOR}, "bob": {"role": "read", "token": READER}}
            },
            "identity": {"sources": ["api_key", "header", "address"]},
            "tiers": {"FREE": {"rate": 1, "capacity": 20}},
            "limits": [{"name": "monthly", "key": "client", "quota": 1000, "period": "month"}],
            "upstreams": {
                "users": {"targets": [{"url": self.users.url}], "circuit_breaker": breaker},
                "orders": {"targets": [{"url": self.users.url}, {"url": self.orders.url}]},
                "flaky": {
                    "targets": [{"url": self.flaky.url}],
                    "circuit_breaker": {"failure_threshold": 2, "recovery_timeout": 0.2},
                },
            },
            **more,
        }

    def write(self, sections: dict[str, Any]) -> None:
        self.file.write_text(json.dumps(sections))

    def read(self) -> GatewayConfig:
        return load_config(self.file, {"state_dir": str(self.folder / "state"), "log": {"access": False}})

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> Any:
        fields = {"Authorization": f"Bearer {OPERATOR}", "Content-Type": "application/json"}
        content = None if body is None else json.dumps(body).encode()
        return ask(
            self.gateway.url + path,
            method=method,
            headers=(fields if not path.startswith("/api") else {}) | headers,
            body=content,
        )

    def close(self) -> None:
        self.gateway.stop()
        self.users.close()
        self.orders.close()
        self.flaky.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("dashboard"))
    for _ in range(30):
        found.ask("/api/users/1", **{"X-Client-ID": "acme"})
    yield found
    found.close()


@pytest.fixture(scope="module")
def filled(site: Site) -> str:
    """Give each page what it can show; return the id of a request that limits refused."""
    site.ask("/clients/keyed/keys", "POST", {"label": "ci", "expires_in_seconds": 3600})
    site.ask("/clients/keyed/grants", "POST", {"tier": "BASIC", "duration_seconds": 3600})
    site.ask("/circuit-breakers/orders", "POST", {"mode": "observe", "comment": "why", "duration_seconds": 3600})
    site.write(site.sections(default_tier="BASIC"))
    site.ask("/reload", "POST")
    site.write(site.sections())
    site.ask("/reload", "POST")

    def is_opened_twice() -> bool:
        site.ask("/api/flaky/1", **{"X-Client-ID": f"caller-{time.monotonic_ns()}"})
        history = site.ask("/circuit-breakers/flaky/history").json()["history"]
        return sum(bool(one["last_failures"]) for one in history) > 1

    eventually(is_opened_twice, "two transitions of a breaker have failed calls before them", 60)
    refused = [site.ask("/api/orders/1", **{"X-Client-ID": "gamma"}) for _ in range(25)][-1]
    assert refused.status == 429
    return str(refused.headers["x-request-id"])


@contextmanager
def opened(browser: Any, url: str, token: str | None = OPERATOR, **options: Any) -> Iterator[Any]:
    """Open a page, and fail if it has an error, an unhandled rejection or a violation of its policy."""
    context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(SOON)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console", lambda message: faults.append(message.text) if "Content Security Policy" in message.text else None
    )
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((url.partition("/dashboard")[0].partition("/docs")[0], "data:"))
            else faults.append(f"request to {request.url}")
        ),
    )
    if token is not None:
        page.add_init_script(f"sessionStorage.setItem('gateway-operator-token', {token!r})")
    page.goto(url)
    try:
        yield page
        assert not faults
    finally:
        context.close()


@contextmanager
def dashboard(browser: Any, site: Site, page: str = "#/", **options: Any) -> Iterator[Any]:
    with opened(browser, f"{site.gateway.url}/dashboard{page}", **options) as found:
        if options.get("token", OPERATOR) is not None:
            live(found)
        yield found


def live(page: Any) -> None:
    page.locator('#connection[data-state="live"]').wait_for()


def confirm(
    page: Any,
    button: str,
    fill: dict[str, str] | None = None,
    choose: dict[str, str] | None = None,
    *,
    close: bool = False,
) -> str:
    """Press a button, fill its dialog, confirm it; return the command that the dialog has shown."""
    page.get_by_role("button", name=button, exact=True).first.click()
    dialog = page.get_by_role("dialog")
    for label, text in (fill or {}).items():
        dialog.get_by_label(label).fill(text)
    for label, value in (choose or {}).items():
        dialog.get_by_label(label).select_option(value)
    command: str = dialog.locator("code").first.inner_text()
    dialog.get_by_role("button", name=button, exact=True).click()
    if close:
        dialog.get_by_role("button", name="Close").click()
    dialog.wait_for(state="detached")
    return command


def unfold(page: Any, path: str) -> None:
    """Have a page show all it can: what its forms ask for, and what its disclosures hide."""
    if path.startswith("#/explain"):
        page.locator(".steps h3", has_text="Response").wait_for()
        page.get_by_label("Path and query").fill("/api/orders/1")
        page.get_by_label("Client id").fill("gamma")
        page.get_by_role("button", name="Explain", exact=True).click()
        page.locator(".steps h3", has_text="Result").wait_for()
    elif path.startswith("#/upstreams"):
        page.locator(".transitions details").nth(1).wait_for()
    elif path.startswith("#/clients"):
        page.get_by_role("region", name="API keys").wait_for()
    elif path == "#/configuration":
        page.get_by_label("with defaults").check()
        page.locator("tr.default").first.wait_for()
        page.locator(".change").first.wait_for()
    elif path == "docs":
        for name in ("/limits", "/tiers"):
            operation = page.locator("details[data-text]", has=page.locator(".path").get_by_text(name, exact=True))
            operation.locator("summary").first.click()
            operation.get_by_role("button", name="Send").click()
            page.get_by_role("region", name=f"Response of GET {name}").wait_for()
    until(
        page,
        """(() => {
          const closed = document.querySelectorAll('main details:not([open])');
          for (const one of closed) one.open = true;
          return closed.length === 0;
        })()""",
    )


def until(page: Any, expression: str) -> None:
    """Wait until an expression is true in the page; the driver's own way needs `eval`, which the policy forbids."""
    eventually(lambda: bool(page.evaluate(expression)), expression)


# Pages


def test_without_a_token_the_page_asks_for_one_and_keeps_it_out_of_urls_and_cookies(browser: Any, site: Site) -> None:
    with dashboard(browser, site, token=None) as page:
        sent: list[Any] = []
        page.on("request", lambda request: sent.append(request))  # noqa: PLW0108 - the driver asks for a function
        page.get_by_role("dialog").get_by_label("Token").fill("not-the-right-token")
        page.keyboard.press("Enter")
        page.get_by_role("dialog").get_by_text("The bearer token is not valid.").wait_for()
        assert page.locator("#connection").inner_text() == "Not authorised: The bearer token is not valid."
        page.get_by_role("dialog").get_by_label("Token").fill(READER)
        page.keyboard.press("Enter")
        live(page)
        assert page.locator("#operator").inner_text() == "bob (read)"
        page.reload()
        live(page)
        page.locator("#operator").click()
        page.get_by_role("dialog").get_by_role("button", name="Remove").click()
        page.get_by_role("dialog").get_by_label("Token").wait_for()
        assert page.get_by_role("button", name="Remove").count() == 0
        assert page.evaluate("Object.keys(sessionStorage)") == []
        assert sent
        assert not [one.url for one in sent if READER in one.url]
        assert page.context.cookies() == []
        assert page.evaluate("Object.keys(localStorage)") == []


def test_the_overview_shows_figures_charts_and_what_is_wrong(browser: Any, site: Site) -> None:
    history = site.gateway.server._app.state.traffic_history
    eventually(lambda: len(history.points) > 1, "two points are sampled", 60)
    with dashboard(browser, site) as page:
        page.get_by_role("heading", name="What is wrong now").wait_for()
        assert page.locator(".figures dt").all_inner_texts() == [
            "Requests",
            "Refused",
            "Errors",
            "p50",
            "p90",
            "p99",
            "In flight",
        ]
        assert page.locator(".chart canvas").count() == 2
        page.get_by_text("FREE").first.wait_for()
        page.get_by_text("rate_limited").first.wait_for()
        page.get_by_text("As a table").first.click()
        assert page.locator("details.table tbody tr").count() > 0


def test_an_upstream_that_fails_is_seen_while_the_page_is_open(browser: Any, site: Site) -> None:
    with dashboard(browser, site) as page:
        page.get_by_text("The breaker of 'users' is open").wait_for(state="detached")
        site.users.behave = reply(status=b"503 Service Unavailable")
        for number in range(6):
            site.ask(f"/api/users/{number}", **{"X-Client-ID": f"other-{number}"})
        page.get_by_role("link", name=re.compile("The breaker of 'users' is open")).click()
        page.locator(".machine .now", has_text="Open").wait_for()
        page.get_by_text("3 calls that failed before").click()
        page.get_by_text("status 503").last.wait_for()
        assert "threshold reached" in page.locator(".machine .label.last").text_content()
        site.users.behave = reply()


def test_a_breaker_is_forced_with_confirmation_and_expiry_and_returned(browser: Any, site: Site) -> None:
    clipboard = ["clipboard-read", "clipboard-write"]
    with dashboard(browser, site, "#/upstreams/orders", permissions=clipboard) as page:
        command = confirm(
            page, "Force open", {"Comment, for other operators": "the disk's full"}, {"For how long": "3600"}
        )
        assert "curl -X POST" in command
        assert "/circuit-breakers/orders'" in command
        assert '"duration_seconds":3600' in command
        assert "'\\''" in command, "the quote is quoted"
        assert OPERATOR not in command
        shown, copy = page.locator(".curl").last, page.locator(".curl button").last
        page.get_by_text("As curl").last.click()
        copy.click()
        shown.get_by_text("Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == shown.locator("code").inner_text()
        shown.get_by_role("button", name="Copy").wait_for()
        page.evaluate("void (navigator.clipboard.writeText = () => Promise.reject(new Error('denied')))")
        copy.click()
        shown.get_by_text("Selected").wait_for()
        assert page.evaluate("getSelection().toString()") == shown.locator("code").inner_text()
        page.get_by_text(re.compile(r"token 'alice'.*until .*\(1 h left\): the disk's full|60 min left")).wait_for()
        page.locator(".list .badge", has_text="forced open").wait_for()
        assert site.ask("/circuit-breakers").json()["circuit_breakers"]["orders"]["mode"] == "forced_open"
        for button, mode in (("Force closed", "forced_closed"), ("Observe", "observe"), ("Return to auto", "auto")):
            confirm(page, button)
            assert site.ask("/circuit-breakers").json()["circuit_breakers"]["orders"]["mode"] == mode
        page.locator("header .tag", has_text="mode: auto").wait_for()


def of_a_share(route: Any) -> None:
    """Have the state of a client be that of the share of one of two processes."""
    response = route.fetch()
    view = response.json()
    view["bucket"] |= {"tokens": view["bucket"]["capacity"], "reset_after_seconds": 0, "processes": 2}
    view["concurrency"] = [{"limit": "few", "route": None, "in_flight": 1, "concurrent": 2, "processes": 2}]
    route.fulfill(response=response, json=view)


def test_a_client_is_found_changed_and_its_limits_drain_and_refill(browser: Any, site: Site) -> None:
    with dashboard(browser, site, "#/clients") as page:
        page.get_by_role("link", name="acme").click()
        meter = page.get_by_role("meter").first
        meter.wait_for()
        assert "/clients/acme/tier" in confirm(page, "Set tier", choose={"Tier": "PREMIUM"})
        page.get_by_text("PREMIUM: 20 tokens a second").wait_for()
        confirm(page, "Fill the limits")
        until(page, "document.querySelector('[role=meter]').getAttribute('aria-valuenow') === '200'")
        for _ in range(40):
            site.ask("/api/orders/1", **{"X-Client-ID": "acme"})
        until(page, "Number(document.querySelector('[role=meter]').getAttribute('aria-valuenow')) < 190")
        until(page, "document.querySelector('[role=meter]').getAttribute('aria-valuenow') === '200'")
        page.route("**/clients/acme", of_a_share)
        for words in ("full (the store is unavailable: the share of one of 2 processes)", "requests in flight (the"):
            page.locator(".bucket", has_text=words).wait_for()
        page.unroute("**/clients/acme")
        confirm(page, "Grant a tier", choose={"Tier": "ENTERPRISE", "For how long": "86400"})
        page.get_by_text(re.compile("ENTERPRISE until .* then PREMIUM")).wait_for()
        confirm(page, "End the grant")
        page.get_by_text(re.compile("ENTERPRISE until")).wait_for(state="detached")
        page.get_by_role("button", name="Create a key").click()
        page.get_by_role("dialog").get_by_label("Label").fill("ci <b>")
        page.get_by_role("dialog").get_by_role("button", name="Create a key").click()
        page.locator("dialog pre", has_text="agw_").wait_for()
        page.get_by_role("button", name="Close").click()
        page.get_by_text("ci <b>").wait_for()
        confirm(page, "Rotate", close=True)
        confirm(page, "Accept the bare id")
        confirm(page, "Require a credential")
        confirm(page, "Accept the bare id")
        confirm(page, "Revoke")
        confirm(page, "Top up", {"Tokens to add": "50"})
        page.get_by_text(re.compile("50 of top-ups")).wait_for()
        confirm(page, "Set carry-over", {"Tokens carried over": "7"})
        page.get_by_text(re.compile("7 carried over")).wait_for()
        confirm(page, "Reset")
        page.get_by_text(re.compile("^0 of 1007 used")).wait_for()
        confirm(page, "Remove the registration")
        page.get_by_text("FREE: 1 tokens a second").wait_for()
        page.get_by_label("Client id").fill("team/a b%")
        page.get_by_role("button", name="Open").click()
        page.get_by_text("visible ASCII").first.wait_for()
        page.get_by_label("Client id").fill("team/a%")
        page.get_by_role("button", name="Open").click()
        page.get_by_role("heading", name="team/a%").wait_for()
        for order, header in (("Most requests", "Limited"), ("Bare ids", "Bare ids"), ("Most limited", "Limited")):
            page.get_by_role("button", name=order).click()
            page.locator(".list th:nth-child(3)", has_text=header).wait_for()
            assert page.get_by_role("button", name=order).get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("name", [".", ".."])
def test_nothing_is_sent_for_a_name_that_a_browser_resolves_as_part_of_the_path(
    browser: Any, site: Site, name: str
) -> None:
    """DELETE /clients/./grants would otherwise change the client `grants`; the command that is shown is right."""
    for other in ("grants", "tier", "keys", "reset"):
        site.ask(f"/clients/{other}/tier", "POST", {"tier": "PREMIUM"})
    eventually(lambda: site.ask("/api/orders/1", **{"X-Client-ID": name}).status == 429, "it is limited, and listed")
    words = "A browser cannot send this request"
    with dashboard(browser, site, "#/clients") as page:
        sent: list[tuple[str, str]] = []
        page.get_by_role("link", name=name, exact=True).wait_for()
        page.on("request", lambda request: sent.append((request.method, request.url)))
        page.get_by_role("link", name=name, exact=True).click()
        page.get_by_role("heading", name=name, exact=True).wait_for()
        page.get_by_text(words).first.wait_for()
        for button in ("Set tier", "Grant a tier", "Fill the limits", "Remove the registration"):
            page.get_by_role("button", name=button, exact=True).click()
            dialog = page.get_by_role("dialog")
            dialog.get_by_text(words).wait_for()
            assert dialog.get_by_role("button", name=button, exact=True).is_disabled()
            command = dialog.locator("code").first.inner_text()
            assert f" --path-as-is '{site.gateway.url}/clients/{name}" in command
            page.keyboard.press("Escape")
            dialog.wait_for(state="detached")
        assert not [one for one in sent if one[0] != "GET" or "?" not in one[1]], "only the list of clients is read"
        page.get_by_role("button", name="Set tier").click()
        command = page.get_by_role("dialog").locator("code").first.inner_text()
        page.keyboard.press("Escape")
        shell = {**os.environ, "TOKEN": OPERATOR}
        answer = subprocess.run(["sh", "-c", command], env=shell, capture_output=True, check=True)
        assert json.loads(answer.stdout)["client_id"] == name
        page.goto(f"{site.gateway.url}/dashboard#/explain/{name}")
        page.get_by_text(words).wait_for()
        page.goto(f"{site.gateway.url}/dashboard#/upstreams/{name}")
        page.get_by_role("heading", name=name, exact=True).wait_for()
        page.get_by_role("button", name="Observe").click()
        page.get_by_role("dialog").get_by_text(words).wait_for()
        page.goto(f"{site.gateway.url}/docs")
        page.locator("summary", has_text="/clients/{client_id}/grants").last.click()
        page.get_by_label("client_id").fill(name)
        sent.clear()
        page.locator("details[open] button", has_text="Send").click()
        page.get_by_text(words).wait_for()
        assert sent == []
    assert [site.ask(f"/clients/{one}").json()["tier"]["name"] for one in ("grants", "tier", "keys", "reset")] == [
        "PREMIUM"
    ] * 4
    for one in ("grants", "tier", "keys", "reset"):
        site.ask(f"/clients/{one}", "DELETE")


def test_the_counts_of_clients_are_those_of_the_chosen_order(browser: Any, site: Site) -> None:
    site.ask("/clients/bare/keys", "POST", {"label": "ci"})
    for _ in range(4):
        assert site.ask("/api/users/1", **{"X-Client-ID": "bare"}).status == 401
    (found,) = [one for one in site.ask("/clients?sort=bare").json()["clients"] if one["client_id"] == "bare"]
    assert (found["bare"], found["limited"]) == (4, 0)
    with dashboard(browser, site, "#/clients") as page:
        page.get_by_role("button", name="Bare ids").click()
        row = page.locator("tr", has=page.get_by_role("link", name="bare", exact=True))
        row.wait_for()
        count, requests, share = row.locator("td.num").all()
        assert page.locator(".list th").all_inner_texts() == ["Client", "Tier", "Bare ids", "Requests", "Share"]
        assert count.inner_text() == "4"
        assert count.get_attribute("title") == f"at most {found['bare_error_bound']} too high"
        wanted = "\u2013" if found["requests"] == 0 else f"{min(4, found['requests']) * 100 // found['requests']}\xa0%"
        assert (requests.inner_text(), share.inner_text()) == (str(found["requests"]), wanted)


def test_a_key_is_created_with_all_its_terms_and_listed_with_them(browser: Any, site: Site) -> None:
    """The command that the dialog shows does the same."""
    with dashboard(browser, site, "#/clients/terms", timezone_id="Asia/Tokyo") as page:
        table = page.get_by_role("region", name="API keys").locator("tbody tr")
        page.get_by_text("The client has no keys.").wait_for()
        page.get_by_role("button", name="Create a key").click()
        dialog = page.get_by_role("dialog")
        assert sent_by(dialog) == {"label": ""}
        dialog.get_by_label("Label").fill("ci")
        dialog.get_by_label("Expires").select_option("2592000")
        assert sent_by(dialog) == {"label": "ci", "expires_in_seconds": 2_592_000}
        dialog.get_by_label("Or at this time").fill("2040-12-01T09:00")
        dialog.get_by_label("Routes").fill(" users, absent ,")
        dialog.get_by_label("Bare id of the client").select_option("accepted")
        asked = {"label": "ci", "expires_at": "2040-12-01T00:00:00.000Z", "verified_only": False}
        assert sent_by(dialog) == {**asked, "routes": ["users", "absent"]}
        axe_finds_nothing(page)
        dialog.get_by_role("button", name="Create a key").click()
        dialog.get_by_text("there is no route 'absent'; the routes are users, orders").wait_for()
        dialog.get_by_label("Routes").fill("users")
        command = dialog.locator("code").first.inner_text()
        dialog.get_by_label("Routes").press("Enter")
        page.locator("dialog pre", has_text="agw_").wait_for()
        page.get_by_role("button", name="Close").click()
        table.first.wait_for()
        shell = {**os.environ, "TOKEN": OPERATOR}
        answer = subprocess.run(["sh", "-c", command], env=shell, capture_output=True, check=True)
        made = json.loads(answer.stdout)
        assert (made["routes"], made["expires_at"], made["verified_only"]) == (
            ["users"],
            "2040-12-01T00:00:00.000+00:00",
            False,
        )
        listed = site.ask("/clients/terms/keys").json()
        assert [one["routes"] for one in listed["keys"]] == [["users"], ["users"]]
        page.reload()
        live(page)
        eventually(lambda: table.count() == 2, "both keys are listed")
        heads = page.get_by_role("region", name="API keys").locator("th").all_inner_texts()
        assert heads[:6] == ["Key", "Label", "Routes", "Created", "Expires", "Last used"]
        cells = table.first.locator("td").all_inner_texts()
        assert cells[1:3] == ["ci", "users"]
        assert re.fullmatch(r"([\d-]{10} )?\d\d:\d\d:\d\d", cells[3])
        assert cells[4:6] == ["2040-12-01 09:00:00", "never"]
        page.get_by_role("button", name="Rotate").first.click()
        dialog.get_by_label("Expires").select_option("7776000")
        assert sent_by(dialog) == {"overlap_seconds": 86_400, "expires_in_seconds": 7_776_000}
        page.keyboard.press("Escape")
    site.ask("/clients/terms", "DELETE")


def test_all_that_is_listed_of_a_key_is_reached_in_360_pixels_and_by_keyboard(browser: Any, site: Site) -> None:
    site.ask("/clients/narrow/keys", "POST", {"label": "a label of several words", "routes": ["users", "orders"]})
    with dashboard(browser, site, "#/clients/narrow", viewport=NARROW) as page:
        table = page.get_by_role("region", name="API keys").locator("tbody tr")
        table.first.wait_for()
        axe_finds_nothing(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for name in ("Created", "Last used"):
            assert page.get_by_role("columnheader", name=name).is_visible()
        page.get_by_role("region", name="API keys").focus()
        for _ in range(40):
            page.keyboard.press("ArrowRight")
        last = table.first.get_by_role("button", name="Revoke")
        eventually(
            lambda: last.bounding_box()["x"] + last.bounding_box()["width"] <= 360, "the last column is reached"
        )
        page.get_by_role("button", name="Create a key").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        axe_finds_nothing(page)
        page.keyboard.press("Escape")
    site.ask("/clients/narrow", "DELETE")


def sent_by(dialog: Any) -> Any:
    """Return the body in the command that a dialog shows."""
    found = re.search(r"-d '(.*)' '", dialog.locator("code").first.inner_text())
    assert found is not None
    return json.loads(found[1])


def axe_finds_nothing(page: Any) -> None:
    if importlib.util.find_spec("axe_playwright_python") is not None:
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(page).response["violations"]
        assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found] == []


def with_every_member(route: Any) -> None:
    """Add to an explanation what depends on several workers, an outage, candidates and extensions."""
    response = route.fetch()
    view = response.json()
    (bucket, *_), slot = view["buckets"], {"key": "k", "in_flight": 1, "concurrent": 2, "allowed": True}
    view["routes_passed_over"] = [{"name": "narrow", "detail": "only for POST"}]
    view["route"] |= {"match": "exact", "host": "a.test", "conditions": ["header x-beta = '1'"]}
    view["extensions"] = [{"extension": "costs", "hook": "cost", "result": "cost: 2.0"}]
    view["candidate"] = bucket | {"policy": "wider", "processes": 2}
    view["candidate_concurrency"] = [slot | {"policy": "more"}]
    view["worker"], view["upstream"]["workers"] = "2", {"1": "CLOSED", "2": "HALF_OPEN"}
    route.fulfill(response=response, json=view)


def test_a_decision_is_explained_and_a_request_looked_up(browser: Any, site: Site) -> None:
    with dashboard(browser, site, "#/explain") as page:
        page.get_by_label("Path and query").fill("/api/orders/7")
        page.get_by_label("Client id").fill("fresh")
        page.get_by_label("Header fields, one on a line").fill("X-Tenant: a:b")
        page.get_by_label("Name in the certificate").fill("subject=CN=jane,O=x")
        page.get_by_label("Organisation of the token").fill("acme")
        page.get_by_label("Claims of the token, one on a line").fill("plan=a=b")
        shown = page.locator(".curl code").last.inner_text()
        assert '"organisation":"acme"' in shown
        assert '"claims":{"plan":"a=b"}' in shown
        assert '"X-Tenant":"a:b"' in shown
        assert '"certificate":{"subject":"CN=jane,O=x"}' in shown
        page.get_by_label("Name in the certificate").fill("")
        page.get_by_role("button", name="Explain", exact=True).click()
        page.locator(".steps h3", has_text="Result").wait_for()
        titles = [re.split(r"\n", text)[0].split(" ")[0] for text in page.locator(".steps h3").all_inner_texts()]
        assert titles == ["Address", "Client", "Route", "Load", "Limit", "Limit", "Upstream", "Result"]
        page.route("**/explain", with_every_member)
        page.get_by_role("button", name="Explain", exact=True).click()
        page.locator(".steps h3", has_text="Candidate wider").wait_for()
        for words in (
            "only for POST",
            "(exact, header x-beta = '1') → upstream ",
            "cost: 2.0",
            "A candidate refuses nothing.",
            "the share of one of 2 processes",
            "1 closed, 2 half-open",
            "Worker 2 has decided this",
        ):
            page.locator(".steps", has_text=words).wait_for()
        page.unroute("**/explain")
        page.get_by_label("Path and query").fill("no-path")
        page.keyboard.press("Enter")
        page.locator(".notice.fail").wait_for()
        page.get_by_label("Request id").fill("0123-unknown")
        page.get_by_role("button", name="Look up").click()
        page.get_by_text("No request with this id is remembered").wait_for()
        assert page.url.endswith("#/explain/0123-unknown")
        spent = [site.ask("/api/orders/1?secret=yes", **{"X-Client-ID": "spender"}) for _ in range(30)][-1]
        assert spent.status == 429
        page.get_by_label("Request id").fill(spent.headers["x-request-id"])
        page.get_by_role("button", name="Look up").click()
        page.locator(".steps h3", has_text="Response").get_by_text("429").wait_for()
        titles = [text.split("\n")[0].split(" ")[0] for text in page.locator(".steps h3").all_inner_texts()]
        assert titles[:4] == ["Request", "Client", "Route", "Limit"]
        assert "secret" not in page.locator("main").inner_text()
        page.get_by_text(re.compile("requests had spent the tokens")).click()
        page.locator(".steps table a").first.click()
        page.locator(".steps h3", has_text="Response").get_by_text("200").wait_for()
        page.locator(".steps h3", has_text="Attempt 1").wait_for()


def test_the_configuration_says_where_values_come_from_and_reloads(browser: Any, site: Site) -> None:
    with dashboard(browser, site, "#/configuration") as page:
        page.get_by_text("tiers.FREE.capacity").wait_for()
        assert OPERATOR not in page.content()
        assert (
            page.locator("tr", has_text="admin.tokens.alice.token").locator("td").nth(1).inner_text()
            == "secret, not shown"
        )
        assert str(site.file) in page.locator("tr", has_text="tiers.FREE.capacity").inner_text()
        page.get_by_label("Filter settings").fill("default_tier")
        page.get_by_text("No setting matches.").wait_for()
        page.get_by_label("with defaults").check()
        page.locator("tr.default", has_text="default_tier").wait_for()
        site.write(site.sections(default_tier="BASIC"))
        page.get_by_role("button", name="Reload").click()
        page.get_by_role("dialog").get_by_role("button", name="Reload").click()
        page.get_by_role("dialog").get_by_text("1 setting changed.").wait_for()
        page.get_by_role("button", name="Close").click()
        page.locator(".transitions", has_text="default_tier").locator("ins", has_text="BASIC").wait_for()
        site.file.write_text("upstreams: 7")
        page.get_by_role("button", name="Reload").click()
        page.get_by_role("dialog").get_by_role("button", name="Reload").click()
        page.locator("dialog .notice.fail").wait_for()
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("The last reload failed; the former configuration is in force.").wait_for()
        site.write(site.sections())
        site.ask("/reload", "POST")
        page.get_by_text("The last reload failed; the former configuration is in force.").wait_for(state="detached")


def test_a_token_that_reads_sees_everything_and_changes_nothing(browser: Any, site: Site) -> None:
    with dashboard(browser, site, "#/upstreams/orders", token=READER) as page:
        page.get_by_role("button", name="Force open").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_text("needs a token with the role operate").wait_for()
        assert dialog.get_by_role("button", name="Force open").is_disabled()
        assert "curl" in dialog.locator("code").inner_text()


def test_the_other_pages(browser: Any, site: Site) -> None:
    with opened(browser, f"{site.gateway.url}/") as page:
        assert page.locator(".pages a").all_inner_texts() == ["Dashboard", "API", "Health", "Readiness", "Metrics"]
        page.get_by_role("link", name="API", exact=True).click()
        page.locator("summary", has_text="/clients/{client_id}/tier").click()
        page.get_by_label("client_id").fill("acme")
        assert "clients/acme/tier" in page.locator("details[open] .curl code").first.inner_text()
        page.locator("details[open] button", has_text="Send").click()
        page.locator("details[open] .response", has_text='"client_id": "acme"').wait_for()
        page.get_by_label("Filter endpoints").fill("explain")
        page.locator("summary", has_text="/clients/{client_id}/tier").wait_for(state="hidden")


# Scale


def test_five_hundred_upstreams_and_ten_thousand_clients(browser: Any, tmp_path: Path) -> None:
    up = RawUpstream()
    upstreams = {
        f"service-{number:03}": {"targets": [{"url": up.url}, {"url": f"http://127.0.0.1:{1 + number}"}]}
        for number in range(500)
    }
    sections = {
        "upstreams": upstreams,
        "admin": {"token": OPERATOR},
        "clients": {f"client-{number:05}": {"tier": "PREMIUM"} for number in range(10_000)},
        "tiers": {"FREE": {"rate": 1, "capacity": 2}},
    }
    gateway = RunningGateway(sections, tmp_path)
    try:
        for number in range(60):
            ask(f"{gateway.url}/api/service-{number:03}/x", headers={"X-Client-ID": f"new-{number % 5}"})
        with opened(browser, f"{gateway.url}/dashboard#/upstreams") as page:
            live(page)
            until(page, "document.querySelectorAll('.list tbody tr').length === 500")
            page.get_by_label("Filter upstreams").fill("service-42")
            until(page, "document.querySelectorAll('.list tbody tr:not([hidden])').length === 10")
            longest = page.evaluate(
                """async () => {
                  let longest = 0, last = performance.now();
                  const end = last + 7000;
                  while (performance.now() < end) {
                    await new Promise((done) => setTimeout(done, 0));
                    longest = Math.max(longest, performance.now() - last);
                    last = performance.now();
                  }
                  return longest;
                }"""
            )
            assert longest < 2000, "frames do not block the page"
            for number in range(7):
                ask(
                    f"{gateway.url}/circuit-breakers/service-{500 - 1 - number}",
                    method="POST",
                    headers={"Authorization": f"Bearer {OPERATOR}", "Content-Type": "application/json"},
                    body=b'{"mode": "observe"}',
                )
            page.goto(f"{gateway.url}/dashboard#/")
            until(page, "document.querySelectorAll('.problems li').length === 5")
            page.get_by_role("button", name=re.compile(r"Show all \d+")).click()
            page.get_by_text("The breaker of 'service-493' only observes").wait_for()
            page.get_by_role("button", name="Show fewer").click()
            until(page, "document.querySelectorAll('.problems li').length === 5")
            page.goto(f"{gateway.url}/dashboard#/clients")
            page.get_by_label("Registered clients of a tier").select_option("PREMIUM")
            until(page, "document.querySelectorAll('.list tbody tr').length >= 100")
            page.get_by_role("button", name="Next page").click()
            page.get_by_role("button", name="First page").wait_for()
            page.get_by_label("Client id").fill("client-09999")
            page.get_by_role("button", name="Open").click()
            page.get_by_text("PREMIUM: 20 tokens a second").wait_for()
            page.get_by_role("button", name="Most limited").click()
            page.get_by_role("link", name="new-0").wait_for()
    finally:
        gateway.stop()
        up.close()


# Connection


class Relay:
    """A relay of TCP connections to a gateway, which can be cut."""

    def __init__(self, port: int) -> None:
        import socket

        self.target, self.is_open, self._sockets = port, True, []  # type: ignore[var-annotated]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._connect: Callable[[], Any] = lambda: socket.create_connection(("127.0.0.1", self.target))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self.is_open:
                client.close()
                continue
            server = self._connect()
            self._sockets += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    @staticmethod
    def _pump(one: Any, other: Any) -> None:
        try:
            while data := one.recv(65_536):
                other.sendall(data)
        except OSError:
            pass
        one.close()
        other.close()

    def cut(self) -> None:
        """End all connections and accept no others."""
        import socket

        self.is_open = False
        for one in self._sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._sockets.clear()

    def close(self) -> None:
        self.cut()
        self._listener.close()


def test_a_lost_connection_is_shown_and_restored(browser: Any, site: Site) -> None:
    relay = Relay(site.gateway.port)
    try:
        with opened(browser, f"http://127.0.0.1:{relay.port}/dashboard") as page:
            live(page)
            relay.cut()
            page.locator('#connection[data-state="lost"]').wait_for()
            assert "Connection lost" in page.locator("#connection").inner_text()
            site.ask("/circuit-breakers/orders", "POST", {"mode": "observe"})
            time.sleep(1)
            relay.is_open = True
            live(page)
            page.get_by_text("The breaker of 'orders' only observes").wait_for()
            site.ask("/circuit-breakers/orders", "POST", {"mode": "auto"})
    finally:
        relay.close()


# Inertness


def test_hostile_names_paths_and_errors_are_inert(browser: Any, site: Site) -> None:
    for _ in range(40):
        site.ask("/api/orders/1", **{"X-Client-ID": HOSTILE})
    with dashboard(browser, site, "#/clients") as page:
        page.get_by_role("link", name=HOSTILE).click()
        page.get_by_role("heading", name=HOSTILE).wait_for()
        site.ask("/circuit-breakers/orders", "POST", {"mode": "observe", "comment": HOSTILE})
        page.goto(f"{site.gateway.url}/dashboard#/upstreams/orders")
        page.locator(".facts", has_text=HOSTILE).wait_for()
        page.goto(f"{site.gateway.url}/dashboard#/upstreams/%1b[31m%0aline%e2%80%ae")
        page.get_by_role("heading", name="\\x1b[31m\\x0aline\\u202e").wait_for()
        page.goto(f"{site.gateway.url}/dashboard#/explain")
        page.get_by_label("Path and query").fill(f"/api/orders/{HOSTILE}")
        page.get_by_label("Client id").fill(HOSTILE)
        page.get_by_role("button", name="Explain", exact=True).click()
        page.locator(".steps", has_text=HOSTILE).wait_for()
        page.goto(f"{site.gateway.url}/dashboard#/upstreams/{HOSTILE.replace('/', '%2F')}")
        page.get_by_role("heading", name=HOSTILE).wait_for()
        page.goto(f"{site.gateway.url}/dashboard#/{HOSTILE}")
        assert page.title().endswith("API Gateway")
        assert page.locator("main img").count() == 0
    site.ask("/circuit-breakers/orders", "POST", {"mode": "auto"})


# Accessibility


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("path", [*PAGES, "docs", "home"])
def test_axe_finds_nothing(browser: Any, site: Site, filled: str, path: str, theme: str) -> None:
    """Each page shows all it can: answers of its forms, and what its disclosures hide."""
    if importlib.util.find_spec("axe_playwright_python") is None:
        pytest.skip("needs the package axe-playwright-python")
    from axe_playwright_python.sync_playwright import Axe

    path = f"{path}/{filled}" if path == "#/explain" else path
    address = {"docs": "/docs", "home": "/"}.get(path, f"/dashboard{path}")
    for size in ({"width": 1300, "height": 900}, NARROW):
        with opened(browser, site.gateway.url + address, color_scheme=theme, viewport=size) as page:
            if path not in ("docs", "home"):
                live(page)
            unfold(page, path)
            page.wait_for_timeout(1500)
            found = [
                (one["id"], [node["target"] for node in one["nodes"]])
                for one in Axe().run(page).response["violations"]
            ]
            assert found == []
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            if path.startswith("#/upstreams"):
                page.get_by_role("button", name="Force open").click()
                assert Axe().run(page).response["violations"] == []


@pytest.mark.parametrize("path", [*PAGES, "#/upstreams", "#/clients", "docs", "home"])
def test_nothing_is_wider_than_360_pixels(browser: Any, site: Site, path: str) -> None:
    address = {"docs": "/docs", "home": "/"}.get(path, f"/dashboard{path}")
    with opened(browser, site.gateway.url + address, viewport=NARROW) as page:
        page.wait_for_timeout(2500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        if path == "docs":
            page.locator("summary", has_text="/clients/{client_id}/tier").click()
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for link in page.locator("nav a").all():
            box = link.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 361, "every page can be reached"


def test_everything_works_by_keyboard(browser: Any, site: Site) -> None:
    with dashboard(browser, site) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.evaluate("document.querySelector('.brand').focus()")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Upstreams"
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Upstreams").wait_for()
        page.get_by_role("heading", name="Circuit breaker").wait_for()
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent") == "Observe":
                break
        page.keyboard.press("Enter")
        page.get_by_role("dialog").wait_for()
        assert page.evaluate("document.activeElement.closest('dialog') !== null")
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.type") == "submit":
                break
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", (
            "the focus is visible"
        )
        page.keyboard.press("Escape")
        page.get_by_role("dialog").wait_for(state="detached")
        assert page.evaluate("document.activeElement.textContent") == "Observe", "the focus returns"


KEEP = "window.kept = [...document.querySelectorAll('main a, main button, main summary, main input, main select')]"
LOST = "window.kept.filter((one) => !one.isConnected).map((one) => one.textContent)"


def next_answers(page: Any, *paths: str) -> None:
    """Wait until each of these paths has been read twice more, and what was read is shown."""
    for path in paths * 2:
        with page.expect_response(lambda response, end=path: response.url.endswith(end)):
            pass
    page.wait_for_timeout(200)


def test_the_focus_and_open_disclosures_survive_what_a_page_reads_anew(browser: Any, site: Site) -> None:
    """Controls stay in the page while nothing changes; a changed row gives its focus to the row in its place."""
    made = [site.ask("/clients/held/keys", "POST", {"label": f"key {number}"}).json() for number in range(2)]
    active = "document.activeElement"
    with dashboard(browser, site, "#/clients/held") as page:
        keys = page.get_by_role("region", name="API keys")
        quotas = page.locator(".bucket", has_text="monthly")
        quotas.wait_for()
        for one in page.locator("main details").all():
            one.evaluate("(one) => { one.open = true; }")
        page.evaluate(KEEP)
        row = keys.locator("tr", has_text=made[1]["id"])
        row.get_by_role("button", name="Revoke").focus()
        next_answers(page, "/clients?sort=limited&limit=100", "/quotas")
        assert page.evaluate(LOST) == []
        assert row.get_by_role("button", name="Revoke").evaluate(f"(one) => one === {active}")
        assert page.locator("main details:not([open])").count() == 0

        site.ask(f"/clients/held/keys/{made[1]['id']}/rotate", "POST", {"overlap_seconds": 3600})
        row.get_by_text("replaced").wait_for()
        row.get_by_role("button", name="Revoke").wait_for()
        assert page.evaluate(f"{active}.closest('tr').textContent").startswith(made[1]["id"]), "not that of another"
        quotas.get_by_role("button", name="Top up").focus()
        site.ask("/clients/held/quotas/monthly/top-up", "POST", {"amount": 5})
        quotas.get_by_text("5 of top-ups").wait_for()
        assert page.evaluate(f"{active}.textContent") == "Top up"

        confirm(page, "Create a key", close=True)
        eventually(lambda: keys.locator("tbody tr").count() == 4, "the key is listed")
        assert page.evaluate(f"{active}.textContent") == "Create a key"
        confirm(page, "Accept the bare id")
        page.get_by_role("button", name="Require a credential").wait_for()
        assert page.evaluate(f"{active}.textContent") == "Require a credential"
        while keys.is_visible():
            left = keys.locator("tbody tr").count()
            confirm(page, "Revoke")
            eventually(lambda: keys.locator("tbody tr").count() < left or not keys.is_visible(), "it is gone")  # noqa: B023 - it is awaited
            assert page.evaluate(f"{active} !== document.body"), "the focus is somewhere"
        assert page.evaluate(f"{active}.textContent") == "Create a key"


def test_the_focus_stays_on_what_moves_or_gets_another_text(browser: Any, site: Site, filled: str) -> None:
    """A transition that is added closes no disclosure; rows that are sorted anew keep the focus."""
    assert filled, "a breaker has transitions with failed calls"
    active = "document.activeElement"
    with dashboard(browser, site, "#/upstreams/flaky") as page:
        failures = page.locator(".transitions details").last
        failures.locator("summary").click()
        failures.locator("summary").focus()
        site.ask("/circuit-breakers/flaky", "POST", {"mode": "observe"})
        page.evaluate(KEEP)
        before = page.locator(".transitions li").count()

        def is_longer() -> bool:
            site.ask("/api/flaky/1", **{"X-Client-ID": f"caller-{time.monotonic_ns()}"})
            return bool(page.locator(".transitions li").count() > before)

        eventually(is_longer, "a transition was added", 60)
        assert page.evaluate(LOST) == []
        assert failures.evaluate("(one) => one.open")
        assert failures.locator("summary").evaluate(f"(one) => one === {active}")
        page.get_by_role("link", name="users", exact=True).focus()
        site.ask("/circuit-breakers/users", "POST", {"mode": "forced_open"})
        page.locator(".list tbody tr:first-child a", has_text="users").wait_for()
        assert page.evaluate(f"{active}.textContent") == "users", "a row that moves keeps the focus"
        page.goto(f"{site.gateway.url}/dashboard#/")
        page.get_by_role("link", name=re.compile("forced the breaker of 'users' open")).focus()
        site.ask("/circuit-breakers/flaky", "POST", {"mode": "auto"})
        page.get_by_text("The breaker of 'flaky' only observes").wait_for(state="detached")
        assert "'users'" in page.evaluate(f"{active}.textContent")
    site.ask("/circuit-breakers/users", "POST", {"mode": "auto"})


def test_a_page_that_is_not_served_says_why(browser: Any, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_gateway.admin.dashboard.MAX_WATCHERS", 0)
    with opened(browser, f"{site.gateway.url}/dashboard", viewport=NARROW) as page:
        state = page.locator("#connection", has_text="Not connected: 0 pages watch this process already")
        state.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        monkeypatch.undo()
        live(page)
        assert page.locator("#connection").inner_text() == "Live"


def test_the_theme_follows_the_system_and_the_switch(browser: Any, site: Site) -> None:
    def background(page: Any) -> Any:
        return page.evaluate("getComputedStyle(document.body.parentElement).backgroundColor")

    with dashboard(browser, site, color_scheme="dark") as page:
        dark = background(page)
        page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == "Theme: light"
        assert background(page) != dark
        page.reload()
        assert background(page) != dark
        page.locator("#theme").click()
        assert background(page) == dark
