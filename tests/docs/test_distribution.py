"""Source distribution and wheel: equal byte for byte, complete, and installed by the tools that users have."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_gateway import __version__
from tests.kit import ask, eventually

ROOT = Path(__file__).parents[2]
SDIST, WHEEL = f"api_gateway-{__version__}.tar.gz", f"api_gateway-{__version__}-py3-none-any.whl"
COMMIT = "0123456789abcdef" * 2 + "01234567"
ADDED = {"PKG-INFO", "api_gateway/commit.txt"}  # to the source distribution by its build

pytestmark = [pytest.mark.install, pytest.mark.timeout(900)]


def sources() -> list[str]:
    """Return the files under version control; in an unpacked source distribution those that it came with."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if found and (ROOT / ".git").exists():
        return sorted(found.rstrip("\0").split("\0"))
    ignored = {
        "PKG-INFO",
        ".venv",
        ".build",
        "__pycache__",
        ".pytest_cache",
        ".mypy_cache",
        ".ruff_cache",
        ".hypothesis",
    }
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    kept = (path for path in files if ignored.isdisjoint(path.parts) and not path.name.startswith(".coverage"))
    return sorted(str(path) for path in kept if str(path) not in ADDED)


def copied(folder: Path, umask: int) -> Path:
    """Copy the sources to a folder, with permissions that another umask leaves."""
    for name in sources():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
        (folder / name).chmod((0o777 if os.access(ROOT / name, os.X_OK) else 0o666) & ~umask)
    return folder


def environment(**variables: str) -> dict[str, str]:
    """Return the variables of a build or an installation, without those of the environment of the tests."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    return {**inherited, **variables}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs of a new environment: hatchling, pipx and uv."""
    folder = tmp_path_factory.mktemp("tools")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([folder / "bin/pip", "install", "-q", "hatchling", "pipx", "uv"], check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def built(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two builds, in different places and with different permissions."""
    folders = []
    for name, umask in (("first", 0o022), ("second", 0o077)):
        tree = copied(tmp_path_factory.mktemp(name), umask)
        build(tools, tree, umask)
        folders.append(tree / "dist")
    return folders


def build(tools: Path, tree: Path, umask: int = 0o022) -> None:
    variables = environment(SOURCE_DATE_EPOCH="1800000000", API_GATEWAY_COMMIT=COMMIT)
    command = [str(tools / "python"), "-m", "hatchling", "build"]
    subprocess.run(command, cwd=tree, env=variables, umask=umask, check=True, capture_output=True)


def test_two_builds_of_the_same_sources_are_equal_byte_for_byte(built: list[Path]) -> None:
    first, second = built
    assert {file.name for file in first.iterdir()} == {SDIST, WHEEL}
    for name in (SDIST, WHEEL):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_the_source_distribution_has_every_file_and_builds_the_same_wheel(
    built: list[Path], tools: Path, tmp_path: Path
) -> None:
    with tarfile.open(built[0] / SDIST) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    assert names == {*sources(), *ADDED}
    (tree,) = tmp_path.iterdir()
    build(tools, tree)
    assert (tree / "dist" / WHEEL).read_bytes() == (built[0] / WHEEL).read_bytes()


def test_the_wheel_has_the_package_and_its_commit(built: list[Path]) -> None:
    with zipfile.ZipFile(built[0] / WHEEL) as archive:
        names, commit = set(archive.namelist()), archive.read("api_gateway/commit.txt").decode().strip()
    assert commit == COMMIT
    assert {name for name in names if not name.startswith(f"api_gateway-{__version__}.dist-info/")} == {
        *(name for name in sources() if name.startswith("api_gateway/")),
        "api_gateway/commit.txt",
    }


@pytest.fixture(params=["pipx", "uv"])
def installed(request: pytest.FixtureRequest, tools: Path, tmp_path: Path) -> Iterator[Path]:
    """The program as a tool installs it from the folder, in a home of its own."""
    tree, programs = copied(tmp_path / "tree", 0o022), tmp_path / "bin"
    variables = {
        "PIPX_HOME": str(tmp_path / "pipx"),
        "PIPX_BIN_DIR": str(programs),
        "PIPX_MAN_DIR": str(tmp_path / "man"),
        "UV_TOOL_DIR": str(tmp_path / "uv"),
        "UV_TOOL_BIN_DIR": str(programs),
    }
    install = {"pipx": ["pipx", "install"], "uv": ["uv", "tool", "install"]}[request.param]
    command = [str(tools / install[0]), *install[1:], "--python", sys.executable, "."]
    run = subprocess.run(command, cwd=tree, env=environment(**variables), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    shutil.rmtree(tree)  # the folder is no longer needed
    yield programs / "api-gateway"
    shutil.rmtree(tmp_path / request.param)


def test_a_tool_installs_it_from_the_folder_and_the_demo_answers(installed: Path, tmp_path: Path) -> None:
    variables = environment(GATEWAY_SERVER__PORT="0", XDG_STATE_HOME=str(tmp_path / "state"))
    version = subprocess.run([installed, "version"], env=variables, capture_output=True, text=True, check=True).stdout
    assert version.startswith(f"api-gateway {__version__} (pure Python, ")
    assert re.search(r"^otel +missing +\w", version, re.MULTILINE)
    log = tmp_path / "output.txt"
    with log.open("w") as output:
        running = subprocess.Popen([installed], cwd=tmp_path, env=variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: "Listening on" in log.read_text() or running.poll() is not None, "it starts", 100)
        port = re.search(r"localhost:(\d+)", log.read_text())
        assert port, log.read_text()
        answer = ask(f"http://127.0.0.1:{port[1]}/api/users", headers={"X-Client-ID": "c"})
        assert (answer.status, b"Ada Lovelace" in answer.body) == (200, True)
    finally:
        running.terminate()
        assert running.wait(40) == 0
