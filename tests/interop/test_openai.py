"""The `openai` client streams through the gateway from a fake of its API, and is cancelled at random.

What the gateway has charged agrees with what the fake has counted, request by request.
"""

import importlib.util
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from api_gateway.models import Exchange
from tests.kit import RawRequest, RawUpstream, RunningGateway, Wire, ask, eventually, running_gateway

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="needs openai (extra interop)"),
]

PAGE = (Path(__file__).parents[2] / "docs" / "costs.md").read_text()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
COMMON = {"id": "chatcmpl-1", "created": 1, "model": "small"}
CAPACITY = 10_000
OTHERWISE = 3.0
HOLD = "hold"  # a prompt after whose first words the fake sends nothing more


def send_chunk(wire: Wire, body: bytes) -> None:
    wire.send(b"%x\r\n%b\r\n" % (len(body), body))


def event(**members: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps({**COMMON, "object": "chat.completion.chunk", **members}).encode()


class FakeApi:
    """Responds to chat completions. `used` are the tokens of each request that it has completed."""

    def __init__(self) -> None:
        self.used: list[int] = []
        self._source = random.Random(16)
        self.upstream = RawUpstream(self._respond)

    def _respond(self, wire: Wire, request: RawRequest) -> bool | None:
        asked = json.loads(request.body)
        tokens = self._source.randrange(1, 9000)
        usage = {"prompt_tokens": 1, "completion_tokens": tokens - 1, "total_tokens": tokens}
        if not asked.get("stream"):
            self.used.append(tokens)
            message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": 'Hi "}'}}
            body = json.dumps({**COMMON, "object": "chat.completion", "choices": [message], "usage": usage}).encode()
            wire.send(HEAD % b"application/json")
            for at in range(0, len(body), 50):
                send_chunk(wire, body[at : at + 50])
            wire.send(b"0\r\n\r\n")
            return None
        wire.send(HEAD % b"text/event-stream; charset=utf-8")
        for word in range(5):
            delta = {"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}
            send_chunk(wire, event(choices=[delta], usage=None))
        if asked["messages"][0]["content"] == HOLD:
            wire.read_until(b"never")  # until the gateway closes the connection
            return False
        self.used.append(tokens)
        last = event(choices=[], usage=usage)
        send_chunk(wire, last[:40])
        time.sleep(0.005)
        send_chunk(wire, last[40:])
        send_chunk(wire, b"data: [DONE]\n\n")
        wire.send(b"0\r\n\r\n")
        return None


@pytest.fixture
def fake() -> Iterator[FakeApi]:
    api = FakeApi()
    yield api
    api.upstream.close()


def configuration(fake: FakeApi) -> dict[str, Any]:
    """Return the recipe of the page, with a capacity for the whole test and another cost of broken streams."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    config: dict[str, Any] = yaml.safe_load(text)
    config["upstreams"]["llm"]["targets"] = [{"url": fake.upstream.url}]
    config["tiers"]["FREE"] = {"rate": 0.001, "capacity": CAPACITY}
    config["routes"][0]["cost_from"]["otherwise"] = OTHERWISE
    return config


def recorded(running: RunningGateway) -> list[Exchange]:
    """Return a list of the exchanges that are recorded from now on."""
    done: list[Exchange] = []
    app: Any = running.server._app
    record = app.fast_path.current.record
    record._observers = (*record._observers, done.append)
    return done


def test_what_is_charged_is_what_was_used_whoever_leaves(fake: FakeApi, tmp_path: Path) -> None:
    from openai import OpenAI

    source = random.Random(4)
    with running_gateway(configuration(fake), tmp_path) as running:
        done = recorded(running)
        client = OpenAI(
            base_url=f"{running.url}/api/v1", api_key="unused", max_retries=0, default_headers={"X-Client-ID": "acme"}
        )
        expected: list[float] = []
        for _ in range(40):
            kind = source.choice(("whole", "stream", "cancelled"))
            messages: Any = [{"role": "user", "content": HOLD if kind == "cancelled" else "Hello"}]
            if kind == "whole":
                answer = client.chat.completions.create(model="small", messages=messages)
                assert answer.usage is not None
                assert answer.usage.total_tokens == fake.used[-1]
                expected.append(fake.used[-1] / 1000)
                continue
            stream = client.chat.completions.create(
                model="small", messages=messages, stream=True, stream_options={"include_usage": True}
            )
            if kind == "stream":
                assert [chunk.usage.total_tokens for chunk in stream if chunk.usage] == fake.used[-1:]
                expected.append(fake.used[-1] / 1000)
            else:
                for _, _chunk in zip(range(source.randrange(0, 5)), stream, strict=False):
                    pass
                stream.close()
                expected.append(OTHERWISE)
        client.close()
        eventually(lambda: len(done) == len(expected), "all are recorded")
        assert sorted(one.cost for one in done) == sorted(expected)
        left = ask(f"{running.url}/clients/acme").json()["bucket"]["tokens"]
        assert left == pytest.approx(CAPACITY - sum(expected), abs=0.5)
        completed = [cost for cost in expected if cost != OTHERWISE]
        assert sum(completed) == pytest.approx(sum(fake.used) / 1000)
        assert 5 < len(completed) < len(expected)


def test_the_program_of_the_page_is_charged(fake: FakeApi, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    with running_gateway(configuration(fake), tmp_path) as running:
        done = recorded(running)
        names: dict[str, Any] = {}
        exec(program.replace("http://127.0.0.1:8000", running.url), names)  # noqa: S102 - our own page
        assert "".join(one.choices[0].delta.content for one in names["stream"] if one.choices) == "0 1 2 3 4 "
        names["client"].close()
        eventually(lambda: len(done) == 1, "it is recorded")
        assert done[0].cost == fake.used[-1] / 1000
