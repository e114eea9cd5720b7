"""GET /usage and /usage/me: who may see what, in which form, and what is refused."""

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from api_gateway.admin.usage import _cell
from api_gateway.clients.api_keys import digest_of, new_key
from tests.kit import RawUpstream, RunningGateway, ask, in_front_of, reply, running_gateway

TOKEN, READER = "t" * 40, "r" * 40
KEY = new_key(b"k" * 32)
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    up = RawUpstream(reply(b"fine"))
    keys = {"one": {"digest": digest_of(KEY.encode())}}
    sections = in_front_of(up.url) | {
        "admin": {"token": TOKEN, "tokens": {"reader": {"role": "read", "token": READER}}},
        "clients": {"keyed": {"keys": keys}},
        "identity": {"sources": ["api_key", "header", "address"]},
        "usage": {"enabled": True},
    }
    with running_gateway(sections, tmp_path_factory.mktemp("usage")) as running:
        for _ in range(3):
            assert ask(f"{running.url}/api/up", headers={"X-API-Key": KEY}).status == 200
        assert ask(f"{running.url}/api/up", headers={"X-Client-ID": "open"}).status == 200
        assert ask(f"{running.url}/api/up").status == 200
        yield running
    up.close()


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def test_operators_see_all_clients_in_three_forms(gateway: RunningGateway) -> None:
    url = f"{gateway.url}/usage?by=client,day"
    view = ask(url, headers={"Authorization": f"Bearer {READER}"}).json()
    found = {row["client"]: row["requests"] for row in view["rows"]}
    assert (found["keyed"], found["open"], found["address 127.0.0.1"]) == (3, 1, 1)
    assert view["total"]["requests"] == sum(found.values())
    assert {row["day"] for row in view["rows"]} == {today()}
    assert (view["from"], view["to"]) == (f"{today()[:8]}01", today())
    text = ask(url, headers=OPERATOR | {"Accept": "text/csv"})
    assert text.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    rows = list(csv.DictReader(io.StringIO(text.body.decode())))
    assert {row["client"]: int(row["requests"]) for row in rows} == found
    lines = ask(f"{url}&format=jsonl", headers=OPERATOR).body.decode().splitlines()
    assert [json.loads(line) for line in lines] == view["rows"]
    statement = ask(f"{gateway.url}/usage?month={today()[:7]}&by=route&client=keyed", headers=OPERATOR).json()
    assert [(row["route"], row["requests"], row["tokens"]) for row in statement["rows"]] == [("all", 3, 3)]
    assert statement["total"]["requests"] == 3 < view["total"]["requests"], "of the client alone"
    assert ask(f"{gateway.url}/usage?month=1999-02&by=", headers=OPERATOR).json()["total"]["requests"] == 0
    last = ask(f"{gateway.url}/usage?month=9999-12&by=", headers=OPERATOR).json()
    assert (last["from"], last["to"]) == ("9999-12-01", "9999-12-31")


FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "'quoted", "''", '=HYPERLINK("http://x","y")', "a=b", "=a,b;c")


def test_no_id_is_a_formula_in_a_spreadsheet_and_all_are_read_again(tmp_path: Path) -> None:
    """The stated rule gives every id back: one ' at the beginning is removed."""
    up = RawUpstream(reply(b"fine"))
    sections = in_front_of(up.url) | {"usage": {"enabled": True}, "admin": {"token": TOKEN}}
    with running_gateway(sections, tmp_path) as running:
        for client in FORMULAS:
            assert ask(f"{running.url}/api/up", headers={"X-Client-ID": client}).status == 200
        text = ask(f"{running.url}/usage?by=client&format=csv", headers=OPERATOR).body.decode()
        lines = ask(f"{running.url}/usage?by=client&format=jsonl", headers=OPERATOR).body.decode().splitlines()
    up.close()
    cells = [row["client"] for row in csv.DictReader(io.StringIO(text))]
    assert not any(cell[:1] in {"=", "+", "-", "@", "\t", "\r"} for cell in cells)
    assert sorted(cell.removeprefix("'") for cell in cells) == sorted(FORMULAS)
    assert sorted(json.loads(line)["client"] for line in lines) == sorted(FORMULAS)
    assert [_cell(text) for text in ("\t=1", "\r1", "a", "")] == ["'\t=1", "'\r1", "a", ""]


def test_a_client_sees_its_own_usage_as_it_is_identified(gateway: RunningGateway) -> None:
    url = f"{gateway.url}/usage/me"
    view = ask(url, headers={"X-API-Key": KEY}).json()
    assert (view["client"], view["total"]["requests"]) == ("keyed", 3)
    assert [(row["route"], row["day"]) for row in view["rows"]] == [("all", today())]
    assert ask(url, headers={"X-Client-ID": "open"}).json()["client"] == "open"
    assert ask(url).json()["client"] == "address 127.0.0.1"
    assert ask(f"{url}?client=keyed").status == 422, "it has no such parameter"
    forged = ask(url, headers={"X-Client-ID": "127.0.0.1"}).json()
    assert (forged["client"], forged["total"]["requests"]) == ("127.0.0.1", 0)


def test_what_is_not_a_clients_own_is_refused(gateway: RunningGateway) -> None:
    me = f"{gateway.url}/usage/me"
    for headers in ({"X-API-Key": new_key(b"x" * 32)}, {"X-Client-ID": "keyed"}):
        assert ask(me, headers=headers).status == 401, "a wrong key; an id that needs its key"
    assert ask(me, headers={"X-API-Key": KEY, "Origin": "https://elsewhere.example"}).status == 403
    assert ask(f"{gateway.url}/usage", headers={"X-API-Key": KEY}).status == 401
    assert ask(me, method="POST", body=b"{}", headers={"Content-Type": "application/json"}).status == 405


@pytest.mark.parametrize(
    ("query", "cause"),
    [
        ("by=color", "by: must be some of client, route, day, each once, got 'color'"),
        ("by=day,day", "each once"),
        ("month=2026-13", "month"),
        ("month=0000-01", "month"),
        ("month=%D9%A2%D9%A0%D9%A2%D9%A6-01", "month"),  # digits, but not of ASCII
        ("month=2026-01&from=2026-01-01", "month: cannot be combined"),
        ("from=2026-02-02&to=2026-02-01", "from: must not be after to"),
        ("from=yesterday", "from"),
        ("by=client&limit=1", "more than 1 rows"),
        ("format=xml", "format"),
    ],
)
def test_a_wrong_question_names_the_parameter(gateway: RunningGateway, query: str, cause: str) -> None:
    answer = ask(f"{gateway.url}/usage?{query}", headers=OPERATOR)
    assert answer.status == 422
    assert cause in answer.json()["detail"]


def test_without_counting_there_is_no_usage(tmp_path: Path) -> None:
    with running_gateway(in_front_of("http://127.0.0.1:9"), tmp_path) as running:
        for path in ("/usage", "/usage/me"):
            answer = ask(running.url + path)
            assert answer.status == 404
            assert "usage.enabled is false" in answer.json()["detail"]
