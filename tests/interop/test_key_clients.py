"""API keys as real clients send them: curl, HTTPie and requests."""

import importlib.util
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit import RawUpstream, RunningGateway, in_front_of, reply, running_gateway

pytestmark = pytest.mark.interop

Send = Callable[[str, list[str]], str]  # to a URL, with these arguments; returns the status


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    up = RawUpstream(reply(b"fine"))
    with running_gateway(in_front_of(up.url), tmp_path_factory.mktemp("state")) as gateway:
        yield gateway
    up.close()


@pytest.fixture(scope="module")
def key(running: RunningGateway) -> str:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{running.url}/clients/acme/keys", data=b"{}", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        made: str = json.load(response)["key"]
    return made


def output_of(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL
    ).stdout


def curl(url: str, arguments: list[str]) -> str:
    return output_of(["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *arguments, url])


def httpie(url: str, arguments: list[str]) -> str:
    command = [sys.executable, "-m", "httpie", "--ignore-stdin", "--headers"]
    return output_of([*command, *(one for one in arguments if one.startswith("-") or "://" not in one), url]).split()[
        1
    ]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    "arguments",
    [["-H", "X-API-Key: {}"], ["-H", "Authorization: Bearer {}"], ["--oauth2-bearer", "{}"], ["-u", "{}:"]],
)
def test_curl(running: RunningGateway, key: str, arguments: list[str]) -> None:
    for sent, status in ((key, "200"), (key[:-1] + ("0" if key[-1] != "0" else "1"), "401")):
        assert curl(f"{running.url}/api/x", [one.format(sent) for one in arguments]) == status


@pytest.mark.skipif(importlib.util.find_spec("httpie") is None, reason="needs HTTPie (extra interop)")
@pytest.mark.parametrize("arguments", [["--auth-type=bearer", "--auth={}"], ["--auth={}:"]])
def test_httpie(running: RunningGateway, key: str, arguments: list[str]) -> None:
    for sent, status in ((key, "200"), (key[:-1] + ("0" if key[-1] != "0" else "1"), "401")):
        assert httpie(f"{running.url}/api/x", [one.format(sent) for one in arguments]) == status


@pytest.mark.skipif(importlib.util.find_spec("requests") is None, reason="needs requests (extra interop)")
def test_requests(running: RunningGateway, key: str, tmp_path: Path) -> None:
    """In a process of its own, because the tests do not depend on the library."""
    script = (
        "import requests, sys\n"
        "url, key = sys.argv[1:]\n"
        "with requests.Session() as session:\n"
        "    for options in ({'headers': {'X-API-Key': key}}, {'headers': {'Authorization': f'Bearer {key}'}},"
        " {'auth': (key, '')}):\n"
        "        for _ in range(2):\n"
        "            print(session.get(url, **options).status_code)\n"
    )
    (tmp_path / "client.py").write_text(script)
    told = output_of([sys.executable, str(tmp_path / "client.py"), f"{running.url}/api/x", key])
    assert told.split() == ["200"] * 6
