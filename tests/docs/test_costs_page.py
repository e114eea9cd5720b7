"""The page on costs: its recipe charges what it says."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from api_gateway.proxy.content_cost import MAX_CONTENT_COST, MAX_DECODED
from tests.kit import FakeClocks, RawAnswer, RawClient, RawUpstream, ask, reply, running_gateway

PAGE = (Path(__file__).parents[2] / "docs" / "costs.md").read_text()


def recipe(url: str) -> dict[str, Any]:
    """Return the configuration of "LLM tokens", with another target."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    config: dict[str, Any] = yaml.safe_load(text)
    config["upstreams"]["llm"]["targets"] = [{"url": url}]
    return config


def completion(tokens: int) -> Any:
    body = json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "total_tokens": tokens}}).encode()
    return reply(body, headers=((b"Content-Type", b"application/json"),))


def test_language_model_tokens_are_charged_by_the_thousand(tmp_path: Path) -> None:
    """The clocks stand still, so nothing is refilled in between, however slow the machine is."""
    up = RawUpstream(completion(1500))
    with running_gateway(recipe(up.url), tmp_path, FakeClocks().clocks) as running:

        def post() -> RawAnswer:
            with RawClient(running.port) as raw:
                raw.request("POST", "/api/v1/chat/completions", ("X-Client-ID: acme", "Content-Length: 2"), b"{}")
                return raw.answer()

        def tokens() -> float:
            found: float = ask(f"{running.url}/clients/acme").json()["bucket"]["tokens"]
            return found

        assert post().all("x-ratelimit-remaining") == [b"29"]  # 1 of 30 is reserved
        assert tokens() == 28.5
        assert up.requests[-1].line.startswith(b"POST /v1/chat/completions ")
        up.behave = completion(40_000)
        assert post().status == 200
        assert tokens() == -11.5
        refused = post()
        assert refused.status == 429
        assert refused.all("retry-after") == [b"25"]  # 12.5 tokens, at 0.5 a second
    up.close()


def test_the_limits_on_the_page_are_those_of_the_code() -> None:
    assert f"up to {MAX_DECODED // 2**20} MiB after" in PAGE
    assert f"above {MAX_CONTENT_COST:,} tokens" in PAGE
