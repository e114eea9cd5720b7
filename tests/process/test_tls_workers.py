"""TLS of whole processes: several workers, their reload, operator commands, and what `--check` finds."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.kit import RawUpstream, eventually, free_port
from tests.processes import START, Running, process
from tests.tls_kit import HOST, Authority, Pair, TlsClient


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    folder = tmp_path / "ca"
    folder.mkdir()
    return Authority(folder)


def configuration(folder: Path, url: str, *pairs: Pair, port: int = 0, workers: int = 1) -> str:
    """Write a configuration with these certificates, and return its path."""
    sections = {
        "server": {"port": port, "workers": workers, "tls": {"certificates": [pair.setting for pair in pairs]}},
        "state_dir": str(folder / "state"),
        "upstreams": {"up": {"targets": [{"url": url}]}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
    }
    path = folder / "gateway.yaml"
    path.write_text(yaml.safe_dump(sections))
    return str(path)


def started(running: Running) -> int:
    """Wait until it listens, and return the port."""
    eventually(lambda: "Listening on" in running.output or running.popen.poll() is not None, "it listens", START)
    found = re.search(r"https://localhost:(\d+)", running.output)
    assert found, running.output + running.errors
    return int(found[1])


def test_all_workers_serve_tls_and_a_hangup_renews_the_certificates_of_all(
    authority: Authority, tmp_path: Path
) -> None:
    upstream = RawUpstream()
    pair, other = authority.issue("pair", HOST, subject="before"), authority.issue("other", HOST, subject="after")
    config = configuration(tmp_path, upstream.url, pair, workers=2)
    context = authority.context()

    def served(port: int) -> set[str]:
        names = set()
        for _ in range(16):  # connections are distributed over the workers
            with TlsClient(port, context) as client:
                assert client.get("/healthz").status == 200
                names.add(client.served_by)
        return names

    with process("-m", "api_gateway", "--config", config, cwd=tmp_path) as running:
        port = started(running)
        assert served(port) == {"before"}
        pair.replace(other)
        running.signal(signal.SIGHUP)
        eventually(lambda: served(port) == {"after"}, "every worker has the other certificate")
        assert running.terminate() == 0
    upstream.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("listener", ["server", "admin", "unix"])
def test_a_local_request_over_tls_needs_no_token(authority: Authority, tmp_path: Path, listener: str) -> None:
    """As the look-up of its process holds for the whole connection, a second request on it is local too."""
    port = free_port()
    config = Path(configuration(tmp_path, "http://127.0.0.1:9", authority.issue("pair", "localhost", HOST), port=port))
    ways: list[str] = []
    if listener != "server":
        port = free_port()
        place = f"127.0.0.1:{port}" if listener == "admin" else f"unix:{tmp_path}/admin.sock"
        ways = [] if listener == "admin" else ["--unix-socket", f"{tmp_path}/admin.sock"]
        config.write_text(config.read_text() + yaml.safe_dump({"admin": {"listen": place, "tls": True}}))
    url = f"https://localhost:{port}/health"
    with process("-m", "api_gateway", "--config", str(config), cwd=tmp_path) as running:
        started(running)
        command = ["curl", "-s", "-m", "10", "--noproxy", "*", "--cacert", str(authority.file), *ways, "-w"]
        ran = subprocess.run(
            ["sh", "-c", '"$@"; true', "sh", *command, " %{http_code} %{num_connects}\n", url, url],
            capture_output=True,
            check=True,
            text=True,
        )
        lines = ran.stdout.splitlines()
        assert [line.rsplit(" ", 2)[1:] for line in lines] == [["200", "1"], ["200", "0"]], ran.stdout + running.errors
        assert all('"upstreams"' in line for line in lines), "an operator sees everything"
        if listener != "unix":
            upstream = RawUpstream()  # this process serves others, so its requests may be theirs
            with TlsClient(port, authority.context()) as client:
                answer = client.get("/metrics")
            upstream.close()
            assert answer.status == 401
        assert "Traceback" not in running.errors
        assert running.terminate() == 0


def test_operator_commands_trust_the_configured_certificate(authority: Authority, tmp_path: Path) -> None:
    port = free_port()
    config = configuration(tmp_path, "http://127.0.0.1:9", authority.issue("pair", HOST), port=port)
    with process("-m", "api_gateway", "--config", config, cwd=tmp_path) as running:
        started(running)
        (tmp_path / "client").mkdir()
        with process("-m", "api_gateway", "clients", "--config", config, cwd=tmp_path / "client") as command:
            assert command.exit_code() == 0, command.errors
        token = (tmp_path / "state" / "state" / "operator-token").read_text().strip()
        with TlsClient(port, authority.context()) as client:
            answer = client.get("/metrics?format=prometheus", (f"Authorization: Bearer {token}",))
        expiry = next(
            line for line in answer.body.decode().splitlines() if line.startswith("gateway_tls_certificate_e")
        )
        assert json.dumps(HOST) in expiry
        assert running.terminate() == 0


@pytest.mark.parametrize("fault", ["missing", "keyless", "mismatch", "expired", "readable", "soon", "none"])
def test_the_check_names_the_file_and_the_remedy(authority: Authority, tmp_path: Path, fault: str) -> None:
    good = authority.issue("good", HOST)
    days = {"expired": -1.0, "soon": 2.0}.get(fault, 90.0)
    pair = authority.issue("pair", "b.test", days=days)
    if fault == "missing":
        pair.certificate.unlink()
    elif fault == "keyless":
        pair.key.write_bytes(good.certificate.read_bytes())
    elif fault == "mismatch":
        pair.key.write_bytes(good.key.read_bytes())
    elif fault == "readable":
        pair.key.chmod(0o644)
    config = configuration(tmp_path, "http://127.0.0.1:9", good, pair)
    with process("-m", "api_gateway", "--check", "--config", config, cwd=tmp_path) as running:
        code = running.exit_code()
    place = "server.tls.certificates.1."
    expected = {
        "missing": f"{place}certificate: cannot be read: no such file or directory, got '{pair.certificate}'",
        "keyless": f"{place}key: contains no private key, got '{pair.key}'",
        "mismatch": f"{place}key: does not belong to '{pair.certificate}', got '{pair.key}'",
        "expired": f"{place}certificate: has expired; renew it, got '{pair.certificate}'",
        "readable": f"others than its owner have access to the key; use chmod 600, got '{pair.key}' with 0644",
        "soon": f"The certificate for b.test ('{pair.certificate}') expires in 2.0 days",
        "none": "",
    }[fault]
    assert code == (3 if fault in ("missing", "keyless", "mismatch", "expired") else 0), running.errors
    text = running.errors.replace("certificates[1]", "certificates.1")
    assert expected in text, text
    if fault == "none":
        assert "warning: " not in text
