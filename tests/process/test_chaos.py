"""The benchmarks that break things: what they make of what they saw, and one short run of each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from api_gateway.config import GatewayConfig
from benchmarks.chaos import FAILURES, Figures, Run, figures, summary, table
from benchmarks.chaos import main as chaos
from benchmarks.fallible import PROXIES, RESILIENCE, Place, known, this_gateway
from benchmarks.soak import ALLOWED, Notes, SoakResult, rise
from benchmarks.steady import Call
from benchmarks.target import targets
from benchmarks.visitors import Clients
from tests.kit import ask, eventually

ROOT = Path(__file__).parents[2]
RATE = 120.0  # 40 for each of three targets, 10 in a bin

# Chaos


@pytest.fixture
def run() -> Run:
    """Seconds 2 to 4: the first target is ailing, and left out after half a second; 4 to 6: it is well, and back at 5.

    The other two get what it does not. Before, and when it is back, each gets every third request.
    """
    calls = [Call(number, number / RATE, 200, 0.01, number / RATE) for number in range(int(6 * RATE))]
    notes: list[list[tuple[int, float]]] = [[], [], []]
    for call in calls:
        is_out = 2.5 <= call.due < 5
        notes[1 + call.number % 2 if is_out else call.number % 3].append((call.number, call.due + 0.001))
    return Run(calls, notes, 2, 4, 6, RATE)


def test_where_all_goes_well_nothing_is_counted(run: Run) -> None:
    found = figures(run, "notes")
    assert (found.requests, found.failed, found.slow, found.retries) == (4 * RATE, 0, 0, 0)
    assert (found.out, found.back, found.peak) == (0.5, 1.0, 1.0)


def test_a_request_fails_without_a_200_and_is_slow_beyond_a_second(run: Run) -> None:
    for number, (status, lasted) in enumerate([(503, 0.1), (0, 5.0), (504, 2.0), (200, 1.01), (200, 0.99)]):
        run.calls[300 + number].status, run.calls[300 + number].lasted = status, lasted
    run.calls[0].status = 500  # within the warm-up
    found = figures(run, "notes")
    assert (found.failed, found.slow, found.statuses) == (3, 1, {503: 1, 0: 1, 504: 1})


def test_a_retry_is_a_request_that_is_seen_again(run: Run) -> None:
    """Also by the same target; one that no target saw makes up for none."""
    for number in (300, 301):
        run.notes[number % 2 + 1].append((number, 2.6))
    run.notes[2] = [(number, at) for number, at in run.notes[2] if number != 310]
    assert figures(run, "notes").retries == 2


def test_the_peak_is_the_most_that_a_second_holds_while_it_recovers(run: Run) -> None:
    run.notes[0] += [(700, 5.5)] * 20  # 40 are its share
    run.notes[0] += [(700, 4.1)] * 90  # sent while it was stopped
    assert figures(run, "notes").peak == pytest.approx(1.5, abs=0.03)
    for call in run.calls[560:680]:
        call.sent = 5.45  # all at once, some of them late: with the others, 180 within the second
    run.calls.sort(key=lambda call: call.sent)
    assert figures(run, "notes").peak < 1.3


def test_a_target_that_is_never_left_out_or_never_back_has_no_time(run: Run) -> None:
    run.notes[0] = [(call.number, call.due) for call in run.calls if call.number % 3 == 0 and call.due < 4]
    found = figures(run, "notes")
    assert (found.out, found.back, found.peak) == (None, None, 0)


def test_a_target_that_cannot_take_notes_is_out_when_no_client_waits_for_it(run: Run) -> None:
    for call in run.calls:
        if 2 <= call.due < 3 and call.number % 3 == 0:
            call.lasted = 1.01
    assert figures(run, "clients").out == 1.0
    assert figures(run, "nowhere").out is None


def test_the_tables_have_a_row_for_each_proxy() -> None:
    one = Figures(requests=4800, failed=12, slow=3, retries=40, out=0.25, back=None, peak=1.042)
    row = "| this gateway | 4,800 | 12 | 3 | 40 | 0.25 | - | 1.04 |"
    lines = table(FAILURES["dead"], [("this gateway", one), ("nginx", one)]).splitlines()
    assert lines[4:] == [row, row.replace("this gateway", "nginx")]
    assert summary([("nginx", [one, one])]).splitlines()[-1] == "| nginx | 9,600 | 24 | 6 | 80 | 1.04 |"


@pytest.mark.parametrize("proxy", PROXIES, ids=lambda proxy: proxy.name)
def test_every_proxy_is_configured_with_all_targets(proxy: object, tmp_path: Path) -> None:
    found = next(one for one in PROXIES if one is proxy)
    launch = found.launch(Place(tmp_path, 1001, (1002, 1003, 1004)))
    text = " ".join([*launch.command, *(file.read_text() for file in tmp_path.iterdir())])
    assert all(str(port) in text for port in range(1001, 1005))


def test_the_gateways_settings_are_those_it_knows(tmp_path: Path) -> None:
    """What comes later stands there already, and is left out until then."""
    command = this_gateway(Place(tmp_path, 1001, (1002, 1003, 1004))).command
    config = GatewayConfig.model_validate(json.loads(Path(command[-1]).read_text()))
    for section in ("circuit_breaker", "retry", "timeouts", "health_check"):
        given = getattr(config.upstreams["up"], section)
        for name, value in known(type(given), RESILIENCE[section]).items():
            assert getattr(given, name) == value


def test_a_target_records_requests_and_follows_commands(tmp_path: Path) -> None:
    with targets(1, tmp_path, 0) as (target,):
        url = f"http://127.0.0.1:{target.port}"
        assert [ask(f"{url}/{path}").status for path in ("api/7", "health", "api/8")] == [200] * 3
        target.tell("errors")
        eventually(lambda: ask(f"{url}/api/9").status == 503, "it errs")
        assert ask(f"{url}/health").status == 200
        target.tell("down")
        eventually(lambda: not target.listens(), "it is down")
        target.tell("up")
        eventually(target.listens, "it is up")
        target.kill()
        assert not target.listens()
        target.start()
        assert ask(f"{url}/api/10").status == 200
        numbers = [number for number, _ in target.notes()]
        assert numbers[:2] == [7, 8]
        assert set(numbers[2:-1]) == {9}
        assert numbers[-1] == 10


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chaos(["--failures", "dead,gone"])
    assert "unknown: gone; there are dead, errors, slow, flapping, hanging" in capsys.readouterr().err


@pytest.mark.heavy
def test_a_short_run_of_chaos_prints_its_tables(tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    arguments = ["--peers", "gateway", "--failures", "errors", "--seconds", "1", "--rate", "100", "--json", str(file)]
    lines = printed("benchmarks.chaos", *arguments).splitlines()
    assert lines[4].startswith("| this gateway | 2")
    assert lines[-1].startswith("| this gateway | 2")
    assert json.loads(file.read_text())["errors"]["gateway"]["requests"] == pytest.approx(200, abs=30)


# Soak


def test_a_line_rises_by_what_most_notes_say() -> None:
    times = [float(number) for number in range(200)]
    assert rise(times, [5.0] * 200) == 0
    assert rise(times, [5 + at / 199 for at in times]) == pytest.approx(1)
    assert rise(times, [1000.0 if at in (6, 150) else 5 + at / 199 for at in times]) == pytest.approx(1, abs=0.05)
    assert rise([1.0], [5.0]) == 0


def soak_result(rising: float = 0.0, **after: float) -> SoakResult:
    """Return what a soak came to in which memory rose by so much."""
    rest = dict.fromkeys(ALLOWED, 10.0) | {"in flight": 0.0}
    values = {name: [10.0, 10.0, 10.0] for name in ALLOWED} | {"memory, MB": [10, 10 + rising / 2, 10 + rising]}
    return SoakResult(Notes([0, 1, 2], values), rest, rest | after, Clients(1))


def test_what_stays_as_it_was_is_flat() -> None:
    assert soak_result().problems() == []
    assert soak_result(2.9).problems() == []


def test_what_rises_or_is_left_over_is_not() -> None:
    assert soak_result(3.1).problems() == ["memory, MB rises by 3.10, 3 are allowed"]
    assert soak_result(**{"in flight": 2.0}).problems() == ["2 requests are in flight after the last client"]
    assert soak_result(descriptors=11.0).problems() == ["1 descriptors are left open"]
    unlike = soak_result()
    unlike.clients.unexpected["plain: status 500"] = 3
    assert unlike.problems() == ["3 times plain: status 500"]


@pytest.mark.heavy
def test_a_short_soak_reports_its_measurements_and_leaves_nothing_open() -> None:
    """A line through so few notes says nothing: whether they rise is not looked at here."""
    lines = printed("benchmarks.soak", "--minutes", "0.1", codes=(0, 1)).splitlines()
    end = 2 + len(ALLOWED)
    assert [line.split(" | ")[0] for line in lines[2:end]] == [f"| {name}" for name in ALLOWED]
    assert {line.split(" | ")[0] for line in lines[end + 3 : end + 12]} == {
        f"| {kind}"
        for kind in ("plain", "stranger", "upload", "chunks", "stream", "limited", "failing", "talker", "leaver")
    }
    assert all(line == "Flat." or " rises by " in line for line in lines[end + 13 :]), lines[end + 13 :]


def printed(module: str, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    """Run a benchmark and return what it prints."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout
