"""A real browser: what a page of another origin can read of a response of the gateway, and what it may send."""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from api_gateway.proxy.cors import EXPOSED
from tests.kit import RawUpstream, RunningGateway, eventually, in_front_of, reply, running_gateway

pytestmark = pytest.mark.interop

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FETCH = """
async ([url, options]) => {
  try {
    const response = await fetch(url, options);
    const headers = Object.fromEntries(response.headers.entries());
    return {status: response.status, headers, body: await response.text()};
  } catch (error) {
    return {error: String(error)};
  }
}
"""


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


class Page:
    """A page of an origin of its own, in the browser."""

    def __init__(self, browser: Any, site: RawUpstream) -> None:
        self.origin = site.url
        self._page = browser.new_page()
        self._page.goto(f"{site.url}/")

    def fetch(self, url: str, **options: Any) -> Any:
        """Return status, headers and body of a response as scripts of the page see them, or the error."""
        return self._page.evaluate(FETCH, [url, options])

    def close(self) -> None:
        """Close the page."""
        self._page.close()


@contextmanager
def opened(browser: Any) -> Iterator[Page]:
    """Open a page of another origin."""
    site = RawUpstream(reply(b"<!doctype html><title>page</title>", headers=((b"Content-Type", b"text/html"),)))
    page = Page(browser, site)
    try:
        yield page
    finally:
        page.close()
        site.close()


def limited(upstream: RawUpstream, cors: dict[str, Any] | None) -> dict[str, Any]:
    """Return the sections of a gateway whose client `tiny` has two tokens."""
    sections = in_front_of(upstream.url, circuit_breaker={"minimum_calls": 1000})
    sections["tiers"]["TINY"] = {"rate": 0.01, "capacity": 2}
    return sections | {"clients": {"tiny": {"tier": "TINY"}}, "cors": cors}


@contextmanager
def served(tmp_path: Path, upstream: RawUpstream, cors: dict[str, Any] | None) -> Iterator[RunningGateway]:
    with running_gateway(limited(upstream, cors), tmp_path) as running:
        yield running


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    found = RawUpstream()
    yield found
    found.close()


def test_a_page_reads_when_to_retry_and_what_remains(browser: Any, upstream: RawUpstream, tmp_path: Path) -> None:
    """The field of the client id makes the browser ask first, which costs no token."""
    with opened(browser) as page, served(tmp_path, upstream, {"origins": [page.origin]}) as running:
        answers = [page.fetch(f"{running.url}/api/x", headers={"X-Client-ID": "tiny"}) for _ in range(3)]
        assert [answer["status"] for answer in answers] == [200, 200, 429]
        remaining = [answer["headers"]["x-ratelimit-remaining"] for answer in answers]
        assert remaining == ["1", "0", "0"]
        refused = answers[-1]["headers"]
        assert 1 <= int(refused["retry-after"]) <= 100
        assert refused["ratelimit"].startswith('"tiny";r=0;t=')
        assert refused["ratelimit-policy"].startswith('"tiny";q=2')
        assert refused["x-request-id"]
        assert '"reason": "rate_limited"' in answers[-1]["body"]
        assert [request.line.split()[0] for request in upstream.requests] == [b"GET", b"GET"]


def test_a_page_reads_failures_of_the_upstream(browser: Any, upstream: RawUpstream, tmp_path: Path) -> None:
    upstream.behave = lambda _wire, _request: False
    with opened(browser) as page, served(tmp_path, upstream, {"origins": [page.origin]}) as running:
        answer = page.fetch(f"{running.url}/api/x", method="POST", body="x")
        assert answer["status"] == 502
        assert '"reason": "upstream_reset"' in answer["body"]


def test_a_page_sends_what_the_policy_allows_and_nothing_else(
    browser: Any, upstream: RawUpstream, tmp_path: Path
) -> None:
    with opened(browser) as page:
        cors = {"origins": [page.origin], "methods": ["PUT"], "headers": ["X-Client-ID"], "max_age": 0}
        with served(tmp_path, upstream, cors) as running:
            url = f"{running.url}/api/x"
            assert page.fetch(url, method="PUT", headers={"X-Client-ID": "one"})["status"] == 200
            assert "error" in page.fetch(url, method="DELETE")
            assert "error" in page.fetch(url, headers={"X-Other": "1"})
            assert [request.line.split()[0] for request in upstream.requests] == [b"PUT"]


def test_a_page_with_credentials_reads_the_response(browser: Any, upstream: RawUpstream, tmp_path: Path) -> None:
    with opened(browser) as page:
        cors = {"origins": [page.origin], "credentials": True}
        with served(tmp_path, upstream, cors) as running:
            answer = page.fetch(f"{running.url}/api/x", credentials="include")
            assert answer["status"] == 200
            assert set(map(str.lower, EXPOSED)) >= set(answer["headers"]) & {"ratelimit", "x-request-id"} != set()


@pytest.mark.parametrize("cors", [None, {"origins": ["https://other.example"]}])
def test_a_page_of_another_origin_reads_nothing(
    browser: Any, upstream: RawUpstream, tmp_path: Path, cors: dict[str, Any] | None
) -> None:
    with opened(browser) as page, served(tmp_path, upstream, cors) as running:
        assert "Failed to fetch" in page.fetch(f"{running.url}/api/x")["error"]
        eventually(lambda: len(upstream.requests) == 1, "the simple request arrives")
        assert "Failed to fetch" in page.fetch(f"{running.url}/api/x", headers={"X-Client-ID": "tiny"})["error"]


def test_no_image_in_the_cache_of_the_browser_hides_the_response(
    browser: Any, upstream: RawUpstream, tmp_path: Path
) -> None:
    """A request without `Origin` fills the cache; `Vary` makes the browser ask again for a page's script."""
    upstream.behave = reply(headers=((b"Cache-Control", b"max-age=600"),))
    with opened(browser) as page, served(tmp_path, upstream, {"origins": [page.origin]}) as running:
        url = f"{running.url}/api/x"
        assert page.fetch(url, mode="no-cors")["status"] == 0  # opaque
        assert page.fetch(url)["status"] == 200
