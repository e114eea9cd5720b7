"""The units of deploy/systemd, run by systemd as the first process of its own namespaces.

The namespaces have a copy-on-write view of this machine's files, and a network of their own. Nothing outside changes.
Needs root, Linux, and systemd; with systemd 252 or older, the unit gets the changes that docs/deployment.md names.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import eventually

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare"),
    pytest.mark.skipif(not Path("/lib/systemd/systemd").exists(), reason="needs systemd"),
]

ROOT = Path(__file__).parents[2]
SOCKET, SERVICE = "api-gateway.socket", "api-gateway.service"
NOTIFY_RELOAD_SINCE = 253
START = 60.0
# Arguments: a folder, and those that become /opt/python, /opt/packages and /opt/source.
PREPARE = r"""
set -e
folder=$1 root=$1/root units=$1/root/etc/systemd/system
mount --make-rprivate /
mount -t tmpfs tmpfs $folder
mkdir $folder/upper $folder/work $root
mount -t overlay overlay -o lowerdir=/,upperdir=$folder/upper,workdir=$folder/work $root
mkdir -p $root/opt/python $root/opt/packages $root/opt/source
mount --bind -o ro $2 $root/opt/python
mount --bind -o ro $3 $root/opt/packages
mount --bind -o ro $4 $root/opt/source
mount -t proc proc $root/proc
mount --bind $root/proc/sys $root/proc/sys
mount -o remount,bind,ro $root/proc/sys
mount -t sysfs -o ro sysfs $root/sys
mount -t cgroup2 cgroup2 $root/sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs $root/dev
for device in null zero full random urandom tty; do
  touch $root/dev/$device
  mount --bind /dev/$device $root/dev/$device
