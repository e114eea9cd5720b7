"""The files for deployment suit the gateway and each other; programs of others check them where they are installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from api_gateway.config import GatewayConfig, load_config
from api_gateway.process.supervisor import DRAIN_MARGIN
from api_gateway.settings.server import ServerSection

DEPLOY = Path(__file__).parents[2] / "deploy"
PAGE = (DEPLOY.parent / "docs" / "deployment.md").read_text()
SERVICE = (DEPLOY / "systemd" / "api-gateway.service").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
MANIFESTS = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes" / "gateway.yaml").read_text())}
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()


def configuration(text: str, folder: Path) -> GatewayConfig:
    """Load a configuration, with secret files of this folder in place of those that are mounted."""
    for name in ("store-url", "admin-token", "prometheus_token"):
        (folder / name).write_text("redis://valkey:6379" if name == "store-url" else "0" * 64)
    file = folder / "gateway.yaml"
    file.write_text(re.sub(r"/run/secrets/(gateway/)?", f"{folder}/", text))
    return load_config(file)


def stops_within(server: ServerSection) -> float:
    return server.drain_delay + server.drain_timeout + DRAIN_MARGIN


def test_compose_waits_for_the_end_of_requests(tmp_path: Path) -> None:
    config = configuration((DEPLOY / "docker" / "gateway.yaml").read_text(), tmp_path)
    gateway = COMPOSE["services"]["gateway"]
    assert float(gateway["stop_grace_period"].removesuffix("s")) > stops_within(config.server)
    assert config.store.min_gateway_processes == gateway["deploy"]["replicas"]
    assert config.store.is_shared
    assert gateway["read_only"] is True


def test_what_compose_mounts_exists() -> None:
    mounted = [one for service in COMPOSE["services"].values() for one in service.get("volumes", ())]
    paths = [one.partition(":")[0] for one in mounted if one.startswith(".")]
    assert len(paths) > 4
    for path in paths:
        assert (DEPLOY / "docker" / path).exists(), path


def test_kubernetes_waits_for_the_end_of_requests(tmp_path: Path) -> None:
    config = configuration(MANIFESTS["ConfigMap"]["data"]["gateway.yaml"], tmp_path)
    deployment = MANIFESTS["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > stops_within(config.server)
    assert config.store.min_gateway_processes == deployment["replicas"]
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["minAvailable"] < deployment["replicas"]
    files = set(MANIFESTS["Secret"]["stringData"])
    named = set(re.findall(r"/run/secrets/gateway/(\S+)", MANIFESTS["ConfigMap"]["data"]["gateway.yaml"]))
    assert named == files


def test_kubernetes_probes_what_the_gateway_serves_and_selects_its_pods() -> None:
    labels = MANIFESTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    (container,) = MANIFESTS["Deployment"]["spec"]["template"]["spec"]["containers"]
    probes = {name: probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}
    assert probes == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    assert MANIFESTS["Service"]["spec"]["selector"] == labels
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFESTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert [port["containerPort"] for port in container["ports"]] == [GatewayConfig().server.port]


def test_all_run_as_the_same_user_without_rights() -> None:
    (user,) = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    pod = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == int(user) > 0
    secured = pod["containers"][0]["securityContext"]
    assert secured == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert COMPOSE["services"]["gateway"]["cap_drop"] == ["ALL"]


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    root = DEPLOY.parent
    ignored = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {path for line in re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()}
    assert copied == kept
    for path in copied:
        assert (root / path).exists()


def test_the_packages_of_the_image_are_locked_as_those_of_the_project() -> None:
    def versions(path: Path) -> dict[str, str]:
        return dict(re.findall(r"^(\S+)==(\S+)", path.read_text(), re.MULTILINE))

    ours, of_image = versions(DEPLOY.parent / "requirements.lock"), versions(DEPLOY / "docker" / "requirements.lock")
    assert ours.items() <= of_image.items()
    assert {"joserfc", "cryptography"} <= of_image.keys()


def test_hadolint_has_no_finding() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("needs hadolint")
    result = subprocess.run(
        [program, str(DEPLOY / "docker" / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
class TestSystemd:
    """What systemd says of the unit."""

    @pytest.fixture
    def units(self, tmp_path: Path) -> list[str]:
        """Copies of the units, whose program exists."""
        for path in (DEPLOY / "systemd").iterdir():
            text = path.read_text().replace("/opt/api-gateway/bin/api-gateway", "/bin/true")
            (tmp_path / path.name).write_text(text)
        return [str(path) for path in sorted(tmp_path.iterdir()) if path.suffix in (".service", ".socket")]

    def test_the_units_are_valid(self, units: list[str]) -> None:
        result = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
        unknown = re.compile(r".*Failed to parse service type, ignoring: notify-reload")  # before systemd 253
        others = [line for line in result.stderr.splitlines() if not unknown.fullmatch(line) and units[0] in line]
        assert (result.returncode, others) == (0, [])

    def test_the_service_has_no_rights_that_it_does_not_need(self, units: list[str]) -> None:
        command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", units[0]]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout
        (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", result.stdout)
        assert f"(exposure {exposure} of 10)" in PAGE
