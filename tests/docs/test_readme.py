"""The README is run: its commands as they stand, and what it shows compared with what comes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from api_gateway.config import GatewayConfig
from api_gateway.errors import Reason
from tests.kit import eventually, running_gateway
from tests.processes import WAYS, process

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [text.strip() for language, text in BLOCKS if language == "sh"]
INSTALLING = [command for command in COMMANDS if command.startswith("python3 -m venv")]
EXAMPLES = [
    (text.strip(), following[1].strip() if following[0] == "text" else None)
    for (language, text), following in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True)
    if language == "sh" and text.strip() not in INSTALLING
]
# The client that spends its tokens, and others for when it has got one back: a busy machine takes a second for that.
CLIENTS = ("keen", "kean", "kein", "keon", "keyn", "kein2", "keon2", "keyn2")
VARYING = (
    (r"\d{4}-\d\d-\d\dT[\d:.+]+", "<time>"),
    (r"\w{3}, \d\d \w{3} \d{4} [\d:]+ GMT", "<date>"),
    (r"[0-9a-f]{32}", "<id>"),
    (r"content-length: \d+", "content-length: <n>"),
    (r"(Retry in )\d[\d.]*(?= s)", r"\1<n>"),
    (r'("(?:retry_after_seconds|tokens_before|tokens_after)": ?)\d[\d.]*', r"\1<n>"),
)


def normal(text: str) -> str:
    """Return the text with what differs from run to run taken out."""
    for pattern, name in VARYING:
        text = re.sub(pattern, name, text)
    return "\n".join(line.strip() for line in text.strip().splitlines())


def test_there_are_two_commands_to_install_each_one_line() -> None:
    assert len(INSTALLING) == 2
    assert all("\n" not in command for command in INSTALLING)
    assert INSTALLING[0].endswith("python run_gateway.py")
    assert INSTALLING[1].endswith("pytest")


def test_the_users_own_examples_are_there() -> None:
    text = "\n".join(COMMANDS)
    for path in ("/api/users", "/clients/client-123/tier", "/metrics\n", "/metrics/latency", "/circuit-breakers"):
        assert path in text


@pytest.mark.skipif(shutil.which("curl") is None, reason="the README's examples are for curl")
def test_the_examples_print_what_is_shown(tmp_path: Path) -> None:
    """In the order of the README, as later examples build on earlier ones.

    From a shell that does not replace itself by its last command, as the reader's does not: the reader needs no token.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}
    with process(*WAYS["run_gateway.py"], cwd=tmp_path) as running:
        for command, shown in EXAMPLES:
            adapted = command.replace("localhost:8000", f"127.0.0.1:{running.port}")
            adapted = adapted.replace("python ", f"{sys.executable} ")
            for client in CLIENTS:
                bash = ["bash", "-euo", "pipefail", "-c", f"{adapted.replace(CLIENTS[0], client)}\n:"]
                run = subprocess.run(
                    bash, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60, check=False
                )
                if f"allowed by client:{client}" not in run.stdout:
                    break
            assert run.returncode == 0, f"{command}: {run.stderr}"
            assert run.stdout, command
            if shown is not None:
                assert normal(run.stdout).replace(client, CLIENTS[0]) == normal(shown), command


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's examples are for curl")
def test_the_commands_of_the_page_on_circuit_breakers_do_what_it_says(tmp_path: Path) -> None:
    page = (ROOT / "docs/circuit-breakers.md").read_text()
    commands = re.findall(r"```sh\n(.*?)\n```", page, flags=re.DOTALL)
    with running_gateway({}, tmp_path) as running:
        address = f"127.0.0.1:{running.port}"
        adapted = [["bash", "-c", command.replace("localhost:8000", address)] for command in commands]
        told = [json.loads(subprocess.run(one, capture_output=True, check=True).stdout) for one in adapted]
    modes = [(answer["previous"]["mode"], answer["current"]["mode"]) for answer in told[:3]]
    assert modes == [("auto", "forced_open"), ("forced_open", "auto"), ("auto", "observe")]
    assert told[3]["circuit_breakers"]["users"]["mode"] == "observe"
    assert (told[4]["name"], told[4]["history"]) == ("users", [])


def test_every_yaml_block_is_a_valid_configuration() -> None:
    blocks = [text for language, text in BLOCKS if language == "yaml"]
    assert blocks
    for text in blocks:
        assert GatewayConfig.model_validate(yaml.safe_load(text)).routes


def test_every_reason_is_explained() -> None:
    table = README[README.index("## Responses that the gateway generates") :]
    assert {reason.value for reason in Reason} == set(re.findall(r"`([a-z_]+)`", table.split("\n## ")[0]))


def test_every_linked_file_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.install
@pytest.mark.timeout(600)
def test_the_first_command_starts_the_gateway_from_nothing(tmp_path: Path) -> None:
    """In a copy of what is committed, with a new environment; only the port is changed."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.split(b"\0")
    names = [name.decode() for name in files if name] or [
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    log = tmp_path / "output.txt"
    variables = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    with log.open("w") as output:
        running = subprocess.Popen(
            ["bash", "-c", INSTALLING[0].replace("python run", "exec python run")],
            cwd=tmp_path,
            env={**variables, "GATEWAY_SERVER__PORT": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            eventually(lambda: "Listening on" in log.read_text() or running.poll() is not None, "it starts", 500)
            text = log.read_text()
            assert running.poll() is None, text
            port = re.search(r"localhost:(\d+)", text)
            assert port, text
            url = f"http://127.0.0.1:{port[1]}/api/users"
            asked = subprocess.run(["curl", "-s", "-H", "X-Client-ID: c", url], capture_output=True, check=True)
            assert b"Ada Lovelace" in asked.stdout
        finally:
            running.terminate()
            assert running.wait(40) == 0