done
mkdir $root/dev/pts $root/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts $root/dev/pts
mount -t tmpfs tmpfs $root/dev/shm
ln -s pts/ptmx $root/dev/ptmx
ln -s /proc/self/fd $root/dev/fd
mount -t tmpfs -o mode=755 tmpfs $root/run
mount -t tmpfs -o mode=1777 tmpfs $root/tmp
rm -rf $units $root/usr/lib/systemd/system/*.target.wants/* $root/opt/api-gateway $root/etc/api-gateway
mkdir -p $units/sysinit.target.wants $root/etc/api-gateway
ln -s /lib/systemd/system/systemd-journald.service $units/sysinit.target.wants/
echo 00000000000000000000000000000001 > $root/etc/machine-id
mkdir $root/.old
cd $root
pivot_root . .old
umount -l /.old
mount --make-rshared /
hostname gateway-test
ip link set lo up
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
  /lib/systemd/systemd --system --unit=basic.target --log-target=journal --show-status=no
"""
INSTALL = r"""
set -e
/opt/python/bin/python3 -m venv --without-pip /opt/api-gateway
printf '/opt/source\n/opt/packages\n' > "$(ls -d /opt/api-gateway/lib/python3*)/site-packages/gateway.pth"
printf '#!/opt/api-gateway/bin/python3\nfrom api_gateway.cli import main\nraise SystemExit(main())\n' \
  > /opt/api-gateway/bin/api-gateway
chmod 755 /opt/api-gateway/bin/api-gateway
cd /etc/api-gateway
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 60 -keyout tls.key -out tls.crt \
  -subj /CN=localhost -addext subjectAltName=DNS:localhost 2> /dev/null
chmod 600 tls.key
mkdir -p /srv/users /etc/systemd/system/api-gateway.service.d
echo Ada > /srv/users/list
cat > gateway.yaml <<'EOF'
upstreams: {users: "http://127.0.0.1:9001"}
routes: [{name: users, path: /api/users, upstream: users, strip_prefix: /api/users}]
tiers: {FREE: {rate: 100000, capacity: 100000}}
server:
  workers: 2
  tls: {certificates: [{certificate: /etc/api-gateway/tls.crt, key: /run/credentials/api-gateway.service/tls-key}]}
EOF
# The interpreter of the tests may have been moved from a home folder, which the service cannot see.
printf '[Service]\nLoadCredential=tls-key:/etc/api-gateway/tls.key\nEnvironment=LD_LIBRARY_PATH=/opt/python/lib\n' \
  > /etc/systemd/system/api-gateway.service.d/key.conf
cat > /etc/systemd/system/users.service <<'EOF'
[Service]
ExecStart=/opt/python/bin/python3 -m http.server 9001 --bind 127.0.0.1 --directory /srv/users
EOF
cp /opt/source/deploy/systemd/api-gateway.* /etc/systemd/system/
"""
OLDER = r"""
printf '[Service]\nType=notify\nExecReload=/bin/kill -HUP $MAINPID\n' \
  > /etc/systemd/system/api-gateway.service.d/older.conf
"""
LOAD = """
import collections, http.client, json, ssl, threading, time
context = ssl.create_default_context(cafile="/etc/api-gateway/tls.crt")
outcomes, end = collections.Counter(), time.monotonic() + SECONDS

def load():
    while time.monotonic() < end:
        connection = http.client.HTTPSConnection("localhost", 8000, context=context, timeout=60)
        try:
            connection.request("GET", "/api/users/list")
            response = connection.getresponse()
            response.read()
            outcomes[str(response.status)] += 1
        except Exception as error:
            outcomes[repr(error)] += 1
        finally:
            connection.close()

threads = [threading.Thread(target=load) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(outcomes))
"""


class Machine:
    """Systemd in its namespaces, and the commands that run there."""

    def __init__(self, folder: Path) -> None:
        self._log = (folder / "boot.log").open("wb")
        self._cgroup = unified_hierarchy() / f"gateway-test-{os.getpid()}"
        self._cgroup.mkdir()
        root = folder / "machine"
        root.mkdir()
        script = folder / "prepare.sh"
        script.write_text(PREPARE)
        folders = [sys.base_prefix, sysconfig.get_path("purelib"), str(ROOT)]
        namespaces = ["--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--cgroup", "--net"]
        enter = f'echo $$ > "{self._cgroup}/cgroup.procs"; exec "$@"'
        self._unshare = subprocess.Popen(
            ["sh", "-c", enter, "sh", "unshare", *namespaces, "sh", str(script), str(root), *folders],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._first = 0

    def wait(self) -> None:
        """Wait until systemd has started."""

        def is_running() -> bool:
            assert self._unshare.poll() is None, Path(self._log.name).read_text()
            number = self._unshare.pid
            children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
            if not children or Path(f"/proc/{children[0]}/comm").read_text() != "systemd\n":
                return False
            self._first = int(children[0])
            return self.run("systemctl", "is-system-running").stdout in ("running\n", "degraded\n")

        eventually(is_running, "systemd runs", START)

    def popen(self, *command: str) -> "subprocess.Popen[str]":
        """Start a command there."""
        variables = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_PAGER=cat"]
        enter = ["nsenter", "--target", str(self._first), "--all", "--", *variables]
        return subprocess.Popen([*enter, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command there, to its end."""
        popen = self.popen(*command)
        try:
            output, errors = popen.communicate(timeout=START)
        except BaseException:
            popen.kill()
            popen.wait()
            raise
        return subprocess.CompletedProcess(command, popen.returncode, output, errors)

    def output(self, *command: str) -> str:
        """Return what a command prints there, which must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.journal()}"
        return done.stdout.strip()

    def property(self, name: str) -> str:
        """Return a property of the service."""
        return self.output("systemctl", "show", "--property", name, "--value", SERVICE)

    def journal(self) -> str:
        """Return the messages of the service, without its access log."""
        text = self.run("journalctl", "--unit", SERVICE, "--output", "cat").stdout
        return "\n".join(line for line in text.splitlines() if '"request_id"' not in line)

    def get(self) -> str:
        """Send a request to the gateway."""
        place = "https://localhost:8000/api/users/list"
        return self.output("curl", "--silent", "--max-time", "50", "--cacert", "/etc/api-gateway/tls.crt", place)

    def load(self, seconds: float) -> "subprocess.Popen[str]":
        """Send requests without a pause, each on a new connection; it prints how many had which outcome."""
        return self.popen(
            "env",
            "LD_LIBRARY_PATH=/opt/python/lib",
            "/opt/python/bin/python3",
            "-c",
            LOAD.replace("SECONDS", str(seconds)),
        )

    def close(self) -> None:
        """End all processes there, and remove their control groups."""
        if self._first:
            os.kill(self._first, signal.SIGKILL)  # the kernel then ends all others of its namespace
        elif self._unshare.poll() is None:
            self._unshare.kill()
        self._unshare.wait()
        self._log.close()
        eventually(self._is_removed, f"{self._cgroup} is empty")

    def _is_removed(self) -> bool:
        try:
            for folder, _, _ in os.walk(self._cgroup, topdown=False):
                Path(folder).rmdir()
        except OSError:
            return False
        return not self._cgroup.exists()


def unified_hierarchy() -> Path:
    """Return where cgroup2 is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    pytest.skip("needs cgroup2")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    found = Machine(tmp_path_factory.mktemp("systemd"))
    try:
        found.wait()
        found.output("sh", "-c", INSTALL)
        version = int(found.output("systemctl", "--version").split()[1])
        if version < NOTIFY_RELOAD_SINCE:
            found.output("sh", "-c", OLDER)
        found.output("systemctl", "daemon-reload")
        found.output("systemctl", "start", "users.service")
        found.output("systemctl", "enable", "--now", SOCKET, SERVICE)
        yield found
    finally:
        found.close()


def test_the_service_is_ready_when_the_start_returns(machine: Machine) -> None:
    machine.output("systemctl", "restart", SERVICE)
    assert (machine.property("ActiveState"), machine.property("StatusText")) == ("active", "serving")
    assert machine.get() == "Ada"
    assert "warning" not in machine.journal().lower()


def test_the_service_has_no_rights_and_its_state_is_private(machine: Machine) -> None:
    number = machine.property("MainPID")
    status = dict(
        line.split(":\t", 1) for line in machine.output("cat", f"/proc/{number}/status").splitlines() if ":\t" in line
    )
    assert status["Uid"].split()[0] not in ("", "0")
    assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    modes = machine.output("find", "/var/lib/private/api-gateway", "-printf", "%M %u\n").split("\n")
    assert {line.split()[0][4:] for line in modes} == {"------"}
    writable = machine.run(
        *("nsenter", "--target", number, "--mount", "setpriv", "--reuid", status["Uid"].split()[0], "--clear-groups"),
        *("find", "/etc", "/usr", "/opt", "/home", "/root", "/srv", "-xdev", "-type", "d", "-writable"),
    )
    assert writable.stdout == ""
    assert machine.run("ls", "/var/lib/private/api-gateway/state/operator-token").returncode == 0


def test_a_reload_returns_when_it_is_applied_and_keeps_the_configuration_if_the_new_one_is_invalid(
    machine: Machine,
) -> None:
    number = machine.property("MainPID")
    change = "sed -i 's/capacity: 100000/capacity: 200000/' /etc/api-gateway/gateway.yaml"
    machine.output("sh", "-c", f"cp /etc/api-gateway/gateway.yaml /root/good.yaml; {change}")
    machine.output("systemctl", "reload", SERVICE)
    eventually(lambda: "capacity: 100000 -> 200000" in machine.journal(), machine.journal())
    machine.output("sh", "-c", "echo 'upstrams: 5' >> /etc/api-gateway/gateway.yaml")
    machine.output("systemctl", "reload", SERVICE)
    eventually(lambda: "upstrams: unknown key; did you mean 'upstreams'?" in machine.journal(), "an error")
    assert machine.get() == "Ada"
    machine.output("cp", "/root/good.yaml", "/etc/api-gateway/gateway.yaml")
    machine.output("systemctl", "reload", SERVICE)
    assert (machine.property("MainPID"), machine.property("ActiveState")) == (number, "active")


def test_no_request_fails_while_the_service_restarts(machine: Machine) -> None:
    """Twice at once, and then by replacing the workers; each request has a new connection, which waits."""
    load = machine.load(20)
    for _ in range(2):
        machine.output("systemctl", "restart", SERVICE)
    machine.output("systemctl", "kill", "--kill-whom=main", "--signal=SIGUSR2", SERVICE)
    output, errors = load.communicate(timeout=2 * START)
    eventually(lambda: "rolling restart complete: 2 workers" in machine.journal(), machine.journal(), START)
    assert set(json.loads(output)) == {"200"}, output + errors
    assert "CRITICAL" not in machine.journal()


def test_a_killed_gateway_is_started_again(machine: Machine) -> None:
    number = machine.property("MainPID")
    machine.output("kill", "-KILL", number)
    eventually(lambda: machine.property("MainPID") not in ("0", number), "another process", START)
    assert machine.get() == "Ada"
    assert machine.property("NRestarts") == "1"


def test_a_request_starts_a_stopped_service(machine: Machine) -> None:
    eventually(lambda: machine.property("ActiveState") == "active", "the service is active", START)
    machine.output("systemctl", "reset-failed", SERVICE)  # the tests before count towards StartLimitBurst=
    machine.output("systemctl", "stop", SERVICE)
    assert (machine.property("ActiveState"), machine.property("Result")) == ("inactive", "success")
    assert machine.run("systemctl", "is-active", SOCKET).stdout == "active\n"
    assert machine.get() == "Ada"
