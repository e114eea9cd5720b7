"""The files of the pages: text cannot become markup, nothing is loaded from elsewhere, all is packaged."""

import re
import subprocess
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

from api_gateway.admin.pages import CONTENT_SECURITY_POLICY, ENTRIES, StaticPages
from api_gateway.errors import NoRoute
from tests.cases import each

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "api_gateway" / "dashboard"
OWN = sorted(
    path for path in FOLDER.rglob("*") if path.suffix in (".js", ".html", ".css") and "vendor" not in path.parts
)
# SHA-256 of the files of uPlot 1.6.32 in npm: `dist/uPlot.esm.js` and `dist/uPlot.min.css`.
VENDORED = {
    "uPlot.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uPlot.js": "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba",
}
# What would turn text into markup, styles or code.
MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc|setHTML"
    r"|\beval\(|new Function|setTimeout\(\s*[\"'`]|javascript:|\.cssText|setAttribute\(\s*[\"'](style|on)"
)
ELSEWHERE = re.compile(r"https?://(?!www\.w3\.org/2000/svg)|(?:src|href)=[\"']//|@import|(?<!\w)url\((?!#)")


def test_there_are_files() -> None:
    assert {"dashboard.html", "docs.html", "home.html", "style.css", "app.js"} <= {path.name for path in OWN}


@each("path", OWN, ids=lambda path: path.name)
def test_text_never_becomes_markup_and_nothing_is_loaded_from_elsewhere(path: Path) -> None:
    text = path.read_text()
    assert not MARKUP.findall(text)
    assert not ELSEWHERE.findall(text)


@each("path", [path for path in OWN if path.suffix == ".html"], ids=lambda path: path.name)
def test_a_page_has_nothing_inline_and_only_files_that_exist(path: Path) -> None:
    text = path.read_text()
    assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)
    assert '<html lang="en">' in text
    assert 'name="viewport"' in text
    for name in re.findall(r'(?:src|href)="dashboard/([^"]+)"', text):
        assert (FOLDER / name).is_file(), name


def test_modules_import_files_that_exist_and_export_what_is_imported() -> None:
    for path in (path for path in OWN if path.suffix == ".js"):
        for names, source in re.findall(r"^import (.+?) from \"(\.[^\"]+)\";", path.read_text(), re.MULTILINE):
            target = (path.parent / source).resolve()
            assert target.is_file(), f"{path.name}: {source}"
            exported = target.read_text()
            for name in re.findall(r"\w+", names) if names.startswith("{") else ():
                assert re.search(rf"export .*\b{name}\b", exported), f"{path.name}: {name} of {source}"


def test_the_vendored_library_has_its_licence_and_is_unchanged() -> None:
    assert "MIT License" in (FOLDER / "vendor" / "LICENSE").read_text()
    assert "(v1.6.32)" in (FOLDER / "vendor" / "uPlot.js").read_text()[:400]
    found = {path.name: sha256(path.read_bytes()).hexdigest() for path in (FOLDER / "vendor").glob("uPlot.*")}
    assert found == VENDORED


def test_every_file_is_in_the_package_and_the_sizes_are_small() -> None:
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert hatch["packages"] == ["api_gateway"]
    assert hatch["exclude"] == ["/api_gateway/commit.txt"]
    if (ROOT / ".git").exists():  # what git ignores is not packaged
        files = [str(path.relative_to(ROOT)) for path in FOLDER.rglob("*") if path.is_file()]
        found = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True, check=False)
        assert found.stdout == ""
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 400_000


def test_pages_are_read_once_at_the_first_request() -> None:
    pages = StaticPages()
    assert not pages.is_read
    pages.read()
    for segments in ENTRIES:
        assert pages.find(segments).kind.startswith(b"text/html")
    assert pages.find(("dashboard", "pages", "overview.js")).kind.startswith(b"text/javascript")
    for wrong in (
        ("dashboard", "..", "config.py"),
        ("dashboard", "../config.py"),
        ("dashboard", "vendor", "LICENSE"),
        ("dashboard", "x.js"),
    ):
        with pytest.raises(NoRoute):
            pages.find(wrong)


def test_the_policy_allows_nothing_but_the_own_files() -> None:
    directives = dict(part.strip().partition(" ")[::2] for part in CONTENT_SECURITY_POLICY.split(";"))
    assert directives.pop("img-src") == "'self' data:"
    assert {name: value for name, value in directives.items() if value == "'self'"}.keys() == {
        "script-src",
        "style-src",
        "connect-src",
    }
    assert {name for name, value in directives.items() if value == "'none'"} == {
        "default-src",
        "frame-ancestors",
        "base-uri",
        "form-action",
    }
    assert "unsafe" not in CONTENT_SECURITY_POLICY
