"""The commands on all pages: a test runs each block of them, or it stands here with the reason why none does."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.test_pages import NAMES
from tests.kit import eventually, free_port, running_gateway
from tests.processes import START, process

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
BLOCKS = {name: found for name in NAMES if (found := BLOCK.findall((ROOT / name).read_text()))}

# The tests that run the commands of a page.
RUN_BY = {
    "README.md": "docs/test_readme.py",
    "docs/addresses.md": "wire/test_addresses.py",
    "docs/circuit-breakers.md": "docs/test_readme.py",
    "docs/command-line.md": "docs/test_command_line_page.py",
    "docs/configuration.md": "docs/test_configuration_page.py",
    "docs/doctor.md": "docs/test_doctor_page.py",
    "docs/history.md": "docs/test_history_page.py",
    "docs/identity.md": "docs/test_page_commands.py",
    "docs/operator-access.md": "docs/test_page_commands.py",
    "docs/tracing.md": "docs/test_tracing_page.py",
    "docs/tutorial.md": "docs/test_tutorial.py",
    "docs/upgrading.md": "docs/test_upgrading_page.py",
    "docs/uvicorn.md": "docs/test_page_commands.py",
}
NOT_RUN = {
    "CONTRIBUTING.md": "builds an environment: docs/test_readme.py does so, with the mark install",
    "docs/compiled.md": "needs a C compiler and minutes: .ci/compiled builds, installs and tests the wheel",
}
curl = pytest.mark.skipif(shutil.which("curl") is None, reason="the pages use curl")


def test_a_test_runs_the_commands_of_each_page() -> None:
    assert BLOCKS.keys() == RUN_BY.keys() | NOT_RUN.keys()
    assert not RUN_BY.keys() & NOT_RUN.keys()
    for page, test in RUN_BY.items():
        assert Path(page).name in (ROOT / "tests" / test).read_text(), page


@curl
@pytest.mark.parametrize(("page", "expected"), [("identity.md", '"key":"agw_'), ("operator-access.md", '"requests"')])
def test_the_commands_of_a_page_reach_a_gateway(page: str, expected: str, tmp_path: Path) -> None:
    token = "an-operator-token-of-a-page"
    folder = tmp_path / ".local" / "state" / "api-gateway" / "default" / "state"
    folder.mkdir(parents=True)
    (folder / "operator-token").write_text(token)
    sections = {"admin": {"token": token}} if page == "operator-access.md" else {}  # without one, local ones need none
    with running_gateway(sections, tmp_path / "own") as running:
        for block in BLOCKS[f"docs/{page}"]:
            command = block.replace("localhost:8000", f"127.0.0.1:{running.port}")
            variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NO_PROXY": "*"}
            found = subprocess.run(["bash", "-ec", command], env=variables, capture_output=True, text=True, check=True)
            assert expected in found.stdout, (command, found.stdout)


def test_the_command_for_uvicorn_starts_the_gateway(tmp_path: Path) -> None:
    """The first one; the second needs a store, and differs by the number of workers."""
    first, second = BLOCKS["docs/uvicorn.md"]
    program, *arguments = first.split()
    assert program == "uvicorn"
    assert {"api_gateway.main:app", "--http", "api_gateway.server:protocol"} <= set(second.split()) & set(arguments)
    arguments[arguments.index("8000")] = str(free_port())
    with process("-m", "uvicorn", *arguments, cwd=tmp_path, XDG_STATE_HOME=str(tmp_path)) as running:
        eventually(lambda: "Application startup complete" in running.errors, "it starts", START)
