"""Fixtures shared by all tests."""

import gc
import itertools
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from api_gateway.downstream.states import ILLEGAL_EVENTS
from api_gateway.proxy.exchange import ProxyExchange
from api_gateway.system.clocks import SYSTEM_CLOCKS, Clocks
from tests import loop_watch
from tests.kit import Behaviour, FakeClock, RawUpstream, RunningGateway, reply, running_gateway
from tests.processes import reports_of_processes
from tests.store_kit import SERVERS, StoreServer

PROCESSES_PER_CORE = 4
MOST_PROCESSES = 12


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes `-n auto` means: the tests wait more than they compute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_PROCESSES, PROCESSES_PER_CORE * cores)


MEASURED_CASES = 2
MEASURED = "tests/wire/"
# Tests of tools and documents, and tests of many requests or processes, nearly all of whose lines others reach too:
# they alone reach 0.2 % of the branches, in a third of the time that measuring takes.
UNMEASURED = tuple(
    f"tests/{name}"
    for name in (
        "docs/",
        "process/test_admin_listener.py",
        "process/test_benchmarks.py",
        "process/test_chaos.py",
        "process/test_cli.py",
        "process/test_credentials_in_traffic.py",
        "process/test_fuzz.py",
        "process/test_key_commands.py",
        "process/test_listeners.py",
        "process/test_load_test.py",
        "process/test_loop_watch.py",
        "process/test_replay.py",
        "process/test_slow_readers.py",
        "process/test_view_commands.py",
        "store/test_limiter_invariants.py",
        "store/test_lost_replies.py",
        "store/test_redis_limiter.py",
        "store/test_refunds.py",
        "store/test_share_debts.py",
        "store/test_store_losses.py",
        "unit/test_admission_order.py",
        "unit/test_architecture.py",
        "unit/test_names.py",
        "unit/test_recovery.py",
        "unit/test_request_heads.py",
        "unit/test_surface.py",
        "wire/test_deadlines.py",
        "wire/test_keepalive.py",
        "wire/test_limits_of_peers.py",
        "wire/test_retries.py",
        "wire/test_scale.py",
        "wire/test_steps.py",
    )
)


# From the tests that mostly wait to those that mostly compute.
ORDER = tuple(f"tests/{folder}/" for folder in ("process", "docs", "store", "wire", "unit"))


def in_turn(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """Return the tests in an order whose equal parts, one for each process, have equal shares of each folder.

    Half of the processes begin with the tests that wait, the other half with those that compute, so that neither the
    cores nor the processes are idle. Files stay whole, so that few fixtures of a module are created twice. xdist's
    `worksteal` gives each process a part.
    """
    files = [list(file) for _, file in itertools.groupby(items, lambda item: item.path)]
    files.sort(key=lambda file: next((n for n, one in enumerate(ORDER) if file[0].nodeid.startswith(one)), len(ORDER)))
    parts: list[list[list[pytest.Item]]] = [[] for _ in range(processes)]
    for file in files:
        min(parts, key=lambda part: sum(map(len, part))).append(file)
    for part in parts[1::2]:
        part.reverse()
    return [item for part in parts for file in part for item in file]


@pytest.hookimpl(trylast=True)  # the tests that are not selected are no longer there
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Divide the tests among the processes, and exclude from the measurement of coverage what repeats."""
    exclude_repetitions(items)
    if hasattr(config, "workerinput"):  # by xdist: this is one of several processes
        items[:] = in_turn(items, config.workerinput["workercount"])


def exclude_repetitions(items: list[pytest.Item]) -> None:
    """Exclude what repeats from the measurement of coverage, in this process and in those that a test starts.

    Tracing makes a test several times slower, and further cases of a parametrised test, and generated examples,
    seldom reach further lines. The coverage that is measured is a lower bound. Tests of gateways that run in a thread
    of their own for a whole module are measured entirely: a pause would end the tracing of that thread.
    """
    cases: Counter[str] = Counter()
    for item in items:
        name = item.nodeid.partition("[")[0]
        cases[name] += 1
        is_generated = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        is_repetition = is_generated or cases[name] > MEASURED_CASES
        if name.startswith(UNMEASURED) or (is_repetition and not name.startswith(MEASURED)):
            item.add_marker(pytest.mark.no_cover)


gc.disable()  # until the tests are collected: nearly all that is imported and collected stays


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave out all that was imported and collected when garbage is collected, in whichever callback it begins."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts into the background so, and the gateways that the tests start would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ProxyExchange.is_strict = True  # an event that the state of an exchange does not allow raises

# Hypothesis measures time: on a busy machine a slow example is not a finding.
settings.register_profile("whole", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("usual", settings.get_profile("whole"), max_examples=50)
settings.register_profile("quick", settings.get_profile("whole"), max_examples=20)  # make unit
settings.load_profile("usual")  # others by --hypothesis-profile


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of tests that use no folder of their own, which takes longer to create than most run."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(autouse=True)
def _no_ambient_configuration(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, shared_folder: Path
) -> Iterator[None]:
    """A test sees no configuration of the machine it runs on, nor of another test: no variables, no .env, no state."""
    folder: Path = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else shared_folder
    for name in list(os.environ):
        if name.upper().startswith("GATEWAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "xdg-state"))
    monkeypatch.chdir(folder)
    yield
    if os.listdir(shared_folder):  # noqa: PTH208 - for every test, and five times as fast as `iterdir`
        shutil.rmtree(shared_folder)
        shared_folder.mkdir()


LOOP_REPORTS: list[str] = []
loop_watch.install(LOOP_REPORTS.append)


@pytest.fixture
def loop_reports() -> list[str]:
    """What has been reported in this test of callbacks that held the loop of a gateway in this process."""
    return LOOP_REPORTS


@pytest.fixture(autouse=True)
def _no_callback_holds_the_loop(loop_reports: list[str]) -> Iterator[None]:
    """A test fails if a gateway's event loop could not turn for 50 ms, in this process or in one that it runs."""
    loop_reports.clear()
    reports_of_processes()
    yield
    found = [*loop_reports, *reports_of_processes()]
    loop_reports.clear()
    if found:
        pytest.fail("\n".join(found), pytrace=False)


ILLEGAL_EVENTS.raises = True


@pytest.fixture(autouse=True)
def _no_illegal_event() -> Iterator[None]:
    """A test fails if an event in this process was illegal in the state of its connection, wherever it was raised."""
    ILLEGAL_EVENTS.counts.clear()
    yield
    found = dict(ILLEGAL_EVENTS.counts)
    ILLEGAL_EVENTS.counts.clear()
    if found:
        pytest.fail(f"illegal events: {found}", pytrace=False)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="module")
