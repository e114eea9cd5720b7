"""The documentation as a web site: its navigation has every page, and it is built without a warning."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.test_pages import NAMES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
LINK = re.compile(r'(?:href|src)="?(?![a-z]+:)([^"\s>#]+)')  # relative ones


def pages_of(entries: list[Any]) -> Iterator[str]:
    """Yield the files of a part of the navigation."""
    for entry in entries:
        for inner in [entry] if isinstance(entry, str) else entry.values():
            yield from [inner] if isinstance(inner, str) else pages_of(inner)


def test_the_navigation_has_every_page_once() -> None:
    assert sorted(pages_of(PROJECT["nav"])) == sorted(NAMES)


@pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason='the extra "site" is not installed')
def test_the_site_is_built_without_a_warning_and_its_links_resolve(tmp_path: Path) -> None:
    for name in (*NAMES, "zensical.toml", "LICENSE"):
        target = tmp_path / ("" if name == "zensical.toml" else PROJECT["docs_dir"]) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    for folder in ("docs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / PROJECT["docs_dir"] / folder, dirs_exist_ok=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "No issues found" in run.stdout + run.stderr
    site = tmp_path / PROJECT["site_dir"]
    pages = {name: re.sub(r"README\.md$", "index.md", name).replace(".md", ".html") for name in NAMES}
    links = [(page, link) for page in pages.values() for link in LINK.findall((site / page).read_text())]
    assert len(links) > len(pages)
    assert not [one for one in links if not (site / one[0]).parent.joinpath(one[1]).exists()]
