"""The tutorial is run: its commands in their order, in one shell, and what it shows compared with what comes."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.kit import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/tutorial.md").read_text()
STEP = re.compile(r"```sh\n(.*?)\n```(?:\n\n```text\n(.*?)\n```)?", re.DOTALL)
END = "=== end of a step ==="
PORTS = ("8000", "8443", "9001", "9002")


def final_configuration() -> str:
    """Return the configuration file at the end of the page, as its commands have written it."""
    return "".join(re.findall(r"gateway\.yaml <<'EOF'\n(.*?)EOF\n", PAGE, flags=re.DOTALL))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the tutorial needs openssl")
def test_what_the_section_on_systemd_leaves_is_accepted_in_the_folder_of_a_service(tmp_path: Path) -> None:
    (section,) = re.findall(r"\n## With systemd\n.*?```text\n(.*?)```", PAGE, flags=re.DOTALL)
    commands = [line for line in section.splitlines() if not line.startswith(("python3 -m venv", "systemctl"))]
    assert len(commands) == len(section.splitlines()) - 2
    etc, credentials, state = (tmp_path / name for name in ("etc", "credentials", "var"))
    places = {"/etc/": f"{etc}/", "/run/credentials/api-gateway.service": str(credentials)}
    script = re.sub("|".join(places), lambda found: places[found[0]], "\n".join(commands))
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "gateway.yaml").write_text(final_configuration())
    (making,) = re.findall(r"^(openssl req .*?)$", PAGE, flags=re.MULTILINE)
    for folder in (etc / "systemd" / "system", credentials, state):
        folder.mkdir(parents=True)
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    run(["bash", "-ec", making], cwd=tmp_path / "shop")
    run(["bash", "-euc", script], cwd=tmp_path)
    units = etc / "systemd" / "system"
    for name, file in re.findall(
        r"LoadCredential=([\w-]+):(\S+)", (units / "api-gateway.service.d/key.conf").read_text()
    ):
        shutil.copy(file, credentials / name)  # as systemd does
    assert "ListenStream=0.0.0.0:8443" in (units / "api-gateway.socket.d/port.conf").read_text()
    service = (units / "api-gateway.service").read_text()
    assert "Environment=GATEWAY_STATE_DIR=%S/api-gateway\n" in service
    config = f"{etc}/api-gateway/gateway.yaml"
    assert f"--config {config.removeprefix(str(tmp_path))}\n" in service
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "GATEWAY_STATE_DIR": str(state)}
    check = [sys.executable, "-m", "api_gateway", "--check", "--config", config]
    found = subprocess.run(check, cwd="/", env=variables, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "The configuration is valid: 2 routes, 2 upstreams, 4 tiers.\n"), (
        found
    )
    assert "warning" not in found.stderr


@pytest.mark.skipif(not all(map(shutil.which, ("curl", "openssl"))), reason="the tutorial needs curl and openssl")
def test_the_commands_print_what_is_shown(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "api-gateway"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m api_gateway "$@"\n')
    program.chmod(0o755)
    ports = dict(zip(PORTS, map(str, (free_port() for _ in PORTS)), strict=True))
    steps = STEP.findall(PAGE)
    # The ports of the page may be in use here: others are set where the page relies on the default.
    lines = ["trap 'kill $(jobs -p) 2> /dev/null; wait' EXIT", f"export GATEWAY_SERVER__PORT={ports['8000']}"]
    for commands, _ in steps:
        if "port: 8443" in commands:
            lines.append("unset GATEWAY_SERVER__PORT")
        lines += [re.sub("|".join(PORTS), lambda found: ports[found[0]], commands), f"echo '{END}'"]
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")},
        "PATH": f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "*",
    }
    shell = subprocess.Popen(
        ["bash", "-uo", "pipefail", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = shell.communicate(timeout=300)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # what a shell that did not end has started in the background
        shell.wait()
    log = tmp_path / "shop" / "gateway.log"
    told = stderr[-1000:] + (log.read_text()[-2000:] if log.exists() else "")
    outputs = stdout.split(f"{END}\n")
    assert len(outputs) == len(steps) + 1, told
    for (commands, shown), output in zip(steps, outputs, strict=False):
        if shown:
            assert "\n".join(" ".join(line.split()) for line in output.splitlines()) == shown, f"{commands}\n{told}"
    assert "limited" in outputs[5], outputs[5]
    assert "PREMIUM" in outputs[-2], outputs[-2]
