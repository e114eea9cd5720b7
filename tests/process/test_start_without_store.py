"""A gateway that starts while the shared store is unavailable: which ids it lets anyone claim by a bare header."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.kit import RawAnswer, RawClient, RawUpstream, eventually, reason
from tests.processes import Running, children, config_file, process
from tests.store_kit import StoreServer

GENEROUS = "tiers: {FREE: {rate: 100000, capacity: 1000000}}\naddress_limit: {rate: 0}\nlog: {access: false}\n"
CONNECTIONS = 16  # to a gateway with two workers, so that both have some
REFUSED, ADMITTED = (401, "credentials_required"), (200, "")
UNKNOWN = (503, "store_unavailable")


class Machine:
    """A folder with a configuration and a state folder, in which a gateway can be started again and again."""

    def __init__(self, folder: Path, up: RawUpstream, server: StoreServer, *arguments: str, extra: str = "") -> None:
        folder.mkdir()
        self.folder, self.arguments = folder, arguments
        self.kept = folder / "state" / "state" / "verified_only.json"
        store = f'store: {{url: "{server.url}", timeout: 0.5, decision_timeout: 0.1}}\n'
        self.config = config_file(folder, up.url, f"state_dir: {folder / 'state'}\n{GENEROUS}{store}{extra}")

    @contextmanager
    def started(self) -> Iterator[Running]:
        """Run the gateway, until the end of the block."""
        with process(
            "-m", "api_gateway", "--config", self.config, "--port", "0", *self.arguments, cwd=self.folder
        ) as running:
            assert running.port
            yield running
            assert running.terminate() == 0

    def ids(self) -> set[str]:
        """Return the ids in the file."""
        return set(json.loads(self.kept.read_text())["ids"]) if self.kept.exists() else set()


def outcome(answer: RawAnswer) -> tuple[int, str]:
    return reason(answer) if answer.status != 200 else ADMITTED


def outcomes(running: Running, client_id: str, connections: int = 1) -> set[tuple[int, str]]:
    """Return what requests with a bare id come to, each on a new connection."""
    found = set()
    for _ in range(connections):
        with RawClient(running.port) as client:
            found.add(outcome(client.get("/api/up", (f"X-Client-ID: {client_id}",))))
    return found


def post(running: Running, where: str, **body: Any) -> Any:
    content = {"Content-Type": "application/json"}
    answer = running.ask(where, method="POST", headers=content, body=json.dumps(body).encode())
    assert answer.status < 300, answer.body
    return answer.json()


def workers_of(running: Running) -> set[int]:
    found = children(running.popen.pid)
    return {pid for pid, words in found.items() if any("gateway worker" in word for word in words)}


def check_the_start_with_a_file(one: Machine) -> None:
    """After the start, and after a reload; the explanation says the same."""
    with one.started() as running:
        for _ in range(2):
            assert outcomes(running, "acme") == {REFUSED}
            assert outcomes(running, "initech") == {ADMITTED}
            said = post(running, "/explain", client_id="acme", path="/api/up")
            assert (said["result"]["status"], said["result"]["reason"]) == REFUSED
            assert running.ask("/clients/acme").json()["verified_only"] is True
            said = post(running, "/explain", client_id="initech", path="/api/up")
            assert (said["result"]["decision"], said["client"]["registered"]) == ("allowed", False)
            assert "it is unknown whether it has a record of this client" in said["client"]["detail"]
            path = Path(one.config)
            path.write_text(path.read_text().replace("rate: 100000", "rate: 100001"))
            post(running, "/reload")
        assert f"ids that need a credential by {one.kept}: 1" in running.errors


def check_the_start_without_a_file(fresh: Machine, server: StoreServer) -> None:
    """A gateway that knows nothing admits no bare id, and says so, until the store is available."""
    with fresh.started() as running:
        assert outcomes(running, "acme") == outcomes(running, "initech") == {UNKNOWN}
        assert outcomes(running, "of-the-file") == {REFUSED}, "its key is in the configuration"
        with RawClient(running.port) as client:
            assert client.get("/api/up").status == 200, "an address claims no id"
        said = post(running, "/explain", client_id="acme", path="/api/up")
        assert (said["result"]["status"], said["result"]["reason"]) == UNKNOWN
        assert "unavailable since the start" in said["client"]["detail"]
        assert f"not known which ids need a credential ({fresh.kept} does not exist yet)" in running.errors
        server.resume()
        eventually(lambda: outcomes(running, "acme") == {REFUSED}, "the store has returned")
        assert outcomes(running, "initech") == {ADMITTED}
        assert "unknown" not in post(running, "/explain", client_id="initech", path="/api/up")["client"]["detail"]
        eventually(lambda: fresh.ids() == {"acme"}, "it is kept for the next start")


def test_an_id_that_needs_a_credential_cannot_be_claimed_at_a_start_without_the_store(
    up: RawUpstream, any_store: StoreServer, tmp_path: Path
) -> None:
    """One gateway, a reload, two workers of which one is replaced, and a machine that has never reached the store."""
    one, pair = (
        Machine(tmp_path / name, up, any_store, *arguments)
        for name, arguments in (("one", ()), ("pair", ("--workers", "2")))
    )
    digest = f"sha256:{'ab' * 32}"
    own = f'clients: {{of-the-file: {{keys: {{a: {{digest: "{digest}"}}}}}}}}\n'
    fresh = Machine(tmp_path / "fresh", up, any_store, extra=own)
    with ExitStack() as stack:
        two = stack.enter_context(pair.started())
        with one.started() as running:
            post(running, "/clients/acme/keys")
            post(running, "/clients/open/keys", verified_only=False)
            eventually(lambda: one.ids() == pair.ids() == {"acme"}, "both machines keep the id")
            assert one.kept.stat().st_mode & 0o777 == 0o600
            assert outcomes(two, "acme", CONNECTIONS) == {REFUSED}
        any_store.pause()
        before = workers_of(two)
        assert len(before) == 2
        os.kill(min(before), signal.SIGKILL)
        eventually(lambda: len(workers_of(two) - before) == 1, "the worker is replaced")
        eventually(lambda: two.errors.count("started without the client store; ids") == 1, "it has read the file")
        check_the_start_with_a_file(one)
        assert outcomes(two, "acme", CONNECTIONS) == {REFUSED}
        assert outcomes(two, "initech", CONNECTIONS) == {ADMITTED}
        check_the_start_without_a_file(fresh, any_store)
