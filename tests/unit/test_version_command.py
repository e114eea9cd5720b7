"""`api-gateway version`: commit, variant, and what is installed of the extras."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from api_gateway import __version__
from api_gateway.process.version_command import run_version
from api_gateway.system import extras
from api_gateway.system.build import COMMIT_FILE, commit_of, variant, version_line
from api_gateway.system.extras import EXTRAS, Extra

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "fedcba98" * 5
MISSING = Extra("absent", "no-such-distribution", "no_such_module.part", "what nobody has")


def test_it_prints_what_runs_and_names_each_extra_with_its_purpose(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api_gateway.process.version_command.EXTRAS", (*EXTRAS, MISSING))
    assert run_version([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == version_line()
    assert lines[1].startswith("commit: ")
    assert lines[2] == f"event loop: uvloop {version('uvloop')}"
    assert next(line for line in lines if line.startswith("jwt ")).split() == [
        *("jwt", "joserfc", version("joserfc")),
        *["JSON", "Web", "Tokens", "as", "identities"],
    ]
    assert next(line for line in lines if line.startswith("absent ")).split()[:2] == ["absent", "missing"]
    assert lines[-1] == "Install the package as api-gateway[absent] to add what is missing."


def test_it_prints_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_version(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["variant"]) == (__version__, variant())
    assert found["commit"] == commit_of()
    assert {one["name"]: one["installed"] for one in found["extras"]} == {
        extra.name: version(extra.distribution) for extra in EXTRAS
    }


def test_a_module_without_its_distribution_counts_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: object())
    assert MISSING.installed == "unknown version"


def test_the_commit_is_that_of_the_build_before_that_of_the_clone(tmp_path: Path) -> None:
    package = tmp_path / "api_gateway"
    package.mkdir()
    assert commit_of(package) is None
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text(f"{OTHER}\n")
    assert commit_of(package) == OTHER
    (package / COMMIT_FILE).write_text(f"{COMMIT}-modified\n")
    assert commit_of(package) == f"{COMMIT}-modified"
    (package / COMMIT_FILE).write_text("\x1b[31mno commit")
    assert commit_of(package) is None


def test_the_commit_of_a_clone_is_that_which_git_names(tmp_path: Path) -> None:
    """With a branch, packed references, a worktree, and a detached head."""

    def git(*arguments: str, folder: Path = tmp_path) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
        run = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    git("init", "-q", "-b", "main")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert commit_of(tmp_path / "api_gateway") == git("rev-parse", "HEAD")
    git("pack-refs", "--all")
    assert commit_of(tmp_path / "api_gateway") == git("rev-parse", "HEAD")
    git("worktree", "add", "-q", "-b", "other", "tree")
    git("commit", "-q", "--allow-empty", "-m", "second", folder=tmp_path / "tree")
    assert commit_of(tmp_path / "tree" / "api_gateway") == git("rev-parse", "other")
    git("checkout", "-q", "--detach", folder=tmp_path / "tree")
    assert commit_of(tmp_path / "tree" / "api_gateway") == git("rev-parse", "other")
