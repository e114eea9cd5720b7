"""SIGINT while a hook runs: the gateway stops in order, because the servers handle the signal, not Python."""

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.kit import RawUpstream, ask, eventually, free_port, in_front_of, reply
from tests.processes import START, process

HOOK = """
import pathlib, time

class Hook:
    def __init__(self, options):
        self.begun = pathlib.Path(options["begun"])

    def on_request(self, request):
        if request.query == "interrupt":
            raise KeyboardInterrupt
        if request.query == "sleep":
            self.begun.touch()
            time.sleep(1)
"""


@pytest.mark.parametrize("server", ["own", "uvicorn"])
def test_an_interrupt_of_a_hook_is_its_failure_and_sigint_is_none(tmp_path: Path, server: str) -> None:
    up, port, begun = RawUpstream(reply(b"x")), free_port(), tmp_path / "begun"
    (tmp_path / "hook.py").write_text(HOOK)
    section = {"name": "h", "use": f"{tmp_path}/hook.py:Hook", "options": {"begun": str(begun)}}
    file = tmp_path / "gateway.yaml"
    file.write_text(json.dumps(in_front_of(up.url) | {"extensions": [section]}))
    arguments = {
        "own": ["-m", "api_gateway", "--port", str(port), "--config", str(file)],
        "uvicorn": ["-m", "uvicorn", "api_gateway.main:app", "--port", str(port)],
    }
    url = f"http://127.0.0.1:{port}/api/x"
    variables = {"GATEWAY_CONFIG": str(file), "LOOP_WATCH_REPORTS": ""}  # the hook blocks the loop
    with process(*arguments[server], cwd=tmp_path, **variables) as running:
        eventually(lambda: _status(url) == 200 or running.popen.poll() is not None, "it serves", START)
        assert ask(f"{url}?interrupt").json()["reason"] == "extension_failed"
        answers: list[Any] = []
        client = threading.Thread(target=lambda: answers.append(ask(f"{url}?sleep")))
        client.start()
        eventually(begun.exists, "the hook runs", START)
        running.signal(signal.SIGINT)
        code = running.exit_code()
        client.join()
        assert answers[0].status == 200, "the request in progress gets its response"
        assert code == 0, running.errors
    up.close()


def _status(url: str) -> int | None:
    try:
        return ask(url).status
    except OSError:
        return None