def shared() -> Iterator[RawUpstream]:
    """An upstream that answers `ok`."""
    server = RawUpstream()
    yield server
    server.close()


@pytest.fixture
def up(shared: RawUpstream) -> RawUpstream:
    """The upstream of the module as if it were new."""
    shared.behave, shared.reads_body = reply(), True
    shared.requests.clear()
    return shared


@pytest.fixture
def upstream() -> Iterator[Callable[..., RawUpstream]]:
    """Start raw upstreams; they are closed at the end."""
    started: list[RawUpstream] = []

    def start(behave: Behaviour | None = None, *, reads_body: bool = True) -> RawUpstream:
        started.append(RawUpstream(behave or reply(), reads_body=reads_body))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Callable[..., RunningGateway]]:
    """Start gateways, on the system's clocks unless others are given; they are stopped at the end."""
    with ExitStack() as stack:
        count = 0

        def start(sections: dict[str, Any], clocks: Clocks = SYSTEM_CLOCKS) -> RunningGateway:
            nonlocal count
            count += 1
            return stack.enter_context(running_gateway(sections, tmp_path / f"state-{count}", clocks))

        yield start


@pytest.fixture(params=SERVERS)
def binary(request: pytest.FixtureRequest) -> str:
    """The program of a store, once for every server there is."""
    found = SERVERS[request.param]
    if found is None:
        pytest.skip(f"there is no {request.param} server on the PATH")
    return found


@pytest.fixture
def store(binary: str) -> Iterator[StoreServer]:
    """A real store of its own."""
    with StoreServer(binary) as server:
        yield server


@pytest.fixture
def store_server(store: StoreServer) -> StoreServer:
    """The same, where a client store is what is called a store."""
    return store


@pytest.fixture
def any_store() -> Iterator[StoreServer]:
    """A real store of its own, for what does not depend on which server it is."""
    found = next((binary for binary in SERVERS.values() if binary is not None), None)
    if found is None:
        pytest.skip("there is no server of a store")
    with StoreServer(found) as server:
        yield server


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `<name>.pem` and `<name>.key` for 127.0.0.1 and for other.test, each its own authority."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    directory = tmp_path_factory.mktemp("certificates")
    for name, alternative in (("here", "IP:127.0.0.1"), ("other", "DNS:other.test")):
        subprocess.run(
            [
                openssl,
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-subj",
                "/CN=test",
                "-addext",
                f"subjectAltName={alternative}",
                "-days",
                "1",
                "-keyout",
                str(directory / f"{name}.key"),
                "-out",
                str(directory / f"{name}.pem"),
            ],
            check=True,
            capture_output=True,
        )
    return directory
