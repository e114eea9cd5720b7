"""The page on the history of requests: its commands run, and its numbers are those of the code."""

import re
import shlex
import subprocess
from pathlib import Path

import yaml

from api_gateway.observability.request_history import MAX_RECORDED_TEXT
from api_gateway.reporting.history_schema import ExplainedRequest, LimitDecided
from api_gateway.settings.history import HistorySection
from tests.kit import RawUpstream, in_front_of, reply, running_gateway

PAGE = (Path(__file__).parents[2] / "docs" / "history.md").read_text()
COMMANDS = re.findall(r"```sh\n(.*?)\n```", PAGE, flags=re.DOTALL)
SHOWN_ID = re.findall(r'"request_id": "(\w+)"', PAGE)[0]


def run(command: str, port: int, request_id: str) -> str:
    """Run a command of the page against a gateway at another port, for another request."""
    changed = command.replace("localhost:8000", f"127.0.0.1:{port}").replace(SHOWN_ID, request_id)
    done = subprocess.run(shlex.split(changed), capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


def test_a_complaint_is_followed_from_the_clients_body_to_the_history(tmp_path: Path) -> None:
    complain, explain, listing = COMMANDS
    up = RawUpstream(reply(b"fine"))
    sections = in_front_of(up.url) | {"tiers": {"FREE": {"rate": 0.001, "capacity": 10}}}
    with running_gateway(sections, tmp_path) as running:
        for _ in range(10):
            assert run(complain, running.port, "") == "fine"
        body = yaml.safe_load(run(complain, running.port, ""))
        shown = yaml.safe_load(re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)[0])
        assert body.keys() >= shown.keys()
        for name in ("status", "reason", "type", "title", "instance"):
            assert body[name] == shown[name]
        form = re.compile(r"[\d.]+")
        assert form.sub("0", body["detail"]) == form.sub("0", shown["detail"])
        (request,) = yaml.safe_load(run(explain, running.port, body["request_id"]))["requests"]
        assert request["request_id"] == body["request_id"]
        free = next(limit for limit in request["limits"] if limit["limit"] == "free")
        assert len(free["spent_by"]["requests"]) == 10
        assert free["spent_by"]["complete"]
        (listed,) = yaml.safe_load(run(listing, running.port, ""))["requests"]
        assert listed["request_id"] == body["request_id"]
    up.close()


def test_the_members_and_numbers_of_the_page_are_those_of_the_code() -> None:
    (settings,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert HistorySection(**yaml.safe_load(settings)["history"]) == HistorySection()
    members = re.findall(r"^\| `([\w.\[\]]+)` \|", PAGE, flags=re.MULTILINE)
    known = {*ExplainedRequest.model_fields, *(f"limits[].{name}" for name in LimitDecided.model_fields)}
    assert set(members) <= known
    assert f"cut after {MAX_RECORDED_TEXT:,} characters" in PAGE
